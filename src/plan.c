/*
 * plan.c
 *	  Which rows of the queue the next jobs are made of: where they stand, of no
 *	  more than ten jobs, however long the queue is.
 */
#include "postgres.h"

#include "utils/memutils.h"

#include "job_writer.h"
#include "plan.h"

/* Enough that a pass costs little a job; what is beyond waits for the next.
 * Of an entity that is taken in every row is: it is judged by all of them. */
#define MAX_UNITS 10
#define MAX_ROWS 1000000

/* Most rows of a long queue are of entities that found no room: a bit for each
 * hash says so without a look at the table, which no cache holds */
#define FILTER_BITS (1 << 20)

#define SOLO 0					/* the unit of those that are sent alone */

typedef struct PlanRow
{
	ItemPointerData tid;
	uint16		group;
} PlanRow;

typedef struct OpenUnit
{
	int			entities;
	bool		bulk;
	int			direct;
	Size		bytes;
	PlanRow    *rows;
	int			n;
	int			max;
} OpenUnit;

struct Plan
{
	MemoryContext context;
	QueueView	view;
	MemoryContext pass_context; /* of table and places */
	MemoryContext unit_context; /* of the unit taken last */
	entities_hash *table;
	uint8	   *filter;
	int			records;		/* entities of a job */
	int			per_unit;		/* ... and of what the other lane takes of it */
	int			rows;
	OpenUnit	units[1 + MAX_UNITS];
	int			nunits;
	int			taken;
	OpenUnit   *open[USERPILOT_KINDS];	/* a job is of one kind */
};

/* Where an entity's rows belong: data of the table */
typedef struct Place
{
	OpenUnit   *unit;
	uint16		group;
} Place;

Plan *
plan_create(int records_per_job, int entities_per_unit)
{
	MemoryContext context = AllocSetContextCreate(CurrentMemoryContext, "userpilot plan",
												  ALLOCSET_DEFAULT_SIZES);
	Plan	   *plan = MemoryContextAllocZero(context, sizeof(Plan));
	MemoryContext old = MemoryContextSwitchTo(context);

	plan->view = queue_view();
	MemoryContextSwitchTo(old);
	plan->context = context;
	plan->pass_context = AllocSetContextCreate(context, "userpilot plan pass",
											   ALLOCSET_DEFAULT_SIZES);
	plan->unit_context = AllocSetContextCreate(context, "userpilot plan unit",
											   ALLOCSET_DEFAULT_SIZES);
	plan->table = entities_create(plan->pass_context, 1024, NULL);
	plan->filter = MemoryContextAllocZero(plan->pass_context, FILTER_BITS / 8);
	plan->records = records_per_job;
	plan->per_unit = entities_per_unit;
	plan->nunits = 1;			/* that of SOLO */
	return plan;
}

const QueueView *
plan_view(const Plan *plan)
{
	return &plan->view;
}

static OpenUnit *
unit_for(Plan *plan, UserpilotKind kind)
{
	OpenUnit   *unit = plan->open[kind];

	if (unit != NULL && unit->entities < (unit->bulk ? plan->per_unit : plan->records) &&
		unit->bytes <= JOB_WRITER_MAX_ROW_BYTES)
		return unit;
	if (plan->nunits == lengthof(plan->units) || plan->rows >= MAX_ROWS)
		return NULL;
	unit = plan->open[kind] = &plan->units[plan->nunits++];
	unit->bulk = true;
	return unit;
}

static Place *
find(const Plan *plan, EntityKey key, uint32 hash)
{
	uint32		bit = hash % FILTER_BITS;
	EntityEntry *entry;

	if ((plan->filter[bit / 8] & (1 << bit % 8)) == 0)
		return NULL;
	entry = entities_lookup_hash(plan->table, key, hash);
	return entry ? entry->data : NULL;
}

