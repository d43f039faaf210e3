"""The other ends of the bench: who answers the worker's calls.

Sink answers at once, in this process, and notes when each request arrived;
nginx is the fast server of the real-time row; test/standin.py, the strict
one, is started for the rows about limits.
"""
import json
import os
import queue
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.request

from measure import NotMeasured

LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)", re.IGNORECASE)
ENTITY = re.compile(rb'"(?:company|user)_id":"([^"]*)"')
FILENAME = re.compile(rb'filename="([^"]*)"')


class Sink:
    """A keep-alive HTTP/1.1 server that takes everything."""

    def __init__(self):
        self.occupied = False       # someone else's job is in the slot
        self.hold = {}              # entity: event its answer waits for
        self.seen = queue.SimpleQueue()     # (entity, nanoseconds)
        self.calls = []             # (method and path, arrived, answered)
        self.jobs = {}
        self.lock = threading.Lock()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=200)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for event in self.hold.values():
            event.set()
        self.listener.close()

    @property
    def url(self):
        return "http://127.0.0.1:%d" % self.port

    def accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self.serve, args=(client,),
                             daemon=True).start()

    def serve(self, client):
        try:
            with client:
                while self.one(client):
                    pass
        except OSError:
            pass

    def one(self, client):
        """One request; false when the client has left."""
        data = client.recv(65536)
        at = time.monotonic_ns()
        if not data:
            return False
        while b"\r\n\r\n" not in data:
            data += client.recv(65536)
        head, _, body = data.partition(b"\r\n\r\n")
        length = LENGTH.search(head)
        length = int(length[1]) if length else 0
        if b"100-continue" in head and len(body) < length:
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        parts, have = [body], len(body)
        while have < length:
            parts.append(client.recv(1 << 20))
            if not parts[-1]:
                return False
            have += len(parts[-1])
        method, path, _ = head.split(b" ", 2)
        code, answer = self.answer(method.decode(), path.decode(),
                                   b"".join(parts), at)
        client.sendall(b"HTTP/1.1 %d OK\r\nContent-Type: application/json\r\n"
                       b"Content-Length: %d\r\n\r\n%s"
                       % (code, len(answer), answer))
        self.calls.append(("%s %s" % (method.decode(), path.decode()), at,
                           time.monotonic_ns()))
        return True

    def answer(self, method, path, body, at):
        if path.endswith("/bulk_identify"):
            name = FILENAME.search(body[:2000])
            with self.lock:
                job = {"job_id": "job-%d" % (len(self.jobs) + 1),
                       "status": "queued", "total_rows": body.count(
                           b'"metadata":'),
                       "filename": name[1].decode() if name else ""}
                self.jobs[job["job_id"]] = job
            return 202, json.dumps(job).encode()
        if path.endswith("/identify"):
            entity = ENTITY.search(body)[1].decode()
            self.seen.put((entity, at))
            if entity in self.hold:
                self.hold[entity].wait(60)
            return 200, b"{}"
        if path.endswith("/background_jobs"):
            return 200, FOREIGN if self.occupied else b"[]"
        job = self.jobs[path.rsplit("/", 1)[1]]
        job.update(status="completed", completed_rows=job["total_rows"])
        return 200, json.dumps(job).encode()

    def arrival(self, entity, seconds=60):
        """When this entity's call arrived; skips others."""
        end = time.monotonic() + seconds
        while True:
            found, at = self.seen.get(timeout=max(end - time.monotonic(),
                                                  0.001))
            if found == entity:
                return at


FOREIGN = json.dumps([{"job_id": "import", "status": "processing",
                       "filename": "import.csv", "total_rows": 1}]).encode()


class Process:
    """A server in a process of its own, which ends with this one."""

    def __init__(self, command, ready):
        self.process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", *command],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL)
        end = time.monotonic() + 20
        while not ready():
            if time.monotonic() > end or self.process.poll() is not None:
                self.stop()
                raise NotMeasured("%s did not start" % command[0])
            time.sleep(0.02)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stop()

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def answers(port):
    """Whether someone listens."""
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
        return True
    except OSError:
        return False


class Nginx(Process):
    """One nginx worker that answers {}, its job slot taken for ever."""

    CONF = """daemon off; worker_processes 1; pid %(dir)s/pid;
error_log /dev/null;
events { worker_connections 1024; }
http {
	access_log off; keepalive_requests 10000000; keepalive_timeout 300s;
	client_body_temp_path %(dir)s/body; proxy_temp_path %(dir)s/proxy;
	fastcgi_temp_path %(dir)s/fastcgi; uwsgi_temp_path %(dir)s/uwsgi;
	scgi_temp_path %(dir)s/scgi;
	server {
		listen 127.0.0.1:%(port)d;
		default_type application/json;
		location = /status { stub_status; }
		location = /v1/background_jobs { return 200 '%(jobs)s'; }
		location / { return 200 '{}'; }
	}
}
"""

    def __init__(self, work):
        program = shutil.which("nginx")
        if program is None:
            raise NotMeasured("nginx is missing")
        self.port = free_port()
        directory = os.path.join(work, "nginx-%d" % self.port)
        os.mkdir(directory)
        conf = os.path.join(directory, "conf")
        with open(conf, "w") as file:
            file.write(self.CONF % {"dir": directory, "port": self.port,
                                    "jobs": FOREIGN.decode()})
        super().__init__([program, "-p", directory, "-c", conf, "-e",
                          "/dev/null"], lambda: answers(self.port))

    @property
    def url(self):
        return "http://127.0.0.1:%d" % self.port

    def connections(self):
        """Open connections, this one included."""
        with urllib.request.urlopen(self.url + "/status", timeout=5) as page:
            return int(page.read().split()[2])


class StandIn(Process):
    """test/standin.py at the documented limits, minutes passing faster."""

    def __init__(self, work, tree, scale):
        port_file = os.path.join(work, "tmp", "port-%d" % time.monotonic_ns())
        super().__init__(
            ["python3", os.path.join(tree, "test", "standin.py"), "--scale",
             str(scale), "--key", "bench-key", "--history", "1",
             "--parent-pid", str(os.getpid()), "--port-file", port_file],
            lambda: os.path.exists(port_file) and os.path.getsize(port_file))
        with open(port_file) as file:
            self.url = "http://127.0.0.1:%d" % int(file.read())

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=60) as page:
            return json.load(page)
