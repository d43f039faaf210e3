/*
 * sender.h
 *	  One server as the worker serves it: its environment, its two lanes and
 *	  what is said of it in userpilot_progress.
 *
 * Functions named …_answered, …_look, …_wave and so on run inside one of the
 * worker's transactions; …_start only after it has committed, because no body
 * leaves before its mark is durable.
 */
#ifndef USERPILOT_SENDER_H
#define USERPILOT_SENDER_H

#include "lib/ilist.h"
#include "storage/block.h"

#include "delivery.h"
#include "entities.h"
#include "environment.h"
#include "held_job.h"
#include "http.h"
#include "quota.h"
#include "profiles.h"
#include "queue.h"
#include "state.h"

/* Pace and circuit of one lane; times in API ms */
typedef struct Lane
{
	int64		not_before;		/* nothing starts before */
	int64		last_success;
	int			throttled;		/* refusals for going too fast, in a row */
	int			outages;		/* failed probes in a row; 0: circuit closed */
} Lane;

/* An entity waiting in, or travelling through, the real-time lane */
typedef enum PendingState
{
	PENDING_WAITING,
	PENDING_READY,				/* marked; goes when a connection is free */
	PENDING_CALLING
} PendingState;

/* Where it waits: what is fresh goes first */
typedef enum PendingList
{
	WAITING_FRESH,
	WAITING_SOLO,				/* handed over by the bulk lane */
	WAITING_LATER				/* not before its time */
} PendingList;

#define WAITING_LISTS (WAITING_LATER + 1)

typedef struct Pending
{
	EntityKey	key;
	MemoryContext context;		/* of this and all it points to */
	dlist_node	node;			/* in waiting, ready or calling */
	PendingState state;
	bool		solo;			/* handed over by the bulk lane, all its rows */
	bool		helped;			/* ... to spare a job the record, not dissolved */
	QueueRow  **rows;
	int			nrows;
	int			maxrows;
	int			nsent;			/* first rows, covered by the body under way */
	int			nprovisional;	/* first rows, sent beside an overdue job */
	bool		provisional;	/* the body under way is */
	TimestampTz read_in;		/* the step that read its first row */
	int64		not_before;
	int64		failed_at;
	bool		forbidden;		/* with 403, once */
	int64		started_at;
	uint64		application;	/* whose quota the body counts against */
	MemoryContext merge_context;
	Profile		profile;
	HttpPiece	body;
} Pending;

/* Rows in memory, and what their metadata takes */
typedef struct RowCount
{
	int			rows;
	int64		bytes;
} RowCount;

typedef struct Realtime
{
	Lane		lane;
	MemoryContext context;
	entities_hash *pending;
	entities_hash *called[2];	/* entities called lately, and before that */
	MemoryContext called_context[2];
	int64		called_since;	/* when the first of them was begun */
	dlist_head	waiting[WAITING_LISTS];
	int64		later_at;		/* earliest not_before in WAITING_LATER */
	dlist_head	ready;
	dlist_head	calling;
	int			nready;
	int			ncalling;
	RowCount	fresh;			/* rows of entities that looks have found ... */
	RowCount	solo;			/* ... and of those the bulk lane handed over */
	int			solos;
	QueueSeen  *seen;			/* by the last look, NULL: none yet */
	bool		overflow;		/* more is queued than fits */
	bool		moved;			/* rows were not where they had been read */
	int64		denied_until;	/* the limit on calls lets nothing go before */
	int64		solo_since;		/* calls of WAITING_SOLO are paid for up to here */
	int64		solo_at;		/* none of them goes before */
} Realtime;

/* What a call is for; the owner of its result */
typedef struct Call
{
	struct Sender *sender;
	Pending    *pending;		/* NULL: the bulk lane's */
	uint64		application;	/* whose quota it counts against */
} Call;

