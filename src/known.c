/*
 * known.c
 *	  What a bulk SELECT may leave out because Userpilot has it.
 *
 * A row is left out if its entity's profile says the same of each of its keys
 * and nothing of the entity is queued, dead or under way: what is on its way
 * could still overwrite the value that the profile shows.
 *
 * Leaving a row out leaves no trace, so an older bulk SELECT that comes to an
 * end later would not be known to be older.  Therefore nothing is left out
 * while one may be there: an open transaction that has queued a bulk SELECT
 * (each announces itself by a lock), or any snapshot that is older than ours,
 * since its owner may still begin one.  Such snapshots are waited for, but
 * briefly; if they stay, all is queued, and the worker leaves it out instead.
 *
 * Tables are read through the access methods: a look-up costs a microsecond,
 * and callers need no privilege on them.
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/table.h"
#include "access/tableam.h"
#include "miscadmin.h"
#include "storage/bufmgr.h"
#include "storage/lmgr.h"
#include "storage/lock.h"
#include "storage/proc.h"
#include "storage/procarray.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/numeric.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "known.h"
#include "profiles_table.h"
#include "queue_table.h"
#include "sql.h"

/* How long older snapshots are waited for (ms) */
#define PATIENCE_MS 200

/* More entities under way than this are not remembered one by one */
#define MAX_UNDER_WAY 500000

typedef struct UnderWay
{
	uint64		hash;
	char		status;
} UnderWay;

#define SH_PREFIX underway
#define SH_ELEMENT_TYPE UnderWay
#define SH_KEY_TYPE uint64
#define SH_KEY hash
#define SH_HASH_KEY(tb, key) ((uint32) (key))
#define SH_EQUAL(tb, a, b) ((a) == (b))
#define SH_SCOPE static inline pg_attribute_unused()
#define SH_DECLARE
#define SH_DEFINE
#include "lib/simplehash.h"

struct Known
{
	text	   *server;
	UserpilotKind kind;
	int64		refresh_after;
	underway_hash *underway;
	bool		underway_read;	/* what was under way at first is in it */
	bool		all_underway;	/* too many to remember */
};

/* -------------------------------------------------------- may it be done */

/*
 * Whether all these transactions have ended, or do so soon.  One that was
 * waited for in vain is not waited for again, or each statement of a loop would
 * take that long.
 */
static bool
wait_for(const VirtualTransactionId *vxids, int n)
{
	static VirtualTransactionId stays = {0};
	TimestampTz deadline = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), PATIENCE_MS);

	for (int i = 0; i < n; i++)
	{
		if (VirtualTransactionIdEquals(vxids[i], stays))
			return false;
	}
	for (int i = 0; i < n; i++)
	{
		while (!VirtualXactLock(vxids[i], false))
		{
			CHECK_FOR_INTERRUPTS();
			if (GetCurrentTimestamp() >= deadline)
			{
				stays = vxids[i];
				return false;
			}
			pg_usleep(1000);
		}
	}
	return true;
}

bool
known_may_leave_out(const EnvironmentRef *server, UserpilotKind kind)
{
	VirtualTransactionId *vxids;
	LOCKTAG		tag;
	int			n;

	/* shared with no other use of the lock: nobody else locks such an object */
	SET_LOCKTAG_OBJECT(tag, MyDatabaseId, sql_relid("userpilot_batches"),
					   server->serverid, kind);
	(void) LockAcquire(&tag, RowExclusiveLock, false, false);

	vxids = GetCurrentVirtualXIDs(GetActiveSnapshot()->xmin, true, false,
								  PROC_IS_AUTOVACUUM | PROC_IN_VACUUM, &n);
	if (!wait_for(vxids, n))
		return false;
	(void) GetLockConflicts(&tag, ShareLock, &n);
	return n == 0;
}

/* ----------------------------------------------------- what is under way */

static uint64
hash_id(text *id)
{
	return hash_bytes_extended((const unsigned char *) VARDATA_ANY(id),
							   VARSIZE_ANY_EXHDR(id), 0);
}

static bool
text_is(Datum value, const char *str, Size len)
{
	text	   *value_text = DatumGetTextPP(value);

	return VARSIZE_ANY_EXHDR(value_text) == len && memcmp(VARDATA_ANY(value_text), str, len) == 0;
}

static void
set_under_way(Known *known, text *id)
{
	bool		found;

	if (known->all_underway)
		return;
	(void) underway_insert(known->underway, hash_id(id), &found);
	known->all_underway = known->underway->members > MAX_UNDER_WAY;
}

