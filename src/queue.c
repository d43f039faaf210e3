/*
 * queue.c
 *	  Enqueueing: rows go into userpilot_queue in the caller's transaction.
 *
 * Straight through the table access method, because every microsecond here
 * is felt by a user's statement.  The relation stays open from a
 * transaction's first row to PRE_COMMIT (or PRE_PREPARE), under the top
 * transaction's resource owner: a portal's would complain of a leak.  An
 * aborted subtransaction closes it too, since it may have created the table.
 *
 * No constraint is checked here: what the table's constraints would refuse
 * is refused in C before, and the table's shape is verified when it is
 * opened, so that a library never writes to a table it does not know.
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "access/xlog.h"
#include "catalog/pg_type.h"
#include "common/hashfn.h"
#include "executor/executor.h"
#include "miscadmin.h"
#include "nodes/nodeFuncs.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/pg_lsn.h"
#include "utils/rel.h"
#include "utils/resowner.h"
#include "utils/timestamp.h"
#include "utils/xid8.h"

#include "compat.h"
#include "queue.h"
#include "queue_table.h"
#include "sql.h"
#include "state.h"

/* A transaction's first rows are real time, what follows is bulk */
#define REALTIME_ROWS 100

static const SqlColumn columns[QUEUE_NCOLUMNS] = {
	{"lsn", PG_LSNOID}, {"xid", XID8OID}, {"enqueued_at", TIMESTAMPTZOID},
	{"batch", INT8OID}, {"bulk", BOOLOID}, {"server", TEXTOID},
	{"kind", TEXTOID}, {"entity_id", TEXTOID}, {"company_id", TEXTOID},
	{"metadata", JSONBOID}
};

/* The queue as this transaction has it open */
typedef struct OpenQueue
{
	Relation	rel;
	ResultRelInfo *rri;
	EState	   *estate;
	TupleTableSlot *slot;		/* last: there if all is */
	bool		only_look;		/* its only index is WHERE NOT bulk */
} OpenQueue;

static OpenQueue open_queue = {0};
static int	rows_in_transaction = 0;
static bool queued_in_transaction = false;
/* The last commands that queued something of a kind, and a direct change */
static CommandId queued_in[USERPILOT_KINDS] = {InvalidCommandId, InvalidCommandId};
static CommandId changed_in[USERPILOT_KINDS] = {InvalidCommandId, InvalidCommandId};

void
queue_check_shape(Relation rel)
{
	sql_check_columns(rel, columns, QUEUE_NCOLUMNS);
}

static void
close_queue(void)
{
	ResourceOwner owner = CurrentResourceOwner;
	OpenQueue	closing = open_queue;

	if (closing.rel == NULL)
		return;
	memset(&open_queue, 0, sizeof(open_queue));

	CurrentResourceOwner = TopTransactionResourceOwner;
	if (closing.slot != NULL)
	{
		ExecCloseIndices(closing.rri);
		ExecDropSingleTupleTableSlot(closing.slot);
		FreeExecutorState(closing.estate);
	}
	table_close(closing.rel, NoLock);
	CurrentResourceOwner = owner;
}

bool
queue_is_not_bulk(List *predicate)
{
	Node	   *node = list_length(predicate) == 1 ? linitial(predicate) : NULL;

	if (node == NULL || !is_notclause(node))
		return false;
	node = (Node *) get_notclausearg(node);
	return IsA(node, Var) && ((Var *) node)->varattno == QUEUE_BULK + 1;
}

/* What raises leaves it half open: the abort of its subtransaction closes it */
static OpenQueue *
open_for_insert(void)
{
	OpenQueue  *queue = &open_queue;
	ResourceOwner owner = CurrentResourceOwner;
	MemoryContext old;

	if (queue->slot != NULL)
		return queue;

	CurrentResourceOwner = TopTransactionResourceOwner;
	old = MemoryContextSwitchTo(TopTransactionContext);
	queue->rel = table_open(sql_relid("userpilot_queue"), RowExclusiveLock);
	queue_check_shape(queue->rel);
	queue->estate = CreateExecutorState();
	queue->rri = makeNode(ResultRelInfo);
	InitResultRelInfo(queue->rri, queue->rel, 1, NULL, 0);
	ExecOpenIndices(queue->rri, false);
	queue->only_look = queue->rri->ri_NumIndices == 1 &&
		queue_is_not_bulk(queue->rri->ri_IndexRelationInfo[0]->ii_Predicate);
	/* we know which rows it is for: no need to prepare the predicate each time */
	if (queue->only_look)
		queue->rri->ri_IndexRelationInfo[0]->ii_Predicate = NIL;
	queue->slot = MakeSingleTupleTableSlot(RelationGetDescr(queue->rel), &TTSOpsHeapTuple);
	MemoryContextSwitchTo(old);
	CurrentResourceOwner = owner;
	return queue;
}

