/*
 * bulk.c
 *	  The bulk lane: one job at a time, from asking for the slot to its end.
 *
 *	  IDLE -> ASK -> PREPARE -> SUBMIT -> RUNNING -> IDLE
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
#include "history.h"
#include "sender.h"

/* A list without the job is believed this long after the lost answer, and
 * when seen twice: an upload may take a while to appear (API ms) */
#define UNKNOWN_MS (10 * 1000)
#define UNKNOWN_LOOKS 2

#define SLOT_RETRY_MS 1000

/* What a sweep had to leave out is in flight elsewhere: look again then */
#define LEFT_OUT_MS 1000

/* What a job takes besides its records: queueing, validation, refresh */
#define JOB_FIXED_MS (10 * 1000)

#define MAX_SUBMISSIONS 2

void
bulk_init(Sender *sender)
{
	Bulk	   *bulk = &sender->bulk;

	bulk->context = AllocSetContextCreate(sender->context, "userpilot bulk",
										  ALLOCSET_DEFAULT_SIZES);
	bulk->job_context = AllocSetContextCreate(bulk->context, "userpilot job",
											  ALLOCSET_DEFAULT_SIZES);
	bulk->body_context = AllocSetContextCreate(bulk->context, "userpilot body",
											   ALLOCSET_DEFAULT_SIZES);
	bulk->done_context = AllocSetContextCreate(bulk->context, "userpilot done",
											   ALLOCSET_DEFAULT_SIZES);
	bulk->solo_context = AllocSetContextCreate(bulk->context, "userpilot solo",
											   ALLOCSET_DEFAULT_SIZES);
	bulk->batches_context = AllocSetContextCreate(bulk->context, "userpilot batches",
												  ALLOCSET_DEFAULT_SIZES);
	bulk->record_limit = USERPILOT_MAX_RECORDS;
	bulk->dirty = true;
}

bool
bulk_holds(const Sender *sender, EntityKey key)
{
	return sender->bulk.flying != NULL && entities_lookup(sender->bulk.flying, key) != NULL;
}

static int64
expected_ms(const Bulk *bulk)
{
	return (int64) bulk->job.records * 60000 / USERPILOT_RECORDS_PER_MINUTE + JOB_FIXED_MS;
}

/* It takes so long that newer changes of its entities go out beside it */
bool
bulk_overdue(const Sender *sender, int64 now)
{
	const Bulk *bulk = &sender->bulk;

	return (bulk->state == BULK_RUNNING || bulk->state == BULK_UNKNOWN) &&
		now - bulk->since >= delivery_job_overdue(expected_ms(bulk));
}

static void
enter(Bulk *bulk, BulkState state, int64 at)
{
	bulk->state = state;
	bulk->next_at = at;
}

static void
become_idle(Sender *sender)
{
	Bulk	   *bulk = &sender->bulk;

	Assert(bulk->flying == NULL);
	bulk->waiting_for_slot = false;
	bulk->last_completed = 0;
	state_job_slot_release(sender->env->fingerprint);
	enter(bulk, BULK_IDLE, 0);
}

/* The job's memory goes with the next one: done and solo live in context */
static void
drop_flying(Bulk *bulk)
{
	bulk->flying = NULL;
	bulk->last_completed = 0;
}

/* Entities of the job go to another set, which outlives it */
static void
move_flying(Bulk *bulk, entities_hash **to, MemoryContext context)
{
	entities_iterator it;
	EntityEntry *entry;
	MemoryContext old = MemoryContextSwitchTo(context);

	if (*to == NULL)
		*to = entities_create(context, bulk->flying->members, NULL);
	entities_start_iterate(bulk->flying, &it);
	while ((entry = entities_iterate(bulk->flying, &it)) != NULL)
	{
		EntityKey	key = entry->key;
		bool		found;

		if (entities_lookup(*to, key))
			continue;
		key.id = pnstrdup(entry->key.id, entry->key.len);
		(void) entities_insert(*to, key, &found);
	}
	MemoryContextSwitchTo(old);
	drop_flying(bulk);
}

/* -------------------------------------------------------- ends of a job */

/* Its rows never left the queue: they will be bound anew */
static void
job_refused(Sender *sender, const char *error, bool give_back)
{
	Bulk	   *bulk = &sender->bulk;
	JobNews		news = JOB_NO_NEWS;

	news.status = JOB_REFUSED;
	news.error = error;
	news.finished = true;
	jobs_update(bulk->job.id, &news);
	profiles_release_job(sender->env->server, bulk->job.kind, bulk->job.id, give_back);
	jobs_drop_chunks(bulk->job.id);
	drop_flying(bulk);
	bulk->dirty = true;
}

