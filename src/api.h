/*
 * api.h
 *	  The endpoints of the Userpilot HTTP API and the JSON of their answers.
 *
 * Sources: the public OpenAPI pages "Identify Company", "Bulk Companies
 * Update", "Bulk Users Update"; what they leave open is said where it is used.
 */
#ifndef USERPILOT_API_H
#define USERPILOT_API_H

#include "http.h"
#include "userpilot.h"

/* A background job as the API shows it; strings palloc'd, "" if absent */
typedef struct ApiJob
{
	char	   *job_id;
	char	   *status;
	char	   *filename;
	int64		total_rows;		/* -1 if absent */
	int64		completed_rows; /* -1 if absent */
} ApiJob;

extern bool api_identify(Http *http, const HttpTarget *target,
						 UserpilotKind kind, const HttpPiece *body,
						 void *owner, const char **error);

/* filename NULL: JSON in the body; else NDJSON as a file of that name */
extern bool api_submit(Http *http, const HttpTarget *target,
					   UserpilotKind kind, const HttpPiece *body, int npieces,
					   const char *filename, void *owner, const char **error);
extern bool api_job(Http *http, const HttpTarget *target, const char *job_id,
					void *owner, const char **error);
extern bool api_jobs(Http *http, const HttpTarget *target,
					 void *owner, const char **error);

/* Path of each call, for the request log */
extern const char *api_identify_path(UserpilotKind kind);
extern const char *api_submit_path(UserpilotKind kind);

/*
 * The readers need no transaction and never raise, whatever the answer holds,
 * but for a query cancel.  They must not be called while an error is being
 * handled: they may forget it.  Texts come in the server's encoding, with "?"
 * for what it lacks.
 */

/* false: not JSON of that shape */
/* One id has two forms: the short one ends the long one, after a colon */
extern bool api_same_job(const char *a, const char *b);

extern bool api_read_job(const char *body, size_t len, ApiJob *job);

/*
 * true: *jobs is an array of *n (palloc'd).  Elements that are no jobs are
 * left out, but if nothing else is there, it is no list of jobs: false.
 */
extern bool api_read_jobs(const char *body, size_t len, ApiJob **jobs, int *n);

/* Whether a status is final: completed or failed */
extern bool api_job_is_final(const char *status);

/*
 * An answer in words for a person: the API's own error message where its
 * body has one, at most 500 bytes, printable, in the server encoding.
 */
extern char *api_error_text(const HttpResult *result);

/* An answer's body as it may stand in a table: printable, at most max bytes */
extern char *api_body_text(const HttpResult *result, int max);

#endif
