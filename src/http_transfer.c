/*
 * http_transfer.c
 *	  One HTTP call: its options, its body, its answer, its outcome.
 *
 * What libcurl calls back here allocates with malloc and raises nothing; a
 * callback that cannot go on says why in "refusal" and returns failure.
 *
 * The peer is not trusted: answers are bounded in size, headers and speed,
 * redirects are not followed, nothing is decompressed, and the key is masked
 * where it comes back.
 */
#include "postgres.h"

#include <ctype.h>
#include <limits.h>
#include <time.h>

#include "http_transfer.h"
#include "userpilot.h"

#define MAX_HEADER_BYTES (64 * 1024)
#define MAX_CONNECT_MS 10000
#define UPLOAD_BYTES_PER_MS 64	/* the slowest upload that is waited for */
#define UPLOAD_BUFFER (256 * 1024)	/* a job's body should leave in few pieces */
#define SLOWEST_BYTES 1024L		/* a second, of upload or answer */
#define CA_CACHE_SECONDS 600L	/* how long a replaced CA file may linger */
#define MIN_MASKED_KEY 8		/* shorter ones would mask ordinary text */

/* Refusing an option is visible: the caller's function returns false */
#define SETOPT(easy, option, value) \
	do { \
		if (curl_easy_setopt((easy), (option), (value)) != CURLE_OK) \
		{ \
			*error = "libcurl refuses " #option; \
			return false; \
		} \
	} while (0)

/* ---------- what libcurl calls ---------- */

/*
 * The connection stands and the request is about to be written.  Called again
 * if libcurl would repeat it because a kept connection turned out to be dead:
 * not behind our back, as it may have arrived, and calls are counted.
 */
static int
note_begun(void *arg, char *primary_ip, char *local_ip, int primary_port,
		   int local_port)
{
	HttpTransfer   *transfer = (HttpTransfer *) arg;

	if (transfer->begun)
	{
		transfer->refusal = "the kept connection was closed without an answer";
		transfer->result.dropped = true;
	}
	transfer->begun = true;
	return transfer->refusal ? CURL_PREREQFUNC_ABORT : CURL_PREREQFUNC_OK;
}

static size_t
read_body(char *buffer, size_t size, size_t nitems, void *arg)
{
	HttpTransfer   *transfer = (HttpTransfer *) arg;
	size_t		room = size * nitems;
	size_t		done = 0;

	while (done < room && transfer->piece < transfer->npieces)
	{
		const HttpPiece *piece = &transfer->body[transfer->piece];
		size_t		n = Min(room - done, piece->len - transfer->offset);

		if (n > 0)
			memcpy(buffer + done, piece->data + transfer->offset, n);
		done += n;
		transfer->offset += n;
		if (transfer->offset == piece->len)
		{
			transfer->piece++;
			transfer->offset = 0;
		}
	}
	return done;
}

static int
seek_body(void *arg, curl_off_t offset, int origin)
{
	HttpTransfer   *transfer = (HttpTransfer *) arg;

	if (origin != SEEK_SET || offset < 0 || offset > transfer->size)
		return CURL_SEEKFUNC_FAIL;
	transfer->piece = 0;
	while (transfer->piece < transfer->npieces &&
		   (size_t) offset >= transfer->body[transfer->piece].len)
		offset -= transfer->body[transfer->piece++].len;
	transfer->offset = (size_t) offset;
	return CURL_SEEKFUNC_OK;
}

/* Keeps a piece of the answer's body, up to the cap */
static size_t
write_body(char *data, size_t size, size_t nitems, void *arg)
{
	HttpTransfer   *transfer = (HttpTransfer *) arg;
	HttpResult *result = &transfer->result;
	size_t		len = size * nitems;

	if (len > HTTP_MAX_ANSWER - result->body_len)
	{
		transfer->refusal = "the answer is longer than 1 MB";
		result->too_long = true;
		return CURL_WRITEFUNC_ERROR;
	}
	if (result->body_len + len + 1 > transfer->body_room)
	{
		size_t		room = Max(1024, 2 * (result->body_len + len));
		char	   *grown = realloc(result->body, room);

		if (grown == NULL)
		{
			transfer->refusal = "out of memory";
			return CURL_WRITEFUNC_ERROR;
		}
		result->body = grown;
		transfer->body_room = room;
	}
	memcpy(result->body + result->body_len, data, len);
	result->body_len += len;
	result->body[result->body_len] = '\0';
	return len;
}

