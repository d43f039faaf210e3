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

/* The job is over: its rows wait for bulk_delete_done() */
void
bulk_set_done(Sender *sender)
{
	Bulk	   *bulk = &sender->bulk;
	MemoryContext context = bulk->done_context;

	bulk_delete_done(sender);
	if (bulk->rows.job != bulk->job.id)
	{
		/* an earlier worker's: where its rows are nobody knows */
		memset(&bulk->rows, 0, sizeof(bulk->rows));
		bulk->rows.job = bulk->job.id;
		bulk->rows.kind = bulk->job.kind;
		bulk->rows.records = bulk->job.records;
		bulk->dirty = true;
	}
	bulk->done = bulk->rows;
	bulk->done_context = bulk->job_context;
	bulk->job_context = context;
	memset(&bulk->rows, 0, sizeof(bulk->rows));
}

/* Not while a job is on its way out: that is waited for */
bool
bulk_done_due(const Sender *sender)
{
	const Bulk *bulk = &sender->bulk;

	return bulk->done.job != 0 && bulk->state != BULK_PREPARE && bulk->state != BULK_SUBMIT;
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
	int64	   *pending;

	if (done->job == 0)
		return;
	pending = palloc0(Max(bulk->batches.n, 1) * sizeof(int64));
	delete_rows(done->rows, done->n);
	for (int i = 0; i < done->n; i++)
		sweep_count(sender, pending, done->rows[i].batch, -1);
	queue_batches_progress(&bulk->batches, pending, true);
	sender_rows_gone(sender, done->kind, done->n);
	sender_delivered(sender, done->records);
	jobs_drop_chunks(done->job);
	memset(done, 0, sizeof(*done));
	MemoryContextReset(bulk->done_context);
}
