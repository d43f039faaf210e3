/*
 * jobs.c
 *	  userpilot_jobs and the records of unfinished jobs.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "utils/builtins.h"
#include "utils/memutils.h"

#include "jobs.h"
#include "payload.h"
#include "sql.h"

static Datum
text_or_null(const char *str, char *null)
{
	*null = str == NULL ? 'n' : ' ';
	return str ? CStringGetTextDatum(str) : (Datum) 0;
}

/* That no other upload has, in CurrentMemoryContext; a body in JSON has none */
static char *
new_filename(const Job *job)
{
	Datum		uuid;

	if (!job->ndjson)
		return NULL;
	uuid = DirectFunctionCall1(gen_random_uuid, (Datum) 0);
	return psprintf("userpilot-%s.ndjson", DatumGetCString(DirectFunctionCall1(uuid_out, uuid)));
}

void
jobs_insert(const char *server, Job *job)
{
	static SqlStatement statement = SQL_STATEMENT(
		"INSERT INTO @.userpilot_jobs (server, kind, format, records, bytes, status)"
		" VALUES ($1, $2, 'json', 0, 0, '" JOB_PREPARED "') RETURNING id",
		2, {TEXTOID, TEXTOID});
	Datum		args[2] = {CStringGetTextDatum(server),
	CStringGetTextDatum(userpilot_kind_name(job->kind))};

	(void) sql_execute(&statement, args, NULL, false);
	job->id = sql_int64(1, 0);
	strlcpy(job->status, JOB_PREPARED, sizeof(job->status));
}

void
jobs_written(Job *job)
{
	static SqlStatement statement = SQL_STATEMENT(
		"UPDATE @.userpilot_jobs SET format = $2, records = $3, bytes = $4, filename = $5 WHERE id = $1",
		5, {INT8OID, TEXTOID, INT4OID, INT8OID, TEXTOID});
	Datum		args[5] = {Int64GetDatum(job->id),
		CStringGetTextDatum(job->ndjson ? "ndjson" : "json"),
	Int32GetDatum(job->records), Int64GetDatum(job->bytes)};
	char		nulls[6] = "     ";

	job->filename = new_filename(job);
	args[4] = text_or_null(job->filename, &nulls[4]);
	(void) sql_execute(&statement, args, nulls, false);
}

void
jobs_add_chunk(int64 job, int seq, const char *records, int len)
{
	static SqlStatement statement = SQL_STATEMENT(
		"INSERT INTO @.userpilot_job_chunks (job, seq, records) VALUES ($1, $2, $3)",
		3, {INT8OID, INT4OID, TEXTOID});
	text	   *value = cstring_to_text_with_len(records, len);
	Datum		args[3] = {Int64GetDatum(job), Int32GetDatum(seq), PointerGetDatum(value)};

	(void) sql_execute(&statement, args, NULL, false);
	pfree(value);
}

void
jobs_update(int64 job, const JobNews *news)
{
	static SqlStatement statement = SQL_STATEMENT(
		"UPDATE @.userpilot_jobs SET"
		" status = coalesce($2, status), job_id = coalesce($3, job_id),"
		" total_rows = coalesce($4, total_rows), completed_rows = coalesce($5, completed_rows),"
		" http_status = coalesce($6, http_status), request_id = coalesce($7, request_id),"
		" error = CASE WHEN $2 = '" JOB_COMPLETED "' THEN NULL ELSE coalesce($8, error) END,"
		" response = coalesce($9, response),"
		" submitted_at = CASE WHEN $10 THEN pg_catalog.clock_timestamp() ELSE submitted_at END,"
		" polled_at = CASE WHEN $11 THEN pg_catalog.clock_timestamp() ELSE polled_at END,"
		" finished_at = CASE WHEN $12 THEN pg_catalog.clock_timestamp() ELSE finished_at END"
		" WHERE id = $1",
		12, {INT8OID, TEXTOID, TEXTOID, INT8OID, INT8OID, INT4OID, TEXTOID, TEXTOID, TEXTOID,
			BOOLOID, BOOLOID, BOOLOID});
	char		nulls[13] = "            ";
	Datum		args[12];

	args[0] = Int64GetDatum(job);
	args[1] = text_or_null(news->status, &nulls[1]);
	args[2] = text_or_null(news->job_id, &nulls[2]);
	args[3] = Int64GetDatum(news->total_rows);
	nulls[3] = news->total_rows < 0 ? 'n' : ' ';
	args[4] = Int64GetDatum(news->completed_rows);
	nulls[4] = news->completed_rows < 0 ? 'n' : ' ';
	args[5] = Int32GetDatum(news->http_status);
	nulls[5] = news->http_status == 0 ? 'n' : ' ';
	args[6] = text_or_null(news->request_id, &nulls[6]);
	args[7] = text_or_null(news->error, &nulls[7]);
	args[8] = text_or_null(news->response, &nulls[8]);
	args[9] = BoolGetDatum(news->submitted);
	args[10] = BoolGetDatum(news->polled);
	args[11] = BoolGetDatum(news->finished);
	(void) sql_execute(&statement, args, nulls, false);
}

