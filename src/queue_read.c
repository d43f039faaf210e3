/*
 * queue_read.c
 *	  The worker's side of the queue: sweep, delete, bury.
 *
 * All but queue_pending_before() runs inside one of the worker's short
 * transactions, with SPI connected and a snapshot pushed.
 */
#include "postgres.h"

#include "access/relation.h"
#include "access/table.h"
#include "access/tableam.h"
#include "access/twophase.h"
#include "access/xact.h"
#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "storage/bufmgr.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/pg_lsn.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"
#include "utils/xid8.h"

#include "compat.h"
#include "payload.h"
#include "queue.h"
#include "queue_table.h"
#include "sql.h"

/* Properties of a row that are merged at once */
#define FOLD_PROPERTIES 100

static UserpilotKind
kind_of(const char *str, int len)
{
	return len == 7 && memcmp(str, "company", 7) == 0 ? USERPILOT_COMPANY : USERPILOT_USER;
}

/* ----------------------------------------------------------------- rows */

static void
read_slot_row(TupleTableSlot *slot, QueueRow *row)
{
	struct varlena *text;

	row->tid = slot->tts_tid;
	row->lsn = DatumGetLSN(slot->tts_values[QUEUE_LSN]);
	row->xid = U64FromFullTransactionId(DatumGetFullTransactionId(slot->tts_values[QUEUE_XID]));
	row->enqueued_at = DatumGetTimestampTz(slot->tts_values[QUEUE_AT]);
	row->batch = slot->tts_isnull[QUEUE_BATCH] ? 0 : DatumGetInt64(slot->tts_values[QUEUE_BATCH]);
	row->bulk = DatumGetBool(slot->tts_values[QUEUE_BULK]);
	text = (struct varlena *) DatumGetPointer(slot->tts_values[QUEUE_KIND]);
	row->kind = kind_of(VARDATA_ANY(text), VARSIZE_ANY_EXHDR(text));
	text = PG_DETOAST_DATUM_PACKED(slot->tts_values[QUEUE_ENTITY]);
	row->entity_id = VARDATA_ANY(text);
	row->entity_len = VARSIZE_ANY_EXHDR(text);
	row->company_id = NULL;
	row->company_len = 0;
	if (!slot->tts_isnull[QUEUE_COMPANY])
	{
		text = PG_DETOAST_DATUM_PACKED(slot->tts_values[QUEUE_COMPANY]);
		row->company_id = VARDATA_ANY(text);
		row->company_len = VARSIZE_ANY_EXHDR(text);
	}
	row->metadata = (Jsonb *) DatumGetPointer(slot->tts_values[QUEUE_METADATA]);
}

static bool
is_server(TupleTableSlot *slot, const char *server, int len)
{
	struct varlena *text = PG_DETOAST_DATUM_PACKED(slot->tts_values[QUEUE_SERVER]);

	return VARSIZE_ANY_EXHDR(text) == (Size) len && memcmp(VARDATA_ANY(text), server, len) == 0;
}

bool
queue_handle_slot(TupleTableSlot *slot, const char *server, int server_len,
				  MemoryContext per_row, QueueRowHandler handler, void *arg)
{
	MemoryContext old = MemoryContextSwitchTo(per_row);
	QueueRow	row;
	bool		ours;

	slot_getallattrs(slot);
	ours = is_server(slot, server, server_len);
	if (ours)
	{
		read_slot_row(slot, &row);
		MemoryContextSwitchTo(old);
		handler(&row, arg);
	}
	MemoryContextSwitchTo(old);
	MemoryContextReset(per_row);
	return ours;
}

/* ------------------------------------------------------------ the sweep */

/*
 * Rows of blocks [from, to); nblocks is all of them, which are read as a
 * sequential scan does, without taking the buffers of everybody else.
 */