/* Notes the entities of a table that are this server's and of this kind */
static void
note_under_way(Known *known, const char *table, Snapshot snapshot)
{
	Relation	rel = table_open(sql_relid(table), AccessShareLock);
	AttrNumber	server = get_attnum(RelationGetRelid(rel), "server");
	AttrNumber	kind = get_attnum(RelationGetRelid(rel), "kind");
	AttrNumber	entity = get_attnum(RelationGetRelid(rel), "entity_id");
	const char *kind_name = userpilot_kind_name(known->kind);
	TupleTableSlot *slot = table_slot_create(rel, NULL);
	TableScanDesc scan = table_beginscan(rel, snapshot, 0, NULL);
	bool		isnull;

	while (!known->all_underway && table_scan_getnextslot(scan, ForwardScanDirection, slot))
	{
		CHECK_FOR_INTERRUPTS();
		if (!text_is(slot_getattr(slot, kind, &isnull), kind_name, strlen(kind_name)) ||
			!text_is(slot_getattr(slot, server, &isnull), VARDATA_ANY(known->server),
					 VARSIZE_ANY_EXHDR(known->server)))
			continue;
		set_under_way(known, DatumGetTextPP(slot_getattr(slot, entity, &isnull)));
	}
	table_endscan(scan);
	ExecDropSingleTupleTableSlot(slot);
	table_close(rel, NoLock);
}

Known *
known_open(const EnvironmentRef *server, UserpilotKind kind)
{
	Known	   *known = palloc0(sizeof(Known));

	known->server = server->name;
	known->kind = kind;
	known->refresh_after = server->refresh_after;
	known->underway = underway_create(CurrentMemoryContext, 256, NULL);
	return known;
}

/*
 * Whether something of the entity is under way.  The tables are read when
 * first asked, with the snapshot that the profile was read with: later, what
 * has arrived in between would be missed.
 */
static bool
is_under_way(Known *known, text *id, Snapshot snapshot)
{
	if (known->all_underway)
		return true;
	if (!known->underway_read)
	{
		note_under_way(known, "userpilot_queue", snapshot);
		note_under_way(known, "userpilot_dead_letters", snapshot);
		known->underway_read = true;
	}
	return known->all_underway ||
		(known->underway->members > 0 && underway_lookup(known->underway, hash_id(id)));
}

/* ---------------------------------------------------------------- judging */

static bool
same_scalar(const JsonbValue *a, const JsonbValue *b)
{
	if (a->type != b->type)
		return false;
	switch (a->type)
	{
		case jbvNull:
			return true;
		case jbvBool:
			return a->val.boolean == b->val.boolean;
		case jbvNumeric:
			return DatumGetBool(DirectFunctionCall2(numeric_eq,
													NumericGetDatum(a->val.numeric),
													NumericGetDatum(b->val.numeric)));
		case jbvString:
			return a->val.string.len == b->val.string.len &&
				memcmp(a->val.string.val, b->val.string.val, a->val.string.len) == 0;
		default:
			return false;
	}
}

/* Whether each key of one is in the other, with the same value */
static bool
contained(Jsonb *metadata, Jsonb *profile)
{
	JsonbIterator *it;
	JsonbValue	name;
	JsonbValue	value;

	if (VARSIZE(metadata) == VARSIZE(profile) &&
		memcmp(metadata, profile, VARSIZE(metadata)) == 0)
		return true;
	if (JB_ROOT_COUNT(metadata) > JB_ROOT_COUNT(profile))
		return false;
	it = JsonbIteratorInit(&metadata->root);
	(void) JsonbIteratorNext(&it, &name, false);
	while (JsonbIteratorNext(&it, &name, true) == WJB_KEY)
	{
		JsonbValue	buf;
		JsonbValue *other = getKeyJsonValueFromContainer(&profile->root, name.val.string.val,
														 name.val.string.len, &buf);

		(void) JsonbIteratorNext(&it, &value, true);
		if (other == NULL || !same_scalar(&value, other))
			return false;
	}
	return true;
}

static bool
same_company(const QueueChange *change, Datum company, bool isnull)
{
	if (change->company_id == NULL)
		return true;
	return !isnull && text_is(company, VARDATA_ANY(change->company_id),
							  VARSIZE_ANY_EXHDR(change->company_id));
}

static KnownVerdict
judge(const Known *known, const QueueChange *change, TupleTableSlot *slot, TimestampTz now)
{
	EntityKey	key = {known->kind, VARSIZE_ANY_EXHDR(change->entity_id),
	VARDATA_ANY(change->entity_id)};
	const Datum *d = slot->tts_values;
	const bool *isnull = slot->tts_isnull;
	Jsonb	   *metadata;
	bool		same;

	slot_getallattrs(slot);
	if (isnull[PROFILE_SYNCED])
		return KNOWN_NEW;
	if (!isnull[PROFILE_JOB] || DatumGetInt32(d[PROFILE_ATTEMPTS]) > 0 ||
		(!isnull[PROFILE_BELIEVED] &&
		 profiles_expired(key, DatumGetTimestampTz(d[PROFILE_BELIEVED]), known->refresh_after, now)) ||
		!same_company(change, d[PROFILE_COMPANY], isnull[PROFILE_COMPANY]))
		return KNOWN_CHANGED;
	metadata = DatumGetJsonbP(d[PROFILE_METADATA]);
	same = contained(change->metadata, metadata);
	if ((Pointer) metadata != DatumGetPointer(d[PROFILE_METADATA]))
		pfree(metadata);
	return same ? KNOWN_UNCHANGED : KNOWN_CHANGED;
}

