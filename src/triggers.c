/*
 * triggers.c
 *	  A sync declared in one CREATE TRIGGER, and what is wrong with it.
 *
 * A trigger must not make the statement of someone who knows nothing of
 * Userpilot fail.  A row that can never be sent becomes a dead letter, with a
 * warning; what may not be sent, because the table's owner lacks USAGE or the
 * server is gone, is not queued, with a warning.  Only a trigger that can
 * never have worked raises: one that was created in the wrong way.
 *
 * Which server, is the table owner's to say, by an argument, or the
 * database's; never the session's.
 */
#include "postgres.h"

#include "access/relation.h"
#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "catalog/pg_class.h"
#include "catalog/pg_trigger.h"
#include "catalog/pg_type.h"
#include "commands/trigger.h"
#include "executor/tuptable.h"
#include "fmgr.h"
#include "funcapi.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/ruleutils.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#include "change.h"
#include "compat.h"
#include "environment.h"
#include "mapping.h"
#include "queue.h"
#include "sql.h"
#include "state.h"

PG_FUNCTION_INFO_V1(userpilot_company_trigger);
PG_FUNCTION_INFO_V1(userpilot_user_trigger);
PG_FUNCTION_INFO_V1(userpilot_check_trigger);

/* Warnings of one transaction; an UPDATE of a million rows has one cause */
#define MAX_WARNINGS 10

/* A trigger as one statement uses it; hung off its FmgrInfo */
typedef struct Armed
{
	Mapping    *mapping;
	EnvironmentRef *server;		/* NULL: it may not be used */
	char	   *why;			/* then */
	char	   *problems;		/* what is wrong with its arguments, or NULL */
} Armed;

static void
check_manner(FunctionCallInfo fcinfo, UserpilotKind kind)
{
	const TriggerData *data = (const TriggerData *) fcinfo->context;

	if (!CALLED_AS_TRIGGER(fcinfo))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("%s() can only be called as a trigger", mapping_function(kind)),
				 errhint("CREATE TRIGGER to_userpilot AFTER INSERT OR UPDATE ON ... FOR EACH ROW EXECUTE FUNCTION %s('id', 'name');",
						 mapping_function(kind))));
	if (!TRIGGER_FIRED_AFTER(data->tg_event) || !TRIGGER_FIRED_FOR_ROW(data->tg_event) ||
		TRIGGER_FIRED_BY_DELETE(data->tg_event))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("trigger \"%s\" of table \"%s\" must fire after INSERT or UPDATE, for each row",
						data->tg_trigger->tgname, RelationGetRelationName(data->tg_relation)),
				 errhint("CREATE TRIGGER %s AFTER INSERT OR UPDATE ON %s FOR EACH ROW EXECUTE FUNCTION %s('id', 'name');",
						 quote_identifier(data->tg_trigger->tgname),
						 sql_table_name(data->tg_relation), mapping_function(kind))));
}

static char *
join_problems(List *problems)
{
	StringInfoData buf;
	ListCell   *lc;

	if (problems == NIL)
		return NULL;
	initStringInfo(&buf);
	foreach(lc, problems)
		appendStringInfo(&buf, "%s%s", buf.len > 0 ? "; " : "", (char *) lfirst(lc));
	return buf.data;
}

static Armed *
arm(const Trigger *trigger, Relation rel, UserpilotKind kind)
{
	Armed	   *armed = palloc0(sizeof(Armed));
	const char *server;
	Oid			serverid;

	armed->mapping = mapping_read(kind, trigger->tgargs, trigger->tgnargs, RelationGetDescr(rel));
	armed->problems = join_problems(armed->mapping->problems);
	server = armed->mapping->server ? armed->mapping->server : environment_default_server();
	if (environment_may_use(server, rel->rd_rel->relowner, &serverid, &armed->why))
		armed->server = environment_ref(serverid);
	return armed;
}

