/*
 * mapping_row.c
 *	  What a table's row comes to, as its trigger maps it.
 *
 * A value looks the same whatever a session has set: what is at Userpilot
 * must not depend on who changed a row.  Dates and times are written by core's
 * JSON encoder, timestamptz in UTC; types with an output of their own run with
 * their settings pinned.
 */
#include "postgres.h"

#include "access/detoast.h"
#include "catalog/pg_type.h"
#include "common/shortest_dec.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/date.h"
#include "utils/datetime.h"
#include "utils/datum.h"
#include "utils/guc.h"
#include "utils/json.h"
#include "utils/jsonfuncs.h"
#include "utils/numeric.h"
#include "utils/timestamp.h"

#include "change.h"
#include "compat.h"
#include "mapping.h"
#include "userpilot.h"

/* Stored so, no value comes to a text that Userpilot takes */
#define HUGE_BYTES (64 * 1024 * 1024)

static bool
differs(TupleTableSlot *before, TupleTableSlot *after, AttrNumber attnum)
{
	Form_pg_attribute att = TupleDescAttr(after->tts_tupleDescriptor, attnum - 1);
	bool		null_before;
	bool		null_after;
	Datum		a = slot_getattr(before, attnum, &null_before);
	Datum		b = slot_getattr(after, attnum, &null_after);

	if (null_before || null_after)
		return null_before != null_after;
	/* stored aside, and not touched: no need to fetch it */
	if (att->attlen == -1 && VARATT_IS_EXTERNAL_ONDISK(DatumGetPointer(a)) &&
		VARATT_IS_EXTERNAL_ONDISK(DatumGetPointer(b)) &&
		memcmp(DatumGetPointer(a), DatumGetPointer(b), VARSIZE_EXTERNAL(DatumGetPointer(a))) == 0)
		return false;
	return !datum_image_eq(a, b, att->attbyval, att->attlen);
}

bool
mapping_changed(const Mapping *mapping, TupleTableSlot *before, TupleTableSlot *after)
{
	if (mapping->id != InvalidAttrNumber && differs(before, after, mapping->id))
		return true;
	if (mapping->company != InvalidAttrNumber && differs(before, after, mapping->company))
		return true;
	for (int i = 0; i < mapping->ncolumns; i++)
	{
		if (differs(before, after, mapping->columns[i].attnum))
			return true;
	}
	return false;
}

static void
string_value(JsonbValue *value, char *str, int len)
{
	value->type = jbvString;
	value->val.string.val = str;
	value->val.string.len = len;
}

static void
numeric_value(JsonbValue *value, Numeric num)
{
	/* JSON has no such numbers; core's to_jsonb writes them as strings, too */
	if (numeric_is_nan(num) || numeric_is_inf(num))
	{
		char	   *str = DatumGetCString(DirectFunctionCall1(numeric_out, NumericGetDatum(num)));

		string_value(value, str, strlen(str));
		return;
	}
	value->type = jbvNumeric;
	value->val.numeric = num;
}

/* The shortest number that is read back as the same float */
static void
float_value(JsonbValue *value, Oid type, Datum d)
{
	char		buf[Max(DOUBLE_SHORTEST_DECIMAL_LEN, FLOAT_SHORTEST_DECIMAL_LEN)];

	if (type == FLOAT8OID)
		double_to_shortest_decimal_buf(DatumGetFloat8(d), buf);
	else
		float_to_shortest_decimal_buf(DatumGetFloat4(d), buf);
	numeric_value(value, DatumGetNumeric(DirectFunctionCall3(numeric_in, CStringGetDatum(buf),
															 ObjectIdGetDatum(InvalidOid),
															 Int32GetDatum(-1))));
}

static void
scalar_value(const MappingColumn *column, Datum d, JsonbValue *value)
{
	static const int utc = 0;
	char		buf[MAXDATELEN + 1];
	char	   *str;

	switch (column->conversion)
	{
		case CONVERT_BOOL:
			value->type = jbvBool;
			value->val.boolean = DatumGetBool(d);
			return;
		case CONVERT_INTEGER:
			value->type = jbvNumeric;
			value->val.numeric = int64_to_numeric(column->type == INT8OID ? DatumGetInt64(d) :
												  column->type == INT4OID ? DatumGetInt32(d) :
												  DatumGetInt16(d));
			return;
		case CONVERT_FLOAT:
			float_value(value, column->type, d);
			return;
		case CONVERT_NUMERIC:
			numeric_value(value, DatumGetNumeric(d));
			return;
		case CONVERT_DATETIME:
			str = pstrdup(JsonEncodeDateTime(buf, d, column->type,
											 column->type == TIMESTAMPTZOID ? &utc : NULL));
			break;
		case CONVERT_TEXT:
			str = (char *) DatumGetTextPP(d);
			string_value(value, VARDATA_ANY(str), VARSIZE_ANY_EXHDR(str));
			return;
		case CONVERT_JSON:
		case CONVERT_OUTPUT:
		default:
			str = OutputFunctionCall((FmgrInfo *) &column->output, d);
			break;
	}
	string_value(value, str, strlen(str));
}

