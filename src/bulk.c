/*
 * bulk.c
 *	  The bulk lane: one job at a time, from asking for the slot to its end.
 *
 *	  IDLE -> ASK -> PREPARE -> SUBMIT -> RUNNING -> PREPARE, or IDLE
 *	                               |         |
 *	                               +-> UNKNOWN (the answer was lost)
 *
 * A job's entities are held from its mark until it is known to be over:
 * completed, failed, refused, or not to be found once the slot is free.  Only
 * then may newer changes of theirs leave, or the job could overwrite them.
 */
#include "postgres.h"

#include "utils/memutils.h"

#include "api.h"
#include "clock.h"
#include "bulk_job.h"
#include "plan.h"
#include "sender.h"

#define SLOT_RETRY_MS 1000

/* What a sweep had to leave out is in flight elsewhere: look again then */
#define LEFT_OUT_MS 1000

/* What a job takes besides its records: queueing, validation, refresh */
#define JOB_FIXED_MS (10 * 1000)

/* So long before a job's end the next one is prepared (real ms) */
#define AHEAD_MS 1000

#define MAX_SUBMISSIONS 2
#define MAX_LOST 3

/* Jobs of a size that was taken before a larger one is tried again */
#define GROW_JOBS 10

void
bulk_init(Sender *sender)
{
	Bulk	   *bulk = &sender->bulk;

	bulk->context = AllocSetContextCreate(sender->context, "userpilot bulk",
										  ALLOCSET_DEFAULT_SIZES);
	bulk->body_context = AllocSetContextCreate(bulk->context, "userpilot body",
											   ALLOCSET_DEFAULT_SIZES);
	bulk->solo_context = AllocSetContextCreate(bulk->context, "userpilot solo",
											   ALLOCSET_DEFAULT_SIZES);
	bulk->batches_context = AllocSetContextCreate(bulk->context, "userpilot batches",
												  ALLOCSET_DEFAULT_SIZES);
	bulk->next = held_job_create(bulk->context);
	bulk->current = held_job_create(bulk->context);
	bulk->done = held_job_create(bulk->context);
	bulk->record_limit = USERPILOT_MAX_RECORDS;
	bulk->dirty = true;
}

bool
bulk_holds(const Sender *sender, EntityKey key, uint32 hash)
{
	const Bulk *bulk = &sender->bulk;

	return held_job_has(bulk->current, key, hash) || held_job_has(bulk->next, key, hash) ||
		held_job_has(bulk->done, key, hash);
}

int64
bulk_expected_ms(const Bulk *bulk)
{
	return (int64) bulk->current->job.records * 60000 / USERPILOT_RECORDS_PER_MINUTE + JOB_FIXED_MS;
}

bool
bulk_overdue(const Bulk *bulk, int64 now)
{
	return (bulk->state == BULK_RUNNING || bulk->state == BULK_UNKNOWN) &&
		now - bulk->since >= delivery_job_overdue(bulk_expected_ms(bulk));
}

bool
bulk_holds_overdue(const Sender *sender, EntityKey key, int64 now)
{
	const Bulk *bulk = &sender->bulk;

	return bulk_overdue(bulk, now) && held_job_has(bulk->current, key, entity_hash(key));
}

void
bulk_enter(Bulk *bulk, BulkState state, int64 at)
{
	bulk->state = state;
	bulk->next_at = at;
}

/* The slot is one application's; another key is another application */
static bool
take_slot(Sender *sender)
{
	Bulk	   *bulk = &sender->bulk;

	if (bulk->slot_application != sender->env->fingerprint)
		bulk_release_slot(sender);
	if (!quota_job_slot_take(sender->env->fingerprint, sender->serverid, clock_now()))
		return false;
	bulk->slot_application = sender->env->fingerprint;
	return true;
}

void
bulk_release_slot(Sender *sender)
{
	if (sender->bulk.slot_application != 0)
		quota_job_slot_release(sender->bulk.slot_application, sender->serverid);
	sender->bulk.slot_application = 0;
}

static void
become_idle(Sender *sender)
{
	Bulk	   *bulk = &sender->bulk;

	Assert(bulk->current->entities == NULL);
	bulk->waiting_for_slot = false;
	bulk->last_completed = 0;
	bulk_release_slot(sender);
	bulk_enter(bulk, BULK_IDLE, 0);
}

/* It holds nothing any more; its memory goes with the next one */
static void
drop_current(Bulk *bulk)
{
	bulk->current->entities = NULL;
	bulk->last_completed = 0;
}

