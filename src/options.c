/*
 * options.c
 *	  The options of foreign servers and user mappings, and their validator.
 *
 * Options are checked when they are set, where a person reads the answer,
 * and not hours later by a background process.  What can redirect a
 * connection, change whom it trusts or read a file of the server is for
 * superusers: a server's owner must not be able to have a key he cannot read
 * sent to a host of his choice.
 */
#include "postgres.h"

#include "catalog/pg_foreign_server.h"
#include "catalog/pg_user_mapping.h"
#include "commands/defrem.h"
#include "lib/stringinfo.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "utils/datetime.h"
#include "utils/varlena.h"

#include "http.h"
#include "options.h"
#include "shape.h"
#include "userpilot.h"

#define MAX_KEY_LENGTH 512

/* How far off a misspelt name may be, and how much of a value is shown */
#define MAX_MISSPELLING 4
#define MAX_SHOWN_VALUE 64

typedef enum OptionKind
{
	KIND_WORD,
	KIND_INTEGER,
	KIND_ENDPOINT,
	KIND_PROXY,
	KIND_PATH,
	KIND_TEXT,
	KIND_NAMES,
	KIND_INTERVAL,
	KIND_KEY
} OptionKind;

typedef struct OptionDef
{
	const char *name;
	Oid			catalog;
	OptionKind	kind;
	const char *superuser_only; /* if so, what others can do; else NULL */
	const char *words[4];		/* of KIND_WORD, NULL-terminated */
	int			initial;		/* of numbers and intervals (s), like the next */
	int			min;
	int			max;
} OptionDef;

#define ASK_SUPERUSER "Ask a superuser to run this command."

static const OptionDef option_defs[OPTION_COUNT] = {
	[OPTION_REGION] =
	{"region", ForeignServerRelationId, KIND_WORD, NULL, {"us", "eu"}, 0, 0, 0},
	[OPTION_ENDPOINT] =
	{"endpoint", ForeignServerRelationId, KIND_ENDPOINT,
	"Set option \"region\" instead, or ask a superuser.", {NULL}, 0, 0, 0},
	[OPTION_REQUESTS_PER_MINUTE] =
	{"requests_per_minute", ForeignServerRelationId, KIND_INTEGER, NULL, {NULL},
	USERPILOT_REQUESTS_PER_MINUTE, 1, 1000000},
	[OPTION_BULK_FORMAT] =
	{"bulk_format", ForeignServerRelationId, KIND_WORD, NULL,
	{"auto", "json", "ndjson"}, 0, 0, 0},
	[OPTION_MAX_ATTEMPTS] =
	{"max_attempts", ForeignServerRelationId, KIND_INTEGER, NULL, {NULL},
	10, 1, 1000},
	[OPTION_TIMEOUT] =
	{"timeout", ForeignServerRelationId, KIND_INTEGER, NULL, {NULL},
	30, 1, 600},
	[OPTION_CONNECTIONS] =
	{"connections", ForeignServerRelationId, KIND_INTEGER, NULL, {NULL},
	16, 1, 100},
	[OPTION_CA_FILE] =
	{"ca_file", ForeignServerRelationId, KIND_PATH, ASK_SUPERUSER, {NULL},
	0, 0, 0},
	[OPTION_PROXY] =
	{"proxy", ForeignServerRelationId, KIND_PROXY, ASK_SUPERUSER, {NULL},
	0, 0, 0},
	[OPTION_ONLY_ON] =
	{"only_on", ForeignServerRelationId, KIND_TEXT, NULL, {NULL}, 0, 0, 0},
	[OPTION_EXCLUDE_PROPERTIES] =
	{"exclude_properties", ForeignServerRelationId, KIND_NAMES, NULL, {NULL},
	0, 0, 0},
	[OPTION_NESTED] =
	{"nested", ForeignServerRelationId, KIND_WORD, NULL, {"error", "flatten"},
	0, 0, 0},
	[OPTION_USER_VALUES] =
	{"user_values", ForeignServerRelationId, KIND_WORD, NULL,
	{"primitives", "strings"}, 0, 0, 0},
	[OPTION_ON_INVALID] =
	{"on_invalid", ForeignServerRelationId, KIND_WORD, NULL,
	{"dead_letter", "error"}, 0, 0, 0},
	[OPTION_REFRESH_AFTER] =
	{"refresh_after", ForeignServerRelationId, KIND_INTERVAL, NULL, {NULL},
	30 * SECS_PER_DAY, 60, PG_INT32_MAX},
	[OPTION_API_KEY] =
	{"api_key", UserMappingRelationId, KIND_KEY, NULL, {NULL}, 0, 0, 0},
	[OPTION_API_KEY_FILE] =
	{"api_key_file", UserMappingRelationId, KIND_PATH,
	"Set option \"api_key\" instead, or ask a superuser.", {NULL}, 0, 0, 0}
};

