/*
 * merge_cases.c
 *	  The rules of merge.h one by one, each in the smallest case that shows
 *	  it, with a name to read when it breaks.
 *
 * Generated histories (merge_histories.c) find what nobody thought of, but
 * say only that something is wrong.
 */
#include "postgres_fe.h"

#include <malloc.h>

#include "merge.h"
#include "merge_cases.h"

/*
 * The bulk SELECTs the cases name.  1 read first, though it is queued by a
 * later transaction than 2; 2 and 3 read with the same snapshot, in one
 * transaction that had its xid before; 4 read last.
 */
static const uint64 xip1[] = {10, 12};
static const uint64 xip2[] = {12, 20};
static const MergeBatch batches[] = {
	{.id = 1,.xid = 40,.lsn = 100,.xmin = 10,.xmax = 15,.nxip = 2,.xip = xip1},
	{.id = 2,.xid = 22,.lsn = 200,.xmin = 12,.xmax = 25,.nxip = 2,.xip = xip2},
	{.id = 3,.xid = 22,.lsn = 300,.xmin = 12,.xmax = 25,.nxip = 2,.xip = xip2},
	{.id = 4,.xid = 50,.lsn = 400,.xmin = 41,.xmax = 41}
};

#define ORDER1 13				/* 15 - 2 */
#define ORDER2 22				/* 25 - 2, and one for its own */
#define ORDER4 41

typedef enum StepKind
{
	STEP_NONE,
	STEP_PROFILE,
	STEP_DIRECT,
	STEP_BATCH,
	STEP_FINISH,
	STEP_MARK,
	STEP_LEARN
} StepKind;

/* All steps are about one key, "k" */
typedef struct Step
{
	StepKind	kind;
	const char *value;
	uint64		lsn;
	uint64		xid;
	uint64		order;
	int64		batch;
} Step;

/* Value NULL: unknown */
#define PROFILE(v, l, x, o) \
	{.kind = STEP_PROFILE, .value = (v), .lsn = (l), .xid = (x), .order = (o)}
#define DIRECT(v, l, x) \
	{.kind = STEP_DIRECT, .value = (v), .lsn = (l), .xid = (x)}
#define BATCH(v, l, b) \
	{.kind = STEP_BATCH, .value = (v), .lsn = (l), .batch = (b)}
#define FINISH {.kind = STEP_FINISH}
#define MARK {.kind = STEP_MARK}
#define LEARN {.kind = STEP_LEARN}

typedef struct Case
{
	const char *name;
	Step		steps[8];
	const char *send;			/* NULL: nothing is sent */
	MergeVersion after;
} Case;