/* Retry-After: seconds or a date; -1 if it is neither */
static int
parse_retry_after(const char *value)
{
	time_t		when;

	if (isdigit((unsigned char) value[0]))
	{
		char	   *end;
		long		seconds = strtol(value, &end, 10);	/* LONG_MAX if over */

		return *end != '\0' ? -1 : (int) Min(seconds, INT_MAX);
	}
	if (!isalpha((unsigned char) value[0]))
		return -1;
	when = curl_getdate(value, NULL);
	if (when < 0)
		return -1;
	return (int) Min(Max(when - time(NULL), 0), INT_MAX);
}

/*
 * If a header has this name, copies its value, trimmed and cut to "size".
 * What is not printable ASCII becomes "?".
 */
static bool
header_value(const char *line, size_t len, const char *name,
			 char *value, size_t size)
{
	size_t		namelen = strlen(name);
	size_t		n = 0;

	if (len <= namelen || line[namelen] != ':' ||
		pg_strncasecmp(line, name, namelen) != 0)
		return false;
	line += namelen + 1;
	len -= namelen + 1;
	while (len > 0 && isspace((unsigned char) line[len - 1]))
		len--;
	while (len > 0 && isspace((unsigned char) *line))
		line++, len--;
	for (; n < len && n < size - 1; n++)
		value[n] = (line[n] >= ' ' && line[n] <= '~') ? line[n] : '?';
	value[n] = '\0';
	return true;
}

/* One header line, not terminated; interim answers bring theirs, too */
static size_t
read_header(char *line, size_t size, size_t nitems, void *arg)
{
	HttpTransfer   *transfer = (HttpTransfer *) arg;
	HttpResult *result = &transfer->result;
	size_t		len = size * nitems;
	char		value[sizeof(result->request_id)];

	transfer->header_bytes += len;
	if (transfer->header_bytes > MAX_HEADER_BYTES)
	{
		transfer->refusal = "the answer's headers are longer than 64 kB";
		return CURL_WRITEFUNC_ERROR;
	}
	if (len > 5 && strncmp(line, "HTTP/", 5) == 0)
	{
		result->request_id[0] = '\0';
		result->retry_after = -1;
		transfer->headed = false;
	}
	else if (len > 0 && (line[0] == '\n' || (len == 2 && line[0] == '\r')))
		transfer->headed = true;
	else if (header_value(line, len, "x-request-id", value, sizeof(value)))
		strlcpy(result->request_id, value, sizeof(result->request_id));
	else if (header_value(line, len, "retry-after", value, sizeof(value)))
		result->retry_after = parse_retry_after(value);
	return len;
}

/* ---------- starting ---------- */

static bool
has_control_character(const char *text)
{
	for (; *text != '\0'; text++)
	{
		if ((unsigned char) *text < ' ' || *text == 0x7f)
			return true;
	}
	return false;
}

/* What could smuggle a header or a second request in, or makes no sense */
static const char *
find_problem(const HttpTarget *target, const HttpCall *call)
{
	if (target->api_key == NULL || target->api_key[0] == '\0')
		return "there is no API key";
	if (has_control_character(target->api_key))
		return "the API key contains a control character";
	if (target->endpoint == NULL || has_control_character(target->endpoint))
		return "the endpoint is not a URL";
	if (call->path[0] != '/' || has_control_character(call->path))
		return "the path is not one of a URL";
	if (call->filename != NULL && has_control_character(call->filename))
		return "the file name contains a control character";
	if (strcmp(call->method, "GET") != 0 && strcmp(call->method, "POST") != 0)
		return "the method is neither GET nor POST";
	return NULL;
}

