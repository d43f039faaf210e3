/*
 * state.c
 *	  Shared memory: the databases' slots, and waking whom a commit concerns.
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
#include "storage/shmem.h"

#include "clock.h"
#include "quota.h"
#include "settings.h"
#include "state_slot.h"

#define STATE_TRANCHE "userpilot"

StateShared *state_shared = NULL;
StateSlot  *state_my_slot = NULL;

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
	state_shared = (StateShared *) base;
	if (!found)
	{
		memset(base, 0, state_size());
		state_shared->lock = &(GetNamedLWLockTranche(STATE_TRANCHE))->lock;
		state_shared->nslots = userpilot_max_databases;
		base += MAXALIGN(sizeof(StateShared));
		state_shared->slots = (StateSlot *) base;
		for (int i = 0; i < state_shared->nslots; i++)
			SpinLockInit(&state_shared->slots[i].mutex);
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
	return state_shared != NULL;
}

/* A slot of which nothing is wanted is anybody's: its database may be gone.
 * With the lock held exclusively; NULL: all are in use. */
static StateSlot *
slot_take_idle(void)
{
	for (int i = 0; i < state_shared->nslots; i++)
	{
		StateSlot  *slot = &state_shared->slots[i];
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

StateSlot *
state_slot_find(Oid database, bool create)
{
	StateSlot  *free_slot = NULL;
	StateSlot  *slot = NULL;

	LWLockAcquire(state_shared->lock, create ? LW_EXCLUSIVE : LW_SHARED);
	for (int i = 0; i < state_shared->nslots; i++)
	{
		if (state_shared->slots[i].database == database)
		{
			slot = &state_shared->slots[i];
			break;
		}
		if (free_slot == NULL && !OidIsValid(state_shared->slots[i].database))
			free_slot = &state_shared->slots[i];
	}
	if (slot == NULL && create)
		slot = free_slot ? free_slot : slot_take_idle();
	if (slot != NULL && slot->database != database)
	{
		SpinLockAcquire(&slot->mutex);
		slot->starting = false;
		slot->wanted = false;
		slot->read_all = false;
		slot->prepared = false;
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
	LWLockRelease(state_shared->lock);
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

	if (state_shared != NULL && (state_my_slot == NULL || state_my_slot->database != MyDatabaseId))
		state_my_slot = state_slot_find(MyDatabaseId, true);
	if (state_my_slot != NULL || warned)
		return;

	warned = true;
	if (state_shared == NULL)
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

bool
state_lock_my_slot(void)
{
	while (state_my_slot != NULL)
	{
		SpinLockAcquire(&state_my_slot->mutex);
		if (state_my_slot->database == MyDatabaseId)
			return true;
		SpinLockRelease(&state_my_slot->mutex);
		state_my_slot = state_slot_find(MyDatabaseId, true);
	}
	return false;
}

void
state_note_commit_wake(void)
{
	prepare_wake();
	commit_wakes = true;
	if (claimed != NULL || !state_lock_my_slot())
		return;
	state_my_slot->claims++;
	SpinLockRelease(&state_my_slot->mutex);
	claimed = state_my_slot;
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

/* After commit, or PREPARE: raise the counter, set whose latch it is.  Cannot
 * fail. */
void
state_commit(bool prepared)
{
	Latch	   *latch;
	int64		now;

	if (!commit_wakes || !state_lock_my_slot())
	{
		state_forget();
		return;
	}

	now = clock_now();
	state_my_slot->changes++;
	state_my_slot->bulk_changes += commit_has_bulk || commit_reads_all;
	state_my_slot->read_all |= commit_reads_all;
	state_my_slot->prepared |= prepared;
	latch = state_my_slot->worker_latch;
	if (latch == NULL && now < state_my_slot->unserved_until && !commit_reads_all)
	{
		/* nobody is there to send it to; look again then, but not for each */
		if (state_my_slot->due_at == 0)
		{
			state_my_slot->due_at = state_my_slot->unserved_until;
			latch = state_shared->launcher_latch;
		}
	}
	else if (latch == NULL)
	{
		/* also while one is starting or ending: the launcher sorts it out */
		state_my_slot->wanted = true;
		latch = state_shared->launcher_latch;
	}
	SpinLockRelease(&state_my_slot->mutex);

	if (latch != NULL)
		SetLatch(latch);
	state_forget();
}