static void
sweep_range(Relation rel, BlockNumber from, BlockNumber to, BlockNumber nblocks,
			const char *server, QueueRowHandler handler, void *arg)
{
	bool		whole = from == 0 && to == nblocks;
	ItemPointerData first;
	ItemPointerData last;
	TableScanDesc scan;
	TupleTableSlot *slot = table_slot_create(rel, NULL);
	MemoryContext per_row = AllocSetContextCreate(CurrentMemoryContext,
												  "userpilot sweep row",
												  ALLOCSET_SMALL_SIZES);
	int			server_len = strlen(server);

	ItemPointerSet(&first, from, 0);
	ItemPointerSet(&last, to, 0);
	scan = whole ? table_beginscan_strat(rel, GetActiveSnapshot(), 0, NULL, true, false) :
		table_beginscan_tidrange(rel, GetActiveSnapshot(), &first, &last);
	while (whole ? table_scan_getnextslot(scan, ForwardScanDirection, slot) :
		   table_scan_getnextslot_tidrange(scan, ForwardScanDirection, slot))
	{
		CHECK_FOR_INTERRUPTS();
		(void) queue_handle_slot(slot, server, server_len, per_row, handler, arg);
	}
	table_endscan(scan);
	ExecDropSingleTupleTableSlot(slot);
	MemoryContextDelete(per_row);
}

void
queue_sweep(const char *server, BlockNumber start, QueueRowHandler handler, void *arg)
{
	Relation	rel = table_open(sql_relid("userpilot_queue"), AccessShareLock);
	BlockNumber nblocks = RelationGetNumberOfBlocks(rel);

	queue_check_shape(rel);
	if (start >= nblocks)
		start = 0;
	sweep_range(rel, start, nblocks, nblocks, server, handler, arg);
	if (start > 0)
		sweep_range(rel, 0, start, nblocks, server, handler, arg);
	table_close(rel, NoLock);
}

QueueView
queue_view(void)
{
	Relation	rel = table_open(sql_relid("userpilot_queue"), AccessShareLock);
	QueueView	view;

	view.snapshot = OidFunctionCall0(F_PG_CURRENT_SNAPSHOT);
	view.file = rel->rd_rel->relfilenode;
	table_close(rel, NoLock);
	return view;
}

bool
queue_view_stands(const QueueView *view)
{
	Relation	rel = table_open(sql_relid("userpilot_queue"), AccessShareLock);
	bool		stands = rel->rd_rel->relfilenode == view->file;

	table_close(rel, NoLock);
	return stands;
}

static bool
seen_in(const QueueView *view, TupleTableSlot *slot)
{
	slot_getallattrs(slot);
	return DatumGetBool(OidFunctionCall2(F_PG_VISIBLE_IN_SNAPSHOT,
										 slot->tts_values[QUEUE_XID], view->snapshot));
}

void
queue_visit(const char *server, const QueueView *view, const ItemPointerData *tids, int n,
			QueueRowHandler handler, void *arg)
{
	Relation	rel = table_open(sql_relid("userpilot_queue"), AccessShareLock);
	TupleTableSlot *slot = table_slot_create(rel, NULL);
	MemoryContext per_row = AllocSetContextCreate(CurrentMemoryContext,
												  "userpilot sweep row",
												  ALLOCSET_SMALL_SIZES);
	BlockNumber nblocks = RelationGetNumberOfBlocks(rel);
	int			server_len = strlen(server);

	queue_check_shape(rel);
	for (int i = 0; i < n; i++)
	{
		CHECK_FOR_INTERRUPTS();
		if (ItemPointerGetBlockNumber(&tids[i]) >= nblocks ||
			!table_tuple_fetch_row_version(rel, unconstify(ItemPointerData *, &tids[i]),
										   GetActiveSnapshot(), slot))
			continue;
		if (seen_in(view, slot))
			(void) queue_handle_slot(slot, server, server_len, per_row, handler, arg);
		ExecClearTuple(slot);
	}
	ExecDropSingleTupleTableSlot(slot);
	MemoryContextDelete(per_row);
	table_close(rel, NoLock);
}

/* A copy in CurrentMemoryContext that outlives the scan */
QueueRow *
queue_row_copy(const QueueRow *row)
{
	QueueRow   *copy = palloc(sizeof(QueueRow));

	*copy = *row;
	copy->entity_id = pnstrdup(row->entity_id, row->entity_len);
	if (row->company_id)
		copy->company_id = pnstrdup(row->company_id, row->company_len);
	copy->metadata = (Jsonb *) PG_DETOAST_DATUM_COPY(PointerGetDatum(row->metadata));
	return copy;
}

void
queue_row_free(QueueRow *row)
{
	pfree((char *) row->entity_id);
	if (row->company_id)
		pfree((char *) row->company_id);
	pfree(row->metadata);
	pfree(row);
}

