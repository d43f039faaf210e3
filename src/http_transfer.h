/*
 * http_transfer.h
 *	  One HTTP call as libcurl sees it; private to http.c and http_transfer.c.
 */
#ifndef USERPILOT_HTTP_TRANSFER_H
#define USERPILOT_HTTP_TRANSFER_H

#include <curl/curl.h>

#include "lib/ilist.h"
#include "portability/instr_time.h"

#include "http.h"

#if LIBCURL_VERSION_NUM < 0x075800
#error "userpilot needs libcurl 7.88 or later"
#endif

/* From http_start until http_next has handed its result out; malloc'd */
typedef struct HttpTransfer
{
	dlist_node	node;			/* http.c's */
	CURL	   *easy;			/* NULL once ended */
	CURLM	   *multi;			/* what "easy" has been added to, or NULL */
	struct curl_slist *headers; /* the first one holds the key */
	curl_mime  *mime;
	char	   *key;
	char	   *proxy;

	/* the body, and how far libcurl has read it */
	HttpPiece  *body;
	int			npieces;
	int			piece;
	size_t		offset;
	curl_off_t	size;

	/* what came of it */
	bool		begun;			/* the request may have left us */
	bool		headed;			/* the answer's headers are whole */
	const char *refusal;		/* why we broke it off, static, or NULL */
	size_t		header_bytes;
	size_t		body_room;
	instr_time	started;
	char		message[CURL_ERROR_SIZE];
	HttpResult	result;			/* its body is malloc'd, or NULL */
} HttpTransfer;

/* NULL, with *error set to a static text, if there can be no such call */
extern HttpTransfer *http_transfer_new(const HttpTarget *target,
									   const HttpCall *call,
									   const char **error);

/* Fills in the result and frees all but that */
extern void http_transfer_end(HttpTransfer *transfer, CURLcode code);
extern void http_transfer_free(HttpTransfer *transfer);

#endif
