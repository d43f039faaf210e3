/*
 * profiles_write.c
 *	  Profiles as the merge leaves them, and what a job's records say.
 *
 * "versions" says which change wrote each key, compactly: a list of
 * [lsn, xid, order, keys...]; the one entry without keys is for every known
 * property that no other entry names.  So a profile whose keys were all
 * written by one change, the common case, has one short entry.
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/tableam.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"
#include "utils/memutils.h"
#include "utils/numeric.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "payload.h"
#include "profiles_table.h"
#include "row_writer.h"

/* ------------------------------------------------------------- versions */

static JsonbValue
uint64_value(uint64 n)
{
	JsonbValue	v;

	v.type = jbvNumeric;
	if (n <= PG_INT64_MAX)
		v.val.numeric = int64_to_numeric((int64) n);
	else
		v.val.numeric = DatumGetNumeric(DirectFunctionCall3(numeric_in,
															CStringGetDatum(psprintf(UINT64_FORMAT, n)),
															ObjectIdGetDatum(InvalidOid),
															Int32GetDatum(-1)));
	return v;
}

static bool
same_version(const MergeVersion *a, const MergeVersion *b)
{
	return a->lsn == b->lsn && a->xid == b->xid && a->order == b->order;
}

static bool
version_is_zero(const MergeVersion *v)
{
	return v->lsn == 0 && v->xid == 0 && v->order == 0;
}

static void
push_version(JsonbParseState **state, const MergeVersion *v)
{
	JsonbValue	n;

	pushJsonbValue(state, WJB_BEGIN_ARRAY, NULL);
	n = uint64_value(v->lsn);
	pushJsonbValue(state, WJB_ELEM, &n);
	n = uint64_value(v->xid);
	pushJsonbValue(state, WJB_ELEM, &n);
	n = uint64_value(v->order);
	pushJsonbValue(state, WJB_ELEM, &n);
}

/* The version most known properties share goes into the entry without keys:
 * that of the first known property, which is it nearly always */
static const MergeVersion *
common_version(const MergeEntity *entity)
{
	for (int i = 0; i < entity->nkeys; i++)
	{
		const MergeKey *key = &entity->keys[i];

		if (key->known && key->namelen > 0 && !version_is_zero(&key->version))
			return &key->version;
	}
	return NULL;
}

static bool
in_common(const MergeKey *key, const MergeVersion *common)
{
	return common != NULL && key->known && key->namelen > 0 &&
		same_version(&key->version, common);
}

static Jsonb *
versions_build(const MergeEntity *entity)
{
	const MergeVersion *common = common_version(entity);
	JsonbParseState *state = NULL;
	bool	   *done = palloc0(sizeof(bool) * Max(entity->nkeys, 1));

	pushJsonbValue(&state, WJB_BEGIN_ARRAY, NULL);
	if (common != NULL)
	{
		push_version(&state, common);
		pushJsonbValue(&state, WJB_END_ARRAY, NULL);
	}
	for (int i = 0; i < entity->nkeys; i++)
	{
		const MergeVersion *v = &entity->keys[i].version;

		/* a known key of version zero must be named, or it would be common's */
		if (done[i] || in_common(&entity->keys[i], common) ||
			(version_is_zero(v) && !entity->keys[i].known))
			continue;
		push_version(&state, v);
		for (int j = i; j < entity->nkeys; j++)
		{
			const MergeKey *key = &entity->keys[j];
			JsonbValue	name;

			if (done[j] || in_common(key, common) || !same_version(&key->version, v) ||
				(version_is_zero(v) && !key->known))
				continue;
			done[j] = true;
			name.type = jbvString;
			name.val.string.val = key->name;
			name.val.string.len = key->namelen;
			pushJsonbValue(&state, WJB_ELEM, &name);
		}
		pushJsonbValue(&state, WJB_END_ARRAY, NULL);
	}
	return JsonbValueToJsonb(pushJsonbValue(&state, WJB_END_ARRAY, NULL));
}

/* Known properties as jsonb, or those of them just sent; the company is a
 * column */
static Jsonb *
metadata_build(const MergeEntity *entity, bool sent_only)
{
	JsonbParseState *state = NULL;

	pushJsonbValue(&state, WJB_BEGIN_OBJECT, NULL);
	for (int i = 0; i < entity->nkeys; i++)
	{
		const MergeKey *key = &entity->keys[i];
		JsonbValue	name;
		JsonbValue	value;

		if (!key->known || key->namelen == 0 || (sent_only && !key->send))
			continue;
		name.type = jbvString;
		name.val.string.val = key->name;
		name.val.string.len = key->namelen;
		payload_from_merge(&key->value, &value);
		pushJsonbValue(&state, WJB_KEY, &name);
		pushJsonbValue(&state, WJB_VALUE, &value);
	}
	return JsonbValueToJsonb(pushJsonbValue(&state, WJB_END_OBJECT, NULL));
}

