/*
 * profiles_table.h
 *	  userpilot_profiles for those who read it without a statement.
 */
#ifndef USERPILOT_PROFILES_TABLE_H
#define USERPILOT_PROFILES_TABLE_H

#include "access/skey.h"
#include "utils/relcache.h"

#include "profiles.h"
#include "sql.h"

enum
{
	PROFILE_SERVER,
	PROFILE_KIND,
	PROFILE_ENTITY,
	PROFILE_COMPANY,
	PROFILE_METADATA,
	PROFILE_VERSIONS,
	PROFILE_ATTEMPTS,
	PROFILE_SYNCED,
	PROFILE_BELIEVED,
	PROFILE_JOB,
	PROFILE_NCOLUMNS
};

/* Columns of userpilot_profiles_pkey */
enum
{
	PROFILE_KEY_ENTITY,
	PROFILE_KEY_KIND,
	PROFILE_KEY_SERVER,
	PROFILE_NKEYS
};

/* As this library knows them */
extern const SqlColumn profiles_columns[PROFILE_NCOLUMNS];

/* Opens userpilot_profiles_pkey; raises unless it is the key as known */
extern Relation profiles_open_index(Relation rel);

/* One of the index's columns is to be this */
extern void profiles_key(ScanKey keys, int column, text *value);

#endif
