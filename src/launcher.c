/*
 * launcher.c
 *	  The launcher: starts a worker where there is work.
 *
 * It has no database.  After recovery it visits every database once, one at a
 * time, because what is pending is known to the tables alone; then it sleeps
 * until a commit asks for a worker, or one is due.
 */
#include "postgres.h"

#include "access/heapam.h"
#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "catalog/pg_database.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "tcop/tcopprot.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"

#include "clock.h"
#include "compat.h"
#include "quota.h"
#include "settings.h"
#include "state.h"
#include "worker.h"

/* A visit takes so long at most (real ms): a worker that lives longer has work */
#define VISIT_MS 500

/* pg_database.datconnlimit after an interrupted DROP DATABASE, which 15.4 has
 * given a name */
#define INVALID_DATABASE (-2)

/* With more workers than that one's end is waited for: slots are few */
#define VISIT_WORKERS 3

/* Workers this launcher has started and not yet seen end */
typedef struct Started
{
	Oid			database;
	uint64		start;
	BackgroundWorkerHandle *handle;
} Started;

static Started *started;

/* Databases that may not all have counted yet, in TopMemoryContext */
static List *uncounted = NIL;

/* Every database one can connect to; in CurrentMemoryContext */
static List *
all_databases(void)
{
	MemoryContext caller = CurrentMemoryContext;
	List	   *databases = NIL;
	Relation	rel;
	TableScanDesc scan;
	HeapTuple	tuple;

	StartTransactionCommand();
	(void) GetTransactionSnapshot();
	rel = table_open(DatabaseRelationId, AccessShareLock);
	scan = table_beginscan_catalog(rel, 0, NULL);
	while ((tuple = heap_getnext(scan, ForwardScanDirection)) != NULL)
	{
		Form_pg_database form = (Form_pg_database) GETSTRUCT(tuple);
		MemoryContext old;

		if (!form->datallowconn || form->datistemplate || form->datconnlimit == INVALID_DATABASE)
			continue;
		old = MemoryContextSwitchTo(caller);
		databases = lappend_oid(databases, form->oid);
		MemoryContextSwitchTo(old);
	}
	table_endscan(scan);
	table_close(rel, AccessShareLock);
	CommitTransactionCommand();
	MemoryContextSwitchTo(caller);
	return databases;
}

static bool
is_connectable(Oid database)
{
	MemoryContext context = AllocSetContextCreate(TopMemoryContext, "userpilot databases",
												  ALLOCSET_SMALL_SIZES);
	MemoryContext old = MemoryContextSwitchTo(context);
	bool		found = list_member_oid(all_databases(), database);

	MemoryContextSwitchTo(old);
	MemoryContextDelete(context);
	return found;
}

static void
start_worker(Oid database, uint64 start)
{
	BackgroundWorker worker;
	BackgroundWorkerHandle *handle;
	int			i = 0;

	memset(&worker, 0, sizeof(worker));
	worker.bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION;
	worker.bgw_start_time = BgWorkerStart_RecoveryFinished;
	worker.bgw_restart_time = BGW_NEVER_RESTART;
	worker.bgw_main_arg = ObjectIdGetDatum(database);
	worker.bgw_notify_pid = MyProcPid;
	strlcpy(worker.bgw_library_name, "userpilot", sizeof(worker.bgw_library_name));
	strlcpy(worker.bgw_function_name, "userpilot_worker_main", sizeof(worker.bgw_function_name));
	snprintf(worker.bgw_name, BGW_MAXLEN, "userpilot worker for database %u", database);
	strlcpy(worker.bgw_type, "userpilot worker", BGW_MAXLEN);

	while (i < userpilot_max_databases && started[i].handle != NULL)
		i++;
	if (i == userpilot_max_databases ||
		!RegisterDynamicBackgroundWorker(&worker, &handle))
	{
		state_launcher_started(database, false);
		return;
	}
	started[i].database = database;
	started[i].start = start;
	started[i].handle = handle;
	state_launcher_started(database, true);
}

static void
notice_ends(void)
{
	for (int i = 0; i < userpilot_max_databases; i++)
	{
		pid_t		pid;

		if (started[i].handle == NULL ||
			GetBackgroundWorkerPid(started[i].handle, &pid) != BGWH_STOPPED)
			continue;
		pfree(started[i].handle);
		started[i].handle = NULL;
		state_launcher_ended(started[i].database, started[i].start,
							 is_connectable(started[i].database), clock_now());
	}
}