static void
transaction_callback(XactEvent event, void *arg)
{
	switch (event)
	{
		case XACT_EVENT_PRE_COMMIT:
		case XACT_EVENT_PARALLEL_PRE_COMMIT:
		case XACT_EVENT_PRE_PREPARE:
			queue_batches_record();
			close_queue();
			return;
		case XACT_EVENT_COMMIT:
		case XACT_EVENT_PARALLEL_COMMIT:
		case XACT_EVENT_PREPARE:
			state_commit(event == XACT_EVENT_PREPARE);
			break;
		case XACT_EVENT_ABORT:
		case XACT_EVENT_PARALLEL_ABORT:
			/* the resource owner lets go of the relations itself */
			memset(&open_queue, 0, sizeof(open_queue));
			state_forget();
			break;
	}
	queue_batches_forget();
	rows_in_transaction = 0;
	queued_in_transaction = false;
	memset(queued_in, 0xff, sizeof(queued_in)); /* InvalidCommandId */
	memset(changed_in, 0xff, sizeof(changed_in));
}

/* What this command queued is gone, and the next one may have its number */
static void
forget_command(void)
{
	CommandId	now = GetCurrentCommandId(false);

	for (int kind = 0; kind < USERPILOT_KINDS; kind++)
		if (changed_in[kind] != InvalidCommandId && changed_in[kind] >= now)
			changed_in[kind] = now > 0 ? now - 1 : InvalidCommandId;
}

static void
subtransaction_callback(SubXactEvent event, SubTransactionId me,
						SubTransactionId parent, void *arg)
{
	if (event == SUBXACT_EVENT_ABORT_SUB)
	{
		close_queue();
		forget_command();
	}
	if (event == SUBXACT_EVENT_ABORT_SUB || event == SUBXACT_EVENT_COMMIT_SUB)
		queue_batches_subtransaction(event == SUBXACT_EVENT_COMMIT_SUB, me, parent);
}

void
queue_register(void)
{
	RegisterXactCallback(transaction_callback, NULL);
	RegisterSubXactCallback(subtransaction_callback, NULL);
}

text *
queue_kind_text(UserpilotKind kind)
{
	static text *texts[USERPILOT_KINDS];

	if (texts[kind] == NULL)
	{
		MemoryContext old = MemoryContextSwitchTo(TopMemoryContext);

		texts[kind] = cstring_to_text(userpilot_kind_name(kind));
		MemoryContextSwitchTo(old);
	}
	return texts[kind];
}

HeapTuple
queue_form_row(TupleDesc desc, const QueueChange *change, XLogRecPtr lsn,
			   TimestampTz at, int64 batch, bool bulk)
{
	Datum		values[QUEUE_NCOLUMNS];
	bool		nulls[QUEUE_NCOLUMNS] = {0};

	values[QUEUE_LSN] = LSNGetDatum(lsn);
	values[QUEUE_XID] = FullTransactionIdGetDatum(GetTopFullTransactionId());
	values[QUEUE_AT] = TimestampTzGetDatum(at);
	values[QUEUE_BATCH] = Int64GetDatum(batch);
	nulls[QUEUE_BATCH] = batch == 0;
	values[QUEUE_BULK] = BoolGetDatum(bulk);
	values[QUEUE_SERVER] = PointerGetDatum(change->server);
	values[QUEUE_KIND] = PointerGetDatum(queue_kind_text(change->kind));
	values[QUEUE_ENTITY] = PointerGetDatum(change->entity_id);
	values[QUEUE_COMPANY] = PointerGetDatum(change->company_id);
	nulls[QUEUE_COMPANY] = change->company_id == NULL;
	values[QUEUE_METADATA] = PointerGetDatum(change->metadata);
	return heap_form_tuple(desc, values, nulls);
}

void
queue_begin(UserpilotKind kind, const char *command)
{
	PreventCommandIfReadOnly(command);
	PreventCommandIfParallelMode(command);
	PreventCommandDuringRecovery(command);
	if (!queued_in_transaction)
	{
		state_note_commit_wake();
		queued_in_transaction = true;
	}
	queued_in[kind] = GetCurrentCommandId(true);
}

