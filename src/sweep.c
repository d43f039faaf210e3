/*
 * sweep.c
 *	  The sweep: one pass over the queue makes the next job.
 *
 * Every visible row of the chosen entities is merged in, of both lanes,
 * because a row of a bulk SELECT may only be judged with all changes of its
 * entity at hand.  Three sorts of entity are taken along: those for the new
 * job; those of jobs just acknowledged, whose rows go if nothing is left to
 * send; and those of dissolved jobs, which travel one by one.  Deleting only
 * where the merge finds nothing to send is what makes it safe whatever was
 * queued meanwhile.
 */
#include "postgres.h"

#include "access/detoast.h"
#include "miscadmin.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "clock.h"
#include "bulk_job.h"
#include "job_writer.h"
#include "plan.h"

/* Profiles are read and written so many at a time */
#define GROUP 1000

/* What the real-time lane is handed of a bulk backlog is held in memory; less
 * than the smallest number is left to a job */
#define HELP_MIN_ROWS 1000
#define HELP_ROWS 10000
#define HELP_BYTES (16 * 1024 * 1024)

/* Positions kept for deletion; further rows wait for the next sweep */
#define MAX_POSITIONS 1000000

typedef enum SweepSort
{
	SWEEP_JOB,
	SWEEP_SOLO,
	SWEEP_HELP					/* for no job now: the real-time lane's, perhaps */
} SweepSort;

typedef struct Swept
{
	Profile		profile;
	SweepSort	sort;
	int			nrows;
	int			maxrows;
	JobRow   *rows;
	List	   *copies;			/* of a solo: whole rows */
	bool		raised;			/* a version rose though nothing is sent */
} Swept;

typedef struct Sweep
{
	Sender	   *sender;
	MemoryContext context;
	entities_hash *table;
	Swept	  **swept;
	int			nswept;
	int			maxswept;
	int			njob;
	int			job_limit;
	Size		job_bytes;		/* of its rows, about */
	bool		kind_chosen;
	UserpilotKind kind;
	const PlanUnit *unit;		/* what is swept; NULL: the whole queue */
	Plan	   *plan;			/* being made of what is left out, or NULL */
	bool		left_out;		/* more is there for the bulk lane */
	BlockNumber next_start;
	int			positions;
	bool		solo_seen;
	int64	   *pending;		/* rows of each bulk SELECT: left, or if it is a unit,
								 * more or fewer */

	/* entities the real-time lane may still take of what is left out */
	int			help;
	int			help_rows;
	Size		help_bytes;
	int64		left_rows;
	bool		solo_waits;

	JobWriter	job;
} Sweep;

/* ------------------------------------------------------------- the pass */

/* Of a real-time backlog the lane keeps its share of both lanes' capacity */
static bool
stays_in_realtime(uint32 hash)
{
	return hash % (USERPILOT_REQUESTS_PER_MINUTE + USERPILOT_RECORDS_PER_MINUTE) <
		USERPILOT_REQUESTS_PER_MINUTE;
}

/*
 * While a job runs, the real-time lane sends as many of the records that are
 * not in it as its limit allows, but for what it keeps for what is fresh.
 * So both lanes finish together.
 */
static int
help_per_minute(const Sender *sender)
{
	return realtime_help_limit(Min(sender->env->requests_per_minute,
								   USERPILOT_REQUESTS_PER_MINUTE));
}

static int
help_per_job(const Sender *sender)
{
	return (int64) sender->bulk.record_limit * help_per_minute(sender) /
		USERPILOT_RECORDS_PER_MINUTE;
}

static int
room_for_help(const Sender *sender)
{
	const Realtime *rt = &sender->rt;
	int			room = help_per_job(sender) - (int) rt->pending->members;

	if (rt->overflow || rt->lane.outages > 0 || rt->lane.throttled > 0 || sender->paused)
		return 0;
	return room >= HELP_MIN_ROWS ? room : 0;
}

static bool
realtime_may_help(Sweep *sweep, const QueueRow *row)
{
	if (!row->bulk || sweep->help <= 0 || sweep->help_rows >= HELP_ROWS ||
		sweep->help_bytes >= HELP_BYTES)
		return false;
	sweep->help--;
	return true;
}

/* A row the bulk lane is to send, now or later */
static bool
for_bulk_lane(const Sweep *sweep, const QueueRow *row, uint32 hash)
{
	return row->bulk || (realtime_backlogged(sweep->sender) && !stays_in_realtime(hash));
}

