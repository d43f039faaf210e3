/*
 * settings.c
 *	  The settings "userpilot.*": definitions and nothing else.
 */
#include "postgres.h"

#include <limits.h>

#include "miscadmin.h"
#include "tcop/pquery.h"
#include "utils/guc.h"

#include "settings.h"

char	   *userpilot_server = NULL;
bool		userpilot_deliver = true;
int			userpilot_log_requests = LOG_REQUESTS_ALL;
int			userpilot_retention = 7 * 24 * 60;
int			userpilot_retention_rows = 100000;
int			userpilot_max_databases = 64;
double		userpilot_time_scale = 1.0;

static const struct config_enum_entry log_requests_values[] = {
	{"off", LOG_REQUESTS_OFF, false},
	{"errors", LOG_REQUESTS_ERRORS, false},
	{"all", LOG_REQUESTS_ALL, false},
	{NULL, 0, false}
};

/* userpilot.server as the configuration file has it, whatever database, role
 * or session say.  A statement (ALTER SYSTEM) only has a value checked. */
static char cluster_server[NAMEDATALEN] = "userpilot";
static bool defining = false;

static bool
check_server(char **newval, void **extra, GucSource source)
{
	if (source <= PGC_S_ARGV && *newval != NULL && (defining || ActivePortal == NULL))
		strlcpy(cluster_server, *newval, sizeof(cluster_server));
	return true;
}

const char *
settings_cluster_server(void)
{
	return cluster_server;
}

/* What must be fixed before shared memory is laid out */
static void
define_startup_settings(void)
{
	DefineCustomIntVariable("userpilot.max_databases",
							"Databases of this cluster that can deliver to Userpilot.",
							"Each takes a slot of about 1 kB in shared memory.",
							&userpilot_max_databases, 64, 1, 4096,
							PGC_POSTMASTER, 0, NULL, NULL, NULL);
	DefineCustomRealVariable("userpilot.time_scale",
							 "How many times faster than the clock the API's minutes pass.",
							 "For tests against a stand-in that runs faster than the API; leave it at 1.",
							 &userpilot_time_scale, 1.0, 1.0, 10000.0,
							 PGC_POSTMASTER, GUC_NOT_IN_SAMPLE,
							 NULL, NULL, NULL);
}

void
settings_define(void)
{
	if (process_shared_preload_libraries_in_progress)
		define_startup_settings();

	defining = true;
	DefineCustomStringVariable("userpilot.server",
							   "Foreign server that direct calls of the userpilot functions go to.",
							   NULL, &userpilot_server, "userpilot",
							   PGC_USERSET, 0, check_server, NULL, NULL);
	defining = false;
	DefineCustomBoolVariable("userpilot.deliver",
							 "Whether this cluster sends anything to Userpilot.",
							 "Off keeps everything queued; for copies of a production cluster.",
							 &userpilot_deliver, true,
							 PGC_SIGHUP, 0, NULL, NULL, NULL);
	DefineCustomEnumVariable("userpilot.log_requests",
							 "Which HTTP calls leave a row in userpilot_requests.",
							 NULL, &userpilot_log_requests, LOG_REQUESTS_ALL,
							 log_requests_values,
							 PGC_SIGHUP, 0, NULL, NULL, NULL);
	DefineCustomIntVariable("userpilot.retention",
							"How long userpilot_requests, finished userpilot_jobs and userpilot_batches are kept.",
							NULL, &userpilot_retention, 7 * 24 * 60, 0, INT_MAX,
							PGC_SIGHUP, GUC_UNIT_MIN, NULL, NULL, NULL);
	DefineCustomIntVariable("userpilot.retention_rows",
							"How many rows of userpilot_requests, and of finished userpilot_jobs, are kept at most.",
							NULL, &userpilot_retention_rows, 100000, 0, INT_MAX,
							PGC_SIGHUP, 0, NULL, NULL, NULL);

	MarkGUCPrefixReserved("userpilot");
}
