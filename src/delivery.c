/*
 * delivery.c
 *	  What an answer of the API means, and how long to wait before trying
 *	  again.
 *
 * The whole policy is one table, so that it can be read in one place and
 * tested cell by cell.  It follows three questions.  Was it refused for what
 * it says?  Then repeating it is pointless: dead letter, or split up.  Was it
 * refused for the moment?  Then wait, and nobody's attempt is used up.  Or is
 * the outcome open?  A single call is an upsert and simply repeated; a job
 * must be looked for first, as it may be running.
 */
#ifdef FRONTEND
#include "postgres_fe.h"
#else
#include "postgres.h"
#endif

#include "delivery.h"

/* Answers that mean the same, whatever was called */
typedef enum AnswerClass
{
	ANSWER_UNREACHED,			/* nothing left us */
	ANSWER_LOST,				/* no final answer: anything may have happened */
	ANSWER_DROPPED,				/* the same: a kept connection came to its end */
	ANSWER_OK,					/* 2xx that says what it must */
	ANSWER_GARBLED,				/* 2xx that does not */
	ANSWER_REDIRECT,			/* 3xx, never followed */
	ANSWER_KEY,					/* 401 */
	ANSWER_FORBIDDEN,			/* 403 */
	ANSWER_NOT_FOUND,			/* 404 */
	ANSWER_CONFLICT,			/* 409 */
	ANSWER_TOO_LARGE,			/* 413 */
	ANSWER_REFUSED,				/* every other 4xx */
	ANSWER_BUSY,				/* 429, 503 with Retry-After */
	ANSWER_TROUBLE				/* 408, 425, every other 5xx */
} AnswerClass;

/* What to do; what it depends on is looked at in apply_rule */
typedef enum Rule
{
	RULE_LEARN,
	RULE_OUTAGE,
	RULE_PAUSE,
	RULE_PAUSE_OR_RETRY,		/* the key is good, it is about this body */
	RULE_PAUSE_OR_SPLIT,
	RULE_THROTTLE,
	RULE_DEAD,
	RULE_CONFLICT,
	RULE_WAIT,					/* ask again later, nothing is at stake */
	RULE_WAIT_OR_OUTAGE,		/* outage unless others succeed */
	RULE_RETRY,					/* as before, but attempts are limited */
	RULE_AGAIN,					/* as before, but never an outage */
	RULE_UNKNOWN,				/* the job may exist */
	RULE_UNKNOWN_OR_SPLIT,		/* as before, but not for ever */
	RULE_SHRINK,				/* too many records, or one that is too large */
	RULE_SPLIT					/* some record is refused: find out which */
} Rule;

/*
 * A gateway may answer 5xx, 408 or 425 after the body went through, so to a
 * submitted job they mean as little as no answer.  A redirect is a gateway's
 * doing, or that of a wrong endpoint, so probes go on.  403 is said of a key, but
 * by firewalls also of one body: then others get through.
 */
