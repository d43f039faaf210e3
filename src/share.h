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

/* How many entities of a unit the job takes at most; of the others the
 * real-time lane takes so many (*help) */
extern int	share_unit(const Sender *sender, const PlanUnit *unit, int *help);

#endif
