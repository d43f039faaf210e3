/*
 * queue_batch.c
 *	  Bulk SELECTs: rows written in groups, and one row in userpilot_batches.
 *
 * A bulk SELECT reads the past, so its snapshot is recorded: a change that
 * the snapshot cannot see is newer than what the SELECT read, whatever their
 * positions in the WAL.  The record is written when the transaction ends,
 * with the final count of rows.
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "access/xlog.h"
#include "executor/executor.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/datum.h"
#include "utils/fmgroids.h"
#include "utils/memutils.h"
#include "utils/pg_lsn.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"
#include "utils/xid8.h"

#include "compat.h"
#include "environment.h"
#include "queue.h"
#include "queue_table.h"
#include "sql.h"
#include "state.h"

/* Rows and bytes that are written at once */
#define BATCH_ROWS 500
#define BATCH_BYTES (1024 * 1024)

#define STATEMENT_BYTES 1000
#define BATCHES_PER_TRANSACTION 1000000

/* What will be written to userpilot_batches; in TopTransactionContext */
typedef struct BatchRecord
{
	int64		id;
	text	   *server;
	UserpilotKind kind;
	Datum		snapshot;
	XLogRecPtr	lsn;
	TimestampTz at;
	int64		rows;
	int64		unchanged;
	int64		invalid;
	text	   *statement;
	text	   *by;
	SubTransactionId subtransaction;
	bool		aborted;		/* its subtransaction was rolled back */
} BatchRecord;

struct QueueBatch
{
	BatchRecord *record;
	MemoryContext context;		/* of this struct and the slots */
	MemoryContext rows_context; /* what the buffered rows point to */
	int			nrows;
	Size		bytes;
	TupleTableSlot *slots[BATCH_ROWS];
};

static List *records = NIL;
static int64 batches_in_transaction = 0;

/* A restored dump may hold ids of transactions that are still to come here */
static int64
new_id(void)
{
	SqlCaller	caller;
	char	   *server;
	char	   *by;
	int64		id;

	sql_become_owner(&caller);
	do
	{
		if (++batches_in_transaction >= BATCHES_PER_TRANSACTION)
			ereport(ERROR,
					(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
					 errmsg("too many bulk SELECTs in one transaction"),
					 errhint("Send many rows with one SELECT, and single ones with userpilot_identify_company() or userpilot_identify_user().")));
		id = U64FromFullTransactionId(GetTopFullTransactionId()) *
			BATCHES_PER_TRANSACTION + batches_in_transaction;
	} while (queue_batch_find(id, &server, &by));
	sql_become_caller(&caller);
	return id;
}

static BatchRecord *
new_record(text *server, UserpilotKind kind, const char *statement)
{
	int64		id = new_id();
	MemoryContext old = MemoryContextSwitchTo(TopTransactionContext);
	BatchRecord *record = palloc0(sizeof(BatchRecord));

	record->id = id;
	record->server = (text *) DatumGetPointer(datumCopy(PointerGetDatum(server), false, -1));
	record->kind = kind;
	record->snapshot = OidFunctionCall0(F_PG_CURRENT_SNAPSHOT);
	record->lsn = GetXLogInsertRecPtr();
	record->at = GetCurrentTimestamp();
	record->statement = cstring_to_text_with_len(statement,
												 pg_mbcliplen(statement, strlen(statement), STATEMENT_BYTES));
	record->by = cstring_to_text(GetUserNameFromId(GetUserId(), false));
	record->subtransaction = GetCurrentSubTransactionId();
	records = lappend(records, record);
	MemoryContextSwitchTo(old);
	return record;
}

QueueBatch *
queue_batch_open(text *server, UserpilotKind kind, const char *command,
				 const char *statement)
{
	QueueBatch *batch = palloc0(sizeof(QueueBatch));

	queue_begin(kind, command);
	state_note_bulk();
	batch->record = new_record(server, kind, statement);
	batch->context = CurrentMemoryContext;
	batch->rows_context = AllocSetContextCreate(CurrentMemoryContext,
												"userpilot bulk rows",
												ALLOCSET_DEFAULT_SIZES);
	return batch;
}

