/*
 * http.h
 *	  HTTPS calls, many at a time, from a process that must keep answering
 *	  its latch.  Only http.c, http_transfer.c and http_url.c know libcurl.
 *
 * Knows nothing of the database.  No callback of libcurl's allocates from
 * PostgreSQL or raises an error.
 */
#ifndef USERPILOT_HTTP_H
#define USERPILOT_HTTP_H

typedef struct Http Http;

/* Where calls go and how they are trusted.  Copied by http_start. */
typedef struct HttpTarget
{
	const char *endpoint;		/* base URL without trailing slash or /v1 */
	const char *api_key;
	const char *ca_file;		/* NULL: the system's */
	const char *proxy;			/* NULL: none; the environment is ignored */
	int			timeout_ms;		/* of a call; an upload gets 1 s per 64 kB on
								 * top */
} HttpTarget;

/* A body in pieces; the memory must live until the call has ended */
typedef struct HttpPiece
{
	const char *data;
	size_t		len;
} HttpPiece;

typedef struct HttpCall
{
	const char *method;			/* "GET" or "POST" */
	const char *path;			/* "/v1/…", already percent-encoded */
	const HttpPiece *body;
	int			npieces;
	const char *filename;		/* if set: multipart upload, part "file" */
	bool		once;			/* over a new connection, so that libcurl does
								 * not repeat it when a kept one was dead */
	void	   *owner;			/* handed back with the result */
} HttpCall;

typedef enum HttpOutcome
{
	HTTP_ANSWERED,				/* status line, headers and whole body */
	HTTP_NOT_SENT,				/* nothing of the request can have arrived */
	HTTP_LOST					/* the request may have been acted upon */
} HttpOutcome;

#define HTTP_MAX_ANSWER (1024 * 1024)

typedef struct HttpResult
{
	void	   *owner;
	HttpOutcome outcome;
	int			status;			/* 0 unless answered */
	char	   *body;			/* NUL-terminated, at most HTTP_MAX_ANSWER, the
								 * key masked; "" unless answered */
	size_t		body_len;
	char		request_id[128];	/* x-request-id, printable, or "" */
	int			retry_after;	/* seconds, -1 if absent or unreadable */
	bool		too_long;		/* lost because of its length */
	bool		dropped;		/* lost with a connection that was kept: it says
								 * nothing of the server */
	double		ms;
	int64		bytes_sent;		/* of the body */
	char		error[256];		/* in words, without key; "" if answered */
} HttpResult;

/*
 * A set of calls.  Freed with its memory context (reset callback), which drops
 * calls in flight at once.  More calls than max_connections may be started;
 * they wait for their turn, their time not yet running.  Raises if memory is
 * short or outside a running server.
 */
extern Http *http_create(MemoryContext context, int max_connections);

/* Starts a call; false, with *error set to a static text, if it cannot even
 * be started (control characters in key or path, out of memory). */
extern bool http_start(Http *http, const HttpTarget *target,
					   const HttpCall *call, const char **error);

/*
 * Waits for the latch, the postmaster's death (exits then) or any call's
 * progress, at most timeout_ms (-1: for ever), and lets calls progress.
 * Returns at once while http_next has something.  Resets the latch if it was
 * set and returns whether it was: the caller then checks for interrupts.
 */
extern bool http_wait(Http *http, long timeout_ms, uint32 wait_event);

/* The next call that has ended, or NULL.  Free with http_result_free. */
extern HttpResult *http_next(Http *http);
extern void http_result_free(HttpResult *result);

/* Percent-encodes one path segment (palloc'd) */
extern char *http_encode_segment(const char *text);

/* Checks a base URL and strips a trailing "/" or "/v1": palloc'd, or NULL
 * with *problem, a static text, saying why not ("http is accepted for loopback
 * only", …). */
extern char *http_check_endpoint(const char *url, const char **problem);

#endif
