#!/usr/bin/env python3
"""Checks that the C files keep to their layers, and prints TAP.

Includes go one way only: a file may include headers of lower layers and its
own header, nothing sideways.  Files of one family share a layer because they
are one module cut in pieces.  A file that is not in the table is a failure:
whoever adds one says where it belongs.

  layers.py [DIRECTORY]        default: src, beside this script's directory
"""
import os
import re
import sys

# Layers, lowest first; each a list of families, the first name of a family
# being that of its header (others may have one of their own)
LAYERS = [
    # what all may know
    [["compat"], ["userpilot"]],
    # each alone: settings, keys of entities, pure decisions, the network
    [["settings"], ["entities"], ["merge"], ["delivery"], ["change"], ["shape"],
     ["http", "http_transfer", "http_url"]],
    # made of one of those
    [["clock"], ["payload"], ["api"], ["options"]],
    # limits, in shared memory; what the catalog says of a server
    [["quota"], ["environment"]],
    # slots, in shared memory; SQL in the extension's own schema; rows of
    # a table as its trigger maps them
    [["state", "state_slot", "state_worker", "state_launcher"], ["sql", "row_writer"]],
    # one table, or a few that belong together, each; environment_enabled is
    # of environment.h, but reads a table
    [["queue", "queue_table", "queue_batch", "queue_look",
      "queue_read"], ["jobs"],
     ["profiles", "profiles_table", "profiles_read", "profiles_write"], ["history"], ["ledger"], ["environment_enabled"]],
    # many rows of one caller, judged by what several of those tables say
    [["intake", "known"], ["mapping", "mapping_row"]],
    # the lanes of one server
    [["step"],
     ["sender", "realtime", "realtime_answers", "pending", "bulk", "bulk_job", "bulk_answers",
      "bulk_done", "bulk_recover", "held_job", "sweep", "plan", "share", "job_writer"]],
    # entry points
    [["worker"], ["functions"], ["aggregates"], ["triggers"],
     ["sync"], ["procedures"]],
    [["launcher"]],
    [["userpilot.c"]],
]

# What only some files may hold: (why, pattern, files that may)
RESERVED = [
    ("libcurl is known to http alone",
     r"#\s*include\s*<curl/|\bCURL[A-Z_]*\b|\bcurl_\w+\s*\(",
     r"http(_\w+)?\.[ch]"),
    ("http knows no SQL", r"#\s*include\s*\"executor/spi\.h\"|\bSPI_\w+",
     r"(?!http).*"),
    ("PG_VERSION_NUM is compat.h's", r"\bPG_VERSION_NUM\b", r"compat\.h"),
    ("SQL is prepared and executed by sql.c",
     r"\bSPI_(prepare|exec|cursor_open)\w*\s*\(", r"sql\.c"),
    ("the pure modules know no server",
     r"#\s*include\s*\"(?!postgres(_fe)?\.h\")[^\"]*/",
     r"(?!(merge|delivery)\.[ch]).*"),
]

INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"/]+\.h)"', re.M)
COMMENT = re.compile(r'/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.S)


def places():
    """File name without suffix, or with, -> (layer, family)."""
    found = {}
    for layer, families in enumerate(LAYERS):
        for family in families:
            for name in family:
                found[name] = (layer, family[0])
    return found


def place(found, name):
    """(layer, family) of a file, or None."""
    return found.get(name, found.get(os.path.splitext(name)[0]))


def read_files(directory):
    """Name -> text of the C files."""
    files = {}
    for name in sorted(os.listdir(directory)):
        if name.endswith((".c", ".h")):
            with open(os.path.join(directory, name), encoding="utf-8") as file:
                files[name] = file.read()
    return files


def without_comments(text):
    """The text with comments blanked; strings stay, as includes are some."""
    def blank(match):
        if match.group().startswith('"'):
            return match.group()
        return re.sub(r"[^\n]", " ", match.group())
    return COMMENT.sub(blank, text)


def line_of(text, position):
    return text.count("\n", 0, position) + 1


def wrong_includes(files, found):
    """Includes that go up or sideways."""
    for name, text in files.items():
        here = place(found, name)
        for match in INCLUDE.finditer(text):
            there = place(found, match.group(1))
            if match.group(1) not in files or None in (here, there):
                continue
            if here[1] != there[1] and there[0] >= here[0]:
                yield "%s:%d: layer %d includes %s of layer %d" % (
                    name, line_of(text, match.start()), here[0],
                    match.group(1), there[0])


def wrong_places(files, pattern, allowed):
    """Where the pattern is in a file that may not hold it."""
    for name, text in files.items():
        if not re.fullmatch(allowed, name):
            for match in re.finditer(pattern, text):
                yield "%s:%d: %s" % (name, line_of(text, match.start()),
                                     match.group())


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    directory = sys.argv[1] if len(sys.argv) > 1 else \
        os.path.join(os.path.dirname(here), "src")
    files = {name: without_comments(text)
             for name, text in read_files(directory).items()}
    found = places()
    results = [
        ("there are files", [] if files else ["none in " + directory]),
        ("every file has its layer",
         ["%s is in no layer" % name for name in files
          if place(found, name) is None]),
        ("includes go down only", list(wrong_includes(files, found)))]
    for why, pattern, allowed in RESERVED:
        results.append((why, list(wrong_places(files, pattern, allowed))))

    print("1..%d" % len(results))
    for number, (what, wrong) in enumerate(results, 1):
        print("%sok %d - %s" % ("not " if wrong else "", number, what))
        for line in wrong:
            print("# " + line)
    return any(wrong for _, wrong in results)


if __name__ == "__main__":
    sys.exit(main())