/* Entities of the job join those that travel alone */
static void
move_to_solo(Bulk *bulk)
{
	entities_iterator it;
	EntityEntry *entry;
	MemoryContext old = MemoryContextSwitchTo(bulk->solo_context);

	if (bulk->solo == NULL)
		bulk->solo = entities_create(bulk->solo_context, bulk->current->entities->members, NULL);
	entities_start_iterate(bulk->current->entities, &it);
	while ((entry = entities_iterate(bulk->current->entities, &it)) != NULL)
	{
		EntityKey	key = entry->key;
		bool		found;

		if (entities_lookup(bulk->solo, key))
			continue;
		key.id = pnstrdup(entry->key.id, entry->key.len);
		(void) entities_insert(bulk->solo, key, &found);
	}
	MemoryContextSwitchTo(old);
	drop_current(bulk);
}

/* ------------------------------------------------------------- the plan */

/* What it had not come to is where the next pass begins */
void
bulk_forget_plan(Sender *sender)
{
	Bulk	   *bulk = &sender->bulk;

	if (bulk->plan == NULL)
		return;
	if (plan_rows(bulk->plan) > 0)
	{
		bulk->dirty = true;
		bulk->position = plan_first_block(bulk->plan);
	}
	plan_free(bulk->plan);
	bulk->plan = NULL;
}

/* New rows are there for the bulk lane: they are to be counted and found */
void
bulk_changed(Sender *sender)
{
	bulk_forget_plan(sender);
	sender->bulk.dirty = true;
}

/* -------------------------------------------------------- ends of a job */

void
bulk_put_back(Sender *sender, const Job *job)
{
	profiles_release_job(sender->env->server, job->kind, job->id, true);
	jobs_drop_chunks(job->id);
	jobs_delete(job->id);
	sender->bulk.dirty = true;
}

static void
put_back_next(Sender *sender)
{
	HeldJob    *next = sender->bulk.next;

	if (next->entities == NULL)
		return;
	bulk_put_back(sender, &next->job);
	held_job_clear(next);
}

/* Its rows never left the queue: they will be bound anew */
void
bulk_refused(Sender *sender, const char *error, bool give_back)
{
	Bulk	   *bulk = &sender->bulk;
	JobNews		news = JOB_NO_NEWS;

	news.status = JOB_REFUSED;
	news.error = error;
	news.finished = true;
	jobs_update(bulk->current->job.id, &news);
	profiles_release_job(sender->env->server, bulk->current->job.kind, bulk->current->job.id, give_back);
	jobs_drop_chunks(bulk->current->job.id);
	drop_current(bulk);
	bulk->dirty = true;
}

void
bulk_withdraw(Sender *sender)
{
	put_back_next(sender);
	sender->bulk.bind_anew = true;
}

/* Its body is of another time: if it has not arrived, it is to be prepared again */
static void
bind_anew(Sender *sender, int64 now)
{
	Bulk	   *bulk = &sender->bulk;

	if (bulk->in_doubt)
	{
		bulk_enter(bulk, BULK_UNKNOWN, now);
		return;
	}
	bulk_refused(sender, "the properties to be excluded may have changed", true);
	bulk->since = now;
	bulk_enter(bulk, BULK_ASK, now);
}

/* Record by record through the real-time lane, which answers for each */
void
bulk_dissolved(Sender *sender, const char *error)
{
	Bulk	   *bulk = &sender->bulk;
	JobNews		news = JOB_NO_NEWS;

	news.status = JOB_DISSOLVED;
	news.error = error;
	news.finished = true;
	jobs_update(bulk->current->job.id, &news);
	profiles_release_job(sender->env->server, bulk->current->job.kind, bulk->current->job.id, false);
	move_to_solo(bulk);
	bulk->lost = 0;
	bulk->dirty = true;
	sender_error(sender, psprintf("job " INT64_FORMAT " is sent record by record: %s",
								  bulk->current->job.id, error));
	become_idle(sender);
}

void
bulk_completed(Sender *sender)
{
	Bulk	   *bulk = &sender->bulk;
	JobNews		news = JOB_NO_NEWS;

	news.status = JOB_COMPLETED;
	news.finished = true;
	jobs_update(bulk->current->job.id, &news);
	state_worker_progress();
	bulk->since_shrunk += bulk->current->job.records;
	bulk_set_done(sender);
	bulk->last_completed = 0;
	bulk->lost = 0;
	if (bulk->record_limit < USERPILOT_MAX_RECORDS &&
		bulk->since_shrunk >= GROW_JOBS * (int64) bulk->record_limit)
	{
		bulk->since_shrunk = 0;
		bulk->record_limit = Min(bulk->record_limit * 2, USERPILOT_MAX_RECORDS);
		bulk_forget_plan(sender);	/* its units are as small */
	}
	/* the slot has just become free: no need to ask, but let others have a turn;
	 * after a crash it may be another's, who did not know of this job */
	if (bulk->slot_application == 0 ||
		quota_job_slot_wanted(bulk->slot_application, sender->serverid, clock_now()))
	{
		bulk->dirty = true;
		become_idle(sender);
		bulk->next_at = clock_now() + SLOT_RETRY_MS;
	}
	else
		bulk_enter(bulk, BULK_PREPARE, 0);
}

