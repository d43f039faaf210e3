/*
 * known.h
 *	  What a caller's session may leave out because Userpilot has it.
 */
#ifndef USERPILOT_KNOWN_H
#define USERPILOT_KNOWN_H

#include "environment.h"
#include "queue.h"

typedef enum KnownVerdict
{
	KNOWN_NEW,					/* never acknowledged */
	KNOWN_CHANGED,				/* something differs, is unknown or under way */
	KNOWN_UNCHANGED				/* Userpilot has all of it, and nothing is under way */
} KnownVerdict;

typedef struct Known Known;

/*
 * For rows that were read with the active snapshot; in CurrentMemoryContext.
 * Reads the whole queue once, if there is a row to leave out at all.
 */
extern Known *known_open(const EnvironmentRef *server, UserpilotKind kind);

/*
 * Announces a bulk SELECT to others until the transaction ends, and tells
 * whether it may leave rows out: not while another that reads an older state
 * may still queue rows.
 */
extern bool known_may_leave_out(const EnvironmentRef *server, UserpilotKind kind);

/* Judges n changes */
extern void known_judge(Known *known, const QueueChange *changes, int n,
						KnownVerdict *verdicts);

#endif
