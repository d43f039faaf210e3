/*
 * profiles_read.c
 *	  Profiles as the merge needs them.
 *
 * Through the access methods, as in known.c: it is one look-up a key whatever
 * the statistics say, and someone waits for a call's.
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/stratnum.h"
#include "access/table.h"
#include "access/tableam.h"
#include "catalog/pg_collation.h"
#include "catalog/pg_type.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/jsonb.h"
#include "utils/numeric.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "payload.h"
#include "profiles_table.h"
#include "sql.h"

const SqlColumn profiles_columns[PROFILE_NCOLUMNS] = {
	{"server", TEXTOID}, {"kind", TEXTOID}, {"entity_id", TEXTOID},
	{"company_id", TEXTOID}, {"metadata", JSONBOID}, {"versions", JSONBOID},
	{"attempts", INT4OID}, {"synced_at", TIMESTAMPTZOID},
	{"believed_since", TIMESTAMPTZOID}, {"job", INT8OID}
};

static uint64
value_uint64(const JsonbValue *v)
{
	if (v->type != jbvNumeric)
		return 0;
	return strtoull(DatumGetCString(DirectFunctionCall1(numeric_out,
														NumericGetDatum(v->val.numeric))), NULL, 10);
}

/* A key's value in metadata, if it is known */
static bool
known_value(Jsonb *metadata, text *company, const char *name, int len,
			MergeValue *value)
{
	JsonbValue	v;

	if (len == 0)
	{
		if (company == NULL)
			return false;
		value->type = MERGE_STRING;
		value->data = VARDATA_ANY(company);
		value->len = VARSIZE_ANY_EXHDR(company);
		return true;
	}
	return getKeyJsonValueFromContainer(&metadata->root, name, len, &v) != NULL &&
		payload_to_merge(&v, value);
}

/* Every known property gets the entry without keys' version first; entries
 * that name keys then overrule it */
static void
read_common(MergeEntity *entity, Jsonb *metadata, text *company,
			const MergeVersion *common)
{
	static const MergeVersion zero = {0, 0, 0};
	JsonbIterator *it = JsonbIteratorInit(&metadata->root);
	JsonbValue	v;
	MergeValue	value;

	(void) JsonbIteratorNext(&it, &v, false);
	while (JsonbIteratorNext(&it, &v, true) == WJB_KEY)
	{
		const char *name = v.val.string.val;
		int			len = v.val.string.len;

		(void) JsonbIteratorNext(&it, &v, true);
		if (payload_to_merge(&v, &value))
			merge_profile(entity, name, len, common, &value);
	}
	if (company != NULL && known_value(metadata, company, "", 0, &value))
		merge_profile(entity, MERGE_COMPANY_KEY, 0, &zero, &value);
}

static MergeVersion
read_version(const JsonbContainer *entry)
{
	uint64		n[3] = {0};

	for (int i = 0; i < 3; i++)
	{
		JsonbValue *v = getIthJsonbValueFromContainer((JsonbContainer *) entry, i);

		if (v != NULL)
			n[i] = value_uint64(v);
	}
	return (MergeVersion) {n[0], n[1], n[2]};
}

static void
read_profile(MergeEntity *entity, Jsonb *metadata, text *company, Jsonb *versions)
{
	uint32		nentries = JB_ROOT_COUNT(versions);
	MergeVersion common = {0, 0, 0};

	for (uint32 i = 0; i < nentries; i++)
	{
		JsonbValue *entry = getIthJsonbValueFromContainer(&versions->root, i);

		if (entry->type == jbvBinary && JsonContainerSize(entry->val.binary.data) == 3)
			common = read_version(entry->val.binary.data);
	}
	read_common(entity, metadata, company, &common);

	for (uint32 i = 0; i < nentries; i++)
	{
		JsonbValue *entry = getIthJsonbValueFromContainer(&versions->root, i);
		MergeVersion version;

		if (entry->type != jbvBinary)
			continue;
		version = read_version(entry->val.binary.data);
		for (uint32 j = 3; j < JsonContainerSize(entry->val.binary.data); j++)
		{
			JsonbValue *name = getIthJsonbValueFromContainer(entry->val.binary.data, j);
			MergeValue	value;
			bool		known;

			if (name->type != jbvString)
				continue;
			known = known_value(metadata, company, name->val.string.val,
								name->val.string.len, &value);
			merge_profile(entity, name->val.string.val, name->val.string.len,
						  &version, known ? &value : NULL);
		}
	}
}