static bool
add_header(HttpTransfer *transfer, const char *header)
{
	struct curl_slist *longer = curl_slist_append(transfer->headers, header);

	if (longer == NULL)
		return false;
	transfer->headers = longer;
	return true;
}

/* The key's header comes first: http_transfer_end wipes that one */
static bool
set_headers(HttpTransfer *transfer, const HttpCall *call, const char **error)
{
	size_t		room = strlen("Authorization: Token ") + strlen(transfer->key) + 1;
	char	   *authorization = malloc(room);
	bool		ok = false;

	if (authorization != NULL)
	{
		snprintf(authorization, room, "Authorization: Token %s", transfer->key);
		ok = add_header(transfer, authorization);
		explicit_bzero(authorization, room);
		free(authorization);
	}
	ok = ok &&
		add_header(transfer, "Accept: application/json, text/plain, */*") &&
		add_header(transfer, "X-API-Version: 2020-09-22") &&
		add_header(transfer, "Expect:");
	if (ok && strcmp(call->method, "POST") == 0 && call->filename == NULL)
		ok = add_header(transfer, "Content-Type: application/json");
	if (!ok)
	{
		*error = "out of memory";
		return false;
	}
	SETOPT(transfer->easy, CURLOPT_HTTPHEADER, transfer->headers);
	SETOPT(transfer->easy, CURLOPT_HEADEROPT, (long) CURLHEADER_SEPARATE);
	SETOPT(transfer->easy, CURLOPT_USERAGENT,
		   "userpilot-postgresql/" USERPILOT_VERSION);
	return true;
}

/* Whom we talk to, and why we may believe it */
static bool
set_peer(HttpTransfer *transfer, const HttpTarget *target, const char *path,
		 const char **error)
{
	CURL	   *easy = transfer->easy;
	bool		plain = pg_strncasecmp(target->endpoint, "http:", 5) == 0;
	size_t		room = strlen(target->endpoint) + strlen(path) + 1;
	char	   *url = malloc(room);
	CURLcode	code = CURLE_OUT_OF_MEMORY;

	if (url != NULL)
	{
		snprintf(url, room, "%s%s", target->endpoint, path);
		code = curl_easy_setopt(easy, CURLOPT_URL, url);
		free(url);
	}
	if (code != CURLE_OK)
	{
		*error = "the URL is too long or memory is short";
		return false;
	}
	SETOPT(easy, CURLOPT_PATH_AS_IS, 1L);
	SETOPT(easy, CURLOPT_DISALLOW_USERNAME_IN_URL, 1L);
	SETOPT(easy, CURLOPT_PROTOCOLS_STR, plain ? "http" : "https");
	SETOPT(easy, CURLOPT_FOLLOWLOCATION, 0L);
	SETOPT(easy, CURLOPT_NETRC, (long) CURL_NETRC_IGNORED);
	SETOPT(easy, CURLOPT_PROXY, target->proxy != NULL ? target->proxy : "");
	SETOPT(easy, CURLOPT_NOPROXY, "");
	SETOPT(easy, CURLOPT_SUPPRESS_CONNECT_HEADERS, 1L);
	SETOPT(easy, CURLOPT_HTTP_VERSION, (long) CURL_HTTP_VERSION_2TLS);
	SETOPT(easy, CURLOPT_SSLVERSION, (long) CURL_SSLVERSION_TLSv1_2);
	SETOPT(easy, CURLOPT_SSL_VERIFYPEER, 1L);
	SETOPT(easy, CURLOPT_SSL_VERIFYHOST, 2L);
	SETOPT(easy, CURLOPT_CA_CACHE_TIMEOUT, CA_CACHE_SECONDS);
	if (target->ca_file != NULL)
	{
		/*
		 * Instead of the system's, which come as a directory, too.  NULL as
		 * directory means that one from 8.20 on; below a file there is none.
		 */
		SETOPT(easy, CURLOPT_CAINFO, target->ca_file);
		SETOPT(easy, CURLOPT_CAPATH, target->ca_file);
	}
	return true;
}