/* Record by record through the real-time lane, which answers for each */
static void
job_dissolved(Sender *sender, const char *error)
{
	Bulk	   *bulk = &sender->bulk;
	JobNews		news = JOB_NO_NEWS;

	news.status = JOB_DISSOLVED;
	news.error = error;
	news.finished = true;
	jobs_update(bulk->job.id, &news);
	profiles_release_job(sender->env->server, bulk->job.kind, bulk->job.id, false);
	move_flying(bulk, &bulk->solo, bulk->solo_context);
	bulk->dirty = true;
	sender_error(sender, psprintf("job " INT64_FORMAT " is sent record by record: %s",
								  bulk->job.id, error));
	become_idle(sender);
}

static void
job_completed(Sender *sender)
{
	Bulk	   *bulk = &sender->bulk;
	JobNews		news = JOB_NO_NEWS;

	news.status = JOB_COMPLETED;
	news.finished = true;
	jobs_update(bulk->job.id, &news);
	profiles_learn_job(sender->env->server, bulk->job.kind, bulk->job.id);
	sender_delivered(sender, bulk->job.records);
	move_flying(bulk, &bulk->done, bulk->done_context);
	bulk->record_limit = Min(bulk->record_limit * 2, USERPILOT_MAX_RECORDS);
	/* the slot has just become free: no need to ask */
	enter(bulk, BULK_PREPARE, 0);
}

static void
job_failed(Sender *sender, int64 now)
{
	Bulk	   *bulk = &sender->bulk;
	JobNews		news = JOB_NO_NEWS;

	if (bulk->job.attempts >= MAX_SUBMISSIONS)
	{
		job_dissolved(sender, "the job failed twice");
		return;
	}
	news.status = JOB_PREPARED;
	news.error = "the job failed and is submitted again";
	jobs_update(bulk->job.id, &news);
	sender_error(sender, psprintf("job " INT64_FORMAT " failed and is submitted again", bulk->job.id));
	enter(bulk, BULK_SUBMIT, now + delivery_entity_backoff(1, 1.0));
}

static void
job_unknown(Sender *sender, const char *error, int64 now)
{
	Bulk	   *bulk = &sender->bulk;
	JobNews		news = JOB_NO_NEWS;

	news.status = JOB_UNKNOWN;
	news.error = error;
	jobs_update(bulk->job.id, &news);
	bulk->since = now;
	bulk->unknown_looks = 0;
	enter(bulk, BULK_UNKNOWN, now + delivery_poll_interval(0, expected_ms(bulk)));
}

/* A prepared job that turned out to be empty */
void
bulk_discard(Sender *sender)
{
	jobs_delete(sender->bulk.job.id);
	drop_flying(&sender->bulk);
}

/* -------------------------------------------------------------- recovery */

static void
recover_ids(const Job *job, entities_hash **to, MemoryContext context)
{
	int			n;
	MemoryContext old = MemoryContextSwitchTo(context);
	char	  **ids = jobs_entity_ids(job, &n);

	if (*to == NULL)
		*to = entities_create(context, n, NULL);
	for (int i = 0; i < n; i++)
	{
		EntityKey	key = {job->kind, strlen(ids[i]), ids[i]};
		bool		found;

		(void) entities_insert(*to, key, &found);
	}
	MemoryContextSwitchTo(old);
}

/* What an earlier worker left: a job under way, jobs not yet swept */
void
bulk_recover(Sender *sender)
{
	Bulk	   *bulk = &sender->bulk;
	MemoryContext old = MemoryContextSwitchTo(bulk->job_context);
	Job		   *jobs;
	int			n = jobs_unfinished(sender->env->server, &jobs);

	MemoryContextSwitchTo(old);
	for (int i = 0; i < n; i++)
	{
		if (strcmp(jobs[i].status, JOB_COMPLETED) == 0)
			recover_ids(&jobs[i], &bulk->done, bulk->done_context);
		else if (strcmp(jobs[i].status, JOB_DISSOLVED) == 0)
			recover_ids(&jobs[i], &bulk->solo, bulk->solo_context);
		else if (jobs[i].finished)
			jobs_drop_chunks(jobs[i].id);
		else
		{
			bulk->job = jobs[i];
			recover_ids(&jobs[i], &bulk->flying, bulk->job_context);
			bulk->since = clock_now();
			if (strcmp(jobs[i].status, JOB_PREPARED) == 0 && jobs[i].attempts == 0)
				enter(bulk, BULK_SUBMIT, 0);
			else if (strcmp(jobs[i].status, JOB_PREPARED) == 0 ||
					 strcmp(jobs[i].status, JOB_UNKNOWN) == 0 || jobs[i].job_id == NULL)
				enter(bulk, BULK_UNKNOWN, 0);
			else
				enter(bulk, BULK_RUNNING, 0);
		}
	}
}