static text *
company_build(const MergeEntity *entity, bool sent_only)
{
	for (int i = 0; i < entity->nkeys; i++)
	{
		const MergeKey *key = &entity->keys[i];

		if (key->namelen == 0 && key->known && (key->send || !sent_only) && key->value.type == MERGE_STRING)
			return cstring_to_text_with_len(key->value.data, key->value.len);
	}
	return NULL;
}

/* ---------------------------------------------------------------- write */

typedef struct Writer
{
	RowWriter	rows;
	Relation	index;
	MemoryContext per_row;
} Writer;

static void
open_writer(Writer *writer)
{
	row_writer_open(&writer->rows, "userpilot_profiles", profiles_columns, PROFILE_NCOLUMNS);
	writer->index = profiles_open_index(writer->rows.rel);
	writer->per_row = AllocSetContextCreate(CurrentMemoryContext, "userpilot profile",
											ALLOCSET_DEFAULT_SIZES);
}

static void
close_writer(Writer *writer)
{
	index_close(writer->index, NoLock);
	row_writer_close(&writer->rows);
	MemoryContextDelete(writer->per_row);
}

/* Adds what was sent: the rest may have been made unknown meanwhile */
static void
set_learned(RowWriter *rows, Datum metadata, text *company)
{
	TupleTableSlot *stored = rows->stored;
	Datum		now = TimestampTzGetDatum(GetCurrentTimestamp());

	row_set(rows, PROFILE_SYNCED, now);
	row_set(rows, PROFILE_BELIEVED, now);
	row_keep(rows, PROFILE_BELIEVED);
	row_keep(rows, PROFILE_COMPANY);
	if (company != NULL)
		row_set(rows, PROFILE_COMPANY, PointerGetDatum(company));
	row_set(rows, PROFILE_METADATA, TTS_EMPTY(stored) ? metadata :
		DirectFunctionCall2(jsonb_concat, stored->tts_values[PROFILE_METADATA], metadata));
	row_keep(rows, PROFILE_VERSIONS);
}

static void
set_merged(RowWriter *rows, const MergeEntity *merge)
{
	Jsonb	   *metadata = metadata_build(merge, false);
	text	   *company = company_build(merge, false);

	row_keep(rows, PROFILE_SYNCED);
	if (company != NULL)
		row_set(rows, PROFILE_COMPANY, PointerGetDatum(company));
	if (company != NULL || JB_ROOT_COUNT(metadata) > 0)
		row_keep(rows, PROFILE_BELIEVED);
	row_set(rows, PROFILE_METADATA, JsonbPGetDatum(metadata));
}

/*
 * The row as it is now, locked, in "stored"; false: there is none.  What others
 * are doing to it, by hand or in userpilot_retry(), is waited for.
 */
static bool
lock_stored(Writer *writer)
{
	TupleTableSlot *row = writer->rows.row;
	TupleTableSlot *stored = writer->rows.stored;
	Snapshot	snapshot = RegisterSnapshot(GetLatestSnapshot());
	IndexScanDesc scan = compat_index_beginscan(writer->rows.rel, writer->index, snapshot, PROFILE_NKEYS);
	ScanKeyData keys[PROFILE_NKEYS];
	bool		found;

	profiles_key(keys, PROFILE_KEY_ENTITY, DatumGetTextPP(row->tts_values[PROFILE_ENTITY]));
	profiles_key(keys, PROFILE_KEY_KIND, DatumGetTextPP(row->tts_values[PROFILE_KIND]));
	profiles_key(keys, PROFILE_KEY_SERVER, DatumGetTextPP(row->tts_values[PROFILE_SERVER]));
	index_rescan(scan, keys, PROFILE_NKEYS, NULL, 0);
	found = index_getnext_slot(scan, ForwardScanDirection, stored);
	index_endscan(scan);
	if (found)
	{
		ItemPointerData tid = stored->tts_tid;
		TM_FailureData failure;
		TM_Result	result;

		result = table_tuple_lock(writer->rows.rel, &tid, snapshot, stored, GetCurrentCommandId(false),
								  LockTupleNoKeyExclusive, LockWaitBlock,
								  TUPLE_LOCK_FLAG_FIND_LAST_VERSION, &failure);
		if (result != TM_Ok && result != TM_Deleted)
			elog(ERROR, "could not lock a row of userpilot_profiles: result %d", (int) result);
		found = result == TM_Ok;
	}
	UnregisterSnapshot(snapshot);
	if (found)
		slot_getallattrs(stored);
	else
		ExecClearTuple(stored);
	return found;
}

