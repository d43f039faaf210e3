/*
 * realtime.c
 *	  The real-time lane: look, wave, calls, answers.
 *
 * What a look finds waits here entity by entity.  A wave reads the profiles
 * of as many as may go, merges, and marks in one durable commit; the calls
 * start after it.  An entity is in flight once at most: its newer rows wait for
 * the answer (realtime_answers.c).
 */
#include "postgres.h"

#include "access/xact.h"
#include "utils/memutils.h"

#include "api.h"
#include "ledger.h"
#include "payload.h"
#include "pending.h"

/* What is kept in memory; past that the bulk lane takes over */
#define MAX_ROWS 20000
#define MAX_BYTES (32 * 1024 * 1024)

/* A wave holds each entity's rows, profile and body at once: no more rows than
 * these, if it is more than one entity */
#define WAVE_BYTES (8 * 1024 * 1024)

/* What the bulk lane has handed over goes so often (API ms), and what was not
 * used of the last half minute is made up for */
#define SOLO_INTERVAL_MS 1000
#define SOLO_INTERVALS 30

/* With fewer waiting a job is not worth while, however low the limit */
#define BACKLOG_ENTITIES 400

void
realtime_init(Sender *sender)
{
	Realtime   *rt = &sender->rt;

	rt->context = AllocSetContextCreate(sender->context, "userpilot real time",
										ALLOCSET_DEFAULT_SIZES);
	pending_init(rt);
	dlist_init(&rt->ready);
	dlist_init(&rt->calling);
}

/* More waits than a minute's calls: the bulk lane is to have its share */
bool
realtime_backlogged(const Sender *sender)
{
	return sender->rt.overflow ||
		(int) sender->rt.pending->members - sender->rt.solos >
		Max(sender->env->requests_per_minute, BACKLOG_ENTITIES);
}

bool
realtime_in_flight(const Sender *sender, EntityKey key, uint32 hash)
{
	const EntityEntry *entry = entities_lookup_hash(sender->rt.pending, key, hash);
	const Pending *pending = entry ? entry->data : NULL;

	return pending != NULL && (pending->state != PENDING_WAITING || pending->solo);
}

/* An entity of the bulk lane's, with every row it has */
void
realtime_add_solo(Sender *sender, QueueRow **rows, int n, bool helped)
{
	Realtime   *rt = &sender->rt;

	for (int i = 0; i < n; i++)
		pending_add_solo(rt, rows[i], helped);
}

/* ------------------------------------------------------------- the look */

/*
 * Forget what waits and read all: rows came back that no look can see.  Those
 * that have failed, or were sent beside an overdue job, keep what is known of
 * that, and whether their rows still stand is seen before they go.
 */
void
realtime_reset_look(Sender *sender)
{
	Realtime   *rt = &sender->rt;
	dlist_mutable_iter iter;

	for (int i = 0; i < WAITING_LISTS; i++)
	{
		dlist_foreach_modify(iter, &rt->waiting[i])
		{
			Pending    *pending = dlist_container(Pending, node, iter.cur);

			if (pending->failed_at == 0 && pending->nprovisional == 0 &&
				(!pending->solo || pending->helped))
				pending_free(rt, pending);
		}
	}
	if (rt->seen)
		pfree(rt->seen);
	rt->seen = NULL;
	rt->overflow = false;
	rt->denied_until = 0;
}

static bool
is_full(RowCount count, int times)
{
	return count.rows >= times * MAX_ROWS || count.bytes >= (int64) times * MAX_BYTES;
}

bool
realtime_takes_solos(const Sender *sender)
{
	return !is_full(sender->rt.solo, 1);
}

static void
look_row(const QueueRow *row, void *arg)
{
	Realtime   *rt = arg;
	EntityKey	key = {row->kind, row->entity_len, row->entity_id};
	const Pending *waiting = pending_find(rt, key);

	/* newer rows of what was handed over count with that, and may double it */
	if (waiting != NULL && waiting->solo ? is_full(rt->solo, 2) : is_full(rt->fresh, 1))
		rt->overflow = true;
	else
		(void) pending_add(rt, row);
	rt->denied_until = 0;		/* what is fresh may go sooner */
}

