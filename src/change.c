/*
 * change.c
 *	  A change as a caller states it: what can never be sent is refused.
 *
 * Limits: "only primitive types (string, number, boolean, null) are supported
 * in metadata" and "company_id is required" are the API's own words; 500
 * properties, names of 255 and values of 65,535 characters are repeated by
 * third parties.  Characters are counted as the database encoding has them.
 */
#include "postgres.h"

#include "access/transam.h"
#include "catalog/namespace.h"
#include "catalog/pg_type.h"
#include "mb/pg_wchar.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/lsyscache.h"
#include "utils/numeric.h"

#include "change.h"
#include "compat.h"
#include "userpilot.h"

/* At most so many bytes need no counting of characters */
static bool
longer_than(const char *str, int len, int limit)
{
	return len > limit && pg_mbstrlen_with_len(str, len) > limit;
}

static bool
is_ascii(const char *str, int len)
{
	for (int i = 0; i < len; i++)
		if (IS_HIGHBIT_SET(str[i]))
			return false;
	return true;
}

/* Whether every character has an equivalent in UTF-8 */
static bool
is_translatable(const char *str, int len)
{
	int			encoding = GetDatabaseEncoding();
	Oid			conversion = FindDefaultConversionProc(encoding, PG_UTF8);
	int			room = len * MAX_CONVERSION_GROWTH + 1;
	unsigned char *result;
	bool		good;

	if (!OidIsValid(conversion))
		return false;
	result = palloc(room);
	good = pg_do_encoding_conversion_buf(conversion, encoding, PG_UTF8, (unsigned char *) str,
										 len, result, room, true) == len;
	pfree(result);
	return good;
}

/* Text of other encodings than UTF-8 may hold what cannot be sent */
static void
check_encoding(const char *str, int len, const char *what)
{
	if (GetDatabaseEncoding() == PG_UTF8 || is_ascii(str, len))
		return;
	if (GetDatabaseEncoding() == PG_SQL_ASCII)
	{
		if (pg_encoding_verifymbstr(PG_UTF8, str, len) != len)
			ereport(ERROR,
					(errcode(ERRCODE_CHARACTER_NOT_IN_REPERTOIRE),
					 errmsg("%s is not valid UTF-8", what),
					 errdetail("The database encoding is SQL_ASCII, so its text is sent as it is; Userpilot takes UTF-8.")));
	}
	else if (!is_translatable(str, len))
		ereport(ERROR,
				(errcode(ERRCODE_UNTRANSLATABLE_CHARACTER),
				 errmsg("%s has a character without an equivalent in UTF-8", what),
				 errdetail("The database encoding is %s; Userpilot takes UTF-8.", GetDatabaseEncodingName())));
}

static text *
id_from_integer(int64 number)
{
	char		digits[MAXINT8LEN + 1];

	return cstring_to_text_with_len(digits, pg_lltoa(number, digits));
}

static text *
id_from_number(Oid type, Datum value, const char *what)
{
	if (type == NUMERICOID)
	{
		Numeric		num = DatumGetNumeric(value);

		if (numeric_is_nan(num) || numeric_is_inf(num))
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("%s must be a number or text, not %s", what,
							numeric_is_nan(num) ? "NaN" : "infinity")));
		return cstring_to_text(DatumGetCString(DirectFunctionCall1(numeric_out, value)));
	}
	return id_from_integer(type == INT8OID ? DatumGetInt64(value) :
						   type == INT4OID ? DatumGetInt32(value) : DatumGetInt16(value));
}

bool
change_is_id_type(Oid type)
{
	return type == TEXTOID || type == VARCHAROID || type == INT2OID || type == INT4OID ||
		type == INT8OID || type == NUMERICOID || type == UUIDOID;
}

/* The id as text, before its content is looked at */
static text *
id_to_text(Oid type, Datum value, const char *what)
{
	/* none of the types below this is a domain, and a look-up a row is felt */
	Oid			base = type < FirstGenbkiObjectId ? type : getBaseType(type);

	switch (base)
	{
		case TEXTOID:
		case VARCHAROID:
			return DatumGetTextPP(value);
		case UNKNOWNOID:
			return cstring_to_text(DatumGetCString(value));
		case INT2OID:
		case INT4OID:
		case INT8OID:
		case NUMERICOID:
			return id_from_number(base, value, what);
		case UUIDOID:
			return cstring_to_text(DatumGetCString(OidFunctionCall1(F_UUID_OUT, value)));
		default:
			ereport(ERROR,
					(errcode(ERRCODE_DATATYPE_MISMATCH),
					 errmsg("%s must not be of type %s", what, format_type_be(type)),
					 errdetail("An id is text, varchar, smallint, integer, bigint, numeric or uuid."),
					 errhint("Cast it: %s::text.", what)));
	}
	return NULL;				/* keep compiler quiet */
}

text *
change_id(Oid type, Datum value, bool isnull, const char *what)
{
	text	   *id;
	const char *str;
	int			len;

	if (isnull)
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("%s must not be null", what),
				 errhint("Leave such rows out: WHERE %s IS NOT NULL.", what)));

	id = id_to_text(type, value, what);
	str = VARDATA_ANY(id);
	len = VARSIZE_ANY_EXHDR(id);
	if (len == 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("%s must not be empty", what),
				 errhint("Leave such rows out: WHERE %s <> ''.", what)));
	if (longer_than(str, len, USERPILOT_MAX_ID_CHARS))
		ereport(ERROR,
				(errcode(ERRCODE_STRING_DATA_RIGHT_TRUNCATION),
				 errmsg("%s is longer than %d characters", what, USERPILOT_MAX_ID_CHARS),
				 errdetail("It begins with \"%s\".", pnstrdup(str, pg_mbcliplen(str, len, 40)))));
	check_encoding(str, len, what);
	return id;
}

