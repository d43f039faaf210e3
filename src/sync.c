/*
 * sync.c
 *	  A table's rows through its own trigger mapping: first load, nightly
 *	  reconciliation, a new property, repair.
 *
 * The table is read as its owner, with SECURITY_RESTRICTED_OPERATION, as core
 * does in maintenance commands: a superuser may run this on anyone's table,
 * and a WHEN condition or a type's output function is the owner's code.  For
 * the same reason what that code sets is undone; and it does not run with the
 * caller's search_path, who could otherwise make it call functions of his.
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/table.h"
#include "catalog/pg_class.h"
#include "executor/executor.h"
#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "nodes/makefuncs.h"
#include "optimizer/optimizer.h"
#include "rewrite/prs2lock.h"
#include "rewrite/rewriteManip.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/rls.h"

#include "compat.h"
#include "environment.h"
#include "intake.h"
#include "mapping.h"
#include "sql.h"

PG_FUNCTION_INFO_V1(userpilot_sync_table);

/* One trigger's pass over the table */
typedef struct Pass
{
	Relation	rel;
	const Trigger *trigger;
	Mapping    *mapping;
	Intake	   *intake;
	IntakeCounts counts;
	EState	   *estate;
	ExprState  *when;			/* NULL: all rows */
	TupleTableSlot *slot;
} Pass;

static void
check_privileges(Relation rel)
{
	AclResult	result = pg_class_aclcheck(RelationGetRelid(rel), GetUserId(), ACL_SELECT);

	if (result != ACLCHECK_OK)
		aclcheck_error(result, get_relkind_objtype(rel->rd_rel->relkind),
					   RelationGetRelationName(rel));
	if (check_enable_rls(RelationGetRelid(rel), InvalidOid, true) == RLS_ENABLED)
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("row-level security hides rows of table \"%s\" from you",
						RelationGetRelationName(rel)),
				 errhint("Let the table's owner run userpilot_sync_table().")));
	/* it is read as its owner */
	if (check_enable_rls(RelationGetRelid(rel), rel->rd_rel->relowner, true) == RLS_ENABLED)
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("row-level security hides rows of table \"%s\" from its owner",
						RelationGetRelationName(rel)),
				 errhint("ALTER TABLE %s NO FORCE ROW LEVEL SECURITY; or give it an owner with BYPASSRLS.",
						 sql_table_name(rel))));
}

/*
 * What the trigger's WHEN condition says of the row alone; where it compares
 * with the row before, it says nothing of a row that is there.
 */
static void
prepare_when(Pass *pass)
{
	List	   *about_row = NIL;
	ListCell   *lc;

	if (pass->trigger->tgqual == NULL)
		return;
	foreach(lc, make_ands_implicit(stringToNode(pass->trigger->tgqual)))
	{
		Node	   *qual = lfirst(lc);

		if (bms_is_member(PRS2_OLD_VARNO, pull_varnos(NULL, qual)))
			continue;
		ChangeVarNodes(qual, PRS2_NEW_VARNO, OUTER_VAR, 0);
		about_row = lappend(about_row, qual);
	}
	if (about_row != NIL)
		pass->when = ExecPrepareQual(about_row, pass->estate);
}

static bool
is_wanted(Pass *pass)
{
	ExprContext *econtext;

	if (pass->when == NULL)
		return true;
	econtext = GetPerTupleExprContext(pass->estate);
	econtext->ecxt_outertuple = pass->slot;
	return ExecQual(pass->when, econtext);
}

static void
take_row(Pass *pass)
{
	const EnvironmentRef *server = intake_server(pass->intake);
	QueueChange change = {.server = server->name};
	char	   *complaint = mapping_change(pass->mapping, &server->shape, NULL, pass->slot, &change);

	if (complaint == NULL)
		intake_add(pass->intake, &change, &pass->counts);
	else
		intake_refuse(pass->intake, &change,
					  psprintf("trigger \"%s\" of table \"%s\": %s", pass->trigger->tgname,
							   RelationGetRelationName(pass->rel), complaint),
					  &pass->counts);
}

/* Column by column, as a table that lost one still has its place in a row */
static char *
row_query(Relation rel)
{
	TupleDesc	desc = RelationGetDescr(rel);
	StringInfoData query;

	initStringInfo(&query);
	for (int i = 0; i < desc->natts; i++)
	{
		Form_pg_attribute att = TupleDescAttr(desc, i);

		appendStringInfo(&query, "%s%s", i == 0 ? "SELECT " : ", ",
						 att->attisdropped ? "NULL" : quote_identifier(NameStr(att->attname)));
	}
	/* children of a partitioned table have clones of its triggers, others none */
	appendStringInfo(&query, " FROM %s%s",
					 rel->rd_rel->relkind == RELKIND_RELATION ? "ONLY " : "",
					 sql_table_name(rel));
	return query.data;
}

