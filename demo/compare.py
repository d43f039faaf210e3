#!/usr/bin/env python3
"""Compares what the stand-in holds with what the tables say.

The tables' records come on standard input, one a line, as demo/dump.sql
writes them; the stand-in is asked on the port given.  Every record must be
there, property by property, and nothing else.  Prints what differs, what was
compared and how the stand-in was treated; the exit status is 1 if anything
differs or a request was not as the API's documentation has it.
"""
import json
import sys
import urllib.request

SHOWN = 10


def ask(port, path):
    """The stand-in's answer, without any proxy the environment names."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open("http://127.0.0.1:%s%s" % (port, path),
                     timeout=60) as answer:
        return json.load(answer)


def expected(lines):
    """kind -> id -> what Userpilot must show."""
    kinds = {"companies": {}, "users": {}}
    for line in lines:
        record = json.loads(line)
        kinds[record.pop("kind")][record.pop("id")] = record
    return kinds


def differences(tables, held):
    """What is missing, different or too much, as lines."""
    for kind, records in tables.items():
        for key, record in records.items():
            if key not in held[kind]:
                yield "%s %s: not at Userpilot" % (kind, key)
            elif held[kind][key] != record:
                yield "%s %s: %s in the tables, %s at Userpilot" % (
                    kind, key, json.dumps(record, ensure_ascii=False),
                    json.dumps(held[kind][key], ensure_ascii=False))
        for key in held[kind].keys() - records.keys():
            yield "%s %s: at Userpilot, but in no table" % (kind, key)


def main():
    port = sys.argv[1]
    tables = expected(sys.stdin)
    found = list(differences(tables, ask(port, "/_/state")))
    counters = ask(port, "/_/counters")
    count = sum(len(records) for records in tables.values())
    wrong = counters["violations_seen"]

    for line in found[:SHOWN]:
        print("   " + line)
    print("%s records compared, property by property: %d different"
          % (format(count, ","), len(found)))
    print("%s calls, %d of them not as the API's documentation says; "
          "at most %d real-time calls in any API minute (600 are allowed), "
          "%d job at a time" % (
              format(sum(counters["calls"].values()), ","), wrong,
              counters["max_identify_per_minute"],
              counters["max_concurrent_jobs"]))
    for violation in counters["violations"][:SHOWN]:
        print("   " + str(violation))
    return bool(found or wrong or not count)


if __name__ == "__main__":
    sys.exit(main())
