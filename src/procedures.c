/*
 * procedures.c
 *	  CALL userpilot_wait() and CALL userpilot_check(): procedures, because
 *	  they must not hold a snapshot while they wait.
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_foreign_server.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "nodes/parsenodes.h"
#include "storage/latch.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/datum.h"
#include "utils/fmgroids.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "api.h"
#include "compat.h"
#include "environment.h"
#include "queue.h"
#include "settings.h"
#include "sql.h"
#include "state.h"

PG_FUNCTION_INFO_V1(userpilot_wait);
PG_FUNCTION_INFO_V1(userpilot_check);

/* How often userpilot_wait looks (ms) */
#define WAIT_MIN_MS 20
#define WAIT_MAX_MS 500

/* How long userpilot_check waits for an answer (ms) */
#define CHECK_MS 15000

static uint32
wait_event(void)
{
	static uint32 event = 0;

	if (event == 0)
		event = compat_wait_event("UserpilotCall");
	return event;
}

/* ------------------------------------------------------------------ wait */

/* Everything that must be true before one waits for what was committed */
static void
refuse_hopeless_wait(void)
{
	/* they may be what would be waited for, and are not for us to commit */
	if (queue_in_transaction() || TransactionIdIsValid(GetTopTransactionIdIfAny()))
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("this transaction has made changes that are not committed"),
				 errdetail("What it has queued can only be delivered after it commits."),
				 errhint("COMMIT first, then CALL userpilot_wait().")));
	if (IsolationUsesXactSnapshot())
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_TRANSACTION_STATE),
				 errmsg("userpilot_wait() cannot be called in a repeatable read or serializable transaction"),
				 errdetail("Its snapshot would never see the queue become empty."),
				 errhint("CALL it on its own.")));
}

static int64
milliseconds_of(const Interval *interval)
{
	double		ms = interval->time / 1000.0 +
		(interval->month * (double) DAYS_PER_MONTH + interval->day) * SECS_PER_DAY * 1000.0;

	if (ms < 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("timeout must not be negative")));
	/* a year is for ever, and fits into a timestamp */
	return (int64) Min(ms, 366.0 * SECS_PER_DAY * 1000);
}

static bool
still_pending(Datum snapshot)
{
	SqlCaller	caller;
	bool		pending;

	sql_become_owner(&caller);
	pending = queue_pending_before(snapshot);
	sql_become_caller(&caller);
	return pending;
}

/*
 * CALL userpilot_wait(timeout interval): returns when every change that was
 * committed before the call is delivered or in the dead letters.
 */
Datum
userpilot_wait(PG_FUNCTION_ARGS)
{
	CallContext *call = (CallContext *) fcinfo->context;
	bool		atomic = call == NULL || !IsA(call, CallContext) || call->atomic;
	TimestampTz end;
	Datum		snapshot;
	long		nap = WAIT_MIN_MS;

	if (PG_ARGISNULL(0))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("timeout must not be null")));
	refuse_hopeless_wait();
	end = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), milliseconds_of(PG_GETARG_INTERVAL_P(0)));

	sql_begin_call(atomic);
	snapshot = OidFunctionCall0(F_PG_CURRENT_SNAPSHOT);
	while (still_pending(snapshot))
	{
		if (GetCurrentTimestamp() >= end)
			ereport(ERROR,
					(errcode(ERRCODE_QUERY_CANCELED),
					 errmsg("changes are still to be delivered after the timeout of userpilot_wait()"),
					 errhint("SELECT * FROM userpilot_status; says what is pending and why.")));

		/* hold no snapshot while waiting, where that is ours to decide */
		if (!atomic)
			sql_commit();
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, nap, wait_event());
		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
		nap = Min(nap * 2, WAIT_MAX_MS);
	}
	sql_end_call();
	PG_RETURN_VOID();
}

/* ----------------------------------------------------------------- check */

static void
say(bool good, const char *what, const char *hint)
{
	ereport(INFO,
			(errmsg("%s %s", good ? "[ok]" : "[!!]", what),
			 hint ? errhint("%s", hint) : 0));
}