/*
 * A cursor can outlive the subtransaction its SELECT began in.  Rows written
 * in another one would come and go without the record that orders them.
 */
static void
check_subtransaction(const QueueBatch *batch)
{
	if (batch->record->aborted ||
		batch->record->subtransaction != GetCurrentSubTransactionId())
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_TRANSACTION_STATE),
				 errmsg("a bulk SELECT cannot go on in another subtransaction than it began in"),
				 errhint("Run it as one statement, or fetch from its cursor without savepoints in between.")));
}

void
queue_batch_note(QueueBatch *batch, int64 unchanged, int64 invalid)
{
	batch->record->unchanged += unchanged;
	batch->record->invalid += invalid;
}

static TupleTableSlot *
next_slot(QueueBatch *batch, TupleDesc desc)
{
	TupleTableSlot **slot = &batch->slots[batch->nrows];

	if (*slot == NULL)
	{
		MemoryContext old = MemoryContextSwitchTo(batch->context);

		/* a copy: the relation may be closed and opened in between */
		*slot = MakeSingleTupleTableSlot(CreateTupleDescCopy(desc), &TTSOpsHeapTuple);
		MemoryContextSwitchTo(old);
	}
	return *slot;
}

void
queue_batch_add(QueueBatch *batch, const QueueChange *change)
{
	TupleDesc	desc;
	MemoryContext old;
	HeapTuple	tuple;

	check_subtransaction(batch);
	desc = queue_descriptor();
	old = MemoryContextSwitchTo(batch->rows_context);
	/* each row has a position of its own, which tells which of two was last;
	 * fewer bytes than they take in the WAL, so no later change has it */
	tuple = queue_form_row(desc, change, batch->record->lsn + batch->record->rows + batch->nrows,
						   batch->record->at, batch->record->id, true);
	MemoryContextSwitchTo(old);
	/* the slot's own, or inserting would copy it */
	ExecStoreHeapTuple(tuple, next_slot(batch, desc), true);
	batch->nrows++;
	batch->bytes += tuple->t_len;
	if (batch->nrows == BATCH_ROWS || batch->bytes >= BATCH_BYTES)
		queue_batch_flush(batch);
}

void
queue_batch_flush(QueueBatch *batch)
{
	check_subtransaction(batch);
	if (batch->nrows == 0)
		return;
	queue_insert_slots(batch->slots, batch->nrows, true);
	for (int i = 0; i < batch->nrows; i++)
		ExecClearTuple(batch->slots[i]);
	batch->record->rows += batch->nrows;
	batch->nrows = 0;
	batch->bytes = 0;
	MemoryContextReset(batch->rows_context);
}

static void
insert_record(ResultRelInfo *rri, EState *estate, TupleTableSlot *slot,
			  const BatchRecord *record)
{
	Datum		values[] = {
		Int64GetDatum(record->id),
		PointerGetDatum(record->server),
		PointerGetDatum(queue_kind_text(record->kind)),
		record->snapshot,
		LSNGetDatum(record->lsn),
		FullTransactionIdGetDatum(GetTopFullTransactionId()),
		Int64GetDatum(record->rows),
		Int64GetDatum(record->unchanged),
		Int64GetDatum(record->invalid),
		Int64GetDatum(record->rows),	/* pending */
		PointerGetDatum(record->statement),
		TimestampTzGetDatum(record->at),
		PointerGetDatum(record->by)
	};

	ExecClearTuple(slot);
	memcpy(slot->tts_values, values, sizeof(values));
	memset(slot->tts_isnull, 0, lengthof(values) * sizeof(bool));
	ExecStoreVirtualTuple(slot);
	table_tuple_insert(rri->ri_RelationDesc, slot, GetCurrentCommandId(true), 0, NULL);
	(void) compat_insert_index_tuples(rri, slot, estate);
	ResetPerTupleExprContext(estate);
}