static Armed *
armed_for(FunctionCallInfo fcinfo, UserpilotKind kind)
{
	const TriggerData *data = (const TriggerData *) fcinfo->context;

	if (fcinfo->flinfo->fn_extra == NULL)
	{
		MemoryContext old = MemoryContextSwitchTo(fcinfo->flinfo->fn_mcxt);

		fcinfo->flinfo->fn_extra = arm(data->tg_trigger, data->tg_relation, kind);
		MemoryContextSwitchTo(old);
	}
	return fcinfo->flinfo->fn_extra;
}

/* Warns, but not for every row of a large statement */
static bool
may_warn(void)
{
	static TimestampTz transaction = 0;
	static int	warnings = 0;

	if (transaction != GetCurrentTransactionStartTimestamp())
	{
		transaction = GetCurrentTransactionStartTimestamp();
		warnings = 0;
	}
	return warnings++ < MAX_WARNINGS;
}

/*
 * The row as it is now.  A trigger that fired before this one may have changed
 * it again; that change's own event has come before ours, so the older version
 * must not be queued after it.  NULL if the row is gone.
 */
static TupleTableSlot *
newest_version(Relation rel, TupleTableSlot *slot)
{
	ItemPointerData tid = slot->tts_tid;
	TupleTableSlot *newest;
	TableScanDesc scan;

	if (rel->rd_rel->relkind != RELKIND_RELATION ||
		table_tuple_satisfies_snapshot(rel, slot, SnapshotSelf))
		return slot;
	scan = table_beginscan_tid(rel, SnapshotSelf);
	table_tuple_get_latest_tid(scan, &tid);
	table_endscan(scan);
	newest = MakeSingleTupleTableSlot(RelationGetDescr(rel), table_slot_callbacks(rel));
	if (!table_tuple_fetch_row_version(rel, &tid, SnapshotSelf, newest))
	{
		ExecDropSingleTupleTableSlot(newest);
		return NULL;
	}
	return newest;
}

static void
refuse(const Armed *armed, const TriggerData *data, const QueueChange *change,
	   const char *complaint)
{
	char	   *error = psprintf("trigger \"%s\" of table \"%s\": %s", data->tg_trigger->tgname,
								 RelationGetRelationName(data->tg_relation), complaint);

	if (armed->server->invalid_is_error)
		ereport(ERROR,
				(errcode(ERRCODE_DATA_EXCEPTION),
				 errmsg("%s", error),
				 errhint("Server option on_invalid is \"error\"; with \"dead_letter\" the statement would pass.")));
	queue_refuse(change, error, false);
	if (may_warn())
		ereport(WARNING,
				(errcode(ERRCODE_DATA_EXCEPTION),
				 errmsg("not sent to Userpilot: %s", error),
				 errdetail("The row is in userpilot_dead_letters."),
				 errhint("SELECT * FROM userpilot_check_trigger(%s);",
						 quote_literal_cstr(sql_table_name(data->tg_relation)))));
}

static void
enqueue_row(const Armed *armed, const TriggerData *data, TupleTableSlot *before,
			TupleTableSlot *slot)
{
	QueueChange change = {.server = armed->server->name};
	const char *complaint = mapping_change(armed->mapping, &armed->server->shape, before, slot,
										   &change);

	if (armed->problems != NULL)
		complaint = armed->problems;
	if (complaint != NULL)
		refuse(armed, data, &change, complaint);
	else
		queue_enqueue(&change, mapping_function(change.kind));
}

