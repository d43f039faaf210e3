#!/usr/bin/env python3
"""A stand-in for the Userpilot HTTP API: the oracle of the tests.

It exists because the real API cannot be read back: only a server whose state
can be inspected proves that what was sent is what the tables say.  It is
strict (whatever the documentation does not allow is refused and kept as a
violation), stateful (metadata merges, null removes, one job at a time, rate
limits, job life cycle) and unkind on order: the rows of a job are applied in
random order, spread over its processing time, and so may overwrite what came
meanwhile.  Details the documentation leaves open vary from answer to answer.
Like Cowboy, it closes a connection after 1,000 requests.

API time starts at the wall clock and runs --scale times faster; all times
shown are API seconds.  A job is queued, validating and, after its records,
pending_refresh for --phase-seconds each.  The port is the first line printed.

Control, on the same port, without a key, in JSON:

  GET    /_/state[?kind=companies|users[&id=X]]  what Userpilot has now
  GET    /_/history?kind=companies&id=X  what was applied to X, oldest first
  GET    /_/counters                     calls, statuses, violations, ...
  GET    /_/jobs                         all jobs, oldest first
  GET    /_/faults                       the rules left, with their hits
  POST   /_/faults  [rule, ...]          appends rules
  DELETE /_/faults                       drops rules, ends hangs and drips
  POST   /_/reset                        drops state, jobs, faults, counters,
                                         pause; key and speeds stay
  POST   /_/config  {...}                any of key, scale, strict_limits,
         requests_per_minute, records_per_minute, phase_seconds, history
         (entries kept an entity), list_limit (jobs listed), seed, and paused
         (true: API requests are read but neither applied nor answered; those
         whose client has left meanwhile never are)
  POST   /_/foreign_job  {"seconds": S, "filename": F}   occupies the slot
  POST   /_/finish_jobs                  ends the running job at once
  POST   /_/away  {"seconds": S, "silent": false}   all connections close, and
         for S real seconds new ones are refused, or not even that; state stays

A fault rule is {"match": M, "skip": N, "times": N, "probability": P, "do": D};
only "do" is required.  M has any of "method" (equal), "path" and "body"
(regular expressions, searched).  Of the requests that match, the first "skip"
pass, then the rule acts "times" times (null: for ever), each time with that
probability.  The first rule that acts wins.  D is one of

  {"status": 503, "headers": {...}, "body": "..."}   not applied
  {"status_after": 500, "headers": {...}, "body": "..."}  applied, this answer
  {"hang": S, "apply": true}   applied, answered after S real seconds
  {"hang": S}                  not applied, connection closed after S seconds
  {"drop": "before"|"after"}   closed without answer, before or after applying
  {"truncate": true}           applied; the answer ends early
  {"garbage": true}            applied; the body is no JSON, nor even UTF-8
  {"oversized": MB}            applied; a huge body
  {"drip": BYTES}              applied; the answer at BYTES a second; with
                               "body": true its head at once
  {"content_type": "text/html"}  applied; an HTML page under the usual status
  {"reset": "headers"|"body"}  applied; the connection is reset within those
  {"endless": "headers"|"body"}  applied; those do not end
  {"interim": N}               applied; N interim answers (102) come first
  {"chunked": true}            applied; the answer in chunks of a byte
  {"http10": true}             applied; answered in HTTP/1.0, no length given
  {"gzip": MB}                 applied; so much, compressed a thousand times
  {"raw": "..."}               applied; exactly these bytes, then closed
  {"away": S, "silent": false}  applied and answered, and nobody can connect
                               for S real seconds: see POST /_/away
  {"cut": BYTES}               not applied; reset after so much of the
                               request's body was read ("body" matches nothing)

or, for the next job accepted, whatever else happens to its request, one of

  {"job": "fail_half"}         a random half is applied, then it has failed
  {"job": "fail_none"}         nothing is applied, it fails in validation
  {"job": "short", "rows": N}  completed, N records neither applied nor counted
  {"job": "stuck", "status": S}  it never leaves that status (default
                               pending_refresh; half applied if processing)
  {"job": "unknown_status"}    an unknown status from processing to the end
  {"job": "slow", "factor": X}  it takes X times as long
  {"job": "terse"}             the 202 holds only what the guide's example does
  {"job": "numbered"}          its id is a number
  {"job": "bare"}              the 202 has only the end of its id, after the
                               last colon, as the guide's example
  {"job": "mute"}              it never leaves pending_refresh, and no answer
                               says of how many rows
"""
import argparse
import base64
import collections
import functools
import gzip
import json
import os
import random
import re
import select
import signal
import socket
import socketserver
import ssl
import struct
import sys
import threading
import time
import urllib.parse
import uuid
from email.utils import formatdate
from http import HTTPStatus

MIB = 1024 * 1024
MAX_BODY = 50 * 1000 * 1000     # 50 MB at its smallest, framing included
MAX_RECORDS = 10000
MAX_PROPERTIES = 500
MAX_NAME = 255
MAX_VALUE = 65535
MAX_LINE = 65536
MAX_KEPT = 10000                # violations
KEEP_ALIVE_REQUESTS = 1000
API_VERSION = "2020-09-22"
COMPANIES, USERS = "companies", "users"
ID_FIELD = {COMPANIES: "company_id", USERS: "user_id"}
STATUSES = ("queued", "validating", "processing", "pending_refresh")
FINAL = ("completed", "failed")
JOBS_PATH = "/v1/background_jobs"
ROUTES = {
    "/v1/companies/identify": ("POST", "identify", COMPANIES),
    "/v1/identify": ("POST", "identify", USERS),
    "/v1/companies/bulk_identify": ("POST", "bulk", COMPANIES),
    "/v1/users/bulk_identify": ("POST", "bulk", USERS),
    JOBS_PATH: ("GET", "list", None),
}
OTHER = (None, "other", None)


def route_of(target):
    """(route, job id) of a path."""
    if target.startswith(JOBS_PATH + "/"):
        return ("GET", "poll", None), target[len(JOBS_PATH) + 1:]
    return ROUTES.get(target, OTHER), None


