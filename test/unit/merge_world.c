/*
 * merge_world.c
 *	  A small database for random histories.
 *
 * It keeps to the rules of the real one that the merge relies on: a row is
 * changed under its lock, a repeatable read never changes what changed behind
 * its back, positions never fall, an own xid is in no snapshot's xip.
 */
#include "postgres_fe.h"

#include "merge_world.h"

int			nentities;
State		source;
int			nrows;
Row			rows[MAX_ROWS];
int			ntxs;
Tx			txs[MAX_TXS];
int			nbatches;
Batch		batches[MAX_BATCHES];

static uint64 rng;
static uint64 lsn;
static uint64 next_xid;
static uint64 last_ended;		/* highest xid of an ended transaction */
static int	ended;
static int	changed_at[ENTITIES];	/* "ended" when its row last changed */

/* splitmix64, after Steele, Lea and Flood */
static uint64
random_bits(void)
{
	uint64		z = (rng += UINT64CONST(0x9E3779B97F4A7C15));

	z = (z ^ (z >> 30)) * UINT64CONST(0xBF58476D1CE4E5B9);
	z = (z ^ (z >> 27)) * UINT64CONST(0x94D049BB133111EB);
	return z ^ (z >> 31);
}

/* From 0 to n - 1 */
int
random_below(int n)
{
	return (int) ((random_bits() >> 32) * (uint64) n >> 32);
}

/* True that often in a hundred */
bool
chance(int percent)
{
	return random_below(100) < percent;
}

/* Few values, so that equal ones meet often */
int
random_value(void)
{
	return 1 + (chance(70) ? random_below(3) : random_below(VALUES - 1));
}

/* An empty database; everything that follows depends on the seed alone */
void
world_begin(uint64 seed)
{
	rng = seed;
	nentities = 1 + (chance(50) ? 0 : random_below(ENTITIES));
	lsn = 1 + random_below(100);
	next_xid = 10 + random_below(100);
	last_ended = next_xid - 1;
	ended = nrows = ntxs = nbatches = 0;
	memset(source, 0, sizeof(source));
	memset(changed_at, 0, sizeof(changed_at));
}

/* A new transaction; NULL if there have been too many */
Tx *
begin_tx(void)
{
	Tx		   *tx;

	if (ntxs == MAX_TXS)
		return NULL;
	tx = &txs[ntxs++];
	memset(tx, 0, sizeof(Tx));
	tx->open = true;
	tx->repeatable = chance(25);
	tx->reading = -1;
	return tx;
}

/* As the first write does */
void
assign_xid(Tx *tx)
{
	if (tx->xid == 0)
		tx->xid = next_xid++;
}

/* A snapshot as the server takes it: its own xid is never in xip */
static void
take_snapshot(Tx *tx)
{
	Snapshot   *s = &tx->snapshot;
	int			i;

	if (tx->repeatable && tx->has_snapshot)
		return;
	tx->has_snapshot = true;
	s->xmax = last_ended + 1;
	s->xmin = s->xmax;
	s->nxip = 0;
	for (i = 0; i < ntxs; i++)
	{
		uint64		xid = txs[i].open ? txs[i].xid : 0;
		int			at = s->nxip;

		if (xid == 0 || xid >= s->xmax)
			continue;
		s->xmin = Min(s->xmin, xid);
		if (&txs[i] == tx)
			continue;
		for (; at > 0 && s->xip[at - 1] > xid; at--)
			s->xip[at] = s->xip[at - 1];
		s->xip[at] = xid;
		s->nxip++;
	}
	s->ended = ended;
	memcpy(s->source, source, sizeof(State));
}

/* An open transaction that is between statements, or NULL */
Tx *
random_tx(bool untriggered)
{
	int			tries;

	for (tries = 0; tries < 8 && ntxs > 0; tries++)
	{
		Tx		   *tx = &txs[random_below(ntxs)];

		if (tx->open && tx->reading < 0 && tx->untriggered == untriggered)
			return tx;
	}
	return NULL;
}

/* Whether a transaction may change a row now: nobody else holds it, and it
 * has not changed behind a repeatable read's back */
static bool
may_change(const Tx *tx, int entity, int key)
{
	int			i;

	for (i = 0; i < ntxs; i++)
	{
		int			k;

		if (!txs[i].open || &txs[i] == tx)
			continue;
		for (k = 0; k < KEYS; k++)
		{
			if (txs[i].own[entity][k] != 0 &&
				(k == UNTRIGGERED) == (key == UNTRIGGERED))
				return false;
		}
	}
	return !tx->repeatable || !tx->has_snapshot ||
		changed_at[entity] <= tx->snapshot.ended;
}

/* What the extension does in the transaction */
static void
queue_row(const Tx *tx, int entity, int batch, const int *value)
{
	Row		   *row;

	if (nrows == MAX_ROWS)
	{
		fprintf(stderr, "a history is too long\n");
		exit(2);
	}
	row = &rows[nrows++];
	row->state = ROW_OPEN;
	row->lsn = lsn;
	row->xid = tx->xid;
	row->entity = entity;
	row->batch = batch;
	memcpy(row->value, value, sizeof(row->value));
}