static bool
fits_job(const Sweep *sweep, const QueueRow *row)
{
	return (!sweep->kind_chosen || row->kind == sweep->kind) &&
		sweep->njob < sweep->job_limit && sweep->job_bytes <= JOB_WRITER_MAX_ROW_BYTES;
}

/* For a later job, which may be planned now */
static void
leave_out(Sweep *sweep, const QueueRow *row, EntityKey key, uint32 hash)
{
	sweep->left_rows++;
	if (sweep->plan != NULL &&
		plan_add(sweep->plan, key, hash, &row->tid, row->bulk,
				 toast_raw_datum_size(PointerGetDatum(row->metadata))))
		return;
	if (!sweep->left_out)
		sweep->next_start = ItemPointerGetBlockNumber(&row->tid);
	sweep->left_out = true;
}

void
sweep_count(const Sender *sender, int64 *pending, int64 batch, int rows)
{
	const MergeBatches *batches = &sender->bulk.batches;
	const MergeBatch *found = batch ? merge_batches_find(batches, batch) : NULL;

	if (found != NULL)
		pending[found - batches->batch] += rows;
}

/* Whether, and as what, a row's entity is taken along */
static bool
sort_of(Sweep *sweep, const QueueRow *row, EntityKey key, uint32 hash, SweepSort *sort)
{
	Bulk	   *bulk = &sweep->sender->bulk;

	if (realtime_in_flight(sweep->sender, key, hash))
	{
		sweep->solo_waits |= row->bulk;
		return false;
	}
	if (bulk->solo && entities_lookup_hash(bulk->solo, key, hash))
		*sort = SWEEP_SOLO;
	else if (!for_bulk_lane(sweep, row, hash))
		return false;
	else if (fits_job(sweep, row))
		*sort = SWEEP_JOB;
	else if (realtime_may_help(sweep, row))
		*sort = SWEEP_HELP;
	else
	{
		leave_out(sweep, row, key, hash);
		return false;
	}
	return true;
}

static Swept *
admit(Sweep *sweep, const QueueRow *row, EntityKey key, SweepSort sort)
{
	Swept	   *swept = palloc0(sizeof(Swept));
	EntityEntry *entry;
	bool		found;

	swept->sort = sort;
	swept->profile.key = key;
	swept->profile.key.id = pnstrdup(key.id, key.len);
	swept->profile.merge = merge_begin(&sweep->sender->bulk.batches);
	entry = entities_insert(sweep->table, swept->profile.key, &found);
	entry->data = swept;
	if (sort == SWEEP_JOB)
	{
		sweep->kind_chosen = true;
		sweep->kind = row->kind;
		sweep->njob++;
	}
	if (sweep->nswept == sweep->maxswept)
	{
		sweep->maxswept = Max(1024, sweep->maxswept * 2);
		sweep->swept = sweep->swept ?
			repalloc(sweep->swept, sweep->maxswept * sizeof(Swept *)) :
			palloc(sweep->maxswept * sizeof(Swept *));
	}
	sweep->swept[sweep->nswept++] = swept;
	return swept;
}

static void
add_row(Sweep *sweep, Swept *swept, const QueueRow *row)
{
	queue_fold(swept->profile.merge, &sweep->sender->bulk.batches,
			   &sweep->sender->env->shape, row);
	if (swept->sort == SWEEP_SOLO || swept->sort == SWEEP_HELP)
		swept->copies = lappend(swept->copies, queue_row_copy(row));
	if (swept->sort == SWEEP_JOB)
		sweep->job_bytes += toast_raw_datum_size(PointerGetDatum(row->metadata));
	if (swept->sort == SWEEP_HELP)
	{
		sweep->help_rows++;
		sweep->help_bytes += VARSIZE_ANY(row->metadata);
	}
	if (sweep->positions >= MAX_POSITIONS)
		return;
	if (swept->nrows == swept->maxrows)
	{
		swept->maxrows = Max(2, swept->maxrows * 2);
		swept->rows = swept->rows ?
			repalloc(swept->rows, swept->maxrows * sizeof(JobRow)) :
			palloc(swept->maxrows * sizeof(JobRow));
	}
	swept->rows[swept->nrows].tid = row->tid;
	swept->rows[swept->nrows].lsn = row->lsn;
	swept->rows[swept->nrows].batch = row->batch;
	swept->nrows++;
	sweep->positions++;
}

