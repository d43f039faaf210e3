/*
 * state.c
 *	  Shared memory: who is to be woken, and which worker is to run.
 *
 * The latch is a hint, the counter is the truth: a commit raises its
 * database's counter under the slot's spinlock and then sets a latch; a
 * worker leaves only if, under the same spinlock, nothing came since it last
 * looked.  A backend keeps a pointer to its slot, and looks it up again if
 * another database has it by now.
 */
#include "postgres.h"

#include "miscadmin.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/lwlock.h"
#include "storage/proc.h"
#include "storage/shmem.h"
#include "storage/spin.h"

#include "clock.h"
#include "quota.h"
#include "settings.h"
#include "state.h"

#define STATE_TRANCHE "userpilot"

/* Crash-loop brake: after this many unclean ends without progress, wait */
#define FAILURES_FREE 3
#define FAILURE_WAIT_MS (60 * 1000)
#define FAILURE_WAIT_MAX_MS (3600 * 1000)
#define NO_SLOT_WAIT_MS (5 * 1000)

typedef struct StateSlot
{
	slock_t		mutex;
	Oid			database;		/* InvalidOid: free */
	uint64		changes;
	uint64		bulk_changes;
	bool		read_all;
	int			claims;			/* transactions that will wake its worker */
	bool		wanted;			/* a worker should be started */
	bool		starting;		/* ... and has been asked for */
	int			started_by;		/* pid of the launcher that will see its end */
	uint64		start;			/* number of that start */
	int			worker_pid;
	Latch	   *worker_latch;
	bool		attached;		/* the worker asked for has come to be */
	bool		left_cleanly;	/* the last worker said good-bye */
	bool		progressed;
	bool		counted;		/* a worker has seeded what the ledgers say */
	int			failures;		/* unclean ends without progress */
	int64		not_before;		/* API ms; no start before */
	int64		due_at;			/* API ms; start then, 0: never */
	int64		unserved_until; /* API ms; no server is enabled: changes need
								 * no worker before */
	bool		no_worker_slot; /* max_worker_processes reached */
} StateSlot;

typedef struct StateShared
{
	LWLock	   *lock;			/* assigning slots */
	Latch	   *launcher_latch;
	int			launcher_pid;
	uint64		starts;			/* of workers, ever */
	int			nslots;
	StateSlot  *slots;
} StateShared;

static StateShared *shared = NULL;
static StateSlot *my_slot = NULL;
static StateSlot *claimed = NULL;	/* until this transaction ends */
static bool commit_wakes = false;
static bool commit_reads_all = false;
static bool commit_has_bulk = false;

static shmem_request_hook_type prev_shmem_request = NULL;
static shmem_startup_hook_type prev_shmem_startup = NULL;

static Size
state_size(void)
{
	Size		size = MAXALIGN(sizeof(StateShared));

	size = add_size(size, mul_size(userpilot_max_databases, MAXALIGN(sizeof(StateSlot))));
	return size;
}

static void
state_shmem_request(void)
{
	if (prev_shmem_request)
		prev_shmem_request();
	RequestAddinShmemSpace(add_size(state_size(), quota_size()));
	RequestNamedLWLockTranche(STATE_TRANCHE, 1);
	RequestNamedLWLockTranche(QUOTA_TRANCHE, 1);
}

static void
state_shmem_startup(void)
{
	bool		found;
	char	   *base;

	if (prev_shmem_startup)
		prev_shmem_startup();

	LWLockAcquire(AddinShmemInitLock, LW_EXCLUSIVE);
	base = ShmemInitStruct(STATE_TRANCHE, state_size(), &found);
	shared = (StateShared *) base;
	if (!found)
	{
		memset(base, 0, state_size());
		shared->lock = &(GetNamedLWLockTranche(STATE_TRANCHE))->lock;
		shared->nslots = userpilot_max_databases;
		base += MAXALIGN(sizeof(StateShared));
		shared->slots = (StateSlot *) base;
		for (int i = 0; i < shared->nslots; i++)
			SpinLockInit(&shared->slots[i].mutex);
	}
	quota_startup();
	LWLockRelease(AddinShmemInitLock);
}

