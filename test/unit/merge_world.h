/*
 * merge_world.h
 *	  A small database for random histories: transactions, row locks,
 *	  snapshots, bulk SELECTs, and the queue they write.
 */
#ifndef USERPILOT_MERGE_WORLD_H
#define USERPILOT_MERGE_WORLD_H

#include "merge.h"

#define ENTITIES 3
#define KEYS 4
#define VALUES 6				/* 0: none, 1: null */
#define UNTRIGGERED 3			/* the key that only bulk SELECTs carry */
#define MAX_ROWS 400
#define MAX_TXS 100
#define MAX_BATCHES 64

typedef int State[ENTITIES][KEYS];

typedef enum RowState
{
	ROW_OPEN,					/* its transaction runs */
	ROW_QUEUED,
	ROW_DEAD,
	ROW_GONE
} RowState;

typedef struct Row
{
	RowState	state;
	uint64		lsn;
	uint64		xid;
	int			entity;
	int			batch;			/* -1: direct */
	int			value[KEYS];	/* 0: not carried */
} Row;

typedef struct Snapshot
{
	uint64		xmin;
	uint64		xmax;
	int			nxip;
	uint64		xip[MAX_TXS];
	int			ended;			/* transactions ended before, to order by */
	State		source;			/* what it sees */
} Snapshot;

typedef struct Tx
{
	bool		open;
	uint64		xid;			/* 0: none yet */
	bool		untriggered;	/* changes only what no trigger watches */
	bool		repeatable;		/* keeps its first snapshot */
	bool		has_snapshot;
	Snapshot	snapshot;
	int			reading;		/* the bulk SELECT it runs, or -1 */
	State		own;			/* its changes; 0: none */
} Tx;

typedef struct Batch
{
	MergeBatch	merge;
	bool		committed;
	int			ended;			/* of its snapshot */
	uint64		xip[MAX_TXS];
	State		read;			/* 0: not selected */
} Batch;

/* The history that runs */
extern int	nentities;
extern State source;
extern int	nrows;
extern Row	rows[MAX_ROWS];
extern int	ntxs;
extern Tx	txs[MAX_TXS];
extern int	nbatches;
extern Batch batches[MAX_BATCHES];

extern int	random_below(int n);
extern bool chance(int percent);
extern int	random_value(void);

extern void world_begin(uint64 seed);
extern Tx  *begin_tx(void);
extern void assign_xid(Tx *tx);
extern Tx  *random_tx(bool untriggered);
extern void change_row(Tx *tx);
extern void change_untriggered(void);
extern void end_tx(Tx *tx, bool commit);
extern void begin_bulk(Tx *tx, bool everything);
extern void end_bulk(Tx *tx);
extern Tx  *random_bulk(void);

#endif
