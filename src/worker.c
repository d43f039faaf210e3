/*
 * worker.c
 *	  The worker: one per database, only while there is work.
 *
 * One loop: read what was committed, give each server's lanes what they need
 * in short transactions, start calls when those have committed, then wait for
 * latch, postmaster and network at once.  An error ends the process; the
 * launcher starts another, which finds everything in the tables.
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_database.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "storage/ipc.h"
#include "storage/lmgr.h"
#include "storage/lock.h"
#include "tcop/tcopprot.h"
#include "utils/guc.h"
#include "utils/inval.h"
#include "utils/memutils.h"
#include "utils/syscache.h"

#include "clock.h"
#include "compat.h"
#include "history.h"
#include "ledger.h"
#include "sender.h"
#include "step.h"
#include "worker.h"

/* Leaves after so long without work (API ms) */
#define IDLE_MS (60 * 1000)

/* Looks whether its database is wanted by DROP, RENAME or TEMPLATE, and
 * whether prepared transactions were decided (real ms) */
#define WATCH_MS 1000

/* A version that is not the library's is looked at again so often (real ms) */
#define VERSION_MS (60 * 1000)

/* Having made way, comes back after so long (real ms) */
#define RETREAT_MS 2000

/* Starts that may get nowhere before the next waits, and how long (real ms) */
#define STARTS_FREE 3
#define START_WAIT_MS 1000
#define START_WAIT_MAX_MS (3600 * 1000)

/* While no server is enabled, changes bring a worker only so often (real ms) */
#define UNSERVED_MS (10 * 1000)

/* One may have been prepared, and decided, since the tables were asked */
#define PREPARED_UNKNOWN (-1)

/* What is old is deleted so often (API ms) */
#define PRUNE_MS (10 * 60 * 1000)

#define MAX_CONNECTIONS 100
#define MAX_RESULTS 256			/* dealt with in one transaction */

static Oid	extension;
static Oid	extension_owner;
static Http *http;
static Sender **senders = NULL;
static int	nsenders = 0;
static uint64 seen_changes = 0;
static uint64 seen_bulk_changes = 0;
static int64 prepared = 0;		/* queue_prepared() */
static bool look_at_all = true; /* the next look reads everything */
static bool options_changed = false;	/* of any server or user mapping */

/* ---------------------------------------------------------- transactions */

/*
 * Changed options and keys hold for all that was committed after them: a step
 * whose snapshot sees a row sees the options of its time.
 */
static void
reload_changed_senders(void)
{
	AcceptInvalidationMessages();
	if (!options_changed)
		return;
	options_changed = false;
	for (int i = 0; i < nsenders; i++)
		if (!sender_reload(senders[i]))
			senders[i]->stale = true;
}

static void
note_options_changed(Datum arg, int cacheid, uint32 hashvalue)
{
	options_changed = true;
}

static void
begin_step(void)
{
	/* otherwise what is in memory is of tables that are gone */
	if (!step_begin(extension, extension_owner))
	{
		state_worker_retreat(clock_now() + clock_api_ms(RETREAT_MS));
		proc_exit(0);
	}
	reload_changed_senders();
}

/* -------------------------------------------------------------- database */

/*
 * DROP DATABASE, RENAME and CREATE DATABASE … TEMPLATE wait for others to
 * leave while they hold the database's lock: be one who leaves.
 */
static bool
database_is_wanted(void)
{
	LOCKTAG		tag;
	bool		wanted;

	StartTransactionCommand();
	SET_LOCKTAG_OBJECT(tag, InvalidOid, DatabaseRelationId, MyDatabaseId, 0);
	wanted = LockAcquire(&tag, RowExclusiveLock, false, true) == LOCKACQUIRE_NOT_AVAIL;
	CommitTransactionCommand();
	step_outside();
	return wanted;
}

/* false: nothing is to be done in this database */
static bool
extension_is_ours(void)
{
	char	   *version = NULL;
	Oid			current;
	bool		same;

	StartTransactionCommand();
	current = environment_installed(NULL, &extension_owner, &version);
	if (!OidIsValid(extension))
		extension = current;
	same = OidIsValid(current) && strcmp(version, USERPILOT_VERSION) == 0;
	if (OidIsValid(current) && !same)
		ereport(WARNING,
				(errmsg("userpilot does not deliver: extension version %s, library version %s",
						version, USERPILOT_VERSION),
				 errhint("ALTER EXTENSION userpilot UPDATE; or restart the server if the library is older.")));
	CommitTransactionCommand();
	step_outside();
	/* made anew: what is in memory is of tables that are gone */
	return same && current == extension;
}