void
state_register(void)
{
	prev_shmem_request = shmem_request_hook;
	shmem_request_hook = state_shmem_request;
	prev_shmem_startup = shmem_startup_hook;
	shmem_startup_hook = state_shmem_startup;
}

bool
state_available(void)
{
	return shared != NULL;
}

/* A slot of which nothing is wanted is anybody's: its database may be gone.
 * With the lock held exclusively; NULL: all are in use. */
static StateSlot *
slot_take_idle(void)
{
	for (int i = 0; i < shared->nslots; i++)
	{
		StateSlot  *slot = &shared->slots[i];
		bool		idle;

		SpinLockAcquire(&slot->mutex);
		idle = slot->worker_pid == 0 && !slot->starting && !slot->wanted && slot->due_at == 0 &&
			slot->claims == 0;
		if (idle)
			slot->database = InvalidOid;
		SpinLockRelease(&slot->mutex);
		if (idle)
			return slot;
	}
	return NULL;
}

/* The slot of a database; made if asked for and there is room, else NULL */
static StateSlot *
slot_find(Oid database, bool create)
{
	StateSlot  *free_slot = NULL;
	StateSlot  *slot = NULL;

	LWLockAcquire(shared->lock, create ? LW_EXCLUSIVE : LW_SHARED);
	for (int i = 0; i < shared->nslots; i++)
	{
		if (shared->slots[i].database == database)
		{
			slot = &shared->slots[i];
			break;
		}
		if (free_slot == NULL && !OidIsValid(shared->slots[i].database))
			free_slot = &shared->slots[i];
	}
	if (slot == NULL && create)
		slot = free_slot ? free_slot : slot_take_idle();
	if (slot != NULL && slot->database != database)
	{
		SpinLockAcquire(&slot->mutex);
		slot->starting = false;
		slot->wanted = false;
		slot->read_all = false;
		slot->worker_pid = 0;
		slot->worker_latch = NULL;
		slot->left_cleanly = true;
		slot->counted = false;
		slot->failures = 0;
		slot->not_before = 0;
		slot->due_at = 0;
		slot->unserved_until = 0;
		slot->no_worker_slot = false;
		slot->database = database;
		SpinLockRelease(&slot->mutex);
	}
	LWLockRelease(shared->lock);
	return slot;
}

/*
 * Makes sure that a commit of this backend can wake the worker: the callback
 * after commit is no place to find out that it cannot.
 */
static void
prepare_wake(void)
{
	static bool warned = false;

	if (shared != NULL && (my_slot == NULL || my_slot->database != MyDatabaseId))
		my_slot = slot_find(MyDatabaseId, true);
	if (my_slot != NULL || warned)
		return;

	warned = true;
	if (shared == NULL)
		ereport(WARNING,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("userpilot is not preloaded: changes are queued but not delivered"),
				 errhint("Add userpilot to shared_preload_libraries and restart the server.")));
	else
		ereport(WARNING,
				(errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
				 errmsg("no slot is free for this database: changes are queued but not delivered"),
				 errhint("Raise userpilot.max_databases and restart the server.")));
}

/* Acquires the mutex of this database's slot; false if there is none.  It may
 * have become another's meanwhile. */
static bool
lock_my_slot(void)
{
	while (my_slot != NULL)
	{
		SpinLockAcquire(&my_slot->mutex);
		if (my_slot->database == MyDatabaseId)
			return true;
		SpinLockRelease(&my_slot->mutex);
		my_slot = slot_find(MyDatabaseId, true);
	}
	return false;
}

void
state_note_commit_wake(void)
{
	prepare_wake();
	commit_wakes = true;
	if (claimed != NULL || !lock_my_slot())
		return;
	my_slot->claims++;
	SpinLockRelease(&my_slot->mutex);
	claimed = my_slot;
}

void
state_note_read_all(void)
{
	state_note_commit_wake();
	commit_reads_all = true;
}