static void
read_row(HeapTuple tuple, void *arg)
{
	Pass	   *pass = arg;

	ExecStoreHeapTuple(tuple, pass->slot, false);
	pass->slot->tts_tableOid = RelationGetRelid(pass->rel);
	if (is_wanted(pass))
		take_row(pass);
	ResetPerTupleExprContext(pass->estate);
}

static void
sync_trigger(Relation rel, const Trigger *trigger, UserpilotKind kind, IntakeCounts *sum)
{
	Pass		pass = {.rel = rel,.trigger = trigger};
	const char *server;
	Oid			serverid;
	Oid			user;
	int			sec_context;
	int			level;

	pass.mapping = mapping_read(kind, trigger->tgargs, trigger->tgnargs, RelationGetDescr(rel));
	if (pass.mapping->problems != NIL)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_COLUMN),
				 errmsg("trigger \"%s\" of table \"%s\": %s", trigger->tgname,
						RelationGetRelationName(rel), (char *) linitial(pass.mapping->problems)),
				 errhint("Create it again with the table's columns; userpilot_check_trigger() says what else is wrong.")));
	server = pass.mapping->server ? pass.mapping->server : environment_default_server();
	serverid = environment_lookup(server, true);
	environment_check_usage(serverid, rel->rd_rel->relowner);
	pass.intake = intake_open(environment_ref(serverid), kind, "userpilot_sync_table()",
							  psprintf("SELECT * FROM userpilot_sync_table(%s)",
									   quote_literal_cstr(sql_table_name(rel))));

	GetUserIdAndSecContext(&user, &sec_context);
	SetUserIdAndSecContext(rel->rd_rel->relowner, sec_context | SECURITY_RESTRICTED_OPERATION);
	level = NewGUCNestLevel();
	(void) set_config_option("search_path", "pg_catalog, pg_temp", PGC_USERSET, PGC_S_SESSION,
							 GUC_ACTION_SAVE, true, 0, false);
	pass.estate = CreateExecutorState();
	prepare_when(&pass);
	pass.slot = MakeSingleTupleTableSlot(RelationGetDescr(rel), &TTSOpsHeapTuple);
	sql_read_rows(row_query(rel), read_row, &pass);
	intake_flush(pass.intake);
	ExecDropSingleTupleTableSlot(pass.slot);
	FreeExecutorState(pass.estate);
	AtEOXact_GUC(false, level);
	SetUserIdAndSecContext(user, sec_context);
	/* what is queued is seen by the next one, which may then leave out rows */
	CommandCounterIncrement();

	sum->rows += pass.counts.rows;
	sum->fresh += pass.counts.fresh;
	sum->changed += pass.counts.changed;
	sum->unchanged += pass.counts.unchanged;
	sum->invalid += pass.counts.invalid;
}

static void
refuse_table(Relation rel, bool disabled)
{
	ereport(ERROR,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("table \"%s\" has no %suserpilot trigger", RelationGetRelationName(rel),
					disabled ? "enabled " : ""),
			 errhint("CREATE TRIGGER to_userpilot AFTER INSERT OR UPDATE ON %s FOR EACH ROW EXECUTE FUNCTION userpilot_company_trigger('id', 'name');",
					 sql_table_name(rel))));
}

/*
 * userpilot_sync_table(regclass) returns (rows, queued, unchanged, invalid)
 */
Datum
userpilot_sync_table(PG_FUNCTION_ARGS)
{
	IntakeCounts sum = {0};
	Relation	rel;
	TriggerDesc *triggers;
	TupleDesc	desc;
	Datum		values[4];
	bool		nulls[4] = {0};
	int			found = 0;
	int			synced = 0;

	if (PG_ARGISNULL(0))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("the table must not be null")));
	if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");
	rel = table_open(PG_GETARG_OID(0), AccessShareLock);
	check_privileges(rel);
	/* others may create triggers meanwhile */
	triggers = CopyTriggerDesc(rel->trigdesc);
	sql_connect();
	for (int i = 0; triggers != NULL && i < triggers->numtriggers; i++)
	{
		const Trigger *trigger = &triggers->triggers[i];
		UserpilotKind kind;

		if (!mapping_is_ours(trigger, &kind))
			continue;
		found++;
		if (trigger->tgenabled == TRIGGER_DISABLED)
			continue;
		sync_trigger(rel, trigger, kind, &sum);
		synced++;
	}
	SPI_finish();
	if (synced == 0)
		refuse_table(rel, found > 0);
	table_close(rel, NoLock);

	values[0] = Int64GetDatum(sum.rows);
	values[1] = Int64GetDatum(sum.fresh + sum.changed);
	values[2] = Int64GetDatum(sum.unchanged);
	values[3] = Int64GetDatum(sum.invalid);
	PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(BlessTupleDesc(desc), values, nulls)));
}
