/*
 * sql.h
 *	  Statements of the tables' modules: planned once, kept, parameterised.
 */
#ifndef USERPILOT_SQL_H
#define USERPILOT_SQL_H

#include "executor/spi.h"
#include "utils/relcache.h"

#define SQL_MAX_ARGS 16

/* "@" in the text stands for the extension's schema */
typedef struct SqlStatement
{
	const char *text;
	int			nargs;
	Oid			types[SQL_MAX_ARGS];
	SPIPlanPtr	plan;
	char		schema[NAMEDATALEN];	/* that the plan was made for */
} SqlStatement;

#define SQL_STATEMENT(text, nargs, ...) {(text), (nargs), __VA_ARGS__, NULL, ""}

/* An extension table's Oid by name; raises if it is missing */
extern Oid	sql_relid(const char *name);

/* A table as it is to be typed */
extern char *sql_table_name(Relation rel);

/* A table that is read or written without a statement must be as it is known */
typedef struct SqlColumn
{
	const char *name;
	Oid			type;
} SqlColumn;

/* Raises unless it has exactly these columns */
extern void sql_check_columns(Relation rel, const SqlColumn *columns, int n);

/* Whether one of a table's indexes leads to any row, without a statement; true
 * if there is no such index */
extern bool sql_index_has_rows(const char *table, const char *index);

/* SPI_connect, but the caller's memory context stays: what is read may live
 * longer than SPI does */
extern void sql_connect(void);

/*
 * A procedure's frame: between them sql_commit ends the transaction, and with
 * it snapshot and locks, unless the CALL is part of a larger one (atomic).
 */
extern void sql_begin_call(bool atomic);
extern void sql_commit(void);
extern void sql_end_call(void);

/*
 * Runs it with the active snapshot if read_only, else with a fresh one.
 * nulls may be NULL.  Returns the number of rows processed; rows are in
 * SPI_tuptable.  SPI must be connected.
 */
extern int	sql_execute(SqlStatement *statement, Datum *args, const char *nulls,
						bool read_only);

/*
 * Rows of any query, as the active snapshot shows them, a few hundred in
 * memory at a time; the handler's memory goes after each.
 */
extern void sql_read_rows(const char *query, void (*handler) (HeapTuple tuple, void *arg),
						  void *arg);

/* Who the current user was before sql_become_owner */
typedef struct SqlCaller
{
	Oid			role;
	int			sec_context;
} SqlCaller;

/*
 * Opens SPI as the extension's owner, and back.  The search path stays the
 * caller's, so SQL run in between names everything in full, operators too.
 * An error undoes it as well.
 */
extern void sql_become_owner(SqlCaller *caller);
extern void sql_become_caller(const SqlCaller *caller);

/* Column of the first row, or dflt if there is no row or it is null */
extern int64 sql_int64(int column, int64 dflt);

#endif
