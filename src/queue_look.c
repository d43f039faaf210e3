/*
 * queue_look.c
 *	  The look: what became visible to the real-time lane since the last one.
 *
 * Two kinds of rows: of transactions that began since, and of those that were
 * in progress then.  Straight from the index: someone waits for what is found,
 * and a statement takes several times longer.
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/table.h"
#include "access/transam.h"
#include "executor/tuptable.h"
#include "lib/qunique.h"
#include "miscadmin.h"
#include "utils/fmgroids.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/xid8.h"

#include "queue_table.h"
#include "sql.h"

/* The rows of one look: where they go, and how many more may */
typedef struct Look
{
	Relation	rel;
	Oid			index;
	const QueueSeen *since;
	const char *server;
	int			server_len;
	TupleTableSlot *slot;
	MemoryContext per_row;
	int			left;
	QueueRowHandler handler;
	void	   *arg;
} Look;

/* The index that is there for looks; InvalidOid: not fit for use, and all rows
 * must be read */
static Oid
look_index(Relation rel)
{
	Oid			id = get_relname_relid("userpilot_queue_look", RelationGetNamespace(rel));
	Relation	index;
	Form_pg_index form;
	bool		fit;

	if (!OidIsValid(id))
		return InvalidOid;
	index = index_open(id, AccessShareLock);
	form = index->rd_index;
	/* as the planner has it */
	fit = form->indrelid == RelationGetRelid(rel) && form->indisvalid &&
		(!form->indcheckxmin ||
		 TransactionIdPrecedes(HeapTupleHeaderGetXmin(index->rd_indextuple->t_data), TransactionXmin)) &&
		form->indkey.values[0] == QUEUE_XID + 1 &&
		queue_is_not_bulk(RelationGetIndexPredicate(index));
	index_close(index, NoLock);
	return fit ? id : InvalidOid;
}

static int
compare_xids(const void *a, const void *b)
{
	uint64		x = *(const uint64 *) a;
	uint64		y = *(const uint64 *) b;

	return x < y ? -1 : x > y;
}

static bool
is_new(const QueueSeen *since, Datum xid)
{
	uint64		value = U64FromFullTransactionId(DatumGetFullTransactionId(xid));

	return since == NULL || value >= since->end ||
		bsearch(&value, since->open, since->nopen, sizeof(uint64), compare_xids) != NULL;
}

/* Rows whose xid compares so */
static void
look_scan(Look *look, StrategyNumber strategy, RegProcedure comparison, uint64 xid)
{
	ScanKeyData key;
	SysScanDesc scan;
	HeapTuple	tuple;

	ScanKeyInit(&key, QUEUE_XID + 1, strategy, comparison,
				FullTransactionIdGetDatum(FullTransactionIdFromU64(xid)));
	scan = systable_beginscan(look->rel, look->index, OidIsValid(look->index),
							  GetActiveSnapshot(), 1, &key);
	while (look->left > 0 && (tuple = systable_getnext(scan)) != NULL)
	{
		bool		isnull;

		CHECK_FOR_INTERRUPTS();
		ExecStoreHeapTuple(tuple, look->slot, false);
		if (!DatumGetBool(slot_getattr(look->slot, QUEUE_BULK + 1, &isnull)) &&
			is_new(look->since, slot_getattr(look->slot, QUEUE_XID + 1, &isnull)))
			look->left -= queue_handle_slot(look->slot, look->server, look->server_len,
											look->per_row, look->handler, look->arg);
		ExecClearTuple(look->slot);
	}
	systable_endscan(scan);
}

static uint64
widen(TransactionId xid)
{
	FullTransactionId next = ReadNextFullTransactionId();
	uint32		epoch = EpochFromFullTransactionId(next);

	if (xid > XidFromFullTransactionId(next))
		epoch--;				/* from before the counter's wraparound */
	return U64FromFullTransactionId(FullTransactionIdFromEpochAndXid(epoch, xid));
}

static QueueSeen *
seen_now(MemoryContext context)
{
	Snapshot	snapshot = GetActiveSnapshot();
	QueueSeen  *seen = MemoryContextAlloc(context, offsetof(QueueSeen, open) +
										  snapshot->xcnt * sizeof(uint64));

	seen->end = widen(snapshot->xmax);
	seen->nopen = snapshot->xcnt;
	for (uint32 i = 0; i < snapshot->xcnt; i++)
		seen->open[i] = widen(snapshot->xip[i]);
	/* one that is being prepared is there twice */
	qsort(seen->open, seen->nopen, sizeof(uint64), compare_xids);
	seen->nopen = qunique(seen->open, seen->nopen, sizeof(uint64), compare_xids);
	return seen;
}

bool
queue_look(const char *server, QueueSeen **seen, MemoryContext context, int limit,
		   QueueRowHandler handler, void *arg)
{
	Look		look = {0};

	look.rel = table_open(sql_relid("userpilot_queue"), AccessShareLock);
	queue_check_shape(look.rel);
	look.index = look_index(look.rel);
	look.since = *seen;
	look.server = server;
	look.server_len = strlen(server);
	look.slot = MakeSingleTupleTableSlot(RelationGetDescr(look.rel), &TTSOpsHeapTuple);
	look.per_row = AllocSetContextCreate(CurrentMemoryContext, "userpilot look row",
										 ALLOCSET_SMALL_SIZES);
	look.left = limit;
	look.handler = handler;
	look.arg = arg;
	if (look.since == NULL || !OidIsValid(look.index))
		look_scan(&look, BTGreaterEqualStrategyNumber, F_XID8GE, 0);
	else
	{
		for (int i = 0; i < look.since->nopen; i++)
			look_scan(&look, BTEqualStrategyNumber, F_XID8EQ, look.since->open[i]);
		look_scan(&look, BTGreaterEqualStrategyNumber, F_XID8GE, look.since->end);
	}
	MemoryContextDelete(look.per_row);
	ExecDropSingleTupleTableSlot(look.slot);
	table_close(look.rel, NoLock);

	if (*seen)
		pfree(*seen);
	*seen = seen_now(context);
	return look.left > 0;
}
