/*
 * merge.c
 *	  What one entity's queued changes mean against what Userpilot is known
 *	  to have.
 *
 * The extension's promise never to put an older value over a newer one is
 * kept here and nowhere else.  For each key on its own, the last writer wins,
 * under an order that a single number cannot express:
 *
 * Direct changes (triggers, single calls) are made under their source row's
 * lock, so the WAL position at which they were queued orders them.  One
 * applies if it is newer than the key's version, or as new while the value at
 * Userpilot is unknown: the version is raised before a body leaves, so a body
 * that was lost or refused has to be sent again at the same version.
 *
 * Batch rows come from a bulk SELECT, which reads the past: it queues at high
 * positions what its snapshot saw long before.  So a batch row is older than
 * every change its snapshot cannot see and newer than all others, wherever
 * they are in the WAL.  That holds for changes in the queue and for the one
 * that gave the key its version, which may long have been delivered.  Its own
 * transaction's changes are no part of the snapshot, and go by position.
 *
 * Of two bulk SELECTs the one that read later wins, though the other may be
 * queued or committed last; where no trigger watches the source, nothing but
 * this tells them apart.  A version therefore remembers the order of the
 * newest batch applied.  Its lsn and xid, however, are always those of a
 * direct change, the newest one superseded: with a batch's own position it
 * would outrank changes which that batch has not seen.
 */
#ifdef FRONTEND
#include "postgres_fe.h"
#else
#include "postgres.h"
#endif

#include "merge.h"
#include "userpilot.h"

/*
 * Whether a direct change is later than a batch can only be told when the
 * batch row is at hand, and changes are folded in in any order.  Keeping all
 * their xids would let one busy row fill the memory, so a key keeps just what
 * can matter to the batches there are.
 *
 * Snapshots of one database are nested: whatever an older one sees, a newer
 * one sees too.  The batches that cannot see a change are thus exactly those
 * up to some order, and of all changes the highest such order says everything:
 * one number a key, later_than.  Only a transaction that ran a bulk SELECT
 * itself does not fit, as it sees its own changes when others do not; of each
 * such transaction one entry is kept, with its highest position.  So memory
 * follows the keys and the bulk SELECTs, never the changes; without bulk
 * SELECTs there is nothing to keep.
 */
typedef struct MergeLater
{
	uint64		xid;
	uint64		lsn;
} MergeLater;

static int
compare_uint64(uint64 a, uint64 b)
{
	return (a > b) - (a < b);
}

static int
compare_xids(const void *a, const void *b)
{
	return compare_uint64(*(const uint64 *) a, *(const uint64 *) b);
}

/* Whether a sorted array holds an xid */
static bool
has_xid(const uint64 *xids, int n, uint64 xid)
{
	return bsearch(&xid, xids, n, sizeof(uint64), compare_xids) != NULL;
}

/* Whether the batch's snapshot sees what that transaction did */
static bool
batch_sees(const MergeBatch *batch, uint64 xid)
{
	if (xid < batch->xmin)
		return true;
	if (xid >= batch->xmax)
		return false;
	return batch->nxip == 0 || !has_xid(batch->xip, batch->nxip, xid);
}

/* How many transactions had ended when the snapshot was taken, see merge.h */
static uint64
batch_order(const MergeBatch *batch)
{
	return batch->xmax - batch->nxip - (batch_sees(batch, batch->xid) ? 1 : 0);
}

/* Whether a direct change is later than what the batch read */
static bool
later_than_batch(const MergeBatch *batch, uint64 lsn, uint64 xid)
{
	if (xid == 0)
		return false;
	if (xid == batch->xid)
		return lsn > batch->lsn;
	return !batch_sees(batch, xid);
}

static int
compare_by_order(const void *a, const void *b)
{
	return compare_uint64(batch_order(*(const MergeBatch *const *) a),
						  batch_order(*(const MergeBatch *const *) b));
}

/* Describes all batches of a run; both arrays belong to the set */
void
merge_batches_init(MergeBatches *set, const MergeBatch *batch, int n)
{
	int			i;

	memset(set, 0, sizeof(MergeBatches));
	if (n == 0)
		return;

	set->n = n;
	set->batch = batch;
	set->by_order = palloc(n * sizeof(MergeBatch *));
	set->own = palloc(n * sizeof(uint64));
	for (i = 0; i < n; i++)
	{
		Assert(i == 0 || batch[i - 1].id < batch[i].id);
		set->by_order[i] = &batch[i];
		set->own[i] = batch[i].xid;
	}
	qsort(set->by_order, n, sizeof(MergeBatch *), compare_by_order);
	qsort(set->own, n, sizeof(uint64), compare_xids);
}

static int
compare_id(const void *id, const void *batch)
{
	int64		a = *(const int64 *) id;
	int64		b = ((const MergeBatch *) batch)->id;

	return (a > b) - (a < b);
}

