/*
 * bulk_done.c
 *	  What an acknowledged job said is learnt, and its rows leave the queue.
 *
 * Not with its acknowledgement but while the next job runs, if that can be made
 * of what is planned: the API's slot, which is what bulk delivery is short of,
 * is free meanwhile.  Until then its entities are held.  A worker that finds
 * such a job learns it first, and the next sweep finds nothing to send for its
 * rows.
 */
#include "postgres.h"

#include "utils/memutils.h"

#include "bulk_job.h"
#include "clock.h"
#include "pending.h"
#include "sender.h"

#define GROUP 1000

/* What an acknowledged job said waits so long for the next to arrive (real ms) */
#define SUBMIT_MS 1000

/* One row has left the queue: less is pending than a pass has counted, of the
 * kind (bulk rows first, as nearly all are) and of the bulk SELECT */
void
bulk_row_gone(Sender *sender, UserpilotKind kind, int64 batch)
{
	Bulk	   *bulk = &sender->bulk;
	int64	   *counted = sender->counted[kind];
	const MergeBatch *found = merge_batches_find(&bulk->batches, batch);

	if (counted[true] > 0)
		counted[true]--;
	else if (counted[false] > 0)
		counted[false]--;
	if (found == NULL)
		return;
	bulk->gone[found - bulk->batches.batch]--;
	bulk->any_gone = true;
}

void
bulk_report_gone(Sender *sender)
{
	Bulk	   *bulk = &sender->bulk;

	if (!bulk->any_gone)
		return;
	queue_batches_progress(&bulk->batches, bulk->gone, true);
	memset(bulk->gone, 0, bulk->batches.n * sizeof(int64));
	bulk->any_gone = false;
}

/* What the real-time lane holds of them it need not look at again */
static void
forget_rows(Sender *sender, const HeldJob *held)
{
	for (int i = 0; i < held->nrows; i++)
	{
		const JobRow *row = &held->rows[i];
		EntityKey	key = {held->job.kind, strlen(row->entity_id), row->entity_id};

		if (row->batch == 0)
			pending_forget(&sender->rt, key, &row->tid, row->lsn);
	}
}

bool
bulk_learn_chunk(Sender *sender, const Job *job, int seq)
{
	text	   *records = jobs_chunk(job->id, seq);

	if (records == NULL)
		return false;
	profiles_learn_records(sender->env->server, job->kind, job->id,
						   VARDATA(records), VARSIZE(records) - VARHDRSZ);
	pfree(records);
	return true;
}

/* Userpilot has what it held */
static void
learn(Sender *sender, HeldJob *held)
{
	while (bulk_learn_chunk(sender, &held->job, held->nlearnt))
		held->nlearnt++;
	held->entities = NULL;
}

/* The job is over: bulk_done_step() does the rest, bit by bit */
void
bulk_set_done(Sender *sender)
{
	Bulk	   *bulk = &sender->bulk;
	HeldJob    *held = bulk->current;

	bulk_done_finish(sender);
	bulk->current = bulk->done;
	bulk->done = held;
	if (!held->unsure)
	{
		forget_rows(sender, held);
		return;
	}
	/* its rows go with the sweep that finds them, whenever that is */
	learn(sender, held);
	held->nrows = 0;
	bulk_forget_plan(sender);
	bulk->dirty = true;
}

bool
bulk_pass_waits(const Bulk *bulk)
{
	return bulk->state == BULK_PREPARE && bulk->next->entities == NULL && bulk->plan == NULL &&
		bulk->done->nrows > 0;
}

/* Not until the next job has arrived, which is waited for, but not for long;
 * and if there are no rows, with the sweep that finds them */
bool
bulk_done_due(const Sender *sender, int64 now)
{
	const Bulk *bulk = &sender->bulk;
	bool		waited_for = !bulk_pass_waits(bulk) &&
		(bulk->state == BULK_PREPARE || bulk->state == BULK_SUBMIT) &&
		(!bulk->calling || now < bulk->call_started + clock_api_ms(SUBMIT_MS)) &&
		now >= bulk->lane.not_before && sender_may_send(sender);

	return bulk->done->job.id != 0 && !waited_for && (bulk->done->nrows > 0 || !bulk->dirty);
}

/* Whether all were where they had been read */
static bool
delete_rows(const JobRow *rows, int n)
{
	QueueRow   *group = palloc(GROUP * sizeof(QueueRow));
	bool		all = true;

	for (int start = 0; start < n; start += GROUP)
	{
		int			count = Min(GROUP, n - start);

		for (int i = 0; i < count; i++)
		{
			group[i].tid = rows[start + i].tid;
			group[i].lsn = rows[start + i].lsn;
			group[i].entity_id = rows[start + i].entity_id;
			group[i].entity_len = strlen(rows[start + i].entity_id);
		}
		all &= queue_delete(group, count) == (uint64) count;
	}
	pfree(group);
	return all;
}

/* Rows in one commit with what is said of them, so that progress never falls */
void
bulk_done_finish(Sender *sender)
{
	Bulk	   *bulk = &sender->bulk;
	HeldJob    *held = bulk->done;

	if (held->job.id == 0)
		return;
	if (held->entities != NULL)
		learn(sender, held);
	if (!delete_rows(held->rows, held->nrows))
		bulk->dirty = sender->rt.moved = true;	/* find them again */
	for (int i = 0; i < held->nrows; i++)
		bulk_row_gone(sender, held->job.kind, held->rows[i].batch);
	bulk_report_gone(sender);
	sender_delivered(sender, held->job.records);
	jobs_drop_chunks(held->job.id);
	held_job_clear(held);
	realtime_look_again(sender);
}

/* What is fresh is not to wait for 10,000 records */
void
bulk_done_step(Sender *sender)
{
	HeldJob    *held = sender->bulk.done;

	if (held->entities != NULL && bulk_learn_chunk(sender, &held->job, held->nlearnt))
		held->nlearnt++;
	else
		bulk_done_finish(sender);
}
