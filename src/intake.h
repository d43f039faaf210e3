/*
 * intake.h
 *	  Many rows of one caller: judged in groups, and queued if they say news.
 */
#ifndef USERPILOT_INTAKE_H
#define USERPILOT_INTAKE_H

#include "environment.h"
#include "queue.h"

/* What became of the rows of one group, one table or one preview */
typedef struct IntakeCounts
{
	int64		rows;			/* the next four together */
	int64		fresh;			/* Userpilot does not know the entity */
	int64		changed;
	int64		unchanged;		/* left out */
	int64		invalid;
} IntakeCounts;

typedef struct Intake Intake;

/* In CurrentMemoryContext; queues nothing if command, for messages, is NULL.
 * The statement goes on record. */
extern Intake *intake_open(const EnvironmentRef *server, UserpilotKind kind,
						   const char *command, const char *statement);

extern const EnvironmentRef *intake_server(const Intake *intake);

/* The change is copied; counts must live until the next intake_flush */
extern void intake_add(Intake *intake, const QueueChange *change,
					   IntakeCounts *counts);

/* A row that can never be sent: a dead letter */
extern void intake_refuse(Intake *intake, const QueueChange *change,
						  const char *error, IntakeCounts *counts);

/* Counts are right, and rows are queued, only after this */
extern void intake_flush(Intake *intake);

#endif
