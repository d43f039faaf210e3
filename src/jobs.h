/*
 * jobs.h
 *	  userpilot_jobs and the records of unfinished jobs.
 */
#ifndef USERPILOT_JOBS_H
#define USERPILOT_JOBS_H

#include "http.h"
#include "userpilot.h"

/* The last word on a job is final; the API's own states are text */
#define JOB_PREPARED "prepared"
#define JOB_UNKNOWN "unknown"
#define JOB_COMPLETED "completed"
#define JOB_REFUSED "refused"
#define JOB_DISSOLVED "dissolved"

typedef struct Job
{
	int64		id;
	UserpilotKind kind;
	bool		ndjson;
	int			records;
	int64		bytes;
	char		status[64];
	char	   *job_id;			/* the API's, or NULL */
	char	   *filename;		/* of its upload in NDJSON, or NULL */
	int			attempts;
	bool		finished;
} Job;

/* A new job in status prepared; sets its id.  Strings stay the caller's. */
extern void jobs_insert(const char *server, Job *job);

/* Its records are: size and format are known, and an upload gets its name */
extern void jobs_written(Job *job);
extern void jobs_add_chunk(int64 job, int seq, const char *records, int len);

/* What changed with an answer: any pointer may be NULL (left as it was) */
typedef struct JobNews
{
	const char *status;
	const char *job_id;
	int64		total_rows;		/* -1: left */
	int64		completed_rows; /* -1: left */
	int			http_status;	/* 0: left */
	const char *request_id;
	const char *error;
	const char *response;
	bool		submitted;
	bool		polled;
	bool		finished;
} JobNews;

#define JOB_NO_NEWS {NULL, NULL, -1, -1, 0, NULL, NULL, NULL, false, false, false}

extern void jobs_update(int64 job, const JobNews *news);

/* To be submitted anew, under another name: the failed run keeps the old one */
extern void jobs_restart(Job *job, const char *error);

/* A submission is about to be made */
extern void jobs_count_attempt(int64 job);

/* ... which does not count after all */
extern void jobs_give_back_attempt(int64 job);

/* Jobs of a server that are not done with, oldest first, in
 * CurrentMemoryContext: unfinished, or dissolved with records left */
extern int	jobs_unfinished(const char *server, Job **jobs);

/* Body pieces of a job, malloc-free, in CurrentMemoryContext and UTF-8 */
extern HttpPiece *jobs_body(const Job *job, int *npieces);

/* Some of its records, one a line; NULL: there are no more */
extern text *jobs_chunk(int64 job, int seq);

/* Ids in a job's records, in CurrentMemoryContext */
extern char **jobs_entity_ids(const Job *job, int *n);

/* The job is done with: its records go */
extern void jobs_drop_chunks(int64 job);

/* ... those of all finished jobs of this status */
extern void jobs_drop_dissolved(const char *server);

/* Nothing was to be sent after all */
extern void jobs_delete(int64 job);

#endif
