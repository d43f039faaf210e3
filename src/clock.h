/*
 * clock.h
 *	  The one clock that limits, back-offs and polls go by.
 */
#ifndef USERPILOT_CLOCK_H
#define USERPILOT_CLOCK_H

/* Milliseconds of API time: monotonic, the same in all processes */
extern int64 clock_now(void);

/* How long to really sleep for so many milliseconds of API time */
extern long clock_real_ms(int64 api_ms);

/* The other way round: so many real milliseconds in API time */
extern int64 clock_api_ms(int64 real_ms);

#endif
