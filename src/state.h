/*
 * state.h
 *	  Shared memory: who is to be woken, and which worker is to run.
 *
 * A slot per database joins the backends that queue, the worker that
 * delivers and the launcher that starts it.
 */
#ifndef USERPILOT_STATE_H
#define USERPILOT_STATE_H

/* What a worker sees of its slot */
typedef struct StateWake
{
	uint64		changes;		/* commits that queued something, ever */
	uint64		bulk_changes;	/* ... that queued for the bulk lane */
	bool		read_all;		/* someone moved rows the look cannot see */
	bool		prepared;		/* a transaction was prepared: nobody will tell
								 * when it is decided */
} StateWake;

extern void state_register(void);	/* hooks, from _PG_init */
extern bool state_available(void);	/* preloaded? */

/* Backends */
extern void state_note_commit_wake(void);	/* in the transaction; may warn */
extern void state_note_read_all(void);	/* ... and look at everything */
extern void state_note_bulk(void);	/* ... there is something to sweep */
extern void state_commit(bool prepared);	/* from the transaction callback */
extern void state_forget(void); /* transaction ended without */

/* Worker */
extern void state_worker_attach(void);
extern StateWake state_worker_wake(void);	/* reads, and clears what is bool */
extern bool state_worker_leave(uint64 seen_changes, int64 due_at);
extern bool state_worker_leave_unserved(int64 until);
extern void state_worker_retreat(int64 due_at);
extern void state_worker_vacate(void);	/* nothing is ever to do here */
extern void state_worker_counted(void); /* what it called is known again */
extern void state_worker_progress(void);	/* it got something done */
extern int	state_worker_pid(Oid database); /* 0: none */

/* Launcher */
typedef enum StateLaunch
{
	STATE_LAUNCH_NONE,
	STATE_LAUNCH_START,
	STATE_LAUNCH_WAIT
} StateLaunch;

extern void state_launcher_attach(void);
extern bool state_launcher_present(void);
extern bool state_launcher_visit(Oid database);	/* ask for a worker there */
extern bool state_launcher_counted(Oid database);	/* ... it has counted */
extern StateLaunch state_launcher_next(int64 now, Oid *database, uint64 *start,
									   int64 *wait_until);
extern void state_launcher_started(Oid database, bool registered);
extern void state_launcher_ended(Oid database, uint64 start, bool connectable, int64 now);
extern const char *state_launch_problem(Oid database);

#endif
