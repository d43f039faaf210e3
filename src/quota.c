/*
 * quota.c
 *	  Shared memory: what one application may do.
 *
 * The limits are the application's (endpoint and key), while workers are a
 * database's, and several databases or servers may share a key.
 *
 * The limit on calls is kept strictly, whatever the network does: a call
 * counts from its start until a minute after its end.  Any two calls that
 * reach the API within one minute are then counted against each other.
 */
#include "postgres.h"

#include "miscadmin.h"
#include "storage/lwlock.h"
#include "storage/shmem.h"

#include "clock.h"
#include "quota.h"
#include "settings.h"

/* A minute of ended calls, in bins of half a second of API time */
#define MINUTE_MS (60 * 1000)
#define BIN_MS 500
#define BINS (MINUTE_MS / BIN_MS + 1)

/* Records: more applications than this within a minute are not to be expected */
#define MIN_APPLICATIONS 64

/* A worker that waits for the slot asks again within so long (API ms) */
#define WAITER_MS 5000

/* Ledgers that are remembered to have been counted for an application */
#define SEEDS 64

/* What the ledgers of before say counts for a minute after a start (API ms);
 * until they are counted it is asked for again so often (real ms) */
#define CLOSED_MS MINUTE_MS
#define CLOSED_RETRY_MS 50

/* A server's calls are counted by its database */
typedef struct Seed
{
	Oid			database;
	Oid			server;
} Seed;

typedef struct Application
{
	uint64		id;				/* 0: free */
	Oid			database;		/* for which it was taken */
	int			in_flight;
	int64		last_bin;
	int			ended[BINS];
	int			job_holder;		/* pid of the worker whose job runs ... */
	Oid			job_server;		/* ... for this server of its database */
	int			job_waiter;		/* pid of a worker that asked in vain ... */
	Oid			job_waiter_server;	/* ... for this server ... */
	int64		job_waiting;	/* ... and when it last did */
	int64		used_at;
	int			nseeded;
	Seed		seeded[SEEDS];	/* whose ledger has been counted */
} Application;

typedef struct QuotaShared
{
	LWLock	   *lock;
	int64		closed_until;	/* not all ledgers have been counted */
	int			n;
	Application applications[FLEXIBLE_ARRAY_MEMBER];
} QuotaShared;

static QuotaShared *shared = NULL;

/* What this worker holds, to be given back whatever ends it */
typedef struct Held
{
	uint64		application;
	int			in_flight;
} Held;

static Held held[64];			/* where nothing is in flight, free */

static int
max_applications(void)
{
	return Max(userpilot_max_databases, MIN_APPLICATIONS);
}

/* One database's servers, of whatever keys, leave others room */
static int
max_of_database(void)
{
	return Min(max_applications() / 2, (int) lengthof(held));
}

Size
quota_size(void)
{
	return MAXALIGN(add_size(offsetof(QuotaShared, applications),
							 mul_size(max_applications(), sizeof(Application))));
}

/* With AddinShmemInitLock held */
void
quota_startup(void)
{
	bool		found;

	shared = ShmemInitStruct(QUOTA_TRANCHE, quota_size(), &found);
	if (found)
		return;
	memset(shared, 0, quota_size());
	shared->lock = &(GetNamedLWLockTranche(QUOTA_TRANCHE))->lock;
	shared->closed_until = clock_now() + CLOSED_MS;
	shared->n = max_applications();
}

/*
 * Every database has counted its ledgers.  None may call before: another, whose
 * worker has not come to it yet, may have used up the minute's calls.
 */
void
quota_open(void)
{
	LWLockAcquire(shared->lock, LW_EXCLUSIVE);
	shared->closed_until = 0;
	LWLockRelease(shared->lock);
}

/* Forgets what ended more than a minute ago; returns what counts still */
static int
calls_counted(Application *app, int64 now)
{
	int64		bin = now / BIN_MS;
	int			n = app->in_flight;

	if (bin - app->last_bin >= BINS)
		memset(app->ended, 0, sizeof(app->ended));
	else
		for (int64 b = app->last_bin + 1; b <= bin; b++)
			app->ended[b % BINS] = 0;
	app->last_bin = Max(bin, app->last_bin);
	for (int i = 0; i < BINS; i++)
		n += app->ended[i];
	return n;
}

/*
 * The application's record.  The least recently used one gives way, if nothing
 * of it counts any more; NULL: there is none.
 */
static Application *
application_find(uint64 id)
{
	Application *oldest = NULL;
	int64		now = clock_now();
	int			ours = 0;

	for (int i = 0; i < shared->n; i++)
	{
		Application *app = &shared->applications[i];
		bool		idle;

		if (app->id == id)
			return app;
		idle = app->id == 0 || (app->job_holder == 0 && calls_counted(app, now) == 0);
		if (!idle && app->database == MyDatabaseId)
			ours++;
		if (idle && (oldest == NULL || app->used_at < oldest->used_at))
			oldest = app;
	}
	if (oldest == NULL || ours >= max_of_database())
		return NULL;
	memset(oldest, 0, sizeof(*oldest));
	oldest->id = id;
	oldest->database = MyDatabaseId;
	oldest->used_at = now;		/* not before those that are free */
	return oldest;
}

static void
held_add(uint64 application, int calls)
{
	for (int i = 0; i < (int) lengthof(held); i++)
	{
		if (held[i].application == application)
		{
			held[i].in_flight = Max(held[i].in_flight + calls, 0);
			return;
		}
	}
	if (calls <= 0)
		return;
	for (int i = 0; i < (int) lengthof(held); i++)
	{
		if (held[i].in_flight == 0)
		{
			held[i].application = application;
			held[i].in_flight = calls;
			return;
		}
	}
}

