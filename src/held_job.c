/*
 * held_job.c
 *	  A job and what it holds, in memory of its own: three jobs change places,
 *	  and each is cleared as a whole.
 */
#include "postgres.h"

#include "utils/memutils.h"

#include "held_job.h"

/* Places kept for deletion; a sweep finds the others */
#define MAX_ROWS 1000000

HeldJob *
held_job_create(MemoryContext parent)
{
	HeldJob    *held = MemoryContextAllocZero(parent, sizeof(HeldJob));

	held->context = AllocSetContextCreate(parent, "userpilot job", ALLOCSET_DEFAULT_SIZES);
	return held;
}

void
held_job_clear(HeldJob *held)
{
	MemoryContext context = held->context;

	MemoryContextReset(context);
	memset(held, 0, sizeof(*held));
	held->context = context;
}

void
held_job_open(HeldJob *held, int nentities)
{
	held->entities = entities_create(held->context, nentities, NULL);
}

/* What is to be deleted once the job has been acknowledged */
static void
add_rows(HeldJob *held, const JobRow *rows, int n, const char *entity_id)
{
	if (held->nrows + n > MAX_ROWS)
	{
		held->unsure = true;
		return;
	}
	if (held->nrows + n > held->maxrows)
	{
		held->maxrows = Max(held->nrows + n, Max(held->maxrows * 2, 1024));
		held->rows = held->rows ?
			repalloc_huge(held->rows, held->maxrows * sizeof(JobRow)) :
			MemoryContextAllocHuge(held->context, held->maxrows * sizeof(JobRow));
	}
	for (int i = 0; i < n; i++)
	{
		held->rows[held->nrows] = rows[i];
		held->rows[held->nrows++].entity_id = entity_id;
	}
}

void
held_job_add(HeldJob *held, EntityKey key, const JobRow *rows, int nrows)
{
	char	   *id = MemoryContextAlloc(held->context, key.len + 1);
	bool		found;

	memcpy(id, key.id, key.len);
	id[key.len] = '\0';
	key.id = id;
	(void) entities_insert(held->entities, key, &found);
	add_rows(held, rows, nrows, id);
}

bool
held_job_has(const HeldJob *held, EntityKey key, uint32 hash)
{
	return held->entities != NULL && entities_lookup_hash(held->entities, key, hash) != NULL;
}
