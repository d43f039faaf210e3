/*
 * payload.h
 *	  Request bodies.  Pure: what goes in comes from the caller's memory.
 *
 * Bodies are built in the database's encoding; payload_utf8 makes them what
 * the API takes.
 */
#ifndef USERPILOT_PAYLOAD_H
#define USERPILOT_PAYLOAD_H

#include "lib/stringinfo.h"
#include "utils/jsonb.h"

#include "merge.h"
#include "userpilot.h"

/* The record of a bulk body: {"company_id":"…","metadata":{…}} and
 * {"user_id":"…","company_id":"…","metadata":{…}}; company_id NULL if none */
extern void payload_record(StringInfo out, UserpilotKind kind,
						   const char *id, int id_len,
						   const char *company_id, int company_len,
						   Jsonb *metadata);

/* The same of what merge decided to send */
extern void payload_merged(StringInfo out, UserpilotKind kind,
						   const char *id, int id_len,
						   const MergeEntity *entity);

/* The body of a single call; a user's company is {"id":"…"} there */
extern void payload_single(StringInfo out, UserpilotKind kind,
						   const char *id, int id_len,
						   const MergeEntity *entity);

/* What stands around and between the records of a JSON bulk body */
extern const char *payload_open(UserpilotKind kind);
extern const char *payload_close(void);

/* UTF-8 of text in the database's encoding; the text itself if it is that */
extern char *payload_utf8(char *text, int len, int *utf8_len);

/* ... and how long it would be */
extern int	payload_utf8_len(char *text, int len);

/* JSON scalars and merge's: points into the JsonbValue's memory */
extern bool payload_to_merge(const JsonbValue *value, MergeValue *out);
extern void payload_trim_number(MergeValue *value);
extern void payload_from_merge(const MergeValue *value, JsonbValue *out);

#endif
