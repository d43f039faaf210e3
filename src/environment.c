/*
 * environment.c
 *	  A Userpilot environment: a foreign server and its user mapping for PUBLIC.
 *
 * Core keeps ownership, privileges, dumps and invalidation of servers and
 * mappings; this file reads them.  Only the mapping for PUBLIC counts, as
 * changes are sent by one background process and not by whoever made them.
 */
#include "postgres.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/reloptions.h"
#include "access/table.h"
#include "catalog/dependency.h"
#include "catalog/pg_db_role_setting.h"
#include "catalog/pg_extension.h"
#include "catalog/pg_foreign_data_wrapper.h"
#include "catalog/pg_foreign_server.h"
#include "catalog/pg_type.h"
#include "catalog/pg_user_mapping.h"
#include "commands/extension.h"
#include "common/hashfn.h"
#include "foreign/foreign.h"
#include "miscadmin.h"
#include "storage/fd.h"
#include "utils/acl.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/inval.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/syscache.h"

#include "compat.h"
#include "environment.h"
#include "options.h"
#include "settings.h"

#define EXTENSION_NAME "userpilot"
#define MAX_KEY_FILE 4096

/*
 * Counts catalog changes that may outdate what is kept below.  What was looked
 * up at a generation holds while that is still the current one.
 */
static uint64 generation = 1;

static Oid	extension_kept = InvalidOid;
static Oid	schema_kept = InvalidOid;
static uint64 extension_generation = 0;

static EnvironmentRef *current_ref = NULL;
static MemoryContext current_context = NULL;
static uint64 current_generation = 0;
static Oid	current_role = InvalidOid;


/* ---- the extension ---- */

/* Syscache callback: any change may be one that matters */
static void
catalog_changed(Datum arg, int cacheid, uint32 hashvalue)
{
	generation++;
}

/*
 * Subscribes to catalog changes, once a process.  pg_extension has no cache of
 * its own to subscribe to, but the extension cannot come or go without its
 * foreign-data wrapper.
 */
static void
watch_catalogs(void)
{
	static bool watching = false;

	if (watching)
		return;
	watching = true;
	CacheRegisterSyscacheCallback(FOREIGNDATAWRAPPEROID, catalog_changed, (Datum) 0);
	CacheRegisterSyscacheCallback(FOREIGNSERVEROID, catalog_changed, (Datum) 0);
	CacheRegisterSyscacheCallback(AUTHOID, catalog_changed, (Datum) 0);
	CacheRegisterSyscacheCallback(AUTHMEMROLEMEM, catalog_changed, (Datum) 0);
	/* its owner is in pg_database_owner */
	CacheRegisterSyscacheCallback(DATABASEOID, catalog_changed, (Datum) 0);
}

Oid
environment_installed(Oid *schema, Oid *owner, char **version)
{
	Relation	relation = table_open(ExtensionRelationId, AccessShareLock);
	ScanKeyData key;
	SysScanDesc scan;
	HeapTuple	tuple;
	Oid			oid = InvalidOid;

	ScanKeyInit(&key, Anum_pg_extension_extname, BTEqualStrategyNumber, F_NAMEEQ,
				CStringGetDatum(EXTENSION_NAME));
	scan = systable_beginscan(relation, ExtensionNameIndexId, true, NULL, 1, &key);
	tuple = systable_getnext(scan);
	if (HeapTupleIsValid(tuple))
	{
		Form_pg_extension extension = (Form_pg_extension) GETSTRUCT(tuple);

		oid = extension->oid;
		if (schema != NULL)
			*schema = extension->extnamespace;
		if (owner != NULL)
			*owner = extension->extowner;
		if (version != NULL)
		{
			bool		isnull;
			Datum		datum = heap_getattr(tuple, Anum_pg_extension_extversion,
											 RelationGetDescr(relation), &isnull);

			*version = isnull ? pstrdup("") : TextDatumGetCString(datum);
		}
	}
	systable_endscan(scan);
	table_close(relation, AccessShareLock);
	return oid;
}

Oid
environment_extension(void)
{
	watch_catalogs();
	if (extension_generation != generation)
	{
		/* noted first, as a change may arrive while we look */
		uint64		at = generation;

		extension_kept = environment_installed(&schema_kept, NULL, NULL);
		extension_generation = at;
	}
	return extension_kept;
}

Oid
environment_schema(void)
{
	if (!OidIsValid(environment_extension()))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("extension \"%s\" is not installed in this database",
						EXTENSION_NAME),
				 errhint("Install it with CREATE EXTENSION %s.", EXTENSION_NAME)));
	return schema_kept;
}


/* ---- servers ---- */