/* Adds what became visible since the last look, or all there is */
void
realtime_look(Sender *sender)
{
	Realtime   *rt = &sender->rt;

	if (!queue_look(sender->env->server, &rt->seen, rt->context, MAX_ROWS + 1, look_row, rt))
		rt->overflow = true;
	if (realtime_backlogged(sender))
		sender->bulk.dirty = true;
}

/* More was there than fitted: there is room now, or rows were not where they
 * had been read.  Not while an acknowledged job's rows are still there. */
void
realtime_look_again(Sender *sender)
{
	Realtime   *rt = &sender->rt;

	if (sender->bulk.done->nrows == 0 &&
		((rt->overflow && rt->fresh.rows + rt->solo.rows < MAX_ROWS / 2 &&
		  rt->fresh.bytes + rt->solo.bytes < MAX_BYTES / 2) || rt->moved))
	{
		rt->moved = false;
		realtime_reset_look(sender);
		realtime_look(sender);
	}
}

/* ------------------------------------------------------------- the wave */

/* How many entities may be made ready now; none as long as those that are keep
 * all connections busy, as each wave is a flush */
static int
wave_room(const Sender *sender, int64 now)
{
	const Realtime *rt = &sender->rt;
	int			room;

	if (!sender_may_send(sender) || now < rt->lane.not_before)
		return 0;
	room = sender->env->connections * REALTIME_READY_PER_CONNECTION - rt->nready - rt->ncalling;
	if (rt->nready >= sender->env->connections)
		room = 0;
	/* an open circuit lets one probe through at a time */
	if (rt->lane.outages > 0 || rt->lane.throttled > 0 || sender->paused)
		room = rt->nready + rt->ncalling > 0 ? 0 : 1;
	return Max(room, 0);
}

bool
realtime_wave_due(const Sender *sender, int64 now)
{
	const Realtime *rt = &sender->rt;

	return now >= Max(rt->denied_until, pending_due_at(rt)) && wave_room(sender, now) > 0;
}

/*
 * An entity of a running job waits for its end, or the job could overwrite
 * what is newer.  Beside an overdue job newer rows go out all the same, but
 * provisionally: they stay queued, their keys unknown, and go out once more
 * when the job has ended.
 */
static bool
held(const Sender *sender, Pending *pending, int64 now)
{
	pending->provisional = false;
	if (!bulk_holds(sender, pending->key, entity_hash(pending->key)))
		return false;
	pending->provisional = bulk_holds_overdue(sender, pending->key, now);
	return !pending->provisional || pending->nprovisional == pending->nrows;
}

/* A sixtieth is kept for what is fresh, which also goes first */
int
realtime_solo_limit(int per_minute)
{
	return Max(per_minute - per_minute / 60, 1);
}

static int64
solo_interval(int per_minute)
{
	return Max(SOLO_INTERVAL_MS, 60000 / realtime_solo_limit(per_minute) + 1);
}

/*
 * Calls of what the bulk lane has handed over are spread over the minute, so
 * that one of what is fresh never waits for long: those of a minute ago, which
 * make room for it, are spread as well.
 */
static int
solos_paid_for(const Sender *sender, int64 now)
{
	const Realtime *rt = &sender->rt;
	int			per_minute = sender->env->requests_per_minute;
	int64		since = Max(rt->solo_since, now - SOLO_INTERVALS * solo_interval(per_minute));

	if (now < rt->solo_at)
		return 0;
	return (now - since) * realtime_solo_limit(per_minute) / 60000;
}

static void
pay_for_solos(Sender *sender, int n, int64 now)
{
	Realtime   *rt = &sender->rt;
	int			per_minute = sender->env->requests_per_minute;
	int64		interval = solo_interval(per_minute);

	rt->solo_since = Max(rt->solo_since, now - SOLO_INTERVALS * interval) +
		(int64) n * 60000 / realtime_solo_limit(per_minute);
	rt->solo_at = rt->solo_since + interval;
}

/* Takes up to max entities that may go, out of one list, while *bytes last;
 * unfailed: only of those that have not failed */