/* --------------------------------------------------------------- senders */

static Sender *
find_sender(Oid serverid)
{
	for (int i = 0; i < nsenders; i++)
		if (senders[i]->serverid == serverid)
			return senders[i];
	return NULL;
}

static bool
in_flight(const Sender *sender)
{
	return sender->rt.ncalling > 0 || sender->bulk.calling;
}

static void
add_sender(Oid serverid)
{
	Sender	   *sender = sender_create(TopMemoryContext, serverid, http);

	if (!sender_reload(sender))
	{
		sender_destroy(sender);
		return;
	}
	bulk_recover(sender);
	senders = senders ? repalloc(senders, (nsenders + 1) * sizeof(Sender *)) :
		MemoryContextAlloc(TopMemoryContext, sizeof(Sender *));
	senders[nsenders++] = sender;
	look_at_all = true;
}

/* Which servers are enabled, and with what options and key */
static void
load_senders(void)
{
	List	   *enabled;
	ListCell   *lc;

	begin_step();
	enabled = environment_enabled();
	foreach(lc, enabled)
	{
		Sender	   *sender = find_sender(lfirst_oid(lc));

		if (sender == NULL)
			add_sender(lfirst_oid(lc));
		else
			sender->stale = !sender_reload(sender);
	}
	for (int i = 0; i < nsenders; i++)
		if (!list_member_oid(enabled, senders[i]->serverid))
			senders[i]->stale = true;
	for (int i = 0; i < nsenders; i++)
		if (!senders[i]->stale)
			sender_report(senders[i], clock_now(), false);
	step_end(false);
	state_worker_counted();

	for (int i = nsenders - 1; i >= 0; i--)
	{
		if (!senders[i]->stale || in_flight(senders[i]))
			continue;
		bulk_release_slot(senders[i]);
		sender_destroy(senders[i]);
		senders[i] = senders[--nsenders];
	}
}

/* ----------------------------------------------------------------- steps */

/* The results that are this sender's */
static void
answer_sender(Sender *sender, HttpResult **results, Sender **whose, int n)
{
	HttpResult **realtime = palloc(n * sizeof(HttpResult *));
	HttpResult *bulk = NULL;
	int64		now = clock_now();
	int			nrealtime = 0;

	for (int i = 0; i < n; i++)
	{
		if (whose[i] != sender)
			continue;
		if (((Call *) results[i]->owner)->pending != NULL)
			realtime[nrealtime++] = results[i];
		else
			bulk = results[i];
	}
	if (bulk != NULL)
		bulk_answered(sender, bulk, now);
	if (nrealtime > 0)
		realtime_answered(sender, realtime, nrealtime, now);
	sender_report(sender, now, false);
}

/* Learns from what has been answered */
static bool
step_answers(void)
{
	HttpResult *result;
	HttpResult *results[MAX_RESULTS];
	Sender	   *whose[MAX_RESULTS];
	int			n = 0;

	while (n < MAX_RESULTS && (result = http_next(http)) != NULL)
	{
		/* a call's memory goes as it is dealt with: tell them apart now */
		whose[n] = ((Call *) result->owner)->sender;
		results[n++] = result;
	}
	if (n == 0)
		return false;

	begin_step();
	for (int i = 0; i < nsenders; i++)
		answer_sender(senders[i], results, whose, n);
	step_end(false);
	for (int i = 0; i < n; i++)
		http_result_free(results[i]);
	return true;
}

