/*
 * merge_histories.c
 *	  Runs merge.c over random histories and asks whether Userpilot ends up
 *	  with what the source tables hold.
 *
 *	  merge_histories [histories] [seed] [--no-mark | --by-lsn | --forget-dead]
 *
 * A history is a small database and a small API.  Transactions change rows
 * under row locks and queue the changes at their WAL position; bulk SELECTs
 * read by a snapshot, of their statement or of a repeatable read transaction,
 * and queue what they read much later, with changes of their own before and
 * after.  Calls and jobs get lost before or after the API applied them, jobs
 * fail half way or end short, workers crash, records are refused into the
 * dead letters and retried.  When all is drained, every property with a
 * trigger must be what the source says, and the one without must be what the
 * bulk SELECT that read last has read.
 *
 * The switches turn one guard off each, to show that this test would notice.
 */
#include "postgres_fe.h"

#include "merge_cases.h"
#include "merge_world.h"

#define ENTITY_ROWS 200

/* A user's company is a key like any other */
static const char *const key_names[KEYS] = {
	"a", "monthly_spend", MERGE_COMPANY_KEY, "z"
};

/* Values by number; 0 is none.  Some differ in type alone. */
static const MergeValue values[VALUES] = {
	{MERGE_NULL, 0, NULL},		/* not used */
	{MERGE_NULL, 0, NULL},
	{MERGE_NUMBER, 1, "1"},
	{MERGE_STRING, 1, "1"},
	{MERGE_NUMBER, 3, "2.5"},
	{MERGE_TRUE, 0, NULL}
};

#define IS_NULL(v) ((v) <= 1)	/* removing and never setting look the same */

typedef struct Known
{
	int			value;			/* 0: unknown */
	MergeVersion version;
} Known;

/* A body on its way: one entity, in a call of its own or in a job */
typedef struct Flight
{
	bool		active;
	MergeEntity *merge;
	MergeBatch	list[MAX_BATCHES];
	MergeBatches set;
	int			nrows;
	Row		   *rows[ENTITY_ROWS];
	int			body[KEYS];		/* 0: not sent */
} Flight;

typedef enum Outcome
{
	OK,
	LOST,						/* or failed, or short: applied or not */
	REFUSED						/* into the dead letters */
} Outcome;

static bool no_mark;
static bool by_lsn;
static bool forget_dead;

static State api;
static Known profile[ENTITIES][KEYS];
static bool in_job;
static Flight job[ENTITIES];
static bool sent_twice;

/* Which of our values this is */
static int
value_number(const MergeValue *value)
{
	int			v;

	for (v = 1; v < VALUES; v++)
	{
		if (values[v].type == value->type && values[v].len == value->len &&
			(value->len == 0 || memcmp(values[v].data, value->data, value->len) == 0))
			return v;
	}
	abort();
}

/* Which of our keys this is */
static int
key_number(const MergeKey *key)
{
	int			k = 0;

	while (strcmp(key_names[k], key->name) != 0)
		k++;
	return k;
}

/* Tells the merge what the profile holds */
static void
fold_profile(MergeEntity *merge, int entity)
{
	int			k;

	for (k = 0; k < KEYS; k++)
	{
		Known	   *known = &profile[entity][k];

		if (known->value != 0 || known->version.lsn != 0 || known->version.order != 0)
			merge_profile(merge, key_names[k], strlen(key_names[k]),
						  &known->version,
						  known->value != 0 ? &values[known->value] : NULL);
	}
}

/* ... and keeps what it holds now */
static void
store_profile(const MergeEntity *merge, int entity)
{
	int			i;

	for (i = 0; i < merge->nkeys; i++)
	{
		const MergeKey *key = &merge->keys[i];
		Known	   *known = &profile[entity][key_number(key)];

		if (no_mark)
			known->version = key->after;
		else
			known->version = key->version;
		known->value = key->known ? value_number(&key->value) : 0;
	}
}

