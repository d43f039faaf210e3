# shellcheck shell=bash
#
# lib.sh: what demo/run and test/run share
#
# Both start on a machine where nothing but Debian may be installed, want to
# leave nothing behind, and PostgreSQL refuses to run as root.  So: packages
# that are missing are installed, without a system cluster; everything else
# happens in one temporary directory that belongs to an unprivileged user,
# with a copy of the tree and a copy of PostgreSQL, as a library can only be
# installed where PostgreSQL itself is before version 18.
#
# PostgreSQL finds its directories relative to its programs, so a copy works
# from anywhere as long as the layout stays.
#
# Sourced by bash; the caller has set TREE, the checkout, and SAY, a command
# that tells the reader what is being done.
#
# shellcheck disable=SC2034	# what it sets is for the caller

# Programs of a developer's home are not for the unprivileged user
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
umask 022

WORK=				# the temporary directory
AS_USER=()			# put before a command: runs it unprivileged
PG_CONFIG=${PG_CONFIG:-}
PG_BIN=				# programs of the private PostgreSQL
PG_VERSION=			# as in 15.4
NO_CLUSTER=/etc/postgresql-common/createcluster.d/userpilot-no-cluster.conf

# Says why it cannot go on, and ends
die()
{
	printf '%s: %s\n' "${0##*/}" "$*" >&2
	exit 1
}

# ------------------------------------------------------------- packages

# The newest PostgreSQL that has server, programs and headers; or nothing
newest_postgres()
{
	local config

	for config in /usr/lib/postgresql/*/bin/pg_config; do
		if [ -x "${config%/*}/initdb" ] &&
			[ -f "$("$config" --pgxs 2>/dev/null)" ]; then
			echo "$config"
		fi
	done | sort -V | tail -n 1
}

# Prints the packages that are missing, of those every use needs
missing_packages()
{
	command -v make >/dev/null || echo make
	command -v gcc >/dev/null || echo gcc
	[ -e /usr/include/stdio.h ] || echo libc6-dev
	command -v curl-config >/dev/null || echo libcurl4-openssl-dev
	[ -x /usr/bin/python3 ] || echo python3
	if [ -z "$PG_CONFIG" ] && [ -z "$(newest_postgres)" ]; then
		echo postgresql
	fi
}

# "postgresql" stands for whatever version the suite has
name_postgres()
{
	local version

	version=$(apt-cache show --no-all-versions postgresql 2>/dev/null |
		sed -n 's/^Version: \([0-9]*\).*/\1/p')
	[ -n "$version" ] || die "no package \"postgresql\" to install; PG_CONFIG names another PostgreSQL"
	echo "postgresql-$version postgresql-server-dev-$version"
}

# Runs a command as root, its output kept for when it fails
as_root()
{
	local log rc=0

	log=$(mktemp)
	if [ "$(id -u)" = 0 ]; then
		"$@" >"$log" 2>&1 </dev/null || rc=$?
	else
		# shellcheck disable=SC2024
		sudo env PATH="$PATH" "$@" >"$log" 2>&1 || rc=$?
	fi
	if [ "$rc" != 0 ]; then
		tail -n 30 "$log" >&2
	fi
	rm -f "$log"
	return "$rc"
}

# Installs the packages named, "postgresql" included, without a system cluster
install_packages()
{
	local packages=" $* " postgres rc=0

	as_root apt-get -q update ||
		echo "apt-get update failed; trying with the lists that are there" >&2
	if [ "${packages/ postgresql /}" != "$packages" ]; then
		postgres=$(name_postgres) || return 1
		packages=${packages/ postgresql / $postgres }
	fi

	# postgresql-common would otherwise start a cluster that stays
	as_root mkdir -p "${NO_CLUSTER%/*}" || return 1
	as_root sh -c "echo 'create_main_cluster = false' >'$NO_CLUSTER'" || return 1
	# shellcheck disable=SC2086
	as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -y \
		-o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 \
		install --no-install-recommends $packages || rc=$?
	as_root rm -f "$NO_CLUSTER"
	return "$rc"
}

# Installs what every use needs and is missing, and the packages named, which
# the caller found missing.  Sets PG_CONFIG and PG_VERSION.
need_packages()
{
	local missing

	missing=$(missing_packages; printf '%s\n' "$@")
	missing=$(echo "$missing" | tr -s '\n' ' ' | sed 's/^ //; s/ $//')
	if [ -n "$missing" ]; then
		"$SAY" "Installing what is missing: $missing"
		# shellcheck disable=SC2086
		install_packages $missing || die "packages could not be installed: $missing"
	fi
	[ -n "$PG_CONFIG" ] || PG_CONFIG=$(newest_postgres)
	[ -x "$PG_CONFIG" ] || PG_CONFIG=$(command -v "${PG_CONFIG:-pg_config}") ||
		die "no PostgreSQL with its server's headers found; PG_CONFIG names one"
	PG_VERSION=$("$PG_CONFIG" --version | sed 's/^PostgreSQL \([^ ]*\).*/\1/')
}