static const Case cases[] = {
	{"a first change is sent",
		{DIRECT("1", 50, 11)}, "1", {50, 11, 0}},
	{"the higher lsn wins",
		{DIRECT("1", 50, 11), DIRECT("2", 60, 12)}, "2", {60, 12, 0}},
	{"whatever the order of folding",
		{DIRECT("2", 60, 12), DIRECT("1", 50, 13)}, "2", {60, 12, 0}},
	{"on equal lsn the one folded later wins",
		{DIRECT("1", 50, 11), DIRECT("2", 50, 11)}, "2", {50, 11, 0}},
	{"a newer change goes over a known value",
		{PROFILE("1", 50, 11, 0), DIRECT("2", 60, 12)}, "2", {60, 12, 0}},
	{"an equal value is not sent, its version rises",
		{PROFILE("1", 50, 11, 0), DIRECT("1", 60, 12)}, NULL, {60, 12, 0}},
	{"equal bytes of another type are another value",
		{PROFILE("1", 50, 11, 0), DIRECT("'1", 60, 12)}, "'1", {60, 12, 0}},
	{"true is not false",
		{PROFILE("t", 50, 11, 0), DIRECT("f", 60, 12)}, "f", {60, 12, 0}},
	{"null is sent, for it removes",
		{PROFILE("1", 50, 11, 0), DIRECT("n", 60, 12)}, "n", {60, 12, 0}},
	{"null over null is not sent",
		{PROFILE("n", 50, 11, 0), DIRECT("n", 60, 12)}, NULL, {60, 12, 0}},
	{"an empty string is not null",
		{PROFILE("n", 50, 11, 0), DIRECT("'", 60, 12)}, "'", {60, 12, 0}},
	{"an older change does nothing",
		{PROFILE("1", 50, 11, 0), DIRECT("2", 40, 12)}, NULL, {50, 11, 0}},
	{"an older change does nothing to an unknown value",
		{PROFILE(NULL, 50, 11, 0), DIRECT("2", 40, 12)}, NULL, {50, 11, 0}},
	{"as new while unknown: sent again",
		{PROFILE(NULL, 50, 11, 0), DIRECT("1", 50, 11)}, "1", {50, 11, 0}},
	{"as new and known: nothing",
		{PROFILE("1", 50, 11, 0), DIRECT("2", 50, 11)}, NULL, {50, 11, 0}},
	{"a known value without a version gives way",
		{PROFILE("1", 0, 0, 0), DIRECT("2", 40, 12)}, "2", {40, 12, 0}},
	{"a profile set after the changes counts",
		{DIRECT("1", 50, 11), PROFILE("1", 40, 9, 0)}, NULL, {50, 11, 0}},
	{"a profile set twice: the last counts",
		{PROFILE("1", 40, 9, 0), PROFILE(NULL, 45, 9, 7), DIRECT("1", 50, 11)},
		"1", {50, 11, 7}},

	{"a first batch row has no version but its order",
		{BATCH("1", 500, 1)}, "1", {0, 0, ORDER1}},
	{"a batch row beats what it saw",
		{DIRECT("1", 90, 11), BATCH("2", 500, 1)}, "2", {90, 11, ORDER1}},
	{"even if that lies behind it in the WAL",
		{BATCH("2", 95, 1), DIRECT("1", 120, 11)}, "2", {120, 11, ORDER1}},
	{"in progress at the snapshot is later",
		{BATCH("2", 500, 1), DIRECT("1", 90, 12)}, "1", {90, 12, 0}},
	{"begun after the snapshot is later",
		{DIRECT("1", 90, 15), BATCH("2", 500, 1)}, "1", {90, 15, 0}},
	{"a delivered later change keeps a batch row out",
		{PROFILE("1", 90, 12, 0), BATCH("2", 500, 1)}, NULL, {90, 12, 0}},
	{"one marked too",
		{PROFILE(NULL, 90, 12, 0), BATCH("2", 500, 1)}, NULL, {90, 12, 0}},
	{"a delivered change that it saw does not",
		{PROFILE("1", 90, 11, 0), BATCH("2", 500, 1)}, "2", {90, 11, ORDER1}},
	{"any later change counts, not the newest alone",
		{DIRECT("1", 80, 12), DIRECT("2", 90, 11), BATCH("3", 500, 1)},
		"2", {90, 11, 0}},
	{"a change without an xid is no later one",
		{DIRECT("1", 90, 0), BATCH("2", 500, 1)}, "2", {90, 0, ORDER1}},
	{"an equal batch row raises the order alone",
		{PROFILE("1", 90, 11, 0), BATCH("1", 500, 1)}, NULL, {90, 11, ORDER1}},

	{"its own transaction's earlier change was read",
		{DIRECT("1", 150, 22), BATCH("2", 500, 2)}, "2", {150, 22, ORDER2}},
	{"so it was if its xid is above xmax",
		{DIRECT("1", 90, 40), BATCH("2", 500, 1)}, "2", {90, 40, ORDER1}},
	{"its own transaction's later change is later",
		{BATCH("2", 250, 2), DIRECT("1", 260, 22)}, "1", {260, 22, 0}},
	{"so is one delivered",
		{PROFILE("1", 260, 22, 0), BATCH("2", 250, 2)}, NULL, {260, 22, 0}},
	{"of one's own changes the last decides",
		{DIRECT("1", 260, 22), DIRECT("3", 150, 22), BATCH("2", 250, 2)},
		"1", {260, 22, 0}},
	{"a later SELECT of the same transaction read it",
		{BATCH("2", 250, 2), DIRECT("1", 260, 22), BATCH("3", 350, 3)},
		"3", {260, 22, ORDER2}},
	{"to other SELECTs it is as any other change",
		{DIRECT("1", 150, 22), BATCH("2", 500, 1)}, "1", {150, 22, 0}},
	{"a SELECT that saw it to the end beats it",
		{DIRECT("1", 260, 22), BATCH("2", 500, 4)}, "2", {260, 22, ORDER4}},

	{"the SELECT that read later wins",
		{BATCH("2", 250, 2), BATCH("1", 500, 1)}, "2", {0, 0, ORDER2}},
	{"whatever the order of folding them",
		{BATCH("1", 500, 1), BATCH("2", 250, 2)}, "2", {0, 0, ORDER2}},
	{"one applied keeps an earlier one out",
		{PROFILE("2", 0, 0, ORDER2), BATCH("1", 500, 1)}, NULL, {0, 0, ORDER2}},
	{"but not a later direct change",
		{PROFILE("2", 0, 0, ORDER2), BATCH("1", 500, 1), DIRECT("3", 90, 12)},
		"3", {90, 12, ORDER2}},
	{"one that it saw comes too late, though its position is higher",
		{PROFILE("2", 0, 0, ORDER2), DIRECT("3", 90, 11)}, NULL, {0, 0, ORDER2}},
	{"but is better than nothing while the value is unknown",
		{PROFILE(NULL, 0, 0, ORDER2), DIRECT("3", 90, 11)}, "3", {90, 11, ORDER2}},
	{"unless that SELECT is no longer on record",
		{PROFILE("2", 0, 0, 7), DIRECT("3", 90, 11)}, "3", {90, 11, 7}},
	{"one applied gives way to a later one",
		{PROFILE("2", 0, 0, ORDER1), BATCH("3", 250, 2)}, "3", {0, 0, ORDER2}},
	{"one refused may be sent again",
		{PROFILE(NULL, 0, 0, ORDER1), BATCH("1", 500, 1)}, "1", {0, 0, ORDER1}},
	{"equal snapshots go by where they began",
		{BATCH("3", 350, 3), BATCH("2", 360, 2)}, "3", {0, 0, ORDER2}},
	{"rows of one SELECT go by their place",
		{BATCH("2", 510, 1), BATCH("1", 500, 1)}, "2", {0, 0, ORDER1}},
	{"and at one place by folding",
		{BATCH("1", 500, 1), BATCH("2", 500, 1)}, "2", {0, 0, ORDER1}},
	{"later than an early SELECT is not later than a late one",
		{DIRECT("1", 90, 16), BATCH("2", 500, 1), BATCH("3", 510, 2)},
		"3", {90, 16, ORDER2}},

	{"marked but not learned: sent again",
		{DIRECT("1", 50, 11), FINISH, MARK}, "1", {50, 11, 0}},
	{"a marked batch row too",
		{BATCH("1", 500, 1), FINISH, MARK}, "1", {0, 0, ORDER1}},
	{"learned: nothing to send",
		{DIRECT("1", 50, 11), FINISH, MARK, LEARN}, NULL, {50, 11, 0}},
	{"a learned batch row too",
		{BATCH("1", 500, 1), FINISH, MARK, LEARN}, NULL, {0, 0, ORDER1}},
	{"learned, then changed",
		{DIRECT("1", 50, 11), FINISH, MARK, LEARN, DIRECT("2", 60, 12)},
		"2", {60, 12, 0}},
	{"marked, then changed back to what was there",
		{PROFILE("1", 40, 9, 0), DIRECT("2", 50, 11), FINISH, MARK, DIRECT("1", 60, 12)},
		"1", {60, 12, 0}},
	{"finished twice is finished once",
		{DIRECT("1", 50, 11), FINISH, FINISH}, "1", {50, 11, 0}}
};

