/*
 * aggregates.c
 *	  Whole tables with one SELECT: bulk aggregates and payload aggregates.
 *
 * A bulk aggregate's transition function queues each row; all groups of one
 * aggregate share one buffer, hung off the transition function's FmgrInfo,
 * and every final function flushes it.  The final functions are declared
 * FINALFUNC_MODIFY = READ_WRITE, so core itself refuses window use, and
 * PARALLEL UNSAFE.  Grouping sets would call them with rows that are counted
 * more than once, so they are refused here.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "fmgr.h"
#include "nodes/execnodes.h"
#include "nodes/plannodes.h"
#include "utils/builtins.h"

#include "change.h"
#include "environment.h"
#include "payload.h"
#include "queue.h"

PG_FUNCTION_INFO_V1(userpilot_bulk_companies_trans);
PG_FUNCTION_INFO_V1(userpilot_bulk_users_trans);
PG_FUNCTION_INFO_V1(userpilot_bulk_final);
PG_FUNCTION_INFO_V1(userpilot_companies_payload_trans);
PG_FUNCTION_INFO_V1(userpilot_companies_ndjson_trans);
PG_FUNCTION_INFO_V1(userpilot_companies_payload_final);
PG_FUNCTION_INFO_V1(userpilot_users_payload_trans);
PG_FUNCTION_INFO_V1(userpilot_users_ndjson_trans);
PG_FUNCTION_INFO_V1(userpilot_users_payload_final);
PG_FUNCTION_INFO_V1(userpilot_ndjson_final);

/* What one aggregate of one executor needs for every row */
typedef struct AggregateCall
{
	Oid			id_type;
	Oid			company_type;	/* InvalidOid: no such argument */
	QueueBatch *batch;			/* bulk aggregates only */
} AggregateCall;

/* Transition value of a bulk aggregate: one a group */
typedef struct BulkGroup
{
	QueueBatch *batch;
	int64		rows;
} BulkGroup;

/* A row's arguments, checked */
typedef struct AggregateRow
{
	text	   *id;
	text	   *company_id;
	Jsonb	   *metadata;
} AggregateRow;

static MemoryContext
aggregate_context(FunctionCallInfo fcinfo)
{
	MemoryContext context;

	if (AggCheckCallContext(fcinfo, &context) != AGG_CONTEXT_AGGREGATE)
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("function must be called as a plain aggregate")));
	return context;
}

static void
refuse_grouping_sets(FunctionCallInfo fcinfo)
{
	const AggState *state = (AggState *) fcinfo->context;
	const Agg  *plan = (Agg *) state->ss.ps.plan;

	if (plan->groupingSets != NIL || plan->chain != NIL)
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("bulk aggregates cannot be used with GROUPING SETS, ROLLUP or CUBE"),
				 errdetail("Each row would be queued once for every grouping set."),
				 errhint("Use a plain GROUP BY, or none.")));
}

static AggregateCall *
aggregate_call(FunctionCallInfo fcinfo)
{
	AggregateCall *call = fcinfo->flinfo->fn_extra;

	if (call == NULL)
	{
		call = MemoryContextAllocZero(fcinfo->flinfo->fn_mcxt, sizeof(AggregateCall));
		call->id_type = get_fn_expr_argtype(fcinfo->flinfo, 1);
		if (PG_NARGS() > 3)
			call->company_type = get_fn_expr_argtype(fcinfo->flinfo, 3);
		fcinfo->flinfo->fn_extra = call;
	}
	return call;
}

/* Arguments: state, id, metadata[, company_id] */
static AggregateRow
aggregate_row(FunctionCallInfo fcinfo, const AggregateCall *call, UserpilotKind kind)
{
	AggregateRow row = {0};

	row.id = change_id(call->id_type, PG_GETARG_DATUM(1), PG_ARGISNULL(1),
					   kind == USERPILOT_COMPANY ? "company_id" : "user_id");
	if (PG_ARGISNULL(2))
		row.metadata = change_no_metadata();
	else
	{
		row.metadata = PG_GETARG_JSONB_P(2);
		change_check_metadata(row.metadata);
	}
	if (OidIsValid(call->company_type) && !PG_ARGISNULL(3))
		row.company_id = change_id(call->company_type, PG_GETARG_DATUM(3), false, "company_id");
	return row;
}

/* ------------------------------------------------------ bulk aggregates */

static void
open_batch(FunctionCallInfo fcinfo, AggregateCall *call, UserpilotKind kind)
{
	MemoryContext old = MemoryContextSwitchTo(fcinfo->flinfo->fn_mcxt);
	text	   *server;

	refuse_grouping_sets(fcinfo);
	server = DatumGetTextPCopy(PointerGetDatum(environment_current()->name));
	call->batch = queue_batch_open(server, kind, kind == USERPILOT_COMPANY ?
								   "userpilot_bulk_identify_companies()" :
								   "userpilot_bulk_identify_users()");
	MemoryContextSwitchTo(old);
}

