#!/usr/bin/env python3
"""Checks of the stand-in itself: an oracle has to be tested before it judges.

Runs standin.py as the other tests do, as a process, and speaks to it over raw
sockets, because a client library would not send most of what is refused.
To run: python3 test/test_standin.py
"""
import gzip
import http.client
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.parse

HERE = os.path.dirname(os.path.abspath(__file__))
KEY = "test-key"
HEADERS = {"Host": "127.0.0.1", "Authorization": "Token " + KEY,
           "Content-Type": "application/json",
           "Accept": "application/json, text/plain, */*",
           "X-API-Version": "2020-09-22"}
COMPANY, USER = "/v1/companies/identify", "/v1/identify"
BULK_COMPANIES = "/v1/companies/bulk_identify"
BULK_USERS = "/v1/users/bulk_identify"
JOBS = "/v1/background_jobs"
FULL_JOB = {"job_id", "status", "type", "filename", "file_size", "total_rows",
            "start_time", "end_time", "links"}


def request_bytes(method, path, body=None, headers=None, drop=()):
    """The bytes of a request; body: bytes or a value to send as JSON."""
    lines = {**HEADERS, **(headers or {})}
    if body is not None:
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        lines.setdefault("Content-Length", str(len(body)))
    lines = ["%s: %s\r\n" % item for item in lines.items()
             if item[0] not in drop]
    return ("%s %s HTTP/1.1\r\n%s\r\n" % (method, path, "".join(lines))
            ).encode() + (body or b"")


def form(content, name="file", filename='; filename="up.ndjson"', parts=1):
    """(headers, body) of an upload."""
    part = (b'--XX\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s'
            b"\r\n" % (name.encode(), filename.encode(), content))
    return ({"Content-Type": "multipart/form-data; boundary=XX"},
            part * parts + b"--XX--\r\n")


FRAMING = len(form(b"")[1])


class Base(unittest.TestCase):
    """One server for all tests, as new before each."""

    arguments = []
    tls = None

    @classmethod
    def setUpClass(cls):
        cls.process = subprocess.Popen(
            [sys.executable, os.path.join(HERE, "standin.py"), "--port", "0",
             "--scale", "100", "--key", KEY, "--seed", "1",
             "--parent-pid", str(os.getpid())] + cls.arguments,
            stdout=subprocess.PIPE, text=True)
        cls.port = int(cls.process.stdout.readline())

    @classmethod
    def tearDownClass(cls):
        cls.process.terminate()
        assert cls.process.wait(5) == 0
        cls.process.stdout.close()

    def setUp(self):
        self.control("POST", "reset")
        self.control("POST", "config", {
            "scale": 100, "strict_limits": True, "requests_per_minute": 600,
            "records_per_minute": 1800, "phase_seconds": 1})

    def connect(self):
        sock = socket.create_connection(("127.0.0.1", self.port), 10)
        return self.tls.wrap_socket(sock) if self.tls else sock

    def read(self, sock, method="POST"):
        """(status, headers, body) of the answer on this connection."""
        answer = http.client.HTTPResponse(sock, method=method)
        answer.begin()
        return answer.status, dict(answer.getheaders()), answer.read()

    def raw(self, data):
        with self.connect() as sock:
            sock.sendall(data)
            return self.read(sock)

    def send(self, path, body=None, method="POST", headers=None, drop=()):
        return self.raw(request_bytes(method, path, body, headers, drop))

    def get(self, path):
        status, _, body = self.send(path, method="GET",
                                    drop=("Content-Type",))
        return status, json.loads(body)

    def control(self, method, what, value=None):
        status, _, body = self.send("/_/" + what, value, method)
        self.assertEqual(status, 200, body)
        return json.loads(body)

    def counters(self):
        return self.control("GET", "counters")

    def state(self, kind="companies"):
        return self.control("GET", "state?kind=" + kind)

    def fault(self, do, **others):
        self.control("POST", "faults", [{"do": do, "times": 1, **others}])

    def metadata(self, entity_id="a"):
        found = self.state().get(entity_id)
        return found and found["metadata"]

    def submit(self, n=60):
        """Posts a job of n records; returns the answer's object."""
        records = [{"company_id": "c%d" % i, "metadata": {"n": i}}
                   for i in range(n)]
        status, _, body = self.send(BULK_COMPANIES, {"companies": records})
        self.assertEqual(status, 202, body)
        return json.loads(body)

    def poll(self, job):
        status, shown = self.get(JOBS + "/" + urllib.parse.quote(
            job["job_id"], safe=""))
        self.assertEqual(status, 200)
        return shown

    def until_final(self, job):
        """Every status seen, and the last answer."""
        seen = []
        for _ in range(500):
            shown = self.poll(job)
            if shown["status"] not in seen:
                seen.append(shown["status"])
            if shown["status"] in ("completed", "failed"):
                return seen, shown
            time.sleep(0.002)
        self.fail("still " + shown["status"])


