/*
 * mapping.h
 *	  What the arguments of a trigger say of its table: which column is the
 *	  id, which are properties, and what a row comes to.
 */
#ifndef USERPILOT_MAPPING_H
#define USERPILOT_MAPPING_H

#include "executor/tuptable.h"
#include "fmgr.h"
#include "nodes/pg_list.h"
#include "utils/jsonb.h"
#include "utils/reltrigger.h"

#include "queue.h"

/* How a column's value becomes JSON */
typedef enum MappingConversion
{
	CONVERT_BOOL,
	CONVERT_INTEGER,			/* smallint, integer, bigint */
	CONVERT_FLOAT,
	CONVERT_NUMERIC,
	CONVERT_DATETIME,			/* ISO 8601, timestamptz in UTC */
	CONVERT_TEXT,
	CONVERT_JSON,				/* json, jsonb: objects are spread */
	CONVERT_OUTPUT				/* the rest: as its output function has it */
} MappingConversion;

typedef struct MappingColumn
{
	AttrNumber	attnum;
	char	   *column;
	char	   *property;
	bool		renamed;		/* by AS */
	Oid			type;			/* a domain's base type */
	MappingConversion conversion;
	FmgrInfo	output;			/* of CONVERT_OUTPUT */
} MappingColumn;

typedef struct Mapping
{
	UserpilotKind kind;
	char	   *server;			/* NULL: the database's default */
	AttrNumber	id;				/* 0: there is no such column */
	Oid			id_type;
	char	   *id_column;
	AttrNumber	company;		/* of a user; 0: none */
	Oid			company_type;
	int			ncolumns;
	MappingColumn *columns;
	bool		pins_settings;	/* some output depends on settings */
	bool		pins_names;		/* ... on the search_path, too */
	List	   *problems;		/* char *: what is wrong with the arguments */
} Mapping;

/* The trigger function of a kind */
extern const char *mapping_function(UserpilotKind kind);

/* Whether a trigger runs one of our functions, and of which kind */
extern bool mapping_is_ours(const Trigger *trigger, UserpilotKind *kind);

/*
 * Arguments and table brought together, in CurrentMemoryContext.  What is
 * wrong is told in "problems"; what can be used is there all the same.
 */
extern Mapping *mapping_read(UserpilotKind kind, char **args, int nargs, TupleDesc desc);

/* Whether any column that is sent differs */
extern bool mapping_changed(const Mapping *mapping, TupleTableSlot *before,
							TupleTableSlot *after);

/*
 * What a row comes to: fills all of the change but its server, and returns
 * what makes it one that can never be sent, or NULL; without an id that one is
 * empty.  Keys that a JSON column had before (NULL: not looked at) and has no
 * more become null, so that Userpilot removes them.  Objects in objects are
 * flattened or left out.
 */
extern char *mapping_change(const Mapping *mapping, const Shape *shape,
							TupleTableSlot *before, TupleTableSlot *row,
							QueueChange *change);

#endif
