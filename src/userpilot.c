/*
 * userpilot.c
 *	  Module magic and _PG_init.
 */
#include "postgres.h"

#include "fmgr.h"
#include "miscadmin.h"

#include "queue.h"
#include "settings.h"
#include "state.h"
#include "worker.h"

PG_MODULE_MAGIC;

extern PGDLLEXPORT void _PG_init(void);

/*
 * Preloaded, there are shared memory, launcher and workers; loaded later by a
 * session, functions queue all the same and say once that nobody delivers.
 */
void
_PG_init(void)
{
	settings_define();
	queue_register();
	if (process_shared_preload_libraries_in_progress)
	{
		state_register();
		/* what pg_upgrade has read must not change under its hands */
		if (!IsBinaryUpgrade)
			launcher_register();
	}
}
