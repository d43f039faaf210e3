# The worker is killed (SIGKILL) again and again, at named points of its code
# and at random moments, while four writers go on.  A debugger stops it at the
# point, so that it dies exactly there: gdb must be installed, and allowed to
# attach to processes of the same user.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../t", $FindBin::RealBin;

use IO::Handle;
use IO::Select;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time usleep);
use Userpilot;
use Reliability;
use Writers;

# A point that does not come within so many seconds is tried again later, so
# often
my $REACH = 6;
my $TRIES = 4;

# Where it dies: breakpoints to be met one after the other; and what it takes
# to get there (fault: how Userpilot treats the next job; format: of the job;
# quiet: nobody writes; starting: a worker that has just been started)
my $marked  = 'profiles_write if step == PROFILE_MARKED && n > 0';
my $learned = 'profiles_write if step == PROFILE_LEARNED && n > 0';
my $done    = 'bulk_done_finish if sender->bulk.done->job.id != 0';
my %short   = (fault => { job => 'short', rows => 3 });
my %refused = (fault => { status => 409 });
my %halved  = (fault => { status => 413 });
my %lost    = (fault => { drop => 'after' }, format => 'ndjson');
my @points  = (
	[ 'wave: before anything is read'           => ['realtime_wave'] ],
	[ 'wave: before the mark is written'        => [$marked] ],
	[ 'wave: the mark is written'               => ['ledger_calls'] ],
	[ 'wave: before the mark commits'           => [ 'ledger_calls', 'step_end' ] ],
	[ 'wave: after the mark, before calls'      => [ 'ledger_calls', 'realtime_start' ] ],
	[ 'call: before it starts'                  => ['api_identify'] ],
	[ 'call: before it leaves'                  => [ 'api_identify', 'http_wait' ] ],
	[ 'call: under way'                         => [ 'api_identify', 'http_wait', 'http_wait' ] ],
	[ 'answer: arrived, not yet read'           => [ 'api_identify', 'end_transfer' ] ],
	[ 'answer: in its transaction'              => ['realtime_answered'] ],
	[ 'answer: before it is learnt'             => ['merge_learn'] ],
	[ 'answer: before the profile is written'   => [$learned] ],
	[ 'answer: before its rows are deleted'     => [ $learned, 'queue_delete' ] ],
	[ 'answer: before learning commits'         => [ $learned, 'step_end' ] ],
	[ 'answer: learnt'                          => [ $learned, 'http_result_free' ] ],
	[ 'job: before the slot is asked for'       => ['api_jobs'] ],
	[ 'sweep: before it begins'                 => ['bulk_prepare'] ],
	[ 'sweep: in its pass'                      => [ 'bulk_prepare', 'plan_row', 'plan_row' ] ],
	[ 'sweep: in a unit'                        => [ 'bulk_prepare', 'sweep_row', 'sweep_row' ] ],
	[ 'sweep: before profiles are read'         => [ 'bulk_prepare', 'profiles_read' ] ],
	[ 'sweep: before the job has a row'         => ['jobs_insert'] ],
	[ 'sweep: before its records are written'   => ['jobs_add_chunk'] ],
	[ 'sweep: before the mark is written'       => [ 'jobs_insert', $marked ] ],
	[ 'sweep: before the job commits'           => [ 'jobs_written', 'step_end' ] ],
	[ 'job: prepared'                           => ['jobs_count_attempt'] ],
	[ 'job: before its attempt commits'         => [ 'jobs_count_attempt', 'step_end' ] ],
	[ 'job: before the POST'                    => ['api_submit'] ],
	[ 'job: the POST under way'                 => [ 'api_submit', 'http_wait', 'http_wait' ] ],
	[ 'job: the answer not yet read'            => [ 'api_submit', 'end_transfer' ] ],
	[ 'job: accepted, before that is written'   => [ 'api_submit', 'jobs_update' ] ],
	[ 'job: accepted, before that commits'      => [ 'api_submit', 'jobs_update', 'step_end' ] ],
	[ 'job: polled'                             => ['bulk_answered if sender->bulk.state == BULK_RUNNING'] ],
	[ 'job: completed'                          => ['bulk_completed'] ],
	[ 'job: before its completion commits'      => [ 'bulk_set_done', 'step_end' ] ],
	[ 'job: completed, not yet learnt'          => [ 'bulk_set_done', 'bulk_step' ] ],
	[ 'job: being learnt'                       => ['profiles_learn_records'] ],
	[ 'job: before learning commits'            => [ 'profiles_learn_records', 'step_end' ] ],
	[ 'job: before its rows are deleted'        => [ $done, 'queue_delete' ] ],
	[ 'job: forgotten, before that commits'     => [ $done, 'jobs_drop_chunks', 'step_end' ] ],
	[ 'next job: before it commits'             => [ 'bulk_prepare if ahead', 'jobs_written', 'step_end' ], %halved ],
	[ 'next job: prepared'                      => [ 'bulk_prepare if ahead', 'jobs_written', 'bulk_answered' ], %halved ],
	[ 'next job: its turn'                      => [ 'bulk_prepare if ahead', 'jobs_written', 'jobs_count_attempt' ], %halved ],
	[ 'short job: before it is dissolved'       => ['bulk_dissolved'], %short ],
	[ 'short job: before its marks are released' => [ 'bulk_dissolved', 'profiles_release_job' ], %short ],
	[ 'short job: before that commits'          => [ 'bulk_dissolved', 'step_end' ], %short ],
	[ 'short job: handed to the other lane'     => ['realtime_add_solo'], %short ],
	[ 'refused job: before its release'         => ['bulk_refused'], %refused ],
	[ 'refused job: before its marks are released' => [ 'bulk_refused', 'profiles_release_job' ], %refused ],
	[ 'refused job: before that commits'        => [ 'bulk_refused', 'step_end' ], %refused ],
	[ 'failed job: before it is submitted again' => ['bulk_failed'], fault => { job => 'fail_half' } ],
	[ 'lost answer: before that is written'     => ['bulk_unknown'], %lost ],
	[ 'lost answer: before the job is adopted'  => ['adopt'], %lost ],
	[ 'lost upload: before it is known lost'    => ['bulk_never_arrived'], fault => { drop => 'before' } ],
	[ 'leaving: in the last look'               => [ 'anything_left', 'queue_has_rows' ], quiet => 1 ],
	[ 'leaving: before it says so'              => ['state_worker_leave'], quiet => 1 ],
	[ 'leaving: after it said so'               => [ 'state_worker_leave', 'proc_exit' ], quiet => 1 ],
	[ 'start: before it is counted'             => ['ledger_start'], starting => 1 ],
	[ 'start: before jobs are recovered'        => ['bulk_recover'], starting => 1 ],
	[ 'start: recovering a job'                 => ['jobs_entity_ids'], starting => 1 ],
	[ 'start: before calls are counted'         => ['ledger_recent_calls'], starting => 1 ],
	[ 'start: before the first look'            => ['queue_look'], starting => 1 ],
	[ 'start: after the first look'             => [ 'queue_look', 'step_end' ], starting => 1 ]);

