/*
 * bulk_answers.c
 *	  The bulk lane: what each answer means for the job.
 */
#include "postgres.h"

#include "utils/memutils.h"

#include "api.h"
#include "bulk_job.h"
#include "history.h"

/* After a refusal for the moment (API ms) */
#define CONFLICT_MS 2000

/* A list without the job is believed this long after the lost answer, and
 * when seen twice: an upload may take a while to appear (API ms) */
#define UNKNOWN_MS (10 * 1000)
#define UNKNOWN_LOOKS 2

static void
answered_ask(Sender *sender, const ApiJob *jobs, int n, const DeliveryDecision *decision, int64 now)
{
	Bulk	   *bulk = &sender->bulk;

	/* a list that is not to be had: let the submission find out */
	if (decision->action == DELIVERY_BACKOFF)
		n = 0;
	else if (decision->action != DELIVERY_LEARN)
		return;
	/* one that never ends, or in a status we do not know, may not be in the
	 * slot: a submission would tell */
	if (now - bulk->since >= delivery_job_overdue(0))
		n = 0;
	for (int i = 0; i < n; i++)
	{
		if (delivery_job_runs(jobs[i].status))
		{
			bulk->waiting_for_slot = true;
			bulk->next_at = now + delivery_poll_interval(now - bulk->since, 5 * 60 * 1000, PG_INT64_MAX);
			return;
		}
	}
	bulk_enter(bulk, BULK_PREPARE, now);
}

/* Userpilot's word for how a job fares, or another if it has none; final states
 * are ours to write, once they are acted upon, and so are our own words */
static const char *
status_to_keep(const ApiJob *job, const char *otherwise)
{
	static const char *const ours[] = {JOB_PREPARED, JOB_UNKNOWN, JOB_REFUSED, JOB_DISSOLVED};

	if (job->status[0] == '\0' || api_job_is_final(job->status))
		return otherwise;
	for (size_t i = 0; i < lengthof(ours); i++)
		if (strcmp(job->status, ours[i]) == 0)
			return otherwise;
	return job->status;
}

static void
adopt(Sender *sender, const ApiJob *job, int64 now)
{
	Bulk	   *bulk = &sender->bulk;
	JobNews		news = JOB_NO_NEWS;

	bulk->current->job.job_id = MemoryContextStrdup(bulk->current->context, job->job_id);
	news.job_id = job->job_id;
	news.status = status_to_keep(job, "processing");
	news.submitted = true;
	jobs_update(bulk->current->job.id, &news);
	bulk->conflicts = 0;
	bulk->failed_since[DELIVERY_SUBMIT] = 0;
	bulk->in_doubt = bulk->waiting_for_slot = false;
	bulk->ends_at = bulk->since + bulk_expected_ms(bulk);
	bulk_enter(bulk, BULK_RUNNING, now);
}

/* A job that tells how far it is ends when its other records have had their
 * time, else when all should have had it */
static int64
next_poll(Bulk *bulk, int64 now)
{
	int64		elapsed = now - bulk->since;
	int64		expected = bulk_expected_ms(bulk);
	int64		left = expected - elapsed;

	if (bulk->last_completed > 0)
		left = (int64) (bulk->current->job.records - bulk->last_completed) * 60000 / USERPILOT_RECORDS_PER_MINUTE;
	bulk->ends_at = now + left;
	return now + delivery_poll_interval(elapsed, expected, left);
}

static void
accepted(Sender *sender, const HttpResult *result, const ApiJob *job, int64 now)
{
	Bulk	   *bulk = &sender->bulk;
	JobNews		news = JOB_NO_NEWS;

	bulk->current->job.job_id = MemoryContextStrdup(bulk->current->context, job->job_id);
	news.status = status_to_keep(job, "queued");
	news.job_id = job->job_id;
	news.total_rows = job->total_rows;
	news.http_status = result->status;
	news.request_id = result->request_id;
	news.response = sender_answer_text(result);
	news.submitted = true;
	jobs_update(bulk->current->job.id, &news);
	bulk->conflicts = 0;
	bulk->in_doubt = bulk->said_over = bulk->waiting_for_slot = false;
	bulk->since = now;
	bulk_enter(bulk, BULK_RUNNING, next_poll(bulk, now));
}

