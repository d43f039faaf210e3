/*
 * job_writer.c
 *	  A job being made: its row, its records in chunks, the marks; a chunk at a
 *	  time, as the body is not in memory until it is submitted.
 */
#include "postgres.h"

#include "utils/builtins.h"
#include "utils/memutils.h"

#include "job_writer.h"
#include "payload.h"

/* Larger bodies go as a file, if it is for us to choose */
#define JSON_BYTES (8 * 1000 * 1000)

/* What it said is learnt so much at a time: what is fresh waits for it */
#define CHUNK_BYTES (128 * 1024)

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
	HeldJob    *held = writer->sender->bulk.next;
	MemoryContext old = MemoryContextSwitchTo(held->context);

	held->job.kind = kind;
	held_job_open(held, writer->max_records);
	MemoryContextSwitchTo(writer->context);
	initStringInfo(&writer->chunk);
	MemoryContextSwitchTo(old);
	jobs_insert(writer->sender->env->server, &held->job);
}

static void
write_chunk(JobWriter *writer)
{
	if (writer->chunk.len == 0)
		return;
	jobs_add_chunk(writer->sender->bulk.next->job.id, writer->nchunks++,
				   writer->chunk.data, writer->chunk.len);
	resetStringInfo(&writer->chunk);
}

void
job_writer_flush(JobWriter *writer)
{
	profiles_write(writer->sender->env->server, writer->marked, writer->nmarked, PROFILE_MARKED);
	writer->nmarked = 0;
}

JobWriterResult
job_writer_add(JobWriter *writer, Profile *profile, const JobRow *rows, int nrows,
			   int *bytes)
{
	HeldJob    *held = writer->sender->bulk.next;
	StringInfo	chunk = &writer->chunk;
	EntityKey	key = profile->key;
	int			before;

	if (held->entities == NULL)
		start_job(writer, key.kind);
	before = chunk->len;
	payload_merged(chunk, key.kind, key.id, key.len, profile->merge);
	appendStringInfoChar(chunk, '\n');
	*bytes = payload_utf8_len(chunk->data + before, chunk->len - before);
	if (held->job.bytes + *bytes > JOB_WRITER_MAX_BYTES)
	{
		chunk->len = before;
		chunk->data[before] = '\0';
		return *bytes > JOB_WRITER_MAX_BYTES ? JOB_WRITER_TOO_LARGE : JOB_WRITER_FULL;
	}

	merge_mark(profile->merge);
	profile->attempts++;
	profile->job = held->job.id;
	held_job_add(held, key, rows, nrows);
	held->unsure |= profile->merge->more;	/* its rows stay, for what is left */
	held->job.records++;
	held->job.bytes += *bytes;
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
	HeldJob    *held = writer->sender->bulk.next;
	Job		   *job = &held->job;
	MemoryContext old;

	write_chunk(writer);
	job_writer_flush(writer);
	switch (writer->sender->env->bulk_format)
	{
		case BULK_FORMAT_AUTO:
			job->ndjson = job->bytes > JSON_BYTES;
			break;
		case BULK_FORMAT_JSON:
			job->ndjson = false;
			break;
		case BULK_FORMAT_NDJSON:
			job->ndjson = true;
			break;
	}
	old = MemoryContextSwitchTo(held->context);
	jobs_written(job);
	MemoryContextSwitchTo(old);
}
