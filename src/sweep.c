/*
 * sweep.c
 *	  The sweep: what is queued becomes the next job.
 *
 * A pass over the queue notes where the rows of the next jobs are (plan.c).
 * Then a unit of that plan is read again, a group of entities at a time, and
 * each entity is judged with its profile and all its rows, of both lanes: a row
 * of a bulk SELECT that is judged without the direct changes it saw could lose
 * to them later.  It goes into the job, or record by record through the
 * real-time lane (what is left of a dissolved job, and what this job has no
 * room for), or nothing is left to send for it and its rows go.  So what is held
 * in memory is a group's, however long the queue, and where rows stand that
 * record by record are to be sent.
 */
#include "postgres.h"

#include "access/detoast.h"
#include "miscadmin.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "bulk_job.h"
#include "job_writer.h"
#include "plan.h"
#include "share.h"

/* What the real-time lane is handed of a bulk backlog is held in memory */
#define HELP_ROWS 10000
#define HELP_BYTES (8 * 1024 * 1024)

/* What the entities of a group may come to together, as merges and as copies;
 * one of them alone may come to what a merge holds */
#define GROUP_BYTES (128 * 1024 * 1024)
#define GROUP_COPIED (64 * 1024 * 1024)

typedef enum SweepSort
{
	SWEEP_JOB,
	SWEEP_SOLO,
	SWEEP_HELP,					/* not in this job: the real-time lane's */
	SWEEP_EVICTED				/* too large beside others: not now */
} SweepSort;

/* An entity and its rows: their places, or, for the real-time lane, copies */
typedef struct Swept
{
	Profile		profile;
	SweepSort	sort;
	int			nrows;
	int			maxrows;
	JobRow	   *rows;
	List	   *copies;
	Size		bytes;			/* of the rows */
	bool		raised;			/* a version rose though nothing is sent */
} Swept;

/* Direct rows that were passed over: looked at again at the end, when it is
 * known which entities are taken along */
typedef struct PassedOver
{
	ItemPointerData *tids;
	int			n;
	int			max;
} PassedOver;

typedef struct Sweep
{
	Sender	   *sender;
	MemoryContext context;
	int64	   *counted;		/* a pass: rows of each bulk SELECT */
	PassedOver	passed_over;
	bool		left_out;		/* more is there for the bulk lane */
	BlockNumber next_start;
	bool		solo_seen;
	bool		solo_waits;

	/* what a unit may become */
	Share		share;
	bool		full;
	int			help_rows;
	Size		help_bytes;
	JobWriter	job;

	/* the group at hand */
	MemoryContext group_context;
	entities_hash *table;
	Swept	   *swept[PLAN_GROUP];
	int			nswept;
	int			njob;
	int64		folded;			/* bytes of their merges ... */
	Size		copied;			/* ... and copies */
} Sweep;

/* ------------------------------------------------------------- the pass */

static void
pass_over(PassedOver *list, const QueueRow *row)
{
	if (list->n == list->max)
	{
		list->max = Max(1024, list->max * 2);
		list->tids = list->tids ?
			repalloc_huge(list->tids, list->max * sizeof(ItemPointerData)) :
			palloc(list->max * sizeof(ItemPointerData));
	}
	list->tids[list->n++] = row->tid;
}

static void
count_row(Sweep *sweep, const QueueRow *row)
{
	Sender	   *sender = sweep->sender;
	const MergeBatch *batch;

	sender->counted[row->kind][row->bulk]++;
	if ((batch = merge_batches_find(&sender->bulk.batches, row->batch)) != NULL)
		sweep->counted[batch - sender->bulk.batches.batch]++;
	if (sender->oldest == 0 || row->enqueued_at < sender->oldest)
		sender->oldest = row->enqueued_at;
}

