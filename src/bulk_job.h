/*
 * bulk_job.h
 *	  The ends a job can come to, shared by the bulk lane's files.
 */
#ifndef USERPILOT_BULK_JOB_H
#define USERPILOT_BULK_JOB_H

#include "sender.h"

extern void bulk_enter(Bulk *bulk, BulkState state, int64 at);

/* How long the job should take (API ms) */
extern int64 bulk_expected_ms(const Bulk *bulk);

/* A job that never left is no more: what it holds is free */
extern void bulk_put_back(Sender *sender, const Job *job);
extern void bulk_refused(Sender *sender, const char *error, bool give_back);
extern void bulk_dissolved(Sender *sender, const char *error);
extern void bulk_completed(Sender *sender);
extern void bulk_set_done(Sender *sender);
extern void bulk_failed(Sender *sender, int64 now);
/* No proper answer came, and it turns out not to be running */
extern void bulk_never_arrived(Sender *sender);
extern void bulk_unknown(Sender *sender, const char *error, int64 now);

/* What some records of an acknowledged job said; false: there are none */
extern bool bulk_learn_chunk(Sender *sender, const Job *job, int seq);

/* Until the rows of an acknowledged job are gone there is no pass over the queue */
extern bool bulk_pass_waits(const Bulk *bulk);

/* What has left the queue is told to userpilot_batches now and then */
extern void bulk_report_gone(Sender *sender);

extern void bulk_forget_plan(Sender *sender);

#endif
