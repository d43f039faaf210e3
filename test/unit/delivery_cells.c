/*
 * delivery_cells.c
 *	  Every answer there can be, cell by cell, against what the manual of the
 *	  extension promises to do then; and the bounds of all waiting.
 *
 * What is expected is written down as ranges of answers, in an order of its
 * own and without looking at delivery.c's classes: the first line that fits
 * an answer holds.
 */
#include "postgres_fe.h"

#include <limits.h>

#include "delivery.h"

#define MAX_ATTEMPTS 10

/* Which calls a line is about */
#define I (1 << DELIVERY_IDENTIFY)
#define S (1 << DELIVERY_SUBMIT)
#define P (1 << DELIVERY_POLL)
#define L (1 << DELIVERY_LIST)

/* Which transports */
#define ANS (1 << DELIVERY_ANSWERED)
#define NOT (1 << DELIVERY_NOT_SENT)
#define LOST (1 << DELIVERY_LOST)
#define DROP (1 << DELIVERY_DROPPED)

/* What else it asks for */
#define OTHERS (1 << 0)			/* others succeed */
#define ALONE (1 << 1)			/* they do not */
#define CLEAR (1 << 2)			/* the body is understood */
#define GARBLED (1 << 3)		/* it is not */
#define AFTER (1 << 4)			/* a sane Retry-After */
#define ONE (1 << 5)			/* one record */
#define THIRD (1 << 6)			/* the third attempt or a later one */
#define LAST (1 << 7)			/* the last attempt */
#define AGAIN (1 << 8)			/* it has failed before */

typedef struct Line
{
	int			calls;
	int			transports;
	int			from;			/* status */
	int			to;
	int			needs;
	DeliveryAction action;
	bool		counts;
} Line;