static void
plan_row(const QueueRow *row, void *arg)
{
	Sweep	   *sweep = arg;
	Sender	   *sender = sweep->sender;
	Plan	   *plan = sender->bulk.plan;
	entities_hash *solo = sender->bulk.solo;
	EntityKey	key = {row->kind, row->entity_len, row->entity_id};
	uint32		hash = entity_hash(key);	/* once for all tables: every row is here */
	bool		planned;

	count_row(sweep, row);
	if (solo != NULL && entities_lookup_hash(solo, key, hash))
		planned = plan_add_solo(plan, key, hash, &row->tid);
	else if (share_bulk_row(sender, row, hash) || plan_knows(plan, key, hash))
		planned = plan_add(plan, key, hash, &row->tid, row->bulk,
						   toast_raw_datum_size(PointerGetDatum(row->metadata)));
	else
	{
		MemoryContext old = MemoryContextSwitchTo(sweep->context);

		pass_over(&sweep->passed_over, row);
		MemoryContextSwitchTo(old);
		return;
	}
	if (planned)
		return;
	if (!sweep->left_out)
		sweep->next_start = ItemPointerGetBlockNumber(&row->tid);
	sweep->left_out = true;
}

static void
plan_passed_over(const QueueRow *row, void *arg)
{
	Sweep	   *sweep = arg;
	EntityKey	key = {row->kind, row->entity_len, row->entity_id};
	uint32		hash = entity_hash(key);

	if (plan_knows(sweep->sender->bulk.plan, key, hash))
		(void) plan_add(sweep->sender->bulk.plan, key, hash, &row->tid, row->bulk, 0);
}

/* The whole queue once, from where the last pass ran out of room */
static void
pass(Sweep *sweep)
{
	Sender	   *sender = sweep->sender;
	Bulk	   *bulk = &sender->bulk;
	MemoryContext old = MemoryContextSwitchTo(bulk->context);

	bulk->passes++;
	bulk->plan = plan_create(bulk->record_limit, share_entities_per_unit(sender));
	MemoryContextSwitchTo(old);
	memset(sender->counted, 0, sizeof(sender->counted));
	sender->oldest = 0;
	sweep->counted = palloc0(Max(bulk->batches.n, 1) * sizeof(int64));
	queue_sweep(sender->env->server, bulk->position, plan_row, sweep);
	queue_visit(sender->env->server, plan_view(bulk->plan), sweep->passed_over.tids,
				sweep->passed_over.n, plan_passed_over, sweep);
	sweep->passed_over.n = 0;
	plan_close(bulk->plan);
	bulk->position = sweep->left_out ? sweep->next_start : 0;
	queue_batches_progress(&bulk->batches, sweep->counted, false);
}

/* ------------------------------------------------------ a group's entities */

static bool
fits_job(const Sweep *sweep, bool direct)
{
	int			taken = sweep->sender->bulk.next->job.records;

	return !sweep->full && taken + sweep->njob < sweep->share.limit &&
		(!direct || sweep->share.direct > 0);
}

/* Whether nothing more of the unit goes anywhere now */
static bool
is_served(const Sweep *sweep, const PlanUnit *unit)
{
	return sweep->share.help == 0 && !fits_job(sweep, unit->direct == unit->entities);
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
	if (bulk_holds(sweep->sender, key, hash))
	{
		sweep->left_out = true;
		return false;
	}
	if (bulk->solo && entities_lookup_hash(bulk->solo, key, hash))
	{
		*sort = SWEEP_SOLO;
		if (!realtime_takes_solos(sweep->sender))
		{
			sweep->solo_seen = sweep->solo_waits = true;
			return false;
		}
	}
	else if (!share_bulk_row(sweep->sender, row, hash))
		return false;
	else if (fits_job(sweep, !row->bulk))
		*sort = SWEEP_JOB;
	else if (row->bulk && sweep->share.help > 0 && sweep->help_rows < HELP_ROWS &&
			 sweep->help_bytes < HELP_BYTES)
		*sort = SWEEP_HELP;
	else
	{
		sweep->left_out = true;
		return false;
	}
	return true;
}

static Swept *
admit(Sweep *sweep, EntityKey key, uint32 hash, SweepSort sort, bool direct)
{
	Swept	   *swept = palloc0(sizeof(Swept));
	bool		found;

	swept->sort = sort;
	swept->profile.key = key;
	swept->profile.key.id = pnstrdup(key.id, key.len);
	entities_insert_hash(sweep->table, swept->profile.key, hash, &found)->data = swept;
	if (sort == SWEEP_JOB)
	{
		swept->profile.merge = merge_begin(&sweep->sender->bulk.batches);
		sweep->njob++;
		sweep->share.direct -= direct;
	}
	else if (sort == SWEEP_HELP)
		sweep->share.help--;
	sweep->swept[sweep->nswept++] = swept;
	return swept;
}

