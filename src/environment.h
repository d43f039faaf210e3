/*
 * environment.h
 *	  A Userpilot environment: foreign server, its user mapping for PUBLIC,
 *	  and whether this very database may send to it.
 */
#ifndef USERPILOT_ENVIRONMENT_H
#define USERPILOT_ENVIRONMENT_H

#include "nodes/pg_list.h"

#include "http.h"
#include "shape.h"

typedef enum BulkFormat
{
	BULK_FORMAT_AUTO,
	BULK_FORMAT_JSON,
	BULK_FORMAT_NDJSON
} BulkFormat;

typedef struct Environment
{
	Oid			serverid;
	char	   *server;
	HttpTarget	target;			/* endpoint, key, ca_file, proxy, timeout */
	int			requests_per_minute;
	int			connections;
	int			max_attempts;
	BulkFormat	bulk_format;
	Shape		shape;
	int64		refresh_after;	/* seconds a profile is believed for */
	uint64		fingerprint;	/* of endpoint and key: one per application */
	char	   *problem;		/* why it cannot send, in words, or NULL */
	char	   *problem_hint;
} Environment;

/* Where changes go, and what becomes of them on the way into the queue */
typedef struct EnvironmentRef
{
	Oid			serverid;
	text	   *name;
	Shape		shape;
	bool		invalid_is_error;	/* a trigger's invalid row: no dead letter */
	int64		refresh_after;	/* seconds a profile is believed for */
} EnvironmentRef;

/*
 * The server that userpilot.server names, for the current user: raises if
 * there is none or the user lacks USAGE.  Looked up once, then kept until
 * setting, role or catalog change; what lives longer than a call is to be
 * copied.
 */
extern const EnvironmentRef *environment_current(void);

/* A server of ours, in CurrentMemoryContext */
extern EnvironmentRef *environment_ref(Oid serverid);

/*
 * The server that triggers of this database send to unless they name one: as
 * configuration file or ALTER DATABASE say, not a role or a session.
 */
extern char *environment_default_server(void);

/* Whether a role may send through a server of ours, and if not, why */
extern bool environment_may_use(const char *server, Oid roleid, Oid *serverid,
								char **why);

/* Whether some subscription of this database fills the table */
extern bool environment_is_subscribed(Oid relid);

/* A server of ours by name that the current user owns; raises otherwise */
extern Oid	environment_owned(const char *server);

/* A server of ours by name: raises if it does not exist or is not of this
 * wrapper; checks USAGE for the current user if asked. */
extern Oid	environment_lookup(const char *server, bool check_usage);

/* Whether a foreign-data wrapper is this extension's own, whatever its name */
extern bool environment_is_ours(Oid fdwid);

/* Raises unless the role may send through this server */
extern void environment_check_usage(Oid serverid, Oid roleid);

/*
 * Everything needed to send, key file read, in CurrentMemoryContext.  Trouble
 * with the key is no error: it is told in "problem".  NULL if the server is
 * gone or not of this wrapper.  The key never appears in any message.
 */
extern Environment *environment_load(Oid serverid);

/*
 * Servers that may send from this very database and cluster now: list of Oid.
 * Exactly those of which environment_disabled_reason says nothing; so empty
 * on a standby and with userpilot.deliver off.
 */
extern List *environment_enabled(void);

/* What userpilot_status says of a server that may not send, or NULL */
extern const char *environment_disabled_reason(Oid serverid);

/* The extension, kept until changed: InvalidOid if it is not installed */
extern Oid	environment_extension(void);

/* ... and its schema: raises if the extension is not installed */
extern Oid	environment_schema(void);

/* The extension as it is now, InvalidOid if it is not installed; if it is, fills
 * what is not NULL */
extern Oid	environment_installed(Oid *schema, Oid *owner, char **version);

/* How many of max_worker_processes are taken; SPI must be connected */
extern int	environment_workers_used(void);

#endif
