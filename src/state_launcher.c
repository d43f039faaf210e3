/*
 * state_launcher.c
 *	  The launcher's side of all slots: which database needs a worker, and
 *	  when.
 */
#include "postgres.h"

#include "miscadmin.h"
#include "storage/ipc.h"

#include "clock.h"
#include "settings.h"
#include "state_slot.h"

/* Crash-loop brake: after this many unclean ends without progress, wait */
#define FAILURES_FREE 3
#define FAILURE_WAIT_MS (60 * 1000)
#define FAILURE_WAIT_MAX_MS (3600 * 1000)
#define NO_SLOT_WAIT_MS (5 * 1000)

static void
launcher_detach(int code, Datum arg)
{
	LWLockAcquire(state_shared->lock, LW_EXCLUSIVE);
	state_shared->launcher_latch = NULL;
	state_shared->launcher_pid = 0;
	LWLockRelease(state_shared->lock);
}

void
state_launcher_attach(void)
{
	LWLockAcquire(state_shared->lock, LW_EXCLUSIVE);
	state_shared->launcher_latch = MyLatch;
	state_shared->launcher_pid = MyProcPid;
	/* what an earlier launcher asked for it will never hear of */
	for (int i = 0; i < state_shared->nslots; i++)
	{
		SpinLockAcquire(&state_shared->slots[i].mutex);
		if (state_shared->slots[i].worker_pid == 0)
			state_shared->slots[i].starting = false;
		SpinLockRelease(&state_shared->slots[i].mutex);
	}
	LWLockRelease(state_shared->lock);
	before_shmem_exit(launcher_detach, (Datum) 0);
}

bool
state_launcher_present(void)
{
	return state_shared != NULL && state_shared->launcher_pid != 0;
}

/* false: there is no slot for it */
bool
state_launcher_visit(Oid database)
{
	StateSlot  *slot = state_slot_find(database, true);

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
	StateSlot  *slot = state_slot_find(database, false);

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
	for (int i = 0; i < state_shared->nslots; i++)
	{
		StateSlot  *slot = &state_shared->slots[i];
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
				slot->start = *start = ++state_shared->starts;
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
	StateSlot  *slot = state_slot_find(database, false);

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
	StateSlot  *slot = state_slot_find(database, false);

	if (slot == NULL)
		return;
	LWLockAcquire(state_shared->lock, LW_EXCLUSIVE);
	SpinLockAcquire(&slot->mutex);
	if (slot->start != start)
	{
		/* the slot was vacated and is another's, or another start's */
		SpinLockRelease(&slot->mutex);
		LWLockRelease(state_shared->lock);
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
	LWLockRelease(state_shared->lock);
}

/* Why no worker runs although there may be work, in words, or NULL */
const char *
state_launch_problem(Oid database)
{
	StateSlot  *slot;

	if (state_shared == NULL)
		return "userpilot is not in shared_preload_libraries";
	if (state_shared->launcher_pid == 0)
		return "the userpilot launcher is not running";
	slot = state_slot_find(database, false);
	if (slot == NULL)
		return NULL;
	if (slot->no_worker_slot)
		return "no background worker slot is free: raise max_worker_processes";
	if (slot->failures >= FAILURES_FREE && slot->worker_pid == 0)
		return "the worker ended uncleanly several times in a row: see the server log";
	return NULL;
}
