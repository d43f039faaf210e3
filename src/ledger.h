/*
 * ledger.h
 *	  What must outlive shared memory: the calls of the last minute, and
 *	  how often the worker was started without getting anywhere.
 */
#ifndef USERPILOT_LEDGER_H
#define USERPILOT_LEDGER_H

/* n calls are about to be made; durable with the mark they belong to */
extern void ledger_calls(const char *server, int n);

/*
 * Calls that may have been made within the last minute, if one leaves at most
 * delay_ms after its mark (all API time).  Older entries can be pruned.
 */
extern int	ledger_recent_calls(const char *server, int64 delay_ms);
extern void ledger_prune(const char *server, int64 delay_ms);

/* Starts in a row that got nowhere, and real ms since the last */
extern int	ledger_starts(int64 *since_ms);

/* A worker starts here */
extern void ledger_start(void);

/* It got something done, or leaves in good order */
extern void ledger_progress(void);

#endif
