/*
 * mapping.c
 *	  What the arguments of a trigger say of its table: read once a statement,
 *	  by the trigger, by a sync, and by the check for mistakes.
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"

#include "environment.h"
#include "mapping.h"

#define COMPANY_PROPERTY "company_id"
#define SERVER_ARGUMENT "server="

static const char *const function_names[USERPILOT_KINDS] = {
	[USERPILOT_COMPANY] = "userpilot_company_trigger",
	[USERPILOT_USER] = "userpilot_user_trigger"
};

const char *
mapping_function(UserpilotKind kind)
{
	return function_names[kind];
}

bool
mapping_is_ours(const Trigger *trigger, UserpilotKind *kind)
{
	char	   *name = get_func_name(trigger->tgfoid);

	if (name == NULL || get_func_namespace(trigger->tgfoid) != environment_schema())
		return false;
	for (int i = 0; i < USERPILOT_KINDS; i++)
	{
		if (strcmp(name, function_names[i]) == 0)
		{
			*kind = (UserpilotKind) i;
			return true;
		}
	}
	return false;
}

/* ------------------------------------------------------------- arguments */

static void
complain(Mapping *mapping, char *problem)
{
	mapping->problems = lappend(mapping->problems, problem);
}

static AttrNumber
find_column(TupleDesc desc, const char *name)
{
	for (int i = 0; i < desc->natts; i++)
	{
		Form_pg_attribute att = TupleDescAttr(desc, i);

		if (!att->attisdropped && strcmp(NameStr(att->attname), name) == 0)
			return att->attnum;
	}
	return InvalidAttrNumber;
}

static Oid
column_type(TupleDesc desc, AttrNumber attnum)
{
	return getBaseType(TupleDescAttr(desc, attnum - 1)->atttypid);
}

static MappingConversion
conversion_of(Oid type)
{
	switch (type)
	{
		case BOOLOID:
			return CONVERT_BOOL;
		case INT2OID:
		case INT4OID:
		case INT8OID:
			return CONVERT_INTEGER;
		case FLOAT4OID:
		case FLOAT8OID:
			return CONVERT_FLOAT;
		case NUMERICOID:
			return CONVERT_NUMERIC;
		case DATEOID:
		case TIMEOID:
		case TIMETZOID:
		case TIMESTAMPOID:
		case TIMESTAMPTZOID:
			return CONVERT_DATETIME;
		case TEXTOID:
		case VARCHAROID:
		case BPCHAROID:
			return CONVERT_TEXT;
		case JSONOID:
		case JSONBOID:
			return CONVERT_JSON;
		default:
			return CONVERT_OUTPUT;
	}
}

/* Whether a type's output names objects, by their place in the search_path */
static bool
outputs_names(Oid type)
{
	Oid			element = get_element_type(type);

	switch (OidIsValid(element) ? getBaseType(element) : type)
	{
		case REGCLASSOID:
		case REGCOLLATIONOID:
		case REGCONFIGOID:
		case REGDICTIONARYOID:
		case REGNAMESPACEOID:
		case REGOPEROID:
		case REGOPERATOROID:
		case REGPROCOID:
		case REGPROCEDUREOID:
		case REGROLEOID:
		case REGTYPEOID:
			return true;
		default:
			return get_typtype(type) == TYPTYPE_COMPOSITE;
	}
}

static char *
without_trailing_blanks(char *name)
{
	for (char *end = name + strlen(name); end > name && end[-1] == ' ';)
		*--end = '\0';
	return name;
}

/* Property and column of 'column' or 'column AS property' */
static void
split_argument(const char *arg, TupleDesc desc, char **column, char **property, bool *renamed)
{
	*column = pstrdup(arg);
	*property = *column;
	*renamed = false;
	/* a column may be called so */
	if (find_column(desc, arg) != InvalidAttrNumber)
		return;
	for (const char *as = arg; *as != '\0'; as++)
	{
		if (as == arg || pg_strncasecmp(as, " as ", 4) != 0)
			continue;
		*column = without_trailing_blanks(pnstrdup(arg, as - arg));
		*property = without_trailing_blanks(pstrdup(as + 4 + strspn(as + 4, " ")));
		*renamed = true;
	}
}