class Refusal(Exception):
    """A request the API refuses.  wrong: the client is at fault."""

    def __init__(self, status, message, wrong=True, headers=None):
        super().__init__(message)
        self.status = status
        self.message = message
        self.wrong = wrong
        self.headers = headers or {}

    def body(self):
        """The documented error body."""
        phrase = HTTPStatus(self.status).phrase
        return to_json({"errors": [{
            "details": self.message, "error": phrase,
            "error_code": phrase.lower().replace(" ", "_"),
            "message": self.message}]})


# ----------------------------------------------------------------------
# Reading bodies
# ----------------------------------------------------------------------

def to_json(value):
    """JSON bytes of a value."""
    return json.dumps(value, separators=(",", ":")).encode()


def unique_names(pairs):
    """An object of these pairs; ValueError if a name comes twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has the same name twice")
    return found


def finite(text):
    """A number; ValueError beyond the range of a double."""
    value = float(text)
    if value - value != 0:
        raise ValueError("number out of range")
    return value


def no_constant(text):
    """Python's reader would take NaN and Infinity; JSON has neither."""
    raise ValueError(text + " is not JSON")


DECODER = json.JSONDecoder(object_pairs_hook=unique_names, parse_float=finite,
                           parse_constant=no_constant)


def read_json(raw, what="body"):
    """The value of these bytes, or a 400."""
    try:
        value = DECODER.decode(raw.decode())
        if b"\\u" in raw:       # refuses halves of surrogate pairs
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as problem:
        raise Refusal(400, "%s is not valid JSON: %s" % (what, problem))
    return value


def check_fields(value, known, where):
    """400 unless value is an object with none but the known fields."""
    if type(value) is not dict:
        raise Refusal(400, where + "must be an object")
    for name in value:
        if name not in known:
            raise Refusal(400, "%sunknown field %s" % (where, name))


def check_id(value, name, where):
    """The id if it is a non-empty string, else a 400."""
    if type(value) is not str or not value:
        raise Refusal(400, "%s%s is required and must be a non-empty string"
                      % (where, name))
    return value


def check_metadata(record, where):
    """The record's metadata, {} if absent; 400 if it could not be kept."""
    metadata = record.get("metadata", {})
    if type(metadata) is not dict:
        raise Refusal(400, where + "metadata must be an object")
    if len(metadata) > MAX_PROPERTIES:
        raise Refusal(400, where + "metadata has more than 500 properties")
    for name, value in metadata.items():
        if not 1 <= len(name) <= MAX_NAME:
            raise Refusal(400, where + "a property name has not 1 to 255 "
                          "characters")
        if type(value) is str:
            if len(value) > MAX_VALUE:
                raise Refusal(400, "%smetadata.%s is longer than 65,535 "
                              "characters" % (where, name))
        elif type(value) in (dict, list):
            raise Refusal(400, "%smetadata.%s is not a primitive"
                          % (where, name))
    return metadata


def read_record(kind, value, where=""):
    """(id, company id or None, metadata) of a record of a job; also the body
    of a real-time call for a company."""
    known = ("company_id", "metadata")
    check_fields(value, known if kind == COMPANIES else ("user_id",) + known,
                 where)
    entity_id = check_id(value.get(ID_FIELD[kind]), ID_FIELD[kind], where)
    company = None
    if kind == USERS and "company_id" in value:
        company = check_id(value["company_id"], "company_id", where)
    return entity_id, company, check_metadata(value, where)


def read_user_call(value):
    """The same of the body of a real-time call for a user."""
    check_fields(value, ("user_id", "metadata", "company"), "")
    user_id = check_id(value.get("user_id"), "user_id", "")
    company = None
    if "company" in value:
        check_fields(value["company"], ("id",), "company: ")
        company = check_id(value["company"].get("id"), "id", "company: ")
    return user_id, company, check_metadata(value, "")


def read_records(kind, values, what):
    """The records of a job; 413 if too many, 400 if one is wrong."""
    if len(values) > MAX_RECORDS:
        raise Refusal(413, "%d records; at most 10,000 in one job"
                      % len(values))
    if not values:
        raise Refusal(400, "a job needs at least one record")
    records = [read_record(kind, value, "%s %d: " % (what, i))
               for i, value in enumerate(values, 1)]
    if len({record[0] for record in records}) != len(records):
        raise Refusal(400, "the same %s comes twice" % ID_FIELD[kind])
    return records


def read_array(kind, raw):
    """The records of a JSON body."""
    body = read_json(raw)
    check_fields(body, (kind,), "")
    if type(body.get(kind)) is not list:
        raise Refusal(400, "%s is required and must be an array" % kind)
    return read_records(kind, body[kind], "record")


def read_lines(kind, raw):
    """The records of an NDJSON file."""
    lines = raw.split(b"\n")
    if not lines[-1]:
        lines.pop()
    if len(lines) > MAX_RECORDS:
        raise Refusal(413, "%d lines; at most 10,000 in one job" % len(lines))
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise Refusal(400, "line %d is blank" % number)
    values = [read_json(line, "line %d" % number)
              for number, line in enumerate(lines, 1)]
    return read_records(kind, values, "line")


def read_upload(content_type, raw):
    """(file name, contents) of a form with one part named file."""
    boundary = re.fullmatch(r'multipart/form-data; *boundary=("?)'
                            r"([0-9A-Za-z'()+_,./:=? -]{1,70})\1",
                            content_type, re.IGNORECASE)
    if not boundary:
        raise Refusal(400, "multipart/form-data without a valid boundary")
    delimiter = b"--" + boundary[2].encode()
    parts = raw.split(b"\r\n" + delimiter)
    if (not parts[0].startswith(delimiter + b"\r\n")
            or parts[-1] not in (b"--", b"--\r\n")):
        raise Refusal(400, "the form is not framed by its boundary")
    if len(parts) != 2:
        raise Refusal(400, "the form must have exactly one part")
    head, blank, contents = parts[0].partition(b"\r\n\r\n")
    names = re.findall(r'^content-disposition: *form-data; *name="([^"]*)"'
                       r'(?:; *filename="([^"]*)")? *\r?$',
                       head.decode("utf-8", "replace"),
                       re.IGNORECASE | re.MULTILINE)
    if not blank or len(names) != 1 or names[0][0] != "file":
        raise Refusal(400, "the form's part must be named file")
    if not names[0][1]:
        raise Refusal(400, "the part named file has no filename")
    return names[0][1].replace("%22", '"'), contents