/* ------------------------------------------------------- into the merge */

static uint64 *
read_xids(Datum array, int *n)
{
	Datum	   *elements;
	uint64	   *xids;

	deconstruct_array(DatumGetArrayTypeP(array), XID8OID, 8, FLOAT8PASSBYVAL,
					  TYPALIGN_DOUBLE, &elements, NULL, n);
	xids = palloc(Max(*n, 1) * sizeof(uint64));
	for (int i = 0; i < *n; i++)
		xids[i] = U64FromFullTransactionId(DatumGetFullTransactionId(elements[i]));
	return xids;
}

void
queue_batches(const char *server, MergeBatches *batches)
{
	static SqlStatement statement = SQL_STATEMENT(
		"SELECT id, lsn, xid, pg_catalog.pg_snapshot_xmin(snapshot), pg_catalog.pg_snapshot_xmax(snapshot),"
		" ARRAY(SELECT x FROM pg_catalog.pg_snapshot_xip(snapshot) x ORDER BY x)"
		" FROM @.userpilot_batches WHERE server = $1 ORDER BY id", 1, {TEXTOID});
	Datum		args[1] = {CStringGetTextDatum(server)};
	MergeBatch *list;
	int			n = 0;

	if (sql_index_has_rows("userpilot_batches", "userpilot_batches_pkey"))
		n = sql_execute(&statement, args, NULL, true);
	list = palloc0(Max(n, 1) * sizeof(MergeBatch));
	for (int i = 0; i < n; i++)
	{
		HeapTuple	tuple = SPI_tuptable->vals[i];
		TupleDesc	desc = SPI_tuptable->tupdesc;
		bool		isnull;
		Datum		xips = SPI_getbinval(tuple, desc, 6, &isnull);

		list[i].id = DatumGetInt64(SPI_getbinval(tuple, desc, 1, &isnull));
		list[i].lsn = DatumGetLSN(SPI_getbinval(tuple, desc, 2, &isnull));
		list[i].xid = U64FromFullTransactionId(DatumGetFullTransactionId(SPI_getbinval(tuple, desc, 3, &isnull)));
		list[i].xmin = U64FromFullTransactionId(DatumGetFullTransactionId(SPI_getbinval(tuple, desc, 4, &isnull)));
		list[i].xmax = U64FromFullTransactionId(DatumGetFullTransactionId(SPI_getbinval(tuple, desc, 5, &isnull)));
		list[i].xip = read_xids(xips, &list[i].nxip);
	}
	if (n > 0)
		SPI_freetuptable(SPI_tuptable);
	merge_batches_init(batches, list, n);
}

void
queue_batches_progress(const MergeBatches *batches, const int64 *pending, bool change)
{
	static SqlStatement statement = SQL_STATEMENT(
		"UPDATE @.userpilot_batches b SET pending = greatest(v.pending + CASE WHEN $3 THEN b.pending ELSE 0 END, 0)"
		" FROM unnest($1, $2) AS v(id, pending)"
		" WHERE b.id = v.id AND v.pending <> CASE WHEN $3 THEN 0 ELSE b.pending END",
		3, {INT8ARRAYOID, INT8ARRAYOID, BOOLOID});
	Datum	   *ids = palloc(Max(batches->n, 1) * sizeof(Datum));
	Datum	   *counts = palloc(Max(batches->n, 1) * sizeof(Datum));
	Datum		args[3];

	for (int i = 0; i < batches->n; i++)
	{
		ids[i] = Int64GetDatum(batches->batch[i].id);
		counts[i] = Int64GetDatum(pending[i]);
	}
	args[0] = PointerGetDatum(construct_array(ids, batches->n, INT8OID, 8, FLOAT8PASSBYVAL, TYPALIGN_DOUBLE));
	args[1] = PointerGetDatum(construct_array(counts, batches->n, INT8OID, 8, FLOAT8PASSBYVAL, TYPALIGN_DOUBLE));
	args[2] = BoolGetDatum(change);
	(void) sql_execute(&statement, args, NULL, false);
}

static void
fold(MergeEntity *entity, const QueueRow *row, const MergeBatch *batch,
	 const MergeProperty *props, int n)
{
	merge_change(entity, row->lsn, row->xid, batch, props, n);
	for (int i = 0; i < n; i++)
		if (props[i].value.type == MERGE_NUMBER)
			pfree((char *) props[i].value.data);
}

