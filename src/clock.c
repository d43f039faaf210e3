/*
 * clock.c
 *	  The one clock that limits, back-offs and polls go by.
 *
 * userpilot.time_scale makes it run faster, together with a stand-in that
 * does the same, so that an hour's outage can be tested in seconds.
 */
#include "postgres.h"

#include <math.h>

#include "portability/instr_time.h"

#include "clock.h"
#include "settings.h"

int64
clock_now(void)
{
	instr_time	now;

	INSTR_TIME_SET_CURRENT(now);
	return (int64) (INSTR_TIME_GET_MILLISEC(now) * userpilot_time_scale);
}

long
clock_real_ms(int64 api_ms)
{
	return (long) Min(ceil(api_ms / userpilot_time_scale), 3600 * 1000.0);
}

int64
clock_api_ms(int64 real_ms)
{
	return (int64) (real_ms * userpilot_time_scale);
}