my (%killed, %missed, @pauses, $died_at);

# Calls of any sort that arrived so far
sub calls
{
	my $calls = $api->counters->{calls};
	my $sum   = 0;

	$sum += $_ foreach values %$calls;
	return $sum;
}

# What psql says, or nothing while the server restarts
sub ask
{
	my ($query) = @_;
	my ($rc, $out) = $node->psql('postgres', $query);

	return $rc == 0 ? $out : '';
}

sub worker
{
	return until_true('a worker', sub { return ask('SELECT userpilot_worker_pid()'); });
}

# ---------------------------------------------------------------- the debugger

# What gdb does: it stops at each breakpoint in turn, and kills.  An error, as
# when the process is gone, ends the script.
sub gdb_script
{
	my ($pid, $breakpoints) = @_;
	my $file   = $node->basedir . '/gdb';
	my $script = "set pagination off\nset confirm off\nattach $pid\nsharedlibrary userpilot\n"
	  . "handle all nostop noprint pass\n";
	my $first = 1;

	foreach my $breakpoint (@$breakpoints)
	{
		$script .= "tbreak $breakpoint\n";
		$script .= "echo attached\\n\n" if $first;
		$script .= "continue\n";
		$first = 0;
	}
	unlink $file;
	append_to_file($file, $script . "kill\necho killed\\n\n");
	return $file;
}

