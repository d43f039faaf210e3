/*
 * aggregates.c
 *	  Whole tables with one SELECT: bulk, preview and payload aggregates.
 *
 * A bulk aggregate's transition function hands each row to intake.c, which
 * queues what Userpilot does not have; all groups of one aggregate share one
 * intake, hung off the transition function's FmgrInfo, and every final function
 * flushes it.  The final functions are declared
 * FINALFUNC_MODIFY = READ_WRITE, so core itself refuses window use, and
 * PARALLEL UNSAFE.  Grouping sets would call them with rows that are counted
 * more than once, so they are refused here.
 */
#include "postgres.h"

#include <ctype.h>
#include <math.h>

#include "access/htup_details.h"
#include "catalog/pg_type.h"
#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "nodes/execnodes.h"
#include "nodes/plannodes.h"
#include "utils/builtins.h"

#include "change.h"
#include "environment.h"
#include "intake.h"
#include "payload.h"
#include "settings.h"

PG_FUNCTION_INFO_V1(userpilot_bulk_companies_trans);
PG_FUNCTION_INFO_V1(userpilot_bulk_users_trans);
PG_FUNCTION_INFO_V1(userpilot_bulk_final);
PG_FUNCTION_INFO_V1(userpilot_preview_companies_trans);
PG_FUNCTION_INFO_V1(userpilot_preview_users_trans);
PG_FUNCTION_INFO_V1(userpilot_preview_final);
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
	Intake	   *intake;			/* bulk aggregates and previews */
	bool		has_shape;		/* payload aggregates: shape is filled */
	const Shape *shape;			/* ... NULL: no server says otherwise */
} AggregateCall;

/* Transition value of a bulk aggregate: one a group */
typedef struct BulkGroup
{
	Intake	   *intake;
	IntakeCounts counts;
} BulkGroup;

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

/* A row's arguments: state, id, metadata[, company_id] */
typedef struct RowArguments
{
	FunctionCallInfo fcinfo;
	const AggregateCall *call;
	const Shape *shape;			/* NULL: as it is */
	UserpilotKind kind;
	QueueChange change;			/* what they say, once checked */
} RowArguments;

static void
read_row(void *arg)
{
	RowArguments *row = arg;
	FunctionCallInfo fcinfo = row->fcinfo;
	QueueChange *change = &row->change;

	change->kind = row->kind;
	change->entity_id = change_id(row->call->id_type, PG_GETARG_DATUM(1), PG_ARGISNULL(1),
								  row->kind == USERPILOT_COMPANY ? "company_id" : "user_id");
	if (PG_ARGISNULL(2))
		change->metadata = change_no_metadata();
	else
	{
		change->metadata = PG_GETARG_JSONB_P(2);
		if (row->shape != NULL)
			change->metadata = shape_metadata(row->shape, row->kind, change->metadata);
		change_check_metadata(change->metadata);
	}
	if (OidIsValid(row->call->company_type) && !PG_ARGISNULL(3))
		change->company_id = change_id(row->call->company_type, PG_GETARG_DATUM(3), false,
									   "company_id");
}

/* ------------------------------------------------------ bulk aggregates */

/*
 * The statement alone: what else the caller has sent with it may hold a key.
 * Where one begins is not known of all (CREATE TABLE AS, EXPLAIN, cursors);
 * then it is told by nothing following it, or not at all.
 */
static char *
statement_of(FunctionCallInfo fcinfo)
{
	const EState *estate = ((AggState *) fcinfo->context)->ss.ps.state;
	const PlannedStmt *plan = estate->es_plannedstmt;
	const char *text;
	const char *end;
	int			len;

	if (plan == NULL || estate->es_sourceText == NULL)
		return pstrdup("");		/* a row is evaluated again after a concurrent update */
	text = estate->es_sourceText + Max(plan->stmt_location, 0);
	len = plan->stmt_len > 0 ? plan->stmt_len : (int) strlen(text);
	end = plan->stmt_len > 0 ? NULL : strchr(text, ';');
	if (end != NULL && end[strspn(end, "; \t\r\n")] != '\0')
		return pstrdup("");
	for (; len > 0 && isspace((unsigned char) *text); len--)
		text++;
	while (len > 0 && isspace((unsigned char) text[len - 1]))
		len--;
	return pnstrdup(text, len);
}

static void
open_intake(FunctionCallInfo fcinfo, AggregateCall *call, UserpilotKind kind, bool preview)
{
	MemoryContext old = MemoryContextSwitchTo(fcinfo->flinfo->fn_mcxt);
	const char *command = kind == USERPILOT_COMPANY ?
		"userpilot_bulk_identify_companies()" : "userpilot_bulk_identify_users()";

	refuse_grouping_sets(fcinfo);
	/* a copy: whatever else the statement calls may look up another server */
	call->intake = intake_open(environment_ref(environment_current()->serverid), kind,
							   preview ? NULL : command, statement_of(fcinfo));
	MemoryContextSwitchTo(old);
}

