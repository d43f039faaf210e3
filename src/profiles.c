/*
 * profiles.c
 *	  userpilot_profiles: what Userpilot is known to have.
 *
 * "versions" says which change wrote each key, compactly: a list of
 * [lsn, xid, order, keys...]; the one entry without keys is for every known
 * property that no other entry names.  So a profile whose keys were all
 * written by one change, the common case, has one short entry.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "storage/lmgr.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"
#include "utils/numeric.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "payload.h"
#include "profiles.h"
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

static uint64
value_uint64(const JsonbValue *v)
{
	if (v->type != jbvNumeric)
		return 0;
	return strtoull(DatumGetCString(DirectFunctionCall1(numeric_out,
														NumericGetDatum(v->val.numeric))), NULL, 10);
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
company_build(const MergeEntity *entity)
{
	for (int i = 0; i < entity->nkeys; i++)
	{
		const MergeKey *key = &entity->keys[i];

		if (key->namelen == 0 && key->known && key->value.type == MERGE_STRING)
			return cstring_to_text_with_len(key->value.data, key->value.len);
	}
	return NULL;
}

/* ----------------------------------------------------------------- read */

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

static Datum
text_datum(const char *str, int len)
{
	return PointerGetDatum(cstring_to_text_with_len(str, len));
}