/* Spread over the last quarter of the time, so that what was sent together
 * does not all come back together */
bool
profiles_expired(EntityKey key, TimestampTz believed_since, int64 refresh_after,
				 TimestampTz now)
{
	int64		age = now - believed_since;
	int64		limit = refresh_after * USECS_PER_SEC;

	if (age <= limit / 4 * 3)
		return false;
	return age > limit * (0.75 + 0.25 * (entity_hash(key) / (double) PG_UINT32_MAX));
}

static void
forget_values(MergeEntity *entity)
{
	for (int i = 0; i < entity->nkeys; i++)
		entity->keys[i].known = false;
}

Relation
profiles_open_index(Relation rel)
{
	static const int columns[PROFILE_NKEYS] = {PROFILE_ENTITY, PROFILE_KIND, PROFILE_SERVER};
	Relation	index = index_open(sql_relid("userpilot_profiles_pkey"), AccessShareLock);
	Form_pg_index form = index->rd_index;
	bool		good = form->indrelid == RelationGetRelid(rel) && form->indisvalid &&
		form->indnkeyatts == PROFILE_NKEYS;

	for (int i = 0; good && i < PROFILE_NKEYS; i++)
		good = form->indkey.values[i] == columns[i] + 1;
	if (!good)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("index userpilot_profiles_pkey is not what this version of userpilot expects"),
				 errhint("It is to be the primary key of userpilot_profiles: (entity_id, kind, server).")));
	return index;
}

void
profiles_key(ScanKey keys, int column, text *value)
{
	ScanKeyEntryInitialize(&keys[column], 0, column + 1, BTEqualStrategyNumber, InvalidOid,
						   C_COLLATION_OID, F_TEXTEQ, PointerGetDatum(value));
}

static void
read_slot(Profile *profile, TupleTableSlot *slot, int64 refresh_after)
{
	Datum	   *d = slot->tts_values;
	bool	   *isnull = slot->tts_isnull;

	slot_getallattrs(slot);
	profile->attempts = DatumGetInt32(d[PROFILE_ATTEMPTS]);
	profile->exists = !isnull[PROFILE_SYNCED];
	profile->job = isnull[PROFILE_JOB] ? 0 : DatumGetInt64(d[PROFILE_JOB]);
	read_profile(profile->merge, DatumGetJsonbP(d[PROFILE_METADATA]),
				 isnull[PROFILE_COMPANY] ? NULL : DatumGetTextPP(d[PROFILE_COMPANY]),
				 DatumGetJsonbP(d[PROFILE_VERSIONS]));
	if (!isnull[PROFILE_BELIEVED] &&
		profiles_expired(profile->key, DatumGetTimestampTz(d[PROFILE_BELIEVED]), refresh_after,
						 GetCurrentTimestamp()))
		forget_values(profile->merge);
}

void
profiles_read(const char *server, int64 refresh_after, Profile **profiles, int n)
{
	Relation	rel;
	Relation	index;
	TupleTableSlot *slot;
	IndexScanDesc scan;
	ScanKeyData keys[PROFILE_NKEYS];

	if (n == 0)
		return;
	rel = table_open(sql_relid("userpilot_profiles"), AccessShareLock);
	sql_check_columns(rel, profiles_columns, PROFILE_NCOLUMNS);
	index = profiles_open_index(rel);
	slot = table_slot_create(rel, NULL);
	scan = compat_index_beginscan(rel, index, GetActiveSnapshot(), PROFILE_NKEYS);
	profiles_key(keys, PROFILE_KEY_KIND, cstring_to_text(userpilot_kind_name(profiles[0]->key.kind)));
	profiles_key(keys, PROFILE_KEY_SERVER, cstring_to_text(server));
	for (int i = 0; i < n; i++)
	{
		MemoryContext old = MemoryContextSwitchTo(profiles[i]->context);

		profiles_key(keys, PROFILE_KEY_ENTITY,
					 cstring_to_text_with_len(profiles[i]->key.id, profiles[i]->key.len));
		index_rescan(scan, keys, PROFILE_NKEYS, NULL, 0);
		if (index_getnext_slot(scan, ForwardScanDirection, slot))
			read_slot(profiles[i], slot, refresh_after);
		MemoryContextSwitchTo(old);
	}
	index_endscan(scan);
	ExecDropSingleTupleTableSlot(slot);
	index_close(index, NoLock);
	table_close(rel, NoLock);
}