static const Line lines[] = {
	/* nothing left us: nobody's failure */
	{I | S | P | L, NOT, 0, 999, 0, DELIVERY_OUTAGE, false},

	/* a job whose answer is lost may run; asking again is harmless */
	{S, LOST, 0, 999, 0, DELIVERY_UNKNOWN, true},
	{P | L, LOST, 0, 999, ALONE, DELIVERY_OUTAGE, false},
	{P | L, LOST, 0, 999, 0, DELIVERY_BACKOFF, false},
	{I, LOST, 0, 999, ALONE, DELIVERY_OUTAGE, false},
	{I, LOST, 0, 999, LAST, DELIVERY_DEAD, true},
	{I, LOST, 0, 999, 0, DELIVERY_BACKOFF, true},

	/* a kept connection's end is no outage: a new one will tell */
	{S, DROP, 0, 999, 0, DELIVERY_UNKNOWN, true},
	{P, DROP, 0, 999, 0, DELIVERY_BACKOFF, false},
	{L, DROP, 0, 999, ALONE, DELIVERY_OUTAGE, false},
	{L, DROP, 0, 999, 0, DELIVERY_BACKOFF, false},
	{I, DROP, 0, 999, ALONE, DELIVERY_BACKOFF, false},
	{I, DROP, 0, 999, LAST, DELIVERY_DEAD, true},
	{I, DROP, 0, 999, 0, DELIVERY_BACKOFF, true},

	/* what is no final HTTP status is no answer */
	{S, ANS, 0, 199, 0, DELIVERY_UNKNOWN, true},
	{P | L, ANS, 0, 199, ALONE, DELIVERY_OUTAGE, false},
	{P | L, ANS, 0, 199, 0, DELIVERY_BACKOFF, false},
	{I, ANS, 0, 199, ALONE, DELIVERY_OUTAGE, false},
	{I, ANS, 0, 199, LAST, DELIVERY_DEAD, true},
	{I, ANS, 0, 199, 0, DELIVERY_BACKOFF, true},
	{S, ANS, 600, 999, 0, DELIVERY_UNKNOWN, true},
	{P | L, ANS, 600, 999, ALONE, DELIVERY_OUTAGE, false},
	{P | L, ANS, 600, 999, 0, DELIVERY_BACKOFF, false},
	{I, ANS, 600, 999, ALONE, DELIVERY_OUTAGE, false},
	{I, ANS, 600, 999, LAST, DELIVERY_DEAD, true},
	{I, ANS, 600, 999, 0, DELIVERY_BACKOFF, true},

	/* success */
	{I, ANS, 200, 299, 0, DELIVERY_LEARN, false},
	{S | P | L, ANS, 200, 299, CLEAR, DELIVERY_LEARN, false},
	{S, ANS, 200, 299, GARBLED, DELIVERY_UNKNOWN, true},
	{P | L, ANS, 200, 299, GARBLED, DELIVERY_BACKOFF, false},

	/* the wrong place, the wrong key */
	{I, ANS, 300, 399, ALONE, DELIVERY_OUTAGE, false},
	{I, ANS, 300, 399, LAST, DELIVERY_DEAD, true},
	{I, ANS, 300, 399, 0, DELIVERY_BACKOFF, true},
	{S, ANS, 300, 399, 0, DELIVERY_OUTAGE, false},
	{P | L, ANS, 300, 399, 0, DELIVERY_BACKOFF, false},
	{I | S | P | L, ANS, 401, 401, 0, DELIVERY_PAUSE, false},
	/* ... or, as others get through, a body that a firewall dislikes */
	{I, ANS, 403, 403, OTHERS | AGAIN | LAST, DELIVERY_DEAD, true},
	{I, ANS, 403, 403, OTHERS | AGAIN, DELIVERY_BACKOFF, true},
	{S, ANS, 403, 403, OTHERS | AGAIN | ONE, DELIVERY_DEAD, true},
	{S, ANS, 403, 403, OTHERS | AGAIN, DELIVERY_DISSOLVE, true},
	{I | S | P | L, ANS, 403, 403, 0, DELIVERY_PAUSE, false},

	/* too fast */
	{I | S | P | L, ANS, 429, 429, 0, DELIVERY_THROTTLE, false},
	{I | S | P | L, ANS, 503, 503, AFTER, DELIVERY_THROTTLE, false},

	/* in trouble: 408, 425, 5xx */
	{I, ANS, 408, 408, ALONE, DELIVERY_OUTAGE, false},
	{I, ANS, 408, 408, LAST, DELIVERY_DEAD, true},
	{I, ANS, 408, 408, 0, DELIVERY_BACKOFF, true},
	{I, ANS, 425, 425, ALONE, DELIVERY_OUTAGE, false},
	{I, ANS, 425, 425, LAST, DELIVERY_DEAD, true},
	{I, ANS, 425, 425, 0, DELIVERY_BACKOFF, true},
	{I, ANS, 500, 599, ALONE, DELIVERY_OUTAGE, false},
	{I, ANS, 500, 599, LAST, DELIVERY_DEAD, true},
	{I, ANS, 500, 599, 0, DELIVERY_BACKOFF, true},
	{S, ANS, 408, 408, OTHERS | THIRD, DELIVERY_DISSOLVE, true},
	{S, ANS, 408, 408, 0, DELIVERY_UNKNOWN, true},
	{S, ANS, 425, 425, OTHERS | THIRD, DELIVERY_DISSOLVE, true},
	{S, ANS, 425, 425, 0, DELIVERY_UNKNOWN, true},
	{S, ANS, 500, 599, OTHERS | THIRD, DELIVERY_DISSOLVE, true},
	{S, ANS, 500, 599, 0, DELIVERY_UNKNOWN, true},
	{P | L, ANS, 408, 408, ALONE, DELIVERY_OUTAGE, false},
	{P | L, ANS, 425, 425, ALONE, DELIVERY_OUTAGE, false},
	{P | L, ANS, 500, 599, ALONE, DELIVERY_OUTAGE, false},
	{P | L, ANS, 500, 599, OTHERS, DELIVERY_BACKOFF, false},

	/* refused: the slot, the size, a record; or the job is gone */
	{S, ANS, 409, 409, 0, DELIVERY_CONFLICT, false},
	{S, ANS, 413, 413, ONE, DELIVERY_DEAD, true},
	{S, ANS, 413, 413, 0, DELIVERY_SHRINK, false},
	{P, ANS, 404, 404, 0, DELIVERY_UNKNOWN, true},
	{I, ANS, 400, 499, 0, DELIVERY_DEAD, true},
	{S, ANS, 400, 499, ONE, DELIVERY_DEAD, true},
	{S, ANS, 400, 499, 0, DELIVERY_DISSOLVE, true},
	{P | L, ANS, 400, 499, 0, DELIVERY_BACKOFF, false}
};