static void
count_row(Sweep *sweep, const QueueRow *row)
{
	Sender	   *sender = sweep->sender;

	sender->counted[row->kind][row->bulk]++;
	sweep_count(sender, sweep->pending, row->batch, 1);
	if (sender->oldest == 0 || row->enqueued_at < sender->oldest)
		sender->oldest = row->enqueued_at;
}

static void
sweep_row(const QueueRow *row, void *arg)
{
	Sweep	   *sweep = arg;
	EntityKey	key = {row->kind, row->entity_len, row->entity_id};
	uint32		hash = entity_hash(key);	/* once for all tables: every row is here */
	EntityEntry *entry = entities_lookup_hash(sweep->table, key, hash);
	Swept	   *swept = entry ? entry->data : NULL;
	MemoryContext old;
	SweepSort	sort;

	if (sweep->unit == NULL)
		count_row(sweep, row);

	old = MemoryContextSwitchTo(sweep->context);
	if (swept == NULL && sort_of(sweep, row, key, hash, &sort))
		swept = admit(sweep, row, key, sort);
	if (swept != NULL)
		add_row(sweep, swept, row);
	MemoryContextSwitchTo(old);
}

/* Reads the profiles of a group, one kind at a time */
static void
read_profiles(Sweep *sweep, Swept **group, int n)
{
	Profile   **profiles = palloc(n * sizeof(Profile *));

	for (int kind = 0; kind < USERPILOT_KINDS; kind++)
	{
		int			count = 0;

		for (int i = 0; i < n; i++)
		{
			group[i]->profile.context = CurrentMemoryContext;
			if ((int) group[i]->profile.key.kind == kind)
				profiles[count++] = &group[i]->profile;
		}
		profiles_read(sweep->sender->env->server, sweep->sender->env->refresh_after,
					  profiles, count);
	}
}

/* The rows of some, as far as deleting or burying them needs */
static QueueRow *
whole_rows(Swept **swept, int n, int *total)
{
	QueueRow   *rows;
	int			filled = 0;

	*total = 0;
	for (int i = 0; i < n; i++)
		*total += swept[i]->nrows;
	rows = MemoryContextAllocHuge(CurrentMemoryContext, Max(*total, 1) * sizeof(QueueRow));
	for (int i = 0; i < n; i++)
	{
		for (int r = 0; r < swept[i]->nrows; r++, filled++)
		{
			rows[filled].tid = swept[i]->rows[r].tid;
			rows[filled].lsn = swept[i]->rows[r].lsn;
			rows[filled].entity_id = swept[i]->profile.key.id;
			rows[filled].entity_len = swept[i]->profile.key.len;
		}
	}
	return rows;
}

/* ----------------------------------------------------------- what is not */

/* Userpilot has it already: raise versions where they rose, drop the rows */
static void
finish_nothing(Sweep *sweep, Swept **nothing, int n)
{
	Profile   **profiles = palloc(Max(n, 1) * sizeof(Profile *));
	QueueRow   *rows;
	int			total;

	for (int kind = 0; kind < USERPILOT_KINDS; kind++)
	{
		int			count = 0;

		for (int i = 0; i < n; i++)
		{
			if ((int) nothing[i]->profile.key.kind == kind && nothing[i]->raised)
				profiles[count++] = &nothing[i]->profile;
		}
		profiles_write(sweep->sender->env->server, profiles, count, PROFILE_RAISED);
	}
	for (int i = 0; i < n; i++)
	{
		for (int r = 0; r < nothing[i]->nrows; r++)
			sweep_count(sweep->sender, sweep->pending, nothing[i]->rows[r].batch, -1);
		sender_rows_gone(sweep->sender, nothing[i]->profile.key.kind, nothing[i]->nrows);
		merge_free(nothing[i]->profile.merge);
	}
	rows = whole_rows(nothing, n, &total);
	(void) queue_delete(rows, total);
	pfree(rows);
}

/*
 * A record that fits into no body can never be sent.  Marked all the same: a
 * dead letter that is retried must not pass for newer than what came since.
 */