/* A statement changes a row, whose trigger queues what it changed */
void
change_row(Tx *tx)
{
	int			entity = random_below(nentities);
	int			times = chance(10) ? 2 : 1;

	if (tx == NULL || !may_change(tx, entity, 0))
		return;
	assign_xid(tx);
	if (tx->repeatable)
		take_snapshot(tx);
	while (times-- > 0)			/* at one lsn */
	{
		int			value[KEYS] = {0};
		int			k;

		value[random_below(UNTRIGGERED)] = random_value();
		for (k = 0; k < UNTRIGGERED; k++)
		{
			if (chance(60))
				value[k] = random_value();
			if (value[k] != 0)
				tx->own[entity][k] = value[k];
		}
		queue_row(tx, entity, -1, value);
	}
	lsn++;
}

/* A statement changes what no trigger watches, in a transaction of its own:
 * which of two SELECTs is right would be moot if one saw its own change */
void
change_untriggered(void)
{
	int			entity = random_below(nentities);
	Tx		   *tx = begin_tx();

	if (tx == NULL)
		return;
	tx->untriggered = true;
	tx->repeatable = false;
	if (!may_change(tx, entity, UNTRIGGERED))
	{
		tx->open = false;
		return;
	}
	assign_xid(tx);
	tx->own[entity][UNTRIGGERED] = random_value();
	lsn++;
}

/* Ends a transaction: releases its locks, and what it queued comes or goes */
void
end_tx(Tx *tx, bool commit)
{
	int			e;
	int			k;
	int			i;

	if (tx == NULL)
		return;
	tx->open = false;
	if (tx->xid == 0)
		return;
	ended++;
	last_ended = Max(last_ended, tx->xid);
	lsn++;
	for (e = 0; e < nentities && commit; e++)
	{
		for (k = 0; k < KEYS; k++)
		{
			if (tx->own[e][k] == 0)
				continue;
			source[e][k] = tx->own[e][k];
			if (k != UNTRIGGERED)
				changed_at[e] = ended;
		}
	}
	for (i = 0; i < nrows; i++)
	{
		if (rows[i].xid == tx->xid && rows[i].state == ROW_OPEN)
			rows[i].state = commit ? ROW_QUEUED : ROW_GONE;
	}
	for (i = 0; i < nbatches; i++)
	{
		if (batches[i].merge.xid == tx->xid && commit)
			batches[i].committed = true;
	}
}

/* A bulk SELECT of some columns begins to read */
void
begin_bulk(Tx *tx, bool everything)
{
	Batch	   *batch;
	int			e;
	int			k;

	if (tx == NULL || nbatches == MAX_BATCHES)
		return;
	take_snapshot(tx);
	tx->reading = nbatches;
	batch = &batches[nbatches++];
	memset(batch, 0, sizeof(Batch));
	batch->ended = tx->snapshot.ended;
	memcpy(batch->xip, tx->snapshot.xip, sizeof(batch->xip));
	batch->merge.id = nbatches;
	batch->merge.lsn = lsn;
	batch->merge.xmin = tx->snapshot.xmin;
	batch->merge.xmax = tx->snapshot.xmax;
	batch->merge.nxip = tx->snapshot.nxip;
	batch->merge.xip = batch->xip;
	for (k = 0; k < KEYS; k++)
	{
		if (!everything && chance(20))
			continue;
		for (e = 0; e < nentities; e++)
			batch->read[e][k] = tx->own[e][k] != 0 ? tx->own[e][k] :
				tx->snapshot.source[e][k];
	}
	for (e = 0; e < nentities; e++)
	{
		if (!everything && chance(15))
			memset(batch->read[e], 0, sizeof(batch->read[e]));
	}
}

/* ... and queues what it has read, much later */
void
end_bulk(Tx *tx)
{
	static const int nothing[KEYS];
	Batch	   *batch = &batches[tx->reading];
	int			e;

	assign_xid(tx);
	batch->merge.xid = tx->xid;
	lsn++;						/* the batch itself is written first */
	for (e = 0; e < nentities; e++)
	{
		if (memcmp(batch->read[e], nothing, sizeof(nothing)) == 0)
			continue;
		queue_row(tx, e, tx->reading, batch->read[e]);
		lsn += random_below(2);
	}
	lsn++;
	tx->reading = -1;
}

/* One of the transactions that run a bulk SELECT, or NULL */
Tx *
random_bulk(void)
{
	int			start = ntxs > 0 ? random_below(ntxs) : 0;
	int			i;

	for (i = 0; i < ntxs; i++)
	{
		Tx		   *tx = &txs[(start + i) % ntxs];

		if (tx->open && tx->reading >= 0)
			return tx;
	}
	return NULL;
}