static Datum
fire(FunctionCallInfo fcinfo, UserpilotKind kind)
{
	const TriggerData *data = (const TriggerData *) fcinfo->context;
	TupleTableSlot *before = NULL;
	TupleTableSlot *fired;
	TupleTableSlot *slot;
	const Armed *armed;

	check_manner(fcinfo, kind);
	armed = armed_for(fcinfo, kind);
	if (armed->server == NULL)
	{
		if (may_warn())
			ereport(WARNING,
					(errmsg("not sent to Userpilot: trigger \"%s\" of table \"%s\": %s",
							data->tg_trigger->tgname, RelationGetRelationName(data->tg_relation),
							armed->why),
					 errhint("SELECT * FROM userpilot_sync_table(%s); queues what was missed.",
							 quote_literal_cstr(sql_table_name(data->tg_relation)))));
		return PointerGetDatum(NULL);
	}

	fired = data->tg_trigslot;
	if (TRIGGER_FIRED_BY_UPDATE(data->tg_event))
	{
		before = data->tg_trigslot;
		fired = data->tg_newslot;
	}
	slot = newest_version(data->tg_relation, fired);
	if (slot == NULL)
		return PointerGetDatum(NULL);
	if (before == NULL || armed->problems != NULL ||
		mapping_changed(armed->mapping, before, slot))
		enqueue_row(armed, data, before, slot);
	if (slot != fired)
		ExecDropSingleTupleTableSlot(slot);
	return PointerGetDatum(NULL);
}

Datum
userpilot_company_trigger(PG_FUNCTION_ARGS)
{
	return fire(fcinfo, USERPILOT_COMPANY);
}

Datum
userpilot_user_trigger(PG_FUNCTION_ARGS)
{
	return fire(fcinfo, USERPILOT_USER);
}

/* ---------------------------------------------------------- what is wrong */

/* Where findings go */
typedef struct Report
{
	ReturnSetInfo *result;
	const char *trigger;
	int			findings;
} Report;

static void
report(Report *to, const char *finding, const char *hint)
{
	Datum		values[3] = {CStringGetTextDatum(to->trigger), CStringGetTextDatum(finding), (Datum) 0};
	bool		nulls[3] = {false, false, hint == NULL};

	if (hint != NULL)
		values[2] = CStringGetTextDatum(hint);
	tuplestore_putvalues(to->result->setResult, to->result->setDesc, values, nulls);
	to->findings++;
}

/* UPDATE OF columns that leave out one that is sent */
static void
report_column(Report *to, Relation rel, const Trigger *trigger, AttrNumber attnum)
{
	for (int i = 0; i < trigger->tgnattr; i++)
		if (trigger->tgattr[i] == attnum)
			return;
	report(to, psprintf("changes of column \"%s\" do not fire it",
						NameStr(TupleDescAttr(RelationGetDescr(rel), attnum - 1)->attname)),
		   "Leave the list out after UPDATE: the trigger itself queues nothing when no column of its own has changed.");
}

static void
report_columns(Report *to, Relation rel, const Trigger *trigger, const Mapping *mapping)
{
	if (trigger->tgnattr == 0)
		return;
	if (mapping->id != InvalidAttrNumber)
		report_column(to, rel, trigger, mapping->id);
	if (mapping->company != InvalidAttrNumber && mapping->company != mapping->id)
		report_column(to, rel, trigger, mapping->company);
	for (int i = 0; i < mapping->ncolumns; i++)
		report_column(to, rel, trigger, mapping->columns[i].attnum);
}

static void
report_manner(Report *to, Relation rel, const Trigger *trigger, UserpilotKind kind)
{
	char	   *table = sql_table_name(rel);

	if (!TRIGGER_FOR_ROW(trigger->tgtype) || !TRIGGER_FOR_AFTER(trigger->tgtype) ||
		(trigger->tgtype & (TRIGGER_TYPE_DELETE | TRIGGER_TYPE_TRUNCATE)) != 0)
		report(to, "it does not fire after INSERT or UPDATE, for each row",
			   psprintf("CREATE TRIGGER %s AFTER INSERT OR UPDATE ON %s FOR EACH ROW EXECUTE FUNCTION %s('id', 'name');",
						quote_identifier(trigger->tgname), table, mapping_function(kind)));
	else if (!TRIGGER_FOR_INSERT(trigger->tgtype) || !TRIGGER_FOR_UPDATE(trigger->tgtype))
		report(to, TRIGGER_FOR_INSERT(trigger->tgtype) ? "it does not fire on UPDATE" :
			   "it does not fire on INSERT", "CREATE TRIGGER ... AFTER INSERT OR UPDATE ...");
	if (trigger->tgenabled == TRIGGER_DISABLED)
		report(to, "it is disabled", psprintf("ALTER TABLE %s ENABLE TRIGGER %s;", table,
											  quote_identifier(trigger->tgname)));
	if (trigger->tgenabled == TRIGGER_FIRES_ON_REPLICA)
		report(to, "it fires for replicated changes only",
			   psprintf("ALTER TABLE %s ENABLE ALWAYS TRIGGER %s;", table,
						quote_identifier(trigger->tgname)));
	if (trigger->tgenabled == TRIGGER_FIRES_ON_ORIGIN && environment_is_subscribed(RelationGetRelid(rel)))
		report(to, "the table is filled by a subscription, whose changes do not fire it",
			   psprintf("ALTER TABLE %s ENABLE ALWAYS TRIGGER %s;", table,
						quote_identifier(trigger->tgname)));
}