/* In the order of the words of "region" */
static const char *const region_endpoints[] = {
	"https://analytex.userpilot.io",
	"https://analytex-eu.userpilot.io"
};

/* Of each of these pairs exactly one is to be given */
typedef struct OptionPair
{
	OptionId	one;
	OptionId	other;
	const char *hint_none;
	const char *hint_both;
} OptionPair;

static const OptionPair option_pairs[] = {
	{OPTION_REGION, OPTION_ENDPOINT,
		"Say where your Userpilot data lives: OPTIONS (region 'us') or "
		"OPTIONS (region 'eu').",
	"One command can replace one by the other: "
	"ALTER SERVER ... OPTIONS (DROP region, ADD endpoint '...')."},
	{OPTION_API_KEY, OPTION_API_KEY_FILE,
		"Give the key as OPTIONS (api_key_file '/etc/userpilot.key') or, "
		"for trials, as OPTIONS (api_key '...').",
	"One command can replace one by the other: ALTER USER MAPPING FOR PUBLIC "
	"SERVER ... OPTIONS (DROP api_key, ADD api_key_file '...')."}
};

/* The option of this name, or NULL */
static const OptionDef *
find_option(const char *name)
{
	for (int id = 0; id < OPTION_COUNT; id++)
	{
		if (strcmp(option_defs[id].name, name) == 0)
			return &option_defs[id];
	}
	return NULL;
}

void
options_read(List *options, Oid catalog, OptionValues values)
{
	ListCell   *cell;

	foreach(cell, options)
	{
		DefElem    *def = (DefElem *) lfirst(cell);
		const OptionDef *option = find_option(def->defname);

		if (option != NULL && option->catalog == catalog)
			values[option - option_defs] = defGetString(def);
	}
}

/* The value of an integer option; false if it is none within its range */
static bool
parse_integer(const OptionDef *option, const char *value, int *result)
{
	long		number;

	/* longer than any number in range: keeps strtol from overflowing */
	if (value[0] == '\0' || strspn(value, "0123456789") != strlen(value) ||
		strlen(value) > 9)
		return false;
	number = strtol(value, NULL, 10);
	if (number < option->min || number > option->max)
		return false;
	*result = (int) number;
	return true;
}

int
options_integer(OptionValues values, OptionId id)
{
	int			result = option_defs[id].initial;

	if (values[id] != NULL)
		(void) parse_integer(&option_defs[id], values[id], &result);
	return result;
}

/* The value of an interval option in seconds; false if it is none in range */
static bool
parse_interval(const OptionDef *option, const char *value, int64 *result)
{
	char		buf[256];
	char	   *field[MAXDATEFIELDS];
	int			ftype[MAXDATEFIELDS];
	int			nf;
	int			dtype;
	struct pg_itm_in itm;
	double		seconds;

	if (ParseDateTime(value, buf, sizeof(buf), field, ftype, MAXDATEFIELDS, &nf) != 0 ||
		DecodeInterval(field, ftype, nf, INTERVAL_FULL_RANGE, &dtype, &itm) != 0 ||
		dtype != DTK_DELTA)
		return false;
	seconds = itm.tm_usec / 1000000.0 + SECS_PER_DAY *
		(itm.tm_mday + DAYS_PER_MONTH * (itm.tm_mon + MONTHS_PER_YEAR * (double) itm.tm_year));
	if (seconds < option->min || seconds > option->max)
		return false;
	*result = (int64) seconds;
	return true;
}

