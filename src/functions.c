/*
 * functions.c
 *	  The functions that people call, and the views for them: to queue one
 *	  change, to steer what is queued or known, to be told why nothing runs.
 */
#include "postgres.h"

#include "access/reloptions.h"
#include "access/xact.h"
#include "catalog/pg_type.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "change.h"
#include "environment.h"
#include "options.h"
#include "profiles.h"
#include "queue.h"
#include "sql.h"
#include "state.h"

PG_FUNCTION_INFO_V1(userpilot_identify_company);
PG_FUNCTION_INFO_V1(userpilot_identify_user);
PG_FUNCTION_INFO_V1(userpilot_refusal);
PG_FUNCTION_INFO_V1(userpilot_validator);
PG_FUNCTION_INFO_V1(userpilot_cancel);
PG_FUNCTION_INFO_V1(userpilot_invalidate);
PG_FUNCTION_INFO_V1(userpilot_wake);
PG_FUNCTION_INFO_V1(userpilot_kind);
PG_FUNCTION_INFO_V1(userpilot_disabled_reason);
PG_FUNCTION_INFO_V1(userpilot_worker_pid);
PG_FUNCTION_INFO_V1(userpilot_launch_problem);

/* An id argument, whatever its declared type */
static text *
id_argument(FunctionCallInfo fcinfo, int n, const char *what)
{
	return change_id(get_fn_expr_argtype(fcinfo->flinfo, n), PG_GETARG_DATUM(n),
					 PG_ARGISNULL(n), what);
}

static Jsonb *
metadata_argument(FunctionCallInfo fcinfo, int n, UserpilotKind kind, const Shape *shape)
{
	Jsonb	   *metadata;

	if (PG_ARGISNULL(n))
		return change_no_metadata();
	metadata = shape_metadata(shape, kind, PG_GETARG_JSONB_P(n));
	change_check_metadata(metadata);
	return metadata;
}

static void
identify(FunctionCallInfo fcinfo, UserpilotKind kind, const char *id, const char *function)
{
	const EnvironmentRef *server = environment_current();
	QueueChange change = {.kind = kind};

	change.server = server->name;
	change.entity_id = id_argument(fcinfo, 0, id);
	change.metadata = metadata_argument(fcinfo, 1, kind, &server->shape);
	if (kind == USERPILOT_USER && !PG_ARGISNULL(2))
		change.company_id = id_argument(fcinfo, 2, "company_id");
	queue_enqueue(&change, function);
}

/*
 * userpilot_identify_company(company_id "any", metadata jsonb) returns void
 */
Datum
userpilot_identify_company(PG_FUNCTION_ARGS)
{
	identify(fcinfo, USERPILOT_COMPANY, "company_id", "userpilot_identify_company()");
	PG_RETURN_VOID();
}

/*
 * userpilot_identify_user(user_id "any", metadata jsonb, company_id "any")
 * returns void
 */
Datum
userpilot_identify_user(PG_FUNCTION_ARGS)
{
	identify(fcinfo, USERPILOT_USER, "user_id", "userpilot_identify_user()");
	PG_RETURN_VOID();
}

static void
check_letter(void *arg)
{
	FunctionCallInfo fcinfo = arg;

	(void) change_id(TEXTOID, PG_GETARG_DATUM(0), PG_ARGISNULL(0), "entity_id");
	if (!PG_ARGISNULL(1))
		(void) change_id(TEXTOID, PG_GETARG_DATUM(1), false, "company_id");
	if (!PG_ARGISNULL(2))
		change_check_metadata(PG_GETARG_JSONB_P(2));
}

/*
 * userpilot_refusal(entity_id text, company_id text, metadata jsonb) returns
 * text: why it can never be sent
 */
Datum
userpilot_refusal(PG_FUNCTION_ARGS)
{
	char	   *why = change_complaint(check_letter, fcinfo);

	if (why == NULL)
		PG_RETURN_NULL();
	PG_RETURN_TEXT_P(cstring_to_text(why));
}

/*
 * userpilot_validator(options text[], catalog oid): the foreign-data wrapper's
 * validator.  Changed options may let waiting rows go.
 */
Datum
userpilot_validator(PG_FUNCTION_ARGS)
{
	options_validate(untransformRelOptions(PG_GETARG_DATUM(0)), PG_GETARG_OID(1));
	if (state_available())
		state_note_read_all();
	PG_RETURN_VOID();
}