static void
note_refusal(Sender *sender, const HttpResult *result, const DeliveryDecision *decision,
			 const char *error, int64 now)
{
	JobNews		news = JOB_NO_NEWS;

	if (decision->open)
	{
		sender->bulk.since = now;
		sender->bulk.in_doubt = true;
		news.status = JOB_UNKNOWN;
	}
	news.http_status = result->status;
	news.request_id = result->request_id[0] ? result->request_id : NULL;
	news.error = error;
	if (result->body_len > 0)
		news.response = sender_answer_text(result);
	jobs_update(sender->bulk.current->job.id, &news);
}

/* An earlier submission may have gone through: what the job holds stays held */
static void
stay_in_doubt(Bulk *bulk, int64 until)
{
	bulk->unknown_looks = 0;
	bulk_enter(bulk, BULK_UNKNOWN, until);
}

/* Whether it would be too early to act upon a refusal for that reason */
static bool
may_run(const Bulk *bulk, int64 now)
{
	return bulk->in_doubt && now - bulk->since < delivery_job_overdue(bulk_expected_ms(bulk));
}

/* It has not been taken: what it held may go by other ways, and is bound anew */
static void
let_go(Sender *sender, const char *error, int64 now, int64 until)
{
	Bulk	   *bulk = &sender->bulk;

	bulk_refused(sender, error, true);
	bulk->since = now;
	bulk_enter(bulk, BULK_ASK, until);
}

static void
answered_submit(Sender *sender, const HttpResult *result, const ApiJob *job,
				const DeliveryDecision *decision, const char *error, int64 now)
{
	Bulk	   *bulk = &sender->bulk;
	int64		wait_until = now + CONFLICT_MS +
		delivery_lane_backoff(bulk->conflicts + 1, sender_random());

	MemoryContextReset(bulk->body_context);
	if (decision->action == DELIVERY_LEARN)
	{
		accepted(sender, result, job, now);
		return;
	}
	note_refusal(sender, result, decision, error, now);
	if (!decision->counts)
	{
		bulk->current->job.attempts--;
		jobs_give_back_attempt(bulk->current->job.id);
	}
	switch (decision->action)
	{
		case DELIVERY_CONFLICT:
			/* each time in vain: wait longer if the list is no help */
			if (bulk->conflicts++ == 0)
				bulk->since = now;
			bulk->waiting_for_slot = true;
			if (bulk->in_doubt)
				stay_in_doubt(bulk, wait_until);
			else
				let_go(sender, error, now, wait_until);
			break;
		case DELIVERY_SHRINK:
		case DELIVERY_DEAD:		/* alone it will get its own answer */
		case DELIVERY_DISSOLVE:
			if (decision->open)
				bulk_unknown(sender, error, now);
			else if (may_run(bulk, now))
			{
				bulk->conflicts++;
				stay_in_doubt(bulk, wait_until);
			}
			else if (decision->action == DELIVERY_SHRINK)
			{
				bulk->record_limit = Max(bulk->current->job.records / 2, 1);
				bulk->since_shrunk = 0;
				let_go(sender, error, now, now);
			}
			else
				bulk_dissolved(sender, error);
			break;
		case DELIVERY_UNKNOWN:
			bulk_unknown(sender, error, now);
			break;
		case DELIVERY_THROTTLE:
		case DELIVERY_PAUSE:
			/* who knows for how long */
			if (!bulk->in_doubt)
			{
				bulk->conflicts++;
				let_go(sender, error, now, wait_until);
			}
			break;
		case DELIVERY_OUTAGE:
		case DELIVERY_BACKOFF:
		case DELIVERY_LEARN:
			break;				/* the lane waits; then it is submitted again */
	}
}

