/*
 * environment_enabled.c
 *	  Whether this very database may send to a Userpilot environment.
 *
 * A dump, a template copy, a subscriber or a clone carries the same servers
 * and the same key as its original.  Therefore each server must be enabled by
 * name for one database of one system, in a table that pg_dump leaves out.  A
 * physical copy looks the same from inside; for these there are the server
 * option only_on and the setting userpilot.deliver.  What a dump brought along
 * has positions of another cluster, which enabling replaces.
 */
#include "postgres.h"

#include "access/table.h"
#include "access/tableam.h"
#include "access/xlog.h"
#include "catalog/pg_foreign_server.h"
#include "catalog/pg_type.h"
#include "fmgr.h"
#include "foreign/foreign.h"
#include "miscadmin.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/catcache.h"
#include "utils/guc.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"

#include "compat.h"
#include "environment.h"
#include "options.h"
#include "settings.h"
#include "sql.h"
#include "state.h"

/* What a row of userpilot_enabled says */
typedef struct EnabledRow
{
	char	   *server;
	Oid			serverid;
	bool		here;			/* of this system and database */
} EnabledRow;

PG_FUNCTION_INFO_V1(userpilot_enable);
PG_FUNCTION_INFO_V1(userpilot_disable);

enum
{
	ENABLED_SERVER,
	ENABLED_SERVER_OID,
	ENABLED_SYSTEM,
	ENABLED_DATABASE,
	ENABLED_AT,
	ENABLED_BY,
	ENABLED_NCOLUMNS
};

static const SqlColumn columns[ENABLED_NCOLUMNS] = {
	{"server", TEXTOID}, {"server_oid", OIDOID}, {"system_identifier", INT8OID},
	{"database", OIDOID}, {"enabled_at", TIMESTAMPTZOID}, {"by", TEXTOID}
};

/*
 * All rows of userpilot_enabled: list of EnabledRow.  Of this very moment, and
 * without a statement: every call asks first.
 */
static List *
read_enabled(void)
{
	Relation	rel = table_open(sql_relid("userpilot_enabled"), AccessShareLock);
	TupleTableSlot *slot = table_slot_create(rel, NULL);
	Snapshot	snapshot = RegisterSnapshot(GetLatestSnapshot());
	TableScanDesc scan = table_beginscan(rel, snapshot, 0, NULL);
	List	   *rows = NIL;

	sql_check_columns(rel, columns, ENABLED_NCOLUMNS);
	while (table_scan_getnextslot(scan, ForwardScanDirection, slot))
	{
		EnabledRow *row;

		slot_getallattrs(slot);
		if (!OidIsValid(DatumGetObjectId(slot->tts_values[ENABLED_DATABASE])))
			continue;			/* disabled */
		row = palloc(sizeof(EnabledRow));
		row->server = TextDatumGetCString(slot->tts_values[ENABLED_SERVER]);
		row->serverid = DatumGetObjectId(slot->tts_values[ENABLED_SERVER_OID]);
		row->here =
			DatumGetInt64(slot->tts_values[ENABLED_SYSTEM]) == (int64) GetSystemIdentifier() &&
			DatumGetObjectId(slot->tts_values[ENABLED_DATABASE]) == MyDatabaseId;
		rows = lappend(rows, row);
	}
	table_endscan(scan);
	UnregisterSnapshot(snapshot);
	ExecDropSingleTupleTableSlot(slot);
	table_close(rel, NoLock);
	return rows;
}

/* The cluster a server is bound to by only_on, if that is not this one; else
 * NULL */
static const char *
bound_elsewhere(ForeignServer *server)
{
	OptionValues values = {0};
	const char *only_on;

	options_read(server->options, ForeignServerRelationId, values);
	only_on = values[OPTION_ONLY_ON];
	if (only_on == NULL || only_on[0] == '\0' || strcmp(only_on, cluster_name) == 0)
		return NULL;
	return only_on;
}

bool
environment_is_subscribed(Oid relid)
{
	CatCList   *list = SearchSysCacheList1(SUBSCRIPTIONRELMAP, ObjectIdGetDatum(relid));
	bool		found = list->n_members > 0;

	ReleaseSysCacheList(list);
	return found;
}

/* Then the queue is another's, whose WAL positions mean nothing here */
static bool
queue_is_subscribed(void)
{
	return environment_is_subscribed(sql_relid("userpilot_queue"));
}

