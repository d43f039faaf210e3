# Many rows: what a look reads while an old snapshot keeps every dead row, and
# a backlog that many sessions commit in another order than they wrote it.  A
# round is 10,000 rows; ROUNDS=50 makes 500,000 of each.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../t", $FindBin::RealBin;

use IO::Handle;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time usleep);
use Userpilot;
use Reliability;

my $rounds = rounds(4);
my $rows   = 10_000;
my $looks  = 21;

set_up(
	'backlog',
	entities => 4000,
	conf     => "max_wal_size = 4GB\nshared_buffers = 256MB\nautovacuum = off");	# it counts as well

sub median
{
	my @sorted = sort { $a <=> $b } @_;

	return $sorted[ @sorted / 2 ];
}

# ------------------------------------------------------------------- sessions

# A session that runs what is printed to it; its output goes to a file
sub open_session
{
	my ($name) = @_;
	my $file    = $node->basedir . "/$name.out";
	my @command = ($node->installed_command('psql'), '-X', '-q', '-A', '-t', '-v', 'ON_ERROR_STOP=1',
		'-o', $file, '-d', $node->connstr('postgres') . " application_name=$name");

	open(my $session, '|-', @command) or die "psql: $!";
	$session->autoflush(1);
	return $session;
}

# Has it run statements, to the end
sub run_in
{
	my ($session, $name, $statements) = @_;
	my $mark = $node->basedir . "/$name.mark";

	unlink $mark;
	print $session "$statements\n\\! touch '$mark'\n";
	until_true("session $name has run them", sub { return -e $mark });
	return;
}

