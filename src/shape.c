/*
 * shape.c
 *	  What a server's options make of metadata before it is queued.
 *
 * Done on the way in: what is excluded is not stored, and everything behind the
 * queue deals with what Userpilot is to have.  Only what has been excluded since
 * is left out when it is sent.
 */
#include "postgres.h"

#include "lib/stringinfo.h"
#include "mb/pg_wchar.h"
#include "utils/builtins.h"
#include "utils/numeric.h"

#include "shape.h"
#include "userpilot.h"

/* Whatever the encoding, what is longer is no name that can be sent; nor is
 * anything nested deeper looked at, which bounds the stack */
#define MAX_PATH_BYTES (USERPILOT_MAX_NAME_CHARS * MAX_MULTIBYTE_CHAR_LEN)

/* So many are refused, and memory is not to follow what nests and repeats */
#define MAX_MEMBERS (20 * USERPILOT_MAX_PROPERTIES)

int
shape_names(const char *list, char ***names)
{
	char	   *copy = pstrdup(list);
	int			n = 0;
	char	   *next;

	*names = palloc((strlen(list) + 1) * sizeof(char *));
	for (char *name = copy; name != NULL; name = next)
	{
		char	   *end;

		next = strchr(name, ',');
		end = next ? next : name + strlen(name);
		while (*name == ' ')
			name++;
		while (end > name && end[-1] == ' ')
			end--;
		if (next != NULL)
			next++;
		if (end == name)
			return -1;
		*end = '\0';
		(*names)[n++] = name;
	}
	return n;
}

bool
shape_excludes(const Shape *shape, const char *name, int len)
{
	for (int i = 0; i < shape->nexcluded; i++)
	{
		int			n = strlen(shape->excluded[i]);

		/* an object's members go with it, flattened here or before */
		if (n <= len && strncmp(shape->excluded[i], name, n) == 0 && (n == len || name[n] == '.'))
			return true;
	}
	return false;
}

bool
shape_excludes_same(const Shape *a, const Shape *b)
{
	if (a->nexcluded != b->nexcluded)
		return false;
	for (int i = 0; i < a->nexcluded; i++)
	{
		if (strcmp(a->excluded[i], b->excluded[i]) != 0)
			return false;
	}
	return true;
}

static void
push_name(JsonbParseState **state, const char *name, int len)
{
	JsonbValue	v;

	v.type = jbvString;
	v.val.string.val = (char *) name;
	v.val.string.len = len;
	pushJsonbValue(state, WJB_KEY, &v);
}

static void
push_value(JsonbParseState **state, bool as_string, JsonbValue *value)
{
	JsonbValue	v = *value;

	if (as_string && value->type == jbvNumeric)
	{
		v.type = jbvString;
		v.val.string.val = numeric_normalize(value->val.numeric);
		v.val.string.len = strlen(v.val.string.val);
	}
	else if (as_string && value->type == jbvBool)
	{
		v.type = jbvString;
		v.val.string.val = value->val.boolean ? "true" : "false";
		v.val.string.len = strlen(v.val.string.val);
	}
	/* arrays, and objects that stay: whole, for the caller to be refused */
	pushJsonbValue(state, WJB_VALUE, &v);
}

typedef struct Walk
{
	StringInfoData path;		/* of the object, ends with a dot or is empty */
	bool		flatten;
	ShapeMember member;
	void	   *arg;
	int			taken;
} Walk;

static void
walk(Walk *w, JsonbContainer *object)
{
	JsonbIterator *it = JsonbIteratorInit(object);
	StringInfo	path = &w->path;
	int			len = path->len;
	JsonbValue	name;
	JsonbValue	value;

	(void) JsonbIteratorNext(&it, &name, false);
	while (w->taken < MAX_MEMBERS && JsonbIteratorNext(&it, &name, true) == WJB_KEY)
	{
		bool		descend;

		(void) JsonbIteratorNext(&it, &value, true);
		descend = w->flatten && value.type == jbvBinary &&
			JsonContainerIsObject(value.val.binary.data);
		appendBinaryStringInfo(path, name.val.string.val, name.val.string.len);
		if (descend && path->len <= MAX_PATH_BYTES)
		{
			appendStringInfoChar(path, '.');
			walk(w, value.val.binary.data);
		}
		else
		{
			/* of the names below none could be sent: this one says so */
			if (descend)
				value.type = jbvNull;
			w->taken += w->member(path->data, &value, w->arg);
		}
		path->len = len;
		path->data[len] = '\0';
	}
}

void
shape_walk(JsonbContainer *object, const char *prefix, bool flatten,
		   ShapeMember member, void *arg)
{
	Walk		w = {.flatten = flatten,.member = member,.arg = arg};

	initStringInfo(&w.path);
	appendStringInfoString(&w.path, prefix);
	walk(&w, object);
	pfree(w.path.data);
}

typedef struct Shaping
{
	const Shape *shape;
	bool		as_string;
	JsonbParseState *state;
} Shaping;

static bool
push_member(const char *name, JsonbValue *value, void *arg)
{
	Shaping    *shaping = arg;
	int			len = strlen(name);

	if (shape_excludes(shaping->shape, name, len))
		return false;
	push_name(&shaping->state, pnstrdup(name, len), len);
	push_value(&shaping->state, shaping->as_string, value);
	return true;
}

/* Whether anything would be other than it is */
static bool
changes(const Shape *shape, bool as_string, Jsonb *metadata)
{
	JsonbIterator *it = JsonbIteratorInit(&metadata->root);
	JsonbValue	v;

	(void) JsonbIteratorNext(&it, &v, false);
	while (JsonbIteratorNext(&it, &v, true) == WJB_KEY)
	{
		if (shape_excludes(shape, v.val.string.val, v.val.string.len))
			return true;
		(void) JsonbIteratorNext(&it, &v, true);
		if (as_string && (v.type == jbvNumeric || v.type == jbvBool))
			return true;
		if (shape->flatten && v.type == jbvBinary && JsonContainerIsObject(v.val.binary.data))
			return true;
	}
	return false;
}

Jsonb *
shape_metadata(const Shape *shape, UserpilotKind kind, Jsonb *metadata)
{
	bool		as_string = shape->user_strings && kind == USERPILOT_USER;
	Shaping		shaping = {shape, as_string, NULL};

	if (shape->nexcluded == 0 && !shape->flatten && !as_string)
		return metadata;
	if (!JB_ROOT_IS_OBJECT(metadata) || !changes(shape, as_string, metadata))
		return metadata;
	pushJsonbValue(&shaping.state, WJB_BEGIN_OBJECT, NULL);
	shape_walk(&metadata->root, "", shape->flatten, push_member, &shaping);
	return JsonbValueToJsonb(pushJsonbValue(&shaping.state, WJB_END_OBJECT, NULL));
}