static void
bury_oversized(Sweep *sweep, Swept *swept, int bytes)
{
	Profile    *profile = &swept->profile;
	QueueFailure why = {
		.http_status = 0,
		.error = psprintf("the record has %d bytes; Userpilot takes 50 MB in one request", bytes),
		.response = NULL,
		.attempts = profile->attempts
	};
	int			total;
	QueueRow   *rows = whole_rows(&swept, 1, &total);

	merge_mark(profile->merge);
	profiles_write(sweep->sender->env->server, &profile, 1, PROFILE_MARKED);
	(void) queue_bury(rows, total, &why);
}

static bool
any_changed(const MergeEntity *merge)
{
	for (int i = 0; i < merge->nkeys; i++)
		if (merge->keys[i].changed)
			return true;
	return false;
}

static void
hand_to_realtime(Sweep *sweep, Swept *swept)
{
	int			n = list_length(swept->copies);
	QueueRow  **rows = palloc(Max(n, 1) * sizeof(QueueRow *));

	for (int i = 0; i < n; i++)
		rows[i] = list_nth(swept->copies, i);
	realtime_add_solo(sweep->sender, rows, n, swept->sort == SWEEP_HELP);
	sweep->solo_seen |= swept->sort == SWEEP_SOLO;
	sweep->solo_waits = true;
}

/* What is to be sent, one way or another */
static void
send(Sweep *sweep, Swept *swept, bool help, bool *full)
{
	int			bytes;

	if (swept->sort == SWEEP_SOLO || (swept->sort == SWEEP_HELP && help))
		hand_to_realtime(sweep, swept);
	else if (swept->sort == SWEEP_JOB && !*full)
	{
		switch (job_writer_add(&sweep->job, &swept->profile, swept->rows, swept->nrows, &bytes))
		{
			case JOB_WRITER_TAKEN:
				return;			/* the writer frees it */
			case JOB_WRITER_FULL:
				*full = sweep->left_out = true;
				break;
			case JOB_WRITER_TOO_LARGE:
				bury_oversized(sweep, swept, bytes);
				break;
		}
	}
	else
		sweep->left_out = true;
	merge_free(swept->profile.merge);
}

/*
 * Decides every entity, a group at a time: what a group's profiles and merges
 * hold is gone before the next one's are read.
 */
static void
decide(Sweep *sweep)
{
	MemoryContext context = AllocSetContextCreate(sweep->context, "userpilot group",
												  ALLOCSET_DEFAULT_SIZES);
	MemoryContext old = MemoryContextSwitchTo(context);
	bool		help = sweep->help_rows + sweep->left_rows >= HELP_MIN_ROWS;
	bool		full = false;

	for (int start = 0; start < sweep->nswept; start += GROUP)
	{
		Swept	  **group = sweep->swept + start;
		int			n = Min(GROUP, sweep->nswept - start);
		Swept	  **nothing = palloc(n * sizeof(Swept *));
		int			nnothing = 0;

		CHECK_FOR_INTERRUPTS();
		read_profiles(sweep, group, n);
		for (int i = 0; i < n; i++)
		{
			MergeEntity *merge = group[i]->profile.merge;

			if (merge_finish(merge) > 0 || !group[i]->profile.exists)
			{
				send(sweep, group[i], help, &full);
				continue;
			}
			group[i]->raised = any_changed(merge);
			merge_mark(merge);
			nothing[nnothing++] = group[i];
		}
		job_writer_flush(&sweep->job);
		finish_nothing(sweep, nothing, nnothing);
		MemoryContextReset(context);
	}
	MemoryContextSwitchTo(old);
}

/* ------------------------------------------------------------ the whole */

static void
reload_batches(Sender *sender)
{
	Bulk	   *bulk = &sender->bulk;
	MemoryContext old;

	MemoryContextReset(bulk->batches_context);
	old = MemoryContextSwitchTo(bulk->batches_context);
	queue_batches(sender->env->server, &bulk->batches);
	MemoryContextSwitchTo(old);
}

/* A dissolved job whose records have all been sent */
static void
forget_dissolved(Sweep *sweep)
{
	Bulk	   *bulk = &sweep->sender->bulk;

	if (bulk->solo == NULL || sweep->solo_seen || sweep->sender->rt.solos > 0)
		return;
	jobs_drop_done(sweep->sender->env->server, JOB_DISSOLVED);
	MemoryContextReset(bulk->solo_context);
	bulk->solo = NULL;
}