void
bulk_failed(Sender *sender, int64 now)
{
	Bulk	   *bulk = &sender->bulk;
	MemoryContext old;

	if (bulk->current->job.attempts >= MAX_SUBMISSIONS)
	{
		bulk_dissolved(sender, "the job failed twice");
		return;
	}
	old = MemoryContextSwitchTo(bulk->current->context);
	jobs_restart(&bulk->current->job, "the job failed and is submitted again");
	MemoryContextSwitchTo(old);
	bulk->last_completed = 0;
	bulk->in_doubt = bulk->said_over = false;
	sender_error(sender, psprintf("job " INT64_FORMAT " failed and is submitted again", bulk->current->job.id));
	bulk_enter(bulk, BULK_SUBMIT, now + delivery_entity_backoff(1, 1.0));
}

void
bulk_unknown(Sender *sender, const char *error, int64 now)
{
	Bulk	   *bulk = &sender->bulk;
	JobNews		news = JOB_NO_NEWS;

	if (bulk->lost++ == 0)
		bulk->lost_since = bulk->call_started;
	bulk->in_doubt = true;
	news.status = JOB_UNKNOWN;
	news.error = error;
	jobs_update(bulk->current->job.id, &news);
	bulk->since = now;
	bulk->unknown_looks = 0;
	bulk_enter(bulk, BULK_UNKNOWN, now + delivery_poll_interval(0, 0, PG_INT64_MAX));
}

/*
 * Once or twice that is the network's or a gateway's doing, and it is submitted
 * again: as it is, so that what it holds stays held.  The list may not show
 * everything; that the job is not running is known for certain only when the
 * slot has taken another one.  If it happens again and again while other calls
 * succeed, it is about what the job holds.
 */
void
bulk_never_arrived(Sender *sender)
{
	Bulk	   *bulk = &sender->bulk;
	JobNews		news = JOB_NO_NEWS;

	if (bulk->lost >= MAX_LOST &&
		Max(bulk->lane.last_success, sender->rt.lane.last_success) > bulk->lost_since)
	{
		bulk_dissolved(sender, "submitted several times without a proper answer");
		return;
	}
	news.status = JOB_UNKNOWN;
	news.error = "no proper answer came, and Userpilot lists no such job";
	if (bulk->bind_anew)
	{
		bulk_refused(sender, news.error, false);
		bulk->since = clock_now();
		bulk_enter(bulk, BULK_ASK, 0);
		return;
	}
	if (bulk->current->job.job_id != NULL)
	{
		/* it was there once: the next run is another */
		MemoryContext old = MemoryContextSwitchTo(bulk->current->context);

		jobs_restart(&bulk->current->job, news.error);
		MemoryContextSwitchTo(old);
		bulk->last_completed = 0;
		bulk->said_over = false;
	}
	jobs_update(bulk->current->job.id, &news);
	jobs_give_back_attempt(bulk->current->job.id);
	bulk->current->job.attempts = Max(bulk->current->job.attempts - 1, 0);
	bulk_enter(bulk, BULK_SUBMIT, 0);
}

/* -------------------------------------------------------------- schedule */

/* Something may be there to sweep */
static bool
sweep_wanted(const Sender *sender)
{
	const Bulk *bulk = &sender->bulk;

	return bulk->next->entities != NULL || bulk->dirty || bulk->plan != NULL ||
		((bulk->solo != NULL || bulk->after_solos) && sender->rt.solos == 0);
}

/* ... and really is: the slot is not asked for in vain */
static bool
sweep_needed(const Sender *sender)
{
	const Bulk *bulk = &sender->bulk;

	return bulk->solo != NULL || realtime_backlogged(sender) ||
		queue_has_rows(sender->env->server, true);
}

bool
bulk_busy(const Sender *sender)
{
	return sender->bulk.state != BULK_IDLE || sweep_wanted(sender) ||
		sender->bulk.solo != NULL || sender->bulk.done->job.id != 0;
}

bool
bulk_due(const Sender *sender, int64 now)
{
	const Bulk *bulk = &sender->bulk;

	if (bulk->calling || !sender_may_send(sender) || now < bulk->lane.not_before ||
		now < bulk->next_at || bulk_pass_waits(bulk))
		return false;
	return bulk->state != BULK_IDLE || sweep_wanted(sender);
}

/*
 * When to prepare the next job though one runs: shortly before its end, so that
 * the API's slot is not idle meanwhile, and of what is planned already, which
 * has no entity in common with it.  INT64_MAX: not at all.
 */
