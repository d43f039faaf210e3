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

#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"
#include "utils/uuid.h"

#include "clock.h"
#include "payload.h"
#include "sender.h"

/* "50 MB" may be counted in millions; keeps room for what stands around */
#define MAX_BODY_BYTES (50 * 1000 * 1000 - 1024)

/* Larger bodies go as a file, if it is for us to choose */
#define JSON_BYTES (8 * 1000 * 1000)

#define CHUNK_BYTES (1024 * 1024)

/* Profiles are read and written so many at a time */
#define GROUP 1000

/* What the real-time lane is handed of a bulk backlog is held in memory; less
 * than the smallest number is left to a last job */
#define HELP_MIN_ROWS 1000
#define HELP_ROWS 10000
#define HELP_BYTES (16 * 1024 * 1024)

/* Positions kept for deletion; further rows wait for the next sweep */
#define MAX_POSITIONS 2000000

typedef enum SweepSort
{
	SWEEP_JOB,
	SWEEP_DONE,
	SWEEP_SOLO,
	SWEEP_HELP					/* for no job now: the real-time lane's, perhaps */
} SweepSort;

typedef struct Swept
{
	Profile		profile;
	SweepSort	sort;
	int			nrows;
	int			maxrows;
	QueueRow   *rows;			/* positions only */
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
	bool		kind_chosen;
	UserpilotKind kind;
	bool		left_out;		/* more is there for the bulk lane */
	BlockNumber next_start;
	int			positions;
	bool		solo_seen;
	int64	   *pending;		/* rows left of each bulk SELECT */

	/* entities the real-time lane may still take of what is left out */
	int			help;
	int			help_rows;
	Size		help_bytes;
	int64		left_rows;
	bool		solo_waits;

	/* the job being written */
	StringInfoData chunk;
	int			nchunks;
	Profile   **marked;
	int			nmarked;
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
 * not in it as its limit allows, but for the tenth it keeps for what is fresh.
 * So both lanes finish together.
 */
static int
room_for_help(const Sender *sender)
{
	const Realtime *rt = &sender->rt;
	int			per_minute = Min(sender->env->requests_per_minute,
								 USERPILOT_REQUESTS_PER_MINUTE);

	if (rt->overflow || rt->lane.outages > 0 || rt->lane.throttled > 0 || sender->paused)
		return 0;
	return (int64) sender->bulk.record_limit * (per_minute - per_minute / 10) /
		USERPILOT_RECORDS_PER_MINUTE - (int) rt->pending->members;
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

static bool
takes_into_job(Sweep *sweep, const QueueRow *row, uint32 hash)
{
	Sender	   *sender = sweep->sender;

	if (!row->bulk && (!realtime_backlogged(sender) || stays_in_realtime(hash)))
		return false;
	if ((sweep->kind_chosen && row->kind != sweep->kind) ||
		sweep->njob >= sender->bulk.record_limit)
	{
		if (!sweep->left_out)
			sweep->next_start = ItemPointerGetBlockNumber(&row->tid);
		sweep->left_out = true;
		return false;
	}
	return true;
}

static void
count_batch(Sweep *sweep, int64 batch, int rows)
{
	const MergeBatches *batches = &sweep->sender->bulk.batches;
	const MergeBatch *found = batch ? merge_batches_find(batches, batch) : NULL;

	if (found != NULL)
		sweep->pending[found - batches->batch] += rows;
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
	else if (bulk->done && entities_lookup_hash(bulk->done, key, hash))
		*sort = SWEEP_DONE;
	else if (takes_into_job(sweep, row, hash))
		*sort = SWEEP_JOB;
	else if (realtime_may_help(sweep, row))
		*sort = SWEEP_HELP;
	else
	{
		sweep->left_rows += row->bulk;
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
	swept->profile.context = sweep->context;
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
	queue_fold(swept->profile.merge, &sweep->sender->bulk.batches, row);
	if (swept->sort == SWEEP_SOLO || swept->sort == SWEEP_HELP)
		swept->copies = lappend(swept->copies, queue_row_copy(row));
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
			repalloc(swept->rows, swept->maxrows * sizeof(QueueRow)) :
			palloc(swept->maxrows * sizeof(QueueRow));
	}
	swept->rows[swept->nrows].tid = row->tid;
	swept->rows[swept->nrows].lsn = row->lsn;
	swept->rows[swept->nrows].batch = row->batch;
	swept->rows[swept->nrows].entity_id = swept->profile.key.id;
	swept->rows[swept->nrows].entity_len = swept->profile.key.len;
	swept->nrows++;
	sweep->positions++;
}

static void
sweep_row(const QueueRow *row, void *arg)
{
	Sweep	   *sweep = arg;
	Sender	   *sender = sweep->sender;
	EntityKey	key = {row->kind, row->entity_len, row->entity_id};
	uint32		hash = entity_hash(key);	/* once for all tables: every row is here */
	EntityEntry *entry = entities_lookup_hash(sweep->table, key, hash);
	Swept	   *swept = entry ? entry->data : NULL;
	MemoryContext old;
	SweepSort	sort;

	sender->counted[row->kind][row->bulk]++;
	count_batch(sweep, row->batch, 1);
	if (sender->oldest == 0 || row->enqueued_at < sender->oldest)
		sender->oldest = row->enqueued_at;

	old = MemoryContextSwitchTo(sweep->context);
	if (swept == NULL && sort_of(sweep, row, key, hash, &sort))
		swept = admit(sweep, row, key, sort);
	if (swept != NULL)
		add_row(sweep, swept, row);
	MemoryContextSwitchTo(old);
}

/* Reads all profiles, a group of one kind at a time */
static void
read_profiles(Sweep *sweep)
{
	Profile   **group = palloc(GROUP * sizeof(Profile *));

	for (int kind = 0; kind < USERPILOT_KINDS; kind++)
	{
		int			n = 0;

		for (int i = 0; i < sweep->nswept; i++)
		{
			if ((int) sweep->swept[i]->profile.key.kind == kind)
				group[n++] = &sweep->swept[i]->profile;
			if (n == GROUP || i == sweep->nswept - 1)
			{
				profiles_read(sweep->sender->env->server,
							  sweep->sender->env->refresh_after, group, n);
				n = 0;
			}
		}
	}
}

/* -------------------------------------------------------------- the job */

static void
start_job(Sweep *sweep)
{
	Bulk	   *bulk = &sweep->sender->bulk;
	Datum		uuid = DirectFunctionCall1(gen_random_uuid, (Datum) 0);
	char	   *text = DatumGetCString(DirectFunctionCall1(uuid_out, uuid));
	MemoryContext old = MemoryContextSwitchTo(bulk->job_context);

	memset(&bulk->job, 0, sizeof(bulk->job));
	bulk->job.kind = sweep->kind;
	bulk->job.filename = psprintf("userpilot-%s.ndjson", text);
	bulk->flying = entities_create(bulk->job_context, sweep->njob, NULL);
	MemoryContextSwitchTo(old);
	jobs_insert(sweep->sender->env->server, &bulk->job);
	initStringInfo(&sweep->chunk);
}

static void
write_chunk(Sweep *sweep)
{
	if (sweep->chunk.len == 0)
		return;
	jobs_add_chunk(sweep->sender->bulk.job.id, sweep->nchunks++,
				   sweep->chunk.data, sweep->chunk.len);
	resetStringInfo(&sweep->chunk);
}

static void
write_marked(Sweep *sweep)
{
	profiles_write(sweep->sender->env->server, sweep->marked, sweep->nmarked, PROFILE_MARKED);
	for (int i = 0; i < sweep->nmarked; i++)
		merge_free(sweep->marked[i]->merge);
	sweep->nmarked = 0;
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
		.attempts = swept->profile.attempts
	};

	merge_mark(profile->merge);
	profiles_write(sweep->sender->env->server, &profile, 1, PROFILE_MARKED);
	(void) queue_bury(swept->rows, swept->nrows, &why);
}

/* Appends an entity's record and marks it; false if the body is full */
static bool
add_record(Sweep *sweep, Swept *swept)
{
	Bulk	   *bulk = &sweep->sender->bulk;
	Profile    *profile = &swept->profile;
	int			before;
	int			bytes;
	bool		found;

	if (bulk->flying == NULL)
		start_job(sweep);
	before = sweep->chunk.len;
	payload_merged(&sweep->chunk, profile->key.kind, profile->key.id, profile->key.len,
				   profile->merge);
	appendStringInfoChar(&sweep->chunk, '\n');
	bytes = payload_utf8_len(sweep->chunk.data + before, sweep->chunk.len - before);
	if (bulk->job.bytes + bytes > MAX_BODY_BYTES)
	{
		sweep->chunk.len = before;
		sweep->chunk.data[before] = '\0';
		if (bytes > MAX_BODY_BYTES)
		{
			bury_oversized(sweep, swept, bytes);
			return true;
		}
		return false;
	}

	merge_mark(profile->merge);
	profile->attempts++;
	profile->job = bulk->job.id;
	{
		EntityKey	key = profile->key;

		key.id = MemoryContextStrdup(bulk->job_context, key.id);
		(void) entities_insert(bulk->flying, key, &found);
	}
	bulk->job.records++;
	bulk->job.bytes += bytes;
	sweep->marked[sweep->nmarked++] = profile;
	if (sweep->chunk.len >= CHUNK_BYTES)
		write_chunk(sweep);
	if (sweep->nmarked == GROUP)
		write_marked(sweep);
	return true;
}

static void
finish_job(Sweep *sweep)
{
	Bulk	   *bulk = &sweep->sender->bulk;

	write_chunk(sweep);
	write_marked(sweep);
	switch (sweep->sender->env->bulk_format)
	{
		case BULK_FORMAT_AUTO:
			bulk->job.ndjson = bulk->job.bytes > JSON_BYTES;
			break;
		case BULK_FORMAT_JSON:
			bulk->job.ndjson = false;
			break;
		case BULK_FORMAT_NDJSON:
			bulk->job.ndjson = true;
			break;
	}
	jobs_set_size(&bulk->job);
}

/* ----------------------------------------------------------- what is not */

/* Userpilot has it already: raise versions where they rose, drop the rows */
static void
finish_nothing(Sweep *sweep, Swept **nothing, int n)
{
	Profile   **profiles = palloc(Max(n, 1) * sizeof(Profile *));
	QueueRow   *rows;
	int			total = 0;

	for (int i = 0; i < n; i++)
		total += nothing[i]->nrows;
	rows = MemoryContextAllocHuge(CurrentMemoryContext, Max(total, 1) * sizeof(QueueRow));
	total = 0;
	for (int i = 0; i < n; i++)
	{
		memcpy(rows + total, nothing[i]->rows, nothing[i]->nrows * sizeof(QueueRow));
		for (int r = 0; r < nothing[i]->nrows; r++)
			count_batch(sweep, nothing[i]->rows[r].batch, -1);
		total += nothing[i]->nrows;
	}
	for (int kind = 0; kind < USERPILOT_KINDS; kind++)
	{
		int			count = 0;

		for (int i = 0; i < n; i++)
		{
			Swept	   *swept = nothing[i];

			if ((int) swept->profile.key.kind == kind && swept->raised)
				profiles[count++] = &swept->profile;
		}
		profiles_write(sweep->sender->env->server, profiles, count, PROFILE_RAISED);
	}
	for (int i = 0; i < total; i += 100000)
		(void) queue_delete(rows + i, Min(100000, total - i));
	pfree(rows);
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

/* Decides every entity; returns how many records are in the job */
static void
decide(Sweep *sweep)
{
	Swept	  **nothing = palloc(Max(sweep->nswept, 1) * sizeof(Swept *));
	bool		help = sweep->help_rows + sweep->left_rows >= HELP_MIN_ROWS;
	int			nnothing = 0;
	bool		full = false;

	sweep->marked = palloc(GROUP * sizeof(Profile *));
	for (int i = 0; i < sweep->nswept; i++)
	{
		Swept	   *swept = sweep->swept[i];

		CHECK_FOR_INTERRUPTS();
		if (merge_finish(swept->profile.merge) == 0 && swept->profile.exists)
		{
			swept->raised = any_changed(swept->profile.merge);
			merge_mark(swept->profile.merge);
			nothing[nnothing++] = swept;
		}
		else if (swept->sort == SWEEP_SOLO || (swept->sort == SWEEP_HELP && help))
			hand_to_realtime(sweep, swept);
		else if (swept->sort != SWEEP_JOB || full || !add_record(sweep, swept))
		{
			full |= swept->sort == SWEEP_JOB;
			sweep->left_out = true;
		}
	}
	finish_nothing(sweep, nothing, nnothing);
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

/* Jobs whose rows have been swept, or whose records have all been sent */
static void
forget_finished(Sweep *sweep)
{
	Bulk	   *bulk = &sweep->sender->bulk;

	if (bulk->done != NULL)
	{
		jobs_drop_done(sweep->sender->env->server, JOB_COMPLETED);
		MemoryContextReset(bulk->done_context);
		bulk->done = NULL;
	}
	if (bulk->solo != NULL && !sweep->solo_seen && sweep->sender->rt.solos == 0)
	{
		jobs_drop_done(sweep->sender->env->server, JOB_DISSOLVED);
		MemoryContextReset(bulk->solo_context);
		bulk->solo = NULL;
	}
}

/*
 * Sweeps; returns whether there is a job to submit, marked and written, which
 * needs a durable commit.
 */
bool
bulk_prepare(Sender *sender)
{
	Bulk	   *bulk = &sender->bulk;
	Sweep		sweep = {0};
	MemoryContext old;

	Assert(bulk->flying == NULL);
	sweep.sender = sender;
	sweep.help = room_for_help(sender);
	sweep.context = AllocSetContextCreate(CurrentMemoryContext, "userpilot sweep",
										  ALLOCSET_DEFAULT_SIZES);
	old = MemoryContextSwitchTo(sweep.context);
	sweep.table = entities_create(sweep.context, 1024, NULL);
	MemoryContextReset(bulk->job_context);
	memset(sender->counted, 0, sizeof(sender->counted));
	sender->oldest = 0;
	reload_batches(sender);
	sweep.pending = palloc0(Max(bulk->batches.n, 1) * sizeof(int64));

	queue_sweep(sender->env->server, bulk->position, sweep_row, &sweep);
	read_profiles(&sweep);
	decide(&sweep);
	if (bulk->flying != NULL)
		finish_job(&sweep);
	forget_finished(&sweep);
	queue_batches_progress(&bulk->batches, sweep.pending);
	bulk->position = sweep.left_out ? sweep.next_start : 0;
	bulk->dirty = sweep.left_out;
	bulk->after_solos = sweep.solo_waits;

	MemoryContextSwitchTo(old);
	MemoryContextDelete(sweep.context);
	if (bulk->flying != NULL && bulk->job.records == 0)
		bulk_discard(sender);
	return bulk->flying != NULL;
}
