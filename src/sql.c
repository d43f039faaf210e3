/*
 * sql.c
 *	  What the tables' modules share: statements, planned once, kept and
 *	  parameterised; tables as they are known; acting as their owner.
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/table.h"
#include "access/tableam.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"

#include "compat.h"
#include "environment.h"
#include "sql.h"

static char *
with_schema(const char *text, const char *schema)
{
	const char *name = quote_identifier(schema);
	StringInfoData out;

	initStringInfo(&out);
	for (const char *p = text; *p; p++)
	{
		if (*p == '@')
			appendStringInfoString(&out, name);
		else
			appendStringInfoChar(&out, *p);
	}
	return out.data;
}

static void
prepare(SqlStatement *statement)
{
	Oid			schema = environment_schema();
	const char *name = get_namespace_name(schema);
	SPIPlanPtr	plan;

	if (statement->plan != NULL && strcmp(statement->schema, name) == 0)
		return;
	if (statement->plan != NULL)
		SPI_freeplan(statement->plan);
	statement->plan = NULL;

	plan = SPI_prepare(with_schema(statement->text, name), statement->nargs, statement->types);
	if (plan == NULL)
		elog(ERROR, "SPI_prepare failed: %s", SPI_result_code_string(SPI_result));
	SPI_keepplan(plan);
	statement->plan = plan;
	strlcpy(statement->schema, name, sizeof(statement->schema));
}

Oid
sql_relid(const char *name)
{
	Oid			relid = get_relname_relid(name, environment_schema());

	if (!OidIsValid(relid))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_TABLE),
				 errmsg("table %s of extension userpilot is missing", name),
				 errhint("DROP EXTENSION userpilot; CREATE EXTENSION userpilot;")));
	return relid;
}

char *
sql_table_name(Relation rel)
{
	return quote_qualified_identifier(get_namespace_name(RelationGetNamespace(rel)),
									  RelationGetRelationName(rel));
}

void
sql_check_columns(Relation rel, const SqlColumn *columns, int n)
{
	TupleDesc	desc = RelationGetDescr(rel);
	bool		good = desc->natts == n;

	for (int i = 0; good && i < n; i++)
	{
		Form_pg_attribute att = TupleDescAttr(desc, i);

		good = !att->attisdropped && att->atttypid == columns[i].type &&
			strcmp(NameStr(att->attname), columns[i].name) == 0;
	}
	if (!good)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("table %s is not what this version of userpilot expects", sql_table_name(rel)),
				 errhint("Update the extension with ALTER EXTENSION userpilot UPDATE, or reconnect if the library is older.")));
}

bool
sql_index_has_rows(const char *table, const char *name)
{
	/* the table first, as everybody locks them */
	Relation	rel = table_open(sql_relid(table), AccessShareLock);
	Oid			indexid = get_relname_relid(name, RelationGetNamespace(rel));
	bool		found = true;

	if (list_member_oid(RelationGetIndexList(rel), indexid))
	{
		Relation	index = index_open(indexid, AccessShareLock);
		TupleTableSlot *slot = table_slot_create(rel, NULL);
		IndexScanDesc scan;

		if (index->rd_index->indisvalid)
		{
			scan = compat_index_beginscan(rel, index, GetActiveSnapshot(), 0);
			index_rescan(scan, NULL, 0, NULL, 0);
			found = index_getnext_slot(scan, ForwardScanDirection, slot);
			index_endscan(scan);
		}
		ExecDropSingleTupleTableSlot(slot);
		index_close(index, NoLock);
	}
	table_close(rel, NoLock);
	return found;
}

int
sql_execute(SqlStatement *statement, Datum *args, const char *nulls, bool read_only)
{
	MemoryContext caller = CurrentMemoryContext;
	int			rc;

	prepare(statement);
	rc = SPI_execute_plan(statement->plan, args, nulls, read_only, 0);
	/* SPI leaves its own context behind, which dies with SPI_finish */
	MemoryContextSwitchTo(caller);
	if (rc < 0)
		elog(ERROR, "SPI_execute_plan failed: %s", SPI_result_code_string(rc));
	return (int) SPI_processed;
}

#define FETCH_ROWS 500

void
sql_read_rows(const char *query, void (*handler) (HeapTuple tuple, void *arg), void *arg)
{
	MemoryContext caller = CurrentMemoryContext;
	MemoryContext per_row = AllocSetContextCreate(caller, "userpilot row", ALLOCSET_DEFAULT_SIZES);
	SPIPlanPtr	plan = SPI_prepare(query, 0, NULL);
	Portal		portal;

	if (plan == NULL)
		elog(ERROR, "SPI_prepare failed: %s", SPI_result_code_string(SPI_result));
	portal = SPI_cursor_open(NULL, plan, NULL, NULL, true);
	for (uint64 n = 1; n > 0;)
	{
		SPITupleTable *rows;

		SPI_cursor_fetch(portal, true, FETCH_ROWS);
		/* the handler may use SPI itself */
		rows = SPI_tuptable;
		n = SPI_processed;
		MemoryContextSwitchTo(per_row);
		for (uint64 i = 0; i < n; i++)
		{
			CHECK_FOR_INTERRUPTS();
			handler(rows->vals[i], arg);
			MemoryContextReset(per_row);
		}
		SPI_freetuptable(rows);
	}
	SPI_cursor_close(portal);
	MemoryContextSwitchTo(caller);
	MemoryContextDelete(per_row);
}

int64
sql_int64(int column, int64 dflt)
{
	bool		isnull;
	Datum		d;

	if (SPI_processed == 0)
		return dflt;
	d = SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, column, &isnull);
	return isnull ? dflt : DatumGetInt64(d);
}

void
sql_become_owner(SqlCaller *caller)
{
	Oid			owner = InvalidOid;

	(void) environment_installed(NULL, &owner, NULL);
	GetUserIdAndSecContext(&caller->role, &caller->sec_context);
	SetUserIdAndSecContext(owner, caller->sec_context |
						   SECURITY_LOCAL_USERID_CHANGE |
						   SECURITY_RESTRICTED_OPERATION);
	sql_connect();
}

void
sql_connect(void)
{
	MemoryContext context = CurrentMemoryContext;

	if (SPI_connect() != SPI_OK_CONNECT)
		elog(ERROR, "SPI_connect failed");
	MemoryContextSwitchTo(context);
}

void
sql_become_caller(const SqlCaller *caller)
{
	if (SPI_finish() != SPI_OK_FINISH)
		elog(ERROR, "SPI_finish failed");
	SetUserIdAndSecContext(caller->role, caller->sec_context);
}

void
sql_begin_call(bool atomic)
{
	if (SPI_connect_ext(atomic ? 0 : SPI_OPT_NONATOMIC) != SPI_OK_CONNECT)
		elog(ERROR, "SPI_connect_ext failed");
}

void
sql_commit(void)
{
	SPI_commit();
}

void
sql_end_call(void)
{
	if (SPI_finish() != SPI_OK_FINISH)
		elog(ERROR, "SPI_finish failed");
}