void
jobs_restart(Job *job, const char *error)
{
	static SqlStatement statement = SQL_STATEMENT(
		"UPDATE @.userpilot_jobs SET status = '" JOB_PREPARED "', error = $2, filename = $3,"
		" job_id = NULL, total_rows = NULL, completed_rows = NULL WHERE id = $1",
		3, {INT8OID, TEXTOID, TEXTOID});
	Datum		args[3];
	char		nulls[4] = "   ";

	strlcpy(job->status, JOB_PREPARED, sizeof(job->status));
	job->job_id = NULL;
	job->filename = new_filename(job);
	args[0] = Int64GetDatum(job->id);
	args[1] = CStringGetTextDatum(error);
	args[2] = text_or_null(job->filename, &nulls[2]);
	(void) sql_execute(&statement, args, nulls, false);
}

void
jobs_count_attempt(int64 job)
{
	static SqlStatement statement = SQL_STATEMENT(
		"UPDATE @.userpilot_jobs SET attempts = attempts + 1 WHERE id = $1", 1, {INT8OID});
	Datum		args[1] = {Int64GetDatum(job)};

	(void) sql_execute(&statement, args, NULL, false);
}

int
jobs_unfinished(const char *server, Job **jobs)
{
	static SqlStatement statement = SQL_STATEMENT(
		"SELECT id, kind = 'user', format = 'ndjson', records, bytes, status, job_id, filename,"
		" attempts, finished_at IS NOT NULL FROM @.userpilot_jobs j"
		" WHERE server = $1 AND (finished_at IS NULL"
		"  OR EXISTS (SELECT FROM @.userpilot_job_chunks c WHERE c.job = j.id)) ORDER BY id",
		1, {TEXTOID});
	Datum		args[1] = {CStringGetTextDatum(server)};
	int			n;

	*jobs = NULL;
	/* nearly always: a worker starts, and someone waits for it */
	if (!sql_index_has_rows("userpilot_jobs", "userpilot_jobs_open") &&
		!sql_index_has_rows("userpilot_job_chunks", "userpilot_job_chunks_pkey"))
		return 0;
	n = sql_execute(&statement, args, NULL, true);
	*jobs = palloc0(Max(n, 1) * sizeof(Job));
	for (int i = 0; i < n; i++)
	{
		HeapTuple	tuple = SPI_tuptable->vals[i];
		TupleDesc	desc = SPI_tuptable->tupdesc;
		Job		   *job = *jobs + i;
		bool		isnull;

		job->id = DatumGetInt64(SPI_getbinval(tuple, desc, 1, &isnull));
		job->kind = DatumGetBool(SPI_getbinval(tuple, desc, 2, &isnull)) ? USERPILOT_USER : USERPILOT_COMPANY;
		job->ndjson = DatumGetBool(SPI_getbinval(tuple, desc, 3, &isnull));
		job->records = DatumGetInt32(SPI_getbinval(tuple, desc, 4, &isnull));
		job->bytes = DatumGetInt64(SPI_getbinval(tuple, desc, 5, &isnull));
		strlcpy(job->status, SPI_getvalue(tuple, desc, 6), sizeof(job->status));
		job->job_id = SPI_getvalue(tuple, desc, 7);
		job->filename = SPI_getvalue(tuple, desc, 8);
		job->attempts = DatumGetInt32(SPI_getbinval(tuple, desc, 9, &isnull));
		job->finished = DatumGetBool(SPI_getbinval(tuple, desc, 10, &isnull));
	}
	SPI_freetuptable(SPI_tuptable);
	return n;
}