static int64
ahead_at(const Sender *sender, int64 now)
{
	const Bulk *bulk = &sender->bulk;

	if (bulk->state != BULK_RUNNING || bulk->next->entities != NULL || bulk->done->job.id != 0 ||
		bulk->plan == NULL || bulk->solo != NULL || !sender_may_send(sender) ||
		sender->paused || bulk->lane.outages > 0 ||
		bulk_overdue(bulk, now) || quota_job_slot_wanted(bulk->slot_application, sender->serverid, now))
		return PG_INT64_MAX;
	return Max(bulk->ends_at - clock_api_ms(AHEAD_MS), bulk->lane.not_before);
}

bool
bulk_ahead_due(const Sender *sender, int64 now)
{
	return now >= ahead_at(sender, now);
}

int64
bulk_next_at(const Sender *sender, int64 now)
{
	const Bulk *bulk = &sender->bulk;
	int64		at = ahead_at(sender, now);

	if (bulk->calling || (bulk->state == BULK_IDLE && !sweep_wanted(sender)))
		return at;
	return Min(at, Max(bulk->next_at, bulk->lane.not_before));
}

static void
start_next(Bulk *bulk, int64 now)
{
	HeldJob    *empty = bulk->current;

	held_job_clear(empty);
	bulk->current = bulk->next;
	bulk->next = empty;
	bulk->in_doubt = bulk->bind_anew = bulk->said_over = bulk->poll_failed = false;
	bulk->failed_since[DELIVERY_POLL] = bulk->failed_since[DELIVERY_LIST] = 0;
	bulk_enter(bulk, BULK_SUBMIT, now);
}

/*
 * The database's part of a step, in a transaction.  Returns whether its
 * commit must be durable.
 */
bool
bulk_step(Sender *sender, int64 now)
{
	Bulk	   *bulk = &sender->bulk;
	MemoryContext old;

	/* options may just have changed */
	if (!sender_still_enabled(sender) || !sender_may_send(sender))
		return false;
	/* who knows when it would have its turn, and what it holds waits with it */
	if (bulk->state != BULK_PREPARE && (bulk->state != BULK_RUNNING || bulk_overdue(bulk, now)))
		put_back_next(sender);
	switch (bulk->state)
	{
		case BULK_IDLE:
			if (!sweep_needed(sender))
			{
				bulk_forget_plan(sender);
				bulk->dirty = bulk->after_solos = bulk->waiting_for_slot = false;
				return false;
			}
			if (!take_slot(sender))
			{
				bulk->waiting_for_slot = true;
				bulk->next_at = now + SLOT_RETRY_MS;
				return false;
			}
			bulk->since = now;
			bulk_enter(bulk, BULK_ASK, now);
			return false;
		case BULK_PREPARE:
			bulk->waiting_for_slot = false;
			if (bulk->next->entities != NULL)
			{
				start_next(bulk, now);
				return false;
			}
			if (bulk_prepare(sender, false))
			{
				start_next(bulk, now);
				return true;
			}
			if (bulk->plan != NULL && bulk->solo == NULL)
				return false;
			become_idle(sender);
			bulk->next_at = now + LEFT_OUT_MS;
			return false;
		case BULK_SUBMIT:
			if (bulk->bind_anew)
			{
				bind_anew(sender, now);
				return false;
			}
			(void) take_slot(sender);
			jobs_count_attempt(bulk->current->job.id);
			bulk->current->job.attempts++;
			old = MemoryContextSwitchTo(bulk->body_context);
			bulk->body = jobs_body(&bulk->current->job, &bulk->npieces);
			MemoryContextSwitchTo(old);
			return true;
		case BULK_ASK:
		case BULK_RUNNING:
		case BULK_UNKNOWN:
			(void) take_slot(sender);
			return false;
	}
	return false;
}

/* The network's part, after the commit */
void
bulk_start(Sender *sender, int64 now)
{
	Bulk	   *bulk = &sender->bulk;
	const HttpTarget *target = &sender->env->target;
	Call	   *call = &bulk->call;
	const char *error = NULL;
	bool		started = false;

	if (!sender_may_send(sender))
		return;
	call->sender = sender;
	call->pending = NULL;
	switch (bulk->state)
	{
		case BULK_IDLE:
		case BULK_PREPARE:
			return;
		case BULK_ASK:
		case BULK_UNKNOWN:
			started = api_jobs(sender->http, target, call, &error);
			break;
		case BULK_SUBMIT:
			started = api_submit(sender->http, target, bulk->current->job.kind, bulk->body, bulk->npieces,
								 bulk->current->job.filename, call, &error);
			break;
		case BULK_RUNNING:
			started = api_job(sender->http, target, bulk->current->job.job_id, call, &error);
			break;
	}
	bulk->calling = started;
	bulk->call_started = now;
	if (!started)
	{
		MemoryContextReset(bulk->body_context);
		sender_error(sender, error);
		bulk->next_at = now + delivery_lane_backoff(5, sender_random());
	}
}
