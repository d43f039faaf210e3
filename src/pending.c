/*
 * pending.c
 *	  Entities waiting in, or travelling through, the real-time lane.
 *
 * Each has a memory context of its own: when it is done with, all goes.
 */
#include "postgres.h"

#include "access/xact.h"
#include "utils/memutils.h"

#include "pending.h"

/*
 * An entity is called so often at most (API ms): the first change goes at
 * once, and a thousand more within a second go with the next call.
 */
#define PACE_MS 2000

void
pending_init(Realtime *rt)
{
	rt->pending = entities_create(rt->context, 256, NULL);
	for (int i = 0; i < WAITING_LISTS; i++)
		dlist_init(&rt->waiting[i]);
	for (int i = 0; i < 2; i++)
	{
		rt->called_context[i] = AllocSetContextCreate(rt->context, "userpilot calls",
													  ALLOCSET_SMALL_SIZES);
		rt->called[i] = entities_create(rt->called_context[i], 64, NULL);
	}
}

/* Two tables take turns, so that what is old goes without being looked for */
void
pending_called(Realtime *rt, Pending *pending, int64 now)
{
	EntityKey	key = pending->key;
	EntityEntry *entry;
	MemoryContext old;
	bool		found;

	if (now - rt->called_since > PACE_MS)
	{
		MemoryContext context = rt->called_context[1];

		rt->called[1] = rt->called[0];
		rt->called_context[1] = rt->called_context[0];
		MemoryContextReset(context);
		rt->called_context[0] = context;
		rt->called[0] = entities_create(context, 64, NULL);
		rt->called_since = now;
	}
	old = MemoryContextSwitchTo(rt->called_context[0]);
	key.id = pnstrdup(key.id, key.len);
	entry = entities_insert(rt->called[0], key, &found);
	if (!found)
		entry->data = palloc(sizeof(int64));
	*(int64 *) entry->data = now;
	MemoryContextSwitchTo(old);
}

/* When an entity may be called again */
static int64
pace(const Realtime *rt, EntityKey key)
{
	for (int i = 0; i < 2; i++)
	{
		EntityEntry *entry = entities_lookup(rt->called[i], key);

		if (entry != NULL)
			return *(int64 *) entry->data + PACE_MS;
	}
	return 0;
}

Pending *
pending_find(const Realtime *rt, EntityKey key)
{
	EntityEntry *entry = entities_lookup(rt->pending, key);

	return entry ? entry->data : NULL;
}

static void
push_waiting(Realtime *rt, Pending *pending)
{
	PendingList list = pending->solo ? WAITING_SOLO : WAITING_FRESH;

	if (pending->not_before > 0)
	{
		if (dlist_is_empty(&rt->waiting[WAITING_LATER]) || pending->not_before < rt->later_at)
			rt->later_at = pending->not_before;
		list = WAITING_LATER;
	}
	dlist_push_tail(&rt->waiting[list], &pending->node);
}

int64
pending_due_at(const Realtime *rt)
{
	int64		at = PG_INT64_MAX;

	if (!dlist_is_empty((dlist_head *) &rt->waiting[WAITING_FRESH]))
		return 0;
	if (!dlist_is_empty((dlist_head *) &rt->waiting[WAITING_SOLO]))
		at = rt->solo_at;
	if (!dlist_is_empty((dlist_head *) &rt->waiting[WAITING_LATER]))
		at = Min(at, rt->later_at);
	return at;
}

void
pending_recall(Realtime *rt, int64 now)
{
	dlist_mutable_iter iter;
	int64		later_at = PG_INT64_MAX;

	if (now < rt->later_at)
		return;
	dlist_foreach_modify(iter, &rt->waiting[WAITING_LATER])
	{
		Pending    *pending = dlist_container(Pending, node, iter.cur);

		if (pending->not_before > now)
		{
			later_at = Min(later_at, pending->not_before);
			continue;
		}
		pending->not_before = 0;
		dlist_delete(&pending->node);
		push_waiting(rt, pending);
	}
	rt->later_at = later_at;
}

/* Rows of what the bulk lane handed over leave the room of what is fresh alone */
static void
count_rows(Realtime *rt, const Pending *pending, int n, int64 bytes)
{
	RowCount   *count = pending->solo ? &rt->solo : &rt->fresh;

	count->rows += n;
	count->bytes += bytes;
}

int64
pending_bytes(const Pending *pending, int nrows)
{
	int64		bytes = 0;

	for (int i = 0; i < nrows; i++)
		bytes += VARSIZE(pending->rows[i]->metadata);
	return bytes;
}

static void
set_solo(Realtime *rt, Pending *pending, bool solo)
{
	int64		bytes = pending_bytes(pending, pending->nrows);

	count_rows(rt, pending, -pending->nrows, -bytes);
	pending->solo = solo;
	pending->helped = false;
	rt->solos += solo ? 1 : -1;
	count_rows(rt, pending, pending->nrows, bytes);
}