/* Its rows stay for a later sweep */
static void
evict(Sweep *sweep, Swept *swept)
{
	if (swept->sort == SWEEP_JOB)
	{
		sweep->folded -= swept->profile.merge->bytes;
		merge_free(swept->profile.merge);
		sweep->njob--;
	}
	else
		sweep->copied -= swept->bytes;
	for (int i = 0; i < list_length(swept->copies); i++)
		queue_row_free(list_nth(swept->copies, i));
	swept->copies = NIL;
	if (swept->sort == SWEEP_SOLO)
		sweep->solo_seen = sweep->solo_waits = true;
	else
		sweep->left_out = true;
	swept->sort = SWEEP_EVICTED;
}

/* Whole rows are held until they are sent: what is too many for that even if
 * nothing else is held is for a job */
static void
copy_row(Sweep *sweep, Swept *swept, const QueueRow *row, Size bytes)
{
	sweep->copied += bytes;
	if (sweep->copied > GROUP_COPIED && sweep->copied > bytes)
	{
		if (swept->sort == SWEEP_SOLO && swept->bytes > GROUP_COPIED)
		{
			entities_delete(sweep->sender->bulk.solo, swept->profile.key);
			sweep->left_out = true;
		}
		evict(sweep, swept);
		return;
	}
	swept->copies = lappend(swept->copies, queue_row_copy(row));
	if (swept->sort == SWEEP_HELP)
	{
		sweep->help_rows++;
		sweep->help_bytes += bytes;
	}
}

static void
add_row(Sweep *sweep, Swept *swept, const QueueRow *row)
{
	MergeEntity *merge = swept->profile.merge;
	Size		bytes = toast_raw_datum_size(PointerGetDatum(row->metadata));

	if (swept->sort == SWEEP_EVICTED)
		return;
	swept->bytes += bytes;
	if (swept->sort != SWEEP_JOB)
	{
		copy_row(sweep, swept, row, bytes);
		return;
	}
	sweep->folded -= merge->bytes;
	queue_fold(merge, &sweep->sender->bulk.batches, &sweep->sender->env->shape, row);
	sweep->folded += merge->bytes;
	if (sweep->folded > GROUP_BYTES && sweep->njob > 1 && !merge->too_much)
	{
		evict(sweep, swept);
		return;
	}
	if (swept->nrows == swept->maxrows)
	{
		swept->maxrows = Max(2, swept->maxrows * 2);
		swept->rows = swept->rows ?
			repalloc_huge(swept->rows, swept->maxrows * sizeof(JobRow)) :
			MemoryContextAllocHuge(CurrentMemoryContext, swept->maxrows * sizeof(JobRow));
	}
	swept->rows[swept->nrows].tid = row->tid;
	swept->rows[swept->nrows].lsn = row->lsn;
	swept->rows[swept->nrows].batch = row->batch;
	swept->nrows++;
}

static void
sweep_row(const QueueRow *row, void *arg)
{
	Sweep	   *sweep = arg;
	EntityKey	key = {row->kind, row->entity_len, row->entity_id};
	uint32		hash = entity_hash(key);
	EntityEntry *entry = entities_lookup_hash(sweep->table, key, hash);
	Swept	   *swept = entry ? entry->data : NULL;
	MemoryContext old = MemoryContextSwitchTo(sweep->group_context);
	SweepSort	sort;

	/* never more than was planned, whatever was done to the table by hand */
	if (swept == NULL && sweep->nswept < PLAN_GROUP && sort_of(sweep, row, key, hash, &sort))
		swept = admit(sweep, key, hash, sort, !row->bulk);
	if (swept != NULL)
		add_row(sweep, swept, row);
	else if (!row->bulk)
		pass_over(&sweep->passed_over, row);
	MemoryContextSwitchTo(old);
}

static void
sweep_passed_over(const QueueRow *row, void *arg)
{
	Sweep	   *sweep = arg;
	EntityKey	key = {row->kind, row->entity_len, row->entity_id};
	EntityEntry *entry = entities_lookup(sweep->table, key);
	MemoryContext old = MemoryContextSwitchTo(sweep->group_context);

	if (entry != NULL)
		add_row(sweep, entry->data, row);
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
			bulk_row_gone(sweep->sender, nothing[i]->profile.key.kind, nothing[i]->rows[r].batch);
	}
	rows = whole_rows(nothing, n, &total);
	(void) queue_delete(rows, total);
	pfree(rows);
}

