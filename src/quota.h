/*
 * quota.h
 *	  Shared memory: what one application (endpoint and key) may do.
 */
#ifndef USERPILOT_QUOTA_H
#define USERPILOT_QUOTA_H

#define QUOTA_TRANCHE "userpilot quota"

/* Called by state.c when shared memory is laid out */
extern Size quota_size(void);
extern void quota_startup(void);

/* The launcher: every database has seeded what its ledgers say */
extern void quota_open(void);

/* Everything this process holds, whatever ends it */
extern void quota_give_back(void);

/* An application is told by its fingerprint; times are API ms */
extern int	quota_calls_take(uint64 application, int per_minute, int wanted,
							 int64 now, int64 *wait_until);
/* How many may be started from now until then: what comes free of the last
 * minute's calls, and all of them again each minute */
extern int64 quota_calls_until(uint64 application, int per_minute, int64 now, int64 until);
extern void quota_calls_seed(uint64 application, Oid server, int n, int64 now);
/* ... which are not made after all */
extern void quota_calls_return(uint64 application, int n);
extern void quota_calls_ended(uint64 application, int n, int64 now);
extern bool quota_job_slot_take(uint64 application, Oid server, int64 now);
/* ... 0: of every application; InvalidOid: of every server */
extern void quota_job_slot_release(uint64 application, Oid server);
extern bool quota_job_slot_wanted(uint64 application, Oid server, int64 now);

#endif