bool
environment_is_ours(Oid fdwid)
{
	static Oid	ours = InvalidOid;
	static uint64 ours_generation = 0;
	uint64		at;
	Oid			extension;

	watch_catalogs();
	if (ours == fdwid && ours_generation == generation)
		return true;
	at = generation;
	extension = get_extension_oid(EXTENSION_NAME, true);
	if (!OidIsValid(extension) ||
		getExtensionOfObject(ForeignDataWrapperRelationId, fdwid) != extension)
		return false;
	ours = fdwid;
	ours_generation = at;
	return true;
}

void
environment_check_usage(Oid serverid, Oid roleid)
{
	char	   *server;
	char	   *role;

	if (compat_server_aclcheck(serverid, roleid, ACL_USAGE) == ACLCHECK_OK)
		return;

	server = GetForeignServer(serverid)->servername;
	role = GetUserNameFromId(roleid, false);
	ereport(ERROR,
			(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
			 errmsg("permission denied for foreign server \"%s\"", server),
			 errdetail("Role \"%s\" lacks USAGE on it.", role),
			 errhint("GRANT USAGE ON FOREIGN SERVER %s TO %s;",
					 quote_identifier(server), quote_identifier(role))));
}

/* environment_lookup, with what else a person could do if there is no server */
static Oid
lookup_server(const char *server, bool check_usage, const char *or_else)
{
	Oid			serverid = get_foreign_server_oid(server, true);

	if (!OidIsValid(serverid))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("server \"%s\" does not exist", server),
				 errhint("Create it with CREATE SERVER %s FOREIGN DATA WRAPPER %s OPTIONS (region 'us')%s.",
						 quote_identifier(server), EXTENSION_NAME, or_else)));
	if (!environment_is_ours(GetForeignServer(serverid)->fdwid))
		ereport(ERROR,
				(errcode(ERRCODE_WRONG_OBJECT_TYPE),
				 errmsg("server \"%s\" is not a Userpilot environment", server),
				 errhint("Only a server of foreign-data wrapper \"%s\" is one.",
						 EXTENSION_NAME)));
	if (check_usage)
		environment_check_usage(serverid, GetUserId());
	return serverid;
}

Oid
environment_lookup(const char *server, bool check_usage)
{
	return lookup_server(server, check_usage, "");
}

static void
read_shape(OptionValues values, Shape *shape)
{
	if (values[OPTION_EXCLUDE_PROPERTIES] != NULL)
		shape->nexcluded = Max(shape_names(values[OPTION_EXCLUDE_PROPERTIES],
										   &shape->excluded), 0);
	shape->flatten = options_word(values, OPTION_NESTED) == 1;
	shape->user_strings = options_word(values, OPTION_USER_VALUES) == 1;
}

EnvironmentRef *
environment_ref(Oid serverid)
{
	ForeignServer *server = GetForeignServer(serverid);
	OptionValues values = {0};
	EnvironmentRef *ref = palloc0(sizeof(EnvironmentRef));

	options_read(server->options, ForeignServerRelationId, values);
	ref->serverid = serverid;
	ref->name = cstring_to_text(server->servername);
	read_shape(values, &ref->shape);
	ref->invalid_is_error = options_word(values, OPTION_ON_INVALID) == 1;
	ref->refresh_after = options_seconds(values, OPTION_REFRESH_AFTER);
	return ref;
}

const EnvironmentRef *
environment_current(void)
{
	static char name_kept[NAMEDATALEN];
	MemoryContext caller;
	uint64		at;
	Oid			serverid;

	watch_catalogs();
	if (current_generation == generation && current_role == GetUserId() &&
		strcmp(name_kept, userpilot_server) == 0)
		return current_ref;

	if (userpilot_server[0] == '\0')
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("no server to send to"),
				 errhint("Name a server in the setting userpilot.server.")));

	/* noted first, as a change may arrive while we look; and nothing is kept,
	 * should memory run out below */
	at = generation;
	current_generation = 0;
	serverid = lookup_server(userpilot_server, true,
							 ", or name another server in the setting userpilot.server");
	if (current_context == NULL)
		current_context = AllocSetContextCreate(TopMemoryContext, "userpilot server",
												ALLOCSET_SMALL_SIZES);
	MemoryContextReset(current_context);
	caller = MemoryContextSwitchTo(current_context);
	current_ref = environment_ref(serverid);
	MemoryContextSwitchTo(caller);
	strlcpy(name_kept, userpilot_server, sizeof(name_kept));
	current_role = GetUserId();
	current_generation = at;
	return current_ref;
}

