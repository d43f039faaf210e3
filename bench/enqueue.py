"""Rows about the caller: what a call, a trigger, a bulk SELECT cost.

No server is enabled here: the queue fills and nobody sends.
"""
import os
import re
import subprocess
import threading
import time

from cluster import Session, status
from measure import NotMeasured, Result, alternate, median

DATABASE = "enqueue"


def prepared(bench):
    """The database of these rows, made by whichever comes first."""
    bench.cluster.start()
    if not bench.ready.get(DATABASE):
        bench.cluster.database(DATABASE)
        bench.ready[DATABASE] = True
    return bench.cluster.session(DATABASE)


def with_accounts(bench):
    session = prepared(bench)
    if not bench.ready.get("accounts"):
        session.query("INSERT INTO accounts SELECT i, properties(i) FROM "
                      "generate_series(1, %d) i" % bench.size("bulk"))
        session.query("VACUUM (FREEZE, ANALYZE) accounts")
        bench.ready["accounts"] = True
    return session


def emptied(session):
    session.query("TRUNCATE outbox, userpilot_queue, userpilot_batches")
    session.query("CHECKPOINT")


def timed(session, sql):
    """One repetition: empty tables, then the statement."""
    def run():
        emptied(session)
        return session.timed(sql)
    return run


def per_row(samples, n):
    return {name: [s * 1e6 / n for s in list_] for name, list_ in
            samples.items()}


def enqueue_loop(bench):
    n = bench.size("loop")
    with prepared(bench) as session:
        found = per_row(alternate(
            bench.repetitions(7),
            baseline=timed(session, "CALL loop_outbox(%d)" % n),
            ours=timed(session, "CALL loop_userpilot(%d)" % n)), n)
    yield Result("%s calls in one transaction, plpgsql loop" % format(n, ","),
                 unit="µs/row", target=0.85, **found)


def enqueue_90(bench):
    n = bench.size("loop") // 90 * 90
    for setting, target in (("off", 0.85), ("on", None)):
        with prepared(bench) as session:
            session.query("SET synchronous_commit = %s" % setting)
            found = per_row(alternate(
                bench.repetitions(5),
                baseline=timed(session, "CALL commits_outbox(%d, 90)" % n),
                ours=timed(session, "CALL commits_userpilot(%d, 90)" % n)), n)
        yield Result("90 calls a transaction, %s rows, synchronous_commit %s"
                     % (format(n, ","), setting), unit="µs/row", target=target,
                     note="" if target else "for information: waiting for the "
                     "disk is the same for both", **found)


SCRIPTS = {
    "baseline": "\\set id random(1, 1000000000)\n"
                "INSERT INTO outbox (entity_id, metadata) VALUES (:id::text, "
                "'%s');\n",
    "ours": "\\set id random(1, 1000000000)\n"
            "SELECT userpilot_identify_company(:id::text, '%s');\n",
}


