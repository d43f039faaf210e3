/*
 * plan.h
 *	  Which rows of the queue the next jobs are made of: one pass over the
 *	  queue serves several jobs.
 *
 * A plan is positions only, in units of what both lanes can send while one job
 * runs.  A row is read again, and judged, when its unit has its turn: what was
 * sent, cancelled or moved meanwhile is then not found there, and what came
 * meanwhile waits for the next pass, as it would have waited for the running
 * job.
 */
#ifndef USERPILOT_PLAN_H
#define USERPILOT_PLAN_H

#include "storage/itemptr.h"

#include "entities.h"
#include "queue.h"

/* A unit is read so many entities at a time */
#define PLAN_GROUP 1000

typedef struct Plan Plan;

typedef struct PlanUnit
{
	int			entities;
	bool		bulk;			/* all of it queued as bulk */
	int			direct;			/* entities that are there for a direct change */
	ItemPointerData *tids;		/* group by group */
	int			ngroups;
	int		   *ends;			/* of the groups, in tids */
} PlanUnit;

/* A new plan of the queue as it is now, in a context of its own below the
 * current one.  Only what was queued as bulk makes larger units than a job. */
extern Plan *plan_create(int records_per_job, int entities_per_unit);

extern const QueueView *plan_view(const Plan *plan);

/* Takes a row in, of about so many bytes; false: there is no room for it and
 * its entity */
extern bool plan_add(Plan *plan, EntityKey key, uint32 hash,
					 const ItemPointerData *tid, bool bulk, Size bytes);

/* Whether rows of the entity have been taken in */
extern bool plan_knows(const Plan *plan, EntityKey key, uint32 hash);

/* One that is to be sent alone: these make the first unit, of any size */
extern bool plan_add_solo(Plan *plan, EntityKey key, uint32 hash,
						  const ItemPointerData *tid);

/* The pass is over: no further rows */
extern void plan_close(Plan *plan);

/* The next unit, or NULL; it lives until the next one is taken */
extern const PlanUnit *plan_next(Plan *plan, bool *solo);

/* Rows of the units not yet taken, and where the first of them is */
extern int	plan_rows(const Plan *plan);
extern BlockNumber plan_first_block(const Plan *plan);

extern void plan_free(Plan *plan);

#endif