/* By lsn alone, every row is a direct change */
static void
fold_row(Flight *flight, const Row *row)
{
	MergeProperty props[KEYS];
	const MergeBatch *batch = NULL;
	int			nprops = 0;
	int			k;

	for (k = 0; k < KEYS; k++)
	{
		if (row->value[k] == 0)
			continue;
		props[nprops].name = key_names[k];
		props[nprops].namelen = strlen(key_names[k]);
		props[nprops++].value = values[row->value[k]];
	}
	if (row->batch >= 0 && !by_lsn)
		batch = merge_batches_find(&flight->set, row->batch + 1);
	merge_change(flight->merge, row->lsn, row->xid, batch, props, nprops);
}

/* Any order will do, but that rows of one lsn stay in theirs */
static void
shuffle(Row **list, int n)
{
	int			i;

	for (i = n - 1; i > 0; i--)
	{
		int			j = random_below(i + 1);
		Row		   *row = list[i];

		list[i] = list[j];
		list[j] = row;
	}
	for (i = 0; i < n; i++)
	{
		int			j;

		for (j = i + 1; j < n; j++)
		{
			if (list[i]->lsn == list[j]->lsn && list[i] > list[j])
			{
				Row		   *row = list[i];

				list[i] = list[j];
				list[j] = row;
			}
		}
	}
}

/* Merges the rows chosen for an entity and marks; returns whether there is
 * anything to send */
static bool
prepare(Flight *flight, int entity)
{
	int			n = 0;
	int			late = random_below(flight->nrows + 1);
	int			nsend;
	int			i;

	for (i = 0; i < nbatches; i++)
	{
		if (batches[i].committed)
			flight->list[n++] = batches[i].merge;
	}
	merge_batches_init(&flight->set, flight->list, n);
	flight->merge = merge_begin(&flight->set);
	flight->active = true;
	shuffle(flight->rows, flight->nrows);
	for (i = 0; i < flight->nrows; i++)
	{
		if (i == late || (i == 0 && chance(80)))
			fold_profile(flight->merge, entity);
		if (chance(5))
			merge_finish(flight->merge);
		fold_row(flight, flight->rows[i]);
	}
	fold_profile(flight->merge, entity);
	nsend = merge_finish(flight->merge);

	memset(flight->body, 0, sizeof(flight->body));
	for (i = 0; i < flight->merge->nkeys; i++)
	{
		const MergeKey *key = &flight->merge->keys[i];

		if (key->send)
			flight->body[key_number(key)] = value_number(&key->sending);
	}
	if (!no_mark)
		merge_mark(flight->merge);
	store_profile(flight->merge, entity);
	return nsend > 0;
}

/* The answer, or what one believes instead */
static void
finish(Flight *flight, int entity, Outcome outcome, bool applied)
{
	int			k;
	int			i;

	for (k = 0; k < KEYS && applied; k++)
	{
		if (flight->body[k] != 0)
			api[entity][k] = flight->body[k];
	}
	if (outcome == OK)
	{
		merge_learn(flight->merge);
		store_profile(flight->merge, entity);
		if (!no_mark && merge_finish(flight->merge) != 0)
			sent_twice = true;
	}
	for (i = 0; i < flight->nrows; i++)
	{
		if (outcome == OK)
			flight->rows[i]->state = ROW_GONE;
		else if (outcome == REFUSED)
			flight->rows[i]->state = forget_dead ? ROW_GONE : ROW_DEAD;
	}
	merge_free(flight->merge);
	merge_batches_free(&flight->set);
	flight->active = false;
}

/* Collects an entity's visible rows: all, or some of the direct ones.  Rows
 * of one lsn are neighbours and stay together. */
