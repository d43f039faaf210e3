#!/bin/sh
# The generated histories must notice each guard that is taken away.
cd "$(dirname "$0")" || exit 1
echo 1..3
n=0
for guard in no-mark by-lsn forget-dead
do
	n=$((n + 1))
	if ./merge_histories 20000 1 --$guard >/dev/null 2>&1
	then echo "not ok $n - histories notice --$guard"
	else echo "ok $n - histories notice --$guard"
	fi
done
