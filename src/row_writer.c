/*
 * row_writer.c
 *	  Rows of the extension's tables, written without a statement.
 */
#include "postgres.h"

#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "commands/trigger.h"
#include "utils/rel.h"

#include "compat.h"
#include "row_writer.h"

void
row_writer_open(RowWriter *writer, const char *table, const SqlColumn *columns, int n)
{
	writer->rel = table_open(sql_relid(table), RowExclusiveLock);
	sql_check_columns(writer->rel, columns, n);
	writer->estate = CreateExecutorState();
	writer->estate->es_output_cid = GetCurrentCommandId(true);
	writer->rri = makeNode(ResultRelInfo);
	InitResultRelInfo(writer->rri, writer->rel, 0, NULL, 0);
	ExecOpenIndices(writer->rri, false);
	compat_eval_plan_qual_init(&writer->epq, writer->estate);
	AfterTriggerBeginQuery();
	writer->row = MakeSingleTupleTableSlot(RelationGetDescr(writer->rel), &TTSOpsVirtual);
	writer->stored = table_slot_create(writer->rel, NULL);
}

void
row_writer_close(RowWriter *writer)
{
	AfterTriggerEndQuery(writer->estate);
	EvalPlanQualEnd(&writer->epq);
	/* what triggers opened */
	ExecCloseResultRelations(writer->estate);
	ExecResetTupleTable(writer->estate->es_tupleTable, false);
	ExecDropSingleTupleTableSlot(writer->row);
	ExecDropSingleTupleTableSlot(writer->stored);
	ExecCloseIndices(writer->rri);
	table_close(writer->rel, NoLock);
	FreeExecutorState(writer->estate);
	/* what is written next may be the same rows */
	CommandCounterIncrement();
}

void
row_begin(RowWriter *writer)
{
	ExecClearTuple(writer->row);
	memset(writer->row->tts_isnull, true,
		   writer->row->tts_tupleDescriptor->natts * sizeof(bool));
}

void
row_set(RowWriter *writer, int column, Datum value)
{
	writer->row->tts_values[column] = value;
	writer->row->tts_isnull[column] = false;
}

void
row_keep(RowWriter *writer, int column)
{
	TupleTableSlot *stored = writer->stored;

	if (TTS_EMPTY(stored) || stored->tts_isnull[column])
		return;
	row_set(writer, column, stored->tts_values[column]);
}

static void
write_row(RowWriter *writer, bool update)
{
	MemoryContext old;

	ExecStoreVirtualTuple(writer->row);
	/* triggers keep things there from row to row */
	old = MemoryContextSwitchTo(writer->estate->es_query_cxt);
	if (update)
		ExecSimpleRelationUpdate(writer->rri, writer->estate, &writer->epq, writer->stored,
								 writer->row);
	else
		ExecSimpleRelationInsert(writer->rri, writer->estate, writer->row);
	MemoryContextSwitchTo(old);
	ExecClearTuple(writer->row);
	ExecClearTuple(writer->stored);
	ResetPerTupleExprContext(writer->estate);
}

void
row_insert(RowWriter *writer)
{
	write_row(writer, false);
}

void
row_update(RowWriter *writer)
{
	write_row(writer, true);
}
