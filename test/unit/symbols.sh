#!/bin/sh
# Only what PostgreSQL calls is exported: a helper's name must not meet that
# of another library's.
cd "$(dirname "$0")/../.." || exit 1
echo 1..2
seen=$(nm -D --defined-only userpilot.so | awk '{ print $NF }')
others=$(echo "$seen" | grep -Ev '^(Pg_magic_func|_PG_init|pg_finfo_userpilot_.*|userpilot_.*)$')
if echo "$seen" | grep -qx Pg_magic_func
then echo "ok 1 - the library was built"
else echo "not ok 1 - the library was built"
fi
if [ -z "$others" ]
then echo "ok 2 - nothing but entry points is exported"
else echo "not ok 2 - nothing but entry points is exported"; echo "$others" | sed 's/^/# /'
fi