static void
push(JsonbParseState **state, const char *name, int len, JsonbValue *value)
{
	JsonbValue	key;

	string_value(&key, (char *) name, len);
	pushJsonbValue(state, WJB_KEY, &key);
	pushJsonbValue(state, WJB_VALUE, value);
}

static bool
push_member(const char *name, JsonbValue *value, void *arg)
{
	if (value->type == jbvBinary)
		return false;
	push(arg, pstrdup(name), strlen(name), value);
	return true;
}

/* But what no name can be was never sent */
static bool
push_null(const char *name, JsonbValue *value, void *arg)
{
	JsonbValue	null = {.type = jbvNull};

	return value->type != jbvBinary && change_is_name(name, strlen(name)) &&
		push_member(name, &null, arg);
}

/* A value being made, which may turn out to be none that jsonb can hold */
typedef struct Conversion
{
	Datum		json;
	JsonbValue *value;
	Jsonb	   *result;
} Conversion;

static void
convert_json(void *arg)
{
	Conversion *conversion = arg;

	conversion->result = DatumGetJsonbP(DirectFunctionCall1(jsonb_in,
															CStringGetDatum(TextDatumGetCString(conversion->json))));
}

static void
convert_value(void *arg)
{
	Conversion *conversion = arg;

	conversion->result = JsonbValueToJsonb(conversion->value);
}

/* What type json takes and jsonb does not (\u0000, huge numbers) is NULL */
static Jsonb *
column_jsonb(const MappingColumn *column, TupleTableSlot *slot, char **complaint)
{
	Conversion	conversion = {0};
	bool		isnull;
	char	   *problem;

	conversion.json = slot_getattr(slot, column->attnum, &isnull);
	if (isnull)
		return NULL;
	if (column->type != JSONOID)
		return DatumGetJsonbP(conversion.json);
	problem = change_complaint(convert_json, &conversion);
	if (problem != NULL && complaint != NULL)
		*complaint = psprintf("column \"%s\": %s", column->column, problem);
	return problem == NULL ? conversion.result : NULL;
}

static char *
json_prefix(const MappingColumn *column)
{
	return column->renamed ? psprintf("%s.", column->property) : "";
}

/* What a JSON column said before is null unless something says it still */
static void
push_json_before(JsonbParseState **state, const MappingColumn *column, bool flatten,
				 TupleTableSlot *before)
{
	Jsonb	   *old = column_jsonb(column, before, NULL);
	JsonbValue	null = {.type = jbvNull};

	if (old == NULL)
		return;
	if (JB_ROOT_IS_OBJECT(old))
		shape_walk(&old->root, json_prefix(column), flatten, push_null, state);
	else
		push(state, column->property, strlen(column->property), &null);
}

static void
push_json(JsonbParseState **state, const MappingColumn *column, bool flatten,
		  TupleTableSlot *row, char **complaint)
{
	char	   *prefix = json_prefix(column);
	Jsonb	   *new = column_jsonb(column, row, complaint);
	JsonbValue	value;

	if (new == NULL)
		return;
	if (JB_ROOT_IS_OBJECT(new))
	{
		shape_walk(&new->root, prefix, flatten, push_member, state);
		return;
	}
	if (JB_ROOT_IS_SCALAR(new))
		(void) JsonbExtractScalar(&new->root, &value);
	else
	{
		char	   *str = JsonbToCString(NULL, &new->root, VARSIZE(new));

		string_value(&value, str, strlen(str));
	}
	push(state, column->property, strlen(column->property), &value);
}