/* The entity's place; NULL if it has none and there is no unit for it */
static Place *
place_of(Plan *plan, EntityKey key, uint32 hash, bool bulk, bool solo)
{
	uint32		bit = hash % FILTER_BITS;
	OpenUnit   *unit;
	Place	   *place = find(plan, key, hash);
	char	   *id;
	bool		found;

	if (place != NULL)
		return place;
	unit = solo ? &plan->units[SOLO] : unit_for(plan, key.kind);
	if (unit == NULL || unit->entities / PLAN_GROUP > PG_UINT16_MAX)
		return NULL;
	unit->direct += !bulk;
	place = MemoryContextAlloc(plan->pass_context, sizeof(Place) + key.len);
	place->unit = unit;
	place->group = unit->entities++ / PLAN_GROUP;
	id = (char *) (place + 1);
	memcpy(id, key.id, key.len);
	key.id = id;
	entities_insert_hash(plan->table, key, hash, &found)->data = place;
	plan->filter[bit / 8] |= 1 << bit % 8;
	return place;
}

static bool
add(Plan *plan, EntityKey key, uint32 hash, const ItemPointerData *tid, bool bulk,
	Size bytes, bool solo)
{
	Place	   *place = place_of(plan, key, hash, bulk, solo);
	OpenUnit   *unit;

	if (place == NULL)
		return false;
	unit = place->unit;
	if (unit->n == unit->max)
	{
		unit->max = Max(1024, unit->max * 2);
		unit->rows = unit->rows ?
			repalloc_huge(unit->rows, unit->max * sizeof(PlanRow)) :
			MemoryContextAlloc(plan->context, unit->max * sizeof(PlanRow));
	}
	unit->rows[unit->n].tid = *tid;
	unit->rows[unit->n++].group = place->group;
	unit->bulk &= bulk;
	unit->bytes += bytes;
	plan->rows++;
	return true;
}

bool
plan_add(Plan *plan, EntityKey key, uint32 hash, const ItemPointerData *tid, bool bulk,
		 Size bytes)
{
	return add(plan, key, hash, tid, bulk, bytes, false);
}

bool
plan_knows(const Plan *plan, EntityKey key, uint32 hash)
{
	return find(plan, key, hash) != NULL;
}

bool
plan_add_solo(Plan *plan, EntityKey key, uint32 hash, const ItemPointerData *tid)
{
	return add(plan, key, hash, tid, true, 0, true);
}

void
plan_close(Plan *plan)
{
	MemoryContextDelete(plan->pass_context);
	plan->table = NULL;
	plan->filter = NULL;
}

/* Its rows group by group, within a group in the order of the pass */
static PlanUnit *
arrange(const OpenUnit *from)
{
	PlanUnit   *unit = palloc0(sizeof(PlanUnit));
	int			end = 0;

	unit->entities = from->entities;
	unit->bulk = from->bulk;
	unit->direct = from->direct;
	unit->ngroups = (from->entities + PLAN_GROUP - 1) / PLAN_GROUP;
	unit->ends = palloc0(unit->ngroups * sizeof(int));
	unit->tids = MemoryContextAllocHuge(CurrentMemoryContext, from->n * sizeof(ItemPointerData));
	for (int i = 0; i < from->n; i++)
		unit->ends[from->rows[i].group]++;
	/* first where each begins; filling it moves that to its end */
	for (int g = 0; g < unit->ngroups; g++)
	{
		int			n = unit->ends[g];

		unit->ends[g] = end;
		end += n;
	}
	for (int i = 0; i < from->n; i++)
		unit->tids[unit->ends[from->rows[i].group]++] = from->rows[i].tid;
	return unit;
}

const PlanUnit *
plan_next(Plan *plan, bool *solo)
{
	MemoryContext old;
	OpenUnit   *next;
	PlanUnit   *unit;

	MemoryContextReset(plan->unit_context);
	while (plan->taken < plan->nunits && plan->units[plan->taken].n == 0)
		plan->taken++;
	if (plan->taken == plan->nunits)
		return NULL;
	*solo = plan->taken == SOLO;
	next = &plan->units[plan->taken++];
	old = MemoryContextSwitchTo(plan->unit_context);
	unit = arrange(next);
	MemoryContextSwitchTo(old);
	pfree(next->rows);
	plan->rows -= next->n;
	return unit;
}

int
plan_rows(const Plan *plan)
{
	return plan->rows;
}

BlockNumber
plan_first_block(const Plan *plan)
{
	for (int i = plan->taken; i < plan->nunits; i++)
		if (plan->units[i].n > 0)
			return ItemPointerGetBlockNumber(&plan->units[i].rows[0].tid);
	return 0;
}

void
plan_free(Plan *plan)
{
	MemoryContextDelete(plan->context);
}