/* A property's name as it stands in an error message, cut if need be */
static char *
property_label(const JsonbValue *name)
{
	int			len = pg_mbcliplen(name->val.string.val, name->val.string.len, 80);

	return psprintf("metadata.\"%.*s\"%s", len, name->val.string.val,
					len < name->val.string.len ? "..." : "");
}

bool
change_is_name(const char *name, int len)
{
	return len > 0 && !longer_than(name, len, USERPILOT_MAX_NAME_CHARS);
}

static void
check_name(const JsonbValue *name)
{
	if (name->val.string.len == 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("metadata has a property without a name"),
				 errhint("Remove it: metadata - ''.")));
	if (!change_is_name(name->val.string.val, name->val.string.len))
		ereport(ERROR,
				(errcode(ERRCODE_STRING_DATA_RIGHT_TRUNCATION),
				 errmsg("name of %s is longer than %d characters",
						property_label(name), USERPILOT_MAX_NAME_CHARS)));
	check_encoding(name->val.string.val, name->val.string.len, "a name in metadata");
}

static void
check_value(const JsonbValue *name, const JsonbValue *value)
{
	if (value->type != jbvString)
		return;
	if (longer_than(value->val.string.val, value->val.string.len, USERPILOT_MAX_VALUE_CHARS))
		ereport(ERROR,
				(errcode(ERRCODE_STRING_DATA_RIGHT_TRUNCATION),
				 errmsg("%s is longer than %d characters",
						property_label(name), USERPILOT_MAX_VALUE_CHARS),
				 errhint("Cut it in the query: left(value, %d).", USERPILOT_MAX_VALUE_CHARS)));
	if (!is_ascii(value->val.string.val, value->val.string.len))
		check_encoding(value->val.string.val, value->val.string.len, property_label(name));
}

static void
refuse_nested(const JsonbValue *name, const char *is_a)
{
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("%s is %s; Userpilot takes string, number, boolean or null",
					property_label(name), is_a),
			 errhint("Give its members names of their own, or send it as text: value::text.")));
}

/*
 * Whether the entries' headers alone show that all is well: most often they
 * do, and walking the values would be a good part of what enqueueing costs.
 * Names come before values; an entry holds its length, or its end.
 */
static bool
plainly_good(const JsonbContainer *object)
{
	int			n = JsonContainerSize(object);
	uint32		end = 0;

	if (GetDatabaseEncoding() != PG_UTF8)
		return false;
	for (int i = 0; i < 2 * n; i++)
	{
		JEntry		entry = object->children[i];
		uint32		len = JBE_OFFLENFLD(entry);

		if (JBE_HAS_OFF(entry))
			len -= end;
		end += len;
		if (i < n && (len == 0 || len > USERPILOT_MAX_NAME_CHARS))
			return false;
		if (JBE_ISCONTAINER(entry) ||
			(JBE_ISSTRING(entry) && len > USERPILOT_MAX_VALUE_CHARS))
			return false;
	}
	return true;
}

void
change_check_metadata(Jsonb *metadata)
{
	JsonbIterator *it;
	JsonbIteratorToken token;
	JsonbValue	name;
	JsonbValue	value;

	if (!JB_ROOT_IS_OBJECT(metadata))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("metadata must be a JSON object, not %s",
						JB_ROOT_IS_SCALAR(metadata) ? "a scalar" : "an array"),
				 errhint("Write it as jsonb_build_object('name', value, ...).")));
	if (JB_ROOT_COUNT(metadata) > USERPILOT_MAX_PROPERTIES)
		ereport(ERROR,
				(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
				 errmsg("metadata has %d properties; Userpilot takes %d",
						(int) JB_ROOT_COUNT(metadata), USERPILOT_MAX_PROPERTIES)));
	if (plainly_good(&metadata->root))
		return;

	it = JsonbIteratorInit(&metadata->root);
	(void) JsonbIteratorNext(&it, &name, false);	/* WJB_BEGIN_OBJECT */
	while ((token = JsonbIteratorNext(&it, &name, true)) == WJB_KEY)
	{
		check_name(&name);
		(void) JsonbIteratorNext(&it, &value, true);
		if (value.type == jbvBinary)
			refuse_nested(&name, JsonContainerIsArray(value.val.binary.data) ?
						  "an array" : "an object");
		check_value(&name, &value);
	}
}

static bool
is_complaint(int sqlstate)
{
	return ERRCODE_TO_CATEGORY(sqlstate) == ERRCODE_DATA_EXCEPTION ||
		sqlstate == ERRCODE_PROGRAM_LIMIT_EXCEEDED ||
		sqlstate == ERRCODE_STATEMENT_TOO_COMPLEX ||
		sqlstate == ERRCODE_DATATYPE_MISMATCH;
}

char *
change_complaint(void (*check) (void *arg), void *arg)
{
	MemoryContext context = CurrentMemoryContext;
	char	   *volatile complaint = NULL;

	/* checks take neither locks nor other resources: nothing to clean up */
	PG_TRY();
	{
		check(arg);
	}
	PG_CATCH();
	{
		ErrorData  *error;

		MemoryContextSwitchTo(context);
		error = CopyErrorData();
		if (!is_complaint(error->sqlerrcode))
			PG_RE_THROW();
		FlushErrorState();
		complaint = error->message;
	}
	PG_END_TRY();
	return complaint;
}

Jsonb *
change_no_metadata(void)
{
	JsonbParseState *state = NULL;

	pushJsonbValue(&state, WJB_BEGIN_OBJECT, NULL);
	return JsonbValueToJsonb(pushJsonbValue(&state, WJB_END_OBJECT, NULL));
}