/*
 * A batch row whose bulk SELECT is not on record (its row was deleted by
 * hand) counts as a direct change at its position.
 */
void
queue_fold(MergeEntity *entity, const MergeBatches *batches, const Shape *shape,
		   const QueueRow *row)
{
	MergeProperty props[FOLD_PROPERTIES];
	Jsonb	   *metadata = DatumGetJsonbP(PointerGetDatum(row->metadata));
	JsonbIterator *it = JsonbIteratorInit(&metadata->root);
	const MergeBatch *batch = row->batch ? merge_batches_find(batches, row->batch) : NULL;
	JsonbValue	v;
	int			n = 0;

	if (row->company_id != NULL)
	{
		props[n].name = MERGE_COMPANY_KEY;
		props[n].namelen = 0;
		props[n].value.type = MERGE_STRING;
		props[n].value.data = row->company_id;
		props[n++].value.len = row->company_len;
	}
	(void) JsonbIteratorNext(&it, &v, false);
	while (JsonbIteratorNext(&it, &v, true) == WJB_KEY)
	{
		props[n].name = v.val.string.val;
		props[n].namelen = v.val.string.len;
		(void) JsonbIteratorNext(&it, &v, true);
		/* the company's key has no name; a property put there by hand is not it */
		if (props[n].namelen == 0 || !payload_to_merge(&v, &props[n].value) ||
			shape_excludes(shape, props[n].name, props[n].namelen))
			continue;
		if (props[n].value.type == MERGE_NUMBER)
			payload_trim_number(&props[n].value);
		if (++n == FOLD_PROPERTIES)
		{
			fold(entity, row, batch, props, n);
			n = 0;
		}
	}
	fold(entity, row, batch, props, n);
	if (metadata != row->metadata)
		pfree(metadata);
}

/* ------------------------------------------------------ rows that leave */

/*
 * Whether the row that was read still stands at its position: rows may have
 * been moved by a rewrite of the table, and the position used again.
 */
static bool
still_there(Relation rel, const QueueRow *row, TupleTableSlot *slot)
{
	struct varlena *id;

	if (ItemPointerGetBlockNumber(&row->tid) >= RelationGetNumberOfBlocks(rel) ||
		!table_tuple_fetch_row_version(rel, (ItemPointer) &row->tid, GetActiveSnapshot(), slot))
		return false;
	slot_getallattrs(slot);
	id = PG_DETOAST_DATUM_PACKED(slot->tts_values[QUEUE_ENTITY]);
	return DatumGetLSN(slot->tts_values[QUEUE_LSN]) == row->lsn &&
		VARSIZE_ANY_EXHDR(id) == (Size) row->entity_len &&
		memcmp(VARDATA_ANY(id), row->entity_id, row->entity_len) == 0;
}

bool
queue_stands(QueueRow **rows, int n)
{
	Relation	rel = table_open(sql_relid("userpilot_queue"), AccessShareLock);
	TupleTableSlot *slot = table_slot_create(rel, NULL);
	bool		all = true;

	queue_check_shape(rel);
	for (int i = 0; all && i < n; i++)
	{
		all = still_there(rel, rows[i], slot);
		ExecClearTuple(slot);
	}
	ExecDropSingleTupleTableSlot(slot);
	table_close(rel, NoLock);
	return all;
}

/* A row that someone else deleted first is as good as deleted */
uint64
queue_delete(const QueueRow *rows, int n)
{
	Relation	rel;
	TupleTableSlot *slot;
	uint64		deleted = 0;

	if (n == 0)
		return 0;
	rel = table_open(sql_relid("userpilot_queue"), RowExclusiveLock);
	queue_check_shape(rel);
	slot = table_slot_create(rel, NULL);
	for (int i = 0; i < n; i++)
	{
		TM_FailureData failure;

		CHECK_FOR_INTERRUPTS();
		if (still_there(rel, &rows[i], slot) &&
			table_tuple_delete(rel, (ItemPointer) &rows[i].tid, GetCurrentCommandId(true),
							   GetActiveSnapshot(), InvalidSnapshot, true, &failure,
							   false) == TM_Ok)
			deleted++;
		ExecClearTuple(slot);
	}
	ExecDropSingleTupleTableSlot(slot);
	table_close(rel, NoLock);
	/* a further pass of this transaction must not meet them again */
	CommandCounterIncrement();
	UpdateActiveSnapshotCommandId();
	return deleted;
}

