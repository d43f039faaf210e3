/*
 * merge_cases.h
 *	  Hand-written merge cases, run before the generated histories.
 */
#ifndef USERPILOT_MERGE_CASES_H
#define USERPILOT_MERGE_CASES_H

/* Prints a TAP line a case; returns how many, *failed of them failed */
extern int	merge_cases(int *failed);

#endif
