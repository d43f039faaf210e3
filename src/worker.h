/*
 * worker.h
 *	  Entry points of the background processes.
 */
#ifndef USERPILOT_WORKER_H
#define USERPILOT_WORKER_H

/* Named in BackgroundWorker.bgw_function_name */
extern PGDLLEXPORT void userpilot_launcher_main(Datum arg);
extern PGDLLEXPORT void userpilot_worker_main(Datum arg);

extern void launcher_register(void);

#endif