static int
choose_from(Sender *sender, PendingList list, bool unfailed, Pending **chosen, int max,
			int64 *bytes, int64 now)
{
	dlist_mutable_iter iter;
	int			n = 0;

	dlist_foreach_modify(iter, &sender->rt.waiting[list])
	{
		Pending    *pending = dlist_container(Pending, node, iter.cur);

		if (n == max || *bytes <= 0)
			break;
		if (unfailed && pending->failed_at != 0)
			continue;
		if (held(sender, pending, now))
			pending_wait(&sender->rt, pending, now + HELD_MS);
		else
		{
			chosen[n++] = pending;
			*bytes -= pending_bytes(pending, pending->nrows);
		}
	}
	return n;
}

/* When that which would go first has failed, 0: it has not; INT64_MAX: none waits */
static int64
first_failed_at(Realtime *rt, PendingList list)
{
	if (dlist_is_empty(&rt->waiting[list]))
		return PG_INT64_MAX;
	return dlist_container(Pending, node, dlist_head_node(&rt->waiting[list]))->failed_at;
}

static int
choose(Sender *sender, Pending **chosen, int max, int64 now)
{
	int64		bytes = WAVE_BYTES;
	int			n;
	int			solos;

	pending_recall(&sender->rt, now);
	solos = solos_paid_for(sender, now);
	if (solos == 0)				/* the limit may be lower than it was */
		sender->rt.solo_at = Max(sender->rt.solo_at, now + SOLO_INTERVAL_MS);
	/* the one probe is not always to be the one that the trouble is about */
	if (sender->paused)
	{
		n = choose_from(sender, WAITING_FRESH, true, chosen, max, &bytes, now);
		if (n > 0)
			return n;
	}
	if ((sender->paused || sender->rt.lane.outages > 0) &&
		first_failed_at(&sender->rt, WAITING_FRESH) > first_failed_at(&sender->rt, WAITING_SOLO))
	{
		n = choose_from(sender, WAITING_SOLO, false, chosen, Min(max, solos), &bytes, now);
		if (n > 0)
			return n;
	}
	n = choose_from(sender, WAITING_FRESH, false, chosen, max, &bytes, now);
	return n + choose_from(sender, WAITING_SOLO, false, chosen + n, Min(max - n, solos), &bytes, now);
}

/* What has waited may have been cancelled meanwhile, or deleted by hand */
static int
leave_out_cancelled(Sender *sender, Pending **chosen, int n)
{
	int			left = 0;

	for (int i = 0; i < n; i++)
	{
		if (chosen[i]->read_in == GetCurrentTransactionStartTimestamp() ||
			queue_stands(chosen[i]->rows, chosen[i]->nrows))
			chosen[left++] = chosen[i];
		else
		{
			pending_free(&sender->rt, chosen[i]);
			/* to find what is left of it */
			sender->rt.moved = sender->bulk.dirty = true;
		}
	}
	return left;
}

/* Reads the profiles of one kind's chosen entities and merges */
static void
merge_chosen(Sender *sender, Pending **chosen, int n, UserpilotKind kind)
{
	Profile   **profiles = palloc(Max(n, 1) * sizeof(Profile *));
	int			nprofiles = 0;

	for (int i = 0; i < n; i++)
	{
		Pending    *p = chosen[i];
		MemoryContext old;

		if (p->key.kind != kind)
			continue;
		p->merge_context = AllocSetContextCreate(p->context, "userpilot merge",
												 ALLOCSET_SMALL_SIZES);
		old = MemoryContextSwitchTo(p->merge_context);
		memset(&p->profile, 0, sizeof(p->profile));
		p->profile.key = p->key;
		p->profile.context = p->merge_context;
		p->profile.merge = merge_begin(&sender->bulk.batches);
		for (int r = 0; r < p->nrows; r++)
			queue_fold(p->profile.merge, &sender->bulk.batches, &sender->env->shape, p->rows[r]);
		MemoryContextSwitchTo(old);
		p->nsent = p->nrows;
		profiles[nprofiles++] = &p->profile;
	}
	profiles_read(sender->env->server, sender->env->refresh_after, profiles, nprofiles);
}