int64
options_seconds(OptionValues values, OptionId id)
{
	int64		result = option_defs[id].initial;

	if (values[id] != NULL)
		(void) parse_interval(&option_defs[id], values[id], &result);
	return result;
}

/* Which of the option's words the value is, or -1 */
static int
find_word(const OptionDef *option, const char *value)
{
	for (int i = 0; option->words[i] != NULL; i++)
	{
		if (strcmp(option->words[i], value) == 0)
			return i;
	}
	return -1;
}

int
options_word(OptionValues values, OptionId id)
{
	if (values[id] == NULL)
		return 0;
	return Max(find_word(&option_defs[id], values[id]), 0);
}

const char *
options_endpoint(OptionValues values)
{
	const char *problem;

	if (values[OPTION_ENDPOINT] != NULL)
		return http_check_endpoint(values[OPTION_ENDPOINT], &problem);
	return region_endpoints[options_word(values, OPTION_REGION)];
}

const char *
options_key_problem(const char *key, size_t len, const char **hint)
{
	*hint = "The API key is shown in Userpilot's environment settings, "
		"https://run.userpilot.io/environment.";

	if (len == 0)
		return "is empty";
	if (len > MAX_KEY_LENGTH)
		return psprintf("is longer than %d characters", MAX_KEY_LENGTH);
	for (size_t i = 0; i < len; i++)
	{
		if ((unsigned char) key[i] <= 0x20 || (unsigned char) key[i] >= 0x7f)
		{
			*hint = "Give the key alone, without \"Token\", quotes or spaces.";
			return "holds a space or a character outside printable ASCII";
		}
	}
	if (pg_strncasecmp(key, "NX-", 3) == 0)
		return "is an App Token, which is for browsers, not an API key";
	return NULL;
}

/*
 * What is wrong with the URL of a proxy, or NULL.  Credentials are refused,
 * as everyone may read a server's options.
 */
