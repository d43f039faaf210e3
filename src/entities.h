/*
 * entities.h
 *	  Hash tables keyed by entity: kind and id.
 */
#ifndef USERPILOT_ENTITIES_H
#define USERPILOT_ENTITIES_H

#include "common/hashfn.h"

#include "userpilot.h"

typedef struct EntityKey
{
	UserpilotKind kind;
	int			len;
	const char *id;				/* not NUL-terminated by contract */
} EntityKey;

typedef struct EntityEntry
{
	EntityKey	key;
	uint32		hash;
	char		status;
	void	   *data;
} EntityEntry;

static inline uint32
entity_hash(EntityKey key)
{
	return hash_bytes((const unsigned char *) key.id, key.len) ^ (uint32) key.kind;
}

static inline bool
entity_equal(EntityKey a, EntityKey b)
{
	return a.kind == b.kind && a.len == b.len && memcmp(a.id, b.id, a.len) == 0;
}

#define SH_PREFIX entities
#define SH_ELEMENT_TYPE EntityEntry
#define SH_KEY_TYPE EntityKey
#define SH_KEY key
#define SH_HASH_KEY(tb, key) entity_hash(key)
#define SH_EQUAL(tb, a, b) entity_equal(a, b)
#define SH_STORE_HASH
#define SH_GET_HASH(tb, a) (a)->hash
#define SH_SCOPE static inline pg_attribute_unused()
#define SH_DECLARE
#define SH_DEFINE
#include "lib/simplehash.h"

#endif