/*
 * Takes the right to start up to "wanted" calls now; returns how many.  If
 * none, *wait_until says when to ask again.  Each must be given back with
 * quota_calls_ended when its call has ended.
 */
int
quota_calls_take(uint64 application, int per_minute, int wanted,
				 int64 now, int64 *wait_until)
{
	Application *app;
	int			granted = 0;

	*wait_until = now + BIN_MS;
	LWLockAcquire(shared->lock, LW_EXCLUSIVE);
	app = application_find(application);
	if (now < shared->closed_until)
		*wait_until = Min(shared->closed_until, now + clock_api_ms(CLOSED_RETRY_MS));
	else if (app != NULL)
	{
		app->used_at = now;
		granted = Min(wanted, per_minute - calls_counted(app, now));
		granted = Max(granted, 0);
		app->in_flight += granted;
	}
	LWLockRelease(shared->lock);

	held_add(application, granted);
	return granted;
}

int64
quota_calls_until(uint64 application, int per_minute, int64 now, int64 until)
{
	int64		minutes = (until - now) / MINUTE_MS;
	int64		last = now + (until - now) % MINUTE_MS;
	int64		n = per_minute;
	Application *app;

	LWLockAcquire(shared->lock, LW_EXCLUSIVE);
	app = application_find(application);
	if (app != NULL)
	{
		n -= calls_counted(app, now);
		for (int64 b = Max(app->last_bin - BINS + 1, 0);
			 b <= app->last_bin && (b + BINS) * BIN_MS <= last; b++)
			n += app->ended[b % BINS];
	}
	LWLockRelease(shared->lock);
	return Max(n, 0) + minutes * per_minute;
}

/*
 * What a server's ledger says was called before shared memory was new: counts
 * as ended now, once.
 */
void
quota_calls_seed(uint64 application, Oid server, int n, int64 now)
{
	Application *app;
	bool		known = false;

	LWLockAcquire(shared->lock, LW_EXCLUSIVE);
	app = application_find(application);
	for (int i = 0; app != NULL && i < app->nseeded; i++)
		known |= app->seeded[i].database == MyDatabaseId && app->seeded[i].server == server;
	if (app != NULL && !known)
	{
		if (app->nseeded < SEEDS)
			app->seeded[app->nseeded++] = (Seed) {MyDatabaseId, server};
		(void) calls_counted(app, now);
		app->ended[app->last_bin % BINS] += n;
	}
	LWLockRelease(shared->lock);
}

void
quota_calls_ended(uint64 application, int n, int64 now)
{
	Application *app;

	LWLockAcquire(shared->lock, LW_EXCLUSIVE);
	app = application_find(application);
	if (app != NULL)
	{
		(void) calls_counted(app, now);
		app->in_flight = Max(app->in_flight - n, 0);
		app->ended[app->last_bin % BINS] += n;
		app->used_at = now;
	}
	LWLockRelease(shared->lock);
	held_add(application, -n);
}

void
quota_calls_return(uint64 application, int n)
{
	Application *app;

	LWLockAcquire(shared->lock, LW_EXCLUSIVE);
	app = application_find(application);
	if (app != NULL)
		app->in_flight = Max(app->in_flight - n, 0);
	LWLockRelease(shared->lock);
	held_add(application, -n);
}

static bool
is_waiter(const Application *app, Oid server)
{
	return app->job_waiter == MyProcPid && app->job_waiter_server == server;
}

/*
 * One job at a time for an application, whoever's; idempotent for a holder.
 * Who asked in vain has the next turn, if he keeps asking.
 */
bool
quota_job_slot_take(uint64 application, Oid server, int64 now)
{
	Application *app;
	bool		mine = false;

	LWLockAcquire(shared->lock, LW_EXCLUSIVE);
	app = application_find(application);
	if (app != NULL && app->job_holder == MyProcPid && app->job_server == server)
		mine = true;
	else if (app != NULL && app->job_holder == 0 &&
			 (is_waiter(app, server) || now - app->job_waiting > WAITER_MS))
	{
		app->job_holder = MyProcPid;
		app->job_server = server;
		app->job_waiting = 0;
		app->job_waiter = 0;
		mine = true;
	}
	else if (app != NULL &&
			 (is_waiter(app, server) || now - app->job_waiting > WAITER_MS))
	{
		app->job_waiter = MyProcPid;
		app->job_waiter_server = server;
		app->job_waiting = now;
	}
	LWLockRelease(shared->lock);
	return mine;
}

void
quota_job_slot_release(uint64 application, Oid server)
{
	LWLockAcquire(shared->lock, LW_EXCLUSIVE);
	for (int i = 0; i < shared->n; i++)
	{
		Application *app = &shared->applications[i];

		if (app->job_holder == MyProcPid && (application == 0 || app->id == application) &&
			(!OidIsValid(server) || app->job_server == server))
			app->job_holder = 0;
	}
	LWLockRelease(shared->lock);
}

/* Everything this process holds, whatever ends it */
void
quota_give_back(void)
{
	for (int i = 0; i < (int) lengthof(held); i++)
		if (held[i].in_flight > 0)
			quota_calls_ended(held[i].application, held[i].in_flight, clock_now());
	quota_job_slot_release(0, InvalidOid);
}

/* Whether someone else than this server waits for the slot */
bool
quota_job_slot_wanted(uint64 application, Oid server, int64 now)
{
	Application *app;
	bool		wanted;

	if (application == 0)
		return false;			/* none is held */
	LWLockAcquire(shared->lock, LW_EXCLUSIVE);
	app = application_find(application);
	wanted = app != NULL && app->job_waiter != 0 && !is_waiter(app, server) &&
		now - app->job_waiting <= WAITER_MS;
	LWLockRelease(shared->lock);
	return wanted;
}
