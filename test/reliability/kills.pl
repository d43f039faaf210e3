# The worker is killed (SIGKILL) again and again, at random moments and right
# after steps that can be observed from outside, while four writers go on.

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

set_up('kills');

# Moments worth dying at: a query that is true then; undef is a random moment
my %moments = (
	'any time'               => undef,
	'a call arrived'         => undef,
	'keys are marked'        => 'SELECT EXISTS (SELECT FROM userpilot_profiles WHERE attempts > 0)',
	'a job is prepared'      => q{SELECT EXISTS (SELECT FROM userpilot_jobs WHERE status = 'prepared')},
	'a job is submitted'     => 'SELECT EXISTS (SELECT FROM userpilot_jobs WHERE submitted_at IS NOT NULL'
	  . ' AND finished_at IS NULL)',
	'a job is processed'     => q{SELECT EXISTS (SELECT FROM userpilot_jobs WHERE status = 'processing')},
	'a job is completed'     => q{SELECT EXISTS (SELECT FROM userpilot_jobs WHERE status = 'completed'
		AND finished_at > clock_timestamp() - interval '0.3 s')});
my @names = sort keys %moments;
my (%killed, @pauses);

# Calls of any sort that arrived so far
sub calls
{
	my $calls = $api->counters->{calls};
	my $sum   = 0;

	$sum += $_ foreach values %$calls;
	return $sum;
}

# Waits for a call more than these
sub next_call
{
	my ($before) = @_;

	return until_true('a call arrives', sub { return calls() > $before; });
}

# What psql says, or nothing while the server restarts
sub ask
{
	my ($query) = @_;
	my ($rc, $out) = $node->psql('postgres', $query);

	return $rc == 0 ? $out : '';
}

# Waits for the moment, at most a few seconds: it may not come
sub wait_for
{
	my ($name) = @_;

	usleep(rand 700_000);
	return next_call(calls()) if $name eq 'a call arrived';
	return eval { until_true($name, sub { return ask($moments{$name}) eq 't'; }, 5) }
	  if $moments{$name};
	return 1;
}

# Kills the worker and waits for the server to have restarted itself
sub kill_worker
{
	my ($name) = @_;
	my $came   = wait_for($name);
	my $pid    = until_true('a worker', sub { return ask('SELECT userpilot_worker_pid()'); });
	my ($began, $calls);

	$killed{ $came ? $name : "$name (did not come)" }++;
	$began = time;
	kill 'KILL', $pid;

	# what it had sent before may still be on its way to be counted
	usleep(20_000);
	$calls = calls();
	next_call($calls);
	push @pauses, time - $began;
	return;
}

start_writers(4);
my $rounds = rounds(14);

foreach my $round (1 .. $rounds)
{
	kill_worker($names[ $round % @names ]);
}
stop_writers();
ended_well("$rounds kills of the worker");
is(stale(), 0, '... no version ever went down at Userpilot');

@pauses = sort { $a <=> $b } @pauses;
diag(sprintf('%d kills, %d transactions or more, %d calls; first call after a kill: median %.2f s, most %.2f s',
		$rounds, written(), calls(), $pauses[ @pauses / 2 ], $pauses[-1]));
diag("$_: $killed{$_}") foreach sort keys %killed;
unlike(slurp_file($node->logfile), qr/PANIC|signal 11|signal 6|TRAP/, '... nothing else crashed');
$node->stop;
done_testing();
