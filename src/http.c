/*
 * http.c
 *	  HTTPS calls over libcurl's multi socket interface.
 *
 * A process of the server must answer its latch and the postmaster's death
 * while it waits for the network, so libcurl gets no loop of its own: it tells
 * us which sockets it wants watched and when it wants to be called, and a wait
 * event set, built anew for each wait, watches them beside the latch.
 *
 * Three rules keep libcurl and the server apart:
 *
 * - what libcurl calls back, and whatever it may touch afterwards, lives in
 *   malloc'd memory; no callback allocates from PostgreSQL or raises;
 * - all of it hangs on the reset callback of a memory context, so an error
 *   raised anywhere above cannot leak a connection;
 * - threads libcurl may start (its resolver) begin with all signals blocked,
 *   because the server's handlers must only ever run in the main thread.
 *
 * What one call is, is in http_transfer.c.
 */
#include "postgres.h"

#include <limits.h>
#include <math.h>
#include <signal.h>

#include "miscadmin.h"
#include "storage/latch.h"
#include "utils/memutils.h"

#include "compat.h"
#include "http_transfer.h"

typedef struct WatchedSocket
{
	curl_socket_t fd;
	uint32		events;			/* WL_SOCKET_… */
} WatchedSocket;

struct Http
{
	MemoryContext own;			/* holds this struct; deleting it frees all */
	MemoryContext results;		/* the creator's context */
	MemoryContextCallback reset;
	int			max_connections;

	CURLM	   *multi;			/* NULL: to be made by the next call */
	const char *failure;		/* why the multi handle is of no more use */
	instr_time	timer_set;
	long		timer_ms;		/* counted from timer_set; -1: none */
	WatchedSocket *sockets;		/* malloc'd */
	int			nsockets;
	int			maxsockets;

	dlist_head	waiting;		/* beyond max_connections, in order */
	dlist_head	running;
	dlist_head	ended;
	int			nrunning;
};

static void
block_signals(sigset_t *saved)
{
	sigset_t	all;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, saved);
}

static void
restore_signals(const sigset_t *saved)
{
	pthread_sigmask(SIG_SETMASK, saved, NULL);
}

/* ---------- what libcurl calls ---------- */

/* Notes which socket is to be watched for what */
static int
watch_socket(CURL *easy, curl_socket_t fd, int what, void *arg, void *unused)
{
	Http	   *http = (Http *) arg;
	int			i;

	for (i = 0; i < http->nsockets; i++)
	{
		if (http->sockets[i].fd == fd)
			break;
	}
	if (what == CURL_POLL_REMOVE)
	{
		if (i < http->nsockets)
			http->sockets[i] = http->sockets[--http->nsockets];
		return 0;
	}
	if (i == http->maxsockets)
	{
		int			room = Max(16, 2 * http->maxsockets);
		WatchedSocket *grown;

		grown = realloc(http->sockets, room * sizeof(WatchedSocket));
		if (grown == NULL)
			return -1;
		http->sockets = grown;
		http->maxsockets = room;
	}
	if (i == http->nsockets)
		http->sockets[http->nsockets++].fd = fd;
	http->sockets[i].events =
		((what & CURL_POLL_IN) ? WL_SOCKET_READABLE : 0) |
		((what & CURL_POLL_OUT) ? WL_SOCKET_WRITEABLE : 0);
	return 0;
}

static int
set_timer(CURLM *multi, long timeout_ms, void *arg)
{
	Http	   *http = (Http *) arg;

	INSTR_TIME_SET_CURRENT(http->timer_set);
	http->timer_ms = timeout_ms;
	return 0;
}

/* ---------- the multi handle ---------- */