/* Positions of the rows that still stand there; the lock taken here keeps
 * the table from being rewritten until the transaction ends */
static Datum
positions(const QueueRow *rows, int n)
{
	Relation	rel = table_open(sql_relid("userpilot_queue"), RowExclusiveLock);
	TupleTableSlot *slot = table_slot_create(rel, NULL);
	Datum	   *tids = palloc(Max(n, 1) * sizeof(Datum));
	int			found = 0;

	queue_check_shape(rel);
	for (int i = 0; i < n; i++)
	{
		if (still_there(rel, &rows[i], slot))
			tids[found++] = PointerGetDatum(&rows[i].tid);
		ExecClearTuple(slot);
	}
	ExecDropSingleTupleTableSlot(slot);
	table_close(rel, NoLock);
	return PointerGetDatum(construct_array(tids, found, TIDOID, sizeof(ItemPointerData), false, TYPALIGN_SHORT));
}

uint64
queue_bury(const QueueRow *rows, int n, const QueueFailure *why)
{
	static SqlStatement statement = SQL_STATEMENT(
		"WITH gone AS (DELETE FROM @.userpilot_queue q WHERE q.ctid = ANY ($1) RETURNING q.*)"
		" INSERT INTO @.userpilot_dead_letters (lsn, xid, enqueued_at, batch, bulk, server, kind,"
		" entity_id, company_id, metadata, http_status, error, response, attempts)"
		" SELECT lsn, xid, enqueued_at, batch, bulk, server, kind,"
		" entity_id, company_id, metadata, $2, $3, $4, $5 FROM gone ORDER BY lsn",
		5, {TIDARRAYOID, INT4OID, TEXTOID, TEXTOID, INT4OID});
	Datum		args[5];
	char		nulls[6] = "     ";

	args[0] = positions(rows, n);
	args[1] = Int32GetDatum(why->http_status);
	nulls[1] = why->http_status == 0 ? 'n' : ' ';
	args[2] = CStringGetTextDatum(why->error);
	nulls[3] = why->response == NULL ? 'n' : ' ';
	args[3] = why->response ? CStringGetTextDatum(why->response) : (Datum) 0;
	args[4] = Int32GetDatum(why->attempts);
	return sql_execute(&statement, args, nulls, false);
}

bool
queue_has_rows(const char *server, bool bulk_only)
{
	static SqlStatement statement = SQL_STATEMENT(
		"SELECT FROM @.userpilot_queue WHERE server = $1 AND (bulk OR NOT $2) LIMIT 1",
		2, {TEXTOID, BOOLOID});
	Datum		args[2] = {CStringGetTextDatum(server), BoolGetDatum(bulk_only)};

	return sql_execute(&statement, args, NULL, true) > 0;
}

/*
 * A prepared transaction keeps its locks but has no process.  Nobody tells
 * the worker when it is decided, so it has to keep looking.
 */
int64
queue_prepared(void)
{
	static SqlStatement statement = SQL_STATEMENT(
		"SELECT pg_catalog.hashtextextended(pg_catalog.string_agg(virtualtransaction, ' '"
		" ORDER BY virtualtransaction), 0)"
		" FROM pg_catalog.pg_locks WHERE pid IS NULL AND locktype = 'relation'"
		" AND relation = $1 AND mode = 'RowExclusiveLock' AND granted"
		" AND database = (SELECT oid FROM pg_catalog.pg_database"
		"  WHERE datname = pg_catalog.current_database())", 1, {OIDOID});
	Datum		args[1];

	if (max_prepared_xacts == 0)
		return 0;
	args[0] = ObjectIdGetDatum(sql_relid("userpilot_queue"));
	(void) sql_execute(&statement, args, NULL, true);
	return sql_int64(1, 0);
}

/* Run in people's sessions: operators are named in full */
bool
queue_pending_before(Datum snapshot)
{
	static SqlStatement statement = SQL_STATEMENT(
		"SELECT FROM @.userpilot_queue WHERE pg_catalog.pg_visible_in_snapshot(xid, $1) LIMIT 1",
		1, {PG_SNAPSHOTOID});
	Datum		args[1] = {snapshot};

	return sql_execute(&statement, args, NULL, false) > 0;
}