/* The whole queue once; what is left out becomes the plan */
static void
sweep_queue(Sweep *sweep)
{
	Sender	   *sender = sweep->sender;
	MemoryContext old = MemoryContextSwitchTo(sender->bulk.context);

	sweep->plan = plan_create(sender->bulk.record_limit + help_per_job(sender));
	MemoryContextSwitchTo(old);
	memset(sender->counted, 0, sizeof(sender->counted));
	sender->oldest = 0;
	queue_sweep(sender->env->server, sender->bulk.position, sweep_row, sweep);
	plan_close(sweep->plan);
	if (plan_rows(sweep->plan) > 0)
		sender->bulk.plan = sweep->plan;
	else
		plan_free(sweep->plan);
	sender->bulk.position = sweep->left_out ? sweep->next_start : 0;
}

/* The rows of a unit; the last one's are shared, so that both lanes end together */
static void
sweep_unit(Sweep *sweep)
{
	Sender	   *sender = sweep->sender;
	const PlanUnit *unit = sweep->unit;
	int			share = (int64) unit->entities * USERPILOT_RECORDS_PER_MINUTE /
		(USERPILOT_RECORDS_PER_MINUTE + help_per_minute(sender));

	sweep->left_rows = plan_rows(sender->bulk.plan);
	if (sweep->left_rows == 0 && !sender->bulk.dirty && unit->bulk &&
		sweep->help >= unit->entities - share && unit->entities - share >= HELP_MIN_ROWS)
		sweep->job_limit = Min(sweep->job_limit, share);
	queue_visit(sender->env->server, unit->tids, unit->n, sweep_row, sweep);
}

/*
 * Sweeps the next unit, or everything if there is none; returns whether there
 * is a job to submit, marked and written, which needs a durable commit.
 */
static bool
prepare(Sender *sender, const PlanUnit *unit)
{
	Bulk	   *bulk = &sender->bulk;
	Sweep		sweep = {0};
	MemoryContext old;

	Assert(bulk->flying == NULL);
	sweep.sender = sender;
	sweep.unit = unit;
	sweep.job_limit = bulk->record_limit;
	sweep.help = room_for_help(sender);
	sweep.context = AllocSetContextCreate(CurrentMemoryContext, "userpilot sweep",
										  ALLOCSET_DEFAULT_SIZES);
	old = MemoryContextSwitchTo(sweep.context);
	sweep.table = entities_create(sweep.context, 1024, NULL);
	MemoryContextReset(bulk->job_context);
	reload_batches(sender);
	sweep.pending = palloc0(Max(bulk->batches.n, 1) * sizeof(int64));

	if (unit != NULL)
		sweep_unit(&sweep);
	else
		sweep_queue(&sweep);
	job_writer_init(&sweep.job, sender, sweep.kind, sweep.njob);
	decide(&sweep);
	if (bulk->flying != NULL)
		job_writer_finish(&sweep.job);
	forget_dissolved(&sweep);
	queue_batches_progress(&bulk->batches, sweep.pending, unit != NULL);
	bulk->dirty = sweep.left_out || (unit != NULL && bulk->dirty);
	bulk->after_solos = sweep.solo_waits || (unit != NULL && bulk->after_solos);

	MemoryContextSwitchTo(old);
	MemoryContextDelete(sweep.context);
	if (bulk->flying != NULL && bulk->job.records == 0)
		bulk_discard(sender);
	return bulk->flying != NULL;
}

static void
forget_plan(Bulk *bulk)
{
	if (bulk->plan == NULL)
		return;
	bulk->dirty |= plan_rows(bulk->plan) > 0;
	plan_free(bulk->plan);
	bulk->plan = NULL;
}

/* New rows are there for the bulk lane: they are to be counted and found */
void
bulk_changed(Sender *sender)
{
	forget_plan(&sender->bulk);
	sender->bulk.dirty = true;
}

bool
bulk_prepare(Sender *sender)
{
	Bulk	   *bulk = &sender->bulk;
	const PlanUnit *unit;

	/* a dissolved job's rows may be anywhere */
	if (bulk->solo != NULL)
		forget_plan(bulk);
	while (bulk->plan != NULL && (unit = plan_next(bulk->plan)) != NULL)
		if (prepare(sender, unit))
			return true;
	forget_plan(bulk);
	bulk_delete_done(sender);
	return prepare(sender, NULL);
}