TupleDesc
queue_descriptor(void)
{
	return RelationGetDescr(open_for_insert()->rel);
}

/* Slots must hold heap tuples; bulk: all of them are for the bulk lane */
void
queue_insert_slots(TupleTableSlot **slots, int n, bool bulk)
{
	OpenQueue  *queue = open_for_insert();
	CommandId	cid = GetCurrentCommandId(true);

	if (n == 1)
		table_tuple_insert(queue->rel, slots[0], cid, 0, NULL);
	else
		table_multi_insert(queue->rel, slots, n, cid, 0, NULL);
	for (int i = 0; i < n && !(bulk && queue->only_look); i++)
	{
		(void) compat_insert_index_tuples(queue->rri, slots[i], queue->estate);
		ResetPerTupleExprContext(queue->estate);
	}
}

void
queue_enqueue(const QueueChange *change, const char *command)
{
	OpenQueue  *queue;
	HeapTuple	tuple;
	MemoryContext old;
	bool		bulk = rows_in_transaction >= REALTIME_ROWS;

	queue_begin(change->kind, command);
	changed_in[change->kind] = queued_in[change->kind];
	queue = open_for_insert();
	/* what the slot holds must live as long: it is dropped after a failure */
	old = MemoryContextSwitchTo(TopTransactionContext);
	tuple = queue_form_row(RelationGetDescr(queue->rel), change,
						   GetXLogInsertRecPtr(), GetCurrentTimestamp(), 0,
						   bulk);
	MemoryContextSwitchTo(old);
	if (++rows_in_transaction > REALTIME_ROWS)
		state_note_bulk();

	/* the slot's own, or inserting would copy it */
	ExecStoreHeapTuple(tuple, queue->slot, true);
	queue_insert_slots(&queue->slot, 1, bulk);
	ExecClearTuple(queue->slot);
}

bool
queue_in_transaction(void)
{
	return queued_in_transaction;
}

bool
queue_in_command(UserpilotKind kind)
{
	return queued_in[kind] == GetCurrentCommandId(false);
}

bool
queue_changed_since(UserpilotKind kind, CommandId command)
{
	return changed_in[kind] != InvalidCommandId && changed_in[kind] >= command;
}

static uint64
hash_text(text *value, uint64 seed)
{
	if (value == NULL)
		return seed + 1;
	return hash_bytes_extended((const unsigned char *) VARDATA_ANY(value),
							   VARSIZE_ANY_EXHDR(value), seed);
}

/*
 * Its id is no number of the sequence, which would change the caller's
 * lastval(), but negative, made of what it says: a number that counts could be
 * that of a restored one.  Rows that are met again and again, at each
 * synchronisation of a table, are then not piled up either.  Those of a
 * trigger differ from transaction to transaction: none waits for another.
 */
void
queue_refuse(const QueueChange *change, const char *error, bool again)
{
	static SqlStatement statement = SQL_STATEMENT(
		"INSERT INTO @.userpilot_dead_letters (id, lsn, xid, enqueued_at, bulk, server, kind,"
		" entity_id, company_id, metadata, error, attempts)"
		" VALUES ($1, $2, $3, pg_catalog.clock_timestamp(), false, $4, $5, $6, $7, $8, $9, 0)"
		" ON CONFLICT (id) DO NOTHING",
		9, {INT8OID, PG_LSNOID, XID8OID, TEXTOID, TEXTOID, TEXTOID, TEXTOID, JSONBOID, TEXTOID});
	FullTransactionId xid = GetTopFullTransactionId();
	uint64		hash = again ? 0 : U64FromFullTransactionId(xid);
	SqlCaller	caller;
	Datum		args[9];
	char		nulls[10] = "         ";

	args[1] = LSNGetDatum(GetXLogInsertRecPtr());
	args[2] = FullTransactionIdGetDatum(xid);
	args[3] = PointerGetDatum(change->server);
	args[4] = PointerGetDatum(queue_kind_text(change->kind));
	args[5] = PointerGetDatum(change->entity_id);
	args[6] = PointerGetDatum(change->company_id);
	nulls[6] = change->company_id == NULL ? 'n' : ' ';
	args[7] = PointerGetDatum(change->metadata);
	args[8] = CStringGetTextDatum(error);
	for (int i = 3; i < 9; i++)
		hash = hash_text((text *) DatumGetPointer(args[i]), hash);
	args[0] = Int64GetDatum(-(int64) (hash >> 1) - 1);
	sql_become_owner(&caller);
	(void) sql_execute(&statement, args, nulls, false);
	sql_become_caller(&caller);
}