/* Makes the multi handle; false if out of memory */
static bool
open_multi(Http *http)
{
	sigset_t	saved;
	CURLM	   *multi;
	long		max = http->max_connections;
	bool		ok;

	block_signals(&saved);
	http->multi = curl_multi_init();
	restore_signals(&saved);
	http->failure = NULL;
	http->timer_ms = -1;
	http->nsockets = 0;
	if (http->multi == NULL)
		return false;
	multi = http->multi;
	ok = curl_multi_setopt(multi, CURLMOPT_SOCKETFUNCTION, watch_socket) == CURLM_OK &&
		curl_multi_setopt(multi, CURLMOPT_SOCKETDATA, http) == CURLM_OK &&
		curl_multi_setopt(multi, CURLMOPT_TIMERFUNCTION, set_timer) == CURLM_OK &&
		curl_multi_setopt(multi, CURLMOPT_TIMERDATA, http) == CURLM_OK &&
		curl_multi_setopt(multi, CURLMOPT_PIPELINING, CURLPIPE_MULTIPLEX) == CURLM_OK &&
		curl_multi_setopt(multi, CURLMOPT_MAX_TOTAL_CONNECTIONS, max) == CURLM_OK &&
		curl_multi_setopt(multi, CURLMOPT_MAX_HOST_CONNECTIONS, max) == CURLM_OK &&
		curl_multi_setopt(multi, CURLMOPT_MAXCONNECTS, max) == CURLM_OK;
#if LIBCURL_VERSION_NUM >= 0x081400
	/* from 8.20 the resolver's threads are the set's: do not wait for them */
	ok = ok && curl_multi_setopt(multi, CURLMOPT_QUICK_EXIT, 1L) == CURLM_OK;
#endif
	if (!ok)
	{
		curl_multi_cleanup(multi);
		http->multi = NULL;
	}
	return ok;
}

static HttpTransfer *
pop_transfer(dlist_head *list)
{
	return dlist_container(HttpTransfer, node, dlist_pop_head_node(list));
}

/* Files a call that is in no list as ended */
static void
end_transfer(Http *http, HttpTransfer *transfer, CURLcode code)
{
	http_transfer_end(transfer, code);
	dlist_push_tail(&http->ended, &transfer->node);
}

/*
 * Starts waiting calls while there is room.  We do the queueing, as libcurl
 * would let the time of those it makes wait for a connection run.
 */
static void
start_waiting(Http *http)
{
	while (!dlist_is_empty(&http->waiting) &&
		   http->nrunning < http->max_connections)
	{
		HttpTransfer *transfer = pop_transfer(&http->waiting);

		INSTR_TIME_SET_CURRENT(transfer->started);
		if (http->multi != NULL || open_multi(http))
		{
			sigset_t	saved;

			block_signals(&saved);
			if (curl_multi_add_handle(http->multi, transfer->easy) == CURLM_OK)
				transfer->multi = http->multi;
			restore_signals(&saved);
		}
		if (transfer->multi != NULL)
		{
			dlist_push_tail(&http->running, &transfer->node);
			http->nrunning++;
		}
		else
			end_transfer(http, transfer, CURLE_OUT_OF_MEMORY);
	}
}

/* Lets libcurl work on a socket, or on what is due in time */
static void
drive(Http *http, curl_socket_t fd, int events)
{
	sigset_t	saved;
	CURLMcode	rc;
	int			nrunning;

	if (http->multi == NULL || http->failure != NULL)
		return;
	block_signals(&saved);
	rc = curl_multi_socket_action(http->multi, fd, events, &nrunning);
	restore_signals(&saved);
	if (rc != CURLM_OK)
		http->failure = curl_multi_strerror(rc);
}

/*
 * Files the calls that have ended and starts waiting ones.  A multi handle
 * that failed (out of memory) ends all its calls and is replaced.
 */
static void
collect(Http *http)
{
	CURLMsg    *message;
	int			left;

	while (http->multi != NULL &&
		   (message = curl_multi_info_read(http->multi, &left)) != NULL)
	{
		CURLcode	code = message->data.result;
		char	   *private = NULL;
		HttpTransfer *transfer;

		if (message->msg != CURLMSG_DONE)
			continue;
		curl_easy_getinfo(message->easy_handle, CURLINFO_PRIVATE, &private);
		transfer = (HttpTransfer *) private;
		dlist_delete(&transfer->node);
		http->nrunning--;
		end_transfer(http, transfer, code);
	}
	if (http->failure != NULL)
	{
		while (!dlist_is_empty(&http->running))
		{
			HttpTransfer *transfer = pop_transfer(&http->running);

			transfer->refusal = http->failure;
			http->nrunning--;
			end_transfer(http, transfer, CURLE_OUT_OF_MEMORY);
		}
		curl_multi_cleanup(http->multi);
		http->multi = NULL;
		http->failure = NULL;
		http->nsockets = 0;
		http->timer_ms = -1;
	}
	start_waiting(http);
}

