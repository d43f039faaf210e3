/*
 * state_slot.h
 *	  What a slot in shared memory holds: known to state*.c alone.
 */
#ifndef USERPILOT_STATE_SLOT_H
#define USERPILOT_STATE_SLOT_H

#include "storage/latch.h"
#include "storage/lwlock.h"
#include "storage/spin.h"

#include "state.h"

typedef struct StateSlot
{
	slock_t		mutex;
	Oid			database;		/* InvalidOid: free */
	uint64		changes;
	uint64		bulk_changes;
	bool		read_all;
	bool		prepared;
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

extern StateShared *state_shared;	/* NULL: not preloaded */

/* This process's database's, as far as it knows (state_lock_my_slot) */
extern StateSlot *state_my_slot;

/* The slot of a database; made if asked for and there is room, else NULL */
extern StateSlot *state_slot_find(Oid database, bool create);

/* Acquires the mutex of this database's slot; false if there is none.  It may
 * have become another's meanwhile. */
extern bool state_lock_my_slot(void);

#endif
