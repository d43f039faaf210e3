/*
 * share.c
 *	  What each of the two lanes takes of a backlog.
 *
 * The API lets 600 calls and 1,800 records of jobs pass a minute; a backlog is
 * gone soonest if both are used to the end.
 */
#include "postgres.h"

#include "clock.h"
#include "share.h"

/* With less to spare than that a job takes it along */
#define HELP_MIN_ROWS 1000

/* Records a second, and what a job's and calls' own time comes to (API ms) */
#define RECORDS_PER_SECOND (USERPILOT_RECORDS_PER_MINUTE / 60)
#define OWN_MS (10 * 1000)

/* It knows all that waits for it, and nothing keeps it from calling */
static bool
realtime_helps(const Sender *sender)
{
	const Realtime *rt = &sender->rt;

	return !rt->overflow && rt->lane.outages == 0 && rt->lane.throttled == 0 && !sender->paused;
}

/*
 * Of a real-time backlog the lane keeps its share of both lanes' capacity:
 * others with each pass, so that what is left of it is shared again.
 */
static bool
stays_in_realtime(const Sender *sender, uint32 hash)
{
	return murmurhash32(hash + sender->bulk.passes) %
		(USERPILOT_REQUESTS_PER_MINUTE + USERPILOT_RECORDS_PER_MINUTE) < USERPILOT_REQUESTS_PER_MINUTE;
}

/* ... unless it can be told what is left for it: share_of_backlog() */
bool
share_bulk_row(const Sender *sender, const QueueRow *row, uint32 hash)
{
	if (row->bulk || !realtime_backlogged(sender))
		return row->bulk;
	return realtime_helps(sender) || !stays_in_realtime(sender, hash);
}

/*
 * While a job runs, the real-time lane sends as many of the records that are
 * not in it as its limit allows, but for what it keeps for what is fresh.
 * So both lanes finish together.
 */
static int
help_per_minute(const Sender *sender)
{
	return realtime_solo_limit(Min(sender->env->requests_per_minute,
								   USERPILOT_REQUESTS_PER_MINUTE));
}

static int
help_per_job(const Sender *sender)
{
	int			help = (int64) sender->bulk.record_limit * help_per_minute(sender) /
		USERPILOT_RECORDS_PER_MINUTE;

	return help >= HELP_MIN_ROWS ? help : 0;
}

int
share_entities_per_unit(const Sender *sender)
{
	return sender->bulk.record_limit + help_per_job(sender);
}

/* Up to one job's worth waits there when the next is handed over, which may be
 * before the running job has ended */
static int
room_for_help(const Sender *sender)
{
	const Realtime *rt = &sender->rt;
	int			help = help_per_job(sender);
	int			room = Min(help, 2 * help - (int) rt->pending->members);

	if (!realtime_helps(sender))
		return 0;
	return room >= HELP_MIN_ROWS ? room : 0;
}

static int64
running_ms(const Bulk *bulk)
{
	return bulk->state == BULK_RUNNING ? Max(bulk->ends_at - clock_now(), 0) : 0;
}

/* What a job takes of the last unit so that both lanes end together: the
 * real-time lane has what waits there, and begins while a job still runs */
static int
share_of_job(const Sender *sender, int entities)
{
	int64		to_share = entities + (int64) sender->rt.pending->members -
		running_ms(&sender->bulk) * help_per_minute(sender) / 60000;

	return Max(to_share, 0) * USERPILOT_RECORDS_PER_MINUTE /
		(USERPILOT_RECORDS_PER_MINUTE + help_per_minute(sender));
}

/* Entities that the real-time lane has before it and no job holds */
static int
count_waiting(const Sender *sender)
{
	entities_iterator iterator;
	EntityEntry *entry;
	int			n = 0;

	entities_start_iterate(sender->rt.pending, &iterator);
	while ((entry = entities_iterate(sender->rt.pending, &iterator)) != NULL)
	{
		const Pending *pending = entry->data;

		n += pending->state == PENDING_WAITING && !pending->solo &&
			!bulk_holds(sender, entry->key, entry->hash);
	}
	return n;
}

/*
 * What a job takes of a real-time backlog whose length is known, beside so many
 * others: as little as it can, so that the calls that may be made until its end
 * suffice for the rest.
 */
static int
share_of_backlog(const Sender *sender, int others)
{
	int			calls = realtime_solo_limit(sender->env->requests_per_minute);
	int			waiting = count_waiting(sender);
	int64		now = clock_now();
	int64		ends_at = now + running_ms(&sender->bulk) + others * 1000 / RECORDS_PER_SECOND + OWN_MS;
	int			job = 0;

	while (job < waiting &&
		   quota_calls_until(sender->env->fingerprint, calls, now, ends_at) < waiting - job)
	{
		job += RECORDS_PER_SECOND;
		ends_at += 1000;
	}
	return job;
}

/*
 * The last unit of a bulk backlog is shared; what is no more than a job from the
 * start is never split.
 */
Share
share_unit(const Sender *sender, const PlanUnit *unit)
{
	const Bulk *bulk = &sender->bulk;
	int			later = plan_rows(bulk->plan);
	int			of_bulk = share_of_job(sender, unit->entities);
	bool		goes_on = bulk->done->job.id != 0 || bulk->current->entities != NULL;
	Share		share = {bulk->record_limit, unit->direct, 0};

	if (unit->direct > 0 && realtime_helps(sender))
		share.direct = share_of_backlog(sender, Max(unit->entities - unit->direct - sender->rt.solos, 0));
	if (!unit->bulk)
		return share;
	if (later == 0 && goes_on && unit->entities - of_bulk >= HELP_MIN_ROWS &&
		room_for_help(sender) >= unit->entities - of_bulk)
		share.limit = Min(share.limit, of_bulk);
	if (later + unit->entities - share.limit >= HELP_MIN_ROWS)
		share.help = room_for_help(sender);
	return share;
}