/* A Retry-After and the wait it leads to; -1: it does not */
static const struct
{
	int			seconds;
	bool		sane;
	int64		wait_ms;
}			retry_afters[] = {
	{-1, false, -1},
	{INT_MIN, false, -1},
	{-60, false, -1},
	{0, true, -1},
	{1, true, 1000},
	{59, true, 59000},
	{3600, true, 3600000},
	{3601, true, 3600000},
	{86400, true, 3600000},
	{86401, false, -1},
	{INT_MAX, false, -1}
};

static const int attempts[] = {0, 1, 2, 3, 4, 9, 10, 11, INT_MAX};
static const int records[] = {1, 2, 10000};

static int	ntests;
static int	nfailed;
static int	nshown;			/* cells that were told */

/* One TAP line */
static void
check(bool passes, const char *name)
{
	printf("%sok %d - %s\n", passes ? "" : "not ", ++ntests, name);
	nfailed += passes ? 0 : 1;
}

/* The line that holds for an answer, NULL if none does */
static const Line *
expected(const DeliveryAnswer *a, bool sane)
{
	int			has = 0;
	int			i;

	has |= a->others_succeed ? OTHERS : ALONE;
	has |= a->understood ? CLEAR : GARBLED;
	has |= sane ? AFTER : 0;
	has |= a->records == 1 ? ONE : 0;
	has |= a->attempts >= 3 ? THIRD : 0;
	has |= a->attempts >= a->max_attempts ? LAST : 0;
	has |= a->again ? AGAIN : 0;
	for (i = 0; i < (int) lengthof(lines); i++)
	{
		const Line *line = &lines[i];

		if ((line->calls & (1 << a->call)) != 0 &&
			(line->transports & (1 << a->transport)) != 0 &&
			a->status >= line->from && a->status <= line->to &&
			(line->needs & has) == line->needs)
			return line;
	}
	return NULL;
}

/* Refused for what it says: a dead letter proves that the lane is well */
static bool
is_refusal(const DeliveryAnswer *a)
{
	if (a->transport != DELIVERY_ANSWERED || a->status / 100 != 4)
		return false;
	return a->status != 408 && a->status != 425 &&
		(a->status != 403 || a->call != DELIVERY_IDENTIFY);
}

/* Whether a body may have been applied all the same */
static bool
is_open(const DeliveryAnswer *a)
{
	if (a->transport != DELIVERY_ANSWERED)
		return a->transport != DELIVERY_NOT_SENT;
	switch (a->status / 100)
	{
		case 2:
			return !a->understood;
		case 4:
			return a->status == 408 || a->status == 425;
	}
	return true;
}

/* One cell; says which if it is not as expected */
static bool
cell_passes(const DeliveryAnswer *a, bool sane, int64 wait_ms)
{
	const Line *line = expected(a, sane);
	DeliveryDecision d = delivery_decide(a);
	bool		waits;

	waits = line != NULL && line->action == DELIVERY_THROTTLE && wait_ms >= 0;
	if (line != NULL && d.action == line->action && d.counts == line->counts &&
		d.refused == (d.action == DELIVERY_DEAD && is_refusal(a)) && d.open == is_open(a) &&
		d.wait_given == waits && d.wait_ms == (waits ? wait_ms : 0))
		return true;
	if (++nshown <= 20)
		printf("# call %d transport %d status %d retry-after %d understood %d "
			   "others %d records %d attempts %d: %s, counts %d, wait "
			   INT64_FORMAT "; expected %s\n",
			   a->call, a->transport, a->status, a->retry_after, a->understood,
			   a->others_succeed, a->records, a->attempts,
			   delivery_action_name(d.action), d.counts, d.wait_ms,
			   line != NULL ? delivery_action_name(line->action) : "nothing");
	return false;
}

/* All cells of one call, transport and status */
static bool
status_passes(DeliveryCall call, DeliveryTransport transport, int status)
{
	DeliveryAnswer a = {0};
	bool		passes = true;
	int			r;
	int			n;
	int			t;
	int			flags;

	a.call = call;
	a.transport = transport;
	a.status = status;
	a.max_attempts = MAX_ATTEMPTS;
	for (r = 0; r < (int) lengthof(retry_afters); r++)
	{
		a.retry_after = retry_afters[r].seconds;
		for (n = 0; n < (int) lengthof(records); n++)
		{
			a.records = records[n];
			for (t = 0; t < (int) lengthof(attempts); t++)
			{
				a.attempts = attempts[t];
				for (flags = 0; flags < 8; flags++)
				{
					a.understood = (flags & 1) != 0;
					a.others_succeed = (flags & 2) != 0;
					a.again = (flags & 4) != 0;
					passes = cell_passes(&a, retry_afters[r].sane,
										 retry_afters[r].wait_ms) && passes;
				}
			}
		}
	}
	return passes;
}

