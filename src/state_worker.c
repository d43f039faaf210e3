/*
 * state_worker.c
 *	  A worker's side of its database's slot: coming, being woken, leaving.
 */
#include "postgres.h"

#include "miscadmin.h"
#include "storage/ipc.h"

#include "quota.h"
#include "state_slot.h"

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
	if (slot->started_by != state_shared->launcher_pid)
		slot->starting = false;
}

static void
worker_detach(int code, Datum arg)
{
	Latch	   *latch = NULL;

	quota_give_back();

	SpinLockAcquire(&state_my_slot->mutex);
	if (state_my_slot->worker_pid == MyProcPid)
	{
		worker_gone(state_my_slot);
		if (!state_my_slot->left_cleanly)
		{
			state_my_slot->wanted = true;
			latch = state_shared->launcher_latch;
		}
	}
	SpinLockRelease(&state_my_slot->mutex);
	if (latch != NULL)
		SetLatch(latch);
}

/* Takes the database's place for a worker; exits if another has it */
void
state_worker_attach(void)
{
	bool		taken = false;

	state_my_slot = state_slot_find(MyDatabaseId, true);
	if (!state_lock_my_slot())
		proc_exit(0);

	if (state_my_slot->worker_pid != 0)
		taken = true;
	else
	{
		state_my_slot->worker_pid = MyProcPid;
		state_my_slot->worker_latch = MyLatch;
		state_my_slot->attached = true;
		state_my_slot->wanted = false;	/* it will look at everything */
		state_my_slot->left_cleanly = false;
		state_my_slot->progressed = false;
		state_my_slot->due_at = 0;
		state_my_slot->unserved_until = 0;
	}
	SpinLockRelease(&state_my_slot->mutex);
	if (taken)
		proc_exit(0);
	before_shmem_exit(worker_detach, (Datum) 0);
}

StateWake
state_worker_wake(void)
{
	StateWake	wake;

	SpinLockAcquire(&state_my_slot->mutex);
	wake.changes = state_my_slot->changes;
	wake.bulk_changes = state_my_slot->bulk_changes;
	wake.read_all = state_my_slot->read_all;
	wake.prepared = state_my_slot->prepared;
	state_my_slot->read_all = state_my_slot->prepared = false;
	SpinLockRelease(&state_my_slot->mutex);
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

	SpinLockAcquire(&state_my_slot->mutex);
	may_leave = state_my_slot->changes == seen_changes && !state_my_slot->read_all;
	if (may_leave)
	{
		worker_gone(state_my_slot);
		state_my_slot->left_cleanly = true;
		state_my_slot->due_at = due_at;
	}
	SpinLockRelease(&state_my_slot->mutex);
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

	SpinLockAcquire(&state_my_slot->mutex);
	may_leave = !state_my_slot->read_all;
	if (may_leave)
	{
		worker_gone(state_my_slot);
		state_my_slot->left_cleanly = true;
		state_my_slot->unserved_until = until;
	}
	SpinLockRelease(&state_my_slot->mutex);
	return may_leave;
}

/* Makes way for others who want the database; to be started again at due_at */
void
state_worker_retreat(int64 due_at)
{
	SpinLockAcquire(&state_my_slot->mutex);
	worker_gone(state_my_slot);
	state_my_slot->left_cleanly = true;
	state_my_slot->due_at = state_my_slot->unserved_until = due_at;	/* whatever is committed */
	SpinLockRelease(&state_my_slot->mutex);
}

/*
 * The database has no use for a slot: the extension is not installed.  A
 * backend that is about to queue all the same looks its slot up again.
 */
void
state_worker_vacate(void)
{
	LWLockAcquire(state_shared->lock, LW_EXCLUSIVE);
	SpinLockAcquire(&state_my_slot->mutex);
	worker_gone(state_my_slot);
	state_my_slot->left_cleanly = true;
	state_my_slot->due_at = 0;
	if (!state_my_slot->wanted && state_my_slot->claims == 0)
		state_my_slot->database = InvalidOid;
	SpinLockRelease(&state_my_slot->mutex);
	LWLockRelease(state_shared->lock);
}

void
state_worker_counted(void)
{
	Latch	   *latch = NULL;

	SpinLockAcquire(&state_my_slot->mutex);
	if (!state_my_slot->counted)
		latch = state_shared->launcher_latch;
	state_my_slot->counted = true;
	SpinLockRelease(&state_my_slot->mutex);
	if (latch != NULL)
		SetLatch(latch);
}

void
state_worker_progress(void)
{
	state_my_slot->progressed = true;
}

int
state_worker_pid(Oid database)
{
	StateSlot  *slot = state_shared ? state_slot_find(database, false) : NULL;

	return slot ? slot->worker_pid : 0;
}