/* Cheap enough for every row */
void
state_note_bulk(void)
{
	commit_has_bulk = true;
}

void
state_forget(void)
{
	commit_wakes = false;
	commit_has_bulk = false;
	commit_reads_all = false;
	if (claimed == NULL)
		return;
	SpinLockAcquire(&claimed->mutex);
	claimed->claims--;
	SpinLockRelease(&claimed->mutex);
	claimed = NULL;
}

/* After commit: raise the counter, set whose latch it is.  Cannot fail. */
void
state_commit(void)
{
	Latch	   *latch;
	int64		now;

	if (!commit_wakes || !lock_my_slot())
	{
		state_forget();
		return;
	}

	now = clock_now();
	my_slot->changes++;
	my_slot->bulk_changes += commit_has_bulk || commit_reads_all;
	my_slot->read_all |= commit_reads_all;
	latch = my_slot->worker_latch;
	if (latch == NULL && now < my_slot->unserved_until && !commit_reads_all)
	{
		/* nobody is there to send it to; look again then, but not for each */
		if (my_slot->due_at == 0)
		{
			my_slot->due_at = my_slot->unserved_until;
			latch = shared->launcher_latch;
		}
	}
	else if (latch == NULL)
	{
		/* also while one is starting or ending: the launcher sorts it out */
		my_slot->wanted = true;
		latch = shared->launcher_latch;
	}
	SpinLockRelease(&my_slot->mutex);

	if (latch != NULL)
		SetLatch(latch);
	state_forget();
}

/* ---------------------------------------------------------------- worker */

/*
 * The worker's place is free.  A launcher that has come since it was started
 * does not know of it, so then the worker itself says that it has ended.
 * With the slot's mutex held.
 */
static void
worker_gone(StateSlot *slot)
{
	slot->worker_pid = 0;
	slot->worker_latch = NULL;
	if (slot->started_by != shared->launcher_pid)
		slot->starting = false;
}

static void
worker_detach(int code, Datum arg)
{
	Latch	   *latch = NULL;

	quota_give_back();

	SpinLockAcquire(&my_slot->mutex);
	if (my_slot->worker_pid == MyProcPid)
	{
		worker_gone(my_slot);
		if (!my_slot->left_cleanly)
		{
			my_slot->wanted = true;
			latch = shared->launcher_latch;
		}
	}
	SpinLockRelease(&my_slot->mutex);
	if (latch != NULL)
		SetLatch(latch);
}

/* Takes the database's place for a worker; exits if another has it */
void
state_worker_attach(void)
{
	bool		taken = false;

	my_slot = slot_find(MyDatabaseId, true);
	if (!lock_my_slot())
		proc_exit(0);

	if (my_slot->worker_pid != 0)
		taken = true;
	else
	{
		my_slot->worker_pid = MyProcPid;
		my_slot->worker_latch = MyLatch;
		my_slot->attached = true;
		my_slot->wanted = false;	/* it will look at everything */
		my_slot->left_cleanly = false;
		my_slot->progressed = false;
		my_slot->due_at = 0;
		my_slot->unserved_until = 0;
	}
	SpinLockRelease(&my_slot->mutex);
	if (taken)
		proc_exit(0);
	before_shmem_exit(worker_detach, (Datum) 0);
}

StateWake
state_worker_wake(void)
{
	StateWake	wake;

	SpinLockAcquire(&my_slot->mutex);
	wake.changes = my_slot->changes;
	wake.bulk_changes = my_slot->bulk_changes;
	wake.read_all = my_slot->read_all;
	my_slot->read_all = false;
	SpinLockRelease(&my_slot->mutex);
	return wake;
}

/*
 * Says good-bye; refused (false) if something was committed since
 * seen_changes was read.  due_at: when to be started again, 0 for never.
 */
bool
state_worker_leave(uint64 seen_changes, int64 due_at)
{
	bool		may_leave;

	SpinLockAcquire(&my_slot->mutex);
	may_leave = my_slot->changes == seen_changes && !my_slot->read_all;
	if (may_leave)
	{
		worker_gone(my_slot);
		my_slot->left_cleanly = true;
		my_slot->due_at = due_at;
	}
	SpinLockRelease(&my_slot->mutex);
	return may_leave;
}

