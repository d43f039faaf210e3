/*
 * bulk_done.c
 *	  The rows of an acknowledged job leave the queue.
 *
 * Not with its acknowledgement but while the next job runs: the API's slot,
 * which is what bulk delivery is short of, is free meanwhile.  What a worker
 * that died had left of them the next sweep finds nothing to send for.
 */
#include "postgres.h"

#include "utils/memutils.h"

#include "bulk_job.h"
#include "sender.h"

#define GROUP 1000

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

/* The job is over: its rows wait for bulk_delete_done() */
void
bulk_set_done(Sender *sender)
{
	Bulk	   *bulk = &sender->bulk;
	MemoryContext context = bulk->done_context;

	bulk_delete_done(sender);
	/* an earlier worker's: where its rows are nobody knows */
	if (bulk->rows.job != bulk->job.id)
	{
		memset(&bulk->rows, 0, sizeof(bulk->rows));
		bulk->rows.job = bulk->job.id;
		bulk->rows.kind = bulk->job.kind;
		bulk->rows.records = bulk->job.records;
		bulk->rows.unsure = true;
	}
	if (bulk->rows.unsure)
	{
		bulk->rows.n = 0;
		bulk_forget_plan(sender);
		bulk->dirty = true;
	}
	bulk->done = bulk->rows;
	bulk->done_context = bulk->job_context;
	bulk->job_context = context;
	memset(&bulk->rows, 0, sizeof(bulk->rows));
}

/* Not while a job is on its way out, which is waited for; and if there are no
 * rows, with the sweep that finds them */
bool
bulk_done_due(const Sender *sender, int64 now)
{
	const Bulk *bulk = &sender->bulk;
	bool		on_its_way = (bulk->state == BULK_PREPARE || bulk->state == BULK_SUBMIT) &&
		now >= bulk->lane.not_before && sender_may_send(sender);

	return bulk->done.job != 0 && !on_its_way && (bulk->done.n > 0 || !bulk->dirty);
}

static void
delete_rows(const JobRow *rows, int n)
{
	QueueRow   *group = palloc(GROUP * sizeof(QueueRow));

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
		(void) queue_delete(group, count);
	}
	pfree(group);
}

/* In one commit with what is said of it, so that progress never falls */
void
bulk_delete_done(Sender *sender)
{
	Bulk	   *bulk = &sender->bulk;
	JobRows    *done = &bulk->done;

	if (done->job == 0)
		return;
	delete_rows(done->rows, done->n);
	for (int i = 0; i < done->n; i++)
		bulk_row_gone(sender, done->kind, done->rows[i].batch);
	bulk_report_gone(sender);
	sender_delivered(sender, done->records);
	jobs_drop_chunks(done->job);
	memset(done, 0, sizeof(*done));
	MemoryContextReset(bulk->done_context);
}