/* -------------------------------------------------------------- schedule */

/* Something may be there to sweep */
static bool
sweep_wanted(const Sender *sender)
{
	const Bulk *bulk = &sender->bulk;

	return bulk->dirty || bulk->done != NULL ||
		(bulk->solo != NULL && sender->rt.solos == 0);
}

/* ... and really is: the slot is not asked for in vain */
static bool
sweep_needed(const Sender *sender)
{
	const Bulk *bulk = &sender->bulk;

	return bulk->done != NULL || bulk->solo != NULL || realtime_backlogged(sender) ||
		queue_has_rows(sender->env->server, true);
}

bool
bulk_busy(const Sender *sender)
{
	return sender->bulk.state != BULK_IDLE || sweep_wanted(sender) || sender->bulk.solo != NULL;
}

bool
bulk_due(const Sender *sender, int64 now)
{
	const Bulk *bulk = &sender->bulk;

	if (bulk->calling || !sender_may_send(sender) || now < bulk->lane.not_before ||
		now < bulk->next_at)
		return false;
	return bulk->state != BULK_IDLE || sweep_wanted(sender);
}

int64
bulk_next_at(const Sender *sender, int64 now)
{
	const Bulk *bulk = &sender->bulk;

	if (bulk->calling || (bulk->state == BULK_IDLE && !sweep_wanted(sender)))
		return PG_INT64_MAX;
	return Max(bulk->next_at, bulk->lane.not_before);
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

	switch (bulk->state)
	{
		case BULK_IDLE:
			if (!sweep_needed(sender))
			{
				bulk->dirty = false;
				return false;
			}
			if (!state_job_slot_take(sender->env->fingerprint))
			{
				bulk->waiting_for_slot = true;
				bulk->next_at = now + SLOT_RETRY_MS;
				return false;
			}
			bulk->since = now;
			enter(bulk, BULK_ASK, now);
			return false;
		case BULK_PREPARE:
			bulk->waiting_for_slot = false;
			if (bulk_prepare(sender))
			{
				enter(bulk, BULK_SUBMIT, now);
				return true;
			}
			become_idle(sender);
			bulk->next_at = now + LEFT_OUT_MS;
			return false;
		case BULK_SUBMIT:
			(void) state_job_slot_take(sender->env->fingerprint);
			jobs_count_attempt(bulk->job.id);
			bulk->job.attempts++;
			old = MemoryContextSwitchTo(bulk->body_context);
			bulk->body = jobs_body(&bulk->job, &bulk->npieces);
			MemoryContextSwitchTo(old);
			return true;
		case BULK_ASK:
		case BULK_RUNNING:
		case BULK_UNKNOWN:
			(void) state_job_slot_take(sender->env->fingerprint);
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
			started = api_submit(sender->http, target, bulk->job.kind, bulk->body, bulk->npieces,
								 bulk->job.ndjson ? bulk->job.filename : NULL, call, &error);
			break;
		case BULK_RUNNING:
			started = api_job(sender->http, target, bulk->job.job_id, call, &error);
			break;
	}
	bulk->calling = started;
	bulk->call_started = now;
	if (!started)
	{
		sender_error(sender, error);
		bulk->next_at = now + delivery_outage_backoff(5, sender_random());
	}
}

/* --------------------------------------------------------------- answers */

static void
answered_ask(Sender *sender, const ApiJob *jobs, int n, const DeliveryDecision *decision, int64 now)
{
	Bulk	   *bulk = &sender->bulk;

	/* a list that is not to be had: let the submission find out */
	if (decision->action == DELIVERY_BACKOFF)
		n = 0;
	else if (decision->action != DELIVERY_LEARN)
		return;
	for (int i = 0; i < n; i++)
	{
		if (!api_job_is_final(jobs[i].status))
		{
			bulk->waiting_for_slot = true;
			bulk->next_at = now + delivery_poll_interval(now - bulk->since, 5 * 60 * 1000);
			return;
		}
	}
	enter(bulk, BULK_PREPARE, now);
}