# Starts it; returns its output, unbuffered, and process
sub start_gdb
{
	my ($pid, $breakpoints) = @_;
	my @command = ('gdb', '-nx', '-q', '-batch', '-iex', 'set auto-solib-add off',
		'-iex', 'set debuginfod enabled off', '-x', gdb_script($pid, $breakpoints));
	my $gdb = open(my $out, '-|');

	die "fork: $!" unless defined $gdb;
	return ($out, $gdb) if $gdb;
	open(STDERR, '>&', \*STDOUT) or die $!;
	open(STDIN, '<', '/dev/null') or die $!;
	exec(@command) or die "gdb: $!";
}

# Reads its output until that matches; undef if it ends or time does
sub read_until
{
	my ($out, $said, $pattern, $until) = @_;
	my $select = IO::Select->new($out);

	while ($$said !~ $pattern)
	{
		my $left = $until - time;

		return if $left <= 0 || !$select->can_read($left);
		return if !sysread($out, $$said, 4096, length $$said);
	}
	return 1;
}

# Kills a worker at these breakpoints; "attached" is called when it would stop
# there.  Returns whether it came there, undef if the worker was gone before.
sub kill_at
{
	my ($pid, $breakpoints, $attached) = @_;
	my ($out, $gdb) = start_gdb($pid, $breakpoints);
	my $said = '';
	my $came;

	if (read_until($out, \$said, qr/attached\n/, time + 60))
	{
		$attached->();
		$came    = read_until($out, \$said, qr/killed\n/, time + $REACH) ? 1 : 0;
		$died_at = time;
		if (!$came && $said !~ /exited/)
		{
			kill 'KILL', $pid;
			$died_at = time;
			read_until($out, \$said, qr/never said/, time + 60);
		}
	}
	{ local $?; close $out; }

	# what it cannot do must not pass for a worker that was gone
	die "gdb: $said" if $said =~ /not permitted|not defined|No symbol|cannot execute/;
	return if !$came && $said =~ /exited|No such process/;
	die "gdb: $said" unless defined $came;
	return $came;
}

# ------------------------------------------------------------------- the kills

my ($starting_session, $format);

# A session whose lock a worker meets in its first transaction
sub hold_workers
{
	my @command = ($node->installed_command('psql'), '-X', '-q', '-o', '/dev/null',
		'-d', $node->connstr('postgres'));

	open($starting_session, '|-', @command) or die "psql: $!";
	$starting_session->autoflush(1);
	print $starting_session "BEGIN; LOCK TABLE userpilot_profiles IN SHARE MODE;\n";
	until_true(
		'workers are held up',
		sub {
			return ask(q{SELECT EXISTS (SELECT FROM pg_locks WHERE granted
				AND relation = 'userpilot_profiles'::regclass AND mode = 'ShareLock')}) eq 't';
		});
	return;
}

# Ends the worker that is there; returns the pid of the next, which waits
sub next_worker
{
	my $old = worker();

	ask("SELECT pg_terminate_backend($old)");
	return until_true(
		'the next worker waits',
		sub {
			return ask(qq{SELECT l.pid FROM pg_locks l JOIN pg_stat_activity a USING (pid)
				WHERE l.relation = 'userpilot_profiles'::regclass AND NOT l.granted
				AND a.backend_type = 'userpilot worker' AND l.pid <> $old});
		});
}

