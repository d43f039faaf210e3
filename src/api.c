/*
 * api.c
 *	  The endpoints of the Userpilot HTTP API and the JSON of their answers.
 *
 * Answers come from outside and may hold anything: the server's own JSON
 * parser reads them, which raises what it does not like, so reading happens
 * inside PG_TRY and in a memory context of its own.  No transaction is needed.
 */
#include "postgres.h"

#include <ctype.h>

#include "fmgr.h"
#include "mb/pg_wchar.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"
#include "utils/memutils.h"

#include "api.h"
#include "compat.h"

#define MAX_ERROR_TEXT 500
#define MAX_JOB_TEXT 1024		/* status and file name are cut here */
#define MAX_JOB_ID 512			/* a longer one is none */
#define JOBS_PATH "/v1/background_jobs"

/* Reads what it wants from an answer; may raise; false: it is not there */
typedef bool (*JsonReader) (Jsonb *answer, void *result);

typedef struct ApiJobs
{
	ApiJob	   *job;
	int			n;
} ApiJobs;

/* ---------- calls ---------- */

const char *
api_identify_path(UserpilotKind kind)
{
	return kind == USERPILOT_COMPANY ?
		"/v1/companies/identify" : "/v1/identify";
}

const char *
api_submit_path(UserpilotKind kind)
{
	return kind == USERPILOT_COMPANY ?
		"/v1/companies/bulk_identify" : "/v1/users/bulk_identify";
}

bool
api_identify(Http *http, const HttpTarget *target, UserpilotKind kind,
			 const HttpPiece *body, void *owner, const char **error)
{
	HttpCall	call = {0};

	call.method = "POST";
	call.path = api_identify_path(kind);
	call.body = body;
	call.npieces = 1;
	call.owner = owner;
	return http_start(http, target, &call, error);
}

/*
 * A job is sent once: were it repeated behind our back after its answer was
 * lost, it would meet itself in the slot and be taken for somebody else's.
 */
bool
api_submit(Http *http, const HttpTarget *target, UserpilotKind kind,
		   const HttpPiece *body, int npieces, const char *filename,
		   void *owner, const char **error)
{
	HttpCall	call = {0};

	call.method = "POST";
	call.path = api_submit_path(kind);
	call.body = body;
	call.npieces = npieces;
	call.filename = filename;
	call.once = true;
	call.owner = owner;
	return http_start(http, target, &call, error);
}

bool
api_job(Http *http, const HttpTarget *target, const char *job_id, void *owner,
		const char **error)
{
	HttpCall	call = {0};
	char	   *segment = http_encode_segment(job_id);
	char	   *path = psprintf("%s/%s", JOBS_PATH, segment);
	bool		started;

	call.method = "GET";
	call.path = path;
	call.owner = owner;
	started = http_start(http, target, &call, error);
	pfree(path);
	pfree(segment);
	return started;
}

bool
api_jobs(Http *http, const HttpTarget *target, void *owner, const char **error)
{
	HttpCall	call = {0};

	call.method = "GET";
	call.path = JOBS_PATH;
	call.owner = owner;
	return http_start(http, target, &call, error);
}

bool
api_job_is_final(const char *status)
{
	return strcmp(status, "completed") == 0 || strcmp(status, "failed") == 0;
}

/* ---------- from UTF-8 to the server's encoding ---------- */

/* Ends the handling of an error, unless somebody wants this process to stop */
static void
forget_error(MemoryContext context)
{
	ErrorData  *edata;
	bool		stop;

	MemoryContextSwitchTo(context);
	edata = CopyErrorData();
	stop = edata->sqlerrcode == ERRCODE_QUERY_CANCELED ||
		ERRCODE_TO_CATEGORY(edata->sqlerrcode) ==
		ERRCODE_TO_CATEGORY(ERRCODE_ADMIN_SHUTDOWN);
	if (stop)
		PG_RE_THROW();
	FreeErrorData(edata);
	FlushErrorState();
}

/*
 * One character into "out"; "?" where the server's encoding has no such
 * character.  Not pg_any_to_server: that needs a transaction, and one
 * character it does not know would spoil the whole answer.
 */