static void
adopt(Sender *sender, const ApiJob *job, int64 now)
{
	Bulk	   *bulk = &sender->bulk;
	JobNews		news = JOB_NO_NEWS;

	bulk->job.job_id = MemoryContextStrdup(bulk->job_context, job->job_id);
	news.job_id = job->job_id;
	news.status = api_job_is_final(job->status) ? "processing" : job->status;
	news.submitted = true;
	jobs_update(bulk->job.id, &news);
	enter(bulk, BULK_RUNNING, now);
}

/* Is the job of which no answer came among those Userpilot knows? */
static void
answered_unknown(Sender *sender, const ApiJob *jobs, int n, const DeliveryDecision *decision, int64 now)
{
	Bulk	   *bulk = &sender->bulk;
	bool		slot_free = true;

	if (decision->action != DELIVERY_LEARN)
	{
		bulk->next_at = now + delivery_poll_interval(now - bulk->since, expected_ms(bulk));
		return;
	}
	for (int i = 0; i < n; i++)
	{
		if (bulk->job.ndjson && bulk->job.filename != NULL &&
			strcmp(jobs[i].filename, bulk->job.filename) == 0)
		{
			adopt(sender, &jobs[i], now);
			return;
		}
		slot_free &= api_job_is_final(jobs[i].status);
	}

	bulk->unknown_looks = slot_free ? bulk->unknown_looks + 1 : 0;
	if (bulk->unknown_looks >= UNKNOWN_LOOKS && now - bulk->since >= UNKNOWN_MS)
	{
		job_refused(sender, "no answer came, and Userpilot runs no such job", false);
		bulk->since = now;
		enter(bulk, BULK_ASK, now);
		return;
	}
	bulk->next_at = now + delivery_poll_interval(now - bulk->since, expected_ms(bulk));
}

static void
accepted(Sender *sender, const HttpResult *result, const ApiJob *job, int64 now)
{
	Bulk	   *bulk = &sender->bulk;
	JobNews		news = JOB_NO_NEWS;

	bulk->job.job_id = MemoryContextStrdup(bulk->job_context, job->job_id);
	news.status = job->status[0] && !api_job_is_final(job->status) ? job->status : "queued";
	news.job_id = job->job_id;
	news.total_rows = job->total_rows;
	news.http_status = result->status;
	news.request_id = result->request_id;
	news.response = sender_answer_text(result);
	news.submitted = true;
	jobs_update(bulk->job.id, &news);
	bulk->since = now;
	enter(bulk, BULK_RUNNING, now + delivery_poll_interval(0, expected_ms(bulk)));
}

static void
note_refusal(Sender *sender, const HttpResult *result, const char *error)
{
	JobNews		news = JOB_NO_NEWS;

	news.http_status = result->status;
	news.request_id = result->request_id[0] ? result->request_id : NULL;
	news.error = error;
	if (result->body_len > 0)
		news.response = sender_answer_text(result);
	jobs_update(sender->bulk.job.id, &news);
}

static void
answered_submit(Sender *sender, const HttpResult *result, const ApiJob *job,
				const DeliveryDecision *decision, const char *error, int64 now)
{
	Bulk	   *bulk = &sender->bulk;

	MemoryContextReset(bulk->body_context);
	if (decision->action == DELIVERY_LEARN)
	{
		accepted(sender, result, job, now);
		return;
	}
	note_refusal(sender, result, error);
	switch (decision->action)
	{
		case DELIVERY_CONFLICT:
			job_refused(sender, error, true);
			bulk->waiting_for_slot = true;
			bulk->since = now;
			enter(bulk, BULK_ASK, now + delivery_poll_interval(0, 0));
			break;
		case DELIVERY_SHRINK:
			bulk->record_limit = Max(bulk->job.records / 2, 1);
			job_refused(sender, error, true);
			enter(bulk, BULK_ASK, now);
			break;
		case DELIVERY_DEAD:		/* alone it will get its own answer */
		case DELIVERY_DISSOLVE:
			job_dissolved(sender, error);
			break;
		case DELIVERY_UNKNOWN:
			job_unknown(sender, error, now);
			break;
		case DELIVERY_BACKOFF:
			bulk->next_at = now + delivery_entity_backoff(bulk->job.attempts, sender_random());
			break;
		case DELIVERY_THROTTLE:
		case DELIVERY_OUTAGE:
		case DELIVERY_PAUSE:
		case DELIVERY_LEARN:
			break;				/* the lane waits; then it is submitted again */
	}
}

