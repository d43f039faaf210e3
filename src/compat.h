/*
 * compat.h
 *	  The differences between PostgreSQL 15 and 18 that this extension meets.
 *
 * This is the only file that looks at PG_VERSION_NUM.
 */
#ifndef USERPILOT_COMPAT_H
#define USERPILOT_COMPAT_H

#if PG_VERSION_NUM < 150000
#error "userpilot needs PostgreSQL 15 or later"
#endif

/* 17 hangs wait event sets on a resource owner instead of a memory context */
#if PG_VERSION_NUM >= 170000
#define compat_create_wait_event_set(n) CreateWaitEventSet(NULL, (n))
#else
#define compat_create_wait_event_set(n) \
	CreateWaitEventSet(CurrentMemoryContext, (n))
#endif

/* 17 names extensions' wait events; before, they all read "Extension" */
#include "utils/wait_event.h"

#if PG_VERSION_NUM >= 170000
#define compat_wait_event(name) WaitEventExtensionNew(name)
#else
#define compat_wait_event(name) PG_WAIT_EXTENSION
#endif

/* 16 lets index insertion skip all but summarizing indexes */
#if PG_VERSION_NUM >= 160000
#define compat_insert_index_tuples(rri, slot, estate) \
	ExecInsertIndexTuples((rri), (slot), (estate), false, false, NULL, NIL, false)
#else
#define compat_insert_index_tuples(rri, slot, estate) \
	ExecInsertIndexTuples((rri), (slot), (estate), false, false, NULL, NIL)
#endif

/* 16 tells which of several tables a trigger's row is of */
#if PG_VERSION_NUM >= 160000
#define compat_eval_plan_qual_init(epq, estate) EvalPlanQualInit((epq), (estate), NULL, NIL, -1, NIL)
#else
#define compat_eval_plan_qual_init(epq, estate) EvalPlanQualInit((epq), (estate), NULL, NIL, -1)
#endif

/* 16 folded the per-catalog ownership and privilege checks into one each */
#if PG_VERSION_NUM >= 160000
#define compat_server_ownercheck(serverid, roleid) \
	object_ownercheck(ForeignServerRelationId, (serverid), (roleid))
#define compat_server_aclcheck(serverid, roleid, mode) \
	object_aclcheck(ForeignServerRelationId, (serverid), (roleid), (mode))
#else
#define compat_server_ownercheck(serverid, roleid) \
	pg_foreign_server_ownercheck((serverid), (roleid))
#define compat_server_aclcheck(serverid, roleid, mode) \
	pg_foreign_server_aclcheck((serverid), (roleid), (mode))
#endif

/* 18 counts what index scans do */
#if PG_VERSION_NUM >= 180000
#define compat_index_beginscan(rel, index, snapshot, nkeys) \
	index_beginscan((rel), (index), (snapshot), NULL, (nkeys), 0)
#else
#define compat_index_beginscan(rel, index, snapshot, nkeys) \
	index_beginscan((rel), (index), (snapshot), (nkeys), 0)
#endif

/* 16 moved the varatt macros */
#if PG_VERSION_NUM >= 160000
#include "varatt.h"
#endif

#endif