class Strictness(Base):
    """Everything the documentation does not allow is refused."""

    def refuse(self, status, path, body=None, reason=".", **others):
        got, headers, answer = self.send(path, body, **others)
        self.assertEqual(got, status, (body, answer))
        error, = json.loads(answer)["errors"]
        self.assertEqual(set(error),
                         {"details", "error", "error_code", "message"})
        self.assertRegex(error["message"], reason)
        self.assertTrue(headers["x-request-id"])
        violation = self.counters()["violations"][-1]
        self.assertTrue(violation.startswith("%d " % status), violation)

    def test_headers(self):
        ok = {"company_id": "a"}

        def head(name, value=None, status=400, path=COMPANY, body=ok, **o):
            with self.subTest(header=name, value=value):
                if value is None:
                    self.refuse(status, path, body, drop=(name,), **o)
                else:
                    self.refuse(status, path, body, headers={name: value},
                                **o)
        head("Authorization", None, 401)
        head("Authorization", "Token wrong", 401)
        head("Authorization", "Token NX-" + KEY, 401)
        head("Authorization", "token " + KEY, 401)
        head("Authorization", "Bearer " + KEY, 401)
        head("Authorization", KEY, 401)
        head("Content-Type", None, 415)
        head("Content-Type", "text/json", 415)
        head("Content-Type", "application/x-www-form-urlencoded", 415)
        head("Content-Type", "application/json; charset=latin1", 415)
        head("Content-Type", "multipart/form-data; boundary=XX", 415)
        head("Content-Encoding", "gzip", 415)
        head("Accept", None, 406)
        head("Accept", "text/html", 406)
        head("Accept", "application/json;q=0", 406)
        head("Content-Length", None, 411)
        head("Content-Length", "many", 400)
        head("Content-Length", str(50000001), 413,
             body=b"x" * 50000001, reason="50 MB")
        head("Transfer-Encoding", "chunked", 411)
        head("Host", None, 400)
        head("X-API-Version", None, 400, USER, {"user_id": "a"})
        head("X-API-Version", "2019-01-01", 400, USER, {"user_id": "a"})
        self.assertEqual(self.state(), {})

    def test_paths_and_methods(self):
        ok = {"company_id": "a"}
        self.refuse(400, COMPANY + "?a=b", ok, "query")
        self.refuse(404, "/v1/track", ok)
        self.refuse(404, COMPANY + "/", ok)
        self.refuse(404, "/v1/companies", ok)
        self.refuse(405, COMPANY, ok, method="PUT")
        self.refuse(405, BULK_USERS, method="GET")
        self.refuse(405, JOBS, ok)
        self.refuse(405, JOBS + "/x", method="DELETE")
        self.refuse(400, JOBS, b"{}", "no body", method="GET")
        self.refuse(404, JOBS + "/bulk:jobs:x", None, "encoded", method="GET")
        for line in (b"POST %s HTTP/1.0\r\n", b"post %s HTTP/1.1\r\n",
                     b"POST http://x%s HTTP/1.1\r\n", b"%s\r\n"):
            data = request_bytes("POST", COMPANY, ok).split(b"\r\n", 1)[1]
            status = self.raw(line % COMPANY.encode() + data)[0]
            self.assertEqual(status, 400, line)

    def test_bodies(self):
        deep = b'{"company_id":"a","metadata":' + b"[" * 100000
        nested = {"company_id": "a", "metadata": {"k": [1]}}
        for path, body, reason in (
                (COMPANY, b"", "JSON"), (COMPANY, b"{", "JSON"),
                (COMPANY, b'{"company_id":"a"} x', "JSON"),
                (COMPANY, b'\xef\xbb\xbf{"company_id":"a"}', "JSON"),
                (COMPANY, b'{"company_id":"\xff"}', "JSON"),
                (COMPANY, b'{"company_id":"\\ud800"}', "JSON"),
                (COMPANY, b'{"company_id":"a\n"}', "JSON"),
                (COMPANY, b'{"company_id":"a","company_id":"a"}', "twice"),
                (COMPANY, b'{"company_id":"a","metadata":{"x":1,"x":1}}',
                 "twice"),
                (COMPANY, b'{"company_id":"a","metadata":{"x":NaN}}', "NaN"),
                (COMPANY, b'{"company_id":"a","metadata":{"x":1e999}}',
                 "range"),
                (COMPANY, deep, "JSON"), (COMPANY, b"[]", "object"),
                (COMPANY, b"null", "object"), (COMPANY, {}, "company_id"),
                (COMPANY, {"company_id": ""}, "non-empty"),
                (COMPANY, {"company_id": 1}, "string"),
                (COMPANY, {"company_id": None}, "string"),
                (COMPANY, {"company_id": "a", "name": "x"}, "unknown"),
                (COMPANY, {"company_id": "a", "metadata": None}, "object"),
                (COMPANY, {"company_id": "a", "metadata": []}, "object"),
                (COMPANY, nested, "metadata.k"),
                (COMPANY, {"company_id": "a", "metadata": {"k": {}}},
                 "metadata.k"),
                (COMPANY, {"company_id": "a", "metadata": {"": 1}}, "255"),
                (COMPANY, {"company_id": "a", "metadata": {"k" * 256: 1}},
                 "255"),
                (COMPANY, {"company_id": "a", "metadata": {"k": "v" * 65536}},
                 "65,535"),
                (COMPANY, {"company_id": "a", "metadata":
                           dict.fromkeys(map(str, range(501)))}, "500"),
                (USER, {"metadata": {}}, "user_id"),
                (USER, {"user_id": "u", "company_id": "c"}, "unknown"),
                (USER, {"user_id": "u", "company": "c"}, "object"),
                (USER, {"user_id": "u", "company": None}, "object"),
                (USER, {"user_id": "u", "company": {}}, "id"),
                (USER, {"user_id": "u", "company": {"id": ""}}, "non-empty"),
                (USER, {"user_id": "u", "company": {"id": "c", "name": "n"}},
                 "unknown")):
            with self.subTest(body=str(body)[:60]):
                self.refuse(400, path, body, reason)
        self.assertEqual(self.state(), {})
        self.assertEqual(self.state("users"), {})

    def test_jobs(self):
        one = {"company_id": "a"}
        for status, path, body, reason in (
                (400, BULK_COMPANIES, {"companies": []}, "at least one"),
                (400, BULK_COMPANIES, {}, "companies"),
                (400, BULK_COMPANIES, {"companies": one}, "array"),
                (400, BULK_COMPANIES, {"users": [one]}, "unknown"),
                (400, BULK_COMPANIES, {"companies": [one], "x": 1}, "unknown"),
                (400, BULK_COMPANIES, {"companies": [one, one]}, "twice"),
                (400, BULK_COMPANIES, {"companies": [one, {}]}, "record 2"),
                (400, BULK_COMPANIES, {"companies": [{**one, "y": 1}]}, "y"),
                (413, BULK_COMPANIES, {"companies": [one] * 10001}, "10,000"),
                (400, BULK_USERS, {"users": [{"user_id": "u",
                                              "company_id": ""}]}, "company"),
                (400, BULK_USERS, {"users": [{"user_id": "u",
                                              "company": {"id": "c"}}]},
                 "unknown"),
                (400, BULK_USERS, {"users": [{"user_id": "u", "metadata":
                                              {"k": []}}]}, "primitive")):
            with self.subTest(body=str(body)[:60]):
                self.refuse(status, path, body, reason)
        self.assertEqual(self.control("GET", "jobs"), [])

    def test_uploads(self):
        line = b'{"company_id":"a"}'
        for status, reason, (headers, body) in (
                (400, "blank", form(line + b"\n\n")),
                (400, "blank", form(b"\n" + line)),
                (400, "at least one", form(b"")),
                (400, "line 2", form(line + b"\n{\n")),
                (400, "line 1", form(line + line)),
                (400, "twice", form(line + b"\n" + line)),
                (400, "line 1: unknown", form(b'{"companies":[]}')),
                (413, "10,000", form((line + b"\n") * 10001)),
                (400, "named file", form(line, name="data")),
                (400, "filename", form(line, filename="")),
                (400, "filename", form(line, filename='; filename=""')),
                (400, "one part", form(line, parts=2)),
                (413, "50 MB", form(b" " * (50000001 - FRAMING))),
                (400, "boundary", ({"Content-Type": "multipart/form-data"},
                                   form(line)[1])),
                (400, "framed", (form(line)[0], line)),
                (400, "framed", (form(line)[0], form(line)[1][:-5]))):
            with self.subTest(body=body[:60], reason=reason):
                self.refuse(status, BULK_COMPANIES, body, reason,
                            headers=headers)
        headers, body = form(line)
        self.assertEqual(
            self.send(BULK_COMPANIES, body, headers=headers)[0], 202)

    def test_limits_are_inclusive(self):
        metadata = {str(i).zfill(255): "v" for i in range(499)}
        metadata["k"] = "\u00e4" * 65535
        self.assertEqual(self.send(COMPANY, {"company_id": "a",
                                             "metadata": metadata})[0], 200)
        self.control("POST", "config", {"records_per_minute": 10 ** 9})
        self.assertEqual(self.submit(10000)["total_rows"], 10000)
        headers, body = form(b'{"company_id":"b"}' + b" " * (50000000 - 18 - FRAMING))
        self.control("POST", "finish_jobs")
        status, _, body = self.send(BULK_COMPANIES, body, headers=headers)
        self.assertEqual(status, 202, body)
        self.assertEqual(self.counters()["violations"], [])

    def test_expect_and_abort(self):
        body = json.dumps({"company_id": "a"}).encode()
        with self.connect() as sock:
            data = request_bytes("POST", COMPANY, body,
                                 {"Expect": "100-continue"})
            sock.sendall(data[:-len(body)])
            self.assertEqual(sock.recv(100),
                             b"HTTP/1.1 100 Continue\r\n\r\n")
            sock.sendall(body)
            self.assertEqual(self.read(sock)[0], 200)
        with self.connect() as sock:
            sock.sendall(request_bytes("POST", COMPANY, body)[:-1])
        for _ in range(200):
            counters = self.counters()
            if counters["aborted"]:
                break
            time.sleep(0.005)
        self.assertEqual(counters["aborted"], 1)
        self.assertEqual(counters["violations"], [])