static void
test_decisions(void)
{
	static const char *const calls[] = {"identify", "submit", "poll", "list"};
	static const char *const transports[] = {"answered", "not sent", "lost", "dropped"};
	char		name[64];
	int			c;
	int			t;
	int			status;

	for (c = 0; c < (int) lengthof(calls); c++)
	{
		for (t = 0; t < (int) lengthof(transports); t++)
		{
			bool		passes = true;

			for (status = 0; status <= 999; status++)
				passes = status_passes(c, t, status) && passes;
			snprintf(name, sizeof(name), "%s, %s: every status",
					 calls[c], transports[t]);
			check(passes, name);
		}
	}
}

static void
test_names(void)
{
	bool		passes = true;
	int			a;
	int			b;

	for (a = DELIVERY_LEARN; a <= DELIVERY_UNKNOWN; a++)
	{
		const char *name = delivery_action_name(a);

		passes = passes && name != NULL && name[0] != '\0';
		for (b = DELIVERY_LEARN; b < a && passes; b++)
			passes = strcmp(name, delivery_action_name(b)) != 0;
	}
	check(passes, "every action has a name of its own");
}

/*
 * A back-off lies between low and high of 1, 2, 4, … s up to max, never falls
 * from one time to the next, and takes any number of times.
 */
static void
test_backoff(const char *name, int64 (*backoff) (int, double),
			 int64 max, double low, double high)
{
	static const int odd[] = {INT_MIN, -1, 0, 31, 32, 63, 64, 65, 1000, INT_MAX};
	bool		passes = true;
	int64		base = 1000;
	int64		before = 0;
	int			n;

	for (n = 1; n <= 40; n++)
	{
		int64		least = backoff(n, 0.0);
		int64		half = backoff(n, 0.5);
		int64		most = backoff(n, 0.999999);

		passes = passes && least == (int64) (base * low) &&
			least <= half && half <= most && most >= before &&
			most < base * high && most >= base * high - base / 1000 - 1;
		before = most;
		base = base * 2 > max ? max : base * 2;
	}
	for (n = 0; n < (int) lengthof(odd); n++)
	{
		int64		most = backoff(odd[n], 0.999999);

		passes = passes && most >= 0 &&
			(odd[n] > 1 ? most >= max * high - max / 1000 - 1 && most < max * high :
			 most < 1000 * high);
	}
	check(passes, name);
}

static void
test_jobs(void)
{
	const int64 minute = 60000;
	bool		passes = true;
	int64		before = 0;
	int64		t;

	for (t = 0; t <= 400000; t += 100)
	{
		int64		ms = delivery_poll_interval(t, 336000, PG_INT64_MAX);

		passes = passes && ms >= 2000 && ms <= 30000 && ms >= before &&
			(ms == 30000) == (t >= 336000);
		before = ms;
	}
	check(passes, "polls grow from 2 s to 30 s over a full job");
	check(delivery_poll_interval(0, 0, PG_INT64_MAX) == 2000 &&
		  delivery_poll_interval(-5, -5, -5) == 2000 &&
		  delivery_poll_interval(3000, 1000, PG_INT64_MAX) < 5000 &&
		  delivery_poll_interval(60000, 1000, PG_INT64_MAX) == 30000,
		  "a small job is asked about often for a minute");
	check(delivery_poll_interval(300000, 336000, 5000) == 5000 &&
		  delivery_poll_interval(300000, 336000, 0) == 2000 &&
		  delivery_poll_interval(340000, 336000, 0) == 2000 &&
		  delivery_poll_interval(100000, 336000, 200000) == delivery_poll_interval(100000, 336000, PG_INT64_MAX),
		  "a job is asked about when it should be done");
	check(delivery_poll_interval(336000 + 80000, 336000, 0) == 10000 &&
		  delivery_poll_interval(336000 + 8000000, 336000, -1) == 30000,
		  "... and ever more rarely if it is late");
	check(delivery_poll_interval(PG_INT64_MAX, PG_INT64_MAX, PG_INT64_MAX) == 30000 &&
		  delivery_poll_interval(PG_INT64_MAX, PG_INT64_MIN, PG_INT64_MIN) == 30000 &&
		  delivery_poll_interval(PG_INT64_MAX / 2, PG_INT64_MAX, PG_INT64_MAX) <= 30000 &&
		  delivery_poll_interval(PG_INT64_MAX / 2, PG_INT64_MAX, 0) >= 2000,
		  "polls do not overflow");
	check(delivery_job_overdue(0) == 30 * minute &&
		  delivery_job_overdue(-1) == 30 * minute &&
		  delivery_job_overdue(10 * minute) == 30 * minute &&
		  delivery_job_overdue(11 * minute) == 33 * minute &&
		  delivery_job_overdue(PG_INT64_MAX) == PG_INT64_MAX,
		  "overdue after three times as long, or half an hour");
}

