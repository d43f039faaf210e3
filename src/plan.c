/*
 * plan.c
 *	  Which rows of the queue the next jobs are made of.
 */
#include "postgres.h"

#include "utils/memutils.h"

#include "job_writer.h"
#include "plan.h"

/* Enough that a pass costs little a job; what is beyond waits for the next */
#define MAX_UNITS 10
#define MAX_ROWS 1000000

typedef struct OpenUnit
{
	PlanUnit	unit;
	int			maxtids;
	Size		bytes;
} OpenUnit;

struct Plan
{
	MemoryContext context;
	MemoryContext pass_context; /* of table */
	entities_hash *table;		/* whose data is the entity's unit */
	int			per_unit;
	int			rows;
	OpenUnit	units[MAX_UNITS];
	int			nunits;
	int			taken;
	OpenUnit   *open[USERPILOT_KINDS];	/* a job is of one kind */
};

Plan *
plan_create(int entities_per_unit)
{
	MemoryContext context = AllocSetContextCreate(CurrentMemoryContext, "userpilot plan",
												  ALLOCSET_DEFAULT_SIZES);
	Plan	   *plan = MemoryContextAllocZero(context, sizeof(Plan));

	plan->context = context;
	plan->pass_context = AllocSetContextCreate(context, "userpilot plan pass",
											   ALLOCSET_DEFAULT_SIZES);
	plan->table = entities_create(plan->pass_context, 1024, NULL);
	plan->per_unit = entities_per_unit;
	return plan;
}

static OpenUnit *
unit_for(Plan *plan, UserpilotKind kind)
{
	OpenUnit   *unit = plan->open[kind];

	if (unit != NULL && unit->unit.entities < plan->per_unit && unit->bytes <= JOB_WRITER_MAX_ROW_BYTES)
		return unit;
	if (plan->nunits == MAX_UNITS)
		return NULL;
	unit = plan->open[kind] = &plan->units[plan->nunits++];
	unit->unit.bulk = true;
	return unit;
}

bool
plan_add(Plan *plan, EntityKey key, uint32 hash, const ItemPointerData *tid, bool bulk,
		 Size bytes)
{
	EntityEntry *entry = entities_lookup_hash(plan->table, key, hash);
	OpenUnit   *unit = entry ? entry->data : NULL;
	bool		found;

	if (plan->rows == MAX_ROWS || (unit == NULL && (unit = unit_for(plan, key.kind)) == NULL))
		return false;
	if (entry == NULL)
	{
		char	   *id = MemoryContextAlloc(plan->pass_context, key.len);

		memcpy(id, key.id, key.len);
		key.id = id;
		entities_insert_hash(plan->table, key, hash, &found)->data = unit;
		unit->unit.entities++;
	}
	if (unit->unit.n == unit->maxtids)
	{
		unit->maxtids = Max(1024, unit->maxtids * 2);
		unit->unit.tids = unit->unit.tids ?
			repalloc(unit->unit.tids, unit->maxtids * sizeof(ItemPointerData)) :
			MemoryContextAlloc(plan->context, unit->maxtids * sizeof(ItemPointerData));
	}
	unit->unit.tids[unit->unit.n++] = *tid;
	unit->unit.bulk &= bulk;
	unit->bytes += bytes;
	plan->rows++;
	return true;
}

void
plan_close(Plan *plan)
{
	MemoryContextDelete(plan->pass_context);
	plan->table = NULL;
}

const PlanUnit *
plan_next(Plan *plan)
{
	if (plan->taken > 0 && plan->units[plan->taken - 1].unit.tids != NULL)
	{
		pfree(plan->units[plan->taken - 1].unit.tids);
		plan->units[plan->taken - 1].unit.tids = NULL;
	}
	if (plan->taken == plan->nunits)
		return NULL;
	plan->rows -= plan->units[plan->taken].unit.n;
	return &plan->units[plan->taken++].unit;
}

int
plan_rows(const Plan *plan)
{
	return plan->rows;
}

void
plan_free(Plan *plan)
{
	MemoryContextDelete(plan->context);
}
