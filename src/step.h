/*
 * step.h
 *	  The worker's transactions.
 */
#ifndef USERPILOT_STEP_H
#define USERPILOT_STEP_H

/* Once, connected to the database */
extern void step_start_up(void);

/*
 * A transaction as the extension's owner, with a snapshot; until it ends no
 * invalidation of profiles can commit, and the extension cannot be dropped.
 * false: it has been dropped, or made anew.
 */
extern bool step_begin(Oid extension, Oid owner);

/* durable: what was marked must be on disk before its body leaves */
extern void step_end(bool durable);

/* Back to the memory between steps, after a transaction of another kind */
extern void step_outside(void);

#endif