/* The batch of that id, or NULL */
const MergeBatch *
merge_batches_find(const MergeBatches *set, int64 id)
{
	if (set->n == 0)
		return NULL;
	return bsearch(&id, set->batch, set->n, sizeof(MergeBatch), compare_id);
}

/*
 * The order below which all batches are older than a change of that xid, 0 if
 * none is.  Not for the batches' own transactions.
 */
static uint64
batches_not_seeing(const MergeBatches *set, uint64 xid)
{
	int			low = 0;
	int			high = set->n;

	while (low < high)
	{
		int			mid = low + (high - low) / 2;

		if (batch_sees(set->by_order[mid], xid))
			high = mid;
		else
			low = mid + 1;
	}
	return low == 0 ? 0 : batch_order(set->by_order[low - 1]) + 1;
}

static bool
values_equal(const MergeValue *a, const MergeValue *b)
{
	return a->type == b->type && a->len == b->len &&
		(a->len == 0 || memcmp(a->data, b->data, a->len) == 0);
}

/* Frees a value's bytes; it is then a null without any */
static void
clear_value(MergeValue *value)
{
	if (value->data != NULL)
		pfree((char *) value->data);
	memset(value, 0, sizeof(MergeValue));
}

/* Replaces a value by a copy of another, which must not be itself */
static void
copy_value(MergeValue *to, const MergeValue *from)
{
	/* a counter or timestamp mostly keeps its length, and so its memory */
	if (to->len != from->len)
	{
		clear_value(to);
		if (from->len > 0)
			to->data = palloc(from->len);
	}
	to->type = from->type;
	to->len = from->len;
	if (to->len > 0)
		memcpy((char *) to->data, from->data, to->len);
}

/* An order of names, any; 0 if a key has that name */
static int
compare_name(const MergeKey *key, const char *name, int namelen)
{
	if (key->namelen != namelen)
		return key->namelen < namelen ? -1 : 1;
	return namelen == 0 ? 0 : memcmp(key->name, name, namelen);
}

/*
 * Finds a key, with its index in *where and true; or false, with *where the
 * place in "sorted" where it belongs.
 */
static bool
find_key(const MergeEntity *entity, const char *name, int namelen, int *where)
{
	int			low = 0;
	int			high = entity->nkeys;

	/* changes mostly name the same keys in the same order */
	*where = entity->next;
	if (*where < entity->nkeys &&
		compare_name(&entity->keys[*where], name, namelen) == 0)
		return true;

	while (low < high)
	{
		int			mid = low + (high - low) / 2;
		int			cmp;

		*where = entity->sorted[mid];
		cmp = compare_name(&entity->keys[*where], name, namelen);
		if (cmp == 0)
			return true;
		if (cmp < 0)
			low = mid + 1;
		else
			high = mid;
	}
	*where = low;
	return false;
}

/* A new key of which nothing is known, at that place in "sorted" */
static int
add_key(MergeEntity *entity, const char *name, int namelen, int place)
{
	MergeKey   *key;

	if (entity->nkeys == entity->maxkeys)
	{
		entity->maxkeys *= 2;
		entity->keys = repalloc(entity->keys,
								entity->maxkeys * sizeof(MergeKey));
		entity->sorted = repalloc(entity->sorted,
								  entity->maxkeys * sizeof(int));
	}
	memmove(&entity->sorted[place + 1], &entity->sorted[place],
			(entity->nkeys - place) * sizeof(int));
	entity->sorted[place] = entity->nkeys;

	key = &entity->keys[entity->nkeys];
	memset(key, 0, sizeof(MergeKey));
	key->name = palloc(namelen + 1);
	if (namelen > 0)
		memcpy(key->name, name, namelen);
	key->name[namelen] = '\0';
	key->namelen = namelen;
	entity->bytes += namelen + sizeof(MergeKey);
	return entity->nkeys++;
}

/* The key of that name, new if need be; good until the next call */
static MergeKey *
get_key(MergeEntity *entity, const char *name, int namelen)
{
	int			i;

	if (!find_key(entity, name, namelen, &i))
		i = add_key(entity, name, namelen, i);
	entity->next = i + 1;
	return &entity->keys[i];
}

/* An entity of which nothing is known and that has not changed */
MergeEntity *
merge_begin(const MergeBatches *batches)
{
	MergeEntity *entity = palloc0(sizeof(MergeEntity));

	entity->batches = batches;
	entity->maxkeys = 8;
	entity->keys = palloc(entity->maxkeys * sizeof(MergeKey));
	entity->sorted = palloc(entity->maxkeys * sizeof(int));
	return entity;
}

