/*
 * sender.c
 *	  One server as the worker serves it: environment, circuit, progress.
 */
#include "postgres.h"

#include "common/pg_prng.h"
#include "mb/pg_wchar.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "api.h"
#include "clock.h"
#include "history.h"
#include "ledger.h"
#include "sender.h"

/* A paused server is probed after so long, then more and more rarely (API ms) */
#define PAUSED_PROBE_MS (60 * 1000)
#define PAUSED_PROBE_MAX_MS (15 * 60 * 1000)

/* Progress is written at most so often (real ms), unless the state changes */
#define REPORT_MS 1000

/* ... and while nothing can be sent it is looked at again so often (real ms) */
#define RELOAD_MS 1000

Sender *
sender_create(MemoryContext parent, Oid serverid, Http *http)
{
	MemoryContext context = AllocSetContextCreate(parent, "userpilot sender",
												  ALLOCSET_DEFAULT_SIZES);
	Sender	   *sender = MemoryContextAllocZero(context, sizeof(Sender));

	sender->context = context;
	sender->serverid = serverid;
	sender->http = http;
	sender->env_context = AllocSetContextCreate(context, "userpilot environment",
												ALLOCSET_SMALL_SIZES);
	/* someone waits for its first call: the first report is due in a second */
	sender->reported_at = clock_now();
	realtime_init(sender);
	bulk_init(sender);
	return sender;
}

void
sender_destroy(Sender *sender)
{
	realtime_give_back(sender);
	MemoryContextDelete(sender->context);
}

/* Ready entities wait for a connection, and each call ends with its timeout;
 * one more for a call's own time */
int64
sender_call_delay(const Environment *env)
{
	return clock_api_ms((int64) env->target.timeout_ms *
						(REALTIME_READY_PER_CONNECTION + 1));
}

/*
 * What has been called before a crash, or with another key, which may be of the
 * same application.
 */
static void
count_recent_calls(const Sender *sender, const Environment *env)
{
	int			calls;

	if (env->fingerprint == 0 ||
		(sender->env != NULL && sender->env->fingerprint == env->fingerprint))
		return;
	calls = ledger_recent_calls(env->server, sender_call_delay(env));
	quota_calls_seed(env->fingerprint, sender->serverid, Min(calls, env->requests_per_minute),
					 clock_now());
}

/* Of a key that cannot be had; one that was refused is known by its fingerprint */
static void
log_key(const Environment *before, const Environment *now)
{
	bool		had = before == NULL || before->problem == NULL;

	if (had && now->problem != NULL)
		ereport(LOG,
				(errmsg("userpilot: server \"%s\" is paused: %s", now->server, now->problem),
				 now->problem_hint ? errhint("%s", now->problem_hint) : 0));
	else if (!had && now->problem == NULL)
		ereport(LOG, (errmsg("userpilot: server \"%s\" resumes: it has a key", now->server)));
}

/*
 * Calls in flight hold copies of what they need, so the old environment can
 * go.  A paused server comes back when endpoint or key have changed.  What is
 * excluded from now on must not leave with what was prepared before.
 */
bool
sender_reload(Sender *sender)
{
	MemoryContext context = AllocSetContextCreate(sender->context, "userpilot environment",
												  ALLOCSET_SMALL_SIZES);
	MemoryContext old = MemoryContextSwitchTo(context);
	Environment *env = environment_load(sender->serverid);
	bool		reshaped;
	bool		rekeyed;
	bool		relimited;

	MemoryContextSwitchTo(old);
	if (env == NULL)
	{
		MemoryContextDelete(context);
		return false;
	}
	if (sender->paused && env->problem == NULL && env->fingerprint != sender->paused_fingerprint)
	{
		sender->paused = false;
		sender->pauses = 0;
		sender->paused_probe_at = 0;
		sender->rt.lane.not_before = sender->bulk.lane.not_before = 0;
		ereport(LOG, (errmsg("userpilot: server \"%s\" resumes: its key or endpoint has changed",
							 env->server)));
	}
	log_key(sender->env, env);
	count_recent_calls(sender, env);
	reshaped = sender->env != NULL && !shape_excludes_same(&sender->env->shape, &env->shape);
	rekeyed = sender->env != NULL && (env->problem != NULL ||
									  env->fingerprint != sender->env->fingerprint);
	/* what was none before may be a backlog now */
	relimited = sender->env != NULL && env->requests_per_minute != sender->env->requests_per_minute;
	MemoryContextDelete(sender->env_context);
	sender->env_context = context;
	sender->env = env;
	if (relimited && realtime_backlogged(sender))
		sender->bulk.dirty = true;
	if (reshaped || rekeyed)
		realtime_withdraw(sender);
	if (reshaped)
		bulk_withdraw(sender);
	return true;
}

