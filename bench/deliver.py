"""Rows about the worker: how fast, how much of the machine, how close to the
API's limits.
"""
import os
import queue
import shutil
import subprocess
import threading
import time

from cluster import SqlError, cpu_seconds, status
from enqueue import BULK, Peak
from measure import NotMeasured, Result, alternate, median, percentile
from servers import Nginx, Sink, StandIn

WORKER, LAUNCHER = "userpilot worker", "userpilot launcher"
SCALE = 100
PAUSE = 0.004                   # before a sample: the one before is done with


def environment(session, url, requests_per_minute=1000000):
    session.query("ALTER SERVER userpilot OPTIONS (SET endpoint '%s', SET "
                  "requests_per_minute '%d')" % (url, requests_per_minute))


def enable(session):
    session.query("SELECT userpilot_enable('userpilot')")


def until(what, condition, seconds, every=0.02):
    """Polls; NotMeasured after so long."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise NotMeasured("%s: not within %d s" % (what, seconds))
        time.sleep(every)


def queue_empty(session):
    return session.value("SELECT NOT EXISTS (SELECT FROM userpilot_queue)") \
        == "t"


def no_job(session):
    return session.value("SELECT NOT EXISTS (SELECT FROM userpilot_jobs "
                         "WHERE finished_at IS NULL)") == "t"


def fresh(bench, name, time_scale):
    bench.cluster.start(time_scale)
    bench.cluster.database(name)
    return bench.cluster.session(name)


# ---------------------------------------------------------------- latency

def commit_to_arrival(session, sink, entity):
    """Milliseconds from the sending of COMMIT to the request's arrival."""
    time.sleep(PAUSE)
    session.query("BEGIN; SELECT userpilot_identify_company('%s', "
                  "properties(%d))" % (entity, hash(entity) % 100000))
    start = time.monotonic_ns()
    session.query("COMMIT")
    return (sink.arrival(entity) - start) / 1e6


class Notify:
    """The baseline: a NOTIFY from one session to another, and a flush.

    A NOTIFY alone is committed without one, so the transaction also writes
    a record of WAL: then its COMMIT flushes, once, as any other would."""

    def __init__(self, bench, name):
        self.sender = bench.cluster.session(name)
        self.listener = bench.cluster.session(name)
        self.listener.query("LISTEN bench")
        self.heard = queue.SimpleQueue()
        threading.Thread(target=self.listen, daemon=True).start()
        self.path = os.path.join(bench.cluster.data, "pg_wal", "bench-flush")
        self.file = os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600)
        os.write(self.file, b"\0" * (1 << 20))
        os.fsync(self.file)
        self.offset = 0

    def listen(self):
        try:
            while True:
                self.heard.put(self.listener.wait_notify())
        except (SqlError, OSError):
            pass

    def sample(self, flushes=True):
        time.sleep(PAUSE)
        self.sender.query("BEGIN; NOTIFY bench" + (
            "; SELECT pg_logical_emit_message(false, 'bench', 'a record')"
            if flushes else ""))
        start = time.monotonic_ns()
        self.sender.query("COMMIT")
        return (self.heard.get(timeout=60) - start) / 1e6

    def flush(self):
        """A write of 8 kB and fdatasync: the least that a flush can take."""
        start = time.monotonic_ns()
        os.pwrite(self.file, b"\1" * 8192, self.offset)
        os.fdatasync(self.file)
        self.offset = (self.offset + 8192) % (1 << 20)
        return (time.monotonic_ns() - start) / 1e6

    def close(self):
        self.sender.close()
        self.listener.close()
        os.close(self.file)
        os.unlink(self.path)