static void
report_trigger(Report *to, Relation rel, const Trigger *trigger, UserpilotKind kind)
{
	Armed	   *armed = arm(trigger, rel, kind);
	Mapping    *mapping = armed->mapping;
	const char *reason;
	ListCell   *lc;

	to->trigger = trigger->tgname;
	to->findings = 0;
	report_manner(to, rel, trigger, kind);
	foreach(lc, mapping->problems)
		report(to, lfirst(lc), "CREATE OR REPLACE TRIGGER with the table's columns; rows of the meantime are in userpilot_dead_letters.");
	if (OidIsValid(mapping->id_type) && !change_is_id_type(mapping->id_type))
		report(to, psprintf("the id is of type %s", format_type_be(mapping->id_type)),
			   "An id is text, varchar, smallint, integer, bigint, numeric or uuid.");
	if (OidIsValid(mapping->company_type) && !change_is_id_type(mapping->company_type))
		report(to, psprintf("the company's id is of type %s", format_type_be(mapping->company_type)),
			   "An id is text, varchar, smallint, integer, bigint, numeric or uuid.");
	report_columns(to, rel, trigger, mapping);
	if (armed->server == NULL)
		report(to, armed->why, "The owner of the table needs USAGE on the server; name another with 'server=...', or as the database's userpilot.server.");
	else if ((reason = environment_disabled_reason(armed->server->serverid)) != NULL)
		report(to, psprintf("server \"%s\" is %s", text_to_cstring(armed->server->name), reason),
			   "Changes are queued until then.");
	if (!state_available())
		report(to, "the library is not preloaded: changes are queued, but nothing is sent",
			   "Add userpilot to shared_preload_libraries and restart.");
	if (to->findings == 0)
		report(to, "ok", NULL);
}

/*
 * userpilot_check_trigger(regclass) returns table (trigger, finding, hint)
 */
Datum
userpilot_check_trigger(PG_FUNCTION_ARGS)
{
	Report		to = {0};
	Relation	rel;
	TriggerDesc *triggers;
	bool		any = false;

	if (PG_ARGISNULL(0))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("the table must not be null")));
	InitMaterializedSRF(fcinfo, 0);
	to.result = (ReturnSetInfo *) fcinfo->resultinfo;
	rel = relation_open(PG_GETARG_OID(0), AccessShareLock);
	triggers = CopyTriggerDesc(rel->trigdesc);
	for (int i = 0; triggers != NULL && i < triggers->numtriggers; i++)
	{
		UserpilotKind kind;

		if (!mapping_is_ours(&triggers->triggers[i], &kind))
			continue;
		report_trigger(&to, rel, &triggers->triggers[i], kind);
		any = true;
	}
	if (!any)
	{
		to.trigger = "";
		report(&to, "the table has no userpilot trigger",
			   psprintf("CREATE TRIGGER to_userpilot AFTER INSERT OR UPDATE ON %s FOR EACH ROW EXECUTE FUNCTION userpilot_company_trigger('id', 'name');",
						sql_table_name(rel)));
	}
	relation_close(rel, AccessShareLock);
	return (Datum) 0;
}