static text *
check_kind(text *arg)
{
	const char *kind = text_to_cstring(arg);

	for (int i = 0; i < USERPILOT_KINDS; i++)
		if (strcmp(kind, userpilot_kind_name(i)) == 0)
			return arg;
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("kind must be \"company\" or \"user\", not \"%s\"", kind)));
	return NULL;
}

/*
 * userpilot_kind(text) returns text: the argument, if it is one; for functions
 * in SQL
 */
Datum
userpilot_kind(PG_FUNCTION_ARGS)
{
	PG_RETURN_TEXT_P(check_kind(PG_GETARG_TEXT_PP(0)));
}

/* What the worker has done is to be seen */
static void
refuse_old_snapshot(const char *function)
{
	if (IsolationUsesXactSnapshot())
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_TRANSACTION_STATE),
				 errmsg("%s cannot be called in a repeatable read or serializable transaction",
						function),
				 errdetail("Its snapshot may not see what has been sent meanwhile."),
				 errhint("Call it in a transaction of its own, READ COMMITTED.")));
}

/*
 * userpilot_invalidate(server, kind, id, since) returns bigint: profiles that
 * are no longer believed.
 */
Datum
userpilot_invalidate(PG_FUNCTION_ARGS)
{
	SqlCaller	caller;
	char	   *server;
	uint64		n;

	if (PG_ARGISNULL(0))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("server must not be null")));
	refuse_old_snapshot("userpilot_invalidate()");
	server = text_to_cstring(PG_GETARG_TEXT_PP(0));
	(void) environment_owned(server);
	if (!PG_ARGISNULL(1))
		(void) check_kind(PG_GETARG_TEXT_PP(1));
	sql_become_owner(&caller);
	n = profiles_invalidate(server,
							PG_ARGISNULL(1) ? NULL : PG_GETARG_TEXT_PP(1),
							PG_ARGISNULL(2) ? NULL : PG_GETARG_TEXT_PP(2),
							PG_ARGISNULL(3) ? NULL : &(TimestampTz) {PG_GETARG_TIMESTAMPTZ(3)});
	sql_become_caller(&caller);
	state_note_read_all();
	PG_RETURN_INT64(n);
}

/*
 * userpilot_cancel(batch) returns bigint: rows of a bulk SELECT taken back
 */
Datum
userpilot_cancel(PG_FUNCTION_ARGS)
{
	int64		batch = PG_GETARG_INT64(0);
	SqlCaller	caller;
	char	   *server;
	char	   *by;
	bool		found;
	uint64		n;

	refuse_old_snapshot("userpilot_cancel()");
	sql_become_owner(&caller);
	found = queue_batch_find(batch, &server, &by);
	sql_become_caller(&caller);
	if (!found)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("there is no bulk SELECT " INT64_FORMAT, batch),
				 errhint("SELECT id, statement, pending FROM userpilot_batches;")));
	if (strcmp(by, GetUserNameFromId(GetUserId(), false)) != 0)
		(void) environment_owned(server);
	sql_become_owner(&caller);
	profiles_lock_out_worker();
	n = queue_batch_cancel(batch);
	sql_become_caller(&caller);
	state_note_read_all();
	PG_RETURN_INT64(n);
}

/*
 * userpilot_wake() returns void: the worker reads the whole queue once this
 * transaction commits.  userpilot_retry() needs it: rows that come back are
 * not new, and so no look would find them.
 */
Datum
userpilot_wake(PG_FUNCTION_ARGS)
{
	state_note_read_all();
	PG_RETURN_VOID();
}

/* ------------------------------------------------------------- for views */

/* userpilot_disabled_reason(server oid) returns text */
Datum
userpilot_disabled_reason(PG_FUNCTION_ARGS)
{
	const char *reason = environment_disabled_reason(PG_GETARG_OID(0));

	if (reason == NULL)
		PG_RETURN_NULL();
	PG_RETURN_TEXT_P(cstring_to_text(reason));
}

/* userpilot_worker_pid() returns integer: null if none runs here */
Datum
userpilot_worker_pid(PG_FUNCTION_ARGS)
{
	int			pid = state_worker_pid(MyDatabaseId);

	if (pid == 0)
		PG_RETURN_NULL();
	PG_RETURN_INT32(pid);
}

/* userpilot_launch_problem() returns text: null if there is none */
Datum
userpilot_launch_problem(PG_FUNCTION_ARGS)
{
	const char *problem = state_launch_problem(MyDatabaseId);

	if (problem == NULL)
		PG_RETURN_NULL();
	PG_RETURN_TEXT_P(cstring_to_text(problem));
}