/*
 * No server is enabled, so what is committed meanwhile needs no worker; were
 * one to stay, or to come for every commit, it would only take time from
 * those who commit.  Refused if servers were changed since the last wake was
 * read.
 */
bool
state_worker_leave_unserved(int64 until)
{
	bool		may_leave;

	SpinLockAcquire(&my_slot->mutex);
	may_leave = !my_slot->read_all;
	if (may_leave)
	{
		worker_gone(my_slot);
		my_slot->left_cleanly = true;
		my_slot->unserved_until = until;
	}
	SpinLockRelease(&my_slot->mutex);
	return may_leave;
}

/* Makes way for others who want the database; to be started again at due_at */
void
state_worker_retreat(int64 due_at)
{
	SpinLockAcquire(&my_slot->mutex);
	worker_gone(my_slot);
	my_slot->left_cleanly = true;
	my_slot->due_at = my_slot->unserved_until = due_at;	/* whatever is committed */
	SpinLockRelease(&my_slot->mutex);
}

/*
 * The database has no use for a slot: the extension is not installed.  A
 * backend that is about to queue all the same looks its slot up again.
 */
void
state_worker_vacate(void)
{
	LWLockAcquire(shared->lock, LW_EXCLUSIVE);
	SpinLockAcquire(&my_slot->mutex);
	worker_gone(my_slot);
	my_slot->left_cleanly = true;
	my_slot->due_at = 0;
	if (!my_slot->wanted && my_slot->claims == 0)
		my_slot->database = InvalidOid;
	SpinLockRelease(&my_slot->mutex);
	LWLockRelease(shared->lock);
}

void
state_worker_counted(void)
{
	Latch	   *latch = NULL;

	SpinLockAcquire(&my_slot->mutex);
	if (!my_slot->counted)
		latch = shared->launcher_latch;
	my_slot->counted = true;
	SpinLockRelease(&my_slot->mutex);
	if (latch != NULL)
		SetLatch(latch);
}

void
state_worker_progress(void)
{
	my_slot->progressed = true;
}

int
state_worker_pid(Oid database)
{
	StateSlot  *slot = shared ? slot_find(database, false) : NULL;

	return slot ? slot->worker_pid : 0;
}

/* -------------------------------------------------------------- launcher */

static void
launcher_detach(int code, Datum arg)
{
	LWLockAcquire(shared->lock, LW_EXCLUSIVE);
	shared->launcher_latch = NULL;
	shared->launcher_pid = 0;
	LWLockRelease(shared->lock);
}

void
state_launcher_attach(void)
{
	LWLockAcquire(shared->lock, LW_EXCLUSIVE);
	shared->launcher_latch = MyLatch;
	shared->launcher_pid = MyProcPid;
	/* what an earlier launcher asked for it will never hear of */
	for (int i = 0; i < shared->nslots; i++)
	{
		SpinLockAcquire(&shared->slots[i].mutex);
		if (shared->slots[i].worker_pid == 0)
			shared->slots[i].starting = false;
		SpinLockRelease(&shared->slots[i].mutex);
	}
	LWLockRelease(shared->lock);
	before_shmem_exit(launcher_detach, (Datum) 0);
}

bool
state_launcher_present(void)
{
	return shared != NULL && shared->launcher_pid != 0;
}

/* false: there is no slot for it */
bool
state_launcher_visit(Oid database)
{
	StateSlot  *slot = slot_find(database, true);

	if (slot == NULL)
		return false;
	SpinLockAcquire(&slot->mutex);
	if (slot->worker_latch == NULL)
		slot->wanted = true;
	SpinLockRelease(&slot->mutex);
	return true;
}

/* One that has been vacated has nothing to count */
bool
state_launcher_counted(Oid database)
{
	StateSlot  *slot = slot_find(database, false);

	return slot == NULL || slot->counted;
}

/*
 * A database that needs a worker now, or until when there is none to start.
 */