/* Whose row is to be written; whether it is there: see lock_stored() */
static bool
begin_row(Writer *writer, const char *server, UserpilotKind kind, const char *id, int len)
{
	RowWriter  *rows = &writer->rows;

	row_begin(rows);
	row_set(rows, PROFILE_SERVER, CStringGetTextDatum(server));
	row_set(rows, PROFILE_KIND, CStringGetTextDatum(userpilot_kind_name(kind)));
	row_set(rows, PROFILE_ENTITY, PointerGetDatum(cstring_to_text_with_len(id, len)));
	return lock_stored(writer);
}

static void
write_one(Writer *writer, const char *server, const Profile *profile, ProfileStep step)
{
	RowWriter  *rows = &writer->rows;
	MergeEntity *merge = profile->merge;
	bool		found = begin_row(writer, server, profile->key.kind, profile->key.id,
								  profile->key.len);

	if (step == PROFILE_LEARNED)
		set_learned(rows, JsonbPGetDatum(metadata_build(merge, true)), company_build(merge, true));
	else
		set_merged(rows, merge);
	if (step != PROFILE_LEARNED || !found)
		row_set(rows, PROFILE_VERSIONS, JsonbPGetDatum(versions_build(merge)));
	row_set(rows, PROFILE_ATTEMPTS, Int32GetDatum(profile->attempts));
	if (profile->job != 0)
		row_set(rows, PROFILE_JOB, Int64GetDatum(profile->job));
	if (found)
		row_update(rows);
	else
		row_insert(rows);
}

void
profiles_write(const char *server, Profile **profiles, int n, ProfileStep step)
{
	Writer		writer;

	if (n == 0)
		return;
	open_writer(&writer);
	for (int i = 0; i < n; i++)
	{
		MemoryContext old = MemoryContextSwitchTo(writer.per_row);

		write_one(&writer, server, profiles[i], step);
		MemoryContextSwitchTo(old);
		MemoryContextReset(writer.per_row);
	}
	close_writer(&writer);
}

/* ----------------------------------------------------------------- jobs */

static JsonbValue *
value_of(Jsonb *record, const char *key)
{
	return getKeyJsonValueFromContainer(&record->root, key, strlen(key), NULL);
}

static void
learn_record(Writer *writer, const char *server, UserpilotKind kind, int64 job, char *json)
{
	Jsonb	   *record = DatumGetJsonbP(DirectFunctionCall1(jsonb_in, CStringGetDatum(json)));
	bool		user = kind == USERPILOT_USER;
	JsonbValue *id = value_of(record, user ? "user_id" : "company_id");
	JsonbValue *company = user ? value_of(record, "company_id") : NULL;
	JsonbValue *metadata = value_of(record, "metadata");
	RowWriter  *rows = &writer->rows;
	TupleTableSlot *stored = rows->stored;

	if (id == NULL || id->type != jbvString || metadata == NULL)
		elog(ERROR, "userpilot: a record of job " INT64_FORMAT " is not what was written", job);
	if (!begin_row(writer, server, kind, id->val.string.val, id->val.string.len) ||
		stored->tts_isnull[PROFILE_JOB] || DatumGetInt64(stored->tts_values[PROFILE_JOB]) != job)
		return;
	set_learned(rows, JsonbPGetDatum(JsonbValueToJsonb(metadata)),
				company == NULL || company->type != jbvString ? NULL :
				cstring_to_text_with_len(company->val.string.val, company->val.string.len));
	row_set(rows, PROFILE_ATTEMPTS, Int32GetDatum(0));
	row_update(rows);
}

void
profiles_learn_records(const char *server, UserpilotKind kind, int64 job, char *records, int len)
{
	Writer		writer;
	char	   *end = records + len;
	char	   *newline;

	open_writer(&writer);
	for (; (newline = memchr(records, '\n', end - records)) != NULL; records = newline + 1)
	{
		MemoryContext old = MemoryContextSwitchTo(writer.per_row);

		*newline = '\0';
		learn_record(&writer, server, kind, job, records);
		MemoryContextSwitchTo(old);
		MemoryContextReset(writer.per_row);
	}
	close_writer(&writer);
}