static void
note_poll(Sender *sender, const HttpResult *result, const ApiJob *job)
{
	JobNews		news = JOB_NO_NEWS;

	news.status = status_to_keep(job, NULL);
	news.total_rows = job->total_rows;
	news.completed_rows = job->completed_rows;
	news.http_status = result->status;
	news.response = sender_answer_text(result);
	news.polled = true;
	jobs_update(sender->bulk.current->job.id, &news);
	sender->bulk.last_completed = Min(Max(job->completed_rows, 0), sender->bulk.current->job.records);
}

/*
 * What is said of the job, in a poll's answer or in the list.  That it is
 * completed the list says, too, but only a poll says of how many records.
 */
static void
judge(Sender *sender, const HttpResult *result, const ApiJob *job, bool listed, int64 now)
{
	Bulk	   *bulk = &sender->bulk;
	int			records = bulk->current->job.records;

	note_poll(sender, result, job);
	if (listed && job->completed_rows < 0 &&
		(strcmp(job->status, "completed") == 0 ||
		 (strcmp(job->status, "pending_refresh") == 0 && bulk_overdue(bulk, now))))
	{
		if (bulk->said_over)
			bulk_dissolved(sender, psprintf("%s, but nothing says with how many records", job->status));
		else
			bulk_enter(bulk, BULK_RUNNING, now);
		bulk->said_over = true;
		return;
	}
	switch (delivery_job_end(job->status, records, job->total_rows, job->completed_rows,
							 bulk_overdue(bulk, now)))
	{
		case DELIVERY_JOB_RUNNING:
			bulk->next_at = next_poll(bulk, now);
			break;
		case DELIVERY_JOB_COMPLETED:
			bulk_completed(sender);
			break;
		case DELIVERY_JOB_SHORT:
			bulk_dissolved(sender, psprintf("completed with " INT64_FORMAT " of " INT64_FORMAT " records",
										   job->completed_rows < 0 ? job->total_rows : job->completed_rows,
										   Max((int64) records, job->total_rows)));
			break;
		case DELIVERY_JOB_FAILED:
			bulk_failed(sender, now);
			break;
		case DELIVERY_JOB_STRANGE:
			bulk_dissolved(sender, psprintf("the job is \"%s\", and overdue", job->status));
			break;
	}
}

static void
answered_poll(Sender *sender, const HttpResult *result, const ApiJob *job,
			  const DeliveryDecision *decision, const char *error, int64 now)
{
	Bulk	   *bulk = &sender->bulk;

	bulk->next_at = next_poll(bulk, now);
	if (decision->action == DELIVERY_LEARN)
		judge(sender, result, job, false, now);
	else if (decision->action == DELIVERY_UNKNOWN)
		bulk_unknown(sender, error, now);	/* the list may tell more */
	else if (decision->action != DELIVERY_PAUSE && bulk_overdue(bulk, now))
	{
		bulk->poll_failed = true;
		bulk_unknown(sender, error, now);
	}
}

static const ApiJob *
find_ours(const Job *job, const ApiJob *jobs, int n)
{
	for (int i = 0; i < n; i++)
	{
		if (job->job_id != NULL ? api_same_job(jobs[i].job_id, job->job_id) :
			job->filename != NULL && strcmp(jobs[i].filename, job->filename) == 0)
			return &jobs[i];
	}
	return NULL;
}

/*
 * Nor is a list waited for that is not to be had, or that never empties.  But
 * while nothing is to be had at all, it will be the first to tell.
 */
static bool
waited_in_vain(const Bulk *bulk, const DeliveryDecision *decision, int64 now)
{
	return bulk_overdue(bulk, now) &&
		(decision->action == DELIVERY_LEARN || decision->action == DELIVERY_BACKOFF);
}