# ------------------------------------------------------ working directory

# Makes WORK and AS_USER.  Needs PostgreSQL's packages: they bring the user.
start_work()
{
	local user=postgres base=${TMPDIR:-/tmp}

	# names of sockets below it must not exceed 107 bytes
	[ "${#base}" -le 40 ] || base=/tmp
	WORK=$(mktemp -d "$base/userpilot.XXXXXX") || die "no temporary directory"
	AS_USER=(env -i "PATH=$PATH" "HOME=$WORK" "TMPDIR=$WORK/tmp" "PWD=$WORK"
		LANG=C.UTF-8 LC_ALL=C.UTF-8 "TERM=${TERM:-dumb}"
		PYTHONDONTWRITEBYTECODE=1)
	[ -z "${PG_TEST_TIMEOUT_DEFAULT:-}" ] ||
		AS_USER+=("PG_TEST_TIMEOUT_DEFAULT=$PG_TEST_TIMEOUT_DEFAULT")
	[ -z "${ROUNDS:-}" ] || AS_USER+=("ROUNDS=$ROUNDS")
	if [ "$(id -u)" = 0 ]; then
		id -u "$user" >/dev/null 2>&1 || user=nobody
		chown "$user:" "$WORK"
		AS_USER=(setpriv --reuid "$user" --regid "$(id -g "$user")"
			--init-groups --no-new-privs -- "${AS_USER[@]}")
	fi
	cd "$WORK" || die "cannot enter $WORK"
	"${AS_USER[@]}" mkdir "$WORK/tmp" "$WORK/tree"
}

# Stops every PostgreSQL below WORK
stop_servers()
{
	local pidfile

	find "$WORK" -name postmaster.pid 2>/dev/null | while read -r pidfile; do
		"${AS_USER[@]}" "$PG_BIN/pg_ctl" -D "${pidfile%/*}" -m "$1" -t 20 -s stop \
			</dev/null >/dev/null 2>&1
	done
}

# Leaves nothing behind; for an EXIT trap
end_work()
{
	[ -n "$WORK" ] || return
	if [ -n "$PG_BIN" ]; then
		stop_servers fast
		stop_servers immediate
	fi
	cd / || return
	rm -rf "$WORK"
	WORK=
}

# ------------------------------------------------------------------ build

# Copies the tree, without what was built in it, to WORK/tree
copy_tree()
{
	# 1: somebody edits a file meanwhile
	{
		tar -C "$TREE" --warning=no-file-changed \
			--exclude=./.git --exclude='*.o' --exclude='*.so' --exclude='*.bc' \
			--exclude=__pycache__ --exclude='./tmp_*' --exclude=./results \
			--exclude=./log --exclude='./output_iso*' --exclude='./regression.*' \
			--exclude=./test/unit/merge_histories \
			--exclude=./test/unit/delivery_cells -cf - . || [ "$?" = 1 ]
	} | "${AS_USER[@]}" tar -C "$WORK/tree" --no-same-owner -xf -
}

# Copies PostgreSQL, without an installed userpilot, to WORK/root, and makes
# PG_CONFIG and PG_BIN those of the copy
copy_postgres()
{
	local dir option

	for option in --bindir --pkglibdir --sharedir; do
		dir=$("$PG_CONFIG" "$option")
		"${AS_USER[@]}" mkdir -p "$WORK/root$dir" || return 1
		"${AS_USER[@]}" cp -R "$dir/." "$WORK/root$dir/" || return 1
	done
	rm -rf "$WORK/root$("$PG_CONFIG" --pkglibdir)"/{userpilot.so,bitcode/userpilot*} \
		"$WORK/root$("$PG_CONFIG" --sharedir)"/extension/userpilot*
	for option in --includedir --includedir-server; do
		dir=$("$PG_CONFIG" "$option")
		[ ! -e "$WORK/root$dir" ] || continue
		"${AS_USER[@]}" mkdir -p "$WORK/root${dir%/*}" || return 1
		"${AS_USER[@]}" ln -s "$dir" "$WORK/root$dir" || return 1
	done
	PG_BIN=$WORK/root$("$PG_CONFIG" --bindir)
	PG_CONFIG=$PG_BIN/pg_config
	dir=$("${AS_USER[@]}" "$PG_CONFIG" --pkglibdir)
	[ "${dir#"$WORK/"}" != "$dir" ] ||
		die "this PostgreSQL does not work from a copy: its library directory stays $dir"
}

# Unprivileged make in the copy of the tree
make_tree()
{
	"${AS_USER[@]}" make -s -C "$WORK/tree" PG_CONFIG="$PG_CONFIG" "$@" </dev/null
}
