/*
 * sql.c
 *	  Statements of the tables' modules: planned once, kept, parameterised.
 */
#include "postgres.h"

#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"

#include "environment.h"
#include "sql.h"

static char *
with_schema(const char *text, Oid schema)
{
	const char *name = quote_identifier(get_namespace_name(schema));
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
	SPIPlanPtr	plan;

	if (statement->plan != NULL && statement->schema == schema)
		return;
	if (statement->plan != NULL)
		SPI_freeplan(statement->plan);
	statement->plan = NULL;

	plan = SPI_prepare(with_schema(statement->text, schema), statement->nargs, statement->types);
	if (plan == NULL)
		elog(ERROR, "SPI_prepare failed: %s", SPI_result_code_string(SPI_result));
	SPI_keepplan(plan);
	statement->plan = plan;
	statement->schema = schema;
}

int
sql_execute(SqlStatement *statement, Datum *args, const char *nulls, bool read_only)
{
	int			rc;

	prepare(statement);
	rc = SPI_execute_plan(statement->plan, args, nulls, read_only, 0);
	if (rc < 0)
		elog(ERROR, "SPI_execute_plan failed: %s", SPI_result_code_string(rc));
	return (int) SPI_processed;
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
	if (SPI_connect() != SPI_OK_CONNECT)
		elog(ERROR, "SPI_connect failed");
}

void
sql_become_caller(const SqlCaller *caller)
{
	if (SPI_finish() != SPI_OK_FINISH)
		elog(ERROR, "SPI_finish failed");
	SetUserIdAndSecContext(caller->role, caller->sec_context);
}