typedef enum BulkState
{
	BULK_IDLE,
	BULK_ASK,					/* is the slot free? */
	BULK_PREPARE,				/* it is: make a job of what is queued */
	BULK_SUBMIT,				/* the job is prepared or refused for a while */
	BULK_RUNNING,				/* accepted: poll */
	BULK_UNKNOWN				/* did it arrive? */
} BulkState;

typedef struct Bulk
{
	Lane		lane;
	MemoryContext context;
	BulkState	state;
	bool		calling;
	MemoryContext body_context;
	HttpPiece  *body;
	int			npieces;
	Call		call;			/* the one under way */
	/* a job goes from one to the next; there is always room for each */
	HeldJob    *next;			/* prepared */
	HeldJob    *current;		/* on its way, or running */
	HeldJob    *done;			/* acknowledged: to be learnt, its rows deleted */
	struct Plan *plan;			/* of the next jobs, or NULL */
	uint32		passes;			/* over the queue, to make plans */
	entities_hash *solo;		/* ... of dissolved jobs */
	BlockNumber position;		/* the next sweep begins here */
	bool		dirty;			/* something may be there to sweep */
	bool		after_solos;	/* ... once the real-time lane has sent them */
	int			record_limit;	/* halved by 413, doubled after ten such jobs */
	int64		since_shrunk;	/* records taken since then */
	int64		next_at;
	int64		since;			/* submitted, or waiting for the slot */
	int64		ends_at;		/* when the running job should be over */
	int64		unknown_looks;	/* lists seen without the job, in a row */
	int			lost;			/* submissions without a proper answer, in a row */
	int64		lost_since;		/* start of the first of them */
	int			conflicts;		/* refusals for the moment, in a row */
	bool		in_doubt;		/* a submission of the job may have arrived */
	bool		bind_anew;		/* its body is not to be submitted again */
	bool		said_over;		/* by the list, which does not say how it ended */
	bool		poll_failed;	/* that is why it is looked for in the list */
	bool		waiting_for_slot;
	uint64		slot_application;	/* whose job slot is held, 0: none */
	MemoryContext solo_context;
	MemoryContext batches_context;
	MergeBatches batches;
	int64	   *gone;			/* rows that have left, less what was reported */
	bool		any_gone;
	int64		call_started;
	int64		failed_since[DELIVERY_CALLS];	/* start of the first call that
												 * failed in a row (of submissions:
												 * with 403), 0: none */
	int			last_completed; /* records of the running job, as polled */
} Bulk;

typedef struct Sender
{
	MemoryContext context;
	Oid			serverid;
	MemoryContext env_context;
	Environment *env;
	bool		stale;			/* no longer enabled: drop when idle */
	Http	   *http;
	bool		paused;			/* key refused */
	uint64		paused_fingerprint;
	int64		paused_probe_at;
	int			pauses;			/* in a row, without a success of ... */
	Lane	   *paused_lane;	/* ... the lane that was refused last */
	Realtime	rt;
	Bulk		bulk;

	/* for userpilot_progress */
	int64		counted[USERPILOT_KINDS][2];
	TimestampTz oldest;
	int64		delivered;
	TimestampTz delivering_since;
	int64		delivering_since_ms;
	char		last_error[512];
	bool		error_is_new;
	char		pause_reason[512];
	int64		reported_at;
	char		reported_state[32];
} Sender;

/* sender.c */
extern Sender *sender_create(MemoryContext parent, Oid serverid, Http *http);
extern void sender_destroy(Sender *sender);

/* Reads options and key again; false if the server is gone */
extern bool sender_reload(Sender *sender);
extern bool sender_may_send(const Sender *sender);

/* Asked in the transaction that is about to take something along: what was
 * committed after userpilot_disable() must not leave */