static void
append_character(StringInfo out, const unsigned char *s, int len)
{
	MemoryContext context = CurrentMemoryContext;
	unsigned char converted[MAX_UNICODE_EQUIVALENT_STRING + 1];
	volatile bool known = true;

	if (GetDatabaseEncoding() == PG_UTF8 || GetDatabaseEncoding() == PG_SQL_ASCII)
	{
		appendBinaryStringInfo(out, (const char *) s, len);
		return;
	}
	PG_TRY();
	{
		pg_unicode_to_server(utf8_to_unicode(s), converted);
	}
	PG_CATCH();
	{
		forget_error(context);
		known = false;
	}
	PG_END_TRY();
	appendStringInfoString(out, known ? (const char *) converted : "?");
}

/* Whether a JSON escape "\uXXXX" names a character that jsonb cannot take */
static bool
is_unfit_escape(const unsigned char *s, size_t len)
{
	unsigned int code = 0;
	int			i;

	if (len < 6 || s[0] != '\\' || s[1] != 'u')
		return false;
	for (i = 2; i < 6; i++)
	{
		if (!isxdigit(s[i]))
			return false;
		code = code * 16 + (isdigit(s[i]) ? s[i] - '0' : (s[i] | 0x20) - 'a' + 10);
	}
	return code == 0 || (code > 0x7f && GetDatabaseEncoding() != PG_UTF8);
}

/*
 * UTF-8 text, or JSON, of at most "max" bytes in the server's encoding
 * (palloc'd).  Invalid bytes and unknown characters become "?"; in text,
 * control characters become spaces, in JSON they are the parser's to refuse.
 */
static char *
to_server(const char *text, size_t len, size_t max, bool json)
{
	const unsigned char *s = (const unsigned char *) text;
	const unsigned char *end = s + len;
	StringInfoData out;

	initStringInfo(&out);
	while (s < end && (size_t) out.len < max)
	{
		int			n = pg_utf_mblen(s);

		if (n > end - s || !pg_utf8_islegal(s, n))
		{
			appendStringInfoChar(&out, '?');
			n = 1;
		}
		else if (json && is_unfit_escape(s, end - s))
		{
			appendStringInfoChar(&out, '?');
			n = 6;
		}
		else if (json && *s == '\\' && end - s > 1 && s[1] < 0x80)
		{
			appendBinaryStringInfo(&out, (const char *) s, 2);
			n = 2;
		}
		else if (!json && (*s < ' ' || *s == 0x7f || (*s == 0xc2 && s[1] < 0xa0)))
			appendStringInfoChar(&out, ' ');
		else if (n == 1)
			appendStringInfoChar(&out, *s);
		else
			append_character(&out, s, n);
		s += n;
	}
	return out.data;
}

/* ---------- reading JSON ---------- */

/* Parses an answer and lets "read" at it; everything stays in "context" */
static bool
read_json(MemoryContext context, const char *body, size_t len,
		  JsonReader read, void *result)
{
	MemoryContext caller = MemoryContextSwitchTo(context);
	volatile bool done = false;

	if (len == 0 || memchr(body, '\0', len) != NULL)
	{
		MemoryContextSwitchTo(caller);
		return false;
	}
	PG_TRY();
	{
		char	   *json = to_server(body, len, MaxAllocSize, true);
		Datum		answer = DirectFunctionCall1(jsonb_in, CStringGetDatum(json));

		done = read(DatumGetJsonbP(answer), result);
	}
	PG_CATCH();
	{
		forget_error(context);
	}
	PG_END_TRY();
	MemoryContextSwitchTo(caller);
	return done;
}

static JsonbValue *
member(JsonbContainer *object, const char *name)
{
	return getKeyJsonValueFromContainer(object, name, strlen(name), NULL);
}

/* A string member, cut to "max" bytes; "" if absent or no string */
static char *
string_member(JsonbContainer *object, const char *name, int max)
{
	JsonbValue *value = member(object, name);
	int			len;

	if (value == NULL || value->type != jbvString)
		return pstrdup("");
	len = value->val.string.len;
	if (len > max)
		len = pg_mbcliplen(value->val.string.val, len, max);
	return pnstrdup(value->val.string.val, len);
}

/* 0 if it is none that fits.  As text 1e131071 or 1e-16383 would be as many
 * digits, in each element of a list. */
static int64
whole_number(Numeric numeric)
{
	Datum		number = NumericGetDatum(numeric);
	Datum		max = NumericGetDatum(int64_to_numeric(PG_INT64_MAX));
	Datum		min = NumericGetDatum(int64_to_numeric(0));
	int64		count;

	if (DatumGetBool(DirectFunctionCall2(numeric_gt, number, max)) ||
		DatumGetBool(DirectFunctionCall2(numeric_lt, number, min)))
		return 0;
	count = DatumGetInt64(DirectFunctionCall1(numeric_int8, number));
	return DatumGetBool(DirectFunctionCall2(numeric_eq, number,
											NumericGetDatum(int64_to_numeric(count)))) ? count : 0;
}