static const Rule rules[][DELIVERY_CALLS] = {
	/* DELIVERY_IDENTIFY, DELIVERY_SUBMIT, DELIVERY_POLL, DELIVERY_LIST */
	[ANSWER_UNREACHED] = {RULE_OUTAGE, RULE_OUTAGE, RULE_OUTAGE, RULE_OUTAGE},
	[ANSWER_LOST] = {RULE_RETRY, RULE_UNKNOWN, RULE_WAIT_OR_OUTAGE, RULE_WAIT_OR_OUTAGE},
	[ANSWER_DROPPED] = {RULE_AGAIN, RULE_UNKNOWN, RULE_WAIT, RULE_WAIT_OR_OUTAGE},
	[ANSWER_OK] = {RULE_LEARN, RULE_LEARN, RULE_LEARN, RULE_LEARN},
	[ANSWER_GARBLED] = {RULE_LEARN, RULE_UNKNOWN, RULE_WAIT, RULE_WAIT},
	[ANSWER_REDIRECT] = {RULE_RETRY, RULE_OUTAGE, RULE_WAIT, RULE_WAIT},
	[ANSWER_KEY] = {RULE_PAUSE, RULE_PAUSE, RULE_PAUSE, RULE_PAUSE},
	[ANSWER_FORBIDDEN] = {RULE_PAUSE_OR_RETRY, RULE_PAUSE_OR_SPLIT, RULE_PAUSE, RULE_PAUSE},
	[ANSWER_NOT_FOUND] = {RULE_DEAD, RULE_SPLIT, RULE_UNKNOWN, RULE_WAIT},
	[ANSWER_CONFLICT] = {RULE_DEAD, RULE_CONFLICT, RULE_WAIT, RULE_WAIT},
	[ANSWER_TOO_LARGE] = {RULE_DEAD, RULE_SHRINK, RULE_WAIT, RULE_WAIT},
	[ANSWER_REFUSED] = {RULE_DEAD, RULE_SPLIT, RULE_WAIT, RULE_WAIT},
	[ANSWER_BUSY] = {RULE_THROTTLE, RULE_THROTTLE, RULE_THROTTLE, RULE_THROTTLE},
	[ANSWER_TROUBLE] = {RULE_RETRY, RULE_UNKNOWN_OR_SPLIT,
	RULE_WAIT_OR_OUTAGE, RULE_WAIT_OR_OUTAGE}
};

/* A job that met trouble this often while others succeed is split up */
#define SPLIT_ATTEMPTS 3

/* A Retry-After of more than a day is a mistake; an hour is obeyed at most */
#define RETRY_AFTER_SANE (24 * 60 * 60)
#define RETRY_AFTER_MAX (60 * 60)

#define ENTITY_BACKOFF_MAX INT64CONST(600000)
#define LANE_BACKOFF_MAX INT64CONST(60000)

#define POLL_MIN INT64CONST(2000)
#define POLL_MAX INT64CONST(30000)
#define POLL_LATE_PART 8
#define POLL_GROWTH INT64CONST(60000)	/* not steeper than within a minute */

#define OVERDUE_MIN INT64CONST(1800000)

/* Whether the answer gives a Retry-After that can be meant */
static bool
has_retry_after(const DeliveryAnswer *answer)
{
	return answer->retry_after >= 0 && answer->retry_after <= RETRY_AFTER_SANE;
}

/* The class of a status from 400 to 499 */
static AnswerClass
classify_refusal(int status)
{
	switch (status)
	{
		case 401:
			return ANSWER_KEY;
		case 403:
			return ANSWER_FORBIDDEN;
		case 404:
			return ANSWER_NOT_FOUND;
		case 408:
		case 425:
			return ANSWER_TROUBLE;
		case 409:
			return ANSWER_CONFLICT;
		case 413:
			return ANSWER_TOO_LARGE;
		case 429:
			return ANSWER_BUSY;
	}
	return ANSWER_REFUSED;
}

/* The class of any answer */
static AnswerClass
classify(const DeliveryAnswer *answer)
{
	if (answer->transport == DELIVERY_NOT_SENT)
		return ANSWER_UNREACHED;
	if (answer->transport == DELIVERY_LOST)
		return ANSWER_LOST;
	if (answer->transport == DELIVERY_DROPPED)
		return ANSWER_DROPPED;

	/* 1xx is not final; what is below or above is not HTTP */
	if (answer->status < 200 || answer->status > 599)
		return ANSWER_LOST;
	if (answer->status < 300)
		return answer->understood ? ANSWER_OK : ANSWER_GARBLED;
	if (answer->status < 400)
		return ANSWER_REDIRECT;
	if (answer->status < 500)
		return classify_refusal(answer->status);
	if (answer->status == 503 && has_retry_after(answer))
		return ANSWER_BUSY;
	return ANSWER_TROUBLE;
}

/* Whether the body may have been applied all the same */
static bool
leaves_open(AnswerClass kind, const DeliveryAnswer *answer)
{
	switch (kind)
	{
		case ANSWER_LOST:
		case ANSWER_DROPPED:
		case ANSWER_GARBLED:
		case ANSWER_REDIRECT:
		case ANSWER_TROUBLE:
			return true;
		case ANSWER_BUSY:
			return answer->status != 429;
		case ANSWER_UNREACHED:
		case ANSWER_OK:
		case ANSWER_KEY:
		case ANSWER_FORBIDDEN:
		case ANSWER_NOT_FOUND:
		case ANSWER_CONFLICT:
		case ANSWER_TOO_LARGE:
		case ANSWER_REFUSED:
			break;
	}
	return false;
}