/* Is the job of which no answer came among those Userpilot knows? */
static void
answered_unknown(Sender *sender, const HttpResult *result, const ApiJob *jobs, int n,
				 const DeliveryDecision *decision, int64 now)
{
	Bulk	   *bulk = &sender->bulk;
	Job		   *job = &bulk->current->job;
	const ApiJob *ours = NULL;
	bool		slot_free = decision->action == DELIVERY_LEARN;

	bulk->next_at = now + delivery_poll_interval(now - bulk->since, bulk_expected_ms(bulk), PG_INT64_MAX);
	if (slot_free)
		ours = find_ours(job, jobs, n);
	if (ours != NULL && job->job_id == NULL)
		adopt(sender, ours, now);
	else if (ours != NULL)
	{
		/* where it is asked about by its id nothing is found: so by the list */
		bulk->unknown_looks = 0;
		judge(sender, result, ours, true, now);
	}
	else
	{
		for (int i = 0; i < n; i++)
			slot_free &= api_job_is_final(jobs[i].status);
		bulk->unknown_looks = slot_free ? bulk->unknown_looks + 1 : 0;
		if ((bulk->unknown_looks < UNKNOWN_LOOKS || now - bulk->since < UNKNOWN_MS) &&
			!waited_in_vain(bulk, decision, now))
			return;
		/* what polls did not say they may say now */
		if (bulk->poll_failed && bulk->lost == 1)
			bulk_enter(bulk, BULK_RUNNING, now);
		else
			bulk_never_arrived(sender);
		bulk->poll_failed = false;
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
		.job = call == DELIVERY_LIST ? 0 : sender->bulk.current->job.id,
		.outcome = delivery_action_name(decision->action),
		.error = error
	};

	if (call == DELIVERY_SUBMIT)
		entry.path = api_submit_path(sender->bulk.current->job.kind);
	else if (call == DELIVERY_POLL)
		entry.path = psprintf("/v1/background_jobs/%s", sender->bulk.current->job.job_id);
	history_call(&entry, result);
}

void
bulk_answered(Sender *sender, HttpResult *result, int64 now)
{
	Bulk	   *bulk = &sender->bulk;
	DeliveryCall call = call_of(bulk->state);
	DeliveryAnswer answer = sender_answer(sender, call, result);
	DeliveryDecision decision;
	int64	   *failed_since = &bulk->failed_since[call];
	const char *error = NULL;
	ApiJob		job = {0};
	ApiJob	   *jobs = NULL;
	int			n = 0;

	bulk->calling = false;
	if (result->outcome == HTTP_ANSWERED && result->status / 100 == 2)
		answer.understood = call == DELIVERY_LIST ?
			api_read_jobs(result->body, result->body_len, &jobs, &n) :
			api_read_job(result->body, result->body_len, &job) &&
			(call != DELIVERY_POLL || api_same_job(job.job_id, bulk->current->job.job_id));
	answer.again = *failed_since != 0;
	answer.others_succeed = Max(bulk->lane.last_success, sender->rt.lane.last_success) >
		(answer.again ? *failed_since : bulk->call_started);
	answer.records = bulk->current->job.records;
	answer.attempts = bulk->current->job.attempts;
	decision = delivery_decide(&answer);
	if (decision.action == DELIVERY_LEARN)
		*failed_since = 0;
	else
	{
		if (!answer.again && (call != DELIVERY_SUBMIT || decision.action == DELIVERY_PAUSE))
			*failed_since = bulk->call_started;
		error = sender_error_text(result);
	}
	log_call(sender, result, call, &decision, error);
	lane_apply(sender, &bulk->lane, &decision, now, error);

	switch (bulk->state)
	{
		case BULK_ASK:
			answered_ask(sender, jobs, n, &decision, now);
			break;
		case BULK_UNKNOWN:
			answered_unknown(sender, result, jobs, n, &decision, now);
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