static void
note_poll(Sender *sender, const HttpResult *result, const ApiJob *job)
{
	JobNews		news = JOB_NO_NEWS;

	/* final states are ours to write, once they are acted upon */
	if (!api_job_is_final(job->status) && job->status[0])
		news.status = job->status;
	news.total_rows = job->total_rows;
	news.completed_rows = job->completed_rows;
	news.http_status = result->status;
	news.response = sender_answer_text(result);
	news.polled = true;
	jobs_update(sender->bulk.job.id, &news);
	sender->bulk.last_completed = Max(job->completed_rows, 0);
}

static void
answered_poll(Sender *sender, const HttpResult *result, const ApiJob *job,
			  const DeliveryDecision *decision, const char *error, int64 now)
{
	Bulk	   *bulk = &sender->bulk;

	bulk->next_at = now + delivery_poll_interval(now - bulk->since, expected_ms(bulk));
	if (decision->action == DELIVERY_UNKNOWN)
	{
		job_unknown(sender, error, now);
		return;
	}
	if (decision->action != DELIVERY_LEARN)
		return;
	note_poll(sender, result, job);
	switch (delivery_job_end(job->status, bulk->job.records, job->total_rows, job->completed_rows))
	{
		case DELIVERY_JOB_RUNNING:
			break;
		case DELIVERY_JOB_COMPLETED:
			job_completed(sender);
			break;
		case DELIVERY_JOB_SHORT:
			job_dissolved(sender, psprintf("completed with %d of %d records",
										   (int) job->completed_rows, bulk->job.records));
			break;
		case DELIVERY_JOB_FAILED:
			job_failed(sender, now);
			break;
	}
}

static DeliveryCall
call_of(BulkState state)
{
	switch (state)
	{
		case BULK_ASK:
		case BULK_UNKNOWN:
			return DELIVERY_LIST;
		case BULK_SUBMIT:
			return DELIVERY_SUBMIT;
		case BULK_RUNNING:
			return DELIVERY_POLL;
		case BULK_IDLE:
		case BULK_PREPARE:
			break;
	}
	elog(ERROR, "no call is made in bulk state %d", (int) state);
	return DELIVERY_LIST;
}

static void
log_call(Sender *sender, const HttpResult *result, DeliveryCall call,
		 const DeliveryDecision *decision, const char *error)
{
	HistoryCall entry = {
		.server = sender->env->server,
		.method = call == DELIVERY_SUBMIT ? "POST" : "GET",
		.path = "/v1/background_jobs",
		.job = call == DELIVERY_LIST ? 0 : sender->bulk.job.id,
		.outcome = delivery_action_name(decision->action),
		.error = error
	};

	if (call == DELIVERY_SUBMIT)
		entry.path = api_submit_path(sender->bulk.job.kind);
	else if (call == DELIVERY_POLL)
		entry.path = psprintf("/v1/background_jobs/%s", sender->bulk.job.job_id);
	history_call(&entry, result);
}

void
bulk_answered(Sender *sender, HttpResult *result, int64 now)
{
	Bulk	   *bulk = &sender->bulk;
	DeliveryCall call = call_of(bulk->state);
	DeliveryAnswer answer = sender_answer(sender, call, result);
	DeliveryDecision decision;
	const char *error = NULL;
	ApiJob		job = {0};
	ApiJob	   *jobs = NULL;
	int			n = 0;

	bulk->calling = false;
	if (result->outcome == HTTP_ANSWERED && result->status / 100 == 2)
		answer.understood = call == DELIVERY_LIST ?
			api_read_jobs(result->body, result->body_len, &jobs, &n) :
			api_read_job(result->body, result->body_len, &job);
	answer.others_succeed = Max(bulk->lane.last_success, sender->rt.lane.last_success) >
		bulk->call_started;
	answer.records = bulk->job.records;
	answer.attempts = bulk->job.attempts;
	decision = delivery_decide(&answer);
	if (decision.action != DELIVERY_LEARN)
		error = sender_error_text(result);
	log_call(sender, result, call, &decision, error);
	lane_apply(sender, &bulk->lane, &decision, now, error);

	switch (bulk->state)
	{
		case BULK_ASK:
			answered_ask(sender, jobs, n, &decision, now);
			break;
		case BULK_UNKNOWN:
			answered_unknown(sender, jobs, n, &decision, now);
			break;
		case BULK_SUBMIT:
			answered_submit(sender, result, &job, &decision, error, now);
			break;
		case BULK_RUNNING:
			answered_poll(sender, result, &job, &decision, error, now);
			break;
		case BULK_IDLE:
		case BULK_PREPARE:
			break;
	}
}