static Datum
bulk_transition(FunctionCallInfo fcinfo, UserpilotKind kind)
{
	MemoryContext context = aggregate_context(fcinfo);
	AggregateCall *call = aggregate_call(fcinfo);
	AggregateRow row = aggregate_row(fcinfo, call, kind);
	BulkGroup  *group = PG_ARGISNULL(0) ? NULL : (BulkGroup *) PG_GETARG_POINTER(0);
	QueueChange change = {.kind = kind};

	if (call->batch == NULL)
		open_batch(fcinfo, call, kind);
	if (group == NULL)
	{
		group = MemoryContextAllocZero(context, sizeof(BulkGroup));
		group->batch = call->batch;
	}
	change.server = queue_batch_server(call->batch);
	change.entity_id = row.id;
	change.company_id = row.company_id;
	change.metadata = row.metadata;
	queue_batch_add(call->batch, &change);
	group->rows++;
	PG_RETURN_POINTER(group);
}

Datum
userpilot_bulk_companies_trans(PG_FUNCTION_ARGS)
{
	return bulk_transition(fcinfo, USERPILOT_COMPANY);
}

Datum
userpilot_bulk_users_trans(PG_FUNCTION_ARGS)
{
	return bulk_transition(fcinfo, USERPILOT_USER);
}

/* Rows queued; 0 for no rows at all */
Datum
userpilot_bulk_final(PG_FUNCTION_ARGS)
{
	BulkGroup  *group;

	(void) aggregate_context(fcinfo);
	if (PG_ARGISNULL(0))
		PG_RETURN_INT64(0);
	group = (BulkGroup *) PG_GETARG_POINTER(0);
	queue_batch_flush(group->batch);
	PG_RETURN_INT64(group->rows);
}

/* --------------------------------------------------- payload aggregates */

static Datum
payload_transition(FunctionCallInfo fcinfo, UserpilotKind kind, char separator)
{
	MemoryContext context = aggregate_context(fcinfo);
	AggregateCall *call = aggregate_call(fcinfo);
	AggregateRow row = aggregate_row(fcinfo, call, kind);
	StringInfo	out;

	if (PG_ARGISNULL(0))
	{
		MemoryContext old = MemoryContextSwitchTo(context);

		out = makeStringInfo();
		MemoryContextSwitchTo(old);
		if (separator == ',')
			appendStringInfoString(out, payload_open(kind));
	}
	else
	{
		out = (StringInfo) PG_GETARG_POINTER(0);
		if (separator == ',')
			appendStringInfoChar(out, separator);
	}

	payload_record(out, kind, VARDATA_ANY(row.id), VARSIZE_ANY_EXHDR(row.id),
				   row.company_id ? VARDATA_ANY(row.company_id) : NULL,
				   row.company_id ? VARSIZE_ANY_EXHDR(row.company_id) : 0,
				   row.metadata);
	if (separator == '\n')
		appendStringInfoChar(out, separator);
	PG_RETURN_POINTER(out);
}

/* The state stays as it is: a final function may be called again */
static Datum
payload_result(FunctionCallInfo fcinfo, const char *empty, const char *end)
{
	StringInfo	out = PG_ARGISNULL(0) ? NULL : (StringInfo) PG_GETARG_POINTER(0);
	const char *body = out ? out->data : empty;
	int			len = out ? out->len : (int) strlen(empty);
	int			endlen = strlen(end);
	text	   *result = palloc(VARHDRSZ + len + endlen);

	memcpy(VARDATA(result), body, len);
	memcpy(VARDATA(result) + len, end, endlen);
	SET_VARSIZE(result, VARHDRSZ + len + endlen);
	PG_RETURN_TEXT_P(result);
}

Datum
userpilot_companies_payload_trans(PG_FUNCTION_ARGS)
{
	return payload_transition(fcinfo, USERPILOT_COMPANY, ',');
}

Datum
userpilot_users_payload_trans(PG_FUNCTION_ARGS)
{
	return payload_transition(fcinfo, USERPILOT_USER, ',');
}

Datum
userpilot_companies_ndjson_trans(PG_FUNCTION_ARGS)
{
	return payload_transition(fcinfo, USERPILOT_COMPANY, '\n');
}

Datum
userpilot_users_ndjson_trans(PG_FUNCTION_ARGS)
{
	return payload_transition(fcinfo, USERPILOT_USER, '\n');
}

Datum
userpilot_companies_payload_final(PG_FUNCTION_ARGS)
{
	return payload_result(fcinfo, payload_open(USERPILOT_COMPANY), payload_close());
}

Datum
userpilot_users_payload_final(PG_FUNCTION_ARGS)
{
	return payload_result(fcinfo, payload_open(USERPILOT_USER), payload_close());
}

Datum
userpilot_ndjson_final(PG_FUNCTION_ARGS)
{
	return payload_result(fcinfo, "", "");
}