def pgbench(bench, script, clients, synchronous, transactions):
    """Transactions a second, of so many in all."""
    done = subprocess.run(
        [os.path.join(bench.cluster.bindir, "pgbench"), "-n", "-h",
         bench.cluster.run_dir, "-U", "postgres", "-M", "prepared", "-c",
         str(clients), "-j", str(min(clients, 2)), "-t",
         str(max(1, transactions // clients)), "-f", script, DATABASE],
        env={**os.environ, "PGOPTIONS": "-c synchronous_commit=" +
             synchronous}, stdin=subprocess.DEVNULL, text=True, timeout=120,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    tps = re.search(r"tps = ([0-9.]+)", done.stdout)
    if tps is None:
        raise NotMeasured("pgbench: " + done.stdout[-300:])
    return float(tps[1])


def autocommit(bench):
    if not os.path.exists(os.path.join(bench.cluster.bindir, "pgbench")):
        raise NotMeasured("pgbench is missing")
    with prepared(bench) as session:
        properties = session.value("SELECT properties(1)")
        scripts = {}
        for name, text in SCRIPTS.items():
            scripts[name] = os.path.join(bench.work, "tmp", name + ".pgbench")
            with open(scripts[name], "w") as file:
                file.write(text % properties)

        def side(name, *how):
            def run():
                emptied(session)
                return pgbench(bench, scripts[name], *how)
            return run

        on, off, seconds = bench.size("autocommit")
        for synchronous, target, turns in (("on", 0.97, on), ("off", 0.9, off)):
            for clients in (1, 2, 8):
                # turns of both are equally long in transactions
                warm = side("baseline", clients, synchronous, 1000)()
                how = clients, synchronous, int(warm * seconds)
                found = alternate(turns, baseline=side("baseline", *how),
                                  ours=side("ours", *how))
                yield Result("one call a transaction, %d client%s, "
                             "synchronous_commit %s" % (
                                 clients, "s" * (clients > 1), synchronous),
                             unit="tps", target=target, at_least=True, **found)


def million(bench):
    """The cost of a commit, early and late in a session."""
    n = bench.size("million")
    step = n // 100
    cost = {}
    for name in ("outbox", "userpilot"):
        with prepared(bench) as session:
            session.query("SET synchronous_commit = off")
            emptied(session)
            cost[name] = [session.timed("CALL commits_%s(%d, 1)" % (
                name, step)) * 1e6 / step for _ in range(100)]
            emptied(session)
    for name, target in (("userpilot", 1.05), ("outbox", None)):
        yield Result("%s commits of one session: commits %s to %s, then the "
                     "last %s; %s" % (
                         format(n, ","), format(step, ","),
                         format(11 * step, ","), format(10 * step, ","),
                         name if target else "the same with the outbox"),
                     cost[name][1:11], cost[name][-10:], "µs", target=target,
                     note="baseline: the early ones; target: allows for the "
                     "scatter of one run" if target else "for information")


FILL = """DROP TRIGGER IF EXISTS bench ON customers; TRUNCATE customers;
INSERT INTO customers SELECT i, 'Company number ' || i, 'team', i % 1000, i % 50, 'DE', true
	FROM generate_series(1, {n}) i; ANALYZE customers;
TRUNCATE outbox, userpilot_queue, userpilot_batches"""


def trigger(bench):
    n = bench.size("trigger")
    with prepared(bench) as session:
        if session.value("SELECT to_regproc('userpilot_company_trigger') IS "
                         "NULL") == "t":
            raise NotMeasured("there is no userpilot_company_trigger() yet")

        def side(function):
            def run():
                session.query(FILL.format(n=n))
                if function:
                    session.query("CREATE TRIGGER bench AFTER INSERT OR "
                                  "UPDATE ON customers FOR EACH ROW EXECUTE "
                                  "FUNCTION " + function)
                session.query("CHECKPOINT")
                return session.timed("UPDATE customers SET mrr = mrr + 1") \
                    * 1e6 / n
            return run

        found = alternate(
            bench.repetitions(5), bare=side(""), baseline=side("to_outbox()"),
            ours=side("userpilot_company_trigger('id', 'name', 'plan', 'mrr',"
                      " 'seats', 'country', 'active')"))
        session.query("DROP TRIGGER IF EXISTS bench ON customers")
    bare = median(found["bare"])
    added = {name: [s - bare for s in found[name]] for name in ("baseline",
                                                                "ours")}
    yield Result("UPDATE of %s rows, row trigger on 6 columns: time added to "
                 "that of the bare UPDATE" % format(n, ","), unit="µs/row",
                 target=0.5, note="the bare UPDATE: %.1f µs/row" % bare,
                 **added)


class Peak:
    """The most memory of its own a process had, sampled.  find: its pid, or
    who to ask for it as long as there is none."""

    def __init__(self, find, every=0.003):
        self.find = find if callable(find) else lambda: find
        self.every = every
        self.most = 0
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def watch(self):
        pid = None
        while not self.done.is_set():
            used = status(pid, "RssAnon") if pid else None
            if used is None:
                pid = self.find()
            self.most = max(self.most, used or 0)
            self.done.wait(self.every)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.done.set()
        self.thread.join()

    @property
    def megabytes(self):
        return self.most / 1024


BULK = "SELECT userpilot_bulk_identify_companies(id, metadata) FROM accounts"


def bulk(bench):
    n = bench.size("bulk")
    with with_accounts(bench) as session:
        found = per_row(alternate(
            bench.repetitions(5),
            baseline=timed(session, "INSERT INTO outbox (entity_id, metadata)"
                           " SELECT id::text, metadata FROM accounts"),
            ours=timed(session, BULK)), n)
        emptied(session)
    yield Result("bulk SELECT of %s rows" % format(n, ","), unit="µs/row",
                 target=0.6, **found)

    memory = {}
    for name, rows in (("baseline", n // 10), ("ours", n)):
        memory[name] = []
        for _ in range(bench.repetitions(3)):
            with bench.cluster.session(DATABASE) as session:
                session.query(BULK + " WHERE id <= 10")
                idle = status(session.pid, "RssAnon") / 1024
                with Peak(session.pid) as peak:
                    session.query(BULK + " WHERE id <= %d" % rows)
                memory[name].append(peak.megabytes - idle)
                emptied(session)
    yield Result("... memory a backend takes for it: %s rows, %s rows" % (
        format(n // 10, ","), format(n, ",")), unit="MB", target=1.2,
        note="own memory beyond what it had after a bulk SELECT of 10 rows, "
        "sampled; target: flat", **memory)


FLOOR = "SELECT sum(length(metadata::text)) FROM accounts GROUP BY (id - 1) / 10000"
PAYLOAD = """SELECT sum(octet_length(payload::text)) FROM (SELECT
userpilot_companies_%s(id, metadata) AS payload FROM accounts
GROUP BY (id - 1) / 10000) AS groups"""
BY_HAND = """SELECT sum(octet_length(payload)) FROM (SELECT
'{"companies":[' || string_agg('{"company_id":' || to_json(id::text) ||
',"metadata":' || metadata::text || '}', ',') || ']}' AS payload
FROM accounts GROUP BY (id - 1) / 10000) AS groups"""


def payload(bench):
    n = bench.size("bulk")
    with with_accounts(bench) as session:
        def side(sql, workers=0):
            def run():
                session.query("SET max_parallel_workers_per_gather = %d" %
                              workers)
                return session.timed(sql) * 1e6 / n
            return run

        session.query(FLOOR)
        found = alternate(bench.repetitions(5), floor=side(FLOOR),
                          payload=side(PAYLOAD % "payload"),
                          ndjson=side(PAYLOAD % "ndjson"),
                          by_hand=side(BY_HAND), parallel=side(FLOOR, 2))
    floor = found["floor"]
    yield Result("payload aggregate, %s rows in groups of 10,000" %
                 format(n, ","), floor, found["payload"], "µs/row",
                 target=1.15)
    yield Result("NDJSON aggregate, the same", floor, found["ndjson"],
                 "µs/row", target=1.15)
    yield Result("... a hand-written string_agg in place of ours", floor,
                 found["by_hand"], "µs/row", note="for information")
    yield Result("... the same floor with two parallel workers", floor,
                 found["parallel"], "µs/row", note="for information: the "
                 "aggregates run in one process, so the others do too")


ROWS = {"enqueue-loop": enqueue_loop, "enqueue-90": enqueue_90,
        "autocommit": autocommit, "million-commits": million,
        "trigger": trigger, "bulk": bulk, "payload": payload}
