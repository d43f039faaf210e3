/*
 * row_writer.h
 *	  Rows of the extension's tables, written without a statement: someone
 *	  waits, and a statement takes several times longer, most of all the first.
 *
 * They are written as a subscription's worker writes those of another server:
 * constraints are checked and row triggers fire, but none for UPDATE OF columns.
 */
#ifndef USERPILOT_ROW_WRITER_H
#define USERPILOT_ROW_WRITER_H

#include "executor/executor.h"

#include "sql.h"

typedef struct RowWriter
{
	Relation	rel;
	EState	   *estate;
	ResultRelInfo *rri;
	EPQState	epq;
	TupleTableSlot *row;		/* to be written */
	TupleTableSlot *stored;		/* what is there, for row_update */
} RowWriter;

/* Raises unless the table has exactly these columns */
extern void row_writer_open(RowWriter *writer, const char *table, const SqlColumn *columns, int n);
extern void row_writer_close(RowWriter *writer);

/* The row to be written: all null, then column by column */
extern void row_begin(RowWriter *writer);
extern void row_set(RowWriter *writer, int column, Datum value);

/* ... as it is stored, or null */
extern void row_keep(RowWriter *writer, int column);

extern void row_insert(RowWriter *writer);
extern void row_update(RowWriter *writer);

#endif