bool
sender_may_send(const Sender *sender)
{
	if (sender->stale || sender->env == NULL || sender->env->problem != NULL)
		return false;
	return !sender->paused || clock_now() >= sender->paused_probe_at;
}

bool
sender_still_enabled(Sender *sender)
{
	if (!list_member_oid(environment_enabled(), sender->serverid))
		sender->stale = true;
	return !sender->stale;
}

/* As much of a text as fits, in whole characters: it goes into a table */
static void
keep_text(char *to, size_t size, const char *text)
{
	int			len = pg_mbcliplen(text, strlen(text), size - 1);

	memcpy(to, text, len);
	to[len] = '\0';
}

static void
pause_sender(Sender *sender, Lane *lane, const char *reason)
{
	if (!sender->paused)
		ereport(LOG,
				(errmsg("userpilot: server \"%s\" is paused: %s", sender->env->server, reason),
				 errhint("Use the API key of the right region, not the App Token; delivery resumes when user mapping or key file change.")));
	sender->paused = true;
	sender->paused_fingerprint = sender->env->fingerprint;
	sender->paused_lane = lane;
	/* calls that were under way together are refused together */
	if (clock_now() >= sender->paused_probe_at)
	{
		sender->paused_probe_at = clock_now() +
			Min((int64) PAUSED_PROBE_MS << Min(sender->pauses, 4), PAUSED_PROBE_MAX_MS);
		sender->pauses++;
	}
	keep_text(sender->pause_reason, sizeof(sender->pause_reason), reason);
}

void
sender_error(Sender *sender, const char *error)
{
	keep_text(sender->last_error, sizeof(sender->last_error), error);
	sender->error_is_new = true;
}

void
sender_delivered(Sender *sender, int64 records)
{
	sender->delivered += records;
	if (records > 0)
		state_worker_progress();
}

uint64
sender_bury(EntityKey key, const QueueRow *rows, int n, const QueueFailure *why)
{
	uint64		gone = queue_bury(rows, n, why);

	ereport(LOG,
			(errmsg("userpilot: %s \"%.*s\" went to userpilot_dead_letters: %s",
					userpilot_kind_name(key.kind), key.len, key.id, why->error)));
	return gone;
}

char *
sender_too_much(UserpilotKind kind)
{
	return psprintf("a %s of more than %d properties, or of more than %d MB: more is not kept of one",
					userpilot_kind_name(kind), MERGE_MAX_KEYS, MERGE_MAX_BYTES / (1024 * 1024));
}

double
sender_random(void)
{
	return pg_prng_double(&pg_global_prng_state);
}

char *
sender_error_text(const HttpResult *result)
{
	return api_error_text(result);
}

/* An answer's body as it may stand in a table: text, at most 8 kB */
char *
sender_answer_text(const HttpResult *result)
{
	return api_body_text(result, 8192);
}

/* ----------------------------------------------------------- the circuit */

static void
lane_succeeded(Lane *lane, int64 now)
{
	lane->last_success = now;
	lane->throttled = 0;
	lane->outages = 0;
}

/* What a decision means for the lane as a whole */
void
lane_apply(Sender *sender, Lane *lane, const DeliveryDecision *decision,
		   int64 now, const char *error)
{
	int64		wait;

	if (error != NULL)
		sender_error(sender, error);
	switch (decision->action)
	{
		case DELIVERY_DEAD:
			if (!decision->refused)
				break;
			/* FALLTHROUGH */	/* a refusal proves key and lane as well */
		case DELIVERY_LEARN:
			lane_succeeded(lane, now);
			if (sender->paused)
				ereport(LOG, (errmsg("userpilot: server \"%s\" resumes", sender->env->server)));
			sender->paused = false;
			sender->paused_probe_at = 0;
			/* what one lane is refused the other's success says nothing of */
			if (lane == sender->paused_lane)
				sender->pauses = 0;
			break;
		case DELIVERY_THROTTLE:
			/* calls made before the first refusal say no more than it did */
			if (now >= lane->not_before)
				lane->throttled++;
			wait = decision->wait_given ? decision->wait_ms :
				delivery_lane_backoff(lane->throttled, sender_random());
			lane->not_before = Max(lane->not_before, now + wait);
			break;
		case DELIVERY_OUTAGE:
			/* answers of calls made before the circuit opened say no more */
			if (now >= lane->not_before)
				lane->outages++;
			lane->not_before = Max(lane->not_before,
								   now + delivery_lane_backoff(lane->outages, sender_random()));
			break;
		case DELIVERY_PAUSE:
			pause_sender(sender, lane, error);
			break;
		case DELIVERY_BACKOFF:
		case DELIVERY_CONFLICT:
		case DELIVERY_SHRINK:
		case DELIVERY_DISSOLVE:
		case DELIVERY_UNKNOWN:
			break;
	}
}