@functools.lru_cache(maxsize=100)
def is_json_type(content_type):
    """Whether a Content-Type says JSON (in UTF-8)."""
    return re.fullmatch(r"application/json(; *charset=utf-8)?", content_type,
                        re.IGNORECASE) is not None


@functools.lru_cache(maxsize=100)
def admits_json(accept):
    """Whether an Accept header admits application/json."""
    for choice in accept.lower().split(","):
        media, *parameters = [part.strip() for part in choice.split(";")]
        if (media in ("application/json", "application/*", "*/*")
                and not any(re.fullmatch(r"q=0(\.0*)?", p)
                            for p in parameters)):
            return True
    return False


# ----------------------------------------------------------------------
# State
# ----------------------------------------------------------------------

class Clock:
    """API time: seconds since 1970, running scale times too fast."""

    def __init__(self, scale):
        self.scale = scale
        self.base = time.time()
        self.since = time.monotonic()

    def now(self):
        return self.base + (time.monotonic() - self.since) * self.scale

    def set_scale(self, scale):
        """Changes the speed from now on."""
        self.base, self.since = self.now(), time.monotonic()
        self.scale = scale


class Window:
    """How many calls the last 60 seconds saw, with the maximum so far."""

    def __init__(self):
        self.times = collections.deque()
        self.most = 0

    def count(self, now):
        while self.times and self.times[0] <= now - 60:
            self.times.popleft()
        return len(self.times)

    def add(self, now):
        self.times.append(now)
        self.most = max(self.most, self.count(now))


class Entity:
    """One company or user."""

    __slots__ = ("metadata", "company_id", "history")

    def __init__(self):
        self.metadata = {}
        self.company_id = None
        self.history = []

    def apply(self, record, at, source, request_id, keep):
        """Merges a record; remembers it as the newest of keep entries."""
        company, metadata = record[1:]
        changed = {}
        for name, value in metadata.items():
            old = self.metadata.get(name)
            if old == value and type(old) is type(value):
                continue
            changed[name] = value
            if value is None:
                del self.metadata[name]
            else:
                self.metadata[name] = value
        moved = company is not None and company != self.company_id
        if moved:
            self.company_id = company
        self.history.append((at, source, request_id, metadata, company,
                             changed, moved))
        if len(self.history) > keep:
            del self.history[:len(self.history) - keep]

    def show(self, kind):
        shown = {"metadata": self.metadata}
        if kind == USERS:
            shown["company_id"] = self.company_id
        return shown

    def show_history(self):
        names = ("at", "source", "request_id", "sent", "company_id",
                 "changed", "moved")
        return [dict(zip(names, entry)) for entry in self.history]