/* A count, given as a number or as a string; -1 if absent, 0 if it is none */
static int64
count_member(JsonbContainer *object, const char *name)
{
	JsonbValue *value = member(object, name);
	const char *text;
	char	   *end;
	int64		count;

	if (value == NULL || value->type == jbvNull)
		return -1;
	if (value->type == jbvNumeric)
		return whole_number(value->val.numeric);
	text = string_member(object, name, 64);
	if (!isdigit((unsigned char) text[0]))
		return 0;
	errno = 0;
	count = strtoi64(text, &end, 10);
	if (*end == '.')
		end += 1 + strspn(end + 1, "0");
	return errno != 0 || *end != '\0' ? 0 : count;
}

/* An id: opaque text, or a whole number; "" if it is neither */
static char *
id_member(JsonbContainer *object, const char *name)
{
	JsonbValue *value = member(object, name);
	int64		number;

	if (value == NULL || value->type != jbvNumeric)
		return string_member(object, name, MAX_JOB_ID + 1);
	number = whole_number(value->val.numeric);
	return number > 0 ? psprintf(INT64_FORMAT, number) : pstrdup("");
}

/* An object with a job's id in it */
static bool
read_job_object(JsonbContainer *object, ApiJob *job)
{
	job->job_id = id_member(object, "job_id");
	if (job->job_id[0] == '\0' || strlen(job->job_id) > MAX_JOB_ID)
		return false;
	job->status = string_member(object, "status", MAX_JOB_TEXT);
	job->filename = string_member(object, "filename", MAX_JOB_TEXT);
	job->total_rows = count_member(object, "total_rows");
	job->completed_rows = count_member(object, "completed_rows");
	return true;
}

static bool
read_job(Jsonb *answer, void *result)
{
	return JsonContainerIsObject(&answer->root) &&
		read_job_object(&answer->root, (ApiJob *) result);
}

/* The object at a place in an array, or NULL */
static JsonbContainer *
object_at(JsonbContainer *array, int i)
{
	JsonbValue *value = getIthJsonbValueFromContainer(array, i);

	if (value == NULL || value->type != jbvBinary ||
		!JsonContainerIsObject(value->val.binary.data))
		return NULL;
	return value->val.binary.data;
}

/* Whether one of its elements can be read as a job */
static bool
has_job(JsonbContainer *array)
{
	ApiJob		job;

	for (uint32 i = 0; i < JsonContainerSize(array); i++)
	{
		JsonbContainer *object = object_at(array, i);

		if (object != NULL && read_job_object(object, &job))
			return true;
	}
	return false;
}

/* The array that a page of a list is, or that it holds beside what it says of
 * pages, or of errors; NULL: there is none, or it cannot be told */
static JsonbContainer *
list_of(JsonbContainer *page)
{
	JsonbContainer *array = NULL;
	bool		unclear = false;
	JsonbIterator *it;
	JsonbValue	v;

	if (JsonContainerIsArray(page))
		return JsonContainerIsScalar(page) ? NULL : page;
	it = JsonbIteratorInit(page);
	(void) JsonbIteratorNext(&it, &v, true);
	while (JsonbIteratorNext(&it, &v, true) == WJB_KEY)
	{
		bool		errors = v.val.string.len == 6 && strncmp(v.val.string.val, "errors", 6) == 0;

		(void) JsonbIteratorNext(&it, &v, true);
		if (v.type != jbvBinary || !JsonContainerIsArray(v.val.binary.data))
			continue;
		if (has_job(v.val.binary.data))
			return v.val.binary.data;
		if (errors)
			continue;
		unclear = array != NULL;
		array = v.val.binary.data;
	}
	return unclear ? NULL : array;
}

/*
 * One strange job must not hide the others, so elements that cannot be read
 * are left out; but if none can be, this is no list of jobs.
 */
static bool
read_jobs(Jsonb *answer, void *result)
{
	JsonbContainer *array = list_of(&answer->root);
	ApiJobs    *jobs = (ApiJobs *) result;
	int			n;
	int			i;

	if (array == NULL)
		return false;
	n = JsonContainerSize(array);
	jobs->n = 0;
	jobs->job = palloc(sizeof(ApiJob) * Max(n, 1));
	for (i = 0; i < n; i++)
	{
		JsonbContainer *object = object_at(array, i);

		if (object != NULL && read_job_object(object, &jobs->job[jobs->n]))
			jobs->n++;
	}
	return n == 0 || jobs->n > 0;
}