List *
environment_enabled(void)
{
	List	   *result = NIL;
	ListCell   *cell;

	if (RecoveryInProgress() || !userpilot_deliver || queue_is_subscribed())
		return NIL;

	foreach(cell, read_enabled())
	{
		EnabledRow *row = (EnabledRow *) lfirst(cell);
		Oid			serverid = get_foreign_server_oid(row->server, true);
		ForeignServer *server;

		if (!row->here || !OidIsValid(serverid) || serverid != row->serverid)
			continue;
		server = GetForeignServer(serverid);
		if (environment_is_ours(server->fdwid) && bound_elsewhere(server) == NULL)
			result = lappend_oid(result, serverid);
	}
	return result;
}

const char *
environment_disabled_reason(Oid serverid)
{
	ForeignServer *server;
	EnabledRow *row = NULL;
	ListCell   *cell;
	const char *only_on;

	if (RecoveryInProgress())
		return "disabled: this is a standby";
	if (!userpilot_deliver)
		return "disabled: userpilot.deliver is off";
	server = GetForeignServerExtended(serverid, FSV_MISSING_OK);
	if (server == NULL || !environment_is_ours(server->fdwid))
		return "disabled: the server does not exist";

	foreach(cell, read_enabled())
	{
		if (strcmp(((EnabledRow *) lfirst(cell))->server, server->servername) == 0 &&
			(((EnabledRow *) lfirst(cell))->serverid == serverid ||
			 !((EnabledRow *) lfirst(cell))->here))
			row = (EnabledRow *) lfirst(cell);
	}
	if (row == NULL)
		return psprintf("disabled: SELECT userpilot_enable(%s) makes this database the sender",
						quote_literal_cstr(server->servername));
	if (!row->here)
		return psprintf("disabled: this looks like a copy of another database; SELECT userpilot_enable(%s) makes it the sender",
						quote_literal_cstr(server->servername));
	if (queue_is_subscribed())
		return "disabled: a subscription fills userpilot_queue; leave userpilot's tables out of its publication, or drop it when this database is to send";
	only_on = bound_elsewhere(server);
	if (only_on != NULL)
		return psprintf("disabled: only_on is \"%s\" but cluster_name is \"%s\"",
						only_on, cluster_name);
	return NULL;
}

Oid
environment_owned(const char *server)
{
	Oid			serverid = environment_lookup(server, false);

	if (!compat_server_ownercheck(serverid, GetUserId()))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("must be owner of foreign server \"%s\"", server),
				 errhint("That is for its owner or a superuser.")));
	return serverid;
}

/* The server that a function's first argument names, if the current user may
 * manage it; raises otherwise */
static char *
managed_server(FunctionCallInfo fcinfo, Oid *serverid)
{
	char	   *server;

	if (PG_ARGISNULL(0))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("server must not be null"),
				 errhint("Name it, as in userpilot_enable('userpilot').")));
	server = NameStr(*PG_GETARG_NAME(0));
	*serverid = environment_owned(server);
	return server;
}

/* Writes userpilot_enabled by a statement; its commit will wake the worker */
static void
write_enabled(SqlStatement *statement, Datum *args)
{
	SqlCaller	saved;

	sql_become_owner(&saved);
	(void) sql_execute(statement, args, NULL, false);
	sql_become_caller(&saved);
	state_note_read_all();
}

/*
 * What is queued under a name may have been meant for another server that had
 * it before, with another owner and key: that is not for any owner to decide.
 */
static void
refuse_foreign_rows(const char *server, Oid serverid)
{
	static SqlStatement statement =
	SQL_STATEMENT("SELECT WHERE NOT EXISTS (SELECT FROM @.userpilot_enabled e"
				  "  WHERE e.server OPERATOR(pg_catalog.=) $1"
				  "  AND e.server_oid OPERATOR(pg_catalog.=) $2)"
				  " AND (EXISTS (SELECT FROM @.userpilot_queue q WHERE q.server OPERATOR(pg_catalog.=) $1)"
				  "  OR EXISTS (SELECT FROM @.userpilot_dead_letters d WHERE d.server OPERATOR(pg_catalog.=) $1))",
				  2, {TEXTOID, OIDOID});
	Datum		args[2];
	SqlCaller	saved;
	bool		found;

	if (superuser())
		return;
	args[0] = CStringGetTextDatum(server);
	args[1] = ObjectIdGetDatum(serverid);
	sql_become_owner(&saved);
	found = sql_execute(&statement, args, NULL, false) > 0;
	sql_become_caller(&saved);
	if (found)
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("changes were queued for server \"%s\" before it was enabled", server),
				 errdetail("They may have been meant for another server that had this name."),
				 errhint("A superuser must enable it, or remove them from userpilot_queue and userpilot_dead_letters.")));
}

