/*
 * step.c
 *	  The worker's transactions: short, as the extension's owner, with settings
 *	  that no ALTER DATABASE or ALTER ROLE can change.
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_extension.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "storage/lmgr.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"

#include "compat.h"
#include "environment.h"
#include "profiles.h"
#include "sql.h"
#include "step.h"

static MemoryContext step_context;	/* current between steps; reset after each */
static Oid	step_user;
static int	step_sec_context;

static void
pin_settings(void)
{
	static const char *const settings[][2] = {
		{"search_path", "pg_catalog, pg_temp"},
		{"default_transaction_isolation", "read committed"},
		{"default_transaction_read_only", "off"},
		{"default_transaction_deferrable", "off"},
		{"statement_timeout", "0"},
		{"lock_timeout", "0"},
		{"idle_in_transaction_session_timeout", "0"},
		{"transaction_timeout", "0"},	/* from 17 on */
		{"row_security", "off"},
		{"jit", "off"},
		/* plans are kept, and made before the queue fills */
		{"enable_seqscan", "off"},
		{"enable_hashjoin", "off"},
		{"enable_mergejoin", "off"},
		{"plan_cache_mode", "force_generic_plan"}
	};

	for (size_t i = 0; i < lengthof(settings); i++)
		if (GetConfigOption(settings[i][0], true, false) != NULL)
			SetConfigOption(settings[i][0], settings[i][1], PGC_SUSET, PGC_S_OVERRIDE);
}

void
step_start_up(void)
{
	pin_settings();
	step_context = AllocSetContextCreate(TopMemoryContext, "userpilot step",
										 ALLOCSET_DEFAULT_SIZES);
	MemoryContextSwitchTo(step_context);
}

void
step_outside(void)
{
	MemoryContextSwitchTo(step_context);
}

bool
step_begin(Oid extension, Oid owner)
{
	SetCurrentStatementStartTimestamp();
	StartTransactionCommand();
	/* what DROP EXTENSION locks first, so that one of us waits for the other
	 * with nothing in hand: in a deadlock it could be the victim */
	LockDatabaseObject(ExtensionRelationId, extension, 0, AccessShareLock);
	if (environment_extension() != extension)
		return false;
	GetUserIdAndSecContext(&step_user, &step_sec_context);
	SetUserIdAndSecContext(owner, step_sec_context | SECURITY_RESTRICTED_OPERATION);
	profiles_lock();
	sql_connect();
	PushActiveSnapshot(GetTransactionSnapshot());
	return true;
}

static void
commit_setting(const char *value)
{
	(void) set_config_option("synchronous_commit", value, PGC_SUSET, PGC_S_SESSION,
							 GUC_ACTION_LOCAL, true, 0, false);
}

void
step_end(bool durable)
{
	PopActiveSnapshot();
	SPI_finish();
	SetUserIdAndSecContext(step_user, step_sec_context);
	if (!durable)
		commit_setting("off");
	else if (synchronous_commit < SYNCHRONOUS_COMMIT_REMOTE_FLUSH)
		commit_setting("on");
	CommitTransactionCommand();
	/* whoever was told to end while it waited for a standby */
	CHECK_FOR_INTERRUPTS();
	MemoryContextReset(step_context);
	MemoryContextSwitchTo(step_context);
}

