# A primary with a synchronous standby is lost while things are under way, and
# the standby promoted: it goes on by itself, nothing is lost, and Userpilot
# never has what the new primary does not hold.  Half of the writers do not
# wait for the standby, and what they commit last never gets there.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../t", $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time usleep);
use Userpilot;
use Reliability;
use Writers;

my $rounds = rounds(4);
my ($above, $lost, $silent, $written, $calls_by_standbys) = (0, 0, 0, 0, 0);
my @pauses;

# What the database asks of commits, by round; the worker's marks must reach
# the standby all the same
my @levels = ('on', 'remote_apply', 'local', 'off');

set_up('primary0', once => 1, init => [ allows_streaming => 1 ]);

# a job is to be still under way when the standby takes over
$api->configure(records_per_minute => 600);

sub calls
{
	my $calls = $api->counters->{calls};
	my $sum   = 0;

	$sum += $_ foreach values %$calls;
	return $sum;
}

# A standby that every commit waits for, if it waits at all.  Promoted, it is
# not to wait for another itself.
sub add_standby
{
	my ($round) = @_;
	my $standby = PostgreSQL::Test::Cluster->new("primary$round");

	$node->backup("backup$round");
	$standby->init_from_backup($node, "backup$round", has_streaming => 1);
	$standby->append_conf('postgresql.conf', "synchronous_standby_names = ''");
	$standby->start;
	$node->append_conf('postgresql.conf', "synchronous_standby_names = '*'");
	$node->reload;
	$node->poll_query_until('postgres',
		q{SELECT count(*) = 1 FROM pg_stat_replication WHERE sync_state = 'sync'})
	  or die 'the standby is not synchronous';
	return $standby;
}

# Nothing of ours runs on a standby
sub note_processes
{
	my ($standby) = @_;

	$silent++
	  if $standby->safe_psql('postgres',
		q{SELECT pg_is_in_recovery() AND NOT EXISTS (SELECT FROM pg_stat_activity
			WHERE backend_type LIKE 'userpilot%')}) eq 't';
	return;
}

# The process that sends to the standby
sub wal_sender { return sql('SELECT pid FROM pg_stat_replication'); }

# The worker, if it waits for the standby
sub waiting_worker
{
	return sql(q{SELECT pid FROM pg_stat_activity WHERE backend_type = 'userpilot worker'
		AND wait_event = 'SyncRep'});
}

# Holds for a while: there is no event that says that nothing will come
sub nothing_arrives
{
	my ($name, $before) = @_;

	foreach my $look (1 .. 20)
	{
		last if calls() != $before;
		usleep(20_000);
	}
	return is(calls() - $before, 0, $name);
}

# The standby does not answer: a change that did not wait for it does not leave
# before it is there, whatever is done to the worker
sub held_back
{
	my ($level) = @_;
	my ($sender, $calls, $pid);

	delivered($node, 'postgres');
	sql("ALTER DATABASE postgres SET synchronous_commit = $level");
	$node->poll_query_until('postgres', 'SELECT userpilot_worker_pid() IS NULL')
	  or die 'the worker does not leave';
	$sender = wal_sender();
	kill 'STOP', $sender or die "no process sends to the standby";
	$calls = calls();
	sql('SET synchronous_commit = local; UPDATE accounts SET version = version + 1 WHERE id = 1');
	ok(eval { $pid = until_true('the mark waits', \&waiting_worker, 10) },
		"$level: the worker waits for the standby");
	nothing_arrives("$level: nothing leaves before the standby has it", $calls);
	if ($pid)
	{
		# its first commit counts its start, the mark's comes after that
		foreach my $time ('once', 'twice', 'once more')
		{
			sql("SELECT pg_cancel_backend($pid)");
			nothing_arrives("$level: nor when the worker is told $time to cancel that", $calls);
		}
		sql("SELECT pg_terminate_backend($pid)");
		eval {
			until_true('the next waits',
				sub { my $next = waiting_worker(); return $next && $next != $pid; }, 10);
		};
		nothing_arrives("$level: nor when it is told to go", $calls);
	}
	kill 'CONT', $sender;
	until_true('it leaves', sub { return calls() > $calls });
	delivered($node, 'postgres');
	return;
}

# What has been committed, as one number that only rises
sub committed
{
	return sql('SELECT (SELECT sum(version) FROM accounts) + (SELECT sum(version) FROM people)');
}

# The primary is lost; "cut": some time after nothing reached the standby any
# more
sub lose_primary
{
	my ($standby, $cut) = @_;
	my $sender = wal_sender();
	my $committed;

	note_processes($standby);
	usleep(rand 500_000) if !$cut;

	# so that there is something to go on with
	sql('SET synchronous_commit = on; INSERT INTO once (value) SELECT 1 FROM generate_series(1, 500)');
	kill 'STOP', $sender if $cut;
	usleep(rand 500_000) if $cut;
	$committed = committed();
	kill 'KILL', $sender if $cut;
	$node->stop('immediate', fail_ok => 1);
	stop_writers();
	$written += written();
	$node = $standby;
	$node->poll_query_until('postgres', q{SELECT NOT EXISTS (SELECT FROM pg_stat_wal_receiver)
		AND wait_event IN ('RecoveryWalStream', 'RecoveryRetrieveRetryInterval')
		FROM pg_stat_activity WHERE backend_type = 'startup'})
	  or die 'the standby does not come to the end of what it has';
	until_true('the lost primary is gone', sub { return $api->counters->{connections}{open} == 0 });
	$lost++ if committed() < $committed;
	return;
}

# Promotes it; it gets no change, and nobody tells it anything
sub promote
{
	my ($finish) = @_;
	my $calls    = calls();
	my $began;

	# a job accepted before goes on at Userpilot, with what was in it
	$api->finish_jobs if $finish;
	$above += above_tables({ map { $_ => $api->get("/_/state?kind=$_") } 'companies', 'users' });
	note_processes($node);
	$calls_by_standbys += calls() - $calls;
	$began = time;
	$node->promote;
	until_true('it goes on', sub { return calls() > $calls; });
	push @pauses, time - $began;
	return;
}

foreach my $round (1 .. $rounds)
{
	my $level   = $levels[ ($round - 1) % @levels ];
	my $standby = add_standby($round);
	my $old     = $node;

	held_back($level);
	start_writers(4, '-c synchronous_commit=local');
	usleep(1_000_000 + rand 1_500_000);
	lose_primary($standby, $round % 3);
	promote($round % 2);
	ended_well("promotion $round, synchronous_commit = $level");
	$old->clean_node;
}
is($above, 0, 'nothing was sent that the new primary does not hold');
is($silent, 2 * $rounds, 'no process of ours ran on a standby');
is($calls_by_standbys, 0, '... and none sent anything');
cmp_ok($lost, '>', 0, 'commits that did not wait for the standby were lost');
is(stale(), 0, 'no version ever went down at Userpilot');

@pauses = sort { $a <=> $b } @pauses;
diag(sprintf('%d promotions, commits lost in %d; %d transactions or more, %d calls;'
			. ' first call after a promotion: median %.2f s, most %.2f s',
		$rounds, $lost, $written, calls(), $pauses[ @pauses / 2 ], $pauses[-1]));
unlike(slurp_file($node->logfile), qr/PANIC|signal 11|signal 6|TRAP/, '... nothing else crashed');
$node->stop;
done_testing();