/* What is found goes with the same commit, if it may: it is being waited for */
static void
step_look(StateWake wake)
{
	int64		now = clock_now();
	bool		durable = false;

	begin_step();
	for (int i = 0; i < nsenders; i++)
	{
		if (look_at_all)
		{
			/* dead letters may be back, of before such a SELECT */
			bulk_reload_batches(senders[i]);
			realtime_reset_look(senders[i]);
		}
		if (wake.bulk_changes != seen_bulk_changes || look_at_all)
			bulk_changed(senders[i]);
		realtime_look(senders[i]);
		if (realtime_wave_due(senders[i], now))
			durable |= realtime_wave(senders[i], now);
	}
	step_end(durable);
	look_at_all = false;
	seen_changes = wake.changes;
	seen_bulk_changes = wake.bulk_changes;
}

/* One server's lanes; returns whether it did anything */
static bool
step_sender(Sender *sender)
{
	int64		now = clock_now();
	bool		durable = false;
	bool		did = false;

	if (bulk_due(sender, now))
	{
		BulkState	before = sender->bulk.state;

		begin_step();
		durable = bulk_step(sender, now);
		/* a sweep has counted the backlog: say so at once */
		sender_report(sender, now, before == BULK_PREPARE);
		step_end(durable);
		if (sender->bulk.state == before)
			bulk_start(sender, clock_now());
		did = true;
	}
	if (bulk_done_due(sender, now))
	{
		begin_step();
		bulk_done_step(sender);
		sender_report(sender, now, sender->bulk.done->job.id == 0);
		step_end(false);
		did = true;
	}
	if (bulk_ahead_due(sender, now))
	{
		begin_step();
		durable = sender_still_enabled(sender) && bulk_prepare(sender, true);
		sender_report(sender, now, false);
		step_end(durable);
		did = true;
	}
	if (realtime_wave_due(sender, now))
	{
		begin_step();
		durable = realtime_wave(sender, now);
		step_end(durable);
		did = true;
	}
	realtime_start(sender, clock_now());
	return did;
}

static void
step_watch(void)
{
	int64		before = prepared;

	begin_step();
	prepared = queue_prepared();
	step_end(false);
	/* one was decided, perhaps, with rows that no look can see */
	look_at_all |= prepared != before;
}

/* What is of no use any more */
static void
prune(void)
{
	history_prune();
	for (int i = 0; i < nsenders; i++)
		ledger_prune(senders[i]->env->server, sender_call_delay(senders[i]->env));
}

static bool
any_work(void)
{
	for (int i = 0; i < nsenders; i++)
		if (sender_has_work(senders[i]) || in_flight(senders[i]))
			return true;
	return prepared != 0;
}

/*
 * The last look before leaving: rows that no look can see (moved back by
 * hand, restored) must not be left behind.
 */
static bool
anything_left(void)
{
	bool		left = false;

	begin_step();
	for (int i = 0; i < nsenders; i++)
	{
		left |= queue_has_rows(senders[i]->env->server, false);
		sender_report(senders[i], clock_now(), true);
	}
	if (!left)
		prune();
	step_end(false);
	return left;
}

/* Nothing is known to be left to do; whether that is so */
static bool
may_leave(void)
{
	load_senders();
	step_watch();
	if (prepared == 0 && !look_at_all && (nsenders == 0 || !anything_left()))
		return true;
	look_at_all |= prepared == 0;
	return false;
}

/* Until something comes, a lane has something to do, or then at the latest */
static void
wait_for_work(int64 until)
{
	static uint32 wait_event = 0;
	int64		now = clock_now();
	long		timeout;

	for (int i = 0; i < nsenders; i++)
		until = Min(until, sender_next_at(senders[i], now));
	timeout = until <= now ? 0 : clock_real_ms(until - now);
	if (wait_event == 0)
		wait_event = compat_wait_event("UserpilotWorkerMain");
	pgstat_report_activity(STATE_IDLE, NULL);
	(void) http_wait(http, Min(timeout, WATCH_MS), wait_event);
}

/* ------------------------------------------------------------------ main */

static void
start_up(Oid database)
{
	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	/* cancelling a commit's wait for a standby would let a body leave */
	pqsignal(SIGINT, SIG_IGN);
	pqsignal(SIGTERM, die);
	BackgroundWorkerUnblockSignals();
	BackgroundWorkerInitializeConnectionByOid(database, InvalidOid, 0);
	state_worker_attach();
	step_start_up();
	CacheRegisterSyscacheCallback(FOREIGNSERVEROID, note_options_changed, (Datum) 0);
	CacheRegisterSyscacheCallback(USERMAPPINGOID, note_options_changed, (Datum) 0);
}