/* Undone by AtEOXact_GUC(true, level) */
static int
pin_output_settings(bool names)
{
	static const char *const settings[][2] = {
		{"datestyle", "ISO, YMD"}, {"intervalstyle", "postgres"}, {"timezone", "UTC"},
		{"extra_float_digits", "1"}, {"bytea_output", "hex"}, {"lc_monetary", "C"},
		/* of names; the first costs more than all others */
		{"search_path", "pg_catalog"}, {"quote_all_identifiers", "off"}
	};
	int			level = NewGUCNestLevel();
	int			n = names ? lengthof(settings) : lengthof(settings) - 2;

	for (int i = 0; i < n; i++)
	{
		const char *now = GetConfigOption(settings[i][0], false, false);

		if (pg_strcasecmp(now, settings[i][1]) != 0)
			(void) set_config_option(settings[i][0], settings[i][1], PGC_USERSET, PGC_S_SESSION,
									 GUC_ACTION_SAVE, true, 0, false);
	}
	return level;
}

/* As text it may not even fit into PostgreSQL's memory */
static bool
is_huge(const MappingColumn *column, TupleTableSlot *row, Datum d)
{
	return TupleDescAttr(row->tts_tupleDescriptor, column->attnum - 1)->attlen == -1 &&
		toast_raw_datum_size(d) > HUGE_BYTES;
}

/* What cannot be JSON, or is huge, is left out and complained of, else *complaint
 * is NULL */
static Jsonb *
row_metadata(const Mapping *mapping, bool flatten, TupleTableSlot *before,
			 TupleTableSlot *row, char **complaint)
{
	int			level = mapping->pins_settings ? pin_output_settings(mapping->pins_names) : 0;
	JsonbParseState *state = NULL;
	Conversion	conversion = {0};
	char	   *problem;

	*complaint = NULL;
	pushJsonbValue(&state, WJB_BEGIN_OBJECT, NULL);
	/* first, as of two values of a property the later one wins */
	for (int i = 0; before != NULL && i < mapping->ncolumns; i++)
	{
		if (mapping->columns[i].conversion == CONVERT_JSON)
			push_json_before(&state, &mapping->columns[i], flatten, before);
	}
	for (int i = 0; i < mapping->ncolumns; i++)
	{
		const MappingColumn *column = &mapping->columns[i];
		JsonbValue	value = {.type = jbvNull};
		bool		isnull;
		Datum		d;

		if (column->conversion == CONVERT_JSON)
		{
			push_json(&state, column, flatten, row, complaint);
			continue;
		}
		d = slot_getattr(row, column->attnum, &isnull);
		if (!isnull && is_huge(column, row, d))
		{
			*complaint = psprintf("metadata.\"%s\" is longer than %d characters",
								  column->property, USERPILOT_MAX_VALUE_CHARS);
			continue;
		}
		if (!isnull)
			scalar_value(column, d, &value);
		push(&state, column->property, strlen(column->property), &value);
	}
	conversion.value = pushJsonbValue(&state, WJB_END_OBJECT, NULL);
	if (mapping->pins_settings)
		AtEOXact_GUC(true, level);
	problem = change_complaint(convert_value, &conversion);
	if (problem == NULL)
		return conversion.result;
	*complaint = problem;
	return change_no_metadata();
}

/* A row whose ids are still to be read and checked, its metadata checked */
typedef struct CheckedRow
{
	const Mapping *mapping;
	TupleTableSlot *row;
	QueueChange *change;
} CheckedRow;

static void
check_row(void *arg)
{
	CheckedRow *checked = arg;
	const Mapping *mapping = checked->mapping;
	QueueChange *change = checked->change;
	bool		isnull;
	Datum		d = slot_getattr(checked->row, mapping->id, &isnull);

	change->entity_id = change_id(mapping->id_type, d, isnull, mapping->id_column);
	if (mapping->company != InvalidAttrNumber)
	{
		d = slot_getattr(checked->row, mapping->company, &isnull);
		if (!isnull)
			change->company_id = change_id(mapping->company_type, d, false, "company_id");
	}
	change_check_metadata(change->metadata);
}

char *
mapping_change(const Mapping *mapping, const Shape *shape, TupleTableSlot *before,
			   TupleTableSlot *row, QueueChange *change)
{
	CheckedRow	checked = {mapping, row, change};
	char	   *of_values;
	char	   *of_row = NULL;

	change->kind = mapping->kind;
	change->entity_id = change->company_id = NULL;
	change->metadata =
		shape_metadata(shape, mapping->kind,
					   row_metadata(mapping, shape->flatten, before, row, &of_values));
	if (mapping->id != InvalidAttrNumber)
		of_row = change_complaint(check_row, &checked);
	if (change->entity_id == NULL)
		change->entity_id = cstring_to_text("");
	return of_row ? of_row : of_values;
}