static Datum
text_array(Datum *elements, bool *nulls, int n, Oid type)
{
	int			dims[1] = {n};
	int			lbs[1] = {1};

	return PointerGetDatum(construct_md_array(elements, nulls, 1, dims, lbs, type, -1, false, TYPALIGN_INT));
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

void
profiles_read(const char *server, int64 refresh_after, Profile **profiles, int n)
{
	static SqlStatement statement = SQL_STATEMENT(
		/* OFFSET 0: one index look-up an id, whatever the statistics say */
		"SELECT p.company_id, p.metadata, p.versions, p.attempts, p.synced_at IS NOT NULL, p.job, w.n::int,"
		" p.believed_since"
		" FROM pg_catalog.unnest($3) WITH ORDINALITY AS w(id, n), LATERAL"
		" (SELECT * FROM @.userpilot_profiles"
		"   WHERE server = $1 AND kind = $2 AND entity_id = w.id OFFSET 0) p",
		3, {TEXTOID, TEXTOID, TEXTARRAYOID});
	Datum	   *ids = palloc(Max(n, 1) * sizeof(Datum));
	Datum		args[3];
	int			found;

	if (n == 0)
		return;
	for (int i = 0; i < n; i++)
		ids[i] = text_datum(profiles[i]->key.id, profiles[i]->key.len);
	args[0] = CStringGetTextDatum(server);
	args[1] = CStringGetTextDatum(userpilot_kind_name(profiles[0]->key.kind));
	args[2] = text_array(ids, NULL, n, TEXTOID);
	found = sql_execute(&statement, args, NULL, true);
	for (int i = 0; i < found; i++)
	{
		HeapTuple	tuple = SPI_tuptable->vals[i];
		TupleDesc	desc = SPI_tuptable->tupdesc;
		Profile    *profile;
		MemoryContext old;
		Datum		d[9];
		bool		isnull[9];

		for (int c = 1; c <= 8; c++)
			d[c] = SPI_getbinval(tuple, desc, c, &isnull[c]);
		profile = profiles[DatumGetInt32(d[7]) - 1];
		profile->attempts = DatumGetInt32(d[4]);
		profile->exists = DatumGetBool(d[5]);
		profile->job = isnull[6] ? 0 : DatumGetInt64(d[6]);
		old = MemoryContextSwitchTo(profile->context);
		read_profile(profile->merge, DatumGetJsonbP(d[2]),
					 isnull[1] ? NULL : DatumGetTextPP(d[1]), DatumGetJsonbP(d[3]));
		if (!isnull[8] && profiles_expired(profile->key, DatumGetTimestampTz(d[8]), refresh_after,
							 GetCurrentTimestamp()))
			forget_values(profile->merge);
		MemoryContextSwitchTo(old);
	}
	SPI_freetuptable(SPI_tuptable);
}

/* ---------------------------------------------------------------- write */

/* Rows are upserted in groups, to bound memory */
#define WRITE_GROUP 1000

static void
write_group(const char *server, Profile **profiles, int n, ProfileStep step)
{
	static SqlStatement statement = SQL_STATEMENT(
		"INSERT INTO @.userpilot_profiles AS p"
		" (server, kind, entity_id, company_id, metadata, versions, attempts, synced_at, job)"
		" SELECT $1, $2, u.id, u.company, u.metadata, u.versions, u.attempts,"
		"  CASE WHEN $9 THEN pg_catalog.clock_timestamp() END, NULLIF(u.job, 0)"
		" FROM unnest($3, $4, $5, $6, $7, $8)"
		"  AS u(id, company, metadata, versions, attempts, job)"
		" ON CONFLICT (server, kind, entity_id) DO UPDATE SET"
		/* learning adds what was sent: the rest may have been made unknown */
		"  company_id = CASE WHEN $9 THEN coalesce(excluded.company_id, p.company_id)"
		"   ELSE excluded.company_id END,"
		"  metadata = CASE WHEN $9 THEN p.metadata || excluded.metadata ELSE excluded.metadata END,"
		"  versions = CASE WHEN $9 THEN p.versions ELSE excluded.versions END,"
		"  attempts = excluded.attempts,"
		"  synced_at = coalesce(excluded.synced_at, p.synced_at), job = excluded.job,"
		"  believed_since = CASE WHEN $9 THEN coalesce(p.believed_since, excluded.synced_at)"
		"   WHEN excluded.metadata = '{}' AND excluded.company_id IS NULL THEN NULL"
		"   ELSE p.believed_since END",
		9, {TEXTOID, TEXTOID, TEXTARRAYOID, TEXTARRAYOID, JSONBARRAYOID, JSONBARRAYOID,
			INT4ARRAYOID, INT8ARRAYOID, BOOLOID});
	Datum	   *column[6];
	bool	   *no_company = palloc(n * sizeof(bool));
	Datum		args[9];

	for (int c = 0; c < 6; c++)
		column[c] = palloc(n * sizeof(Datum));
	for (int i = 0; i < n; i++)
	{
		const Profile *p = profiles[i];
		text	   *company = company_build(p->merge);

		column[0][i] = text_datum(p->key.id, p->key.len);
		no_company[i] = company == NULL;
		column[1][i] = PointerGetDatum(company);
		column[2][i] = JsonbPGetDatum(metadata_build(p->merge, step == PROFILE_LEARNED));
		column[3][i] = JsonbPGetDatum(versions_build(p->merge));
		column[4][i] = Int32GetDatum(p->attempts);
		column[5][i] = Int64GetDatum(p->job);
	}
	args[0] = CStringGetTextDatum(server);
	args[1] = CStringGetTextDatum(userpilot_kind_name(profiles[0]->key.kind));
	args[2] = text_array(column[0], NULL, n, TEXTOID);
	args[3] = text_array(column[1], no_company, n, TEXTOID);
	args[4] = text_array(column[2], NULL, n, JSONBOID);
	args[5] = text_array(column[3], NULL, n, JSONBOID);
	args[6] = PointerGetDatum(construct_array(column[4], n, INT4OID, 4, true, TYPALIGN_INT));
	args[7] = PointerGetDatum(construct_array(column[5], n, INT8OID, 8, FLOAT8PASSBYVAL, TYPALIGN_DOUBLE));
	args[8] = BoolGetDatum(step == PROFILE_LEARNED);
	(void) sql_execute(&statement, args, NULL, false);
}

void
profiles_write(const char *server, Profile **profiles, int n, ProfileStep step)
{
	for (int i = 0; i < n; i += WRITE_GROUP)
	{
		MemoryContext context = AllocSetContextCreate(CurrentMemoryContext,
													  "userpilot profiles",
													  ALLOCSET_DEFAULT_SIZES);
		MemoryContext old = MemoryContextSwitchTo(context);

		write_group(server, profiles + i, Min(WRITE_GROUP, n - i), step);
		MemoryContextSwitchTo(old);
		MemoryContextDelete(context);
	}
}

void
profiles_set_attempts(const char *server, Profile **profiles, int n)
{
	static SqlStatement statement = SQL_STATEMENT(
		"UPDATE @.userpilot_profiles SET attempts = $4"
		" WHERE server = $1 AND kind = $2 AND entity_id = $3",
		4, {TEXTOID, TEXTOID, TEXTOID, INT4OID});

	for (int i = 0; i < n; i++)
	{
		Datum		args[4];

		args[0] = CStringGetTextDatum(server);
		args[1] = CStringGetTextDatum(userpilot_kind_name(profiles[i]->key.kind));
		args[2] = text_datum(profiles[i]->key.id, profiles[i]->key.len);
		args[3] = Int32GetDatum(profiles[i]->attempts);
		(void) sql_execute(&statement, args, NULL, false);
	}
}

/* ----------------------------------------------------------- invalidate */

void
profiles_lock(void)
{
	Oid			profiles = sql_relid("userpilot_profiles");

	/* whoever makes us wait may wait for our snapshot (known.c) */
	InvalidateCatalogSnapshot();
	LockRelationOid(profiles, RowExclusiveLock);
}

void
profiles_lock_out_worker(void)
{
	LockRelationOid(sql_relid("userpilot_profiles"), ShareRowExclusiveLock);
}

/*
 * A key that becomes unknown keeps its version, so the entry without keys,
 * which is for known ones, gets their names.
 */
uint64
profiles_invalidate(const char *server, text *kind, text *entity_id,
					const TimestampTz *since)
{
	static SqlStatement statement = SQL_STATEMENT(
		/* done: acknowledged, and not to be learnt any more */
		"WITH done AS MATERIALIZED (SELECT coalesce(pg_catalog.array_agg(j.id), '{}') AS jobs FROM @.userpilot_jobs j"
		"  WHERE j.server OPERATOR(pg_catalog.=) $1 AND j.status OPERATOR(pg_catalog.=) 'completed'"
		"  AND ($4 IS NULL OR j.finished_at OPERATOR(pg_catalog.>=) $4)"
		"  AND EXISTS (SELECT FROM @.userpilot_job_chunks c WHERE c.job OPERATOR(pg_catalog.=) j.id))"
		" UPDATE @.userpilot_profiles p SET"
		" job = CASE WHEN p.job OPERATOR(pg_catalog.=) ANY (done.jobs) THEN NULL ELSE p.job END,"
		" metadata = '{}', company_id = NULL, believed_since = NULL, versions = coalesce(("
		"  SELECT pg_catalog.jsonb_agg(CASE WHEN pg_catalog.jsonb_array_length(e) OPERATOR(pg_catalog.>) 3 THEN e"
		"   ELSE e OPERATOR(pg_catalog.||) coalesce((SELECT pg_catalog.jsonb_agg(k)"
		"     FROM pg_catalog.jsonb_object_keys(p.metadata) k WHERE NOT EXISTS ("
		"      SELECT FROM pg_catalog.jsonb_array_elements(p.versions) v,"
		"       pg_catalog.jsonb_array_elements(v) WITH ORDINALITY AS n(name, i)"
		"       WHERE n.i OPERATOR(pg_catalog.>) 3 AND n.name OPERATOR(pg_catalog.=) pg_catalog.to_jsonb(k))), '[]') END)"
		"  FROM pg_catalog.jsonb_array_elements(p.versions) e), '[]')"
		" FROM done WHERE p.server OPERATOR(pg_catalog.=) $1"
		" AND ($2 IS NULL OR p.kind OPERATOR(pg_catalog.=) $2)"
		" AND ($3 IS NULL OR p.entity_id OPERATOR(pg_catalog.=) $3)"
		" AND ($4 IS NULL OR p.synced_at OPERATOR(pg_catalog.>=) $4"
		"  OR p.job OPERATOR(pg_catalog.=) ANY (done.jobs))",
		4, {TEXTOID, TEXTOID, TEXTOID, TIMESTAMPTZOID});
	char		nulls[5] = "    ";
	Datum		args[4];

	profiles_lock_out_worker();
	args[0] = CStringGetTextDatum(server);
	args[1] = PointerGetDatum(kind);
	nulls[1] = kind ? ' ' : 'n';
	args[2] = PointerGetDatum(entity_id);
	nulls[2] = entity_id ? ' ' : 'n';
	args[3] = since ? TimestampTzGetDatum(*since) : (Datum) 0;
	nulls[3] = since ? ' ' : 'n';
	return sql_execute(&statement, args, nulls, false);
}

/* ----------------------------------------------------------------- jobs */

/*
 * In SQL alone: the records say what was sent, the mark has raised the
 * versions already.  Written as an upsert although the profiles exist: so no
 * plan can go wrong, each record is one index look-up.  An entity that was
 * released meanwhile is left unknown.
 */
#define JOB_RECORDS \
	"WITH sent AS MATERIALIZED (" \
	"  SELECT pg_catalog.string_to_table(pg_catalog.rtrim(c.records, E'\\n'), E'\\n')::jsonb AS r" \
	"  FROM @.userpilot_job_chunks c WHERE c.job = $3)" \
	" INSERT INTO @.userpilot_profiles AS p (server, kind, entity_id, company_id, metadata, synced_at)" \
	" SELECT $1, $2, r ->> CASE $2 WHEN 'user' THEN 'user_id' ELSE 'company_id' END," \
	"  CASE $2 WHEN 'user' THEN r ->> 'company_id' END, "

void
profiles_learn_job(const char *server, UserpilotKind kind, int64 job)
{
	static SqlStatement statement = SQL_STATEMENT(
		JOB_RECORDS "r -> 'metadata', pg_catalog.clock_timestamp() FROM sent"
		" ON CONFLICT (server, kind, entity_id) DO UPDATE SET"
		"  metadata = p.metadata || excluded.metadata,"
		"  company_id = coalesce(excluded.company_id, p.company_id),"
		"  attempts = 0, synced_at = excluded.synced_at, job = NULL,"
		"  believed_since = coalesce(p.believed_since, excluded.synced_at)"
		" WHERE p.job = $3",
		3, {TEXTOID, TEXTOID, INT8OID});
	Datum		args[3] = {CStringGetTextDatum(server),
	CStringGetTextDatum(userpilot_kind_name(kind)), Int64GetDatum(job)};

	(void) sql_execute(&statement, args, NULL, false);
}

void
profiles_release_job(const char *server, UserpilotKind kind, int64 job, bool give_back)
{
	static SqlStatement statement = SQL_STATEMENT(
		JOB_RECORDS "'{}', NULL FROM sent"
		" ON CONFLICT (server, kind, entity_id) DO UPDATE SET job = NULL,"
		"  attempts = greatest(p.attempts - CASE WHEN $4 THEN 1 ELSE 0 END, 0)"
		" WHERE p.job = $3",
		4, {TEXTOID, TEXTOID, INT8OID, BOOLOID});
	Datum		args[4] = {CStringGetTextDatum(server),
		CStringGetTextDatum(userpilot_kind_name(kind)),
	Int64GetDatum(job), BoolGetDatum(give_back)};

	(void) sql_execute(&statement, args, NULL, false);
}