extern bool sender_still_enabled(Sender *sender);
/* How long after its mark a body may leave at most (API ms) */
extern int64 sender_call_delay(const Environment *env);
extern void sender_error(Sender *sender, const char *error);
extern void sender_delivered(Sender *sender, int64 records);
extern bool sender_has_work(const Sender *sender);
extern int64 sender_next_at(const Sender *sender, int64 now);
extern void sender_report(Sender *sender, int64 now, bool force);

/* A lane's circuit */
extern void lane_apply(Sender *sender, Lane *lane, const DeliveryDecision *decision,
					   int64 now, const char *error);
extern DeliveryAnswer sender_answer(const Sender *sender, DeliveryCall call,
									const HttpResult *result);
extern double sender_random(void);

/* Rows of an entity become dead letters, and the log says so; returns how many */
extern uint64 sender_bury(EntityKey key, const QueueRow *rows, int n, const QueueFailure *why);

/* Why an entity's changes are not sent, see MergeEntity.too_much */
extern char *sender_too_much(UserpilotKind kind);
extern char *sender_error_text(const HttpResult *result);
extern char *sender_answer_text(const HttpResult *result);

/* Marked entities per connection: enough to keep each busy over a commit */
#define REALTIME_READY_PER_CONNECTION 4

/* realtime.c */
extern void realtime_give_back(Sender *sender);
/* What is marked and has not left is to be merged again */
extern void realtime_withdraw(Sender *sender);

/* Whether there is room for more of what the bulk lane hands over */
extern bool realtime_takes_solos(const Sender *sender);

/* Reads which bulk SELECTs are on record: a merge compares with them */
extern void bulk_reload_batches(Sender *sender);
extern void realtime_init(Sender *sender);
extern void realtime_reset_look(Sender *sender);
extern void realtime_look(Sender *sender);
extern void realtime_look_again(Sender *sender);
extern bool realtime_wave_due(const Sender *sender, int64 now);
extern bool realtime_wave(Sender *sender, int64 now);
extern void realtime_start(Sender *sender, int64 now);
extern void realtime_answered(Sender *sender, HttpResult **results, int n, int64 now);
extern bool realtime_backlogged(const Sender *sender);
extern bool realtime_in_flight(const Sender *sender, EntityKey key, uint32 hash);
extern void realtime_add_solo(Sender *sender, QueueRow **rows, int n, bool helped);
/* Calls a minute that may be spent on what the bulk lane hands over */
extern int	realtime_solo_limit(int per_minute);
extern int64 realtime_next_at(const Sender *sender, int64 now);

/* bulk.c, bulk_answers.c, bulk_done.c, sweep.c */
extern void bulk_init(Sender *sender);
extern void bulk_recover(Sender *sender);
/* What is prepared and has not left is to be prepared again */
extern void bulk_withdraw(Sender *sender);
extern bool bulk_due(const Sender *sender, int64 now);
extern bool bulk_step(Sender *sender, int64 now);
extern bool bulk_busy(const Sender *sender);
extern void bulk_release_slot(Sender *sender);
extern void bulk_start(Sender *sender, int64 now);
extern void bulk_answered(Sender *sender, HttpResult *result, int64 now);
extern bool bulk_prepare(Sender *sender, bool ahead);
extern bool bulk_ahead_due(const Sender *sender, int64 now);
extern void bulk_changed(Sender *sender);
extern bool bulk_done_due(const Sender *sender, int64 now);
extern void bulk_row_gone(Sender *sender, UserpilotKind kind, int64 batch);
/* What is left to do once a job is over: some of it, all of it */
extern void bulk_done_step(Sender *sender);
extern void bulk_done_finish(Sender *sender);
/* The running job takes far longer than it should */
extern bool bulk_overdue(const Bulk *bulk, int64 now);
extern bool bulk_holds(const Sender *sender, EntityKey key, uint32 hash);
/* ... for a running job that takes so long that newer changes go out beside it */
extern bool bulk_holds_overdue(const Sender *sender, EntityKey key, int64 now);
extern int64 bulk_next_at(const Sender *sender, int64 now);

#endif