static const char *
proxy_problem(const char *url, const char **hint)
{
	static const char *const schemes[] = {
		"http://", "https://", "socks5://", "socks5h://"
	};
	const char *host = NULL;
	const char *port;
	size_t		len;

	*hint = "Write it as http://host:port, https://host:port or socks5://host:port.";
	for (int i = 0; i < (int) lengthof(schemes); i++)
	{
		if (pg_strncasecmp(url, schemes[i], strlen(schemes[i])) == 0)
			host = url + strlen(schemes[i]);
	}
	if (host == NULL)
		return "is not an http, https or socks5 URL";
	if (strchr(host, '@') != NULL)
	{
		*hint = "Everyone may read a server's options. Let the proxy recognize the database server by its address.";
		return "must not hold a user or password";
	}

	len = host[0] == '[' ? strspn(host + 1, "0123456789abcdefABCDEF:.") + 1 :
		strspn(host, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_");
	if (host[0] == '[' && (len == 1 || host[len++] != ']'))
		return "has no valid host";
	if (len == 0)
		return "has no valid host";

	port = host + len;
	if (*port == ':')
	{
		len = strspn(++port, "0123456789");
		if (len == 0 || len > 5 || atoi(port) < 1 || atoi(port) > 65535)
			return "has no valid port";
		port += len;
	}
	if (strcmp(port, "") != 0 && strcmp(port, "/") != 0)
		return "must end after host and port";
	return NULL;
}

/* "takes ..., not "value"", clipped as a value can be of any length */
static char *
wrong_value(const char *takes, const char *value)
{
	int			len = pg_mbcliplen(value, strlen(value), MAX_SHOWN_VALUE);

	return psprintf("takes %s, not \"%.*s%s\"", takes, len, value,
					value[len] == '\0' ? "" : "...");
}

/* "auto, json or ndjson" */
static char *
list_words(const OptionDef *option)
{
	StringInfoData buf;

	initStringInfo(&buf);
	for (int i = 0; option->words[i] != NULL; i++)
	{
		if (i > 0)
			appendStringInfoString(&buf, option->words[i + 1] ? ", " : " or ");
		appendStringInfoString(&buf, option->words[i]);
	}
	return buf.data;
}

/* What is wrong with a value that is a path, or NULL */
static const char *
path_problem(const char *path, const char **hint)
{
	*hint = "The path is that of a file on the database server.";
	if (!is_absolute_path(path))
		return "takes an absolute path";
	if (strlen(path) >= MAXPGPATH)
		return "holds too long a path";
	return NULL;
}

/* What is wrong with an option's value, as a predicate, or NULL */
static const char *
value_problem(const OptionDef *option, const char *value, const char **hint)
{
	const char *problem;
	char	  **names;
	int64		seconds;
	int			number;

	*hint = NULL;

	/* the key's own check says more */
	for (const char *c = value; *c != '\0' && option->kind != KIND_KEY; c++)
	{
		if ((unsigned char) *c < 0x20 || *c == 0x7f)
			return "holds a control character";
	}

	switch (option->kind)
	{
		case KIND_WORD:
			if (find_word(option, value) < 0)
				return wrong_value(list_words(option), value);
			return NULL;
		case KIND_INTEGER:
			if (!parse_integer(option, value, &number))
				return wrong_value(psprintf("an integer from %d to %d",
											option->min, option->max), value);
			return NULL;
		case KIND_ENDPOINT:
			if (http_check_endpoint(value, &problem) != NULL)
				return NULL;
			*hint = "Give the base URL of your environment, "
				"such as https://analytex.userpilot.io.";
			return psprintf("is refused: %s", problem);
		case KIND_PROXY:
			return proxy_problem(value, hint);
		case KIND_PATH:
			return path_problem(value, hint);
		case KIND_TEXT:
			if (value[0] != '\0')
				return NULL;
			*hint = "Leave the option out instead.";
			return "is empty";
		case KIND_NAMES:
			if (shape_names(value, &names) >= 0)
				return NULL;
			*hint = "Write names of properties, separated by commas: 'email, phone'.";
			return "holds an empty name";
		case KIND_INTERVAL:
			if (!parse_interval(option, value, &seconds))
				return wrong_value("an interval of a minute or more, such as '30 days'", value);
			return NULL;
		case KIND_KEY:
			return options_key_problem(value, strlen(value), hint);
	}
	return NULL;				/* keep compiler quiet */
}

char *
options_problem(OptionValues values, Oid catalog,
				const char **hint, int *sqlstate)
{
	*sqlstate = ERRCODE_INVALID_PARAMETER_VALUE;
	for (int id = 0; id < OPTION_COUNT; id++)
	{
		const OptionDef *option = &option_defs[id];
		const char *problem;

		if (values[id] == NULL || option->catalog != catalog)
			continue;
		problem = value_problem(option, values[id], hint);
		if (problem != NULL)
			return psprintf("option \"%s\" %s", option->name, problem);
	}

	for (int i = 0; i < (int) lengthof(option_pairs); i++)
	{
		const OptionPair *pair = &option_pairs[i];
		const char *one = option_defs[pair->one].name;
		const char *other = option_defs[pair->other].name;

		if (option_defs[pair->one].catalog != catalog ||
			(values[pair->one] == NULL) != (values[pair->other] == NULL))
			continue;
		if (values[pair->one] != NULL)
		{
			*hint = pair->hint_both;
			return psprintf("options \"%s\" and \"%s\" exclude each other",
							one, other);
		}
		*sqlstate = ERRCODE_FDW_DYNAMIC_PARAMETER_VALUE_NEEDED;
		*hint = pair->hint_none;
		return psprintf("option \"%s\" or \"%s\" is required", one, other);
	}
	*hint = NULL;
	return NULL;
}

/*
 * The option whose name is nearest to the given one, of this catalog or, if
 * none of its own is near, of the other; NULL if none is near at all.
 */
static const OptionDef *
closest_option(const char *name, Oid catalog)
{
	const OptionDef *closest = NULL;
	int			len = strlen(name);
	int			best = Min(MAX_MISSPELLING, len / 2);

	/* longer than any identifier: the distance would be costly */
	if (len >= NAMEDATALEN)
		return NULL;

	for (int id = 0; id < OPTION_COUNT; id++)
	{
		const OptionDef *option = &option_defs[id];
		int			distance;

		distance = varstr_levenshtein_less_equal(name, len, option->name,
												 strlen(option->name),
												 1, 1, 1, best, true);
		if (distance < best ||
			(distance == best && (closest == NULL ||
								  (closest->catalog != catalog &&
								   option->catalog == catalog))))
		{
			best = distance;
			closest = option;
		}
	}
	return closest;
}

/* Raises for a name that no option has.  "secret": keep the statement out of
 * the log. */
static void
unknown_option(const char *name, Oid catalog, bool secret)
{
	const OptionDef *closest = closest_option(name, catalog);
	StringInfoData valid;

	if (closest != NULL && closest->kind == KIND_KEY)
		secret = true;

	initStringInfo(&valid);
	for (int id = 0; id < OPTION_COUNT; id++)
	{
		if (option_defs[id].catalog == catalog)
			appendStringInfo(&valid, "%s%s", valid.len > 0 ? ", " : "",
							 option_defs[id].name);
	}

	ereport(ERROR,
			(errcode(ERRCODE_FDW_INVALID_OPTION_NAME),
			 errmsg("invalid option \"%s\"", name),
			 valid.len == 0 ?
			 errhint("Options belong to a server or to its user mapping.") :
			 closest == NULL ?
			 errhint("Valid options here are: %s.", valid.data) :
			 errhint("Perhaps you meant the option \"%s\"%s.", closest->name,
					 closest->catalog == catalog ? "" :
					 closest->catalog == UserMappingRelationId ?
					 " of the user mapping" : " of the server"),
			 errhidestmt(secret),
			 errhidecontext(secret)));
}

/* Raises for an option that belongs to another kind of object */
static void
misplaced_option(const OptionDef *option, bool secret)
{
	bool		of_server = option->catalog == ForeignServerRelationId;

	ereport(ERROR,
			(errcode(ERRCODE_FDW_INVALID_OPTION_NAME),
			 errmsg("option \"%s\" belongs to the %s", option->name,
					of_server ? "server" : "user mapping"),
			 of_server ?
			 errhint("ALTER SERVER ... OPTIONS (ADD %s '...')", option->name) :
			 errhint("CREATE USER MAPPING FOR PUBLIC SERVER ... OPTIONS (%s '...')",
					 option->name),
			 errhidestmt(secret),
			 errhidecontext(secret)));
}

/* Raises unless an option of this name may be set here by the current user */
static void
check_option_name(const char *name, Oid catalog, bool secret)
{
	const OptionDef *option = find_option(name);

	if (option == NULL)
		unknown_option(name, catalog, secret);
	else if (option->catalog != catalog)
		misplaced_option(option, secret);
	else if (option->superuser_only != NULL && !superuser())
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("permission denied to set option \"%s\"", name),
				 errdetail("Only a superuser may set what redirects a connection, decides whom it trusts or reads a file of the database server, or alter the options of what has it set."),
				 errhint("%s", option->superuser_only),
				 errhidestmt(secret),
				 errhidecontext(secret)));
}

/* When a statement that may hold a key fails here, the log leaves it out */
void
options_validate(List *options, Oid catalog)
{
	OptionValues values = {0};
	bool		secret = catalog == UserMappingRelationId;
	char	   *problem;
	const char *hint;
	int			sqlstate;
	ListCell   *cell;

	foreach(cell, options)
	{
		if (strcmp(((DefElem *) lfirst(cell))->defname,
				   option_defs[OPTION_API_KEY].name) == 0)
			secret = true;
	}
	foreach(cell, options)
		check_option_name(((DefElem *) lfirst(cell))->defname, catalog, secret);

	options_read(options, catalog, values);
	problem = options_problem(values, catalog, &hint, &sqlstate);
	if (problem != NULL)
		ereport(ERROR,
				(errcode(sqlstate),
				 errmsg("%s", problem),
				 hint != NULL ? errhint("%s", hint) : 0,
				 errhidestmt(secret),
				 errhidecontext(secret)));
}
