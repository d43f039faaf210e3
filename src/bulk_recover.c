/*
 * bulk_recover.c
 *	  The bulk lane: what an earlier worker left goes on, as a job may be
 *	  running at Userpilot whatever became of the worker.
 */
#include "postgres.h"

#include "utils/memutils.h"

#include "bulk_job.h"
#include "clock.h"

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

/* It goes on where it was; where its rows are nobody knows any more */
static void
recover_job(Sender *sender, const Job *job)
{
	Bulk	   *bulk = &sender->bulk;
	HeldJob    *held = bulk->current;
	MemoryContext old = MemoryContextSwitchTo(held->context);

	held->job = *job;
	held->job.filename = job->filename ? pstrdup(job->filename) : NULL;
	held->job.job_id = job->job_id ? pstrdup(job->job_id) : NULL;
	held->unsure = true;
	MemoryContextSwitchTo(old);
	recover_ids(job, &held->entities, held->context);
	bulk->since = bulk->ends_at = clock_now();
	bulk->in_doubt = true;
	bulk->bind_anew = true;		/* what is to be excluded may have changed */
	if (strcmp(job->status, JOB_PREPARED) == 0 || strcmp(job->status, JOB_UNKNOWN) == 0 ||
		job->job_id == NULL)
		bulk_enter(bulk, BULK_UNKNOWN, 0);
	else
		bulk_enter(bulk, BULK_RUNNING, 0);
}

/* What an earlier worker left: jobs that had not left, are under way,
 * acknowledged, or dissolved */
void
bulk_recover(Sender *sender)
{
	Bulk	   *bulk = &sender->bulk;
	Job		   *jobs;
	int			n = jobs_unfinished(sender->env->server, &jobs);

	for (int i = 0; i < n; i++)
	{
		if (strcmp(jobs[i].status, JOB_PREPARED) == 0 && jobs[i].attempts == 0)
			bulk_put_back(sender, &jobs[i]);
		else if (!jobs[i].finished)
			recover_job(sender, &jobs[i]);
		else if (strcmp(jobs[i].status, JOB_DISSOLVED) == 0)
			recover_ids(&jobs[i], &bulk->solo, bulk->solo_context);
		else
		{
			for (int seq = 0; strcmp(jobs[i].status, JOB_COMPLETED) == 0 &&
				 bulk_learn_chunk(sender, &jobs[i], seq); seq++)
				;
			jobs_drop_chunks(jobs[i].id);
		}
	}
}