/* May come after changes too; the last call for a key counts */
void
merge_profile(MergeEntity *entity, const char *name, int namelen,
			  const MergeVersion *version, const MergeValue *value)
{
	MergeKey   *key = get_key(entity, name, namelen);

	key->version = *version;
	key->known = (value != NULL);
	if (value != NULL)
		copy_value(&key->value, value);
	else
		clear_value(&key->value);
}

/* Remembers a change by a transaction that ran a bulk SELECT itself */
static void
remember_later(MergeKey *key, uint64 lsn, uint64 xid)
{
	int			i;

	/* a transaction's changes mostly come one after the other */
	for (i = key->nlater - 1; i >= 0; i--)
	{
		if (key->later[i].xid == xid)
		{
			key->later[i].lsn = Max(key->later[i].lsn, lsn);
			return;
		}
	}
	if (key->nlater == key->maxlater)
	{
		int			add = key->nlater == 0 ? 2 : key->nlater;

		key->maxlater += add;
		if (key->later == NULL)
			key->later = palloc(key->maxlater * sizeof(MergeLater));
		else
			key->later = repalloc(key->later,
								  key->maxlater * sizeof(MergeLater));
	}
	key->later[key->nlater].xid = xid;
	key->later[key->nlater].lsn = lsn;
	key->nlater++;
}

/* Keeps a copy of a value folded in */
static void
keep_value(MergeEntity *entity, MergeValue *to, const MergeValue *from)
{
	entity->bytes += from->len - to->len;
	copy_value(to, from);
}

/* Folds in a direct change: its values where newest, and what it is later than */
static void
fold_direct(MergeEntity *entity, uint64 lsn, uint64 xid,
			const MergeProperty *props, int nprops)
{
	const MergeBatches *set = entity->batches;
	int			nbatches = (set != NULL && xid != 0) ? set->n : 0;
	bool		own = nbatches > 0 && has_xid(set->own, nbatches, xid);
	uint64		later_than = 0;
	int			i;

	if (nbatches > 0 && !own)
		later_than = batches_not_seeing(set, xid);

	for (i = 0; i < nprops; i++)
	{
		MergeKey   *key = get_key(entity, props[i].name, props[i].namelen);

		if (own)
			remember_later(key, lsn, xid);
		key->later_than = Max(key->later_than, later_than);

		if (key->has_direct && lsn < key->direct_lsn)
			continue;
		key->has_direct = true;
		key->direct_lsn = lsn;
		key->direct_xid = xid;
		keep_value(entity, &key->direct, &props[i].value);
	}
}

/*
 * Folds in a batch row.  Of several for a key the one that read last stays:
 * by snapshot; with equal snapshots by the position at which the SELECT began,
 * for it may be one transaction that changed rows in between; within one
 * SELECT by the row's own position, as if sent one after the other.
 */
static void
fold_batch(MergeEntity *entity, uint64 lsn, const MergeBatch *batch,
		   const MergeProperty *props, int nprops)
{
	uint64		order = batch_order(batch);
	int			i;

	for (i = 0; i < nprops; i++)
	{
		MergeKey   *key = get_key(entity, props[i].name, props[i].namelen);

		if (key->batch != NULL)
		{
			int			cmp = compare_uint64(order, key->batch_order);

			if (cmp == 0)
				cmp = compare_uint64(batch->lsn, key->batch->lsn);
			if (cmp == 0)
				cmp = compare_uint64(lsn, key->batch_lsn);
			if (cmp < 0)
				continue;
		}
		key->batch = batch;
		key->batch_order = order;
		key->batch_lsn = lsn;
		keep_value(entity, &key->batched, &props[i].value);
	}
}

/* batch must be one of those the entity was begun with */
void
merge_change(MergeEntity *entity, uint64 lsn, uint64 xid,
			 const MergeBatch *batch, const MergeProperty *props, int nprops)
{
	entity->next = 0;
	if (entity->too_much)
		return;
	if (batch == NULL)
		fold_direct(entity, lsn, xid, props, nprops);
	else
		fold_batch(entity, lsn, batch, props, nprops);
	entity->too_much = entity->nkeys > MERGE_MAX_KEYS || entity->bytes > MERGE_MAX_BYTES;
}

/*
 * Whether the newest batch row of a key is to be believed: no batch that read
 * later was applied before, and nothing is later than what it read.  A batch
 * row that read earlier need not be asked then, it sees even less.
 */
static bool
batch_applies(const MergeKey *key)
{
	int			i;

	if (key->batch == NULL ||
		key->batch_order < key->version.order ||
		key->batch_order < key->later_than ||
		later_than_batch(key->batch, key->version.lsn, key->version.xid))
		return false;
	for (i = 0; i < key->nlater; i++)
	{
		if (later_than_batch(key->batch, key->later[i].lsn, key->later[i].xid))
			return false;
	}
	return true;
}