/* Deletes the sent rows of entities */
void
realtime_delete_sent(Sender *sender, Pending **done, int n)
{
	Realtime   *rt = &sender->rt;
	int			total = 0;
	QueueRow   *rows;

	for (int i = 0; i < n; i++)
		total += done[i]->nsent;
	rows = palloc(Max(total, 1) * sizeof(QueueRow));
	total = 0;
	for (int i = 0; i < n; i++)
	{
		for (int r = 0; r < done[i]->nsent; r++)
		{
			rows[total++] = *done[i]->rows[r];
			if (done[i]->solo || realtime_backlogged(sender))
				bulk_row_gone(sender, done[i]->key.kind, done[i]->rows[r]->batch);
		}
	}
	if (queue_delete(rows, total) < (uint64) total)
		rt->moved = true;
}

/* profiles_write takes one kind at a time */
void
realtime_write_profiles(Sender *sender, Pending **pending, int n, ProfileStep step)
{
	Profile   **profiles = palloc(Max(n, 1) * sizeof(Profile *));

	for (int kind = 0; kind < USERPILOT_KINDS; kind++)
	{
		int			count = 0;

		for (int i = 0; i < n; i++)
			if ((int) pending[i]->key.kind == kind)
				profiles[count++] = &pending[i]->profile;
		profiles_write(sender->env->server, profiles, count, step);
	}
}

static void
make_ready(Sender *sender, Pending *pending)
{
	Realtime   *rt = &sender->rt;
	StringInfoData body;
	int			len;
	MemoryContext old = MemoryContextSwitchTo(pending->merge_context);

	initStringInfo(&body);
	payload_single(&body, pending->key.kind, pending->key.id, pending->key.len,
				   pending->profile.merge);
	pending->body.data = payload_utf8(body.data, body.len, &len);
	pending->body.len = len;
	merge_mark(pending->profile.merge);
	MemoryContextSwitchTo(old);

	pending->profile.attempts++;
	pending->profile.job = 0;
	/* sent beside the job: what is to become of its rows is decided after it */
	if (pending->provisional)
		sender->bulk.current->unsure = true;
	pending->application = sender->env->fingerprint;
	pending->state = PENDING_READY;
	dlist_delete(&pending->node);
	dlist_push_tail(&rt->ready, &pending->node);
	rt->nready++;
}

/*
 * How many of those to be sent may go now; the others wait.  The right to a
 * call is taken before the mark, so that a body leaves soon after it: after a
 * crash the marks are all that tells which calls were made.
 */
static int
within_quota(Sender *sender, Pending **sending, int n, int64 now)
{
	Realtime   *rt = &sender->rt;
	int			per_minute = sender->env->requests_per_minute;
	int64		wait_until;
	int			fresh = 0;
	int			granted;

	if (n == 0)
		return 0;
	while (fresh < n && !sending[fresh]->solo)
		fresh++;
	granted = quota_calls_take(sender->env->fingerprint, per_minute, fresh, now, &wait_until);
	if (granted == fresh)
		granted += quota_calls_take(sender->env->fingerprint, realtime_solo_limit(per_minute),
									n - fresh, now, &wait_until);
	if (granted > fresh)
		pay_for_solos(sender, granted - fresh, now);
	for (int i = granted; i < n; i++)
		pending_wait(rt, sending[i], wait_until);
	if (granted < n)
		rt->denied_until = wait_until;
	return granted;
}

/* Beside an overdue job even what needs no sending stays queued until it ends;
 * returns how many are left */
static int
keep_provisional(Realtime *rt, Pending **nothing, int n, int64 now)
{
	int			left = 0;

	for (int i = 0; i < n; i++)
	{
		if (!nothing[i]->provisional)
		{
			nothing[left++] = nothing[i];
			continue;
		}
		nothing[i]->nprovisional = nothing[i]->nrows;
		pending_wait(rt, nothing[i], now + HELD_MS);
	}
	return left;
}

/*
 * Marks the next entities; those Userpilot already has are done at once.
 * Returns whether anything was marked, so that the commit must be durable.
 */
