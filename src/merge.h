/*
 * merge.h
 *	  What one entity's queued changes mean against what Userpilot is known
 *	  to have: which keys to send, and what the profile says afterwards.
 *
 * Pure: no SQL, no clock, no HTTP.  Builds with and without the server
 * (FRONTEND), so that generated histories can be run through it by the
 * hundred thousand.
 *
 * Changes are folded in one at a time, in any order but that rows of one
 * (lsn) come in physical order (each of a bulk SELECT has its own); memory per
 * entity follows its keys, not its changes.  Rows of one entity that share an lsn are to be folded in
 * together: once one of them is acknowledged the others count as old.
 */
#ifndef USERPILOT_MERGE_H
#define USERPILOT_MERGE_H

/*
 * A JSON scalar.  The bytes are opaque here: equal type and bytes, equal
 * value.  Null, true and false have no bytes.
 */
typedef enum MergeType
{
	MERGE_NULL,
	MERGE_TRUE,
	MERGE_FALSE,
	MERGE_NUMBER,
	MERGE_STRING
} MergeType;

typedef struct MergeValue
{
	MergeType	type;
	int			len;
	const char *data;
} MergeValue;

/*
 * Which change wrote a key.  "order" is the clock of the newest bulk SELECT
 * ever applied to the key (see MergeBatch); 0 if none.
 */
typedef struct MergeVersion
{
	uint64		lsn;
	uint64		xid;
	uint64		order;
} MergeVersion;

/*
 * A bulk SELECT: the snapshot it read with, and the transaction and WAL
 * position it ran at.  Its order, the number of transactions that had ended
 * when the snapshot was taken, never falls from one snapshot to the next and
 * so tells which of two SELECTs read later: xmax - nxip, and one less if its
 * own transaction had an xid by then, which no snapshot lists in its xip.
 */
typedef struct MergeBatch
{
	int64		id;
	uint64		xid;
	uint64		lsn;
	uint64		xmin;
	uint64		xmax;
	int			nxip;
	const uint64 *xip;			/* sorted ascending */
} MergeBatch;

/* All batches that can occur in one run; built once with merge_batches_init */
typedef struct MergeBatches
{
	int			n;
	const MergeBatch *batch;	/* sorted by id */
	const MergeBatch **by_order;	/* the same, oldest snapshot first */
	uint64	   *own;			/* their transactions, sorted ascending */
} MergeBatches;

/* The name of the key that holds a user's company; no property has it */
#define MERGE_COMPANY_KEY ""

typedef struct MergeProperty
{
	const char *name;
	int			namelen;
	MergeValue	value;
} MergeProperty;

typedef struct MergeKey
{
	char	   *name;
	int			namelen;

	/* profile */
	bool		known;
	MergeValue	value;			/* if known */
	MergeVersion version;		/* zero: never written */

	/* newest direct change folded in so far */
	bool		has_direct;
	uint64		direct_lsn;
	uint64		direct_xid;
	MergeValue	direct;

	/* newest batch row folded in so far */
	const MergeBatch *batch;
	uint64		batch_order;
	uint64		batch_lsn;		/* of the row */
	MergeValue	batched;

	/*
	 * What direct changes are later than, see merge.c: every batch of an
	 * order below later_than (0: none), and what the list says.
	 */
	uint64		later_than;
	int			nlater;
	int			maxlater;
	struct MergeLater *later;

	/* set by merge_finish */
	bool		send;			/* "sending" goes into the body */
	MergeValue	sending;
	bool		changed;		/* version differs from before */
	MergeVersion after;
} MergeKey;

/*
 * No entity is to fill the memory, or its profile more than jsonb takes.
 * Userpilot takes 500 properties of 65,535 characters.
 */
#define MERGE_MAX_KEYS 10000
#define MERGE_MAX_BYTES (64 * 1024 * 1024)

typedef struct MergeEntity
{
	const MergeBatches *batches;
	int			nkeys;
	int			maxkeys;
	MergeKey   *keys;
	int			next;			/* where the next key is likely to be */
	int		   *sorted;			/* indexes into keys, in some order of names */
	int64		bytes;			/* of keys, and of values folded in */
	bool		too_much;		/* what is folded in is beyond the bounds: not to
								 * be sent */
	bool		more;			/* set by merge_finish: another body is needed */
} MergeEntity;

/* The array, sorted by id, and each xip must live as long as the set */
extern void merge_batches_init(MergeBatches *set, const MergeBatch *batch, int n);
extern const MergeBatch *merge_batches_find(const MergeBatches *set, int64 id);

/*
 * All memory comes from CurrentMemoryContext (malloc without a server), which
 * is to be the same at every call for an entity.  batches, NULL for none, must
 * live until the last merge_finish, and hold every batch that is folded in.
 */
extern MergeEntity *merge_begin(const MergeBatches *batches);

/* What the profile holds for a key; value is NULL when unknown.  Copied. */
extern void merge_profile(MergeEntity *entity, const char *name, int namelen,
						  const MergeVersion *version, const MergeValue *value);

/*
 * Folds one queued change in; batch, one of the entity's, is NULL for a
 * direct change.  Copied.  Not between merge_finish and merge_learn: what is
 * being sent is not copied a second time.
 */
extern void merge_change(MergeEntity *entity, uint64 lsn, uint64 xid,
						 const MergeBatch *batch,
						 const MergeProperty *props, int nprops);

/*
 * Decides every key; returns how many are to be sent.  May be called again
 * after more changes have been folded in.  Changes that each fit into a body
 * may name more properties together than Userpilot takes in one: the rest is
 * as if it were not there yet, and "more" says so.  What would be more than a
 * profile may hold is not to be sent at all: "too_much".
 */
extern int	merge_finish(MergeEntity *entity);

/*
 * The entity's profile after the body has been marked: sent keys unknown,
 * versions raised.  And once it is acknowledged: sent keys known.  What was
 * folded in stays.
 */
extern void merge_mark(MergeEntity *entity);
extern void merge_learn(MergeEntity *entity);

/* Frees an entity and all it holds; the batches are the caller's */
extern void merge_free(MergeEntity *entity);

#ifdef FRONTEND
extern void merge_batches_free(MergeBatches *set);
#endif

#endif