text *
jobs_chunk(int64 job, int seq)
{
	static SqlStatement statement = SQL_STATEMENT(
		"SELECT records FROM @.userpilot_job_chunks WHERE job = $1 AND seq = $2",
		2, {INT8OID, INT4OID});
	Datum		args[2] = {Int64GetDatum(job), Int32GetDatum(seq)};
	text	   *records;
	bool		isnull;

	if (sql_execute(&statement, args, NULL, true) == 0)
		return NULL;
	records = DatumGetTextPCopy(SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull));
	SPI_freetuptable(SPI_tuptable);
	return records;
}

static HttpPiece
piece_of(const char *str)
{
	HttpPiece	piece = {str, strlen(str)};

	return piece;
}

/*
 * NDJSON is the chunks as they are.  For JSON each newline after a record
 * becomes the comma between two; there is no other newline in a record.
 */
HttpPiece *
jobs_body(const Job *job, int *npieces)
{
	int			max = 8;
	HttpPiece  *pieces = palloc(max * sizeof(HttpPiece));
	int			n = 0;
	text	   *records;

	if (!job->ndjson)
		pieces[n++] = piece_of(payload_open(job->kind));
	for (int seq = 0; (records = jobs_chunk(job->id, seq)) != NULL; seq++)
	{
		int			len;
		char	   *chunk = payload_utf8(VARDATA(records), VARSIZE(records) - VARHDRSZ, &len);

		if (chunk != VARDATA(records))
			pfree(records);
		if (n + 2 > max)
			pieces = repalloc(pieces, (max *= 2) * sizeof(HttpPiece));
		if (!job->ndjson)
			for (char *p = chunk; (p = memchr(p, '\n', chunk + len - p)) != NULL;)
				*p = ',';
		pieces[n].data = chunk;
		pieces[n++].len = len;
	}
	if (!job->ndjson)
	{
		if (n > 1)
			pieces[n - 1].len--;	/* no comma after the last */
		pieces[n++] = piece_of(payload_close());
	}
	*npieces = n;
	return pieces;
}

char **
jobs_entity_ids(const Job *job, int *n)
{
	static SqlStatement statement = SQL_STATEMENT(
		"SELECT r::jsonb ->> $2 FROM @.userpilot_job_chunks c,"
		" pg_catalog.string_to_table(pg_catalog.rtrim(c.records, E'\\n'), E'\\n') AS r"
		" WHERE c.job = $1",
		2, {INT8OID, TEXTOID});
	Datum		args[2] = {Int64GetDatum(job->id),
	CStringGetTextDatum(job->kind == USERPILOT_USER ? "user_id" : "company_id")};
	char	  **ids;

	*n = sql_execute(&statement, args, NULL, true);
	ids = palloc(Max(*n, 1) * sizeof(char *));
	for (int i = 0; i < *n; i++)
		ids[i] = SPI_getvalue(SPI_tuptable->vals[i], SPI_tuptable->tupdesc, 1);
	SPI_freetuptable(SPI_tuptable);
	return ids;
}

void
jobs_drop_chunks(int64 job)
{
	static SqlStatement statement = SQL_STATEMENT(
		"DELETE FROM @.userpilot_job_chunks WHERE job = $1", 1, {INT8OID});
	Datum		args[1] = {Int64GetDatum(job)};

	(void) sql_execute(&statement, args, NULL, false);
}

void
jobs_drop_dissolved(const char *server)
{
	static SqlStatement statement = SQL_STATEMENT(
		"DELETE FROM @.userpilot_job_chunks c USING @.userpilot_jobs j"
		" WHERE c.job = j.id AND j.server = $1 AND j.status = '" JOB_DISSOLVED "'", 1, {TEXTOID});
	Datum		args[1] = {CStringGetTextDatum(server)};

	(void) sql_execute(&statement, args, NULL, false);
}

void
jobs_delete(int64 job)
{
	static SqlStatement statement = SQL_STATEMENT(
		"DELETE FROM @.userpilot_jobs WHERE id = $1", 1, {INT8OID});
	Datum		args[1] = {Int64GetDatum(job)};

	(void) sql_execute(&statement, args, NULL, false);
}

void
jobs_give_back_attempt(int64 job)
{
	static SqlStatement statement = SQL_STATEMENT(
		"UPDATE @.userpilot_jobs SET attempts = greatest(attempts - 1, 0) WHERE id = $1",
		1, {INT8OID});
	Datum		args[1] = {Int64GetDatum(job)};

	(void) sql_execute(&statement, args, NULL, false);
}