bool
realtime_wave(Sender *sender, int64 now)
{
	Realtime   *rt = &sender->rt;
	int			room = wave_room(sender, now);
	Pending   **chosen = palloc(Max(room, 1) * sizeof(Pending *));
	Pending   **nothing = palloc(Max(room, 1) * sizeof(Pending *));
	Pending   **marked = palloc(Max(room, 1) * sizeof(Pending *));
	Pending   **too_much = palloc(Max(room, 1) * sizeof(Pending *));
	int			n;
	int			ntoo_much = 0;
	int			nnothing = 0;
	int			nmarked = 0;

	if (!sender_still_enabled(sender))
		return false;
	n = leave_out_cancelled(sender, chosen, choose(sender, chosen, room, now));
	for (int kind = 0; kind < USERPILOT_KINDS; kind++)
		merge_chosen(sender, chosen, n, kind);
	for (int i = 0; i < n; i++)
	{
		MergeEntity *merge = chosen[i]->profile.merge;
		MemoryContext old = MemoryContextSwitchTo(chosen[i]->merge_context);
		int			nsend = merge_finish(merge);

		if (merge->too_much)
			too_much[ntoo_much++] = chosen[i];
		else if (nsend > 0 || !chosen[i]->profile.exists)
			marked[nmarked++] = chosen[i];
		else
		{
			merge_mark(merge);
			nothing[nnothing++] = chosen[i];
		}
		MemoryContextSwitchTo(old);
	}
	for (int i = 0; i < ntoo_much; i++)
	{
		realtime_bury(sender, too_much[i], NULL, sender_too_much(too_much[i]->key.kind));
		pending_drop_sent(rt, too_much[i]);
	}
	nmarked = within_quota(sender, marked, nmarked, now);
	for (int i = 0; i < nmarked; i++)
		make_ready(sender, marked[i]);
	nnothing = keep_provisional(rt, nothing, nnothing, now);

	realtime_write_profiles(sender, nothing, nnothing, PROFILE_RAISED);
	realtime_write_profiles(sender, marked, nmarked, PROFILE_MARKED);
	if (nmarked > 0)
		ledger_calls(sender->env->server, nmarked);
	realtime_delete_sent(sender, nothing, nnothing);
	for (int i = 0; i < nnothing; i++)
		pending_drop_sent(rt, nothing[i]);
	realtime_look_again(sender);
	return nmarked > 0;
}

/* Starts calls of what is ready, as connections allow */
void
realtime_start(Sender *sender, int64 now)
{
	Realtime   *rt = &sender->rt;
	int			room = Min(rt->nready, sender->env->connections - rt->ncalling);

	if (now < rt->lane.not_before || !sender_may_send(sender))
		return;
	for (int i = 0; i < room; i++)
	{
		Pending    *pending = dlist_container(Pending, node, dlist_pop_head_node(&rt->ready));
		Call	   *call = MemoryContextAlloc(pending->merge_context, sizeof(Call));
		const char *error;

		rt->nready--;
		rt->ncalling++;
		call->sender = sender;
		call->pending = pending;
		call->application = pending->application;
		pending->state = PENDING_CALLING;
		pending->started_at = now;
		dlist_push_tail(&rt->calling, &pending->node);
		if (api_identify(sender->http, &sender->env->target, pending->key.kind,
						 &pending->body, call, &error))
		{
			pending_called(rt, pending, now);
			continue;
		}

		/* it never left: as if the network had refused it */
		quota_calls_return(pending->application, 1);
		rt->ncalling--;
		sender_error(sender, error);
		pending_wait(rt, pending, now + delivery_entity_backoff(1, 1.0));
	}
}

/* When the lane wants to act next, given nothing new; INT64_MAX: never */
int64
realtime_next_at(const Sender *sender, int64 now)
{
	const Realtime *rt = &sender->rt;
	int64		at;

	if (rt->nready > 0 && rt->ncalling < sender->env->connections)
		return rt->lane.not_before;
	at = pending_due_at(rt);
	if (at == PG_INT64_MAX || wave_room(sender, Max(now, rt->lane.not_before)) == 0)
		return PG_INT64_MAX;
	return Max(at, Max(rt->lane.not_before, rt->denied_until));
}