/* n, t, f: null, true, false; '…: a string; else a number */
static MergeValue
parse_value(const char *text)
{
	MergeValue	value = {MERGE_NUMBER, (int) strlen(text), text};

	if (text[0] == '\'')
	{
		value.type = MERGE_STRING;
		value.len--;
		value.data++;
	}
	else if (strchr("ntf", text[0]) != NULL)
	{
		value.type = text[0] == 'n' ? MERGE_NULL :
			text[0] == 't' ? MERGE_TRUE : MERGE_FALSE;
		value.len = 0;
		value.data = NULL;
	}
	return value;
}

/* Does one step of a case */
static void
run_step(const Step *step, MergeEntity *entity, const MergeBatches *set)
{
	MergeProperty property = {"k", 1, {MERGE_NULL, 0, NULL}};
	MergeVersion version = {step->lsn, step->xid, step->order};

	if (step->value != NULL)
		property.value = parse_value(step->value);
	switch (step->kind)
	{
		case STEP_NONE:
			break;
		case STEP_PROFILE:
			merge_profile(entity, "k", 1, &version,
						  step->value != NULL ? &property.value : NULL);
			break;
		case STEP_DIRECT:
			merge_change(entity, step->lsn, step->xid, NULL, &property, 1);
			break;
		case STEP_BATCH:
			merge_change(entity, step->lsn, 0,
						 merge_batches_find(set, step->batch), &property, 1);
			break;
		case STEP_FINISH:
			merge_finish(entity);
			break;
		case STEP_MARK:
			merge_mark(entity);
			break;
		case STEP_LEARN:
			merge_learn(entity);
			break;
	}
}