static void
collect(Flight *flight, int entity, bool all)
{
	bool		take = true;
	int			i;

	flight->nrows = 0;
	for (i = 0; i < nrows && flight->nrows < ENTITY_ROWS; i++)
	{
		if (rows[i].entity != entity || rows[i].state != ROW_QUEUED ||
			(!all && rows[i].batch >= 0))
			continue;
		if (!all && (i == 0 || rows[i - 1].lsn != rows[i].lsn))
			take = chance(80);
		if (take)
			flight->rows[flight->nrows++] = &rows[i];
	}
}

/* One call for one entity */
static void
realtime(int entity, bool kind)
{
	static Flight flight;
	Outcome		outcome;

	if (job[entity].active)
		return;
	collect(&flight, entity, false);
	if (flight.nrows == 0)
		return;
	outcome = kind || chance(50) ? OK : chance(66) ? LOST : REFUSED;
	if (!prepare(&flight, entity))
		outcome = OK;
	finish(&flight, entity, outcome,
		   outcome == OK || (outcome == LOST && chance(50)));
}

/* A job of some entities, each with all of its visible rows */
static void
start_job(bool kind)
{
	int			e;

	for (e = 0; e < nentities && !in_job; e++)
	{
		collect(&job[e], e, true);
		if (job[e].nrows > 0 && (kind || chance(80)))
			prepare(&job[e], e);
	}
	for (e = 0; e < nentities; e++)
		in_job = in_job || job[e].active;
}

/* Completed; or failed, short or unknown, half of it applied; or dissolved
 * into calls, each with its own answer */
static void
end_job(bool kind)
{
	bool		ok = kind || chance(40);
	bool		dissolved = chance(30);
	int			e;

	for (e = 0; e < nentities; e++)
	{
		Outcome		outcome = ok ? OK : LOST;

		if (!job[e].active)
			continue;
		if (!ok && dissolved)
			outcome = chance(50) ? OK : REFUSED;
		finish(&job[e], e, outcome,
			   outcome == OK || (outcome == LOST && chance(50)));
	}
	in_job = false;
}

/* Puts a dead letter, with what was queued at its lsn, back into the queue */
static void
retry_dead(const Row *letter)
{
	int			i;

	for (i = 0; i < nrows; i++)
	{
		if (rows[i].state == ROW_DEAD && rows[i].lsn == letter->lsn &&
			rows[i].entity == letter->entity && &rows[i] != letter)
			rows[i].state = ROW_QUEUED;
	}
	rows[letter - rows].state = ROW_QUEUED;
}

/* One thing happens somewhere */
static void
step(void)
{
	int			r = random_below(100);
	Tx		   *tx;

	if (r < 25)
	{
		if (chance(20))
		{
			tx = begin_tx();	/* gets an xid early, works elsewhere first */
			if (tx != NULL)
				assign_xid(tx);
		}
		tx = chance(70) ? random_tx(false) : NULL;
		change_row(tx != NULL ? tx : begin_tx());
	}
	else if (r < 43)
		end_tx(random_tx(chance(25)), chance(80));
	else if (r < 50)
	{
		tx = chance(40) ? random_tx(false) : NULL;
		begin_bulk(tx != NULL ? tx : begin_tx(), false);
	}
	else if (r < 57)
	{
		tx = random_bulk();
		if (tx != NULL)
		{
			end_bulk(tx);
			if (chance(70))
				end_tx(tx, chance(90));
		}
	}
	else if (r < 63)
		change_untriggered();
	else if (r < 78)
		realtime(random_below(nentities), false);
	else if (r < 86)
		start_job(false);
	else if (r < 94)
	{
		if (in_job)
			end_job(false);
	}
	else if (nrows > 0)
	{
		const Row  *row = &rows[random_below(nrows)];

		if (row->state == ROW_DEAD)
			retry_dead(row);
	}
}

/* Whether nothing is left to deliver */
static bool
drained(void)
{
	int			i;

	for (i = 0; i < nrows; i++)
	{
		if (rows[i].state != ROW_GONE)
			return false;
	}
	return true;
}

