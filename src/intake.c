/*
 * intake.c
 *	  Many rows of one caller: bulk aggregates, previews, whole tables.
 *
 * Rows are gathered a few hundred at a time, so that looking up what
 * Userpilot has, and writing to the queue, are set up once for all of them,
 * and nothing stays open between two rows: a cursor may never come back.
 */
#include "postgres.h"

#include "access/transam.h"
#include "access/xact.h"
#include "lib/qunique.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/datum.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"

#include "intake.h"
#include "known.h"

#define GROUP_ROWS 500
#define GROUP_BYTES (1024 * 1024)

struct Intake
{
	EnvironmentRef server;
	UserpilotKind kind;
	QueueBatch *batch;			/* NULL: a preview */
	TransactionId order;		/* of the state it reads among others */
	CommandId	command;
	Known	   *known;			/* NULL: nothing may be left out */
	MemoryContext context;		/* what the gathered rows point to */
	int			n;
	Size		bytes;
	QueueChange changes[GROUP_ROWS];
	IntakeCounts *counts[GROUP_ROWS];
};

/*
 * The latest states by kind that bulk SELECTs of this transaction have read:
 * all of them, and those that left rows out.  Its own cursors may still read
 * older ones, which known.c does not see; and of two that others' transactions
 * do not tell apart, the one that begins last wins the merge.
 */
typedef struct ReadState
{
	FullTransactionId xid;
	TransactionId order;
	CommandId	command;		/* own changes of earlier ones are seen */
} ReadState;

static ReadState have_read[USERPILOT_KINDS];
static ReadState left_out[USERPILOT_KINDS];

static int
compare_state(const Intake *intake, const ReadState *state)
{
	int32		order = (int32) (intake->order - state->order);

	if (!FullTransactionIdEquals(state->xid, GetTopFullTransactionId()))
		return 1;
	if (order != 0)
		return order;
	return (intake->command > state->command) - (intake->command < state->command);
}

static void
note_state(const Intake *intake, ReadState *state)
{
	if (compare_state(intake, state) > 0)
		*state = (ReadState) {GetTopFullTransactionId(), intake->order, intake->command};
}

static void
refuse_order(void)
{
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_TRANSACTION_STATE),
			 errmsg("a bulk SELECT cannot read an older state than one before it in this transaction"),
			 errhint("Open its cursor, or call what runs it, after the other has ended.")));
}

static void
check_order(const Intake *intake)
{
	if (intake->batch != NULL && compare_state(intake, &left_out[intake->kind]) < 0)
		refuse_order();
}

/* Once its position in the WAL is taken, by which what the same transaction has
 * done is compared */
static void
check_begin(const Intake *intake)
{
	const ReadState *read = &have_read[intake->kind];

	if (queue_changed_since(intake->kind, intake->command))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_TRANSACTION_STATE),
				 errmsg("a bulk SELECT cannot read an older state than a change that was queued before it in this transaction"),
				 errhint("Make changes in a statement before it, and open its cursor after them.")));
	if (intake->order == read->order && compare_state(intake, read) < 0)
		refuse_order();
}

/* How many transactions had ended, as in merge.c */
static TransactionId
order_of(Snapshot snapshot)
{
	TransactionId *xip = palloc(Max(snapshot->xcnt, 1) * sizeof(TransactionId));
	size_t		n = snapshot->xcnt;

	/* one that is being prepared is there twice */
	memcpy(xip, snapshot->xip, n * sizeof(TransactionId));
	qsort(xip, n, sizeof(TransactionId), xidComparator);
	n = qunique(xip, n, sizeof(TransactionId), xidComparator);
	pfree(xip);
	return snapshot->xmax - n;
}

Intake *
intake_open(const EnvironmentRef *server, UserpilotKind kind, const char *command,
			const char *statement)
{
	Intake	   *intake = palloc0(sizeof(Intake));
	bool		judged = true;

	intake->server = *server;
	intake->server.name = (text *) DatumGetPointer(datumCopy(PointerGetDatum(server->name),
															 false, -1));
	intake->kind = kind;
	intake->context = AllocSetContextCreate(CurrentMemoryContext, "userpilot intake",
											ALLOCSET_DEFAULT_SIZES);
	intake->order = order_of(GetActiveSnapshot());
	intake->command = GetActiveSnapshot()->curcid;
	if (command != NULL)
	{
		judged = known_may_leave_out(server, kind) && !queue_in_command(kind);
		intake->batch = queue_batch_open(intake->server.name, kind, command, statement);
		check_begin(intake);
		note_state(intake, &have_read[kind]);
	}
	if (judged)
		intake->known = known_open(&intake->server, kind);
	return intake;
}

const EnvironmentRef *
intake_server(const Intake *intake)
{
	return &intake->server;
}

static text *
copy_text(text *value)
{
	return value ? (text *) DatumGetPointer(datumCopy(PointerGetDatum(value), false, -1)) : NULL;
}

void
intake_add(Intake *intake, const QueueChange *change, IntakeCounts *counts)
{
	QueueChange *copy = &intake->changes[intake->n];
	MemoryContext old;

	check_order(intake);
	counts->rows++;
	if (intake->known == NULL)
	{
		QueueChange row = *change;

		row.server = intake->server.name;
		counts->changed++;
		queue_batch_add(intake->batch, &row);
		return;
	}
	old = MemoryContextSwitchTo(intake->context);
	copy->server = intake->server.name;
	copy->kind = change->kind;
	copy->entity_id = copy_text(change->entity_id);
	copy->company_id = copy_text(change->company_id);
	copy->metadata = (Jsonb *) copy_text((text *) change->metadata);
	MemoryContextSwitchTo(old);
	intake->counts[intake->n++] = counts;
	intake->bytes += VARSIZE_ANY(copy->metadata);
	if (intake->n == GROUP_ROWS || intake->bytes >= GROUP_BYTES)
		intake_flush(intake);
}

void
intake_refuse(Intake *intake, const QueueChange *change, const char *error,
			  IntakeCounts *counts)
{
	counts->rows++;
	counts->invalid++;
	if (intake->batch != NULL)
	{
		QueueChange row = *change;

		row.server = intake->server.name;
		queue_refuse(&row, error, true);
		queue_batch_note(intake->batch, 0, 1);
	}
}

void
intake_flush(Intake *intake)
{
	KnownVerdict verdicts[GROUP_ROWS];
	int64		unchanged = 0;

	if (intake->n > 0)
		known_judge(intake->known, intake->changes, intake->n, verdicts);
	for (int i = 0; i < intake->n; i++)
	{
		IntakeCounts *counts = intake->counts[i];

		counts->fresh += verdicts[i] == KNOWN_NEW;
		counts->changed += verdicts[i] == KNOWN_CHANGED;
		counts->unchanged += verdicts[i] == KNOWN_UNCHANGED;
		unchanged += verdicts[i] == KNOWN_UNCHANGED;
		if (intake->batch != NULL && verdicts[i] != KNOWN_UNCHANGED)
			queue_batch_add(intake->batch, &intake->changes[i]);
	}
	intake->n = 0;
	intake->bytes = 0;
	MemoryContextReset(intake->context);
	if (intake->batch != NULL)
	{
		if (unchanged > 0)
			note_state(intake, &left_out[intake->kind]);
		queue_batch_note(intake->batch, unchanged, 0);
		queue_batch_flush(intake->batch);
	}
}