/* Settles what a rule leaves open; sets action and counts */
static void
apply_rule(Rule rule, const DeliveryAnswer *answer, DeliveryDecision *decision)
{
	bool		others = answer->others_succeed;
	DeliveryAction action = DELIVERY_UNKNOWN;
	bool		counts = false;

	if (rule == RULE_PAUSE_OR_RETRY)
		rule = others && answer->again ? RULE_RETRY : RULE_PAUSE;
	else if (rule == RULE_PAUSE_OR_SPLIT)
		rule = others && answer->again ? RULE_SPLIT : RULE_PAUSE;
	switch (rule)
	{
		case RULE_LEARN:
			action = DELIVERY_LEARN;
			break;
		case RULE_OUTAGE:
			action = DELIVERY_OUTAGE;
			break;
		case RULE_PAUSE:
		case RULE_PAUSE_OR_RETRY:
		case RULE_PAUSE_OR_SPLIT:
			action = DELIVERY_PAUSE;
			break;
		case RULE_THROTTLE:
			action = DELIVERY_THROTTLE;
			break;
		case RULE_DEAD:
			action = DELIVERY_DEAD;
			counts = true;
			break;
		case RULE_CONFLICT:
			action = DELIVERY_CONFLICT;
			break;
		case RULE_WAIT:
			action = DELIVERY_BACKOFF;
			break;
		case RULE_WAIT_OR_OUTAGE:
			action = others ? DELIVERY_BACKOFF : DELIVERY_OUTAGE;
			break;
		case RULE_RETRY:
		case RULE_AGAIN:
			if (others && answer->attempts >= answer->max_attempts)
				action = DELIVERY_DEAD;
			else if (others || rule == RULE_AGAIN)
				action = DELIVERY_BACKOFF;
			else
				action = DELIVERY_OUTAGE;
			counts = others;
			break;
		case RULE_UNKNOWN:
			action = DELIVERY_UNKNOWN;
			counts = true;
			break;
		case RULE_UNKNOWN_OR_SPLIT:
			if (others && answer->attempts >= SPLIT_ATTEMPTS)
				action = DELIVERY_DISSOLVE;
			else
				action = DELIVERY_UNKNOWN;
			counts = true;
			break;
		case RULE_SHRINK:
			action = answer->records > 1 ? DELIVERY_SHRINK : DELIVERY_DEAD;
			counts = (action == DELIVERY_DEAD);
			break;
		case RULE_SPLIT:
			action = answer->records > 1 ? DELIVERY_DISSOLVE : DELIVERY_DEAD;
			counts = true;
			break;
	}
	decision->action = action;
	decision->counts = counts;
	decision->refused = action == DELIVERY_DEAD && rule != RULE_RETRY && rule != RULE_AGAIN;
}

/*
 * Decides what follows from an answer.  Never fails, whatever the status.
 */
DeliveryDecision
delivery_decide(const DeliveryAnswer *answer)
{
	DeliveryDecision decision = {0};
	AnswerClass kind = classify(answer);

	apply_rule(rules[kind][answer->call], answer, &decision);
	decision.open = leaves_open(kind, answer);

	/* "at once" is no answer to a limit: then our own back-off is better */
	if (decision.action == DELIVERY_THROTTLE &&
		has_retry_after(answer) && answer->retry_after > 0)
	{
		decision.wait_given = true;
		decision.wait_ms =
			Min(answer->retry_after, RETRY_AFTER_MAX) * INT64CONST(1000);
	}
	return decision;
}

