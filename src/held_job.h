/*
 * held_job.h
 *	  A job and what it holds.
 *
 * A job's entities are held from its mark until what became of it has been
 * written down: no other body of theirs may leave meanwhile.
 */
#ifndef USERPILOT_HELD_JOB_H
#define USERPILOT_HELD_JOB_H

#include "storage/itemptr.h"

#include "entities.h"
#include "jobs.h"

/* A row of the queue, by its place; entity_id ends in NUL */
typedef struct JobRow
{
	uint64		lsn;
	int64		batch;
	const char *entity_id;
	ItemPointerData tid;
} JobRow;

typedef struct HeldJob
{
	MemoryContext context;		/* of all that is in it */
	Job			job;			/* id 0: none */
	entities_hash *entities;	/* NULL: none are held */
	int			nlearnt;		/* chunks of its records, once acknowledged */
	JobRow	   *rows;			/* of the queue, that went into the job */
	int			nrows;
	int			maxrows;
	bool		unsure;			/* not all of them, or not of them alone: what is
								 * left is for a sweep to find out */
} HeldJob;

extern HeldJob *held_job_create(MemoryContext parent);
extern void held_job_clear(HeldJob *held);

/* Holds nothing yet, but is about to */
extern void held_job_open(HeldJob *held, int nentities);
extern void held_job_add(HeldJob *held, EntityKey key, const JobRow *rows, int nrows);
extern bool held_job_has(const HeldJob *held, EntityKey key, uint32 hash);

#endif