/* Frees a list's transfers; the list itself is of no more use */
static void
free_transfers(dlist_head *list)
{
	dlist_mutable_iter iter;

	dlist_foreach_modify(iter, list)
	{
		http_transfer_free(dlist_container(HttpTransfer, node, iter.cur));
	}
}

/* The context's reset callback: drops everything at once */
static void
release_all(void *arg)
{
	Http	   *http = (Http *) arg;

	free_transfers(&http->waiting);
	free_transfers(&http->running);
	free_transfers(&http->ended);
	if (http->multi != NULL)
		curl_multi_cleanup(http->multi);
	free(http->sockets);
}

Http *
http_create(MemoryContext context, int max_connections)
{
	static bool initialized = false;
	MemoryContext own;
	Http	   *http;

	/*
	 * Never in the postmaster, whose children would inherit the library's
	 * state; and without a postmaster there is no death of it to watch for.
	 */
	if (!IsUnderPostmaster)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("HTTP calls need a running server"),
				 errhint("Connect to a server that is not in single-user mode.")));
	if (!initialized)
	{
		sigset_t	saved;
		CURLcode	code;

		block_signals(&saved);
		code = curl_global_init(CURL_GLOBAL_DEFAULT);
		restore_signals(&saved);
		if (code != CURLE_OK)
			ereport(ERROR,
					(errcode(ERRCODE_SYSTEM_ERROR),
					 errmsg("could not initialize libcurl: %s",
							curl_easy_strerror(code))));
		initialized = true;
	}

	own = AllocSetContextCreate(context, "userpilot http", ALLOCSET_SMALL_SIZES);
	http = MemoryContextAllocZero(own, sizeof(Http));
	http->own = own;
	http->results = context;
	http->max_connections = Max(max_connections, 1);
	dlist_init(&http->waiting);
	dlist_init(&http->running);
	dlist_init(&http->ended);
	http->reset.func = release_all;
	http->reset.arg = http;
	MemoryContextRegisterResetCallback(own, &http->reset);
	if (!open_multi(http))
	{
		MemoryContextDelete(own);
		ereport(ERROR,
				(errcode(ERRCODE_OUT_OF_MEMORY),
				 errmsg("out of memory"),
				 errdetail("Could not create a libcurl multi handle.")));
	}
	return http;
}

/* ---------- calls ---------- */

bool
http_start(Http *http, const HttpTarget *target, const HttpCall *call,
		   const char **error)
{
	HttpTransfer *transfer = http_transfer_new(target, call, error);

	if (transfer == NULL)
		return false;
	dlist_push_tail(&http->waiting, &transfer->node);
	start_waiting(http);
	return true;
}

/* How long to sleep: the caller's wish, cut by libcurl's timer */
static long
sleep_ms(Http *http, long timeout_ms)
{
	instr_time	now;
	double		left;

	if (!dlist_is_empty(&http->ended))
		return 0;				/* something to hand out already */
	timeout_ms = Min(timeout_ms, INT_MAX);
	if (http->timer_ms < 0)
		return timeout_ms;
	INSTR_TIME_SET_CURRENT(now);
	INSTR_TIME_SUBTRACT(now, http->timer_set);
	left = http->timer_ms - INSTR_TIME_GET_MILLISEC(now);
	left = Min(Max(ceil(left), 0), INT_MAX);
	return timeout_ms < 0 ? (long) left : Min(timeout_ms, (long) left);
}

/*
 * Sleeps on latch, postmaster and sockets; returns how many entries of
 * "ready", which has room for all of them, were filled in with sockets.
 */