static int
running(void)
{
	int			n = 0;

	for (int i = 0; i < userpilot_max_databases; i++)
		n += started[i].handle != NULL;
	return n;
}

static bool
is_running(Oid database)
{
	for (int i = 0; i < userpilot_max_databases; i++)
		if (started[i].handle != NULL && started[i].database == database)
			return true;
	return false;
}

/* timeout in real ms, -1: none */
static void
nap(long timeout)
{
	static uint32 wait_event = 0;

	if (wait_event == 0)
		wait_event = compat_wait_event("UserpilotLauncherMain");
	(void) WaitLatch(MyLatch,
					 WL_LATCH_SET | WL_EXIT_ON_PM_DEATH | (timeout >= 0 ? WL_TIMEOUT : 0),
					 timeout, wait_event);
	ResetLatch(MyLatch);
	CHECK_FOR_INTERRUPTS();
}

/* Starts what is wanted; returns how long to sleep, -1 for ever */
static long
start_wanted(void)
{
	Oid			database;
	uint64		start;
	int64		wait_until;

	for (;;)
	{
		int64		now = clock_now();

		switch (state_launcher_next(now, &database, &start, &wait_until))
		{
			case STATE_LAUNCH_START:
				start_worker(database, start);
				break;
			case STATE_LAUNCH_WAIT:
				return clock_real_ms(wait_until - now);
			case STATE_LAUNCH_NONE:
				return -1;
		}
	}
}

/* Its worker has ended, or has counted and may go on while others are visited */
static bool
is_visited(Oid database)
{
	return !is_running(database) ||
		(state_launcher_counted(database) && running() <= VISIT_WORKERS);
}

/*
 * When all have counted what their ledgers say, calls may be made.  A worker may
 * have been stopped before: another is started soon, unless its database is gone.
 */
static void
open_if_counted(void)
{
	ListCell   *lc;

	if (uncounted == NIL)
		return;
	foreach(lc, uncounted)
		if (!state_launcher_counted(lfirst_oid(lc)) && is_connectable(lfirst_oid(lc)))
			return;
	quota_open();
	list_free(uncounted);
	uncounted = NIL;
}

/* One database after the other, so that visits take few worker slots */
static void
visit_all(void)
{
	MemoryContext old = MemoryContextSwitchTo(TopMemoryContext);
	ListCell   *lc;
	bool		all = true;

	list_free(uncounted);
	uncounted = all_databases();
	MemoryContextSwitchTo(old);
	foreach(lc, uncounted)
	{
		int64		began = clock_now();

		all &= state_launcher_visit(lfirst_oid(lc));
		(void) start_wanted();
		while (!is_visited(lfirst_oid(lc)) &&
			   clock_real_ms(clock_now() - began) < VISIT_MS)
		{
			nap(VISIT_MS);
			notice_ends();
			(void) start_wanted();
		}
	}
	if (!all)
	{
		/* what has no slot cannot be counted */
		list_free(uncounted);
		uncounted = NIL;
	}
}

void
userpilot_launcher_main(Datum arg)
{
	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, die);
	BackgroundWorkerUnblockSignals();
	BackgroundWorkerInitializeConnection(NULL, NULL, 0);

	started = MemoryContextAllocZero(TopMemoryContext,
									 sizeof(Started) * userpilot_max_databases);
	state_launcher_attach();
	visit_all();
	for (;;)
	{
		long		timeout;

		if (ConfigReloadPending)
		{
			bool		delivered = userpilot_deliver;

			ConfigReloadPending = false;
			ProcessConfigFile(PGC_SIGHUP);
			if (userpilot_deliver && !delivered)
				visit_all();
		}
		notice_ends();
		timeout = start_wanted();
		open_if_counted();
		nap(timeout);
	}
}

void
launcher_register(void)
{
	BackgroundWorker worker;

	memset(&worker, 0, sizeof(worker));
	worker.bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION;
	worker.bgw_start_time = BgWorkerStart_RecoveryFinished;
	worker.bgw_restart_time = 5;
	strlcpy(worker.bgw_library_name, "userpilot", sizeof(worker.bgw_library_name));
	strlcpy(worker.bgw_function_name, "userpilot_launcher_main", sizeof(worker.bgw_function_name));
	strlcpy(worker.bgw_name, "userpilot launcher", BGW_MAXLEN);
	strlcpy(worker.bgw_type, "userpilot launcher", BGW_MAXLEN);
	RegisterBackgroundWorker(&worker);
}
