/*
 * pending.h
 *	  Entities waiting in, or travelling through, the real-time lane.
 */
#ifndef USERPILOT_PENDING_H
#define USERPILOT_PENDING_H

#include "sender.h"

/* An entity held by a job is looked at again after so long (API ms) */
#define HELD_MS 1000

extern void pending_init(Realtime *rt);
extern Pending *pending_find(const Realtime *rt, EntityKey key);

/* Adds a queue row to its entity, which is made if need be */
extern Pending *pending_add(Realtime *rt, const QueueRow *row);
extern void pending_free(Realtime *rt, Pending *pending);

/* What the first nrows of its rows take */
extern int64 pending_bytes(const Pending *pending, int nrows);

/* One of an entity's rows, which the bulk lane hands over with all it has */
extern void pending_add_solo(Realtime *rt, const QueueRow *row, bool helped);

/* A job has seen to this row: it waits no longer */
extern void pending_forget(Realtime *rt, EntityKey key, const ItemPointerData *tid, uint64 lsn);

/* Lets those go whose time has come; when the first of all may go, INT64_MAX:
 * none is there */
extern void pending_recall(Realtime *rt, int64 now);
extern int64 pending_due_at(const Realtime *rt);

/* A call of it starts: the next one waits a while */
extern void pending_called(Realtime *rt, Pending *pending, int64 now);

/* Its body is no longer under way: back to waiting, what was sent unknown */
extern void pending_wait(Realtime *rt, Pending *pending, int64 not_before);

/* realtime.c, for realtime_answers.c */
extern void realtime_delete_sent(Sender *sender, Pending **done, int n);
extern void realtime_write_profiles(Sender *sender, Pending **pending, int n,
									ProfileStep step);

/* realtime_answers.c, for realtime.c: its rows become dead letters; result
 * NULL: nothing was sent */
extern void realtime_bury(Sender *sender, Pending *pending, const HttpResult *result,
						  const char *error);

/* The rows its body covered are done with; it waits again if it has more */
extern void pending_drop_sent(Realtime *rt, Pending *pending);

#endif