/* The value that ALTER DATABASE gave a setting, or NULL */
static char *
database_setting(const char *name)
{
	Relation	relation = table_open(DbRoleSettingRelationId, AccessShareLock);
	ScanKeyData key[2];
	SysScanDesc scan;
	HeapTuple	tuple;
	char	   *value = NULL;

	ScanKeyInit(&key[0], Anum_pg_db_role_setting_setdatabase, BTEqualStrategyNumber,
				F_OIDEQ, ObjectIdGetDatum(MyDatabaseId));
	ScanKeyInit(&key[1], Anum_pg_db_role_setting_setrole, BTEqualStrategyNumber,
				F_OIDEQ, ObjectIdGetDatum(InvalidOid));
	scan = systable_beginscan(relation, DbRoleSettingDatidRolidIndexId, true, NULL, 2, key);
	tuple = systable_getnext(scan);
	if (HeapTupleIsValid(tuple))
	{
		bool		isnull;
		Datum		settings = heap_getattr(tuple, Anum_pg_db_role_setting_setconfig,
											RelationGetDescr(relation), &isnull);
		Datum	   *items = NULL;
		int			n = 0;

		if (!isnull)
			deconstruct_array(DatumGetArrayTypeP(settings), TEXTOID, -1, false,
							  TYPALIGN_INT, &items, NULL, &n);
		for (int i = 0; i < n; i++)
		{
			char	   *item = TextDatumGetCString(items[i]);
			size_t		len = strlen(name);

			if (pg_strncasecmp(item, name, len) == 0 && item[len] == '=')
				value = item + len + 1;
		}
	}
	systable_endscan(scan);
	table_close(relation, AccessShareLock);
	return value;
}

char *
environment_default_server(void)
{
	char	   *value = database_setting("userpilot.server");

	return value != NULL ? value : pstrdup(settings_cluster_server());
}

bool
environment_may_use(const char *server, Oid roleid, Oid *serverid, char **why)
{
	*serverid = get_foreign_server_oid(server, true);
	if (!OidIsValid(*serverid))
		*why = psprintf("server \"%s\" does not exist", server);
	else if (!environment_is_ours(GetForeignServer(*serverid)->fdwid))
		*why = psprintf("server \"%s\" is not a Userpilot environment", server);
	else if (compat_server_aclcheck(*serverid, roleid, ACL_USAGE) != ACLCHECK_OK)
		*why = psprintf("role \"%s\" lacks USAGE on foreign server \"%s\"",
						GetUserNameFromId(roleid, true), server);
	else
		return true;
	return false;
}


/* ---- loading ---- */

/* Reads at most size bytes; -1 with errno set if that fails */
static ssize_t
read_all(int fd, char *buf, size_t size)
{
	size_t		len = 0;

	while (len < size)
	{
		ssize_t		n = read(fd, buf + len, size - len);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -1;
		if (n == 0)
			break;
		len += n;
	}
	return len;
}

/*
 * The start of a key file, at most size bytes, into buf; returns how many, or
 * -1 with *problem set.
 */
static ssize_t
read_key_file(const char *path, char *buf, size_t size, char **problem)
{
	struct stat st;
	ssize_t		len = -1;

	/* not blocking, lest a named pipe hold us up */
	int			fd = OpenTransientFile(path, O_RDONLY | O_NONBLOCK | PG_BINARY);

	if (fd < 0)
	{
		*problem = psprintf("could not open api_key_file \"%s\": %m", path);
		return -1;
	}
	if (fstat(fd, &st) != 0)
		*problem = psprintf("could not stat api_key_file \"%s\": %m", path);
	else if (!S_ISREG(st.st_mode))
		*problem = psprintf("api_key_file \"%s\" is not a regular file", path);
	else if ((st.st_mode & S_IROTH) != 0)
		*problem = psprintf("api_key_file \"%s\" is readable by everyone; chmod 600",
							path);
	else if ((len = read_all(fd, buf, size)) < 0)
		*problem = psprintf("could not read api_key_file \"%s\": %m", path);
	CloseTransientFile(fd);
	return len;
}

/* The key in a file, or NULL with *problem and *hint set */
static char *
load_key_file(const char *path, char **problem, const char **hint)
{
	char		buf[MAX_KEY_FILE + 1];
	ssize_t		len;
	const char *wrong;

	*hint = "It must be a file that only the operating-system user running "
		"PostgreSQL can read, holding the API key and nothing else.";
	len = read_key_file(path, buf, sizeof(buf), problem);
	if (len < 0)
		return NULL;
	if (len > MAX_KEY_FILE)
	{
		*problem = psprintf("api_key_file \"%s\" is larger than %d bytes",
							path, MAX_KEY_FILE);
		return NULL;
	}

	while (len > 0 && strchr(" \t\r\n\f\v", buf[len - 1]) != NULL &&
		   buf[len - 1] != '\0')
		len--;
	wrong = options_key_problem(buf, len, hint);
	if (wrong != NULL)
	{
		*problem = psprintf("the key in api_key_file \"%s\" %s", path, wrong);
		return NULL;
	}
	return pnstrdup(buf, len);
}

