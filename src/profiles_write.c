/*
 * profiles_write.c
 *	  Profiles as the merge leaves them.
 *
 * "versions" says which change wrote each key, compactly: a list of
 * [lsn, xid, order, keys...]; the one entry without keys is for every known
 * property that no other entry names.  So a profile whose keys were all
 * written by one change, the common case, has one short entry.
 *
 * Rows are written as a subscription's worker writes those of another server:
 * someone waits for a call's mark, and a statement takes several times longer.
 * Row triggers fire, but none for UPDATE OF columns.
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "commands/trigger.h"
#include "executor/executor.h"
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
#include "sql.h"

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
	Relation	rel;
	Relation	index;
	EState	   *estate;
	ResultRelInfo *rri;
	EPQState	epq;
	TupleTableSlot *row;
	TupleTableSlot *stored;
	MemoryContext per_row;
} Writer;

static void
open_writer(Writer *writer)
{
	writer->rel = table_open(sql_relid("userpilot_profiles"), RowExclusiveLock);
	profiles_check_shape(writer->rel);
	writer->index = profiles_open_index(writer->rel);
	writer->estate = CreateExecutorState();
	writer->estate->es_output_cid = GetCurrentCommandId(true);
	writer->rri = makeNode(ResultRelInfo);
	InitResultRelInfo(writer->rri, writer->rel, 0, NULL, 0);
	ExecOpenIndices(writer->rri, false);
	compat_eval_plan_qual_init(&writer->epq, writer->estate);
	AfterTriggerBeginQuery();
	writer->row = MakeSingleTupleTableSlot(RelationGetDescr(writer->rel), &TTSOpsVirtual);
	writer->stored = table_slot_create(writer->rel, NULL);
	writer->per_row = AllocSetContextCreate(CurrentMemoryContext, "userpilot profile",
											ALLOCSET_DEFAULT_SIZES);
}

static void
close_writer(Writer *writer)
{
	AfterTriggerEndQuery(writer->estate);
	EvalPlanQualEnd(&writer->epq);
	/* what triggers opened */
	ExecCloseResultRelations(writer->estate);
	ExecResetTupleTable(writer->estate->es_tupleTable, false);
	ExecDropSingleTupleTableSlot(writer->row);
	ExecDropSingleTupleTableSlot(writer->stored);
	ExecCloseIndices(writer->rri);
	index_close(writer->index, NoLock);
	table_close(writer->rel, NoLock);
	FreeExecutorState(writer->estate);
	MemoryContextDelete(writer->per_row);
	/* what is written next may be the same rows */
	CommandCounterIncrement();
}

static void
set(TupleTableSlot *row, int column, Datum value)
{
	row->tts_values[column] = value;
	row->tts_isnull[column] = false;
}

/* As it is stored, or null */
static void
keep(TupleTableSlot *row, int column, TupleTableSlot *stored)
{
	if (TTS_EMPTY(stored) || stored->tts_isnull[column])
		return;
	set(row, column, stored->tts_values[column]);
}

/* Adds what was sent: the rest may have been made unknown meanwhile */
static void
set_learned(TupleTableSlot *row, const Profile *profile, TupleTableSlot *stored)
{
	Datum		now = TimestampTzGetDatum(GetCurrentTimestamp());
	Datum		metadata = JsonbPGetDatum(metadata_build(profile->merge, true));
	text	   *company = company_build(profile->merge, true);

	set(row, PROFILE_SYNCED, now);
	set(row, PROFILE_BELIEVED, now);
	keep(row, PROFILE_BELIEVED, stored);
	keep(row, PROFILE_COMPANY, stored);
	if (company != NULL)
		set(row, PROFILE_COMPANY, PointerGetDatum(company));
	set(row, PROFILE_METADATA, TTS_EMPTY(stored) ? metadata :
		DirectFunctionCall2(jsonb_concat, stored->tts_values[PROFILE_METADATA], metadata));
	if (TTS_EMPTY(stored))
		set(row, PROFILE_VERSIONS, JsonbPGetDatum(versions_build(profile->merge)));
	else
		keep(row, PROFILE_VERSIONS, stored);
}

static void
set_merged(TupleTableSlot *row, const Profile *profile, TupleTableSlot *stored)
{
	Jsonb	   *metadata = metadata_build(profile->merge, false);
	text	   *company = company_build(profile->merge, false);

	keep(row, PROFILE_SYNCED, stored);
	if (company != NULL)
		set(row, PROFILE_COMPANY, PointerGetDatum(company));
	if (company != NULL || JB_ROOT_COUNT(metadata) > 0)
		keep(row, PROFILE_BELIEVED, stored);
	set(row, PROFILE_METADATA, JsonbPGetDatum(metadata));
	set(row, PROFILE_VERSIONS, JsonbPGetDatum(versions_build(profile->merge)));
}

/*
 * The row as it is now, locked, in "stored"; false: there is none.  What others
 * are doing to it, by hand or in userpilot_retry(), is waited for.
 */
static bool
lock_stored(Writer *writer)
{
	TupleTableSlot *row = writer->row;
	TupleTableSlot *stored = writer->stored;
	Snapshot	snapshot = RegisterSnapshot(GetLatestSnapshot());
	IndexScanDesc scan = compat_index_beginscan(writer->rel, writer->index, snapshot, PROFILE_NKEYS);
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

		result = table_tuple_lock(writer->rel, &tid, snapshot, stored, GetCurrentCommandId(false),
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

static void
write_one(Writer *writer, const char *server, const Profile *profile, ProfileStep step)
{
	TupleTableSlot *row = writer->row;
	TupleTableSlot *stored = writer->stored;
	MemoryContext old;
	bool		found;

	ExecClearTuple(row);
	memset(row->tts_isnull, true, PROFILE_NCOLUMNS * sizeof(bool));
	set(row, PROFILE_SERVER, CStringGetTextDatum(server));
	set(row, PROFILE_KIND, CStringGetTextDatum(userpilot_kind_name(profile->key.kind)));
	set(row, PROFILE_ENTITY, PointerGetDatum(cstring_to_text_with_len(profile->key.id, profile->key.len)));
	found = lock_stored(writer);
	if (step == PROFILE_LEARNED)
		set_learned(row, profile, stored);
	else
		set_merged(row, profile, stored);
	set(row, PROFILE_ATTEMPTS, Int32GetDatum(profile->attempts));
	if (profile->job != 0)
		set(row, PROFILE_JOB, Int64GetDatum(profile->job));
	ExecStoreVirtualTuple(row);

	/* triggers keep things there from row to row */
	old = MemoryContextSwitchTo(writer->estate->es_query_cxt);
	if (found)
		ExecSimpleRelationUpdate(writer->rri, writer->estate, &writer->epq, stored, row);
	else
		ExecSimpleRelationInsert(writer->rri, writer->estate, row);
	MemoryContextSwitchTo(old);
	ExecClearTuple(row);
	ExecClearTuple(stored);
	ResetPerTupleExprContext(writer->estate);
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
