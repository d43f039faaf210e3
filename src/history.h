/*
 * history.h
 *	  What people read afterwards: userpilot_requests and userpilot_progress.
 */
#ifndef USERPILOT_HISTORY_H
#define USERPILOT_HISTORY_H

#include "datatype/timestamp.h"

#include "http.h"
#include "userpilot.h"

/* One HTTP call has ended; honours userpilot.log_requests */
typedef struct HistoryCall
{
	const char *server;
	const char *method;
	const char *path;
	int64		job;			/* 0: none */
	UserpilotKind kind;			/* with entity_id */
	const char *entity_id;		/* NULL: none */
	int			entity_len;
	const char *outcome;
	const char *error;			/* NULL: none */
} HistoryCall;

extern void history_call(const HistoryCall *call, const HttpResult *result);

/* Deletes what userpilot.retention and _rows do not keep, and records of
 * bulk SELECTs that no row refers to any more */
extern void history_prune(void);

typedef struct HistoryProgress
{
	const char *state;
	int64		rows[USERPILOT_KINDS][2];	/* by kind and bulk */
	TimestampTz oldest;			/* 0: none */
	int64		delivered;
	TimestampTz since;			/* 0: nothing to deliver */
	double		per_minute;		/* 0: not measured */
	const char *advice;			/* NULL: none */
	const char *last_error;		/* NULL: left as it was */
} HistoryProgress;

extern void history_progress(const char *server, const HistoryProgress *progress);

#endif
