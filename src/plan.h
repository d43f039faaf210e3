/*
 * plan.h
 *	  Which rows of the queue the next jobs are made of: one pass over the
 *	  queue serves several jobs.
 *
 * A plan is positions only, in units of about one job.  A row is read again,
 * and judged, when its unit has its turn: what was sent, cancelled or moved
 * meanwhile is then not found there, and what came meanwhile waits for the
 * next pass, as it would have waited for the running job.
 */
#ifndef USERPILOT_PLAN_H
#define USERPILOT_PLAN_H

#include "storage/itemptr.h"

#include "entities.h"

typedef struct Plan Plan;

typedef struct PlanUnit
{
	int			entities;
	bool		bulk;			/* all of it queued as bulk */
	int			n;
	ItemPointerData *tids;		/* in the order of the pass */
} PlanUnit;

/* A new plan; goes with its context, which becomes a child of the current */
extern Plan *plan_create(int entities_per_unit);

/* Takes a row in, of about so many bytes; false: there is no room */
extern bool plan_add(Plan *plan, EntityKey key, uint32 hash,
					 const ItemPointerData *tid, bool bulk, Size bytes);

/* The pass is over: no further rows */
extern void plan_close(Plan *plan);

/* The next unit, or NULL; it lives until the one after it is taken */
extern const PlanUnit *plan_next(Plan *plan);

/* Rows of the units not yet taken */
extern int	plan_rows(const Plan *plan);

extern void plan_free(Plan *plan);

#endif