static void
test_job_end(void)
{
	static const struct
	{
		const char *status;
		int64		total;
		int64		completed;
		DeliveryJobEnd end;
	}			ends[] = {
		{"completed", -1, -1, DELIVERY_JOB_COMPLETED},
		{"completed", 100, -1, DELIVERY_JOB_COMPLETED},
		{"completed", 100, 100, DELIVERY_JOB_COMPLETED},
		{"completed", -1, 101, DELIVERY_JOB_COMPLETED},
		{"completed", 99, -1, DELIVERY_JOB_SHORT},
		{"completed", 101, 101, DELIVERY_JOB_COMPLETED},
		{"completed", 0, 100, DELIVERY_JOB_COMPLETED},
		{"completed", 101, 100, DELIVERY_JOB_SHORT},
		{"completed", 100, 99, DELIVERY_JOB_SHORT},
		{"completed", -1, 0, DELIVERY_JOB_SHORT},
		{"completed", 0, -1, DELIVERY_JOB_SHORT},
		{"failed", 100, 100, DELIVERY_JOB_FAILED},
		{"failed", -1, -1, DELIVERY_JOB_FAILED},
		{"queued", -1, -1, DELIVERY_JOB_RUNNING},
		{"validating", 100, 0, DELIVERY_JOB_RUNNING},
		{"processing", 100, 100, DELIVERY_JOB_RUNNING},
		{"pending_refresh", 100, 100, DELIVERY_JOB_RUNNING},
		{"cancelled", -1, -1, DELIVERY_JOB_RUNNING},
		{"Completed", 100, 100, DELIVERY_JOB_RUNNING},
		{"", -1, -1, DELIVERY_JOB_RUNNING},
		{NULL, -1, -1, DELIVERY_JOB_RUNNING}
	};
	bool		passes = true;
	int			i;

	for (i = 0; i < (int) lengthof(ends); i++)
		passes = delivery_job_end(ends[i].status, 100, ends[i].total,
								  ends[i].completed, false) == ends[i].end && passes;
	check(passes, "how a job ended");
	passes = delivery_job_end("processing", 100, 100, 100, true) == DELIVERY_JOB_RUNNING &&
		delivery_job_end("pending_refresh", 100, 100, 100, true) == DELIVERY_JOB_COMPLETED &&
		delivery_job_end("pending_refresh", 100, 100, 99, true) == DELIVERY_JOB_STRANGE &&
		delivery_job_end("pending_refresh", 100, -1, -1, true) == DELIVERY_JOB_STRANGE &&
		delivery_job_end("cancelled", 100, 100, 100, true) == DELIVERY_JOB_STRANGE &&
		delivery_job_end("", 100, -1, -1, true) == DELIVERY_JOB_STRANGE &&
		delivery_job_end("failed", 100, 100, 100, true) == DELIVERY_JOB_FAILED;
	check(passes, "... and one that is overdue");
}

int
main(void)
{
	test_decisions();
	test_names();
	test_backoff("an entity backs off 1 s to 10 min, full jitter",
				 delivery_entity_backoff, 600000, 0.0, 1.0);
	test_backoff("a lane backs off 1 s to 60 s at least",
				 delivery_lane_backoff, 60000, 1.0, 1.5);
	test_jobs();
	test_job_end();
	printf("1..%d\n", ntests);
	return nfailed > 0 ? 1 : 0;
}