StateLaunch
state_launcher_next(int64 now, Oid *database, uint64 *start, int64 *wait_until)
{
	StateLaunch result = STATE_LAUNCH_NONE;

	*wait_until = 0;
	for (int i = 0; i < shared->nslots; i++)
	{
		StateSlot  *slot = &shared->slots[i];
		int64		at = 0;

		SpinLockAcquire(&slot->mutex);
		if (OidIsValid(slot->database) && slot->worker_pid == 0 && !slot->starting)
		{
			if (slot->wanted)
				at = Max(slot->not_before, 1);
			else if (slot->due_at > 0)
				at = Max(slot->due_at, slot->not_before);
			if (at > 0 && at <= now)
			{
				slot->starting = true;
				slot->started_by = MyProcPid;
				slot->attached = false;
				slot->wanted = false;
				slot->due_at = 0;
				slot->start = *start = ++shared->starts;
				*database = slot->database;
				result = STATE_LAUNCH_START;
			}
		}
		SpinLockRelease(&slot->mutex);

		if (result == STATE_LAUNCH_START)
			return result;
		if (at > 0 && (*wait_until == 0 || at < *wait_until))
		{
			*wait_until = at;
			result = STATE_LAUNCH_WAIT;
		}
	}
	return result;
}

/* registered: false when max_worker_processes left no room */
void
state_launcher_started(Oid database, bool registered)
{
	StateSlot  *slot = slot_find(database, false);

	if (slot == NULL)
		return;
	SpinLockAcquire(&slot->mutex);
	slot->no_worker_slot = !registered;
	if (!registered)
	{
		slot->starting = false;
		slot->wanted = true;
		slot->not_before = clock_now() + NO_SLOT_WAIT_MS * userpilot_time_scale;
	}
	SpinLockRelease(&slot->mutex);
}

/* The worker of this start is gone; connectable: its database is still there */
void
state_launcher_ended(Oid database, uint64 start, bool connectable, int64 now)
{
	StateSlot  *slot = slot_find(database, false);

	if (slot == NULL)
		return;
	LWLockAcquire(shared->lock, LW_EXCLUSIVE);
	SpinLockAcquire(&slot->mutex);
	if (slot->start != start)
	{
		/* the slot was vacated and is another's, or another start's */
		SpinLockRelease(&slot->mutex);
		LWLockRelease(shared->lock);
		return;
	}
	slot->starting = false;
	if (!slot->attached && connectable)
	{
		/* it could not be started */
		slot->left_cleanly = slot->progressed = false;
	}
	else if (!slot->attached)
	{
		/* the database is gone, or takes no connections: its slot is free */
		slot->left_cleanly = true;
		if (!slot->wanted && slot->claims == 0)
			slot->database = InvalidOid;
		slot->wanted = false;
	}
	if (slot->left_cleanly || slot->progressed)
		slot->failures = 0;
	else
		slot->failures++;
	slot->not_before = 0;
	if (!slot->left_cleanly)
	{
		/* it may have left work behind */
		slot->wanted = true;
		slot->not_before = now + 1000;
		if (slot->failures >= FAILURES_FREE)
			slot->not_before = now + Min((int64) FAILURE_WAIT_MS << Min(slot->failures - FAILURES_FREE, 6),
										 FAILURE_WAIT_MAX_MS);
	}
	SpinLockRelease(&slot->mutex);
	LWLockRelease(shared->lock);
}

/* Why no worker runs although there may be work, in words, or NULL */
const char *
state_launch_problem(Oid database)
{
	StateSlot  *slot;

	if (shared == NULL)
		return "userpilot is not in shared_preload_libraries";
	if (shared->launcher_pid == 0)
		return "the userpilot launcher is not running";
	slot = slot_find(database, false);
	if (slot == NULL)
		return NULL;
	if (slot->no_worker_slot)
		return "no background worker slot is free: raise max_worker_processes";
	if (slot->failures >= FAILURES_FREE && slot->worker_pid == 0)
		return "the worker ended uncleanly several times in a row: see the server log";
	return NULL;
}