static int
wait_ready(Http *http, WaitEventSet *set, long timeout_ms, uint32 wait_event,
		   WaitEvent *ready, bool *latched)
{
	int			n = http->nsockets + 2;
	int			latch;
	int			nready;
	int			i;

	latch = AddWaitEventToSet(set, WL_LATCH_SET, PGINVALID_SOCKET, MyLatch, NULL);
	AddWaitEventToSet(set, WL_EXIT_ON_PM_DEATH, PGINVALID_SOCKET, NULL, NULL);
	for (i = 0; i < http->nsockets; i++)
	{
		if (http->sockets[i].events != 0)
			AddWaitEventToSet(set, http->sockets[i].events,
							  http->sockets[i].fd, NULL, NULL);
	}
	nready = WaitEventSetWait(set, timeout_ms, ready, n, wait_event);
	for (i = 0; i < nready; i++)
		*latched |= (ready[i].events & WL_LATCH_SET) != 0;
	if (!*latched)
		return nready;

	/*
	 * A latch that is set hides the sockets, and one that is set over and over
	 * would starve them: look at them without it.
	 */
	ResetLatch(MyLatch);
	ModifyWaitEvent(set, latch, WL_LATCH_SET, NULL);
	return WaitEventSetWait(set, 0, ready, n, wait_event);
}

/* libcurl's own timer: what was just started is due at once */
static void
drive_if_due(Http *http)
{
	if (http->timer_ms < 0 || sleep_ms(http, -1) > 0)
		return;
	http->timer_ms = -1;		/* libcurl sets it anew */
	drive(http, CURL_SOCKET_TIMEOUT, 0);
}

/* Without sockets: PostgreSQL's own set is there already */
static bool
wait_latch(long timeout_ms, uint32 wait_event)
{
	int			events = WL_LATCH_SET | WL_EXIT_ON_PM_DEATH |
		(timeout_ms >= 0 ? WL_TIMEOUT : 0);
	bool		latched = (WaitLatch(MyLatch, events, timeout_ms, wait_event) & WL_LATCH_SET) != 0;

	if (latched)
		ResetLatch(MyLatch);
	return latched;
}

static bool
wait_sockets(Http *http, long timeout_ms, uint32 wait_event)
{
	WaitEvent  *ready = palloc(sizeof(WaitEvent) * (http->nsockets + 2));
	WaitEventSet *set = compat_create_wait_event_set(http->nsockets + 2);
	bool		latched = false;
	volatile int nready = 0;
	int			i;

	/* the set holds a descriptor that no memory context would close */
	PG_TRY();
	{
		nready = wait_ready(http, set, timeout_ms, wait_event, ready, &latched);
	}
	PG_FINALLY();
	{
		FreeWaitEventSet(set);
	}
	PG_END_TRY();

	for (i = 0; i < nready; i++)
	{
		int			events = 0;

		if (ready[i].events & WL_SOCKET_READABLE)
			events |= CURL_CSELECT_IN;
		if (ready[i].events & WL_SOCKET_WRITEABLE)
			events |= CURL_CSELECT_OUT;
		drive(http, ready[i].fd, events);
	}
	pfree(ready);
	return latched;
}

bool
http_wait(Http *http, long timeout_ms, uint32 wait_event)
{
	bool		latched;

	/* before sockets are waited for: it may open some, or end at once */
	drive_if_due(http);
	collect(http);
	timeout_ms = sleep_ms(http, timeout_ms);
	latched = http->nsockets > 0 ? wait_sockets(http, timeout_ms, wait_event) :
		wait_latch(timeout_ms, wait_event);
	drive_if_due(http);
	collect(http);
	return latched;
}

HttpResult *
http_next(Http *http)
{
	HttpTransfer *transfer;
	HttpResult *result;

	if (dlist_is_empty(&http->ended))
		return NULL;
	transfer = dlist_container(HttpTransfer, node, dlist_head_node(&http->ended));
	result = MemoryContextAlloc(http->results, sizeof(HttpResult));
	*result = transfer->result;
	result->body = MemoryContextAlloc(http->results, result->body_len + 1);
	if (result->body_len > 0)
		memcpy(result->body, transfer->result.body, result->body_len);
	result->body[result->body_len] = '\0';
	dlist_delete(&transfer->node);
	http_transfer_free(transfer);
	return result;
}

void
http_result_free(HttpResult *result)
{
	pfree(result->body);
	pfree(result);
}
