/*
 * job_writer.h
 *	  A job being made: its row, its records in chunks, the marks.
 */
#ifndef USERPILOT_JOB_WRITER_H
#define USERPILOT_JOB_WRITER_H

#include "sender.h"

/* "50 MB" may be counted in millions; keeps room for what stands around */
#define JOB_WRITER_MAX_BYTES (50 * 1000 * 1000 - 1024)

/* What its rows may come to in the queue */
#define JOB_WRITER_MAX_ROW_BYTES (JOB_WRITER_MAX_BYTES / 4 * 5)

#define JOB_WRITER_GROUP 1000

typedef struct JobWriter
{
	Sender	   *sender;
	int			max_records;
	MemoryContext context;
	StringInfoData chunk;
	int			nchunks;
	Profile    *marked[JOB_WRITER_GROUP];
	int			nmarked;
} JobWriter;

typedef enum JobWriterResult
{
	JOB_WRITER_TAKEN,			/* needed until the next flush */
	JOB_WRITER_FULL,
	JOB_WRITER_TOO_LARGE		/* for any job */
} JobWriterResult;

/* Writes nothing before the first record; in CurrentMemoryContext */
extern void job_writer_init(JobWriter *writer, Sender *sender, int max_records);

/*
 * Appends an entity's record and marks it; *bytes is its length.  Of its rows
 * the caller says the places; their entity_id is set here.
 */
extern JobWriterResult job_writer_add(JobWriter *writer, Profile *profile,
									  const JobRow *rows, int nrows, int *bytes);

/* Writes the marks gathered so far */
extern void job_writer_flush(JobWriter *writer);

extern void job_writer_finish(JobWriter *writer);

#endif