static void
check_processes(void)
{
	const char *problem = state_launch_problem(MyDatabaseId);
	SqlCaller	caller;
	int			used;

	if (!state_available())
	{
		say(false, "userpilot is not preloaded: changes are queued but not delivered",
			"Add userpilot to shared_preload_libraries and restart the server.");
		return;
	}
	if (state_launcher_present())
		say(true, "the launcher is running", NULL);

	sql_become_owner(&caller);
	used = environment_workers_used();
	sql_become_caller(&caller);
	if (problem != NULL)
		say(false, problem, NULL);
	else if (state_worker_pid(MyDatabaseId) != 0)
		say(true, psprintf("the worker of this database is running (pid %d)",
						   state_worker_pid(MyDatabaseId)), NULL);
	say(used < max_worker_processes || state_worker_pid(MyDatabaseId) != 0,
		psprintf("%d of %d background worker slots are free",
				 Max(max_worker_processes - used, 0), max_worker_processes),
		used < max_worker_processes ? NULL : "Raise max_worker_processes and restart the server.");
}

/* Asks for the job list, outside any transaction that holds a snapshot */
static HttpResult *
ask_for_jobs(const Environment *env, const char **error)
{
	Http	   *http = http_create(CurrentMemoryContext, 1);
	TimestampTz end = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), CHECK_MS);
	HttpResult *result;

	if (!api_jobs(http, &env->target, NULL, error))
		return NULL;
	while ((result = http_next(http)) == NULL)
	{
		long		left = TimestampDifferenceMilliseconds(GetCurrentTimestamp(), end);

		CHECK_FOR_INTERRUPTS();
		if (left <= 0)
		{
			*error = "no answer within 15 seconds";
			return NULL;
		}
		(void) http_wait(http, left, wait_event());
	}
	return result;
}

static void
check_slot(const HttpResult *result)
{
	ApiJob	   *jobs;
	int			n;

	if (!api_read_jobs(result->body, result->body_len, &jobs, &n))
	{
		say(false, "the job list is not what the API documents", "Is the endpoint Userpilot's?");
		return;
	}
	for (int i = 0; i < n; i++)
	{
		if (!api_job_is_final(jobs[i].status))
		{
			say(true, psprintf("the job slot is held by job %s (%s)", jobs[i].job_id, jobs[i].status), NULL);
			return;
		}
	}
	say(true, "the job slot is free", NULL);
}

static void
check_api(const Environment *env)
{
	const char *error = NULL;
	HttpResult *result = ask_for_jobs(env, &error);

	if (result == NULL)
		say(false, psprintf("%s cannot be called: %s", env->target.endpoint, error), NULL);
	else if (result->outcome != HTTP_ANSWERED)
		say(false, psprintf("%s is not reached: %s", env->target.endpoint, result->error),
			"Check the region or endpoint, name resolution, firewall and proxy.");
	else if (result->status == 401 || result->status == 403)
	{
		say(true, psprintf("%s is reached", env->target.endpoint), NULL);
		say(false, psprintf("the API key is not accepted: %s", api_error_text(result)),
			"Use the API key, not the App Token (NX-...), and the region the account is in.");
	}
	else
	{
		say(true, psprintf("%s is reached", env->target.endpoint), NULL);
		if (result->status / 100 == 2)
		{
			say(true, "the API key is accepted", NULL);
			check_slot(result);
		}
		else
			say(false, psprintf("asked for its jobs it answers: %s", api_error_text(result)), NULL);
	}
}

/*
 * CALL userpilot_check(server text): says in words what stands between this
 * database and Userpilot.
 */
Datum
userpilot_check(PG_FUNCTION_ARGS)
{
	CallContext *call = (CallContext *) fcinfo->context;
	char	   *server = PG_ARGISNULL(0) ? userpilot_server : text_to_cstring(PG_GETARG_TEXT_PP(0));
	Oid			serverid;
	Environment *env;
	const char *disabled;

	if (call == NULL || !IsA(call, CallContext) || call->atomic ||
		TransactionIdIsValid(GetTopTransactionIdIfAny()))
		ereport(ERROR,
				(errcode(ERRCODE_ACTIVE_SQL_TRANSACTION),
				 errmsg("userpilot_check() cannot run inside a transaction block"),
				 errdetail("It calls the API, and no call is made inside a transaction.")));
	serverid = environment_lookup(server, true);

	check_processes();
	disabled = environment_disabled_reason(serverid);
	say(disabled == NULL, disabled ? disabled : "this database is the sender", NULL);
	env = environment_load(serverid);
	if (env == NULL)
		PG_RETURN_VOID();
	/* it may name the key's file, which the catalog shows its owner only */
	if (env->problem != NULL && compat_server_ownercheck(serverid, GetUserId()))
		say(false, env->problem, env->problem_hint);
	else if (env->problem != NULL)
		say(false, "the server has no API key that can be used", "Its owner sees why.");
	else
	{
		sql_begin_call(false);
		sql_commit();
		check_api(env);
		sql_end_call();
	}
	PG_RETURN_VOID();
}