/* What another server of that name has got says nothing of this one */
static void
forget_another(const char *server, Oid serverid)
{
	static SqlStatement statement =
	SQL_STATEMENT("DELETE FROM @.userpilot_profiles p USING @.userpilot_enabled e"
				  " WHERE p.server OPERATOR(pg_catalog.=) $1 AND e.server OPERATOR(pg_catalog.=) $1"
				  " AND e.server_oid OPERATOR(pg_catalog.<>) $2"
				  " AND e.system_identifier OPERATOR(pg_catalog.=) $3",
				  3, {TEXTOID, OIDOID, INT8OID});
	Datum		args[3];
	SqlCaller	saved;
	int			n;

	args[0] = CStringGetTextDatum(server);
	args[1] = ObjectIdGetDatum(serverid);
	args[2] = Int64GetDatum((int64) GetSystemIdentifier());
	sql_become_owner(&saved);
	n = sql_execute(&statement, args, NULL, false);
	sql_become_caller(&saved);
	if (n > 0)
		ereport(NOTICE,
				(errmsg("another server was enabled under the name \"%s\" before: what that one has got is forgotten", server)));
}

/* What was queued and acknowledged elsewhere, against this cluster's WAL */
#define POSITION "pg_current_wal_insert_lsn() - '0/0'::pg_lsn"
#define AHEAD "(lsn - '0/0'::pg_lsn > " POSITION " OR" \
	" (xid >= pg_snapshot_xmax(pg_current_snapshot()) AND" \
	"  xid IS DISTINCT FROM pg_current_xact_id_if_assigned()))"

static bool
positions_ahead(const char *server)
{
	static SqlStatement statement =
	SQL_STATEMENT("SELECT WHERE EXISTS (SELECT FROM @.userpilot_queue WHERE server = $1 AND " AHEAD ")"
				  " OR EXISTS (SELECT FROM @.userpilot_dead_letters WHERE server = $1 AND " AHEAD ")"
				  " OR EXISTS (SELECT FROM @.userpilot_profiles p, jsonb_array_elements(versions) AS e"
				  "  WHERE server = $1 AND ((e ->> 0)::numeric > " POSITION
				  "   OR (e ->> 1)::numeric >= pg_snapshot_xmax(pg_current_snapshot())::text::numeric"
				  "    AND (e ->> 1)::numeric IS DISTINCT FROM pg_current_xact_id_if_assigned()::text::numeric))",
				  1, {TEXTOID});
	Datum		args[1] = {CStringGetTextDatum(server)};

	return sql_execute(&statement, args, NULL, false) > 0;
}

static void
refuse_foreign_batches(const char *server)
{
	static SqlStatement statement =
	SQL_STATEMENT("SELECT FROM @.userpilot_queue WHERE server = $1 AND batch IS NOT NULL LIMIT 1",
				  1, {TEXTOID});
	Datum		args[1] = {CStringGetTextDatum(server)};

	if (sql_execute(&statement, args, NULL, false) > 0)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("rows of bulk SELECTs from another cluster are still queued"),
				 errdetail("Their snapshots mean nothing to this cluster, whose transactions are behind."),
				 errhint("DELETE FROM userpilot_queue WHERE batch IS NOT NULL; enable the server; then run the bulk SELECTs again.")));
}

/*
 * A dump restored into a younger cluster holds positions that this WAL has yet
 * to reach, and every new change would pass for older than those.  So they are
 * replaced by their rank, in order: smaller than any position from now on, as
 * transaction 3 is older than any from now on.  Values stay known.
 */