sub release_workers
{
	return unless $starting_session;
	print $starting_session "COMMIT;\n";
	{ local $?; close $starting_session; }
	undef $starting_session;
	return;
}

# What comes once the debugger is there to see it
sub let_go
{
	my ($point) = @_;
	my (undef, undef, %how) = @$point;

	$api->fault($how{fault}, match => { path => '/bulk_identify$' }) if $how{fault};
	release_workers();
	return;
}

# Brings about what a point needs; returns the worker to be killed
sub prepare
{
	my ($point) = @_;
	my (undef, undef, %how) = @$point;
	my $wanted = $how{format} // (rand() < 0.5 ? 'ndjson' : 'json');

	if ($wanted ne $format)
	{
		sql("ALTER SERVER userpilot OPTIONS (SET bulk_format '$wanted')");
		$format = $wanted;
	}
	if ($how{quiet})
	{
		# and one more change, so that there is a worker that will leave
		stop_writers();
		delivered($node, 'postgres');
		sql('UPDATE accounts SET version = version + 1 WHERE id = 1');
	}
	if ($how{starting})
	{
		hold_workers();
		return next_worker();
	}
	return worker();
}

# A worker dies at this point, or at random if it does not get there; how long
# it takes until the next call
sub kill_worker
{
	my ($point) = @_;
	my ($name, $breakpoints, %how) = @$point;
	my ($came, $calls);

	foreach my $try (1 .. 10)
	{
		my $pid = prepare($point);

		if (@$breakpoints)
		{
			$came = kill_at($pid, $breakpoints, sub { let_go($point); });
			release_workers();
		}
		else
		{
			usleep(rand 700_000);
			$came    = kill 'KILL', $pid;
			$died_at = time;
		}
		last if defined $came;
	}
	die "$name: workers are always gone" unless defined $came;
	($came ? $killed{$name} : $missed{$name})++;

	# what it had sent before may still be on its way to be counted
	usleep(20_000);
	$api->no_faults;
	$calls = calls();
	start_writers(4) if $how{quiet};
	until_true('a call arrives', sub { return calls() > $calls; });
	push @pauses, time - $died_at;
	return $came;
}

# Every point once, one kill in four at random, until there were enough
sub kill_all
{
	my ($rounds) = @_;
	my $done = 0;
	my @next;

	while ($done < $rounds)
	{
		my $point;

		@next = @points if !@next;
		$point = $done % 4 == 3 ? [ 'at random' => [] ] : shift @next;
		$done++;
		next if kill_worker($point);
		push @next, $point if $missed{ $point->[0] } < $TRIES;
	}
	return;
}

die 'kills.pl needs gdb: install the package of that name'
  if system('gdb --version > /dev/null 2>&1') != 0;

set_up('kills', options => ", bulk_format 'json'", once => 1);

# a job is to be still under way when the next worker comes
$api->configure(records_per_minute => 600);
$format = 'json';
start_writers(4);
my $rounds = rounds(int(@points * 4 / 3) + 1);

kill_all($rounds);
stop_writers();
ended_well("$rounds kills of the worker");
is(stale(), 0, '... no version ever went down at Userpilot');
is(join(', ', grep { !$killed{$_} } sort keys %missed), '', '... every point was reached that was tried');

@pauses = sort { $a <=> $b } @pauses;
cmp_ok($pauses[-1], '<=', 5, '... at work again within 5 s, the restart of the server included');
diag(sprintf('%d kills, %d transactions or more, %d calls; first call after a kill: median %.2f s, most %.2f s',
		$rounds, written(), calls(), $pauses[ @pauses / 2 ], $pauses[-1]));
diag("$_: $killed{$_}") foreach sort keys %killed;
diag("not reached within $REACH s, killed where it was: $_: $missed{$_}") foreach sort keys %missed;
unlike(slurp_file($node->logfile), qr/PANIC|signal 11|signal 6|signal 5|TRAP/, '... nothing else crashed');
$node->stop;
done_testing();
