/*
 * change.h
 *	  A change as a caller states it: checked here, once, whichever way it
 *	  comes in.  What can never be sent is refused in the caller's statement.
 */
#ifndef USERPILOT_CHANGE_H
#define USERPILOT_CHANGE_H

#include "utils/jsonb.h"

/* Whether values of a type, a domain's base type, can be ids */
extern bool change_is_id_type(Oid type);

/*
 * An id argument of any accepted type as text; raises for null, empty, too
 * long, and types that are no id.  "what" is the argument's name.
 */
extern text *change_id(Oid type, Datum value, bool isnull, const char *what);

/* Whether a property can have that name: it is there, and within the limit */
extern bool change_is_name(const char *name, int len);

/* Raises unless it is an object of primitives within the API's limits */
extern void change_check_metadata(Jsonb *metadata);

/*
 * What such a check complains of, hint included, or NULL: for callers that
 * must not fail.  Errors of another sort pass.
 */
extern char *change_complaint(void (*check) (void *arg), void *arg);

/* '{}', for a metadata argument that is null */
extern Jsonb *change_no_metadata(void);

#endif