/* The API's own words: {"errors":[{"message":…,"details":…,"error":…}]} */
static bool
read_error(Jsonb *answer, void *result)
{
	JsonbContainer *object = &answer->root;
	JsonbValue *errors;
	char	   *message;
	char	   *details;

	if (!JsonContainerIsObject(object))
		return false;
	errors = member(object, "errors");
	if (errors != NULL && errors->type == jbvBinary &&
		JsonContainerIsArray(errors->val.binary.data))
		object = object_at(errors->val.binary.data, 0);
	if (object == NULL)
		return false;
	message = string_member(object, "message", MAX_ERROR_TEXT);
	details = string_member(object, "details", MAX_ERROR_TEXT);
	if (message[0] == '\0')
		message = string_member(object, "error", MAX_ERROR_TEXT);
	if (message[0] != '\0' && details[0] != '\0' && strcmp(message, details) != 0)
		*(char **) result = psprintf("%s: %s", message, details);
	else
		*(char **) result = message[0] != '\0' ? message : details;
	return **(char **) result != '\0';
}

/* ---------- what others call ---------- */

bool
api_same_job(const char *a, const char *b)
{
	size_t		alen = strlen(a);
	size_t		blen = strlen(b);

	if (alen < blen)
		return api_same_job(b, a);
	return strcmp(a + alen - blen, b) == 0 &&
		(alen == blen || (blen > 0 && a[alen - blen - 1] == ':'));
}

static MemoryContext
answer_context(void)
{
	return AllocSetContextCreate(CurrentMemoryContext, "userpilot answer",
								 ALLOCSET_DEFAULT_SIZES);
}

/* Takes a job out of the context it was read in */
static void
copy_job(ApiJob *to, const ApiJob *from)
{
	*to = *from;
	to->job_id = pstrdup(from->job_id);
	to->status = pstrdup(from->status);
	to->filename = pstrdup(from->filename);
}

bool
api_read_job(const char *body, size_t len, ApiJob *job)
{
	MemoryContext context = answer_context();
	ApiJob		found;
	bool		ok = read_json(context, body, len, read_job, &found);

	if (ok)
		copy_job(job, &found);
	MemoryContextDelete(context);
	return ok;
}

bool
api_read_jobs(const char *body, size_t len, ApiJob **jobs, int *n)
{
	MemoryContext context = answer_context();
	ApiJobs		found;
	bool		ok = read_json(context, body, len, read_jobs, &found);
	int			i;

	if (ok)
	{
		*n = found.n;
		*jobs = palloc(sizeof(ApiJob) * Max(found.n, 1));
		for (i = 0; i < found.n; i++)
			copy_job(&(*jobs)[i], &found.job[i]);
	}
	MemoryContextDelete(context);
	return ok;
}

char *
api_error_text(const HttpResult *result)
{
	MemoryContext caller = CurrentMemoryContext;
	MemoryContext context = answer_context();
	StringInfoData words;
	char	   *found = NULL;
	char	   *text;
	char	   *p;

	MemoryContextSwitchTo(context);
	initStringInfo(&words);
	if (result->outcome != HTTP_ANSWERED)
		appendStringInfoString(&words, result->error);
	else if (read_json(context, result->body, result->body_len, read_error, &found))
		appendStringInfoString(&words, found);
	else
	{
		appendStringInfo(&words, "HTTP %d", result->status);
		if (result->body_len > 0)
			appendStringInfo(&words, ": %s",
							 to_server(result->body, result->body_len,
									   MAX_ERROR_TEXT, false));
	}
	for (p = words.data; *p != '\0'; p++)
	{
		if ((unsigned char) *p < ' ' || *p == 0x7f)
			*p = ' ';
	}
	MemoryContextSwitchTo(caller);
	text = pnstrdup(words.data,
					pg_mbcliplen(words.data, words.len, MAX_ERROR_TEXT));
	MemoryContextDelete(context);
	return text;
}

char *
api_body_text(const HttpResult *result, int max)
{
	char	   *text = to_server(result->body, result->body_len, max, false);

	text[pg_mbcliplen(text, strlen(text), max)] = '\0';
	return text;
}
