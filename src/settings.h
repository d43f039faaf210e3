/*
 * settings.h
 *	  The settings "userpilot.*".
 */
#ifndef USERPILOT_SETTINGS_H
#define USERPILOT_SETTINGS_H

typedef enum LogRequests
{
	LOG_REQUESTS_OFF,
	LOG_REQUESTS_ERRORS,
	LOG_REQUESTS_ALL
} LogRequests;

extern char *userpilot_server;	/* userpilot.server */
extern bool userpilot_deliver;	/* userpilot.deliver */
extern int	userpilot_log_requests; /* userpilot.log_requests */
extern int	userpilot_retention;	/* userpilot.retention, minutes */
extern int	userpilot_retention_rows;	/* userpilot.retention_rows */
extern int	userpilot_max_databases;	/* userpilot.max_databases */
extern double userpilot_time_scale; /* userpilot.time_scale */

/* userpilot.server as the configuration file has it */
extern const char *settings_cluster_server(void);

extern void settings_define(void);

#endif