DeliveryAnswer
sender_answer(const Sender *sender, DeliveryCall call, const HttpResult *result)
{
	DeliveryAnswer answer = {0};

	answer.call = call;
	answer.status = result->status;
	answer.retry_after = result->retry_after;
	answer.understood = true;
	answer.max_attempts = sender->env->max_attempts;
	switch (result->outcome)
	{
		case HTTP_ANSWERED:
			answer.transport = DELIVERY_ANSWERED;
			break;
		case HTTP_NOT_SENT:
			answer.transport = DELIVERY_NOT_SENT;
			break;
		case HTTP_LOST:
			answer.transport = result->dropped ? DELIVERY_DROPPED : DELIVERY_LOST;
			/* an answer that never ends is no outage */
			if ((call == DELIVERY_LIST || call == DELIVERY_POLL) && result->too_long)
			{
				answer.transport = DELIVERY_ANSWERED;
				answer.status = 200;
				answer.understood = false;
			}
			break;
	}
	return answer;
}

/* -------------------------------------------------------------- schedule */

bool
sender_has_work(const Sender *sender)
{
	return sender->rt.pending->members > 0 || sender->rt.overflow ||
		bulk_busy(sender);
}

/* When to act next if nothing happens, in API ms */
int64
sender_next_at(const Sender *sender, int64 now)
{
	int64		at = Min(realtime_next_at(sender, now), bulk_next_at(sender, now));

	/* a new key may come while nothing can be sent */
	if (!sender_may_send(sender))
		at = now + clock_api_ms(RELOAD_MS);
	return at;
}

/* -------------------------------------------------------------- progress */

static const char *
sender_state(const Sender *sender)
{
	if (sender->paused || (sender->env->problem != NULL))
		return "paused";
	if (sender->rt.lane.outages > 0 || sender->bulk.lane.outages > 0)
		return "outage";
	if (sender->bulk.waiting_for_slot && sender->rt.pending->members == 0)
		return "waiting for the slot";
	return sender_has_work(sender) ? "sending" : "idle";
}

static const char *
sender_advice(const Sender *sender)
{
	if (sender->env->problem != NULL)
		return sender->env->problem_hint ?
			psprintf("%s; %s", sender->env->problem, sender->env->problem_hint) : sender->env->problem;
	if (sender->paused)
		return psprintf("%s; check the API key and the region, then change the user mapping or the key file: delivery resumes by itself",
						sender->pause_reason);
	if (sender->rt.lane.outages > 0 || sender->bulk.lane.outages > 0)
		return "Userpilot does not answer; everything stays queued and delivery resumes by itself";
	if (sender->rt.lane.throttled > 0 || sender->bulk.lane.throttled > 0)
		return "Userpilot asks to wait (429); delivery goes on by itself";
	if (bulk_overdue(&sender->bulk, clock_now()))
		return psprintf("job " INT64_FORMAT " is overdue at Userpilot, as userpilot_jobs shows; what is newer of its records goes out beside it",
						sender->bulk.current->job.id);
	if (sender->bulk.waiting_for_slot)
		return "another job runs at Userpilot (a dashboard import, another client, or another database with this key); bulk delivery goes on when it ends";
	return NULL;
}

static void
note_backlog(Sender *sender)
{
	if (!sender_has_work(sender))
	{
		sender->delivered = 0;
		sender->delivering_since = 0;
		memset(sender->counted, 0, sizeof(sender->counted));
		sender->oldest = 0;
	}
	else if (sender->delivering_since == 0)
	{
		sender->delivering_since = GetCurrentTimestamp();
		sender->delivering_since_ms = clock_now();
	}
}

static double
per_minute(const Sender *sender, int64 now)
{
	int64		ms = now - sender->delivering_since_ms;
	int64		records = sender->delivered + Max(sender->bulk.last_completed, 0) +
		sender->bulk.done->job.records;

	if (sender->delivering_since == 0 || ms < 1000 || records == 0)
		return 0;
	return records * 60000.0 / ms;
}

void
sender_report(Sender *sender, int64 now, bool force)
{
	HistoryProgress p = {0};
	const char *state = sender_state(sender);
	int64		since = clock_real_ms(now - sender->reported_at);
	bool		changed = sender->reported_state[0] != '\0' &&
		strcmp(state, sender->reported_state) != 0;

	if (!force && since < REPORT_MS && !changed && !sender->error_is_new)
		return;

	note_backlog(sender);
	p.state = state;
	memcpy(p.rows, sender->counted, sizeof(p.rows));
	p.oldest = sender->oldest;
	p.delivered = sender->delivered;
	p.since = sender->delivering_since;
	p.per_minute = per_minute(sender, now);
	p.advice = sender_advice(sender);
	p.last_error = sender->error_is_new ? sender->last_error : NULL;
	history_progress(sender->env->server, &p);
	sender->error_is_new = false;
	sender->reported_at = now;
	strlcpy(sender->reported_state, state, sizeof(sender->reported_state));
}