static void
bury(Sweep *sweep, Swept *swept, const char *error)
{
	QueueFailure why = {.error = error,.attempts = swept->profile.attempts};
	EntityKey	key = swept->profile.key;
	int			total;
	QueueRow   *rows = whole_rows(&swept, 1, &total);

	(void) sender_bury(key, rows, total, &why);
	for (int r = 0; r < swept->nrows; r++)
		bulk_row_gone(sweep->sender, key.kind, swept->rows[r].batch);
}

/*
 * Why it can never be sent, or NULL.  What is more than can be held alone gets
 * no answer of its own, so it goes from job to job; not for ever, as it may be
 * what they are refused for.
 */
static const char *
never_sent(const Sweep *sweep, const Swept *swept)
{
	const Profile *profile = &swept->profile;

	if (profile->merge->too_much)
		return sender_too_much(profile->key.kind);
	if (swept->bytes > GROUP_COPIED && profile->attempts >= sweep->sender->env->max_attempts)
		return psprintf("%d jobs with it were not completed, and its rows are too many to be sent alone",
						profile->attempts);
	return NULL;
}

/*
 * A record that fits into no body can never be sent.  Marked all the same: a
 * dead letter that is retried must not pass for newer than what came since.
 */
static void
bury_oversized(Sweep *sweep, Swept *swept, int bytes)
{
	Profile    *profile = &swept->profile;

	merge_mark(profile->merge);
	profiles_write(sweep->sender->env->server, &profile, 1, PROFILE_MARKED);
	bury(sweep, swept, psprintf("the record has %d bytes; Userpilot takes 50 MB in one request", bytes));
}

static bool
any_changed(const MergeEntity *merge)
{
	for (int i = 0; i < merge->nkeys; i++)
		if (merge->keys[i].changed)
			return true;
	return false;
}

/* -------------------------------------------------------------- decisions */

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

static void
add_to_job(Sweep *sweep, Swept *swept)
{
	int			bytes;

	if (sweep->full)
	{
		sweep->left_out = true;
		return;
	}
	switch (job_writer_add(&sweep->job, &swept->profile, swept->rows, swept->nrows, &bytes))
	{
		case JOB_WRITER_TAKEN:
			break;
		case JOB_WRITER_FULL:
			sweep->full = sweep->left_out = true;
			break;
		case JOB_WRITER_TOO_LARGE:
			bury_oversized(sweep, swept, bytes);
			break;
	}
}

static void
decide(Sweep *sweep)
{
	Swept	   *job[PLAN_GROUP];
	Swept	   *nothing[PLAN_GROUP];
	int			njob = 0;
	int			nnothing = 0;

	for (int i = 0; i < sweep->nswept; i++)
	{
		if (sweep->swept[i]->sort == SWEEP_JOB)
			job[njob++] = sweep->swept[i];
		else if (sweep->swept[i]->sort != SWEEP_EVICTED)
			hand_to_realtime(sweep, sweep->swept[i]);
	}
	read_profiles(sweep, job, njob);
	for (int i = 0; i < njob; i++)
	{
		MergeEntity *merge = job[i]->profile.merge;
		int			nsend = merge_finish(merge);
		const char *error = never_sent(sweep, job[i]);

		if (error != NULL)
		{
			bury(sweep, job[i], error);
			continue;
		}
		if (nsend > 0 || !job[i]->profile.exists)
		{
			add_to_job(sweep, job[i]);
			continue;
		}
		job[i]->raised = any_changed(merge);
		merge_mark(merge);
		nothing[nnothing++] = job[i];
	}
	job_writer_flush(&sweep->job);
	finish_nothing(sweep, nothing, nnothing);
}

/* ---------------------------------------------------------------- units */

