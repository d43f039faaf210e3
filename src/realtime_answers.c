/*
 * realtime_answers.c
 *	  What answers mean to the real-time lane: learnt in groups, buried,
 *	  waiting again.
 */
#include "postgres.h"

#include "api.h"
#include "history.h"
#include "pending.h"

/* Everything ready goes back: it would wait for long, or is of another time */
void
realtime_withdraw(Sender *sender)
{
	Realtime   *rt = &sender->rt;
	Profile    *profile;

	while (!dlist_is_empty(&rt->ready))
	{
		Pending    *pending = dlist_head_element(Pending, node, &rt->ready);

		profile = &pending->profile;
		profile->attempts--;
		profiles_set_attempts(sender->env->server, &profile, 1);
		quota_calls_return(pending->application, 1);
		rt->nready--;
		pending_wait(rt, pending, 0);
	}
}

/* The sender goes: what was to be called is not */
void
realtime_give_back(Sender *sender)
{
	dlist_iter	iter;

	dlist_foreach(iter, &sender->rt.ready)
		quota_calls_return(dlist_container(Pending, node, iter.cur)->application, 1);
}

/* They are counted until an answer is final */
static void
forget_attempts(Sender *sender, Profile *profile)
{
	profile->attempts = 0;
	profiles_set_attempts(sender->env->server, &profile, 1);
}

void
realtime_bury(Sender *sender, Pending *pending, const HttpResult *result, const char *error)
{
	QueueFailure why = {
		.http_status = result ? result->status : 0,
		.error = error,
		.response = result && result->body_len > 0 ? sender_answer_text(result) : NULL,
		.attempts = pending->profile.attempts
	};
	QueueRow   *rows = palloc(pending->nsent * sizeof(QueueRow));

	for (int r = 0; r < pending->nsent; r++)
		rows[r] = *pending->rows[r];
	if (sender_bury(pending->key, rows, pending->nsent, &why) < (uint64) pending->nsent)
		sender->rt.moved = true;
	for (int r = 0; r < pending->nsent; r++)
		if (pending->solo || realtime_backlogged(sender))
			bulk_row_gone(sender, pending->key.kind, rows[r].batch);
	forget_attempts(sender, &pending->profile);
}

/* One answer; entities to learn are collected in learned */
static void
answered(Sender *sender, Pending *pending, const HttpResult *result, int64 now,
		 Pending **learned, int *nlearned)
{
	Realtime   *rt = &sender->rt;
	DeliveryAnswer answer = sender_answer(sender, DELIVERY_IDENTIFY, result);
	DeliveryDecision decision;
	const char *error = NULL;
	Profile    *profile = &pending->profile;
	MemoryContext old;
	HistoryCall call = {
		.server = sender->env->server,
		.method = "POST",
		.path = api_identify_path(pending->key.kind),
		.kind = pending->key.kind,
		.entity_id = pending->key.id,
		.entity_len = pending->key.len
	};

	answer.records = 1;
	answer.attempts = profile->attempts;
	answer.again = pending->forbidden;
	answer.others_succeed = rt->lane.last_success >
		(pending->failed_at ? pending->failed_at : pending->started_at);
	decision = delivery_decide(&answer);
	if (decision.action != DELIVERY_LEARN)
		error = sender_error_text(result);
	call.outcome = delivery_action_name(decision.action);
	call.error = error;
	history_call(&call, result);

	lane_apply(sender, &rt->lane, &decision, now, error);
	if (!decision.counts && decision.action != DELIVERY_LEARN && decision.action != DELIVERY_DEAD)
	{
		profile->attempts--;
		profiles_set_attempts(sender->env->server, &profile, 1);
	}

	switch (decision.action)
	{
		case DELIVERY_LEARN:
			if (pending->provisional)
			{
				pending->nprovisional = pending->nsent;
				forget_attempts(sender, profile);
				pending_wait(rt, pending, now + HELD_MS);
				break;
			}
			old = MemoryContextSwitchTo(pending->merge_context);
			merge_learn(profile->merge);
			MemoryContextSwitchTo(old);
			profile->attempts = 0;
			pending->failed_at = 0;
			pending->forbidden = false;
			if (profile->merge->more)
				pending->nsent = 0; /* its rows stay, for what is left of them */
			learned[(*nlearned)++] = pending;
			break;
		case DELIVERY_DEAD:
			realtime_bury(sender, pending, result, error);
			pending_drop_sent(rt, pending);
			break;
		case DELIVERY_BACKOFF:
			pending->failed_at = now;
			pending_wait(rt, pending, now + delivery_entity_backoff(profile->attempts,
																	sender_random()));
			break;
		case DELIVERY_PAUSE:
			pending->forbidden = true;
			/* FALLTHROUGH */
		case DELIVERY_THROTTLE:
		case DELIVERY_OUTAGE:
		case DELIVERY_CONFLICT:
		case DELIVERY_SHRINK:
		case DELIVERY_DISSOLVE:
		case DELIVERY_UNKNOWN:
			pending->failed_at = now;
			pending_wait(rt, pending, 0);
			break;
	}
}

void
realtime_answered(Sender *sender, HttpResult **results, int n, int64 now)
{
	Realtime   *rt = &sender->rt;
	Pending   **learned = palloc(Max(n, 1) * sizeof(Pending *));
	int			nlearned = 0;

	for (int i = 0; i < n; i++)
	{
		Call	   *call = results[i]->owner;
		Pending    *pending = call->pending;

		rt->ncalling--;
		quota_calls_ended(call->application, 1, now);
		answered(sender, pending, results[i], now, learned, &nlearned);
	}
	realtime_write_profiles(sender, learned, nlearned, PROFILE_LEARNED);
	realtime_delete_sent(sender, learned, nlearned);
	for (int i = 0; i < nlearned; i++)
		pending_drop_sent(rt, learned[i]);
	sender_delivered(sender, nlearned);
	if (rt->lane.outages > 0 || rt->lane.throttled > 0 || sender->paused)
		realtime_withdraw(sender);
	realtime_look_again(sender);
}