/*
 * Profiles mostly lie in the order in which their rows are read: the table's,
 * as it was when they were first sent.  So the one after the last one found is
 * tried before the index, which takes several times longer.
 */
static bool
is_next(const Known *known, IndexScanDesc scan, ItemPointer next, const QueueChange *change,
		TupleTableSlot *slot)
{
	ItemPointerData tid = *next;	/* becomes that of the version fetched */
	bool		again = false;
	bool		dead = false;
	bool		isnull;

	if (!ItemPointerIsValid(next) ||
		!table_index_fetch_tuple(scan->xs_heapfetch, &tid, scan->xs_snapshot, slot, &again, &dead))
		return false;
	return text_is(slot_getattr(slot, PROFILE_ENTITY + 1, &isnull),
				   VARDATA_ANY(change->entity_id), VARSIZE_ANY_EXHDR(change->entity_id)) &&
		text_is(slot_getattr(slot, PROFILE_KIND + 1, &isnull),
				userpilot_kind_name(known->kind), strlen(userpilot_kind_name(known->kind))) &&
		text_is(slot_getattr(slot, PROFILE_SERVER + 1, &isnull),
				VARDATA_ANY(known->server), VARSIZE_ANY_EXHDR(known->server));
}

static bool
find_profile(const Known *known, IndexScanDesc scan, ScanKey keys, ItemPointer next,
			 const QueueChange *change, TupleTableSlot *slot)
{
	ItemPointer tid;
	bool		found = is_next(known, scan, next, change, slot);

	if (!found)
	{
		ItemPointerSetInvalid(next);
		index_rescan(scan, keys, PROFILE_NKEYS, NULL, 0);
		while (!found && (tid = index_getnext_tid(scan, ForwardScanDirection)) != NULL)
		{
			*next = *tid;
			found = index_fetch_heap(scan, slot);
		}
	}
	if (found)
		ItemPointerSetOffsetNumber(next, OffsetNumberNext(ItemPointerGetOffsetNumber(next)));
	return found;
}

void
known_judge(Known *known, const QueueChange *changes, int n, KnownVerdict *verdicts)
{
	Relation	rel = table_open(sql_relid("userpilot_profiles"), AccessShareLock);
	Relation	index = profiles_open_index(rel);
	TupleTableSlot *slot = table_slot_create(rel, NULL);
	Snapshot	snapshot = RegisterSnapshot(GetLatestSnapshot());
	IndexScanDesc scan = compat_index_beginscan(rel, index, snapshot, PROFILE_NKEYS);
	TimestampTz now = GetCurrentTimestamp();
	ScanKeyData keys[PROFILE_NKEYS];
	ItemPointerData next;
	/* as before a first load; after the snapshot, so that all it sees is there */
	bool		empty = RelationGetNumberOfBlocks(rel) == 0;

	sql_check_columns(rel, profiles_columns, PROFILE_NCOLUMNS);
	for (int i = 0; i < n; i++)
		verdicts[i] = KNOWN_NEW;
	ItemPointerSetInvalid(&next);
	profiles_key(keys, PROFILE_KEY_KIND, queue_kind_text(known->kind));
	profiles_key(keys, PROFILE_KEY_SERVER, known->server);
	for (int i = 0; i < n && !empty; i++)
	{
		CHECK_FOR_INTERRUPTS();
		profiles_key(keys, PROFILE_KEY_ENTITY, changes[i].entity_id);
		if (find_profile(known, scan, keys, &next, &changes[i], slot))
			verdicts[i] = judge(known, &changes[i], slot, now);
		if (verdicts[i] == KNOWN_UNCHANGED &&
			is_under_way(known, changes[i].entity_id, snapshot))
			verdicts[i] = KNOWN_CHANGED;
		/* a later row of the entity must not be left out for what it had before;
		 * one that is new can only have got a profile by something newer */
		if (verdicts[i] == KNOWN_CHANGED)
			set_under_way(known, changes[i].entity_id);
	}
	index_endscan(scan);
	UnregisterSnapshot(snapshot);
	ExecDropSingleTupleTableSlot(slot);
	index_close(index, NoLock);
	table_close(rel, NoLock);
}
