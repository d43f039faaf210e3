/*
 * options.h
 *	  The options of foreign servers and user mappings: which there are, where
 *	  they belong, and what they may hold.
 *
 * One table serves the validator, which refuses bad options at DDL time, and
 * environment_load, which must not trust that the validator has seen them.
 */
#ifndef USERPILOT_OPTIONS_H
#define USERPILOT_OPTIONS_H

#include "nodes/pg_list.h"

typedef enum OptionId
{
	/* of a server */
	OPTION_REGION,
	OPTION_ENDPOINT,
	OPTION_REQUESTS_PER_MINUTE,
	OPTION_BULK_FORMAT,
	OPTION_MAX_ATTEMPTS,
	OPTION_TIMEOUT,
	OPTION_CONNECTIONS,
	OPTION_CA_FILE,
	OPTION_PROXY,
	OPTION_ONLY_ON,
	OPTION_EXCLUDE_PROPERTIES,
	OPTION_NESTED,
	OPTION_USER_VALUES,
	OPTION_ON_INVALID,
	OPTION_REFRESH_AFTER,

	/* of its user mapping */
	OPTION_API_KEY,
	OPTION_API_KEY_FILE
} OptionId;

#define OPTION_COUNT (OPTION_API_KEY_FILE + 1)

/* Values by OptionId; NULL where an option is not given */
typedef const char *OptionValues[OPTION_COUNT];

/* Adds what the list (of DefElem) holds for this catalog; ignores the rest.
 * The strings stay the list's. */
extern void options_read(List *options, Oid catalog, OptionValues values);

/*
 * What is wrong with the values of this catalog, as a phrase, or NULL.  Sets
 * *hint (NULL if there is none) and *sqlstate.  Never holds a credential.
 */
extern char *options_problem(OptionValues values, Oid catalog,
							 const char **hint, int *sqlstate);

/* Raises unless the options (of DefElem), as they will be after the command,
 * are right */
extern void options_validate(List *options, Oid catalog);

/* The value of an integer option, or its default */
extern int	options_integer(OptionValues values, OptionId id);

/* Which of its words an option holds, from 0, or 0 if it is not given */
extern int	options_word(OptionValues values, OptionId id);

/* The value of an interval option, or its default, in seconds */
extern int64 options_seconds(OptionValues values, OptionId id);

/* Base URL of the API, once options_problem has found nothing */
extern const char *options_endpoint(OptionValues values);

/* What is wrong with an API key, as a predicate, or NULL; never quotes it */
extern const char *options_key_problem(const char *key, size_t len,
									   const char **hint);

#endif
