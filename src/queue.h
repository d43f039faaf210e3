/*
 * queue.h
 *	  userpilot_queue, userpilot_batches and userpilot_dead_letters.
 *
 * queue.c writes in the callers' transactions; queue_look.c and queue_read.c
 * are the worker's side.
 */
#ifndef USERPILOT_QUEUE_H
#define USERPILOT_QUEUE_H

#include "datatype/timestamp.h"
#include "lib/stringinfo.h"
#include "storage/itemptr.h"
#include "utils/jsonb.h"

#include "merge.h"
#include "shape.h"
#include "userpilot.h"

typedef struct QueueChange
{
	text	   *server;
	UserpilotKind kind;
	text	   *entity_id;
	text	   *company_id;		/* NULL: says nothing of it */
	Jsonb	   *metadata;
} QueueChange;

/* --- callers (queue.c) --- */

/* Real time; bulk beyond a transaction's first 100 rows */
extern void queue_enqueue(const QueueChange *change, const char *command);

/* A bulk SELECT: opened at its first row, with the active snapshot */
typedef struct QueueBatch QueueBatch;

extern QueueBatch *queue_batch_open(text *server, UserpilotKind kind,
									const char *command, const char *statement);

/* Counts rows that were not queued */
extern void queue_batch_note(QueueBatch *batch, int64 unchanged, int64 invalid);
extern void queue_batch_add(QueueBatch *batch, const QueueChange *change);
extern void queue_batch_flush(QueueBatch *batch);

/* A bulk SELECT on record; and taken back, but for entities under way */
extern bool queue_batch_find(int64 id, char **server, char **by);
extern uint64 queue_batch_cancel(int64 id);

/*
 * A change that can never be sent: a dead letter.  again: it may be met again,
 * at each synchronisation of a table, and is kept once.
 */
extern void queue_refuse(const QueueChange *change, const char *error, bool again);

/* Whether this transaction has queued anything; whether its present command
 * has one of this kind, which no snapshot shows yet */
extern bool queue_in_transaction(void);
extern bool queue_in_command(UserpilotKind kind);

/* Whether this transaction has queued a direct change that a snapshot of that
 * command does not see */
extern bool queue_changed_since(UserpilotKind kind, CommandId command);

/* The transaction callbacks, from _PG_init */
extern void queue_register(void);

/* --- worker (queue_look.c, queue_read.c) --- */

/* A row as the worker reads it; lives as long as the handler's call */
typedef struct QueueRow
{
	ItemPointerData tid;
	uint64		lsn;
	uint64		xid;
	int64		batch;			/* 0: none */
	bool		bulk;
	TimestampTz enqueued_at;
	UserpilotKind kind;
	const char *entity_id;		/* lengths count: it may not end in NUL */
	int			entity_len;
	const char *company_id;		/* or NULL */
	int			company_len;
	Jsonb	   *metadata;		/* perhaps toasted: queue_fold detoasts */
} QueueRow;

typedef void (*QueueRowHandler) (const QueueRow *row, void *arg);

/* What a look has seen: transactions before the end but those that were open */
typedef struct QueueSeen
{
	uint64		end;
	int			nopen;
	uint64		open[FLEXIBLE_ARRAY_MEMBER];
} QueueSeen;

/*
 * The look: real-time rows of a server that became visible since an earlier
 * one, or all of them (*seen is NULL), in the order of their transactions; at
 * most limit.  Replaces *seen, in context.  Returns whether these are all.
 */
extern bool queue_look(const char *server, QueueSeen **seen, MemoryContext context, int limit,
					   QueueRowHandler handler, void *arg);

/*
 * The sweep: every visible row of a server once, from block start round to
 * it again, in physical order from there.
 */
extern void queue_sweep(const char *server, BlockNumber start,
						QueueRowHandler handler, void *arg);

/* The queue as a pass over it sees it: what was committed, and its file */
typedef struct QueueView
{
	Datum		snapshot;
	Oid			file;
} QueueView;

/* Of now, in CurrentMemoryContext */
extern QueueView queue_view(void);

/* Whether positions taken then still mean something; until the transaction's end */
extern bool queue_view_stands(const QueueView *view);

/*
 * Those of the rows at these positions that are visible, the server's, and
 * could be seen in the view: a position may have been used again.
 */
extern void queue_visit(const char *server, const QueueView *view,
						const ItemPointerData *tids, int n,
						QueueRowHandler handler, void *arg);

/* A copy in CurrentMemoryContext that outlives the handler's call */
extern QueueRow *queue_row_copy(const QueueRow *row);
extern void queue_row_free(QueueRow *row);

/* Bulk SELECTs that rows of the queue may belong to */
extern void queue_batches(const char *server, MergeBatches *batches);

/*
 * How many of their rows are left, in the order of batches->batch, or (change)
 * how many more or fewer.
 */
extern void queue_batches_progress(const MergeBatches *batches, const int64 *pending,
								   bool change);

/* Folds a row into an entity, without what is excluded by now */
extern void queue_fold(MergeEntity *entity, const MergeBatches *batches,
					   const Shape *shape, const QueueRow *row);

/* Deletes rows by position, if they are still the rows that were read */
extern uint64 queue_delete(const QueueRow *rows, int n);

/* Whether all of them are still queued */
extern bool queue_stands(QueueRow **rows, int n);

typedef struct QueueFailure
{
	int			http_status;	/* 0: none */
	const char *error;
	const char *response;		/* or NULL */
	int			attempts;
} QueueFailure;

/* Moves rows to the dead letters */
extern uint64 queue_bury(const QueueRow *rows, int n, const QueueFailure *why);

/* Whether anything is queued for a server, at all or for the bulk lane */
extern bool queue_has_rows(const char *server, bool bulk_only);

/* Whether anything is queued that a snapshot (pg_snapshot) saw committed */
extern bool queue_pending_before(Datum snapshot);

/* Which prepared transactions hold rows of the queue, as a hash; 0: none */
extern int64 queue_prepared(void);

#endif