/*
 * How long, how slow and how large.  The time an upload may take is added to
 * the call's, and the slowest speed bounds what a peer can make of the sum.
 */
static bool
set_limits(HttpTransfer *transfer, const HttpTarget *target, const char **error)
{
	CURL	   *easy = transfer->easy;
	long		timeout_ms = Max(target->timeout_ms, 1);
	curl_off_t	upload_ms = transfer->size / UPLOAD_BYTES_PER_MS;
	long		stall_ms = timeout_ms;

	/* TLS tells of no progress before a whole buffer has left */
	if (transfer->size > UPLOAD_BUFFER)
		stall_ms += UPLOAD_BUFFER / UPLOAD_BYTES_PER_MS;
	SETOPT(easy, CURLOPT_NOSIGNAL, 1L);
	SETOPT(easy, CURLOPT_QUICK_EXIT, 1L);
	SETOPT(easy, CURLOPT_TCP_KEEPALIVE, 1L);
	SETOPT(easy, CURLOPT_CONNECTTIMEOUT_MS, Min(timeout_ms, MAX_CONNECT_MS));
	SETOPT(easy, CURLOPT_TIMEOUT_MS,
		   (long) Min(timeout_ms + upload_ms, INT_MAX));
	SETOPT(easy, CURLOPT_LOW_SPEED_LIMIT, SLOWEST_BYTES);
	SETOPT(easy, CURLOPT_LOW_SPEED_TIME, (stall_ms + 999) / 1000);
	SETOPT(easy, CURLOPT_MAXFILESIZE_LARGE, (curl_off_t) HTTP_MAX_ANSWER);
	return true;
}

static bool
set_callbacks(HttpTransfer *transfer, const char **error)
{
	CURL	   *easy = transfer->easy;

	SETOPT(easy, CURLOPT_PRIVATE, transfer);
	SETOPT(easy, CURLOPT_ERRORBUFFER, transfer->message);
	SETOPT(easy, CURLOPT_PREREQFUNCTION, note_begun);
	SETOPT(easy, CURLOPT_PREREQDATA, transfer);
	SETOPT(easy, CURLOPT_HEADERFUNCTION, read_header);
	SETOPT(easy, CURLOPT_HEADERDATA, transfer);
	SETOPT(easy, CURLOPT_WRITEFUNCTION, write_body);
	SETOPT(easy, CURLOPT_WRITEDATA, transfer);
	return true;
}

/*
 * Method and body, which is read from the caller's pieces as it leaves.  Its
 * length is known, so it goes with Content-Length and never chunked.
 */
static bool
set_request(HttpTransfer *transfer, const HttpCall *call, const char **error)
{
	CURL	   *easy = transfer->easy;
	curl_mimepart *part;

	SETOPT(easy, CURLOPT_FRESH_CONNECT, call->once ? 1L : 0L);
	if (strcmp(call->method, "GET") == 0)
	{
		SETOPT(easy, CURLOPT_HTTPGET, 1L);
		return true;
	}
	if (transfer->size > UPLOAD_BUFFER)
		SETOPT(easy, CURLOPT_UPLOAD_BUFFERSIZE, (long) UPLOAD_BUFFER);
	if (call->filename == NULL)
	{
		SETOPT(easy, CURLOPT_POST, 1L);
		SETOPT(easy, CURLOPT_POSTFIELDSIZE_LARGE, transfer->size);
		/* so libcurl can send a small body together with the headers */
		SETOPT(easy, CURLOPT_POSTFIELDS, transfer->npieces == 1 ? transfer->body[0].data : NULL);
		SETOPT(easy, CURLOPT_READFUNCTION, read_body);
		SETOPT(easy, CURLOPT_READDATA, transfer);
		SETOPT(easy, CURLOPT_SEEKFUNCTION, seek_body);
		SETOPT(easy, CURLOPT_SEEKDATA, transfer);
		return true;
	}
	transfer->mime = curl_mime_init(easy);
	part = transfer->mime != NULL ? curl_mime_addpart(transfer->mime) : NULL;
	if (part == NULL ||
		curl_mime_name(part, "file") != CURLE_OK ||
		curl_mime_filename(part, call->filename) != CURLE_OK ||
		curl_mime_type(part, "application/x-ndjson") != CURLE_OK ||
		curl_mime_data_cb(part, transfer->size, read_body, seek_body, NULL,
						  transfer) != CURLE_OK)
	{
		*error = "out of memory";
		return false;
	}
	SETOPT(easy, CURLOPT_MIMEPOST, transfer->mime);
	return true;
}

