"""A PostgreSQL of the bench's own, and sessions in it.

Sessions speak PostgreSQL's protocol themselves: Python's standard library
has no driver, and starting psql would be measured along.
"""
import os
import socket
import struct
import subprocess
import time

SETTINGS = {
    "listen_addresses": "''",
    "shared_preload_libraries": "'userpilot'",
    "fsync": "on", "full_page_writes": "on", "synchronous_commit": "on",
    "shared_buffers": "1GB", "max_wal_size": "16GB",
    "checkpoint_timeout": "1h", "autovacuum": "off",
    "max_connections": "40", "userpilot.time_scale": "1",
}
STATEMENT_SECONDS = 600


class SqlError(Exception):
    pass


class Session:
    """One connection; every query in text, by the simple protocol."""

    def __init__(self, cluster, database):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(STATEMENT_SECONDS)
        self.sock.connect(cluster.socket)
        self.buffer = b""
        self.notifications = []
        body = struct.pack("!i", 196608)
        for word in ("user", "postgres", "database", database,
                     "application_name", "bench"):
            body += word.encode() + b"\0"
        body += b"\0"
        self.sock.sendall(struct.pack("!i", len(body) + 4) + body)
        self.pid = None
        self.collect()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        try:
            self.sock.sendall(b"X\0\0\0\4")
        except OSError:
            pass
        self.sock.close()

    def message(self):
        """(type, body) of the next message."""
        while True:
            if len(self.buffer) >= 5:
                length = struct.unpack_from("!i", self.buffer, 1)[0] + 1
                if len(self.buffer) >= length:
                    found = self.buffer[:1], self.buffer[5:length]
                    self.buffer = self.buffer[length:]
                    return found
            more = self.sock.recv(65536)
            if not more:
                raise SqlError("the server closed the connection")
            self.buffer += more

    def collect(self):
        """Rows until the server is ready again; SqlError if it says so."""
        rows, error = [], None
        while True:
            kind, body = self.message()
            if kind == b"D":
                rows.append(read_row(body))
            elif kind == b"K":
                self.pid = struct.unpack_from("!i", body)[0]
            elif kind == b"E":
                error = b" ".join(f[1:] for f in body.split(b"\0")
                                  if f[:1] in (b"M", b"D", b"W"))
            elif kind == b"Z":
                if error is not None:
                    raise SqlError(error.decode())
                return rows

    def send(self, sql):
        body = sql.encode() + b"\0"
        self.sock.sendall(b"Q" + struct.pack("!i", len(body) + 4) + body)

    def query(self, sql):
        self.send(sql)
        return self.collect()

    def value(self, sql):
        return self.query(sql)[0][0]

    def timed(self, sql):
        """Seconds this took, as the client sees it."""
        start = time.perf_counter()
        self.query(sql)
        return time.perf_counter() - start

    def wait_notify(self):
        """Blocks until a NOTIFY comes; when, in nanoseconds."""
        while True:
            kind, _ = self.message()
            if kind == b"A":
                return time.monotonic_ns()


def read_row(body):
    values, at = [], 2
    for _ in range(struct.unpack_from("!h", body)[0]):
        length = struct.unpack_from("!i", body, at)[0]
        at += 4
        if length < 0:
            values.append(None)
        else:
            values.append(body[at:at + length].decode())
            at += length
    return values


class Cluster:
    """Data directory, server process, databases."""

    def __init__(self, work, bindir, tree):
        self.bindir, self.tree = bindir, tree
        self.data = os.path.join(work, "data")
        self.run_dir = os.path.join(work, "run")
        self.socket = os.path.join(self.run_dir, ".s.PGSQL.5432")
        self.settings = None
        os.mkdir(self.run_dir, 0o700)
        self.program("initdb", "-D", self.data, "-A", "trust", "-U",
                     "postgres", "-E", "UTF8", "--locale=C.UTF-8")
        with open(os.path.join(self.data, "postgresql.conf"), "a") as conf:
            conf.write("include 'bench.conf'\n")

    def program(self, name, *arguments, check=True):
        done = subprocess.run([os.path.join(self.bindir, name), *arguments],
                              stdin=subprocess.DEVNULL, text=True,
                              stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=300)
        if check and done.returncode != 0:
            raise SqlError("%s: %s" % (name, done.stdout[-2000:]))
        return done.stdout

    def pg_ctl(self, *arguments):
        """Its server must not inherit a pipe that we would wait for."""
        done = subprocess.run(
            [os.path.join(self.bindir, "pg_ctl"), "-D", self.data, "-w",
             "-t", "120", "-s", *arguments], stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if done.returncode != 0:
            raise SqlError("pg_ctl %s failed" % arguments[-1])

    def start(self, time_scale=1):
        """Runs with this scale; restarts if it ran with another."""
        settings = {**SETTINGS, "userpilot.time_scale": str(time_scale),
                    "unix_socket_directories": "'%s'" % self.run_dir}
        if settings == self.settings:
            return
        self.stop()
        with open(os.path.join(self.data, "bench.conf"), "w") as conf:
            for name, value in settings.items():
                conf.write("%s = %s\n" % (name, value))
        self.pg_ctl("-l", os.path.join(self.data, "log"), "start")
        self.settings = settings

    def stop(self):
        if self.settings is not None:
            self.pg_ctl("-m", "fast", "stop")
            self.settings = None

    @property
    def postmaster(self):
        with open(os.path.join(self.data, "postmaster.pid")) as file:
            return int(file.readline())

    def database(self, name):
        """A new database with the bench's tables."""
        with Session(self, "postgres") as admin:
            admin.query("DROP DATABASE IF EXISTS %s WITH (FORCE)" % name)
            admin.query("CREATE DATABASE %s" % name)
        with open(os.path.join(self.tree, "bench", "tables.sql")) as file:
            sql = file.read()
        with Session(self, name) as session:
            session.query(sql)

    def drop(self, name):
        with Session(self, "postgres") as admin:
            admin.query("DROP DATABASE IF EXISTS %s WITH (FORCE)" % name)

    def session(self, name):
        return Session(self, name)

    def process(self, title):
        """The pid of the server's child that shows this title, or None."""
        pid = self.postmaster
        with open("/proc/%d/task/%d/children" % (pid, pid)) as file:
            children = file.read().split()
        for child in children:
            try:
                with open("/proc/%s/cmdline" % child) as file:
                    if title in file.read():
                        return int(child)
            except OSError:
                continue
        return None


def status(pid, field):
    """A number /proc shows of a process, or None once it is gone."""
    try:
        with open("/proc/%d/status" % pid) as file:
            for line in file:
                if line.startswith(field + ":"):
                    return int(line.split()[1])
    except OSError:
        pass
    return None


def cpu_seconds(pid):
    """User and system time of a process; 0 once it is gone."""
    try:
        with open("/proc/%d/stat" % pid) as file:
            fields = file.read().rsplit(")", 1)[1].split()
    except OSError:
        return 0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
