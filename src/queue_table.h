/*
 * queue_table.h
 *	  What the files of the queue module share about its tables.
 */
#ifndef USERPILOT_QUEUE_TABLE_H
#define USERPILOT_QUEUE_TABLE_H

#include "access/htup.h"
#include "access/xlogdefs.h"
#include "datatype/timestamp.h"
#include "executor/tuptable.h"
#include "nodes/pg_list.h"
#include "utils/relcache.h"

#include "queue.h"

enum
{
	QUEUE_LSN,
	QUEUE_XID,
	QUEUE_AT,
	QUEUE_BATCH,
	QUEUE_BULK,
	QUEUE_SERVER,
	QUEUE_KIND,
	QUEUE_ENTITY,
	QUEUE_COMPANY,
	QUEUE_METADATA,
	QUEUE_NCOLUMNS
};

/* Raises unless the queue has exactly the columns this library knows */
extern void queue_check_shape(Relation rel);

/* Whether an index's predicate is "NOT bulk", as userpilot_queue_look's is */
extern bool queue_is_not_bulk(List *predicate);

extern text *queue_kind_text(UserpilotKind kind);

/* Notes in the transaction that it queues; raises where it must not */
extern void queue_begin(UserpilotKind kind, const char *command);

/* batch 0: a direct change */
extern HeapTuple queue_form_row(TupleDesc desc, const QueueChange *change,
								XLogRecPtr lsn, TimestampTz at, int64 batch,
								bool bulk);

/* The queue's row type, opened for this transaction */
extern TupleDesc queue_descriptor(void);
extern void queue_insert_slots(TupleTableSlot **slots, int n, bool bulk);

/* A row to the handler, if it is the server's; returns whether it is */
extern bool queue_handle_slot(TupleTableSlot *slot, const char *server, int server_len,
							  MemoryContext per_row, QueueRowHandler handler, void *arg);

/* queue_batch.c, at the transaction's ends */
extern void queue_batches_record(void);
extern void queue_batches_forget(void);
extern void queue_batches_subtransaction(bool commit, SubTransactionId me,
										 SubTransactionId parent);

#endif