class Job:
    """A job as a timeline fixed when it is accepted: rows[i] is due when its
    share of the processing time has passed."""

    def __init__(self, number, kind, filename, size, rows, now, config,
                 fault=None, foreign=None, request_id=None):
        fault = fault or {}
        self.number = number
        self.kind = kind
        self.filename = filename
        self.size = size
        self.total = len(rows)
        self.foreign = foreign is not None
        self.fault = fault
        self.request_id = request_id
        self.start = now
        self.applied = 0
        self.id = str(uuid.UUID(int=random.getrandbits(128), version=4))
        if number % 2 or fault.get("job") == "bare":
            self.id = "bulk:jobs:NX-ac54070e:" + self.id
        if fault.get("job") == "numbered":
            self.id = str(10 ** 15 + number)
        self.rows = random.sample(rows, len(rows))
        self.outcome = "completed"
        if fault.get("job") == "fail_half":
            self.outcome = "failed"
            self.rows = self.rows[:len(rows) // 2]
        elif fault.get("job") == "fail_none":
            self.outcome = "failed"
            self.rows = []
        elif fault.get("job") == "short":
            self.rows = self.rows[fault["rows"]:]
        self.limit = len(self.rows)
        if foreign is not None:
            self.plan(0, foreign)
        else:
            factor = fault["factor"] if fault.get("job") == "slow" else 1
            self.plan(config["phase_seconds"] * factor, factor *
                      self.total * 60 / config["records_per_minute"])

    def plan(self, phase, work):
        """Lays out the phases [status, end]."""
        begin = self.start + 2 * phase
        self.processing = (begin, begin + work)
        self.phases = [["queued", begin - phase], ["validating", begin],
                       ["processing", begin + work],
                       ["pending_refresh", begin + work + phase]]
        fault = self.fault.get("job")
        if fault == "fail_none":
            del self.phases[2:]
        elif fault == "unknown_status":
            self.phases[2][0] = self.phases[3][0] = "compacting"
        elif fault in ("stuck", "mute"):
            status = self.fault.get("status", "pending_refresh")
            if status not in STATUSES:
                self.phases[2][0] = status
            last = [p[0] for p in self.phases].index(status)
            self.phases[last][1] = float("inf")
            if last < 3:
                self.limit = self.limit // 2 if last == 2 else 0

    def status(self, now):
        for status, end in self.phases:
            if now < end:
                return status
        return self.outcome

    def take_due(self, now):
        """(when, row) of the rows that have become due."""
        begin, end = self.processing
        share = len(self.rows)
        if now <= begin:
            share = 0
        elif now < end:
            share = int(share * (now - begin) / (end - begin))
        while self.applied < min(share, self.limit):
            self.applied += 1
            yield (begin + (end - begin) * self.applied / len(self.rows),
                   self.rows[self.applied - 1])

    def end_now(self, now):
        """Ends the job: what was to be applied is due."""
        self.limit = len(self.rows)
        self.processing = (min(self.processing[0], now - 1e-6), now)
        self.phases = [[status, min(end, now)] for status, end in self.phases]

    def show(self, now):
        """The job object, as the list and the 202 have it."""
        end = self.phases[-1][1]
        fault = self.fault.get("job")
        shown = {
            "job_id": int(self.id) if fault == "numbered" else self.id,
            "status": self.status(now),
            "type": "%s_bulk_identify" % self.kind,
            "filename": self.filename,
            "file_size": self.size if self.number % 2 else str(self.size),
            "total_rows": str(self.total) if self.number % 3 == 0
            else self.total,
            "start_time": iso(self.start),
            "end_time": iso(end) if now >= end else None,
            "links": "%s/%s" % (JOBS_PATH,
                                urllib.parse.quote(self.id, safe=""))}
        if fault == "mute":
            del shown["total_rows"]
        return shown

    def show_progress(self, now):
        """The job object, as a poll has it."""
        shown = self.show(now)
        if self.fault.get("job") != "mute":
            shown["completed_rows"] = self.applied
        elapsed = min(now, self.phases[-1][1]) - self.start
        shown["elapsed_time"] = int(round(elapsed, 3))
        return shown


def iso(at):
    """An API time in ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))


# ----------------------------------------------------------------------
# Faults
# ----------------------------------------------------------------------

NUMBER = (int, float)
ACTIONS = {                     # action: (type of its value, other fields)
    "status": (int, {"headers": dict, "body": str}),
    "status_after": (int, {"headers": dict, "body": str}),
    "hang": (NUMBER, {"apply": bool}), "drop": (str, {}),
    "truncate": (bool, {}), "garbage": (bool, {}),
    "oversized": (NUMBER, {"chunked": bool}), "drip": (NUMBER, {"body": bool}),
    "content_type": (str, {}), "reset": (str, {}), "endless": (str, {}),
    "interim": (int, {}), "chunked": (bool, {}), "http10": (bool, {}),
    "gzip": (NUMBER, {}), "raw": (str, {}), "away": (NUMBER, {"silent": bool}),
    "cut": (int, {}),
    "job": (str, {"rows": int, "status": str, "factor": NUMBER}),
}
JOB_FAULTS = {                  # its own field and that field's default
    "fail_half": None, "fail_none": None, "terse": None, "numbered": None,
    "mute": None, "bare": None,
    "unknown_status": None, "short": ("rows", 1),
    "stuck": ("status", "pending_refresh"), "slow": ("factor", 3)}


class Fault:
    """A rule of the script; ValueError if it is not as documented."""

    def __init__(self, spec):
        demand(type(spec) is dict and type(spec.get("do")) is dict
               and not spec.keys() - {"match", "skip", "times", "probability",
                                      "do"}, spec)
        demand(type(spec.get("times")) in (int, type(None)), spec)
        match = spec.get("match", {})
        demand(not match.keys() - {"method", "path", "body"}, match)
        self.spec = spec
        self.do = check_action(spec["do"])
        self.stage = ("job" if "job" in self.do else
                      "cut" if "cut" in self.do else "answer")
        self.method = match.get("method")
        self.path = re.compile(match.get("path", ""))
        self.body = re.compile(match.get("body", "").encode(), re.DOTALL)
        self.skip = int(spec.get("skip") or 0)
        self.times = spec.get("times")
        self.probability = spec.get("probability", 1)
        self.hits = 0

    def acts(self, req):
        """Whether it acts on this request; counts it if so."""
        if (self.times is not None and self.hits >= self.times
                or self.method not in (None, req.method)
                or not self.path.search(req.target)
                or not self.body.search(req.body)):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        if random.random() >= self.probability:
            return False
        self.hits += 1
        return True


def demand(condition, what):
    if not condition:
        raise ValueError("not as documented: " + json.dumps(what))


def check_action(do):
    """What a rule does, with defaults filled in; ValueError if unknown."""
    actions = do.keys() & ACTIONS.keys()
    for first in ("job", "oversized"):  # another action's name as a field
        if first in do:
            actions = {first}
    demand(len(actions) == 1, do)
    action = actions.pop()
    form, others = ACTIONS[action]
    demand(isinstance(do[action], form), do)
    for name, value in do.items():
        demand(name == action or name in others
               and isinstance(value, others[name]), do)
    if action == "drop":
        demand(do["drop"] in ("before", "after"), do)
    if action in ("reset", "endless"):
        demand(do[action] in ("headers", "body"), do)
    if action == "gzip":
        bomb(do["gzip"])        # takes a while
    if action == "job":
        demand(do["job"] in JOB_FAULTS, do)
        if JOB_FAULTS[do["job"]]:
            name, default = JOB_FAULTS[do["job"]]
            do = {name: default, **do}
        if do["job"] == "stuck":
            demand(do["status"] not in ("", *FINAL), do)
    return do


# ----------------------------------------------------------------------
# The API
# ----------------------------------------------------------------------

class Api:
    """State and rules.  lock guards everything that changes."""

    def __init__(self, config):
        self.config = config
        self.clock = Clock(config["scale"])
        self.lock = threading.Lock()
        self.running = threading.Event()
        self.epoch = 0          # hangs of an earlier epoch end
        self.go_away = None     # set by the server
        self.prefix = os.urandom(9)
        self.serial = 0
        self.connections = {"open": 0, "max": 0, "total": 0}
        self.reset()

    def reset(self):
        """As new, but for configuration and connections.  Lock held, or
        nobody else there yet."""
        self.entities = {COMPANIES: {}, USERS: {}}
        self.jobs = {}
        self.current = None
        self.faults = []
        self.window = Window()      # all identify calls
        self.accepted = Window()    # those within the limit
        self.calls = collections.defaultdict(collections.Counter)
        self.totals = collections.Counter()
        self.violations = []
        self.connections["max"] = self.connections["open"]
        self.connections["total"] = self.connections["open"]
        self.epoch += 1
        self.running.set()

    def new_request_id(self):
        """An id never given before.  Lock held."""
        self.serial += 1
        return base64.urlsafe_b64encode(
            self.prefix + self.serial.to_bytes(6, "big")).decode()

    def apply(self, kind, record, at, source, request_id):
        """Applies one record.  Lock held."""
        entity = self.entities[kind].get(record[0])
        if entity is None:
            entity = self.entities[kind][record[0]] = Entity()
        entity.apply(record, at, source, request_id, self.config["history"])

    def advance(self):
        """Applies what jobs have had time for; returns the time.  Lock
        held."""
        now = self.clock.now()
        job = self.current
        if job is not None:
            for at, row in job.take_due(now):
                self.apply(job.kind, row, at, job.id, job.request_id)
            if job.status(now) in FINAL:
                job.rows = []
                self.current = None
        return now

    def pick_fault(self, req, stage="answer"):
        """What the script says about this request when its body is about to
        be read ("cut"), it is to be answered or makes a job, or None.  Lock
        held."""
        for fault in self.faults:
            if fault.stage == stage and fault.acts(req):
                self.totals["faults"] += 1
                return fault.do
        return None

    def note(self, req, status, violation=None):
        """Counts an answer, or its want."""
        with self.lock:
            self.calls[req.call][str(status)] += 1
            if violation:
                self.totals["violations"] += 1
                if len(self.violations) < MAX_KEPT:
                    self.violations.append(violation)

    def respond(self, req, apply):
        """(status, headers, body, violation) of a request; apply: false if
        it is only to be checked."""
        try:
            req.kind, argument = self.admit(req)
            status, body = getattr(self, req.call)(req, argument, apply)
            return status, {}, body, None
        except Refusal as refusal:
            violation = None
            if refusal.wrong:
                violation = "%d %s %s: %s" % (refusal.status, req.method,
                                              req.target, refusal.message)
            return refusal.status, refusal.headers, refusal.body(), violation

    def admit(self, req):
        """(kind, job id) of a request whose line and headers are in order;
        sets its call."""
        route, argument = route_of(req.target)
        req.call = route[1]
        if req.problem:
            raise req.problem
        if "?" in req.target or "#" in req.target:
            raise Refusal(400, "no query string is known here")
        if route is OTHER:
            raise Refusal(404, "no such path")
        if req.method != route[0]:
            raise Refusal(405, "the method is " + route[0],
                          headers={"allow": route[0]})
        self.check_headers(req, route[2])
        return route[2], argument

    def check_headers(self, req, kind):
        """Refuses what the headers rule out."""
        headers = req.headers
        if headers.get("authorization") != "Token " + self.config["key"]:
            raise Refusal(401, "the API key is missing or wrong")
        if not admits_json(headers.get("accept", "")):
            raise Refusal(406, "Accept must admit application/json")
        version = headers.get("x-api-version")
        if version is None and req.call == "identify" and kind == USERS:
            raise Refusal(400, "X-API-Version is required")
        if version not in (None, API_VERSION):
            raise Refusal(400, "X-API-Version is unknown")
        if req.method == "GET":
            if req.body:
                raise Refusal(400, "GET takes no body")
            return
        content_type = headers.get("content-type", "")
        if "content-encoding" in headers:
            raise Refusal(415, "Content-Encoding is not supported")
        if not (is_json_type(content_type) or req.call == "bulk"
                and content_type.lower().startswith("multipart/form-data")):
            raise Refusal(415, "Content-Type must be application/json")

    def identify(self, req, argument, apply):
        """A real-time call.  Its body is undocumented, so it varies."""
        with self.lock:
            now = self.clock.now()
            self.window.add(now)
            if self.config["strict_limits"]:
                limit = self.config["requests_per_minute"]
                if self.accepted.count(now) >= limit:
                    raise Refusal(429, "more than %g identify calls in a "
                                  "minute" % limit)
                self.accepted.add(now)
        value = read_json(req.body)
        record = (read_record(COMPANIES, value) if req.kind == COMPANIES
                  else read_user_call(value))
        if apply:
            with self.lock:
                now = self.advance()
                self.apply(req.kind, record, now, "identify", req.id)
        return (200 if req.kind == COMPANIES else 202,
                b"{}" if req.id[-1] < "a" else b"")

    def bulk(self, req, argument, apply):
        """A job."""
        if is_json_type(req.headers["content-type"]):
            rows, size = read_array(req.kind, req.body), len(req.body)
            filename = "%s_%s.json" % (req.kind, req.id)
        else:
            filename, contents = read_upload(req.headers["content-type"],
                                             req.body)
            rows, size = read_lines(req.kind, contents), len(contents)
        with self.lock:
            now = self.advance()
            if self.current is not None:
                self.totals["conflicts_foreign" if self.current.foreign
                            else "conflicts_own"] += 1
                raise Refusal(409, "another job is in progress", wrong=False)
            if not apply:
                return 202, b""
            fault = self.pick_fault(req, "job")
            job = self.add_job(req.kind, filename, size, rows, now,
                               fault=fault, request_id=req.id)
            self.totals["bulk_records"] += len(rows)
            if fault and fault["job"] == "terse":
                return 202, to_json({"job_id": job.id, "status": "queued",
                                     "submitted_at": iso(now)})
            shown = job.show(now)
            if fault and fault["job"] == "bare":
                shown["job_id"] = job.id.split(":")[-1]
            return 202, to_json(shown)

    def add_job(self, kind, filename, size, rows, now, **others):
        """Puts a job into the free slot.  Lock held."""
        job = Job(len(self.jobs) + 1, kind, filename, size, rows, now,
                  self.config, **others)
        self.jobs[job.id] = self.current = job
        running = sum(j.status(now) not in FINAL for j in self.jobs.values())
        self.totals["max_concurrent_jobs"] = max(
            self.totals["max_concurrent_jobs"], running)
        return job

    def list(self, req, argument, apply):
        """The newest jobs: the list is documented as paginated, its
        parameters are not."""
        with self.lock:
            now = self.advance()
            jobs = [*self.jobs.values()][::-1][:self.config["list_limit"]]
            return 200, to_json([job.show(now) for job in jobs])

    def poll(self, req, argument, apply):
        """One job."""
        if not re.fullmatch(r"(%[0-9A-Fa-f]{2}|[A-Za-z0-9._~-])+", argument):
            raise Refusal(404, "the job id is not percent-encoded")
        with self.lock:
            now = self.advance()
            wanted = urllib.parse.unquote(argument)
            job = self.jobs.get(wanted) or next(
                (j for j in self.jobs.values() if j.fault.get("job") == "bare"
                 and j.id.endswith(":" + wanted)), None)
            if job is None:
                raise Refusal(404, "no such job", wrong=False)
            return 200, to_json(job.show_progress(now))


# ----------------------------------------------------------------------
# Control
# ----------------------------------------------------------------------

def control(api, req):
    """(status, value) of a control request."""
    url = urllib.parse.urlsplit(req.target)
    query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
    action = CONTROL.get((req.method, url.path))
    if action is None:
        return 404, {"error": "no such control"}
    try:
        argument = json.loads(req.body) if req.body else {}
        with api.lock:
            api.advance()
            return 200, action(api, query if req.method == "GET"
                               else argument)
    except LookupError as problem:
        return 404, {"error": "unknown: %s" % problem}
    except (ValueError, TypeError, AttributeError, re.error) as problem:
        return 400, {"error": str(problem)}


def get_state(api, query):
    if "id" in query:
        return api.entities[query["kind"]][query["id"]].show(query["kind"])
    shown = {kind: {key: entity.show(kind) for key, entity in found.items()}
             for kind, found in api.entities.items()}
    return shown[query["kind"]] if "kind" in query else shown


def get_history(api, query):
    return api.entities[query["kind"]][query["id"]].show_history()


def get_counters(api, query):
    calls = {name: dict(by_status) for name, by_status in api.calls.items()}
    statuses = collections.Counter()
    for by_status in api.calls.values():
        statuses.update(by_status)
    return {"calls": {name: sum(api.calls[name].values()) for name in
                      ("identify", "bulk", "poll", "list", "other")},
            "calls_by_status": calls, "statuses": statuses,
            "violations": api.violations,
            "violations_seen": api.totals["violations"],
            "max_identify_per_minute": api.window.most,
            "bulk_records": api.totals["bulk_records"],
            "conflicts_own": api.totals["conflicts_own"],
            "conflicts_foreign": api.totals["conflicts_foreign"],
            "max_concurrent_jobs": api.totals["max_concurrent_jobs"],
            "aborted": api.totals["aborted"], "faults": api.totals["faults"],
            "connections": api.connections, "now": api.clock.now()}


def get_jobs(api, query):
    now = api.clock.now()
    return [{**job.show_progress(now), "total_rows": job.total,
             "file_size": job.size, "kind": job.kind, "foreign": job.foreign,
             "fault": job.fault or None, "request_id": job.request_id}
            for job in api.jobs.values()]


def get_faults(api, query):
    return [{**fault.spec, "hits": fault.hits} for fault in api.faults]


def post_faults(api, rules):
    api.faults = api.faults + [Fault(spec) for spec in rules]
    return get_faults(api, None)


def delete_faults(api, argument):
    api.faults = []
    api.epoch += 1
    return []


def post_reset(api, argument):
    api.reset()
    return {}


def post_config(api, argument):
    known = {**api.config, "paused": False, "seed": 0}
    for name, value in argument.items():
        form = type(known.get(name))
        demand(type(value) is form
               or form is float and type(value) is int, argument)
        demand(form is not float or value > 0, argument)
    for name, value in argument.items():
        if name == "paused":
            (api.running.clear if value else api.running.set)()
        elif name == "seed":
            random.seed(value)
        else:
            api.config[name] = type(api.config[name])(value)
    api.clock.set_scale(api.config["scale"])
    return {**api.config, "paused": not api.running.is_set()}


def post_foreign_job(api, argument):
    if api.current is not None:
        raise ValueError("the slot is taken")
    now = api.clock.now()
    job = api.add_job(COMPANIES, argument.get("filename", "import.csv"), 0,
                      [], now, foreign=argument.get("seconds", 60))
    return job.show_progress(now)


def post_finish_jobs(api, argument):
    if api.current is None:
        return {"finished": 0}
    api.current.end_now(api.clock.now())
    api.advance()
    return {"finished": 1}


def post_away(api, argument):
    api.go_away(argument["seconds"], argument.get("silent", False))
    return {}


CONTROL = {
    ("GET", "/_/state"): get_state, ("GET", "/_/history"): get_history,
    ("GET", "/_/counters"): get_counters, ("GET", "/_/jobs"): get_jobs,
    ("GET", "/_/faults"): get_faults, ("POST", "/_/faults"): post_faults,
    ("DELETE", "/_/faults"): delete_faults, ("POST", "/_/reset"): post_reset,
    ("POST", "/_/config"): post_config,
    ("POST", "/_/foreign_job"): post_foreign_job,
    ("POST", "/_/finish_jobs"): post_finish_jobs,
    ("POST", "/_/away"): post_away,
}


# ----------------------------------------------------------------------
# HTTP
# ----------------------------------------------------------------------

class Request:
    """One request as read; problem: a Refusal already found."""

    __slots__ = ("method", "target", "headers", "body", "call", "kind", "id",
                 "problem", "close")

    def __init__(self):
        self.method = self.target = "-"
        self.headers = {}
        self.body = b""
        self.call = "other"
        self.kind = self.id = self.problem = None
        self.close = False


class Connection(socketserver.StreamRequestHandler):
    """One client.  Reads HTTP/1.1 itself: the library's reader is lenient,
    and too slow for the real-time path."""

    disable_nagle_algorithm = True
    rbufsize = 64 * 1024

    def setup(self):
        self.served = 0
        self.counted = False
        if self.server.tls:
            self.request = self.server.tls.wrap_socket(self.request,
                                                       server_side=True)
        super().setup()
        self.api = self.server.api
        self.server.clients[threading.get_ident()] = self.request

    def finish(self):
        self.server.clients.pop(threading.get_ident(), None)
        if self.counted:
            with self.api.lock:
                self.api.connections["open"] -= 1
        super().finish()
        if self.server.tls:
            self.request.close()

    def handle(self):
        try:
            while self.serve_one():
                pass
        except EOFError:
            with self.api.lock:
                self.api.totals["aborted"] += 1
        except OSError:
            pass                # the client left while we answered

    def serve_one(self):
        """Reads and answers one request; false when the connection ends."""
        line = self.rfile.readline(MAX_LINE)
        if not line:
            return False
        req = Request()
        try:
            self.read_head(req, line)
            if self.cut(req):
                return False
            self.read_body(req)
        except Refusal as refusal:
            req.problem = refusal
            req.close = True
        except OSError:
            raise EOFError
        self.served += 1
        if self.served >= KEEP_ALIVE_REQUESTS:
            req.close = True
        if req.target.startswith("/_/"):
            status, value = control(self.api, req)
            self.request.sendall(self.pack(req, status, {}, to_json(value)))
            return not req.close
        self.count_connection()
        if not self.wait(lambda: self.api.running.is_set()):
            return False
        return self.exchange(req) and not req.close

    def count_connection(self):
        """Counts a connection once it has made a request of the API."""
        if not self.counted:
            self.counted = True
            with self.api.lock:
                seen = self.api.connections
                seen["open"] += 1
                seen["total"] += 1
                seen["max"] = max(seen["max"], seen["open"])

    def read_head(self, req, line):
        """Request line and headers.  EOFError if the client leaves."""
        first = re.fullmatch(rb"([A-Z]+) (/[!-~]*) HTTP/1\.1\r\n", line)
        if not first:
            raise Refusal(400, "not an HTTP/1.1 request line")
        req.method, req.target = first[1].decode(), first[2].decode()
        for _ in range(100):
            line = self.rfile.readline(MAX_LINE)
            if line == b"\r\n":
                break
            if not line.endswith(b"\n"):
                raise EOFError
            name, colon, value = line.decode("latin-1").partition(":")
            name = name.lower()
            if not colon or not name or name.split() != [name]:
                raise Refusal(400, "malformed header")
            if name in req.headers:
                raise Refusal(400, "header %s comes twice" % name)
            req.headers[name] = value.strip()
        else:
            raise Refusal(431, "too many headers")
        if "host" not in req.headers:
            raise Refusal(400, "Host is required")
        req.close = req.headers.get("connection", "").lower() == "close"

    def read_body(self, req):
        """The body.  EOFError if the client leaves."""
        headers = req.headers
        if "transfer-encoding" in headers:
            raise Refusal(411, "Content-Length is required")
        length = headers.get("content-length")
        if length is None:
            if req.method == "POST" and not req.target.startswith("/_/"):
                raise Refusal(411, "Content-Length is required")
            return
        if not re.fullmatch(r"[0-9]{1,12}", length):
            raise Refusal(400, "Content-Length is no number")
        length = int(length)
        expects = headers.get("expect", "").lower() == "100-continue"
        if length > MAX_BODY:
            if not expects:     # or the client would never see the answer
                self.skip(length)
            raise Refusal(413, "the body is larger than 50 MB")
        if expects:
            self.request.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        req.body = self.rfile.read(length)
        if len(req.body) < length:
            raise EOFError

    def cut(self, req):
        """Whether the script has the connection reset within the body."""
        if req.target.startswith("/_/"):
            return False
        with self.api.lock:
            do = self.api.pick_fault(req, "cut")
            req.call = route_of(req.target)[0][1]
            if do and req.call == "identify":
                self.api.window.add(self.api.clock.now())
        if do is None:
            return False
        self.rfile.read(do["cut"])
        self.api.note(req, "none")
        self.reset()
        return True

    def reset(self):
        """The connection will end with a reset."""
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                struct.pack("ii", 1, 0))
        self.request.close()

    def skip(self, length):
        while length > 0:
            got = len(self.rfile.read(min(length, MIB)))
            if not got:
                raise EOFError
            length -= got

    def wait(self, done):
        """Waits until done() is true; false if the client left first."""
        if done():
            return True
        poll = select.poll()
        poll.register(self.request.fileno(),
                      getattr(select, "POLLRDHUP", select.POLLHUP))
        while not done():
            if poll.poll(0):
                return False
            time.sleep(0.01)
        return not poll.poll(0)

    def exchange(self, req):
        """Answers a request of the API; false when the connection ends."""
        api = self.api
        with api.lock:
            req.id = api.new_request_id()
            do = api.pick_fault(req)
        if do is None:
            status, headers, body, violation = api.respond(req, True)
            api.note(req, status, violation)
            self.request.sendall(self.pack(req, status, headers, body))
            return True
        apply = not ("status" in do or do.get("drop") == "before"
                     or "hang" in do and not do.get("apply"))
        status, headers, body, violation = api.respond(req, apply)
        if "drop" in do or not apply and "hang" in do:
            api.note(req, "none", violation)
            if "hang" in do:
                self.hang(do["hang"])
            return False
        if "status" in do or "status_after" in do:
            status = do.get("status", do.get("status_after"))
            headers = {k.lower(): str(v)
                       for k, v in do.get("headers", {}).items()}
            body = do.get("body", "").encode()
        api.note(req, status, violation)
        return self.distort(req, do, status, headers, body)

    def distort(self, req, do, status, headers, body):
        """Sends an answer as a fault will have it."""
        if "hang" in do and not self.hang(do["hang"]):
            return False
        if "oversized" in do:
            body = b'{"padding":"%s"}' % (b"x" * int(do["oversized"] * MIB))
        if "gzip" in do:
            headers = {**headers, "content-encoding": "gzip"}
            body = bomb(do["gzip"])
        if "raw" in do:
            self.request.sendall(do["raw"].encode("latin-1"))
            return False
        if "endless" in do:
            return self.endless(req, do["endless"], status, headers)
        if "garbage" in do:
            body = b"\x00\xff\xfe{]" + os.urandom(40)
        if "content_type" in do:
            headers = {**headers, "content-type": do["content_type"]}
            body = b"<!DOCTYPE html><html><body>Please wait</body></html>"
        if "chunked" in do:
            headers = {**headers, "content-length": None,
                       "transfer-encoding": "chunked"}
            step = MIB if "oversized" in do else 1
            body = b"".join([b"%x\r\n%s\r\n" % (len(body[i:i + step]),
                                                 body[i:i + step])
                             for i in range(0, len(body), step)]
                            ) + b"0\r\n\r\n"
        if "http10" in do:
            headers = {**headers, "content-length": None,
                       "connection": "close"}
            answer = self.pack(req, status, headers, body)
            self.request.sendall(answer.replace(b"/1.1", b"/1.0", 1))
            return False
        if "reset" in do:
            missing = {**headers, "content-length": str(len(body) + 100)}
            answer = self.pack(req, status, missing, body)
            if do["reset"] == "headers":
                answer = answer[:answer.index(b"\r\n") + 20]
            self.request.sendall(answer)
            self.reset()
            return False
        if "truncate" in do:
            missing = {**headers, "content-length": str(len(body) + 100)}
            self.request.sendall(self.pack(req, status, missing, body))
            return False
        answer = self.pack(req, status, headers, body)
        if "interim" in do:
            answer = b"HTTP/1.1 102 Processing\r\n\r\n" * do["interim"] + answer
        if "away" in do:
            self.api.go_away(do["away"], do.get("silent", False))
        if "drip" in do:
            head = answer.index(b"\r\n\r\n") + 4 if do.get("body") else 0
            self.request.sendall(answer[:head])
            self.drip(answer[head:], do["drip"])
        else:
            self.request.sendall(answer)
        return "away" not in do

    def endless(self, req, what, status, headers):
        """Sends headers or body until the client leaves, or the script is
        dropped."""
        epoch, sent = self.api.epoch, 0
        headers = {**headers, "content-length": None,
                   "transfer-encoding": "chunked"}
        answer = self.pack(req, status, headers, b"")
        part = b"10000\r\n%s\r\n" % (b"x" * 65536)
        if what == "headers":
            answer = answer[:-2]
            part = b"x-more: %s\r\n" % (b"x" * 1000)
        self.request.sendall(answer)
        while self.api.epoch == epoch and sent < 4096 * MIB:
            self.request.sendall(part)
            sent += len(part)
        return False

    def hang(self, seconds):
        """Waits, at most until the script is dropped; false if the client
        left."""
        epoch, end = self.api.epoch, time.monotonic() + seconds
        return self.wait(lambda: time.monotonic() >= end
                         or self.api.epoch != epoch)

    def drip(self, answer, rate):
        """Sends slowly, at most until the script is dropped."""
        epoch, step = self.api.epoch, max(1, int(rate / 10))
        for at in range(0, len(answer), step):
            self.request.sendall(answer[at:at + step])
            if self.api.epoch == epoch:
                time.sleep(step / rate)

    def pack(self, req, status, headers, body):
        """The bytes of an answer."""
        try:
            phrase = HTTPStatus(status).phrase
        except ValueError:
            phrase = "Unknown"
        lines = {"cache-control": "max-age=0, private, must-revalidate",
                 "connection": "close" if req.close else "keep-alive",
                 "content-length": str(len(body)),
                 "content-type": "application/json; charset=utf-8",
                 "date": http_date(int(time.time())), "server": "Cowboy"}
        if req.id:
            lines["x-request-id"] = req.id
        lines.update(headers)
        head = "".join(["%s: %s\r\n" % line for line in lines.items()
                        if line[1] is not None])
        return ("HTTP/1.1 %d %s\r\n%s\r\n" % (status, phrase, head)
                ).encode("latin-1") + body


@functools.lru_cache(maxsize=2)
def bomb(size):
    """JSON of so many MB, compressed."""
    return gzip.compress(b'{"padding":"%s"}' % (b"x" * int(size * MIB)))


@functools.lru_cache(maxsize=2)
def http_date(at):
    return formatdate(at, usegmt=True)


class Server(socketserver.ThreadingTCPServer):
    """Listens on the loopback address; a thread a connection."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 512

    def __init__(self, port, api, tls=None):
        self.api = api
        self.tls = tls
        self.clients = {}       # sockets by thread
        self.absence = None     # (seconds, silent) asked for
        self.gone = threading.Event()
        api.go_away = self.go_away
        super().__init__(("127.0.0.1", port), Connection)

    def serve(self):
        """Serves for ever, but for absences."""
        while True:
            self.serve_forever(0.05)
            seconds, silent = self.absence
            self.socket.close()
            self.socket = socket.socket()
            self.server_bind()
            crowd = self.crowd() if silent else []
            self.gone.set()
            time.sleep(seconds)
            self.server_activate()
            for sock in crowd:
                sock.close()
            self.gone.clear()
            self.absence = None

    def crowd(self):
        """Fills the queue of connections, so that further ones get no answer
        at all; returns what fills it."""
        crowd = []
        self.socket.listen(0)
        while len(crowd) < 8:
            sock = socket.socket()
            sock.settimeout(0.1)
            crowd.append(sock)
            try:
                sock.connect(self.server_address)
            except socket.timeout:
                break
        return crowd

    def go_away(self, seconds, silent):
        """Returns when nobody can connect any more; for so many seconds."""
        if self.absence is not None:
            return
        self.absence = (seconds, silent)
        self.shutdown()
        self.gone.wait(10)
        for thread, sock in list(self.clients.items()):
            if thread != threading.get_ident():
                try:
                    sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass        # it has just ended

    def handle_error(self, request, client_address):
        """Says nothing about a client that left or failed its handshake."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


def watch_parent(pid):
    """Ends this process when that one is gone."""
    child = os.getppid() == pid
    while True:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            os._exit(0)
        except PermissionError:
            pass                # it is there, and somebody else's
        if child and os.getppid() != pid:
            os._exit(0)
        time.sleep(0.2)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description="A stand-in for the Userpilot HTTP API")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--key", required=True)
    parser.add_argument("--strict-limits", choices=("on", "off"),
                        default="on")
    parser.add_argument("--requests-per-minute", type=float, default=600.0)
    parser.add_argument("--records-per-minute", type=float, default=1800.0)
    parser.add_argument("--phase-seconds", type=float, default=1.0)
    parser.add_argument("--history", type=int, default=200)
    parser.add_argument("--list-limit", type=int, default=50)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--tls-cert")
    parser.add_argument("--tls-key")
    parser.add_argument("--parent-pid", type=int)
    parser.add_argument("--port-file")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    random.seed(arguments.seed)
    names = ("key", "scale", "requests_per_minute", "records_per_minute",
             "phase_seconds", "history", "list_limit")
    config = {name: getattr(arguments, name) for name in names}
    config["strict_limits"] = arguments.strict_limits == "on"
    tls = None
    if arguments.tls_cert:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(arguments.tls_cert, arguments.tls_key)
    server = Server(arguments.port, Api(config), tls)
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    if arguments.parent_pid:
        threading.Thread(target=watch_parent, args=(arguments.parent_pid,),
                         daemon=True).start()
    port = server.server_address[1]
    if arguments.port_file:
        with open(arguments.port_file + ".new", "w") as file:
            file.write("%d\n" % port)
        os.replace(arguments.port_file + ".new", arguments.port_file)
    print(port, flush=True)
    try:
        server.serve()
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