/* Once a second; false when the worker must go */
static bool
watch(int64 *pruned_at)
{
	int64		now = clock_now();

	if (database_is_wanted())
	{
		state_worker_retreat(now + clock_api_ms(RETREAT_MS));
		return false;
	}
	if (!extension_is_ours())
	{
		state_worker_retreat(now + clock_api_ms(RETREAT_MS));
		return false;
	}
	load_senders();
	step_watch();
	if (now - *pruned_at >= PRUNE_MS)
	{
		begin_step();
		prune();
		step_end(false);
		*pruned_at = now;
	}
	return true;
}

/*
 * Counts this start.  After three that got nowhere the next ones wait, longer
 * each time: a worker that crashes restarts everyone's server.
 */
static bool
may_start(void)
{
	int64		since_last;
	int64		wait = 0;
	int			starts;
	bool		may;

	begin_step();
	starts = ledger_starts(&since_last);
	if (starts >= STARTS_FREE)
		wait = Min((int64) START_WAIT_MS << Min(starts - STARTS_FREE, 12), START_WAIT_MAX_MS);
	may = since_last >= wait || since_last < 0; /* the clock was set back */
	if (may)
		ledger_start();
	step_end(true);
	if (may)
		return true;
	ereport(LOG,
			(errmsg("userpilot: the worker of this database was started %d times and got nowhere; the next start is in %d s",
					starts, (int) ((wait - since_last) / 1000 + 1))));
	state_worker_retreat(clock_now() + clock_api_ms(wait - since_last));
	return false;
}

static void
note_progress(void)
{
	static bool noted = false;

	if (noted)
		return;
	begin_step();
	ledger_progress();
	step_end(false);
	noted = true;
}

static bool
reload_if_asked(void)
{
	if (!ConfigReloadPending)
		return false;
	ConfigReloadPending = false;
	ProcessConfigFile(PGC_SIGHUP);
	return true;
}

/* Until there is nothing to do for IDLE_MS */
static void
serve(void)
{
	int64		watch_at = 0;
	int64		pruned_at = clock_now();
	int64		busy_at = clock_now();
	bool		first = true;

	for (;;)
	{
		StateWake	wake = state_worker_wake();
		bool		did = false;

		CHECK_FOR_INTERRUPTS();
		if (wake.prepared)
			prepared = PREPARED_UNKNOWN;
		if (reload_if_asked() || clock_now() >= watch_at ||
			(nsenders == 0 && wake.changes != seen_changes))
		{
			if (!watch(&pruned_at))
				return;
			watch_at = clock_now() + clock_api_ms(WATCH_MS);
		}

		if (nsenders == 0 && prepared == 0 && !wake.read_all)
		{
			note_progress();
			if (state_worker_leave_unserved(clock_now() + clock_api_ms(UNSERVED_MS)))
				return;
		}

		look_at_all |= wake.read_all;
		if (step_answers())
		{
			did = true;
			note_progress();
		}
		if (look_at_all || wake.changes != seen_changes)
			step_look(wake);
		for (int i = 0; i < nsenders; i++)
			did |= step_sender(senders[i]);

		/* nobody has queued anything yet: it was only to see whether there is work */
		if (any_work() || (did && !(first && wake.changes == 0)))
			busy_at = clock_now();
		else if (first || clock_now() - busy_at >= IDLE_MS)
		{
			if (!may_leave())
			{
				busy_at = clock_now();
				first = false;
				continue;
			}
			note_progress();
			if (state_worker_leave(seen_changes, 0))
				return;
		}
		first = false;
		/* what is under way goes on meanwhile */
		wait_for_work(did ? 0 : busy_at + IDLE_MS);
	}
}

void
userpilot_worker_main(Datum arg)
{
	start_up(DatumGetObjectId(arg));
	if (!extension_is_ours())
	{
		if (OidIsValid(extension))
			state_worker_retreat(clock_now() + clock_api_ms(VERSION_MS));
		else
			state_worker_vacate();
		proc_exit(0);
	}
	if (may_start())
	{
		http = http_create(TopMemoryContext, MAX_CONNECTIONS);
		serve();
	}
	proc_exit(0);
}
