/*
 * payload.c
 *	  Request bodies, written straight from jsonb and from merge's result.
 *
 * Shapes: "Bulk Companies Update" and "Bulk Users Update" for records,
 * "Identify Company" for a single company.  A single user carries its company
 * as {"id": …}: so the guide and working clients; the OpenAPI page of
 * /v1/identify names it company_id.
 */
#include "postgres.h"

#include "mb/pg_wchar.h"
#include "utils/builtins.h"
#include "utils/numeric.h"

#include "compat.h"
#include "payload.h"

/* A JSON string; runs without anything to escape are copied whole */
static void
append_string(StringInfo out, const char *str, int len)
{
	int			start = 0;

	appendStringInfoCharMacro(out, '"');
	for (int i = 0; i < len; i++)
	{
		unsigned char c = str[i];

		if (c >= 0x20 && c != '"' && c != '\\')
			continue;
		appendBinaryStringInfo(out, str + start, i - start);
		start = i + 1;
		switch (c)
		{
			case '"':
				appendBinaryStringInfo(out, "\\\"", 2);
				break;
			case '\\':
				appendBinaryStringInfo(out, "\\\\", 2);
				break;
			case '\n':
				appendBinaryStringInfo(out, "\\n", 2);
				break;
			case '\r':
				appendBinaryStringInfo(out, "\\r", 2);
				break;
			case '\t':
				appendBinaryStringInfo(out, "\\t", 2);
				break;
			default:
				appendStringInfo(out, "\\u%04x", c);
				break;
		}
	}
	appendBinaryStringInfo(out, str + start, len - start);
	appendStringInfoCharMacro(out, '"');
}

/* Without trailing zeros: what is compared without them is sent without */
static void
append_numeric(StringInfo out, Numeric num)
{
	char	   *str = numeric_normalize(num);

	appendStringInfoString(out, str);
	pfree(str);
}

static void
append_jsonb_scalar(StringInfo out, const JsonbValue *value)
{
	switch (value->type)
	{
		case jbvNull:
			appendBinaryStringInfo(out, "null", 4);
			break;
		case jbvBool:
			appendStringInfoString(out, value->val.boolean ? "true" : "false");
			break;
		case jbvNumeric:
			append_numeric(out, value->val.numeric);
			break;
		case jbvString:
			append_string(out, value->val.string.val, value->val.string.len);
			break;
		case jbvArray:
		case jbvObject:
		case jbvBinary:
		case jbvDatetime:
			elog(ERROR, "unexpected jsonb value type %d", (int) value->type);
	}
}

static void
append_merge_value(StringInfo out, const MergeValue *value)
{
	JsonbValue	scalar;

	payload_from_merge(value, &scalar);
	append_jsonb_scalar(out, &scalar);
	if (scalar.type == jbvNumeric && (char *) scalar.val.numeric != value->data)
		pfree(scalar.val.numeric);
}

bool
payload_to_merge(const JsonbValue *value, MergeValue *out)
{
	out->len = 0;
	out->data = NULL;
	switch (value->type)
	{
		case jbvNull:
			out->type = MERGE_NULL;
			return true;
		case jbvBool:
			out->type = value->val.boolean ? MERGE_TRUE : MERGE_FALSE;
			return true;
		case jbvNumeric:
			out->type = MERGE_NUMBER;
			out->data = (char *) value->val.numeric;
			out->len = VARSIZE_ANY(value->val.numeric);
			return true;
		case jbvString:
			out->type = MERGE_STRING;
			out->data = value->val.string.val;
			out->len = value->val.string.len;
			return true;
		case jbvArray:
		case jbvObject:
		case jbvBinary:
		case jbvDatetime:
			break;
	}
	return false;
}

/*
 * Numbers are compared by their bytes, so 1.50 must look like 1.5: a copy
 * without trailing zeros, for the caller to free.
 */
void
payload_trim_number(MergeValue *value)
{
	Numeric		trimmed;

	Assert(value->type == MERGE_NUMBER);
	trimmed = DatumGetNumeric(DirectFunctionCall1(numeric_trim_scale,
												  PointerGetDatum(value->data)));
	value->data = (char *) trimmed;
	value->len = VARSIZE_ANY(trimmed);
}

/* A numeric's bytes are copied if they do not lie as numerics must */
void
payload_from_merge(const MergeValue *value, JsonbValue *out)
{
	out->type = jbvNull;
	switch (value->type)
	{
		case MERGE_NULL:
			break;
		case MERGE_TRUE:
		case MERGE_FALSE:
			out->type = jbvBool;
			out->val.boolean = value->type == MERGE_TRUE;
			break;
		case MERGE_NUMBER:
			out->type = jbvNumeric;
			if ((uintptr_t) value->data == INTALIGN((uintptr_t) value->data))
				out->val.numeric = (Numeric) value->data;
			else
			{
				out->val.numeric = (Numeric) palloc(value->len);
				memcpy(out->val.numeric, value->data, value->len);
			}
			break;
		case MERGE_STRING:
			out->type = jbvString;
			out->val.string.val = (char *) value->data;
			out->val.string.len = value->len;
			break;
	}
}

/* Where an entry ends, if the one before it ends at "start" */
static uint32
entry_end(JEntry entry, uint32 start)
{
	return JBE_HAS_OFF(entry) ? JBE_OFFLENFLD(entry) : start + JBE_OFFLENFLD(entry);
}