static Pending *
pending_create(Realtime *rt, EntityKey key)
{
	MemoryContext context = AllocSetContextCreate(rt->context, "userpilot entity",
												  ALLOCSET_SMALL_SIZES);
	Pending    *pending = MemoryContextAllocZero(context, sizeof(Pending));
	EntityEntry *entry;
	bool		found;
	char	   *id = MemoryContextAlloc(context, key.len + 1);

	memcpy(id, key.id, key.len);
	id[key.len] = '\0';
	pending->key = key;
	pending->key.id = id;
	pending->context = context;
	pending->read_in = GetCurrentTransactionStartTimestamp();
	pending->not_before = pace(rt, key);
	pending->maxrows = 4;
	pending->rows = MemoryContextAlloc(context, pending->maxrows * sizeof(QueueRow *));
	entry = entities_insert(rt->pending, pending->key, &found);
	Assert(!found);
	entry->data = pending;
	push_waiting(rt, pending);
	return pending;
}

void
pending_free(Realtime *rt, Pending *pending)
{
	dlist_delete(&pending->node);
	entities_delete(rt->pending, pending->key);
	count_rows(rt, pending, -pending->nrows, -pending_bytes(pending, pending->nrows));
	rt->solos -= pending->solo;
	MemoryContextDelete(pending->context);
}

static bool
pending_has(const Pending *pending, const QueueRow *row)
{
	for (int i = 0; i < pending->nrows; i++)
	{
		if (ItemPointerEquals(&pending->rows[i]->tid, (ItemPointer) &row->tid) &&
			pending->rows[i]->lsn == row->lsn)
			return true;
	}
	return false;
}

Pending *
pending_add(Realtime *rt, const QueueRow *row)
{
	EntityKey	key = {row->kind, row->entity_len, row->entity_id};
	Pending    *pending = pending_find(rt, key);
	MemoryContext old;

	if (pending == NULL)
		pending = pending_create(rt, key);
	else if (rt->seen == NULL && pending_has(pending, row))
		return pending;			/* a look at all met one that had stayed */

	old = MemoryContextSwitchTo(pending->context);
	if (pending->nrows == pending->maxrows)
	{
		pending->maxrows *= 2;
		pending->rows = repalloc(pending->rows, pending->maxrows * sizeof(QueueRow *));
	}
	pending->rows[pending->nrows++] = queue_row_copy(row);
	MemoryContextSwitchTo(old);
	count_rows(rt, pending, 1, VARSIZE(pending->rows[pending->nrows - 1]->metadata));
	return pending;
}

void
pending_add_solo(Realtime *rt, const QueueRow *row, bool helped)
{
	EntityKey	key = {row->kind, row->entity_len, row->entity_id};
	Pending    *pending = pending_find(rt, key);

	/* a direct row may wait here already */
	if (pending == NULL || !pending_has(pending, row))
		pending = pending_add(rt, row);
	if (!pending->solo)
	{
		set_solo(rt, pending, true);
		dlist_delete(&pending->node);
		push_waiting(rt, pending);
	}
	pending->helped = helped;
}

void
pending_forget(Realtime *rt, EntityKey key, const ItemPointerData *tid, uint64 lsn)
{
	Pending    *pending = pending_find(rt, key);

	if (pending == NULL || pending->state != PENDING_WAITING)
		return;
	for (int i = 0; i < pending->nrows; i++)
	{
		QueueRow   *row = pending->rows[i];

		if (row->lsn != lsn || !ItemPointerEquals(&row->tid, (ItemPointer) tid))
			continue;
		if (pending->nrows == 1)
		{
			pending_free(rt, pending);
			return;
		}
		count_rows(rt, pending, -1, -(int64) VARSIZE(row->metadata));
		queue_row_free(row);
		memmove(pending->rows + i, pending->rows + i + 1,
				(pending->nrows - i - 1) * sizeof(QueueRow *));
		pending->nrows--;
		pending->nprovisional -= i < pending->nprovisional;
		return;
	}
}

/* Its body is no longer under way: back to waiting, what was sent unknown */
void
pending_wait(Realtime *rt, Pending *pending, int64 not_before)
{
	if (pending->merge_context)
		MemoryContextDelete(pending->merge_context);
	pending->merge_context = NULL;
	pending->state = PENDING_WAITING;
	pending->nsent = 0;
	pending->not_before = not_before;
	dlist_delete(&pending->node);
	push_waiting(rt, pending);
}

/* The first nsent rows are done with */
void
pending_drop_sent(Realtime *rt, Pending *pending)
{
	int			left = pending->nrows - pending->nsent;

	if (left == 0)
	{
		pending_free(rt, pending);
		return;
	}
	count_rows(rt, pending, -pending->nsent, -pending_bytes(pending, pending->nsent));
	/* one by one: an entity that changes all the time never goes itself */
	for (int i = 0; i < pending->nsent; i++)
		queue_row_free(pending->rows[i]);
	memmove(pending->rows, pending->rows + pending->nsent, left * sizeof(QueueRow *));
	pending->nrows = left;
	pending->nprovisional = Max(pending->nprovisional - pending->nsent, 0);
	/* what was handed over has gone, the rest has come since */
	if (pending->solo && pending->nsent > 0)
		set_solo(rt, pending, false);
	pending_wait(rt, pending, pace(rt, pending->key));
}