/*
 * Whether the bulk SELECT that was applied last has seen the newest direct
 * change: one that was not at hand then, but among the dead letters.  If its
 * record is gone, positions decide; so they do while the value is unknown, for
 * the SELECT's own row may be among the dead letters now.
 */
static bool
superseded(const MergeBatches *set, const MergeKey *key)
{
	uint64		order = key->version.order;
	int			low = 0;
	int			high = set != NULL ? set->n : 0;
	int			i;

	while (low < high)
	{
		int			mid = low + (high - low) / 2;

		if (batch_order(set->by_order[mid]) < order)
			low = mid + 1;
		else
			high = mid;
	}
	for (i = low; set != NULL && i < set->n && batch_order(set->by_order[i]) == order; i++)
	{
		if (later_than_batch(set->by_order[i], key->direct_lsn, key->direct_xid))
			return false;
	}
	return i > low;
}

/* Decides one key */
static void
decide_key(const MergeBatches *set, MergeKey *key)
{
	const MergeVersion *v = &key->version;
	const MergeValue *winner = NULL;

	key->send = false;
	key->after = *v;
	if (batch_applies(key))
	{
		/* it supersedes all direct changes at hand, the newest included */
		winner = &key->batched;
		if (key->has_direct &&
			(key->direct_lsn > v->lsn ||
			 (key->direct_lsn == v->lsn && key->direct_xid > v->xid)))
		{
			key->after.lsn = key->direct_lsn;
			key->after.xid = key->direct_xid;
		}
		key->after.order = key->batch_order;
	}
	else if (key->has_direct &&
			 (key->direct_lsn > v->lsn ||
			  (key->direct_lsn == v->lsn && !key->known)) &&
			 !(key->known && superseded(set, key)))
	{
		winner = &key->direct;
		key->after.lsn = key->direct_lsn;
		key->after.xid = key->direct_xid;
	}
	key->changed = key->after.lsn != v->lsn || key->after.xid != v->xid ||
		key->after.order != v->order;

	/* what is already there is not sent; an unknown value equals nothing */
	if (winner != NULL && !(key->known && values_equal(winner, &key->value)))
	{
		key->send = true;
		key->sending = *winner;
	}
}

static void
leave_key(MergeKey *key)
{
	key->send = false;
	key->after = key->version;
	key->changed = false;
}

/* "sending" points into the entity: good until the next change is folded in */
int
merge_finish(MergeEntity *entity)
{
	int			nsend = 0;
	int			nproperties = 0;
	int64		bytes = 0;		/* of the profile that it leads to */
	int			i;

	entity->more = false;
	for (i = 0; i < entity->nkeys; i++)
	{
		MergeKey   *key = &entity->keys[i];

		decide_key(entity->batches, key);
		if (key->send && key->namelen > 0 && ++nproperties > USERPILOT_MAX_PROPERTIES)
		{
			leave_key(key);
			entity->more = true;
		}
		nsend += key->send ? 1 : 0;
		bytes += key->namelen + (key->send ? key->sending.len : key->known ? key->value.len : 0);
	}
	/* what is there stays, whatever its size */
	if (nsend > 0 && (entity->nkeys > MERGE_MAX_KEYS || bytes > MERGE_MAX_BYTES))
		entity->too_much = true;
	return nsend;
}

/*
 * The profile to store before the body leaves.  Believing the old value or
 * the new one while the outcome is open would let an equal one go unsent.
 */
void
merge_mark(MergeEntity *entity)
{
	int			i;

	for (i = 0; i < entity->nkeys; i++)
	{
		MergeKey   *key = &entity->keys[i];

		key->version = key->after;
		if (key->send)
		{
			key->known = false;
			clear_value(&key->value);
		}
	}
}

/* The profile once the body that was marked is acknowledged */
void
merge_learn(MergeEntity *entity)
{
	int			i;

	for (i = 0; i < entity->nkeys; i++)
	{
		MergeKey   *key = &entity->keys[i];

		if (key->send)
		{
			key->known = true;
			copy_value(&key->value, &key->sending);
		}
	}
}

void
merge_free(MergeEntity *entity)
{
	int			i;

	for (i = 0; i < entity->nkeys; i++)
	{
		MergeKey   *key = &entity->keys[i];

		clear_value(&key->value);
		clear_value(&key->direct);
		clear_value(&key->batched);
		if (key->later != NULL)
			pfree(key->later);
		pfree(key->name);
	}
	pfree(entity->sorted);
	pfree(entity->keys);
	pfree(entity);
}

#ifdef FRONTEND

/* Frees what merge_batches_init allocated */
void
merge_batches_free(MergeBatches *set)
{
	if (set->n > 0)
	{
		pfree(set->by_order);
		pfree(set->own);
	}
	memset(set, 0, sizeof(MergeBatches));
}

#endif