# SQL scripts, each in a session of its own, at the same time
sub start_sessions
{
	my @scripts = @_;
	my @pids;

	foreach my $i (0 .. $#scripts)
	{
		my $file = $node->basedir . "/script$i.sql";
		my $pid;

		unlink $file;
		append_to_file($file, $scripts[$i]);
		$pid = fork // die "fork: $!";
		if ($pid == 0)
		{
			open(STDOUT, '>', '/dev/null') or die $!;
			exec($node->installed_command('psql'), '-X', '-q', '-v', 'ON_ERROR_STOP=1', '-f', $file,
				'-d', $node->connstr('postgres'))
			  or die "psql: $!";
		}
		push @pids, $pid;
	}
	return @pids;
}

# Waits for them; returns how many failed
sub failed_sessions
{
	my $failed = 0;

	local $?;
	foreach my $pid (@_)
	{
		waitpid($pid, 0);
		$failed++ if $? != 0;
	}
	return $failed;
}

# -------------------------------------------------------------------- changes

# How long a change that is committed now takes to arrive
sub fresh_change
{
	my $began   = time;
	my $version = sql('UPDATE accounts SET version = version + 1 WHERE id = 50 RETURNING version');

	until_true('it arrives',
		sub { return $api->entity('companies', 50)->{metadata}{version} == $version; });
	return time - $began;
}

# ... when it must be the first that a new worker finds
sub first_change
{
	$node->poll_query_until('postgres', 'SELECT userpilot_worker_pid() IS NULL')
	  or die 'the worker does not leave';
	return fresh_change();
}

# --------------------------------------------------------- an old snapshot

# 100 companies, as the tables say: a transaction of the real-time lane
sub hundred
{
	my ($from) = @_;

	return "SELECT count(userpilot_identify_company(id, metadata)::text) FROM account_meta"
	  . " WHERE id BETWEEN $from AND $from + 99;";
}

# How many rows were ever queued and deleted; the counts of a session, and the
# worker's, arrive when it ends
sub queued  { return sql(q{SELECT n_tup_ins FROM pg_stat_user_tables WHERE relname = 'userpilot_queue'}); }
sub deleted { return sql(q{SELECT n_tup_del FROM pg_stat_user_tables WHERE relname = 'userpilot_queue'}); }

# Pages of the queue and its index that were touched
sub pages
{
	return sql(q{SELECT heap_blks_hit + heap_blks_read + idx_blks_hit + idx_blks_read
		FROM pg_statio_user_tables WHERE relname = 'userpilot_queue'});
}

# Waits for what came since without looking at what was there before, as
# userpilot_wait() would
my $wait_since = q{
	CREATE PROCEDURE wait_since(since xid8) LANGUAGE plpgsql AS $$
	BEGIN
		WHILE EXISTS (SELECT FROM userpilot_queue WHERE NOT bulk AND xid >= since) LOOP
			COMMIT;
			PERFORM pg_sleep(0.005);
		END LOOP;
	END $$};

# Pages touched while 100 rows are delivered so many times, all by one worker;
# undef if it was more than one
sub pages_for
{
	my ($name, $times) = @_;
	my $settled = sub {
		return sql('SELECT userpilot_worker_pid() IS NULL') eq 't' && deleted() == queued();
	};
	my ($began, $pages, $session, %workers);

	until_true('all counts have arrived', $settled);
	$began   = queued();
	$pages   = pages();
	$session = open_session($name);
	run_in($session, $name, join "\n", 'SET enable_seqscan = off;', (
			'BEGIN;', hundred(1001), 'SELECT pg_current_xact_id() AS xid \\gset', 'COMMIT;',
			q{CALL wait_since(:'xid');}, q{SELECT 'worker ' || userpilot_worker_pid();}) x $times);
	close($session) or die "psql: $?";
	until_true('they have arrived again',
		sub { return queued() == $began + 100 * $times && $settled->(); });
	%workers = map { $_ => 1 } slurp_file($node->basedir . "/$name.out") =~ /^worker ([0-9]+)$/mg;
	return keys %workers == 1 ? pages() - $pages : undef;
}

# Pages that 100 rows touch on their way: queued, found by a look, deleted;
# without what a worker reads when it comes and goes, which is everything
sub look_costs
{
	my ($name) = @_;

	foreach my $try (1 .. 5)
	{
		my $one  = pages_for($name, 1)          // next;
		my $many = pages_for($name, 1 + $looks) // next;
		my $pages = ($many - $one) / $looks;

		diag(sprintf('%s: %.0f pages for 100 rows', $name, $pages));
		return $pages;
	}
	die 'no worker stays';
}

# Rows that Userpilot has already pass through the queue; an old snapshot sees
# to it that not one of them can be removed from the table
sub old_snapshot
{
	my $session = open_session('holder');
	my $queued  = queued();
	my ($identified, $before, $after, @took, @first);

	sql($wait_since);
	run_in($session, 'holder', 'BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM accounts;');
	push @first, first_change();
	$identified = sent_since($api);
	foreach my $round (1 .. $rounds)
	{
		my $began = time;

		failed_sessions(start_sessions(join "\n", map { hundred(1 + 100 * ($_ % 10)) } 1 .. $rows / 100)) == 0
		  or die 'the rows were not queued';
		delivered($node, 'postgres');
		push @took, time - $began;
		$before = look_costs('first') if $round == 1;
	}

	$after = look_costs('last');
	until_true('all were queued', sub { return queued() >= $queued + $rounds * $rows; });
	is(sent_since($api, $identified), 0, 'what Userpilot has was not sent');
	push @first, first_change();
	cmp_ok($after, '<=', 1.2 * $before, 'looks touch no more pages');
	diag(sprintf('%d rows with an old snapshot: the first %d took %.2f s, the last %.2f s;'
				. ' the first change of a new worker %.2f s at first, %.2f s in the end',
			$rounds * $rows, $rows, @took[ 0, -1 ], @first));
	run_in($session, 'holder', 'COMMIT;');
	close($session) or die "psql: $?";
	return;
}

# ------------------------------------------------------------------ a backlog

# What a session does in a round: it commits a quarter of the round, of rows
# that no other session has at the time, and takes back about as much
sub changes
{
	my ($session, $round) = @_;
	my $from = 1001 + 750 * (($session + $round) % 4);
	my $up   = sub {
		my ($table, $skip, $n) = @_;

		return "UPDATE $table SET version = version + 1 WHERE id BETWEEN $from + $skip AND $from + $skip + $n - 1;\n";
	};
	my $sql = 'BEGIN;' . $up->('accounts', 0, 700) . 'SAVEPOINT a;' . $up->('people', 0, 300) . 'SAVEPOINT b;'
	  . $up->('accounts', 0, 750) . $up->('people', 0, 750) . 'ROLLBACK TO b;' . $up->('people', 50, 700)
	  . 'RELEASE a; SAVEPOINT c;' . $up->('people', 0, 100) . 'ROLLBACK TO c;' . $up->('accounts', 200, 550);

	return $sql . "COMMIT;\nBEGIN;" . $up->('accounts', 0, 500) . "ROLLBACK;\n"
	  . 'BEGIN;' . $up->('accounts', 50, 250) . "COMMIT;\n";
}

# ... and one that reads what the others have not committed yet
sub reader
{
	return "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM accounts; SELECT pg_sleep(0.3);\n"
	  . "SELECT userpilot_bulk_identify_companies(id, metadata) FROM account_meta WHERE id <= 300;\n"
	  . "SELECT userpilot_bulk_identify_users(id, metadata, company_id) FROM person_meta WHERE id <= 300;\n"
	  . "COMMIT;\n";
}

# Prepared transactions wait for three rounds, or for the end, and are then
# decided, the younger first; one in three never happens
my @prepared;

sub prepare_one
{
	my ($round) = @_;
	my $from = 101 + 150 * ($round % 6);

	sql("BEGIN; UPDATE accounts SET version = version + 1 WHERE id BETWEEN $from AND $from + 149;"
		  . " SAVEPOINT s; UPDATE people SET version = version + 1 WHERE id BETWEEN $from AND $from + 49;"
		  . ($round % 2 ? ' ROLLBACK TO s;' : '')
		  . " PREPARE TRANSACTION 'round $round'");
	push @prepared, $round;
	return;
}

sub decide_prepared
{
	while (my $round = pop @prepared)
	{
		sql(($round % 3 ? 'COMMIT' : 'ROLLBACK') . " PREPARED 'round $round'");
	}
	return;
}

# A transaction that stays open, with changes in both lanes
sub long_transaction
{
	my $session = open_session('long');

	run_in($session, 'long', 'BEGIN; UPDATE accounts SET version = version + 1 WHERE id BETWEEN 1 AND 40;'
		  . ' UPDATE people SET version = version + 1 WHERE id BETWEEN 1 AND 90;');
	return $session;
}

# What has been committed, as one number that only rises
sub committed
{
	return sql('SELECT (SELECT sum(version) FROM accounts) + (SELECT sum(version) FROM people)');
}

# The bulk lane stands still while all of it is queued
sub backlog
{
	my $committed = committed();
	my $long      = long_transaction();
	my $failed    = 0;
	my ($began, $took, @fresh);

	$api->foreign_job(1_000_000_000);
	foreach my $round (1 .. $rounds)
	{
		my @pids = start_sessions((map { changes($_, $round) } 0 .. 3), reader());

		prepare_one($round);
		push @fresh, fresh_change();
		$failed += failed_sessions(@pids);
		if ($round == int($rounds / 2))
		{
			$node->stop('immediate');
			{ local $?; close $long; }
			$node->start;
			$long = long_transaction();
		}
		decide_prepared() if $round % 3 == 0;
	}
	is($failed, 0, 'every session committed');
	$committed = committed() - $committed;
	cmp_ok($committed, '>=', $rounds * $rows, 'as many changes were queued as was asked for');
	cmp_ok(sql('SELECT count(*) FROM userpilot_queue'), '>=', 0.8 * $committed, '... and nearly all wait');
	push @fresh, fresh_change() foreach 1 .. 5;
	run_in($long, 'long', 'COMMIT;');
	close($long) or die "psql: $?";
	$began = time;
	$api->finish_jobs;
	decide_prepared();
	ended_well("$committed changes");
	$took = time - $began;
	is(stale(), 0, '... no version ever went down at Userpilot');
	cmp_ok((sort { $a <=> $b } @fresh)[-1], '<=', 5, '... and no change waited for others to commit, or for the backlog');
	diag(sprintf('%d changes queued, delivered in %.1f s; beside them and an open transaction a change arrived'
				. ' within %.2f s (median), %.2f s (most)',
			$committed, $took, median(@fresh), (sort { $a <=> $b } @fresh)[-1]));
	return;
}

old_snapshot();
backlog();
unlike(slurp_file($node->logfile), qr/PANIC|signal 11|signal 6|TRAP/, 'nothing crashed');
$node->stop;
done_testing();
