/*
 * shape.h
 *	  What a server's options make of metadata before it is queued: properties
 *	  left out, objects flattened, users' values as strings.
 */
#ifndef USERPILOT_SHAPE_H
#define USERPILOT_SHAPE_H

#include "utils/jsonb.h"

#include "userpilot.h"

typedef struct Shape
{
	int			nexcluded;
	char	  **excluded;
	bool		flatten;		/* {"a":{"b":1}} becomes {"a.b":1} */
	bool		user_strings;	/* numbers and booleans of users become strings */
} Shape;

/*
 * The names in a list 'email, phone', in CurrentMemoryContext; -1 if one is
 * empty.
 */
extern int	shape_names(const char *list, char ***names);

extern bool shape_excludes(const Shape *shape, const char *name, int len);
extern bool shape_excludes_same(const Shape *a, const Shape *b);

/*
 * An object's members, named with the prefix; with flatten, objects in it give
 * theirs, named address.city.  Arrays, and objects without, come as jbvBinary.
 * The name is good for the call; returns whether the member is taken: it ends
 * with twenty times what a change may have, which is refused anyway.
 */
typedef bool (*ShapeMember) (const char *name, JsonbValue *value, void *arg);

extern void shape_walk(JsonbContainer *object, const char *prefix, bool flatten,
					   ShapeMember member, void *arg);

/* Metadata as it is to be queued: the argument itself if nothing changes.
 * What is no object stays as it is. */
extern Jsonb *shape_metadata(const Shape *shape, UserpilotKind kind, Jsonb *metadata);

#endif
