/*
 * ledger.c
 *	  What must outlive shared memory.
 *
 * A worker that is killed takes the cluster's shared memory with it.  The
 * limit of calls a minute must hold all the same, so each wave notes with its
 * mark how many calls follow.  And a worker that crashes whenever it starts
 * restarts everyone's server each time, so starts are counted here until one
 * gets somewhere.
 */
#include "postgres.h"

#include "access/table.h"
#include "access/tableam.h"
#include "catalog/pg_type.h"
#include "utils/builtins.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#include "ledger.h"
#include "row_writer.h"
#include "settings.h"

/* ---------------------------------------------------------------- calls */

enum
{
	CALLS_SERVER,
	CALLS_AT,
	CALLS_CALLS,
	CALLS_NCOLUMNS
};

static const SqlColumn calls_columns[CALLS_NCOLUMNS] = {
	{"server", TEXTOID}, {"at", TIMESTAMPTZOID}, {"calls", INT4OID}
};

void
ledger_calls(const char *server, int n)
{
	RowWriter	writer;

	row_writer_open(&writer, "userpilot_recent_calls", calls_columns, CALLS_NCOLUMNS);
	row_begin(&writer);
	row_set(&writer, CALLS_SERVER, CStringGetTextDatum(server));
	row_set(&writer, CALLS_AT, TimestampTzGetDatum(GetCurrentTimestamp()));
	row_set(&writer, CALLS_CALLS, Int32GetDatum(n));
	row_insert(&writer);
	row_writer_close(&writer);
}

/* A minute, and how long a mark can have waited, in real seconds */
static double
window(int64 delay_ms)
{
	return (60 + delay_ms / 1000.0) / userpilot_time_scale;
}

int
ledger_recent_calls(const char *server, int64 delay_ms)
{
	TimestampTz since = GetCurrentTimestamp() - (TimestampTz) (window(delay_ms) * USECS_PER_SEC);
	int64		calls = 0;
	Relation	rel = table_open(sql_relid("userpilot_recent_calls"), AccessShareLock);
	TupleTableSlot *slot = table_slot_create(rel, NULL);
	TableScanDesc scan = table_beginscan(rel, GetActiveSnapshot(), 0, NULL);

	sql_check_columns(rel, calls_columns, CALLS_NCOLUMNS);
	while (table_scan_getnextslot(scan, ForwardScanDirection, slot))
	{
		slot_getallattrs(slot);
		if (DatumGetTimestampTz(slot->tts_values[CALLS_AT]) > since &&
			strcmp(TextDatumGetCString(slot->tts_values[CALLS_SERVER]), server) == 0)
			calls += DatumGetInt32(slot->tts_values[CALLS_CALLS]);
	}
	table_endscan(scan);
	ExecDropSingleTupleTableSlot(slot);
	table_close(rel, NoLock);
	return (int) Min(calls, PG_INT32_MAX);
}

void
ledger_prune(const char *server, int64 delay_ms)
{
	static SqlStatement statement = SQL_STATEMENT(
		"DELETE FROM @.userpilot_recent_calls WHERE server = $1"
		" AND at < pg_catalog.clock_timestamp() - pg_catalog.make_interval(secs => $2)",
		2, {TEXTOID, FLOAT8OID});
	Datum		args[2] = {CStringGetTextDatum(server), Float8GetDatum(window(delay_ms))};

	(void) sql_execute(&statement, args, NULL, false);
}

/* --------------------------------------------------------------- starts */

enum
{
	STARTS_ONLY_ROW,
	STARTS_STARTS,
	STARTS_AT,
	STARTS_NCOLUMNS
};

static const SqlColumn starts_columns[STARTS_NCOLUMNS] = {
	{"only_row", BOOLOID}, {"starts", INT4OID}, {"at", TIMESTAMPTZOID}
};

/* Opens the table; returns whether its row is there, as "stored" */
static bool
open_starts(RowWriter *writer)
{
	TableScanDesc scan;
	bool		found;

	row_writer_open(writer, "userpilot_worker_starts", starts_columns, STARTS_NCOLUMNS);
	scan = table_beginscan(writer->rel, GetActiveSnapshot(), 0, NULL);
	found = table_scan_getnextslot(scan, ForwardScanDirection, writer->stored);
	if (found)
	{
		ExecMaterializeSlot(writer->stored);
		slot_getallattrs(writer->stored);
	}
	table_endscan(scan);
	return found;
}

static void
write_starts(RowWriter *writer, bool found, int starts, TimestampTz at)
{
	row_begin(writer);
	row_set(writer, STARTS_ONLY_ROW, BoolGetDatum(true));
	row_set(writer, STARTS_STARTS, Int32GetDatum(starts));
	row_set(writer, STARTS_AT, TimestampTzGetDatum(at));
	if (found)
		row_update(writer);
	else
		row_insert(writer);
}

int
ledger_starts(int64 *since_ms)
{
	RowWriter	writer;
	Datum	   *stored;
	int			starts = 0;

	*since_ms = 0;
	if (open_starts(&writer))
	{
		stored = writer.stored->tts_values;
		starts = DatumGetInt32(stored[STARTS_STARTS]);
		*since_ms = (GetCurrentTimestamp() - DatumGetTimestampTz(stored[STARTS_AT])) / 1000;
	}
	row_writer_close(&writer);
	return starts;
}

void
ledger_start(void)
{
	RowWriter	writer;
	bool		found = open_starts(&writer);
	int			before = found ? DatumGetInt32(writer.stored->tts_values[STARTS_STARTS]) : 0;

	write_starts(&writer, found, before + 1, GetCurrentTimestamp());
	row_writer_close(&writer);
}

void
ledger_progress(void)
{
	RowWriter	writer;

	if (open_starts(&writer) && DatumGetInt32(writer.stored->tts_values[STARTS_STARTS]) > 0)
		write_starts(&writer, true, 0, DatumGetTimestampTz(writer.stored->tts_values[STARTS_AT]));
	row_writer_close(&writer);
}