/* The action in a word, for rows and log; never NULL */
const char *
delivery_action_name(DeliveryAction action)
{
	switch (action)
	{
		case DELIVERY_LEARN:
			return "acknowledged";
		case DELIVERY_BACKOFF:
			return "back-off";
		case DELIVERY_THROTTLE:
			return "throttled";
		case DELIVERY_OUTAGE:
			return "outage";
		case DELIVERY_PAUSE:
			return "paused";
		case DELIVERY_DEAD:
			return "dead letter";
		case DELIVERY_CONFLICT:
			return "slot taken";
		case DELIVERY_SHRINK:
			return "too large";
		case DELIVERY_DISSOLVE:
			return "dissolved";
		case DELIVERY_UNKNOWN:
			return "unknown";
	}
	return "unknown";
}

/* 1 s at the first time, doubling up to max */
static int64
doubling(int n, int64 max)
{
	int64		ms = 1000;

	for (; n > 1 && ms < max; n--)
		ms *= 2;
	return Min(ms, max);
}

/* A part of ms between fixed and 1, by chance */
static int64
jitter(int64 ms, double fixed, double random)
{
	random = Min(Max(random, 0.0), 1.0);
	return (int64) (ms * (fixed + (1.0 - fixed) * random));
}

/*
 * Full jitter: entities that failed together must not come back together.
 */
int64
delivery_entity_backoff(int attempts, double random)
{
	return jitter(doubling(attempts, ENTITY_BACKOFF_MAX), 0.0, random);
}

/* Never sooner: it would be refused again, or struggles */
int64
delivery_lane_backoff(int in_a_row, double random)
{
	int64		ms = doubling(in_a_row, LANE_BACKOFF_MAX);

	return ms + jitter(ms / 2, 0.0, random);
}

/*
 * How long after a poll to ask again.  A job of few records is expected to
 * take seconds; if it then takes longer it is still asked about often.  When
 * its work should be done by then, at once: the next job waits for it.
 */
int64
delivery_poll_interval(int64 elapsed_ms, int64 expected_ms, int64 left_ms)
{
	int64		full = Max(expected_ms, POLL_GROWTH);
	int64		late = elapsed_ms - Max(expected_ms, 0);
	int64		grown;

	if (elapsed_ms <= 0)
		return POLL_MIN;
	if (elapsed_ms >= full)
		grown = POLL_MAX;
	else
		grown = POLL_MIN +
			(int64) ((POLL_MAX - POLL_MIN) * ((double) elapsed_ms / full));
	return Min(grown, Max(left_ms, Max(late / POLL_LATE_PART, POLL_MIN)));
}

/* After how many ms a job counts as overdue */
int64
delivery_job_overdue(int64 expected_ms)
{
	if (expected_ms > PG_INT64_MAX / 3)
		return PG_INT64_MAX;
	return Max(expected_ms * 3, OVERDUE_MIN);
}

bool
delivery_job_runs(const char *status)
{
	return strcmp(status, "queued") == 0 || strcmp(status, "validating") == 0 ||
		strcmp(status, "processing") == 0 || strcmp(status, "pending_refresh") == 0;
}

/*
 * What a job's status says.  A completed job that names fewer rows than were
 * sent has dropped records: the only sign of it that the API gives.  When it is
 * overdue neither the refresh nor a status that no document knows is waited for
 * any more; but that it is done is believed of a refresh only with the counts.
 */
DeliveryJobEnd
delivery_job_end(const char *status, int64 records, int64 total_rows,
				 int64 completed_rows, bool overdue)
{
	bool		all = completed_rows >= records && completed_rows >= total_rows;

	if (status == NULL)
		return DELIVERY_JOB_RUNNING;
	if (strcmp(status, "failed") == 0)
		return DELIVERY_JOB_FAILED;
	if (overdue && strcmp(status, "pending_refresh") == 0)
		return all ? DELIVERY_JOB_COMPLETED : DELIVERY_JOB_STRANGE;
	if (strcmp(status, "completed") != 0)
		return overdue && !delivery_job_runs(status) ?
			DELIVERY_JOB_STRANGE : DELIVERY_JOB_RUNNING;
	if (completed_rows != -1)
		return all ? DELIVERY_JOB_COMPLETED : DELIVERY_JOB_SHORT;
	return total_rows == -1 || total_rows == records ?
		DELIVERY_JOB_COMPLETED : DELIVERY_JOB_SHORT;
}