class State(Base):
    """Identify, merge and the control endpoints."""

    def test_answers(self):
        ids = set()
        with self.connect() as sock:
            for path, body, want in (
                    (COMPANY, {"company_id": "a"}, 200),
                    (USER, {"user_id": "a"}, 202)) * 20:
                sock.sendall(request_bytes("POST", path, body))
                status, headers, body = self.read(sock)
                self.assertEqual(status, want)
                self.assertEqual(headers["server"], "Cowboy")
                self.assertEqual(headers["content-type"],
                                 "application/json; charset=utf-8")
                self.assertIn(body, (b"", b"{}"))
                ids.add(headers["x-request-id"])
        self.assertEqual(len(ids), 40)
        counters = self.counters()
        self.assertEqual(counters["calls"]["identify"], 40)
        self.assertEqual(counters["statuses"], {"200": 20, "202": 20})
        self.assertEqual(counters["connections"]["max"], 1)
        self.assertEqual(counters["max_identify_per_minute"], 40)

    def test_merge_null_and_move(self):
        for body in ({"a": 1, "b": "x"}, {"a": None, "c": True}, {"b": "x"},
                     {"b": 1}, {"b": True}, {"b": 1.0}):
            self.send(COMPANY, {"company_id": "a", "metadata": body})
        self.assertEqual(repr(self.metadata()["b"]), "1.0")
        self.assertEqual(self.metadata(), {"b": 1.0, "c": True})
        for company in ({"id": "c1"}, None, {"id": "c2"}):
            body = {"user_id": "u", "company": company}
            if company is None:
                body = {"user_id": "u", "metadata": {"k": None}}
            self.assertEqual(self.send(USER, body)[0], 202)
        self.assertEqual(self.control("GET", "state?kind=users&id=u"),
                         {"company_id": "c2", "metadata": {}})
        history = self.control("GET", "history?kind=companies&id=a")
        self.assertEqual([h["changed"] for h in history],
                         [{"a": 1, "b": "x"}, {"a": None, "c": True}, {},
                          {"b": 1}, {"b": True}, {"b": 1.0}])
        self.assertEqual(history[2]["sent"], {"b": "x"})
        self.assertEqual(history[0]["source"], "identify")
        self.assertEqual([h["at"] for h in history],
                         sorted(h["at"] for h in history))
        moves = self.control("GET", "history?kind=users&id=u")
        self.assertEqual([(h["company_id"], h["moved"]) for h in moves],
                         [("c1", True), (None, False), ("c2", True)])

    def test_null_for_unknown_changes_nothing(self):
        self.send(COMPANY, {"company_id": "a", "metadata": {"x": None}})
        self.assertEqual(self.metadata(), {})

    def test_control_errors(self):
        for method, path, body, want in (
                ("GET", "/_/state?kind=companies&id=none", None, 404),
                ("GET", "/_/nothing", None, 404),
                ("POST", "/_/config", {"colour": 1}, 400),
                ("POST", "/_/config", {"strict_limits": "on"}, 400),
                ("POST", "/_/config", {"scale": 0}, 400),
                ("POST", "/_/faults", [{"do": {"explode": True}}], 400),
                ("POST", "/_/faults", [{"do": {"job": "odd"}}], 400),
                ("POST", "/_/faults", [{"do": {"drop": "often"}}], 400),
                ("POST", "/_/faults", [{"do": {"drip": 1, "hang": 1}}], 400),
                ("POST", "/_/faults", [{"times": 1}], 400),
                ("POST", "/_/faults", [{"match": {"path": "("},
                                        "do": {"status": 500}}], 400)):
            status, _, answer = self.send(path, body, method)
            self.assertEqual(status, want, (path, body, answer))
        self.assertEqual(self.control("GET", "faults"), [])

    def test_key_change_and_history_bound(self):
        self.control("POST", "config", {"key": "other", "history": 3})
        self.assertEqual(self.send(COMPANY, {"company_id": "a"})[0], 401)
        self.control("POST", "config", {"key": KEY})
        for i in range(5):
            self.send(COMPANY, {"company_id": "a", "metadata": {"n": i}})
        history = self.control("GET", "history?kind=companies&id=a")
        self.control("POST", "config", {"history": 200})
        self.assertEqual([h["sent"]["n"] for h in history], [2, 3, 4])

    def test_pause(self):
        self.control("POST", "config", {"paused": True})
        data = request_bytes("POST", COMPANY, {"company_id": "a"})
        gone = request_bytes("POST", COMPANY, {"company_id": "b"})
        with self.connect() as sock:
            sock.sendall(data)
            with self.connect() as other:
                other.sendall(gone)
                time.sleep(0.1)
            time.sleep(0.05)
            sock.settimeout(0.05)
            self.assertRaises(TimeoutError, sock.recv, 1)
            sock.settimeout(5)
            self.control("POST", "config", {"paused": False})
            self.assertEqual(self.read(sock)[0], 200)
        self.assertEqual(list(self.state()), ["a"])

    def test_sliding_window(self):
        self.control("POST", "config", {"requests_per_minute": 20,
                                        "scale": 60})
        self.send(USER, {"user_id": "early"})
        time.sleep(0.5)
        answers = [self.send(COMPANY, {"company_id": "a"})[0]
                   for _ in range(20)]
        self.assertEqual(answers, [200] * 19 + [429])
        time.sleep(0.55)            # the early call has left the window
        answers = [self.send(COMPANY, {"company_id": "a"})[0]
                   for _ in range(2)]
        self.assertEqual(answers, [200, 429])
        counters = self.counters()
        self.assertEqual([v[:4] for v in counters["violations"]],
                         ["429 "] * 2)
        self.assertGreaterEqual(counters["max_identify_per_minute"], 21)
        self.control("POST", "config", {"strict_limits": False})
        self.assertEqual(self.send(COMPANY, {"company_id": "a"})[0], 200)

    def test_concurrency_and_speed(self):
        """Nothing is lost under eight clients, and it is fast enough."""
        self.control("POST", "config", {"strict_limits": False})
        each = 500

        def client(number):
            with self.connect() as sock:
                for i in range(each):
                    sock.sendall(request_bytes("POST", COMPANY, {
                        "company_id": "a", "metadata":
                        {"k%d" % number: i}}))
                    self.read(sock)
        threads = [threading.Thread(target=client, args=(n,))
                   for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(self.metadata(), {"k%d" % n: each - 1
                                           for n in range(8)})
        counters = self.counters()
        self.assertEqual(counters["calls"]["identify"], 8 * each)
        self.assertEqual(counters["violations"], [])

    def test_keep_alive_ends(self):
        self.control("POST", "config", {"strict_limits": False})
        with self.connect() as sock:
            for i in range(1000):
                sock.sendall(request_bytes("GET", JOBS))
                headers = self.read(sock, "GET")[1]
                self.assertEqual(headers["connection"],
                                 "close" if i == 999 else "keep-alive")
            self.assertEqual(sock.recv(1), b"")


class Jobs(Base):
    """The life of a job."""

    def test_life_cycle(self):
        self.control("POST", "config", {"scale": 20})
        job = self.submit(60)
        self.assertEqual(set(job), FULL_JOB)
        self.assertEqual(job["status"], "queued")
        self.assertIsNone(job["end_time"])
        first = self.poll(job)
        self.assertEqual((first["status"], first["completed_rows"]),
                         ("queued", 0))
        seen, last = self.until_final(job)
        self.assertEqual(seen, ["queued", "validating", "processing",
                                "pending_refresh", "completed"])
        self.assertEqual(last["completed_rows"], 60)
        self.assertEqual(last["elapsed_time"], 5)   # 3 phases, 60 records
        self.assertTrue(last["end_time"])
        self.assertEqual(self.state(), {"c%d" % i: {"metadata": {"n": i}}
                                        for i in range(60)})

    def test_rows_come_late_and_in_random_order(self):
        self.control("POST", "config", {"scale": 20})
        job = self.submit(60)
        self.assertEqual(self.state(), {})
        self.send(COMPANY, {"company_id": "c7", "metadata": {"n": "newer"}})
        partial = set()
        while self.poll(job)["status"] != "completed":
            partial.add(len(self.state()))
        self.assertGreater(len(partial), 4)
        self.assertNotEqual(list(self.state())[1:],
                            ["c%d" % i for i in range(60) if i != 7])
        history = self.control("GET", "history?kind=companies&id=c7")
        self.assertEqual([h["source"] for h in history],
                         ["identify", job["job_id"]])
        self.assertEqual(self.metadata("c7"), {"n": 7})

    def test_one_at_a_time(self):
        self.control("POST", "config", {"scale": 1})
        self.submit()
        for path, body in ((BULK_USERS, {"users": [{"user_id": "u"}]}),
                           (BULK_COMPANIES, {"companies":
                                             [{"company_id": "x"}]})):
            status, _, answer = self.send(path, body)
            self.assertEqual(status, 409, answer)
        self.control("POST", "finish_jobs")
        self.assertEqual(len(self.state()), 60)
        self.assertEqual(self.send(BULK_USERS, {"users": [
            {"user_id": "u", "company_id": "c"}]})[0], 202)
        self.control("POST", "finish_jobs")
        self.assertEqual(self.state("users"),
                         {"u": {"company_id": "c", "metadata": {}}})
        counters = self.counters()
        self.assertEqual((counters["conflicts_own"],
                          counters["conflicts_foreign"]), (2, 0))
        self.assertEqual(counters["max_concurrent_jobs"], 1)
        self.assertEqual(counters["violations"], [])

    def test_list_and_forms_of_ids(self):
        jobs = [self.submit(n + 1) for n in range(4)
                if self.control("POST", "finish_jobs") is not None]
        status, listed = self.get(JOBS)
        self.assertEqual([j["job_id"] for j in listed],
                         [j["job_id"] for j in jobs][::-1])
        self.assertEqual(set(listed[0]), FULL_JOB)
        uuid = "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
        self.assertRegex(jobs[0]["job_id"], "^bulk:jobs:NX-ac54070e:" + uuid)
        self.assertRegex(jobs[1]["job_id"], "^" + uuid + "$")
        self.assertEqual({type(j["file_size"]) for j in jobs}, {int, str})
        self.assertEqual({type(j["total_rows"]) for j in jobs}, {int, str})
        self.assertEqual(self.get(JOBS + "/unknown")[0], 404)
        self.assertEqual(self.counters()["violations"], [])

    def test_upload(self):
        headers, body = form(b'{"user_id":"u","metadata":{"a":1}}\n'
                             b'{"user_id":"v","company_id":"c"}\n')
        status, _, answer = self.send(BULK_USERS, body, headers=headers)
        self.assertEqual(status, 202, answer)
        self.assertEqual(json.loads(answer)["filename"], "up.ndjson")
        self.control("POST", "finish_jobs")
        self.assertEqual(self.state("users"), {
            "u": {"company_id": None, "metadata": {"a": 1}},
            "v": {"company_id": "c", "metadata": {}}})

    def test_foreign_job(self):
        shown = self.control("POST", "foreign_job", {"seconds": 20})
        status, _, _ = self.send(BULK_COMPANIES,
                                 {"companies": [{"company_id": "a"}]})
        self.assertEqual(status, 409)
        self.assertEqual(self.get(JOBS)[1][0]["status"], "processing")
        self.assertEqual(self.counters()["conflicts_foreign"], 1)
        self.assertEqual(self.until_final(shown)[0],
                         ["processing", "completed"])
        self.submit()


class Faults(Base):
    """Each fault once."""

    body = {"company_id": "a", "metadata": {"n": 1}}

    def until_closed(self):
        """What arrives until the server closes."""
        with self.connect() as sock:
            sock.sendall(request_bytes("POST", COMPANY, self.body))
            parts = []
            while True:
                part = sock.recv(65536)
                if not part:
                    return b"".join(parts)
                parts.append(part)

    def test_status(self):
        self.fault({"status": 503, "headers": {"Retry-After": 2},
                    "body": "busy"})
        status, headers, body = self.send(COMPANY, self.body)
        self.assertEqual((status, headers["retry-after"], body),
                         (503, "2", b"busy"))
        self.assertIsNone(self.metadata())
        self.assertEqual(self.send(COMPANY, self.body)[0], 200)
        self.assertEqual(self.counters()["statuses"], {"503": 1, "200": 1})

    def test_status_after(self):
        self.fault({"status_after": 500})
        self.assertEqual(self.send(COMPANY, self.body)[0], 500)
        self.assertEqual(self.metadata(), {"n": 1})

    def test_hang(self):
        for apply in (False, True):
            self.fault({"hang": 0.2, "apply": apply})
            start = time.monotonic()
            answer = self.until_closed() if not apply else self.send(
                COMPANY, self.body)[0]
            self.assertEqual(answer, 200 if apply else b"")
            self.assertGreater(time.monotonic() - start, 0.19)
            self.assertEqual(self.metadata(), {"n": 1} if apply else None)

    def test_hang_ends_with_the_script(self):
        self.fault({"hang": 1000})
        timer = threading.Timer(0.1, self.control, ("DELETE", "faults"))
        timer.start()
        self.assertEqual(self.until_closed(), b"")
        timer.join()

    def test_drop(self):
        self.fault({"drop": "before"})
        self.assertEqual(self.until_closed(), b"")
        self.assertIsNone(self.metadata())
        self.fault({"drop": "after"})
        self.assertEqual(self.until_closed(), b"")
        self.assertEqual(self.metadata(), {"n": 1})

    def test_truncate(self):
        self.fault({"truncate": True})
        with self.assertRaises(http.client.IncompleteRead):
            self.send(COMPANY, self.body)
        self.assertEqual(self.metadata(), {"n": 1})

    def test_garbage(self):
        self.fault({"garbage": True})
        status, _, body = self.send(COMPANY, self.body)
        self.assertEqual(status, 200)
        self.assertRaises(ValueError, json.loads, body)

    def test_oversized(self):
        self.fault({"oversized": 3})
        self.assertGreater(len(self.send(COMPANY, self.body)[2]), 3 << 20)

    def test_drip(self):
        self.fault({"drip": 2000})
        start = time.monotonic()
        self.assertEqual(self.send(COMPANY, self.body)[0], 200)
        self.assertGreater(time.monotonic() - start, 0.1)

    def test_content_type(self):
        self.fault({"content_type": "text/html"})
        status, headers, body = self.send(COMPANY, self.body)
        self.assertEqual((status, headers["content-type"]),
                         (200, "text/html"))
        self.assertTrue(body.startswith(b"<!DOCTYPE"))
        self.assertEqual(self.metadata(), {"n": 1})

    def test_reset(self):
        for where in ("headers", "body"):
            self.fault({"reset": where})
            with self.assertRaises(ConnectionResetError):
                self.send(COMPANY, self.body)
            self.assertEqual(self.metadata(), {"n": 1})

    def test_endless(self):
        for where, least in (("headers", 200000), ("body", 3 << 20)):
            self.fault({"endless": where})
            with self.connect() as sock:
                sock.sendall(request_bytes("POST", COMPANY, self.body))
                got = b""
                while len(got) < least:
                    got += sock.recv(65536)
            self.assertEqual(b"\r\n\r\n" in got, where == "body")
            self.assertTrue(got.startswith(b"HTTP/1.1 200 OK\r\n"))

    def test_interim(self):
        self.fault({"interim": 3})
        with self.connect() as sock:
            sock.sendall(request_bytes("POST", COMPANY, self.body))
            got = b""
            while b" 200 " not in got:
                got += sock.recv(65536)
        self.assertEqual(got.count(b"HTTP/1.1 102 "), 3)

    def test_framings(self):
        path = JOBS + "/none"
        for do in ({"chunked": True}, {"http10": True},
                   {"drip": 2000, "body": True}):
            self.fault(do)
            status, headers, body = self.send(path, method="GET")
            self.assertEqual((status, json.loads(body)["errors"][0]["error"]),
                             (404, "Not Found"))
            self.assertEqual("Content-Length" in headers
                             or "content-length" in headers, "drip" in do)
        self.fault({"http10": True})
        self.assertTrue(self.until_closed().startswith(b"HTTP/1.0 200 "))
        self.fault({"oversized": 3, "chunked": True})
        self.assertGreater(len(self.send(path, method="GET")[2]), 3 << 20)

    def test_gzip(self):
        self.fault({"gzip": 3})
        _, headers, body = self.send(COMPANY, self.body)
        self.assertEqual(headers["content-encoding"], "gzip")
        self.assertLess(len(body), 100000)
        self.assertGreater(len(gzip.decompress(body)), 3 << 20)

    def test_raw(self):
        self.fault({"raw": "HTTP/1.1 2\u00ff\r\n"})
        self.assertEqual(self.until_closed(), b"HTTP/1.1 2\xff\r\n")
        self.assertEqual(self.metadata(), {"n": 1})

    def test_cut(self):
        self.fault({"cut": 5}, match={"path": COMPANY})
        with self.assertRaises(ConnectionResetError):
            self.send(COMPANY, {**self.body, "metadata": {"n": "x" * 99999}})
        self.assertIsNone(self.metadata())
        self.assertEqual(self.counters()["max_identify_per_minute"], 1)
        self.assertEqual(self.send(COMPANY, self.body)[0], 200)

    def away(self, silent):
        """Whether a connection is refused or silence; then it is there."""
        with self.assertRaises(socket.timeout if silent
                               else ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", self.port), 0.1)
        for _ in range(100):
            try:
                return self.metadata()
            except OSError:
                time.sleep(0.05)
        self.fail("it did not come back")

    def test_away(self):
        for silent in (False, True):
            with self.connect() as kept:
                kept.sendall(request_bytes("POST", COMPANY, self.body))
                self.assertEqual(self.read(kept)[0], 200)
                self.control("POST", "away", {"seconds": 0.5,
                                              "silent": silent})
                kept.settimeout(5)
                self.assertEqual(kept.recv(1), b"")
            self.assertEqual(self.away(silent), {"n": 1})
            self.fault({"away": 0.5, "silent": silent})
            self.assertEqual(self.send(COMPANY, self.body)[0], 200)
            self.assertEqual(self.away(silent), {"n": 1})

    def test_match_skip_times_probability(self):
        self.control("POST", "faults", [
            {"do": {"status": 501}, "match": {"method": "GET"}},
            {"do": {"status": 502}, "match": {"path": "^/v1/identify$"}},
            {"do": {"status": 503}, "probability": 0},
            {"do": {"status": 504}, "match": {"body": '"n": *2'},
             "skip": 1, "times": 2}])

        def call(n):
            return self.send(COMPANY, {**self.body, "metadata": {"n": n}})[0]
        self.assertEqual([call(n) for n in (1, 2, 2, 1, 2, 2)],
                         [200, 200, 504, 200, 504, 200])
        self.assertEqual(self.send(USER, {"user_id": "u"})[0], 502)
        self.assertEqual(self.send(JOBS, method="GET")[0], 501)
        self.assertEqual([f["hits"] for f in self.control("GET", "faults")],
                         [1, 1, 0, 2])
        self.assertEqual(self.control("DELETE", "faults"), [])
        self.assertEqual(call(2), 200)

    def test_faulty_requests_are_still_judged(self):
        self.fault({"status": 503})
        self.assertEqual(self.send(COMPANY, {"company_id": 1})[0], 503)
        self.assertRegex(self.counters()["violations"][0], "^400 .*string")

    def job(self, do, n=60):
        """(statuses, last answer, companies applied) of a faulty job."""
        self.control("POST", "faults", [{"do": do, "times": 1}])
        seen, last = self.until_final(self.submit(n))
        return seen, last, len(self.state())

    def test_failed_jobs(self):
        seen, last, applied = self.job({"job": "fail_half"})
        self.assertEqual((seen[-1], last["completed_rows"], applied),
                         ("failed", 30, 30))
        self.control("POST", "reset")
        seen, last, applied = self.job({"job": "fail_none"})
        self.assertEqual((seen[-1], last["completed_rows"], applied),
                         ("failed", 0, 0))
        self.assertNotIn("processing", seen)

    def test_short_job(self):
        seen, last, applied = self.job({"job": "short", "rows": 7})
        self.assertEqual((seen[-1], last["completed_rows"], applied),
                         ("completed", 53, 53))

    def test_stuck_jobs(self):
        for status, applied in (("pending_refresh", 60), ("processing", 30),
                                ("validating", 0), ("queued", 0)):
            self.control("POST", "reset")
            self.fault({"job": "stuck", "status": status})
            job = self.submit()
            time.sleep(0.1)
            self.assertEqual(self.poll(job)["status"], status)
            self.assertEqual(len(self.state()), applied)
            self.control("POST", "finish_jobs")
            shown = self.poll(job)
            self.assertEqual((shown["status"], shown["completed_rows"]),
                             ("completed", 60))
            self.assertEqual(len(self.state()), 60)

    def test_unknown_status(self):
        seen, last, applied = self.job({"job": "unknown_status"})
        self.assertEqual((seen[-2:], applied), (["compacting", "completed"],
                                                60))

    def test_slow_job(self):
        seen, last, applied = self.job({"job": "slow", "factor": 4})
        self.assertEqual((last["elapsed_time"], applied), (20, 60))

    def test_terse_answer(self):
        self.fault({"job": "terse"})
        job = self.submit()
        self.assertEqual(set(job), {"job_id", "status", "submitted_at"})
        self.assertEqual(self.until_final(job)[1]["completed_rows"], 60)

    def test_job_accepted_but_answer_lost(self):
        self.fault({"job": "short", "rows": 1})
        self.fault({"drop": "after"}, match={"path": "bulk"})
        with self.assertRaises(http.client.RemoteDisconnected):
            self.submit()
        job, = self.get(JOBS)[1]
        self.assertEqual(self.until_final(job)[1]["completed_rows"], 59)


class Process(unittest.TestCase):
    """The command line."""

    command = [sys.executable, os.path.join(HERE, "standin.py"),
               "--key", KEY]

    def test_parent_and_port_file(self):
        with tempfile.TemporaryDirectory() as directory:
            path = os.path.join(directory, "port")
            parent = subprocess.Popen(["sleep", "100"])
            child = subprocess.Popen(
                self.command + ["--port-file", path, "--parent-pid",
                                str(parent.pid)],
                stdout=subprocess.PIPE, text=True)
            port = child.stdout.readline().strip()
            with open(path) as file:
                self.assertEqual(file.read().strip(), port)
            parent.kill()
            parent.wait()
            self.assertEqual(child.wait(5), 0)
            child.stdout.close()

    @unittest.skipUnless(shutil.which("openssl"), "needs openssl")
    def test_tls(self):
        with tempfile.TemporaryDirectory() as directory:
            cert = os.path.join(directory, "cert.pem")
            key = os.path.join(directory, "key.pem")
            subprocess.run(["openssl", "req", "-x509", "-newkey", "ec",
                            "-pkeyopt", "ec_paramgen_curve:prime256v1",
                            "-nodes", "-subj", "/CN=localhost", "-keyout",
                            key, "-out", cert], check=True,
                           stderr=subprocess.DEVNULL)

            class Secure(Base):
                arguments = ["--tls-cert", cert, "--tls-key", key]
                tls = ssl._create_unverified_context()
            Secure.setUpClass()
            try:
                secure = Secure()
                with socket.create_connection(("127.0.0.1",
                                               secure.port)) as plain:
                    plain.sendall(b"no handshake\r\n\r\n")
                secure.setUp()
                self.assertEqual(secure.send(USER, {"user_id": "u"})[0], 202)
                self.assertEqual(list(secure.state("users")), ["u"])
            finally:
                Secure.tearDownClass()


if __name__ == "__main__":
    unittest.main()