/* All transactions end, dead letters are retried, the API is kind */
static void
drain(void)
{
	Tx		   *tx;
	int			i;

	while ((tx = random_bulk()) != NULL)
		end_bulk(tx);
	for (i = 0; i < ntxs; i++)
	{
		if (txs[i].open)
			end_tx(&txs[i], true);
	}
	if (chance(30) && (tx = begin_tx()) != NULL)
	{
		begin_bulk(tx, true);
		if (tx->reading >= 0)
			end_bulk(tx);
		end_tx(tx, true);
	}
	for (i = 0; i < 20; i++)
	{
		if (chance(30))
			start_job(false);
		if (in_job && chance(50))
			end_job(i > 10);
		realtime(random_below(nentities), i > 10);
	}
	for (i = 0; i < nrows; i++)
	{
		if (rows[i].state == ROW_DEAD)
			rows[i].state = ROW_QUEUED;
	}
	for (i = 0; i < 50 && !drained(); i++)
	{
		if (chance(50))
			realtime(random_below(nentities), true);
		start_job(true);
		if (in_job)
			end_job(true);
	}
}

/* What the committed bulk SELECT that read last has read; 0: none did */
static int
last_read(int entity, int key)
{
	const Batch *last = NULL;
	int			i;

	for (i = 0; i < nbatches; i++)
	{
		const Batch *b = &batches[i];

		if (!b->committed || b->read[entity][key] == 0)
			continue;
		if (last == NULL || b->ended > last->ended ||
			(b->ended == last->ended && b->merge.lsn >= last->merge.lsn))
			last = b;
	}
	return last != NULL ? last->read[entity][key] : 0;
}

/* Whether two values look the same at Userpilot */
static bool
same(int a, int b)
{
	return a == b || (IS_NULL(a) && IS_NULL(b));
}

/* Runs a history; returns whether it ends as it must */
static bool
history(uint64 seed)
{
	bool		right;
	int			steps;
	int			e;
	int			k;

	world_begin(seed);
	in_job = sent_twice = false;
	memset(api, 0, sizeof(api));
	memset(profile, 0, sizeof(profile));

	for (steps = 10 + random_below(60); steps > 0; steps--)
		step();
	drain();

	right = drained() && !sent_twice;
	for (e = 0; e < nentities; e++)
	{
		for (k = 0; k < UNTRIGGERED; k++)
			right = right && same(api[e][k], source[e][k]);
		right = right && same(api[e][k], last_read(e, k));
	}
	return right;
}

int
main(int argc, char **argv)
{
	uint64		args[2] = {250000, 1};
	int			nargs = 0;
	uint64		wrong = 0;
	uint64		h;
	int			failed;
	int			n;
	int			i;

	for (i = 1; i < argc; i++)
	{
		if (strcmp(argv[i], "--no-mark") == 0)
			no_mark = true;
		else if (strcmp(argv[i], "--by-lsn") == 0)
			by_lsn = true;
		else if (strcmp(argv[i], "--forget-dead") == 0)
			forget_dead = true;
		else if (nargs < 2 && argv[i][0] != '-')
			args[nargs++] = strtoull(argv[i], NULL, 10);
		else
		{
			fprintf(stderr, "usage: %s [histories] [seed] "
					"[--no-mark | --by-lsn | --forget-dead]\n", argv[0]);
			return 2;
		}
	}

	n = merge_cases(&failed);
	for (h = 0; h < args[0]; h++)
	{
		uint64		seed = args[1] * UINT64CONST(1000000007) + h;

		if (!history(seed) && ++wrong <= 3)
			printf("# history " UINT64_FORMAT " of seed " UINT64_FORMAT
				   " ends wrong\n", h, args[1]);
	}
	printf("# " UINT64_FORMAT " of " UINT64_FORMAT " histories end wrong\n",
		   wrong, args[0]);
	printf("%sok %d - generated histories end as the source says\n",
		   wrong > 0 ? "not " : "", n + 1);
	printf("1..%d\n", n + 1);
	return wrong > 0 || failed > 0 ? 1 : 0;
}