/* Copies what the caller may free: everything but the body's bytes */
static bool
copy_call(HttpTransfer *transfer, const HttpTarget *target,
		  const HttpCall *call, const char **error)
{
	int			i;

	transfer->result.owner = call->owner;
	transfer->result.retry_after = -1;
	transfer->npieces = call->npieces;
	for (i = 0; i < call->npieces; i++)
		transfer->size += call->body[i].len;

	transfer->easy = curl_easy_init();
	transfer->key = strdup(target->api_key);
	transfer->proxy = strdup(target->proxy != NULL ? target->proxy : "");
	transfer->body = malloc(sizeof(HttpPiece) * Max(call->npieces, 1));
	if (transfer->easy == NULL || transfer->key == NULL ||
		transfer->proxy == NULL || transfer->body == NULL)
	{
		*error = "out of memory";
		return false;
	}
	if (call->npieces > 0)
		memcpy(transfer->body, call->body, sizeof(HttpPiece) * call->npieces);
	return true;
}

HttpTransfer *
http_transfer_new(const HttpTarget *target, const HttpCall *call,
				  const char **error)
{
	HttpTransfer *transfer;

	*error = find_problem(target, call);
	if (*error != NULL)
		return NULL;
	transfer = calloc(1, sizeof(HttpTransfer));
	if (transfer == NULL)
	{
		*error = "out of memory";
		return NULL;
	}
	if (!copy_call(transfer, target, call, error) ||
		!set_peer(transfer, target, call->path, error) ||
		!set_limits(transfer, target, error) ||
		!set_callbacks(transfer, error) ||
		!set_headers(transfer, call, error) ||
		!set_request(transfer, call, error))
	{
		http_transfer_free(transfer);
		return NULL;
	}
	return transfer;
}

/* ---------- ending ---------- */

/* Frees what only a running call needs; the key's memory is wiped */
static void
release(HttpTransfer *transfer)
{
	if (transfer->multi != NULL)
		curl_multi_remove_handle(transfer->multi, transfer->easy);
	transfer->multi = NULL;
	curl_easy_cleanup(transfer->easy);
	transfer->easy = NULL;
	curl_mime_free(transfer->mime);
	transfer->mime = NULL;
	if (transfer->headers != NULL)
		explicit_bzero(transfer->headers->data, strlen(transfer->headers->data));
	curl_slist_free_all(transfer->headers);
	transfer->headers = NULL;
	if (transfer->key != NULL)
		explicit_bzero(transfer->key, strlen(transfer->key));
	free(transfer->key);
	transfer->key = NULL;
	free(transfer->proxy);
	transfer->proxy = NULL;
	free(transfer->body);
	transfer->body = NULL;
}

void
http_transfer_free(HttpTransfer *transfer)
{
	release(transfer);
	free(transfer->result.body);
	free(transfer);
}

/* How long a character of the key is in the text, as it is or as JSON may
 * write it; 0 if another one is there */
static size_t
match_character(char c, const char *text, size_t len)
{
	char		hex[7];

	if (len >= 2 && text[0] == '\\')
	{
		if (text[1] == c && strchr("\"\\/", c) != NULL)
			return 2;
		snprintf(hex, sizeof(hex), "\\u%04x", (unsigned char) c);
		if (len >= 6 && pg_strncasecmp(text, hex, 6) == 0)
			return 6;
	}
	return len >= 1 && text[0] == c ? 1 : 0;
}