static Datum
bulk_transition(FunctionCallInfo fcinfo, UserpilotKind kind, bool preview)
{
	MemoryContext context = aggregate_context(fcinfo);
	AggregateCall *call = aggregate_call(fcinfo);
	BulkGroup  *group = PG_ARGISNULL(0) ? NULL : (BulkGroup *) PG_GETARG_POINTER(0);
	RowArguments row = {.fcinfo = fcinfo,.call = call,.kind = kind};
	char	   *complaint = NULL;

	if (call->intake == NULL)
		open_intake(fcinfo, call, kind, preview);
	if (group == NULL)
	{
		group = MemoryContextAllocZero(context, sizeof(BulkGroup));
		group->intake = call->intake;
	}
	row.shape = &intake_server(call->intake)->shape;
	if (preview)
		complaint = change_complaint(read_row, &row);
	else
		read_row(&row);
	if (complaint != NULL)
		intake_refuse(call->intake, &row.change, complaint, &group->counts);
	else
		intake_add(call->intake, &row.change, &group->counts);
	PG_RETURN_POINTER(group);
}

Datum
userpilot_bulk_companies_trans(PG_FUNCTION_ARGS)
{
	return bulk_transition(fcinfo, USERPILOT_COMPANY, false);
}

Datum
userpilot_bulk_users_trans(PG_FUNCTION_ARGS)
{
	return bulk_transition(fcinfo, USERPILOT_USER, false);
}

Datum
userpilot_preview_companies_trans(PG_FUNCTION_ARGS)
{
	return bulk_transition(fcinfo, USERPILOT_COMPANY, true);
}

Datum
userpilot_preview_users_trans(PG_FUNCTION_ARGS)
{
	return bulk_transition(fcinfo, USERPILOT_USER, true);
}

static BulkGroup *
finished_group(FunctionCallInfo fcinfo)
{
	BulkGroup  *group;

	(void) aggregate_context(fcinfo);
	if (PG_ARGISNULL(0))
		return NULL;
	group = (BulkGroup *) PG_GETARG_POINTER(0);
	intake_flush(group->intake);
	return group;
}

/* Rows queued; 0 for no rows at all */
Datum
userpilot_bulk_final(PG_FUNCTION_ARGS)
{
	BulkGroup  *group = finished_group(fcinfo);

	PG_RETURN_INT64(group ? group->counts.fresh + group->counts.changed : 0);
}

/*
 * What the rows would come to, as userpilot_preview.  Two rows of one entity
 * count twice, though they would go as one record.
 */
Datum
userpilot_preview_final(PG_FUNCTION_ARGS)
{
	static const IntakeCounts none = {0};
	BulkGroup  *group = finished_group(fcinfo);
	const IntakeCounts *counts = group ? &group->counts : &none;
	int64		records = counts->fresh + counts->changed;
	double		minutes = (double) records / USERPILOT_RECORDS_PER_MINUTE;
	TupleDesc	desc;
	Datum		values[8];
	bool		nulls[8] = {0};

	if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");
	values[0] = Int64GetDatum(counts->rows);
	values[1] = Int64GetDatum(counts->fresh);
	values[2] = Int64GetDatum(counts->changed);
	values[3] = Int64GetDatum(counts->unchanged);
	values[4] = Int64GetDatum(counts->invalid);
	values[5] = Int64GetDatum(records);
	values[6] = Int64GetDatum((records + USERPILOT_MAX_RECORDS - 1) / USERPILOT_MAX_RECORDS);
	values[7] = Float8GetDatum(rint(minutes * 10) / 10);
	PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(BlessTupleDesc(desc), values, nulls)));
}

/* --------------------------------------------------- payload aggregates */

/* As the current server would shape it; as it is where there is none */
static const Shape *
payload_shape(FunctionCallInfo fcinfo)
{
	MemoryContext old;
	EnvironmentRef *ref;
	Oid			serverid;
	char	   *why;

	if (!environment_may_use(userpilot_server, GetUserId(), &serverid, &why))
		return NULL;
	old = MemoryContextSwitchTo(fcinfo->flinfo->fn_mcxt);
	ref = environment_ref(serverid);
	MemoryContextSwitchTo(old);
	return &ref->shape;
}

static Datum
payload_transition(FunctionCallInfo fcinfo, UserpilotKind kind, char separator)
{
	MemoryContext context = aggregate_context(fcinfo);
	AggregateCall *call = aggregate_call(fcinfo);
	RowArguments row = {.fcinfo = fcinfo,.call = call,.kind = kind};
	QueueChange *change = &row.change;
	StringInfo	out;

	if (!call->has_shape)
	{
		call->shape = payload_shape(fcinfo);
		call->has_shape = true;
	}
	row.shape = call->shape;
	read_row(&row);

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

	payload_record(out, kind, VARDATA_ANY(change->entity_id), VARSIZE_ANY_EXHDR(change->entity_id),
				   change->company_id ? VARDATA_ANY(change->company_id) : NULL,
				   change->company_id ? VARSIZE_ANY_EXHDR(change->company_id) : 0,
				   change->metadata);
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