/* Runs a case; returns whether key "k" ends as it says */
static bool
case_passes(const Case *c, const MergeBatches *set)
{
	MergeEntity *entity = merge_begin(set);
	const MergeKey *key;
	bool		passes;
	int			nsend;
	int			i;

	for (i = 0; i < (int) lengthof(c->steps); i++)
		run_step(&c->steps[i], entity, set);
	nsend = merge_finish(entity);

	key = &entity->keys[0];
	passes = entity->nkeys == 1 && nsend == (c->send != NULL ? 1 : 0) &&
		key->send == (c->send != NULL) &&
		key->after.lsn == c->after.lsn && key->after.xid == c->after.xid &&
		key->after.order == c->after.order;
	if (passes && c->send != NULL)
	{
		MergeValue	value = parse_value(c->send);

		passes = key->sending.type == value.type &&
			key->sending.len == value.len &&
			(value.len == 0 ||
			 memcmp(key->sending.data, value.data, value.len) == 0);
	}
	merge_free(entity);
	return passes;
}

/*
 * Many keys are found again in any order, and memory does not follow the
 * changes: not without bulk SELECTs, nor with changes some of them cannot see.
 */
static bool
memory_is_bounded(const MergeBatches *set)
{
	MergeEntity *entity = merge_begin(set);
	MergeProperty property;
	char		name[16];
	char		value[16];
	size_t		bytes = 0;
	bool		passes;
	int			i;

	for (i = 0; i < 50000; i++)
	{
		property.name = name;
		property.namelen = snprintf(name, sizeof(name), "%d", i * 7919 % 500);
		property.value.type = MERGE_NUMBER;
		property.value.len = snprintf(value, sizeof(value), "%08d", i);
		property.value.data = value;
		merge_change(entity, i, 5 + i % 60, NULL, &property, 1);
		if (i == 10000)
			bytes = mallinfo2().uordblks;
	}
	passes = entity->nkeys == 500 && mallinfo2().uordblks == bytes &&
		merge_finish(entity) == 500 && entity->keys[0].sending.len == 8 &&
		memcmp(entity->keys[0].sending.data, "00049500", 8) == 0;
	merge_free(entity);
	return passes;
}

/*
 * Changes that name more properties than a body takes go in two bodies, of
 * which the second has what the first had no room for; the company is none.
 */
static bool
rest_goes_later(void)
{
	MergeEntity *entity = merge_begin(NULL);
	MergeProperty property = {.value = {MERGE_STRING, 4, "acme"}};
	char		name[16];
	bool		passes;
	int			i;

	property.name = name;
	for (i = 0; i < 600; i++)
	{
		property.namelen = snprintf(name, sizeof(name), "%d", i);
		merge_change(entity, 7, 7, NULL, &property, 1);
	}
	property.name = MERGE_COMPANY_KEY;
	property.namelen = 0;
	merge_change(entity, 7, 7, NULL, &property, 1);

	passes = merge_finish(entity) == 501 && entity->more;
	merge_mark(entity);
	merge_learn(entity);
	passes &= entity->keys[499].known && entity->keys[499].version.lsn == 7 &&
		!entity->keys[500].known && entity->keys[500].version.lsn == 0 &&
		entity->keys[600].known;
	passes &= merge_finish(entity) == 100 && !entity->more && entity->keys[500].send;
	merge_mark(entity);
	merge_learn(entity);
	passes &= merge_finish(entity) == 0 && !entity->more;
	merge_free(entity);
	return passes;
}

static void
report(bool passes, const char *name, int *n, int *failed)
{
	printf("%sok %d - %s\n", passes ? "" : "not ", ++*n, name);
	*failed += passes ? 0 : 1;
}

/* Runs all cases; prints TAP lines numbered from 1 */
int
merge_cases(int *failed)
{
	MergeBatches set;
	int			n = 0;
	int			i;

	merge_batches_init(&set, batches, lengthof(batches));
	*failed = 0;
	for (i = 0; i < (int) lengthof(cases); i++)
		report(case_passes(&cases[i], &set), cases[i].name, &n, failed);
	report(memory_is_bounded(&set), "memory follows keys, not changes", &n, failed);
	report(rest_goes_later(), "600 properties go in two bodies", &n, failed);
	merge_batches_free(&set);
	return n;
}