/* A peer that sends the key back must not get it into anybody's log */
static void
mask_key(const char *key, char *text, size_t len)
{
	if (strlen(key) < MIN_MASKED_KEY || text == NULL)
		return;
	for (size_t start = 0; start < len; start++)
	{
		const char *c = key;
		size_t		end = start;
		size_t		n;

		while (*c != '\0' && (n = match_character(*c, text + end, len - end)) > 0)
			end += n, c++;
		if (*c == '\0')
			memset(text + start, '*', end - start);
	}
}

/*
 * Says in words why a call was not answered.  libcurl's own words are better
 * than its error code's, unless they give the key or the proxy's password
 * away; both may have been cut, so the beginning of the key is enough.
 */
static void
describe_failure(HttpTransfer *transfer, CURLcode code, long status)
{
	HttpResult *result = &transfer->result;
	const char *words = transfer->refusal;
	char		start[MIN_MASKED_KEY + 1];
	size_t		n;
	char	   *p;

	strlcpy(start, transfer->key, sizeof(start));
	if (words == NULL && transfer->message[0] != '\0' &&
		strstr(transfer->message, start) == NULL &&
		!(transfer->proxy != NULL && strchr(transfer->proxy, '@') != NULL &&
		  strchr(transfer->message, '@') != NULL))
		words = transfer->message;
	if (words == NULL)
		words = curl_easy_strerror(code);
	if (status > 0)
		snprintf(result->error, sizeof(result->error),
				 "%.200s (after HTTP status %ld)", words, status);
	else
		strlcpy(result->error, words, sizeof(result->error));

	for (p = result->error; *p != '\0'; p++)
	{
		if (*p < ' ' || *p > '~')
			*p = (*p == '\n' || *p == '\t') ? ' ' : '?';
	}
	while (p > result->error && p[-1] == ' ')
		*--p = '\0';

	/* begin as PostgreSQL's messages do, but leave names such as OpenSSL */
	p = result->error;
	n = strspn(p + 1, "abcdefghijklmnopqrstuvwxyz'");
	if (n > 0 && p[n + 1] == ' ')
		p[0] = pg_ascii_tolower((unsigned char) p[0]);
}

void
http_transfer_end(HttpTransfer *transfer, CURLcode code)
{
	HttpResult *result = &transfer->result;
	long		status = 0;
	long		request_size = 0;
	curl_off_t	uploaded = 0;
	instr_time	took;

	curl_easy_getinfo(transfer->easy, CURLINFO_RESPONSE_CODE, &status);
	curl_easy_getinfo(transfer->easy, CURLINFO_REQUEST_SIZE, &request_size);
	curl_easy_getinfo(transfer->easy, CURLINFO_SIZE_UPLOAD_T, &uploaded);
	result->bytes_sent = uploaded;
	INSTR_TIME_SET_CURRENT(took);
	INSTR_TIME_SUBTRACT(took, transfer->started);
	result->ms = INSTR_TIME_GET_MILLISEC(took);
	if (code == CURLE_OK && transfer->refusal == NULL && status >= 200 && transfer->headed)
	{
		result->outcome = HTTP_ANSWERED;
		result->status = (int) status;
		mask_key(transfer->key, result->body, result->body_len);
		mask_key(transfer->key, result->request_id, strlen(result->request_id));
	}
	else
	{
		/*
		 * No list of error codes could prove that nothing was sent: a timeout
		 * ends both a handshake and a wait for the answer.  That libcurl never
		 * came to the request does prove it.
		 */
		result->outcome = transfer->begun || request_size > 0 ?
			HTTP_LOST : HTTP_NOT_SENT;
		if (code == CURLE_OK && transfer->refusal == NULL)
			transfer->refusal = status >= 200 ? "the answer ends within its headers" :
				"the answer is not an HTTP response";
		result->too_long |= code == CURLE_FILESIZE_EXCEEDED;
		describe_failure(transfer, code, status);
		mask_key(transfer->key, result->request_id, strlen(result->request_id));
		result->body_len = 0;
		if (result->body != NULL)
			result->body[0] = '\0';
	}
	release(transfer);
}