/* The role of some user mapping of the server, as text, or NULL */
static char *
any_mapped_role(Oid serverid)
{
	Relation	relation = table_open(UserMappingRelationId, AccessShareLock);
	ScanKeyData key;
	SysScanDesc scan;
	HeapTuple	tuple;
	char	   *role = NULL;

	ScanKeyInit(&key, Anum_pg_user_mapping_umserver, BTEqualStrategyNumber,
				F_OIDEQ, ObjectIdGetDatum(serverid));
	scan = systable_beginscan(relation, InvalidOid, false, NULL, 1, &key);
	tuple = systable_getnext(scan);
	if (HeapTupleIsValid(tuple))
		role = GetUserNameFromId(((Form_pg_user_mapping) GETSTRUCT(tuple))->umuser,
								 true);
	systable_endscan(scan);
	table_close(relation, AccessShareLock);
	return role;
}

/* Reads the options of the server's user mapping for PUBLIC; false if there
 * is none */
static bool
read_public_mapping(Oid serverid, OptionValues values)
{
	HeapTuple	tuple;
	Datum		datum;
	bool		isnull;

	tuple = SearchSysCache2(USERMAPPINGUSERSERVER, ObjectIdGetDatum(InvalidOid),
							ObjectIdGetDatum(serverid));
	if (!HeapTupleIsValid(tuple))
		return false;
	datum = SysCacheGetAttr(USERMAPPINGUSERSERVER, tuple,
							Anum_pg_user_mapping_umoptions, &isnull);
	if (!isnull)
		options_read(untransformRelOptions(datum), UserMappingRelationId, values);
	ReleaseSysCache(tuple);
	return true;
}

/* Finds the environment's key, or says in its problem why there is none */
static void
load_key(Environment *env, OptionValues values)
{
	const char *hint = NULL;
	int			sqlstate;

	if (!read_public_mapping(env->serverid, values))
	{
		char	   *role = any_mapped_role(env->serverid);

		env->problem = role == NULL ?
			psprintf("server \"%s\" has no user mapping for PUBLIC", env->server) :
			psprintf("server \"%s\" has no user mapping for PUBLIC; that of role \"%s\" is not read",
					 env->server, role);
		env->problem_hint =
			psprintf("CREATE USER MAPPING FOR PUBLIC SERVER %s OPTIONS (api_key_file '/etc/userpilot.key');",
					 quote_identifier(env->server));
		return;
	}

	env->problem = options_problem(values, UserMappingRelationId, &hint, &sqlstate);
	if (env->problem == NULL)
	{
		if (values[OPTION_API_KEY] != NULL)
			env->target.api_key = values[OPTION_API_KEY];
		else
			env->target.api_key = load_key_file(values[OPTION_API_KEY_FILE],
												&env->problem, &hint);
	}
	if (env->problem != NULL && hint != NULL)
		env->problem_hint = pstrdup(hint);
}

/* Tells applications apart: limits are per application, wherever it is used */
static uint64
fingerprint(const HttpTarget *target)
{
	/* the NUL between them stays in */
	char	   *both = psprintf("%s %s", target->endpoint, target->api_key);
	size_t		len = strlen(both);
	uint64		result;

	both[strlen(target->endpoint)] = '\0';
	result = hash_bytes_extended((unsigned char *) both, len, 0);
	explicit_bzero(both, len);
	pfree(both);
	return result;
}

Environment *
environment_load(Oid serverid)
{
	ForeignServer *server = GetForeignServerExtended(serverid, FSV_MISSING_OK);
	OptionValues values = {0};
	Environment *env;
	const char *hint;
	int			sqlstate;

	if (server == NULL || !environment_is_ours(server->fdwid))
		return NULL;

	options_read(server->options, ForeignServerRelationId, values);
	env = palloc0(sizeof(Environment));
	env->serverid = serverid;
	env->server = server->servername;
	env->requests_per_minute = options_integer(values, OPTION_REQUESTS_PER_MINUTE);
	env->connections = options_integer(values, OPTION_CONNECTIONS);
	env->max_attempts = options_integer(values, OPTION_MAX_ATTEMPTS);
	env->bulk_format = (BulkFormat) options_word(values, OPTION_BULK_FORMAT);
	read_shape(values, &env->shape);
	env->refresh_after = options_seconds(values, OPTION_REFRESH_AFTER);
	env->target.timeout_ms = options_integer(values, OPTION_TIMEOUT) * 1000;

	env->problem = options_problem(values, ForeignServerRelationId, &hint, &sqlstate);
	if (env->problem != NULL)
	{
		if (hint != NULL)
			env->problem_hint = pstrdup(hint);
		return env;
	}
	env->target.endpoint = options_endpoint(values);
	env->target.ca_file = values[OPTION_CA_FILE];
	env->target.proxy = values[OPTION_PROXY];

	load_key(env, values);
	if (env->problem == NULL)
		env->fingerprint = fingerprint(&env->target);
	return env;
}