static void
sweep_unit(Sweep *sweep, const PlanUnit *unit, bool solo)
{
	Sender	   *sender = sweep->sender;
	const QueueView *view = plan_view(sender->bulk.plan);
	int			start = 0;

	if (solo)
		memset(&sweep->share, 0, sizeof(sweep->share));
	else
		sweep->share = share_unit(sender, unit);
	for (int g = 0; g < unit->ngroups; g++)
	{
		MemoryContext old;

		if (!solo && is_served(sweep, unit))
		{
			sweep->left_out = true;
			break;
		}
		old = MemoryContextSwitchTo(sweep->group_context);

		sweep->table = entities_create(sweep->group_context, PLAN_GROUP, NULL);
		memset(&sweep->passed_over, 0, sizeof(sweep->passed_over));
		queue_visit(sender->env->server, view, unit->tids + start, unit->ends[g] - start,
					sweep_row, sweep);
		queue_visit(sender->env->server, view, sweep->passed_over.tids, sweep->passed_over.n,
					sweep_passed_over, sweep);
		decide(sweep);
		sweep->nswept = sweep->njob = 0;
		sweep->folded = sweep->copied = 0;
		start = unit->ends[g];
		MemoryContextSwitchTo(old);
		MemoryContextReset(sweep->group_context);
	}
}

/* One unit, after the one of those that travel alone; false: there is none */
static bool
sweep_next(Sweep *sweep)
{
	Bulk	   *bulk = &sweep->sender->bulk;
	const PlanUnit *unit = NULL;
	bool		solo = true;

	while (solo && bulk->plan != NULL && (unit = plan_next(bulk->plan, &solo)) != NULL)
		sweep_unit(sweep, unit, solo);
	return unit != NULL;
}

/* ------------------------------------------------------------ the whole */

void
bulk_reload_batches(Sender *sender)
{
	Bulk	   *bulk = &sender->bulk;
	MemoryContext old;

	bulk_report_gone(sender);
	MemoryContextReset(bulk->batches_context);
	old = MemoryContextSwitchTo(bulk->batches_context);
	queue_batches(sender->env->server, &bulk->batches);
	bulk->gone = palloc0(Max(bulk->batches.n, 1) * sizeof(int64));
	MemoryContextSwitchTo(old);
}

/* A dissolved job whose records have all been sent */
static void
forget_dissolved(Sweep *sweep)
{
	Bulk	   *bulk = &sweep->sender->bulk;

	if (bulk->solo == NULL || sweep->solo_seen || sweep->sender->rt.solos > 0)
		return;
	jobs_drop_dissolved(sweep->sender->env->server);
	MemoryContextReset(bulk->solo_context);
	bulk->solo = NULL;
}

/*
 * One unit's turn.  Returns whether there is a job to submit, marked and
 * written, which needs a durable commit; if there is none, and a plan still,
 * it may be called again.  Ahead of a running job's end there is no new plan:
 * the rows of that job are still there.
 */
bool
bulk_prepare(Sender *sender, bool ahead)
{
	Bulk	   *bulk = &sender->bulk;
	Sweep		sweep = {0};
	MemoryContext old;
	bool		passed = false;

	Assert(bulk->next->entities == NULL);
	sweep.sender = sender;
	sweep.context = AllocSetContextCreate(CurrentMemoryContext, "userpilot sweep",
										  ALLOCSET_DEFAULT_SIZES);
	sweep.group_context = AllocSetContextCreate(sweep.context, "userpilot group",
												ALLOCSET_DEFAULT_SIZES);
	old = MemoryContextSwitchTo(sweep.context);
	held_job_clear(bulk->next);
	bulk_reload_batches(sender);
	job_writer_init(&sweep.job, sender, bulk->record_limit);

	/* a dissolved job's rows may be anywhere */
	if (bulk->solo != NULL || (bulk->plan != NULL && !queue_view_stands(plan_view(bulk->plan))))
		bulk_forget_plan(sender);
	if (!sweep_next(&sweep) && !ahead)
	{
		bulk_forget_plan(sender);
		bulk_done_finish(sender);
		pass(&sweep);
		(void) sweep_next(&sweep);
		passed = true;
	}
	if (bulk->next->entities != NULL)
		job_writer_finish(&sweep.job);
	if (bulk->plan != NULL && plan_rows(bulk->plan) == 0)
		bulk_forget_plan(sender);
	if (passed)
		forget_dissolved(&sweep);
	bulk_report_gone(sender);
	bulk->dirty = sweep.left_out || (!passed && bulk->dirty);
	bulk->after_solos = sweep.solo_waits || (!passed && bulk->after_solos);

	MemoryContextSwitchTo(old);
	MemoryContextDelete(sweep.context);
	if (bulk->next->entities != NULL && bulk->next->job.records == 0)
	{
		jobs_delete(bulk->next->job.id);
		held_job_clear(bulk->next);
	}
	return bulk->next->entities != NULL;
}
