/*
 * profiles.h
 *	  userpilot_profiles: what Userpilot is known to have.
 */
#ifndef USERPILOT_PROFILES_H
#define USERPILOT_PROFILES_H

#include "datatype/timestamp.h"

#include "entities.h"
#include "merge.h"

/* One entity on its way: its profile read, changes folded in, written back */
typedef struct Profile
{
	EntityKey	key;			/* id in the entity's memory */
	MemoryContext context;		/* of merge and all it comes to hold */
	MergeEntity *merge;
	bool		exists;			/* Userpilot has acknowledged it once */
	int			attempts;		/* bodies since the last acknowledgement */
	int64		job;			/* in flight in, 0: none */
} Profile;

/* What becomes of the profile row */
typedef enum ProfileStep
{
	PROFILE_RAISED,				/* versions only: nothing was to be sent */
	PROFILE_MARKED,				/* a body is about to leave */
	PROFILE_LEARNED				/* ... and was acknowledged */
} ProfileStep;

/* Whether what was acknowledged then is no longer believed; refresh_after is
 * in seconds */
extern bool profiles_expired(EntityKey key, TimestampTz believed_since,
							 int64 refresh_after, TimestampTz now);

/* Reads the profiles of n entities of one kind into their merges */
extern void profiles_read(const char *server, int64 refresh_after,
						  Profile **profiles, int n);

/* Writes n of them; the merges must be marked or learned accordingly */
extern void profiles_write(const char *server, Profile **profiles, int n,
						   ProfileStep step);

/* Sets attempts of one entity: given back, or counted anew */
extern void profiles_set_attempts(const char *server, Profile **profiles, int n);

/*
 * Makes everything Userpilot is known to have unknown: of a server, of a kind,
 * of an entity (NULL: all), acknowledged since then (NULL: ever).  Returns how
 * many profiles.  Waits for the worker's step to end, and it for us.
 */
extern uint64 profiles_invalidate(const char *server, text *kind, text *entity_id,
								  const TimestampTz *since);

/* Before a step's snapshot: what it reads here no one makes unknown until it
 * has written it back */
extern void profiles_lock(void);

/* From a session, until its transaction ends: no step is under way, and none
 * begins */
extern void profiles_lock_out_worker(void);

/* A bulk job was acknowledged in full: learns what some of its records say, one
 * a line, which are changed here.  The mark has raised the versions already; an
 * entity that was released meanwhile is left unknown. */
extern void profiles_learn_records(const char *server, UserpilotKind kind, int64 job,
								   char *records, int len);

/* A job's entities are no longer in flight, and what was sent stays unknown;
 * give_back: the attempt does not count.  Needs its records to be there. */
extern void profiles_release_job(const char *server, UserpilotKind kind, int64 job,
								 bool give_back);

#endif
