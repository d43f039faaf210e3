#!/usr/bin/env python3
"""Runs the rows of the bench and writes the report.

bench/run starts it, as an unprivileged user, with a private PostgreSQL; what
each row measures is said where it is measured, in enqueue.py and deliver.py.
"""
import argparse
import os
import platform
import subprocess
import sys
import time
import traceback

import deliver
import enqueue
from cluster import SETTINGS, Cluster, SqlError
from measure import NotMeasured, Result

ROWS = {**enqueue.ROWS, **deliver.ROWS}

# What is measured: the full size, and the one that only shows that it runs
SIZES = {
    "loop": (100000, 9000), "million": (1000000, 10000),
    # turns of each side with and without waiting for the disk, and about how
    # many seconds one takes
    "autocommit": ((151, 61, 0.25), (3, 3, 0.1)),
    "trigger": (200000, 10000), "bulk": (1000000, 50000),
    "prepare": ((1000000, 200000), (30000, 15000)),
    "backlog": ((10000000, 1000000), (100000, 50000)),
    "latency": (1000, 100), "cold": (31, 5), "realtime": (20000, 2000),
    # records, repetitions, how much faster time passes
    "delivered": (((10000, 3, 100), (100000, 2, 100), (10000, 1, 10)),
                  ((2000, 1, 100),)),
    "idle": (60, 3), "memory": (49, 10),
}
BUDGET = 1500                   # seconds after which no row starts
HEADER = ("| what | baseline | userpilot | ratio | target | |\n"
          "|---|---|---|---|---|---|")


class Bench:
    """What the rows are given."""

    def __init__(self, arguments, tree):
        self.quick = bool(arguments.quick)
        self.work, self.tree = arguments.work, tree
        self.cluster = Cluster(arguments.work, arguments.bin, tree)
        self.ready = {}
        self.failed = False

    def size(self, name):
        return SIZES[name][self.quick]

    def repetitions(self, n):
        return 2 if self.quick and n > 1 else n


def measure(bench, name):
    """The results of a row; what went wrong is one of them."""
    results = []
    try:
        for result in ROWS[name](bench):
            results.append(result)
            print("   " + plain(result), flush=True)
    except NotMeasured as reason:
        results.append(Result.missing(name, reason))
    except (SqlError, OSError, subprocess.SubprocessError, LookupError,
            ValueError) as problem:
        traceback.print_exc()
        results.append(Result.missing(name, "%s: %s" % (
            type(problem).__name__, problem)))
        bench.ready.clear()
        bench.failed = True
    if results and results[-1].verdict == "not measured":
        print("   " + plain(results[-1]), flush=True)
    return results


def plain(result):
    """A result as a line for the terminal."""
    parts = [result.what, result.baseline and "baseline " + result.baseline,
             result.ours, result.ratio, result.target,
             result.verdict.strip("*")]
    if result.verdict == "not measured":
        parts[1] = result.note
    return "; ".join(p for p in parts if p)


def first_line(*command):
    """What a program says of its version."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, text=True,
                              stdout=subprocess.PIPE, timeout=10,
                              stderr=subprocess.STDOUT)
        return done.stdout.splitlines()[0]
    except (OSError, IndexError, subprocess.SubprocessError):
        return "missing"


def machine():
    """Processors and memory, in words."""
    with open("/proc/meminfo") as file:
        kilobytes = int(file.read().split()[1])
    return "%d processors (%s), %d GB" % (
        os.cpu_count(), platform.machine(), round(kilobytes / 2**20))


def report(bench, arguments, results, seconds):
    """The whole file."""
    settings = ", ".join("`%s = %s`" % item for item in SETTINGS.items())
    sizes = ", ".join("%s %s" % (name, SIZES[name][bench.quick])
                      for name in SIZES)
    lines = [
        "# Results of the bench", "",
        "Written by `make bench`; [README.md](README.md) says how it "
        "measures. Medians of repetitions in turns, with minimum and "
        "maximum; the ratio is that of the medians, userpilot to baseline. "
        "Only ratios of one run mean something.", "",
        HEADER, *(r.line() for found in results.values() for r in found), "",
        "## The run", "",
        "- %s, revision %s, %d min %d s%s" % (
            time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            arguments.revision, seconds // 60, seconds % 60,
            "; QUICK: sizes too small to mean anything" if bench.quick
            else ""),
        "- " + machine(),
        "- %s; %s; %s; Python %s" % (
            first_line(os.path.join(arguments.bin, "postgres"), "--version"),
            first_line("curl", "--version").split(" (")[0],
            first_line("nginx", "-v"), platform.python_version()),
        "- settings: %s" % settings,
        "- rows with time passing %d times faster (`userpilot.time_scale`): "
        "prepare, latency-cold, delivered, idle, memory; %d times: backlog" %
        (deliver.SCALE, deliver.SCALE // 10),
        "- sizes: %s" % sizes, "",
        "Again: `make bench`; one row: `make bench ONLY=%s`." %
        next(iter(results)), ""]
    return "\n".join(lines)


def parse():
    parser = argparse.ArgumentParser()
    parser.add_argument("--list", action="store_true")
    for name in ("work", "bin", "only", "quick", "revision", "output"):
        parser.add_argument("--" + name, default="")
    return parser.parse_args()


def main():
    arguments = parse()
    if arguments.list:
        print("\n".join(ROWS))
        return 0
    names = [n for n in arguments.only.split(",") if n] or list(ROWS)
    unknown = set(names) - set(ROWS)
    if unknown:
        print("no such row: %s; there are %s" % (
            ", ".join(sorted(unknown)), ", ".join(ROWS)), file=sys.stderr)
        return 2
    tree = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    start = time.monotonic()
    results = {}
    bench = Bench(arguments, tree)
    try:
        for name in names:
            began = time.monotonic()
            print("== %s" % name, flush=True)
            if began - start > BUDGET:
                results[name] = [Result.missing(name, "out of time")]
            else:
                results[name] = measure(bench, name)
            print("   %d s" % (time.monotonic() - began), flush=True)
            with open(arguments.output, "w") as file:
                file.write(report(bench, arguments, results,
                                  time.monotonic() - start))
    finally:
        bench.cluster.stop()
    verdicts = [r.verdict for found in results.values() for r in found]
    print("%d met, %d missed, %d not measured, in %d s" % (
        verdicts.count("met"), verdicts.count("**missed**"),
        verdicts.count("not measured"), time.monotonic() - start))
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())