/* Before commit or prepare: one row for each bulk SELECT that queued rows */
void
queue_batches_record(void)
{
	Relation	rel;
	EState	   *estate;
	ResultRelInfo *rri;
	TupleTableSlot *slot;
	ListCell   *lc;

	/* the extension may have been dropped after it queued */
	if (records == NIL || !environment_installed(NULL, NULL, NULL))
		return;
	/* at this point of a commit there is no snapshot any more */
	PushActiveSnapshot(GetTransactionSnapshot());
	rel = table_open(sql_relid("userpilot_batches"), RowExclusiveLock);
	estate = CreateExecutorState();
	rri = makeNode(ResultRelInfo);
	InitResultRelInfo(rri, rel, 1, NULL, 0);
	ExecOpenIndices(rri, false);
	slot = MakeSingleTupleTableSlot(RelationGetDescr(rel), &TTSOpsVirtual);
	foreach(lc, records)
	{
		const BatchRecord *record = lfirst(lc);

		if (record->rows + record->unchanged + record->invalid > 0)
			insert_record(rri, estate, slot, record);
	}
	ExecDropSingleTupleTableSlot(slot);
	ExecCloseIndices(rri);
	FreeExecutorState(estate);
	table_close(rel, NoLock);
	PopActiveSnapshot();
	records = NIL;
}

void
queue_batches_forget(void)
{
	records = NIL;
	batches_in_transaction = 0;
}

/* Rows of an aborted subtransaction are gone, and so is their record */
void
queue_batches_subtransaction(bool commit, SubTransactionId me, SubTransactionId parent)
{
	ListCell   *lc;

	foreach(lc, records)
	{
		BatchRecord *record = lfirst(lc);

		if (record->subtransaction != me)
			continue;
		if (commit)
			record->subtransaction = parent;
		else
		{
			record->aborted = true;
			records = foreach_delete_current(records, lc);
		}
	}
}

/* ----------------------------------------------------- those on record */

bool
queue_batch_find(int64 id, char **server, char **by)
{
	static SqlStatement statement = SQL_STATEMENT(
		"SELECT server, by FROM @.userpilot_batches WHERE id OPERATOR(pg_catalog.=) $1", 1, {INT8OID});
	Datum		args[1] = {Int64GetDatum(id)};
	/* read only: within a bulk SELECT it must not begin a new command */
	int			n = sql_execute(&statement, args, NULL, true);

	if (n > 0)
	{
		*server = SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1);
		*by = SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 2);
	}
	return n > 0;
}

uint64
queue_batch_cancel(int64 id)
{
	static SqlStatement rows = SQL_STATEMENT(
		"DELETE FROM @.userpilot_queue q WHERE q.batch OPERATOR(pg_catalog.=) $1 AND NOT EXISTS ("
		" SELECT FROM @.userpilot_profiles p WHERE p.server OPERATOR(pg_catalog.=) q.server"
		"  AND p.kind OPERATOR(pg_catalog.=) q.kind AND p.entity_id OPERATOR(pg_catalog.=) q.entity_id"
		"  AND (p.job IS NOT NULL OR p.attempts OPERATOR(pg_catalog.>) 0))", 1, {INT8OID});
	static SqlStatement record = SQL_STATEMENT(
		"UPDATE @.userpilot_batches SET pending ="
		" (SELECT pg_catalog.count(*) FROM @.userpilot_queue WHERE batch OPERATOR(pg_catalog.=) $1)"
		" WHERE id OPERATOR(pg_catalog.=) $1", 1, {INT8OID});
	Datum		args[1] = {Int64GetDatum(id)};
	uint64		n = sql_execute(&rows, args, NULL, false);

	(void) sql_execute(&record, args, NULL, false);
	return n;
}
