/*
 * profiles.c
 *	  userpilot_profiles: what Userpilot is known to have; by statements, where
 *	  many rows change at a time or nobody waits.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "storage/lmgr.h"
#include "utils/builtins.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#include "profiles.h"
#include "sql.h"

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
		args[2] = PointerGetDatum(cstring_to_text_with_len(profiles[i]->key.id, profiles[i]->key.len));
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

/*
 * The records say which entities.  Written as an upsert although the profiles
 * exist: so no plan can go wrong, each record is one index look-up.
 */
void
profiles_release_job(const char *server, UserpilotKind kind, int64 job, bool give_back)
{
	static SqlStatement statement = SQL_STATEMENT(
		"WITH sent AS MATERIALIZED ("
		"  SELECT pg_catalog.string_to_table(pg_catalog.rtrim(c.records, E'\\n'), E'\\n')::jsonb AS r"
		"  FROM @.userpilot_job_chunks c WHERE c.job = $3)"
		" INSERT INTO @.userpilot_profiles AS p (server, kind, entity_id, metadata)"
		" SELECT $1, $2, r ->> CASE $2 WHEN 'user' THEN 'user_id' ELSE 'company_id' END, '{}' FROM sent"
		" ON CONFLICT (server, kind, entity_id) DO UPDATE SET job = NULL,"
		"  attempts = greatest(p.attempts - CASE WHEN $4 THEN 1 ELSE 0 END, 0)"
		" WHERE p.job = $3",
		4, {TEXTOID, TEXTOID, INT8OID, BOOLOID});
	Datum		args[4] = {CStringGetTextDatum(server),
		CStringGetTextDatum(userpilot_kind_name(kind)),
	Int64GetDatum(job), BoolGetDatum(give_back)};

	(void) sql_execute(&statement, args, NULL, false);
}
