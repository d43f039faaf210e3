/*
 * history.c
 *	  What people read afterwards: userpilot_requests and userpilot_progress;
 *	  and how long that, jobs and bulk SELECTs are kept.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "history.h"
#include "settings.h"
#include "sql.h"

static Datum
text_or_null(const char *str, char *null)
{
	*null = str == NULL || str[0] == '\0' ? 'n' : ' ';
	return *null == ' ' ? CStringGetTextDatum(str) : (Datum) 0;
}

void
history_call(const HistoryCall *call, const HttpResult *result)
{
	static SqlStatement statement = SQL_STATEMENT(
		"INSERT INTO @.userpilot_requests (at, server, method, path, job, kind, entity_id,"
		" http_status, outcome, request_id, ms, bytes, error)"
		" VALUES (pg_catalog.clock_timestamp(), $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)",
		12, {TEXTOID, TEXTOID, TEXTOID, INT8OID, TEXTOID, TEXTOID, INT4OID, TEXTOID, TEXTOID,
			FLOAT8OID, INT8OID, TEXTOID});
	bool		good = result->outcome == HTTP_ANSWERED && result->status / 100 == 2;
	char		nulls[13] = "            ";
	Datum		args[12];

	if (userpilot_log_requests == LOG_REQUESTS_OFF ||
		(userpilot_log_requests == LOG_REQUESTS_ERRORS && good))
		return;

	args[0] = CStringGetTextDatum(call->server);
	args[1] = CStringGetTextDatum(call->method);
	args[2] = CStringGetTextDatum(call->path);
	args[3] = Int64GetDatum(call->job);
	nulls[3] = call->job == 0 ? 'n' : ' ';
	args[4] = text_or_null(call->entity_id ? userpilot_kind_name(call->kind) : NULL, &nulls[4]);
	args[5] = (Datum) 0;
	if (call->entity_id)
		args[5] = PointerGetDatum(cstring_to_text_with_len(call->entity_id, call->entity_len));
	nulls[5] = call->entity_id ? ' ' : 'n';
	args[6] = Int32GetDatum(result->status);
	nulls[6] = result->status == 0 ? 'n' : ' ';
	args[7] = CStringGetTextDatum(call->outcome);
	args[8] = text_or_null(result->request_id, &nulls[8]);
	args[9] = Float8GetDatum(result->ms);
	args[10] = Int64GetDatum(result->bytes_sent);
	args[11] = text_or_null(call->error, &nulls[11]);
	(void) sql_execute(&statement, args, nulls, false);
}

static void
prune_by(SqlStatement *by_age, SqlStatement *by_count)
{
	Datum		args[1];

	args[0] = Int32GetDatum(userpilot_retention);
	(void) sql_execute(by_age, args, NULL, false);
	args[0] = Int32GetDatum(userpilot_retention_rows);
	(void) sql_execute(by_count, args, NULL, false);
}

void
history_prune(void)
{
	static SqlStatement requests_age = SQL_STATEMENT(
		"DELETE FROM @.userpilot_requests"
		" WHERE at < pg_catalog.now() - pg_catalog.make_interval(mins => $1)", 1, {INT4OID});
	static SqlStatement requests_count = SQL_STATEMENT(
		"DELETE FROM @.userpilot_requests WHERE id <= (SELECT id FROM @.userpilot_requests"
		" ORDER BY id DESC OFFSET $1 LIMIT 1)", 1, {INT4OID});
	static SqlStatement jobs_age = SQL_STATEMENT(
		"DELETE FROM @.userpilot_jobs j WHERE finished_at < pg_catalog.now() - pg_catalog.make_interval(mins => $1)"
		" AND NOT EXISTS (SELECT FROM @.userpilot_job_chunks c WHERE c.job = j.id)", 1, {INT4OID});
	static SqlStatement jobs_count = SQL_STATEMENT(
		"DELETE FROM @.userpilot_jobs j WHERE id <= (SELECT id FROM @.userpilot_jobs"
		" ORDER BY id DESC OFFSET $1 LIMIT 1) AND finished_at IS NOT NULL"
		" AND NOT EXISTS (SELECT FROM @.userpilot_job_chunks c WHERE c.job = j.id)", 1, {INT4OID});

	/* a record is needed as long as a row may refer to it */
	static SqlStatement batches = SQL_STATEMENT(
		"DELETE FROM @.userpilot_batches b WHERE started_at < pg_catalog.now() - pg_catalog.make_interval(mins => $1)"
		" AND NOT EXISTS (SELECT FROM @.userpilot_queue)"
		" AND NOT EXISTS (SELECT FROM @.userpilot_dead_letters d WHERE d.batch = b.id)", 1, {INT4OID});
	Datum		args[1] = {Int32GetDatum(userpilot_retention)};

	(void) sql_execute(&batches, args, NULL, false);
	prune_by(&requests_age, &requests_count);
	prune_by(&jobs_age, &jobs_count);
}

void
history_progress(const char *server, const HistoryProgress *p)
{
	static SqlStatement statement = SQL_STATEMENT(
		"INSERT INTO @.userpilot_progress AS p (server, state, companies_realtime, companies_bulk,"
		" users_realtime, users_bulk, oldest_pending, delivered, delivering_since, records_per_minute,"
		" advice, last_error, last_error_at, updated_at)"
		" VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12,"
		"  CASE WHEN $12 IS NOT NULL THEN pg_catalog.clock_timestamp() END, pg_catalog.clock_timestamp())"
		" ON CONFLICT (server) DO UPDATE SET state = excluded.state,"
		" companies_realtime = excluded.companies_realtime, companies_bulk = excluded.companies_bulk,"
		" users_realtime = excluded.users_realtime, users_bulk = excluded.users_bulk,"
		" oldest_pending = excluded.oldest_pending, delivered = excluded.delivered,"
		" delivering_since = excluded.delivering_since, records_per_minute = excluded.records_per_minute,"
		" advice = excluded.advice, last_error = coalesce(excluded.last_error, p.last_error),"
		" last_error_at = coalesce(excluded.last_error_at, p.last_error_at), updated_at = excluded.updated_at",
		12, {TEXTOID, TEXTOID, INT8OID, INT8OID, INT8OID, INT8OID, TIMESTAMPTZOID, INT8OID,
			TIMESTAMPTZOID, FLOAT8OID, TEXTOID, TEXTOID});
	char		nulls[13] = "            ";
	Datum		args[12];

	args[0] = CStringGetTextDatum(server);
	args[1] = CStringGetTextDatum(p->state);
	args[2] = Int64GetDatum(p->rows[USERPILOT_COMPANY][0]);
	args[3] = Int64GetDatum(p->rows[USERPILOT_COMPANY][1]);
	args[4] = Int64GetDatum(p->rows[USERPILOT_USER][0]);
	args[5] = Int64GetDatum(p->rows[USERPILOT_USER][1]);
	args[6] = TimestampTzGetDatum(p->oldest);
	nulls[6] = p->oldest == 0 ? 'n' : ' ';
	args[7] = Int64GetDatum(p->delivered);
	args[8] = TimestampTzGetDatum(p->since);
	nulls[8] = p->since == 0 ? 'n' : ' ';
	args[9] = Float8GetDatum(p->per_minute);
	nulls[9] = p->per_minute <= 0 ? 'n' : ' ';
	args[10] = text_or_null(p->advice, &nulls[10]);
	args[11] = text_or_null(p->last_error, &nulls[11]);
	(void) sql_execute(&statement, args, nulls, false);
}