def latency(bench):
    n = bench.size("latency")
    with fresh(bench, "latency", 1) as session, Sink() as sink:
        environment(session, sink.url)
        enable(session)
        notify = Notify(bench, "latency")
        for i in range(20):
            commit_to_arrival(session, sink, "warm-%d" % i)
            notify.sample()
        ours, told, bare, flush = [], [], [], []
        for i in range(n):
            ours.append(commit_to_arrival(session, sink, "c-%d" % i))
            told.append(notify.sample())
            bare.append(notify.sample(flushes=False))
            flush.append(notify.flush())
        least = [a + b for a, b in zip(bare, flush)]
        for name, p, target in (("p50", 0.5, 2), ("p99", 0.99, 3)):
            yield Result("commit → request at the server, worker there, %s of"
                         " %s" % (name, format(n, ",")), percentile(told, p),
                         percentile(ours, p), "ms", target=target,
                         note="baseline: NOTIFY heard, whose COMMIT flushes "
                         "the WAL once; ours does twice")
            yield Result("... against a NOTIFY without a flush, plus a write "
                         "of 8 kB with fdatasync, %s" % name,
                         percentile(least, p), percentile(ours, p), "ms",
                         note="for information; NOTIFY p50 %.2f ms, fdatasync"
                         " directly after it %.2f ms" % (
                             median(bare), median(flush)))

        beside, after = [], []
        for turn in range(10):
            slow = "slow-%d" % turn
            held = sink.hold[slow] = threading.Event()
            commit_to_arrival(session, sink, slow)
            beside += [commit_to_arrival(session, sink, "b-%d-%d" % (turn, i))
                       for i in range(n // 40)]
            held.set()
            after += [commit_to_arrival(session, sink, "a-%d-%d" % (turn, i))
                      for i in range(n // 40)]
        yield Result("... with one call that is not answered in flight, p50",
                     percentile(after, 0.5), percentile(beside, 0.5), "ms",
                     target=1.25, note="baseline: without; longest beside it: "
                     "%.1f ms" % max(beside))
        notify.close()


def cold(bench):
    n = bench.size("cold")
    with fresh(bench, "cold", SCALE) as session, Sink() as sink:
        environment(session, sink.url)
        enable(session)

        def connect():
            start = time.monotonic_ns()
            with bench.cluster.session("cold") as other:
                other.query("SELECT 1")
                return (time.monotonic_ns() - start) / 1e6

        numbers = iter(range(10 * n))

        def ours():
            until("the worker leaves",
                  lambda: bench.cluster.process(WORKER) is None, 30)
            time.sleep(0.02)    # the launcher has noticed, too
            return commit_to_arrival(session, sink, "c-%d" % next(numbers))

        ours()
        found = alternate(n, baseline=connect, ours=ours)
    yield Result("commit → request at the server, no worker running",
                 unit="ms", target=4, note="baseline: connect and SELECT 1",
                 **found)


# ---------------------------------------------------------- real-time lane

def curl_config(bench, port, n):
    """The same requests, for curl."""
    path = os.path.join(bench.work, "tmp", "curl-%d" % port)
    with bench.cluster.session("realtime") as session:
        bodies = session.query(
            "SELECT json_build_object('company_id', i::text, 'metadata', "
            "properties(i))::text FROM generate_series(1, %d) i" % n)
    with open(path, "w") as file:
        for i, (body,) in enumerate(bodies):
            file.write("%surl = http://127.0.0.1:%d/v1/companies/identify\n"
                       "header = \"Authorization: Token bench-key\"\n"
                       "header = \"Content-Type: application/json\"\n"
                       "header = \"X-API-Version: 2020-09-22\"\n"
                       "output = /dev/null\ndata-raw = \"%s\"\n" % (
                           "next\n" if i else "", port,
                           body.replace("\\", "\\\\").replace('"', '\\"')))
    return path


def realtime(bench):
    n = bench.size("realtime")
    curl = shutil.which("curl")
    if curl is None:
        raise NotMeasured("curl is missing")
    most = []
    with Nginx(bench.work) as nginx:
        def ours():
            with fresh(bench, "realtime", 1) as session:
                environment(session, nginx.url)
                session.query("CALL fill(1, %d, 100)" % n)
                session.query("CHECKPOINT")
                start = time.perf_counter()
                enable(session)
                while not queue_empty(session):
                    if time.perf_counter() - start > 120:
                        raise NotMeasured("not delivered in 120 s")
                    most.append(nginx.connections() - 1)
                    time.sleep(0.02)
                took = time.perf_counter() - start
                check_books(session, n)
                return took

        def baseline():
            start = time.perf_counter()
            done = subprocess.run(
                [curl, "-sS", "--parallel", "--parallel-immediate",
                 "--parallel-max", "16", "-K", config],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, timeout=300)
            if done.returncode != 0:
                raise NotMeasured("curl: %s" % done.stderr[-300:].decode())
            return time.perf_counter() - start

        fresh(bench, "realtime", 1).close()
        config = curl_config(bench, nginx.port, n)
        found = alternate(bench.repetitions(5), baseline=baseline, ours=ours)
    yield Result("real-time lane, limit off, %s calls, nginx" %
                 format(n, ","), target=4, note="baseline: curl --parallel of "
                 "the same requests, 16 connections; every call has its row "
                 "in userpilot_requests and its profile", **found)
    yield Result("... open connections", ours=max(most), unit="", target=17,
                 note="16 calls in flight are the default, and the bulk lane")


def check_books(session, n):
    books = session.query(
        "SELECT (SELECT count(*) FROM userpilot_requests WHERE outcome = "
        "'acknowledged' AND entity_id IS NOT NULL), (SELECT count(*) FROM "
        "userpilot_profiles WHERE synced_at IS NOT NULL), (SELECT count(*) "
        "FROM userpilot_dead_letters)")[0]
    if books != [str(n), str(n), "0"]:
        raise NotMeasured("calls, profiles, dead letters: %s" % books)


# ------------------------------------------------------------- both lanes

def bound(n):
    """Seconds of API time that the limits ask for: 600 calls and 1,800
    records a minute at once, and each job's three phases of a second.  As
    the calls of a minute may come all together, a little less is possible."""
    jobs = 1
    while True:
        seconds = (n + jobs * 3 * 30) / 40
        if (seconds - jobs * 3) * 30 <= jobs * 10000:
            return seconds
        jobs += 1


def delivered(bench):
    million, largest = 1000000, max(n for n, _, _ in bench.size("delivered"))
    beyond = []                 # the bound, in seconds a record
    for n, repetitions, scale in bench.size("delivered"):
        for lane in ("real-time", "bulk"):
            one_job = lane == "bulk" and n <= 10000
            took = [deliver_once(bench, n, lane, scale)
                    for _ in range(bench.repetitions(repetitions))]
            if n == largest:
                beyond.append((median(took) * scale - bound(n)) / n)
            yield Result(
                "%s changed records delivered, both lanes, × %d; queued %s" % (
                    format(n, ","), scale,
                    "100 a transaction" if lane == "real-time" else
                    "by one bulk SELECT"),
                bound(n) / scale, took, target=None if one_job else 1.05,
                note="baseline: the limits' own bound, calculated" +
                ("; for information: one lane, as a bulk SELECT of no more is "
                 "one job on purpose" if one_job else ""))
    yield Result("%s changed records delivered, by calculation" %
                 format(million, ","), bound(million) / 3600,
                 (bound(million) + max(0, *beyond) * million) / 3600,
                 unit="h", target=1.05, note="at the API's own speed; a "
                 "record takes as much longer than the bound as with %s, the "
                 "slower of both ways" % format(largest, ","))


def deliver_once(bench, n, lane, scale):
    with fresh(bench, "delivered", scale) as session, \
            StandIn(bench.work, bench.tree, scale) as api:
        environment(session, api.url, 600)
        if lane == "real-time":
            session.query("CALL fill(1, %d, 100)" % n)
        else:
            session.query("INSERT INTO accounts SELECT i, properties(i) FROM "
                          "generate_series(1, %d) i" % n)
            session.query(BULK)
        start = time.perf_counter()
        enable(session)
        until("everything delivered", lambda: queue_empty(session),
              60 + 3 * n / 40 / scale, 0.01 if n <= 10000 else 0.1)
        took = time.perf_counter() - start
        until("jobs end", lambda: no_job(session), 30)
        counters = api.get("/_/counters")
        found = len(api.get("/_/state?kind=companies"))
        if counters["violations_seen"] or found != n or \
                counters["max_identify_per_minute"] > 600:
            raise NotMeasured("%d records there, violations %s" % (
                found, counters["violations"][:3]))
        return took


# ------------------------------------------------------------- large jobs

def prepare_times(sink):
    """Seconds from the answer that let a job be prepared to its arrival."""
    found, last = [], None
    for call, arrived, answered in sorted(sink.calls, key=lambda c: c[1]):
        if call.startswith("POST") and call.endswith("/bulk_identify"):
            if last is not None:
                found.append((arrived - last) / 1e9)
            last = None
        elif "/background_jobs" in call:
            last = answered
    return found


def prepare(bench):
    changes, entities = bench.size("prepare")
    total, first, cpu, base = [], [], [], []
    for _ in range(bench.repetitions(3)):
        with fresh(bench, "prepare", SCALE) as session, Sink() as sink:
            environment(session, sink.url)
            for i in range(changes // entities):
                session.query("CALL fill(%d, %d, %d)" % (
                    i, entities, entities))
            session.query("CHECKPOINT")
            sql = ("SELECT entity_id, max(lsn), count(*) FROM userpilot_queue"
                   " GROUP BY 1")
            session.query("SELECT count(*) FROM userpilot_queue")
            base += [session.timed(sql) for _ in range(2)]
            used = {}           # worker: its CPU time when last seen

            def done():
                pid = bench.cluster.process(WORKER)
                if pid:
                    used[pid] = cpu_seconds(pid) or used.get(pid, 0)
                return queue_empty(session)

            enable(session)
            until("all jobs done", done, 300, 0.1)
            cpu.append(sum(used.values()))
            times = prepare_times(sink)
            total.append(sum(times))
            first.append(times[0])
    what = "%s queued changes of %s entities into stored payloads" % (
        format(changes, ","), format(entities, ","))
    yield Result(what, base, total, target=6, note="baseline: GROUP BY over "
                 "the queue. Ours: for each job, from the answer that let it "
                 "be prepared to its arrival at the server, summed; learning "
                 "and deleting the job before is in it")
    yield Result("... the first job alone: nothing to learn or delete yet",
                 base, first, note="for information")
    yield Result("... CPU time of the worker until all was acknowledged",
                 base, cpu, note="for information")


def backlog(bench):
    rows, accounts = bench.size("backlog")
    n = bench.size("latency") // 2
    # a job in the slot is believed for half an hour: that is to be longer
    with fresh(bench, "backlog", SCALE // 10) as session, Sink() as sink:
        sink.occupied = True
        environment(session, sink.url)
        session.query("INSERT INTO accounts SELECT i, properties(i) FROM "
                      "generate_series(1, %d) i" % accounts)
        session.query("VACUUM (FREEZE, ANALYZE) accounts")
        session.query(BULK + " WHERE id <= 1000")
        enable(session)

        def looks(name):
            for i in range(20):
                commit_to_arrival(session, sink, "%s-warm-%d" % (name, i))
            return [commit_to_arrival(session, sink, "%s-%d" % (name, i))
                    for i in range(n)]

        os.sync()               # the disk is to be as idle as it will be below
        small = looks("small")
        for _ in range(rows // accounts):
            session.query(BULK)
        session.query("CHECKPOINT")
        session.query("SELECT count(*) FROM userpilot_queue")
        counts = [session.timed("SELECT count(*) FROM userpilot_queue")
                  for _ in range(bench.repetitions(5))]
        os.sync()
        large = looks("large")
        yield Result("backlog of %s rows: commit → request at the server, "
                     "p50" % format(rows, ","), percentile(small, 0.5),
                     percentile(large, 0.5), "ms", target=1.15,
                     note="a look and what follows; baseline: backlog of "
                     "1,000 rows; the bulk lane waits for its slot; target: "
                     "the same, with the scatter of one run")

        with Peak(lambda: bench.cluster.process(WORKER)) as peak:
            sink.calls.clear()
            sink.occupied = False
            until("jobs prepared", lambda: len(prepare_times(sink)) >=
                  bench.repetitions(3), 300, 0.05)
        session.query("SELECT userpilot_disable('userpilot')")
        times = prepare_times(sink)
    yield Result("... preparing the first job", counts, times[:1], target=5,
                 note="baseline: warm SELECT count(*) of the queue. Ours: as "
                 "above; the pass over the queue that plans ten jobs is in it")
    yield Result("... preparing the ones after it", counts, times[1:], target=5,
                 note="they learn and delete, too")
    yield Result("... memory of the worker's own meanwhile",
                 ours=peak.megabytes, unit="MB", target=150, note="sampled")
    bench.cluster.drop("backlog")


def memory(bench):
    megabytes = bench.size("memory")
    with fresh(bench, "memory", SCALE) as session, Sink() as sink:
        environment(session, sink.url)
        session.query("ALTER SERVER userpilot OPTIONS (ADD bulk_format "
                      "'ndjson')")
        # more than one job takes, so that one is as large as can be
        session.query("""INSERT INTO accounts SELECT i, jsonb_build_object(
            'text', (SELECT string_agg(md5(i::text || j::text), '')
            FROM generate_series(1, %d) j)) FROM generate_series(1, 14000) i
            """ % (megabytes * 3.05))
        session.query(BULK)
        with bench.cluster.session("memory") as other:
            other.query("SELECT 1")
            idle = status(other.pid, "RssAnon") / 1024
        def worker():
            return bench.cluster.process(WORKER)

        enable(session)
        with Peak(worker, 0.001) as peak:
            until("the job is uploaded", lambda: sink.jobs, 120, 0.002)
        with Peak(worker, 0.001) as later:
            until("it is acknowledged", lambda: queue_empty(session), 120)
        size = int(session.value("SELECT max(bytes) FROM userpilot_jobs"))
    yield Result("an NDJSON job of %.1f MB prepared and uploaded: memory of "
                 "the worker's own beyond an idle session's" % (size / 1e6),
                 ours=peak.megabytes - idle, unit="MB", target=150,
                 note="sampled every millisecond; an idle session: %.1f MB"
                 % idle)
    yield Result("... and until it was acknowledged: learnt, and its rows "
                 "deleted", ours=later.megabytes - idle, unit="MB", target=150,
                 note="the same process")


def idle(bench):
    seconds = bench.size("idle")
    with fresh(bench, "idle", SCALE) as session, Sink() as sink:
        environment(session, sink.url)
        enable(session)
        commit_to_arrival(session, sink, "once")
    cluster = bench.cluster
    until("the worker leaves", lambda: cluster.process(WORKER) is None, 30)
    launcher = cluster.process(LAUNCHER)
    with cluster.session("postgres") as other:
        sql = ("SELECT sum(xact_commit + xact_rollback) FROM pg_stat_database"
               " WHERE datname IS DISTINCT FROM 'postgres'")
        time.sleep(1.5)         # statistics of those that have left
        before = int(other.value(sql))
        woken = status(launcher, "voluntary_ctxt_switches")
        workers = 0
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            workers += cluster.process(WORKER) is not None
            time.sleep(0.25)
        woken = status(launcher, "voluntary_ctxt_switches") - woken
        time.sleep(1.5)
        statements = int(other.value(sql)) - before
    what = "idle for %d s: " % seconds
    yield Result(what + "transactions in the database", ours=statements,
                 unit="", target=0, note="pg_stat_database")
    yield Result(what + "samples that saw a worker process", ours=workers,
                 unit="", target=0, note="four a second; the API's minutes "
                 "pass %d times faster, so any timer of the worker's would "
                 "have fired" % SCALE)
    yield Result(what + "wake-ups of the launcher", ours=woken, unit="",
                 target=1, note="voluntary context switches")


ROWS = {"prepare": prepare, "backlog": backlog, "latency": latency,
        "latency-cold": cold, "realtime": realtime, "idle": idle,
        "memory": memory, "delivered": delivered}