/* Whether the column has no value until it is read; complains if so */
static bool
is_virtual(Mapping *mapping, TupleDesc desc, AttrNumber attnum, const char *column)
{
	if (TupleDescAttr(desc, attnum - 1)->attgenerated != 'v')
		return false;
	complain(mapping, psprintf("column \"%s\" is generated on reading, so no trigger sees it", column));
	return true;
}

static void
add_column(Mapping *mapping, TupleDesc desc, char *column, char *property, bool renamed)
{
	MappingColumn *added = &mapping->columns[mapping->ncolumns];
	AttrNumber	attnum = find_column(desc, column);
	Oid			output;
	bool		varlena;

	if (attnum == InvalidAttrNumber)
	{
		complain(mapping, psprintf("there is no column \"%s\"", column));
		return;
	}
	if (is_virtual(mapping, desc, attnum, column))
		return;
	if (mapping->kind == USERPILOT_USER && strcmp(property, COMPANY_PROPERTY) == 0)
	{
		if (mapping->company != InvalidAttrNumber)
			complain(mapping, pstrdup("company_id is named twice"));
		mapping->company = attnum;
		mapping->company_type = column_type(desc, attnum);
		return;
	}
	for (int i = 0; i < mapping->ncolumns; i++)
	{
		if (strcmp(mapping->columns[i].property, property) == 0)
		{
			complain(mapping, psprintf("property \"%s\" is named twice", property));
			return;
		}
	}
	added->attnum = attnum;
	added->column = column;
	added->property = property;
	added->renamed = renamed;
	added->type = column_type(desc, attnum);
	added->conversion = conversion_of(added->type);
	if (added->conversion == CONVERT_OUTPUT)
	{
		getTypeOutputInfo(added->type, &output, &varlena);
		fmgr_info(output, &added->output);
		mapping->pins_settings |= get_typtype(added->type) != TYPTYPE_ENUM &&
			added->type != UUIDOID;
		mapping->pins_names |= outputs_names(added->type);
	}
	mapping->ncolumns++;
}

static bool
is_mapped(const Mapping *mapping, AttrNumber attnum)
{
	if (attnum == mapping->id || attnum == mapping->company)
		return true;
	for (int i = 0; i < mapping->ncolumns; i++)
	{
		if (mapping->columns[i].attnum == attnum)
			return true;
	}
	return false;
}

/* '*': every column that nothing else names */
static void
add_other_columns(Mapping *mapping, TupleDesc desc)
{
	for (int i = 0; i < desc->natts; i++)
	{
		Form_pg_attribute att = TupleDescAttr(desc, i);
		char	   *name = pstrdup(NameStr(att->attname));

		if (!att->attisdropped && att->attgenerated != 'v' && !is_mapped(mapping, att->attnum))
			add_column(mapping, desc, name, name, false);
	}
}

Mapping *
mapping_read(UserpilotKind kind, char **args, int nargs, TupleDesc desc)
{
	Mapping    *mapping = palloc0(sizeof(Mapping));
	bool		others = false;

	mapping->kind = kind;
	mapping->columns = palloc0((nargs + desc->natts) * sizeof(MappingColumn));
	for (int i = 0; i < nargs; i++)
	{
		char	   *column;
		char	   *property;
		bool		renamed;

		if (strncmp(args[i], SERVER_ARGUMENT, strlen(SERVER_ARGUMENT)) == 0)
			mapping->server = pstrdup(args[i] + strlen(SERVER_ARGUMENT));
		else if (mapping->id_column == NULL)
		{
			mapping->id_column = pstrdup(args[i]);
			mapping->id = find_column(desc, args[i]);
			if (mapping->id != InvalidAttrNumber)
			{
				mapping->id_type = column_type(desc, mapping->id);
				(void) is_virtual(mapping, desc, mapping->id, args[i]);
			}
			else
				complain(mapping, psprintf("there is no column \"%s\" for the id", args[i]));
		}
		else if (strcmp(args[i], "*") == 0)
			others = true;
		else
		{
			split_argument(args[i], desc, &column, &property, &renamed);
			add_column(mapping, desc, column, property, renamed);
		}
	}
	if (mapping->id_column == NULL)
	{
		mapping->id_column = pstrdup("id");
		complain(mapping, pstrdup("the first argument must name the column of the id"));
	}
	if (others)
		add_other_columns(mapping, desc);
	return mapping;
}
