/*
 * delivery.h
 *	  What an answer of the API means: pure, one function, one table.
 *
 * Knows neither HTTP library nor database; builds with and without the
 * server (FRONTEND) and is tested cell by cell.
 */
#ifndef USERPILOT_DELIVERY_H
#define USERPILOT_DELIVERY_H

typedef enum DeliveryCall
{
	DELIVERY_IDENTIFY,			/* one company or user */
	DELIVERY_SUBMIT,			/* POST of a bulk job */
	DELIVERY_POLL,				/* GET of one job */
	DELIVERY_LIST				/* GET of the job list */
} DeliveryCall;

#define DELIVERY_CALLS (DELIVERY_LIST + 1)

typedef enum DeliveryTransport
{
	DELIVERY_ANSWERED,			/* a complete HTTP answer */
	DELIVERY_NOT_SENT,			/* DNS, connect, TLS: nothing left us */
	DELIVERY_LOST,				/* may have been applied; we cannot know */
	DELIVERY_DROPPED			/* the same, but it only shows that a connection
								 * that was kept has come to its end */
} DeliveryTransport;

typedef struct DeliveryAnswer
{
	DeliveryCall call;
	DeliveryTransport transport;
	int			status;			/* HTTP status if answered */
	int			retry_after;	/* seconds, -1 if not given; obeyed for an hour
								 * at most, ignored beyond a day */
	bool		understood;		/* 2xx whose body says what it must */
	bool		others_succeed; /* since this began, or has failed */
	bool		again;			/* it has failed before */
	int			records;		/* in the body */
	int			attempts;		/* of this entity or job, this one included */
	int			max_attempts;
} DeliveryAnswer;

typedef enum DeliveryAction
{
	DELIVERY_LEARN,				/* acknowledged */
	DELIVERY_BACKOFF,			/* this entity, job or question waits */
	DELIVERY_THROTTLE,			/* the lane waits, attempt given back */
	DELIVERY_OUTAGE,			/* circuit opens, attempt given back */
	DELIVERY_PAUSE,				/* key refused, attempt given back */
	DELIVERY_DEAD,				/* dead letter */
	DELIVERY_CONFLICT,			/* someone else's job is in the slot */
	DELIVERY_SHRINK,			/* next job half as large */
	DELIVERY_DISSOLVE,			/* record by record through real time */
	DELIVERY_UNKNOWN			/* look for it in the list, else submit it again */
} DeliveryAction;

typedef struct DeliveryDecision
{
	DeliveryAction action;
	bool		counts;			/* the attempt stands; never for LEARN */
	bool		refused;		/* DEAD for what it says, so the lane is well */
	bool		open;			/* the body may have been applied all the same */
	bool		wait_given;		/* obey wait_ms; else the caller's back-off */
	int64		wait_ms;
} DeliveryDecision;

extern DeliveryDecision delivery_decide(const DeliveryAnswer *answer);
extern const char *delivery_action_name(DeliveryAction action);

/*
 * How long to wait, in ms.  "random" is uniform in [0,1).
 *   entity:   1 s doubling to 10 min, full jitter
 *   lane:     too fast, or an outage: 1, 2, 4, 8 s, then on to 60 s, and up to
 *             half as long again
 *   poll:     2 s growing to 30 s by the time the job is expected to take,
 *             but not within less than a minute; never past the time when its
 *             work should be done (left_ms; PG_INT64_MAX: nobody knows), and
 *             from then on an eighth of its lateness
 */
extern int64 delivery_entity_backoff(int attempts, double random);
extern int64 delivery_lane_backoff(int in_a_row, double random);
extern int64 delivery_poll_interval(int64 elapsed_ms, int64 expected_ms, int64 left_ms);

/* When a job counts as overdue, in ms: max of 3 x expected and 30 min */
extern int64 delivery_job_overdue(int64 expected_ms);

/* The state of a job as the API tells it */
typedef enum DeliveryJobEnd
{
	DELIVERY_JOB_RUNNING,		/* also a status we do not know, for a while */
	DELIVERY_JOB_COMPLETED,		/* in full */
	DELIVERY_JOB_SHORT,			/* completed, but records are missing */
	DELIVERY_JOB_FAILED,
	DELIVERY_JOB_STRANGE		/* overdue, in a status we do not know */
} DeliveryJobEnd;

/* Whether a job in this status is under way, as far as is documented */
extern bool delivery_job_runs(const char *status);

/* rows are -1 where the answer does not give them */
extern DeliveryJobEnd delivery_job_end(const char *status, int64 records, int64 total_rows,
									   int64 completed_rows, bool overdue);

#endif
