/*
 * userpilot.h
 *	  What every layer may know: the two kinds of entity and the API's limits.
 *
 * Needs nothing from the server, so the pure modules can be built without one.
 */
#ifndef USERPILOT_H
#define USERPILOT_H

#define USERPILOT_VERSION "1.0"

typedef enum UserpilotKind
{
	USERPILOT_COMPANY,
	USERPILOT_USER
} UserpilotKind;

#define USERPILOT_KINDS 2

/* Documented limits of the API (bulk: "Bulk Companies/Users Update") */
#define USERPILOT_MAX_RECORDS 10000
#define USERPILOT_REQUESTS_PER_MINUTE 600
#define USERPILOT_RECORDS_PER_MINUTE 1800

/* Repeated by third parties only, but nothing larger can be relied upon */
#define USERPILOT_MAX_PROPERTIES 500
#define USERPILOT_MAX_NAME_CHARS 255
#define USERPILOT_MAX_VALUE_CHARS 65535

/* Ours: keeps an id inside one btree key of userpilot_profiles */
#define USERPILOT_MAX_ID_CHARS 512

static inline const char *
userpilot_kind_name(UserpilotKind kind)
{
	return kind == USERPILOT_COMPANY ? "company" : "user";
}

#endif
