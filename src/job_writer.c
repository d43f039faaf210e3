/*
 * job_writer.c
 *	  A job being made: its row, its records in chunks, the marks.
 */
#include "postgres.h"

#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/uuid.h"

#include "job_writer.h"
#include "payload.h"

/* Larger bodies go as a file, if it is for us to choose */
#define JSON_BYTES (8 * 1000 * 1000)

#define CHUNK_BYTES (1024 * 1024)

/* Places kept for deletion; a sweep finds the others */
#define MAX_ROWS 1000000

void
job_writer_init(JobWriter *writer, Sender *sender, int max_records)
{
	memset(writer, 0, sizeof(*writer));
	writer->sender = sender;
	writer->max_records = max_records;
	writer->context = CurrentMemoryContext;
}

static void
start_job(JobWriter *writer, UserpilotKind kind)
{
	Bulk	   *bulk = &writer->sender->bulk;
	Datum		uuid = DirectFunctionCall1(gen_random_uuid, (Datum) 0);
	char	   *text = DatumGetCString(DirectFunctionCall1(uuid_out, uuid));
	MemoryContext old = MemoryContextSwitchTo(bulk->job_context);

	memset(&bulk->job, 0, sizeof(bulk->job));
	bulk->job.kind = kind;
	bulk->job.filename = psprintf("userpilot-%s.ndjson", text);
	bulk->flying = entities_create(bulk->job_context, writer->max_records, NULL);
	MemoryContextSwitchTo(writer->context);
	initStringInfo(&writer->chunk);
	MemoryContextSwitchTo(old);
	jobs_insert(writer->sender->env->server, &bulk->job);
	memset(&bulk->rows, 0, sizeof(bulk->rows));
	bulk->rows.job = bulk->job.id;
	bulk->rows.kind = bulk->job.kind;
}

static void
write_chunk(JobWriter *writer)
{
	if (writer->chunk.len == 0)
		return;
	jobs_add_chunk(writer->sender->bulk.job.id, writer->nchunks++,
				   writer->chunk.data, writer->chunk.len);
	resetStringInfo(&writer->chunk);
}

void
job_writer_flush(JobWriter *writer)
{
	profiles_write(writer->sender->env->server, writer->marked, writer->nmarked, PROFILE_MARKED);
	writer->nmarked = 0;
}

/* What is to be deleted once the job has been acknowledged */
static void
add_rows(Bulk *bulk, const JobRow *rows, int n, const char *entity_id)
{
	JobRows    *to = &bulk->rows;

	if (to->n + n > MAX_ROWS)
	{
		to->unsure = true;
		return;
	}
	if (to->n + n > to->max)
	{
		to->max = Max(to->n + n, Max(to->max * 2, 1024));
		to->rows = to->rows ?
			repalloc_huge(to->rows, to->max * sizeof(JobRow)) :
			MemoryContextAllocHuge(bulk->job_context, to->max * sizeof(JobRow));
	}
	for (int i = 0; i < n; i++)
	{
		to->rows[to->n] = rows[i];
		to->rows[to->n++].entity_id = entity_id;
	}
}

JobWriterResult
job_writer_add(JobWriter *writer, Profile *profile, const JobRow *rows, int nrows,
			   int *bytes)
{
	Bulk	   *bulk = &writer->sender->bulk;
	StringInfo	chunk = &writer->chunk;
	EntityKey	key = profile->key;
	int			before;
	bool		found;

	if (bulk->flying == NULL)
		start_job(writer, key.kind);
	before = chunk->len;
	payload_merged(chunk, key.kind, key.id, key.len, profile->merge);
	appendStringInfoChar(chunk, '\n');
	*bytes = payload_utf8_len(chunk->data + before, chunk->len - before);
	if (bulk->job.bytes + *bytes > JOB_WRITER_MAX_BYTES)
	{
		chunk->len = before;
		chunk->data[before] = '\0';
		return *bytes > JOB_WRITER_MAX_BYTES ? JOB_WRITER_TOO_LARGE : JOB_WRITER_FULL;
	}

	merge_mark(profile->merge);
	profile->attempts++;
	profile->job = bulk->job.id;
	key.id = MemoryContextStrdup(bulk->job_context, key.id);
	(void) entities_insert(bulk->flying, key, &found);
	add_rows(bulk, rows, nrows, key.id);
	bulk->job.records++;
	bulk->job.bytes += *bytes;
	writer->marked[writer->nmarked++] = profile;
	if (chunk->len >= CHUNK_BYTES)
		write_chunk(writer);
	if (writer->nmarked == JOB_WRITER_GROUP)
		job_writer_flush(writer);
	return JOB_WRITER_TAKEN;
}

void
job_writer_finish(JobWriter *writer)
{
	Bulk	   *bulk = &writer->sender->bulk;

	write_chunk(writer);
	job_writer_flush(writer);
	switch (writer->sender->env->bulk_format)
	{
		case BULK_FORMAT_AUTO:
			bulk->job.ndjson = bulk->job.bytes > JSON_BYTES;
			break;
		case BULK_FORMAT_JSON:
			bulk->job.ndjson = false;
			break;
		case BULK_FORMAT_NDJSON:
			bulk->job.ndjson = true;
			break;
	}
	bulk->rows.records = bulk->job.records;
	jobs_set_size(&bulk->job);
}
