/*
 * shape.c
 *	  What a server's options make of metadata before it is queued.
 *
 * Done on the way in: what is excluded is not stored, and everything behind the
 * queue deals with what Userpilot is to have.  Only what has been excluded since
 * is left out when it is sent.
 */
#include "postgres.h"

#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/numeric.h"

#include "shape.h"

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

void
shape_walk(JsonbContainer *object, const char *prefix, bool flatten,
		   ShapeMember member, void *arg)
{
	JsonbIterator *it = JsonbIteratorInit(object);
	JsonbValue	name;
	JsonbValue	value;

	check_stack_depth();
	(void) JsonbIteratorNext(&it, &name, false);
	while (JsonbIteratorNext(&it, &name, true) == WJB_KEY)
	{
		char	   *whole = psprintf("%s%.*s", prefix, name.val.string.len, name.val.string.val);

		(void) JsonbIteratorNext(&it, &value, true);
		if (flatten && value.type == jbvBinary && JsonContainerIsObject(value.val.binary.data))
			shape_walk(value.val.binary.data, psprintf("%s.", whole), flatten, member, arg);
		else
			member(whole, &value, arg);
	}
}

typedef struct Shaping
{
	const Shape *shape;
	bool		as_string;
	JsonbParseState *state;
} Shaping;

static void
push_member(const char *name, JsonbValue *value, void *arg)
{
	Shaping    *shaping = arg;

	if (shape_excludes(shaping->shape, name, strlen(name)))
		return;
	push_name(&shaping->state, name, strlen(name));
	push_value(&shaping->state, shaping->as_string, value);
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
