/*
 * share.h
 *	  What each of the two lanes takes of a backlog.
 */
#ifndef USERPILOT_SHARE_H
#define USERPILOT_SHARE_H

#include "plan.h"
#include "sender.h"

/* Whether a row, whose entity's hash is given, is for the bulk lane to send */
extern bool share_bulk_row(const Sender *sender, const QueueRow *row, uint32 hash);

/* What both lanes can send while a job runs */
extern int	share_entities_per_unit(const Sender *sender);

/* What a job takes of a unit */
typedef struct Share
{
	int			limit;			/* entities at most ... */
	int			direct;			/* ... of those that are there for a direct change */
	int			help;			/* of the others the real-time lane takes so many */
} Share;

extern Share share_unit(const Sender *sender, const PlanUnit *unit);

#endif
