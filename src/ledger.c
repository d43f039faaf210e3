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

#include "catalog/pg_type.h"
#include "utils/builtins.h"

#include "ledger.h"
#include "settings.h"
#include "sql.h"

void
ledger_calls(const char *server, int n)
{
	static SqlStatement statement = SQL_STATEMENT(
		"INSERT INTO @.userpilot_recent_calls (server, at, calls)"
		" VALUES ($1, pg_catalog.clock_timestamp(), $2)", 2, {TEXTOID, INT4OID});
	Datum		args[2] = {CStringGetTextDatum(server), Int32GetDatum(n)};

	(void) sql_execute(&statement, args, NULL, false);
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
	static SqlStatement statement = SQL_STATEMENT(
		"SELECT pg_catalog.sum(calls)::bigint FROM @.userpilot_recent_calls WHERE server = $1"
		" AND at > pg_catalog.clock_timestamp() - pg_catalog.make_interval(secs => $2)",
		2, {TEXTOID, FLOAT8OID});
	Datum		args[2] = {CStringGetTextDatum(server), Float8GetDatum(window(delay_ms))};

	(void) sql_execute(&statement, args, NULL, true);
	return (int) sql_int64(1, 0);
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

int
ledger_starts(int64 *since_ms)
{
	static SqlStatement statement = SQL_STATEMENT(
		"SELECT starts::bigint,"
		" (extract(epoch FROM pg_catalog.clock_timestamp() - at) * 1000)::bigint"
		" FROM @.userpilot_worker_starts", 0, {0});

	(void) sql_execute(&statement, NULL, NULL, true);
	*since_ms = sql_int64(2, 0);
	return (int) sql_int64(1, 0);
}

void
ledger_start(void)
{
	static SqlStatement statement = SQL_STATEMENT(
		"INSERT INTO @.userpilot_worker_starts AS w (only_row, starts, at)"
		" VALUES (true, 1, pg_catalog.clock_timestamp())"
		" ON CONFLICT (only_row) DO UPDATE SET starts = w.starts + 1, at = excluded.at",
		0, {0});

	(void) sql_execute(&statement, NULL, NULL, false);
}

void
ledger_progress(void)
{
	static SqlStatement statement = SQL_STATEMENT(
		"UPDATE @.userpilot_worker_starts SET starts = 0 WHERE starts > 0", 0, {0});

	(void) sql_execute(&statement, NULL, NULL, false);
}