static void
append_entry(StringInfo out, JEntry entry, const char *base, uint32 start, uint32 end)
{
	if (JBE_ISSTRING(entry))
		append_string(out, base + start, end - start);
	else if (JBE_ISNUMERIC(entry))
		append_numeric(out, (Numeric) (base + INTALIGN(start)));
	else if (JBE_ISBOOL_TRUE(entry))
		appendBinaryStringInfo(out, "true", 4);
	else if (JBE_ISBOOL_FALSE(entry))
		appendBinaryStringInfo(out, "false", 5);
	else if (JBE_ISNULL(entry))
		appendBinaryStringInfo(out, "null", 4);
	else
		elog(ERROR, "unexpected jsonb entry %u", entry);
}

/*
 * Straight from the entries, names first, then values in the same order: an
 * iterator takes longer than all the rest.
 */
static void
append_jsonb_members(StringInfo out, Jsonb *metadata)
{
	const JsonbContainer *object = &metadata->root;
	int			n = JsonContainerSize(object);
	const char *base = (const char *) &object->children[2 * n];
	uint32		name_start = 0;
	uint32		value_start = 0;

	for (int i = 0; i < n; i++)
		value_start = entry_end(object->children[i], value_start);
	for (int i = 0; i < n; i++)
	{
		uint32		name_end = entry_end(object->children[i], name_start);
		uint32		value_end = entry_end(object->children[n + i], value_start);

		if (i > 0)
			appendStringInfoCharMacro(out, ',');
		append_string(out, base + name_start, name_end - name_start);
		appendStringInfoCharMacro(out, ':');
		append_entry(out, object->children[n + i], base, value_start, value_end);
		name_start = name_end;
		value_start = value_end;
	}
}

static void
append_merge_members(StringInfo out, const MergeEntity *entity)
{
	bool		first = true;

	for (int i = 0; i < entity->nkeys; i++)
	{
		const MergeKey *key = &entity->keys[i];

		if (!key->send || key->namelen == 0)
			continue;
		if (!first)
			appendStringInfoCharMacro(out, ',');
		first = false;
		append_string(out, key->name, key->namelen);
		appendStringInfoCharMacro(out, ':');
		append_merge_value(out, &key->sending);
	}
}

static const MergeKey *
company_to_send(const MergeEntity *entity)
{
	for (int i = 0; i < entity->nkeys; i++)
	{
		if (entity->keys[i].namelen == 0 && entity->keys[i].send)
			return &entity->keys[i];
	}
	return NULL;
}

static void
append_id(StringInfo out, UserpilotKind kind, const char *id, int id_len)
{
	appendStringInfoString(out, kind == USERPILOT_COMPANY ?
						   "{\"company_id\":" : "{\"user_id\":");
	append_string(out, id, id_len);
}

void
payload_record(StringInfo out, UserpilotKind kind, const char *id, int id_len,
			   const char *company_id, int company_len, Jsonb *metadata)
{
	append_id(out, kind, id, id_len);
	if (company_id != NULL)
	{
		appendStringInfoString(out, ",\"company_id\":");
		append_string(out, company_id, company_len);
	}
	appendStringInfoString(out, ",\"metadata\":{");
	append_jsonb_members(out, metadata);
	appendStringInfoString(out, "}}");
}

void
payload_merged(StringInfo out, UserpilotKind kind, const char *id, int id_len,
			   const MergeEntity *entity)
{
	const MergeKey *company = company_to_send(entity);

	append_id(out, kind, id, id_len);
	if (company != NULL)
	{
		appendStringInfoString(out, ",\"company_id\":");
		append_merge_value(out, &company->sending);
	}
	appendStringInfoString(out, ",\"metadata\":{");
	append_merge_members(out, entity);
	appendStringInfoString(out, "}}");
}

void
payload_single(StringInfo out, UserpilotKind kind, const char *id, int id_len,
			   const MergeEntity *entity)
{
	const MergeKey *company = company_to_send(entity);

	append_id(out, kind, id, id_len);
	appendStringInfoString(out, ",\"metadata\":{");
	append_merge_members(out, entity);
	appendStringInfoCharMacro(out, '}');
	if (company != NULL)
	{
		appendStringInfoString(out, ",\"company\":{\"id\":");
		append_merge_value(out, &company->sending);
		appendStringInfoCharMacro(out, '}');
	}
	appendStringInfoCharMacro(out, '}');
}

const char *
payload_open(UserpilotKind kind)
{
	return kind == USERPILOT_COMPANY ? "{\"companies\":[" : "{\"users\":[";
}

const char *
payload_close(void)
{
	return "]}";
}

char *
payload_utf8(char *text, int len, int *utf8_len)
{
	char	   *converted;

	/* what cannot be converted, or is no UTF-8 at all, was refused when it came (change.c) */
	if (GetDatabaseEncoding() == PG_UTF8 || GetDatabaseEncoding() == PG_SQL_ASCII)
	{
		*utf8_len = len;
		return text;
	}
	converted = pg_server_to_any(text, len, PG_UTF8);
	*utf8_len = converted == text ? len : (int) strlen(converted);
	return converted;
}

int
payload_utf8_len(char *text, int len)
{
	int			utf8_len;
	char	   *converted = payload_utf8(text, len, &utf8_len);

	if (converted != text)
		pfree(converted);
	return utf8_len;
}