static void
restamp(const char *server)
{
	static SqlStatement statement =
	SQL_STATEMENT("WITH rank AS MATERIALIZED ("
				  " SELECT l, dense_rank() OVER (ORDER BY l) AS r FROM ("
				  "  SELECT lsn - '0/0'::pg_lsn FROM @.userpilot_queue WHERE server = $1"
				  "  UNION SELECT lsn - '0/0'::pg_lsn FROM @.userpilot_dead_letters WHERE server = $1"
				  "  UNION SELECT (e ->> 0)::numeric FROM @.userpilot_profiles,"
				  "   jsonb_array_elements(versions) AS e WHERE server = $1) AS u(l)),"
				  " queued AS (UPDATE @.userpilot_queue q SET lsn = '0/0'::pg_lsn + rank.r, xid = '3'"
				  "  FROM rank WHERE q.server = $1 AND q.lsn - '0/0'::pg_lsn = rank.l),"
				  " dead AS (UPDATE @.userpilot_dead_letters d"
				  "  SET lsn = '0/0'::pg_lsn + rank.r, xid = '3', batch = NULL"
				  "  FROM rank WHERE d.server = $1 AND d.lsn - '0/0'::pg_lsn = rank.l),"
				  " known AS (UPDATE @.userpilot_profiles p SET versions = v.versions FROM ("
				  "   SELECT kind, entity_id, jsonb_agg(jsonb_build_array(rank.r, 3, 0) || (e - 2 - 1 - 0)) AS versions"
				  "   FROM @.userpilot_profiles, jsonb_array_elements(versions) AS e, rank"
				  "   WHERE server = $1 AND rank.l = (e ->> 0)::numeric GROUP BY kind, entity_id) v"
				  "  WHERE p.server = $1 AND p.kind = v.kind AND p.entity_id = v.entity_id)"
				  " DELETE FROM @.userpilot_batches WHERE server = $1",
				  1, {TEXTOID});
	Datum		args[1] = {CStringGetTextDatum(server)};
	SqlCaller	saved;
	int			nest;

	sql_become_owner(&saved);
	nest = NewGUCNestLevel();
	(void) set_config_option("search_path", "pg_catalog, pg_temp", PGC_USERSET,
							 PGC_S_SESSION, GUC_ACTION_SAVE, true, 0, false);
	if (positions_ahead(server))
	{
		refuse_foreign_batches(server);
		(void) sql_execute(&statement, args, NULL, false);
		ereport(NOTICE,
				(errmsg("what is queued and known came from a cluster that is ahead of this one: its order has been kept, its positions replaced")));
	}
	AtEOXact_GUC(true, nest);
	sql_become_caller(&saved);
}

/*
 * userpilot_enable(server name)
 *		Makes this database the one that sends to the server.  A row that
 *		names another database is taken over.
 */
Datum
userpilot_enable(PG_FUNCTION_ARGS)
{
	static SqlStatement statement =
	SQL_STATEMENT("INSERT INTO @.userpilot_enabled"
				  " (server, system_identifier, database, by, server_oid)"
				  " VALUES ($1, $2, $3, $4, $5)"
				  " ON CONFLICT (server) DO UPDATE SET"
				  " system_identifier = EXCLUDED.system_identifier,"
				  " database = EXCLUDED.database,"
				  " enabled_at = DEFAULT, by = EXCLUDED.by,"
				  " server_oid = EXCLUDED.server_oid",
				  5, {TEXTOID, INT8OID, OIDOID, TEXTOID, OIDOID});
	Datum		args[5];
	Oid			serverid;
	char	   *server = managed_server(fcinfo, &serverid);

	refuse_foreign_rows(server, serverid);
	forget_another(server, serverid);
	restamp(server);
	args[0] = CStringGetTextDatum(server);
	args[1] = Int64GetDatum((int64) GetSystemIdentifier());
	args[2] = ObjectIdGetDatum(MyDatabaseId);
	args[3] = CStringGetTextDatum(GetUserNameFromId(GetUserId(), false));
	args[4] = ObjectIdGetDatum(serverid);
	write_enabled(&statement, args);
	PG_RETURN_VOID();
}

/*
 * userpilot_disable(server name)
 *		Makes no database the sender.  What is queued stays queued, and the row
 *		stays to say for which server that was.
 */
Datum
userpilot_disable(PG_FUNCTION_ARGS)
{
	static SqlStatement statement =
	SQL_STATEMENT("UPDATE @.userpilot_enabled SET database = 0"
				  " WHERE server OPERATOR(pg_catalog.=) $1", 1, {TEXTOID});
	Datum		args[1];
	Oid			serverid;

	args[0] = CStringGetTextDatum(managed_server(fcinfo, &serverid));
	write_enabled(&statement, args);
	PG_RETURN_VOID();
}

/*
 * No function tells how many background workers run, but they are the
 * processes of a kind that is not the server's own.
 */
int
environment_workers_used(void)
{
	static SqlStatement statement =
	SQL_STATEMENT("SELECT pg_catalog.count(*) FROM pg_catalog.pg_stat_activity"
				  " WHERE NOT (backend_type OPERATOR(pg_catalog.=) ANY ('{client backend,"
				  "autovacuum launcher,autovacuum worker,background writer,checkpointer,"
				  "walwriter,startup,archiver,walreceiver,walsender,logger,io worker,"
				  "slotsync worker,walsummarizer,standalone backend}'::pg_catalog.text[]))",
				  0, {0});

	(void) sql_execute(&statement, NULL, NULL, false);
	return (int) sql_int64(1, 0);
}
