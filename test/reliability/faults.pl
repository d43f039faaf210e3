# Every way an HTTP exchange can go wrong, in every phase of it, with every sort
# of call, for companies and for users: connect, TLS, request, headers, body,
# after it.  It is the protocol itself that is broken here; t/003_faults.pl and
# t/006_jobs.pl do the same with statuses, silence and garbled answers.  After every cell Userpilot has what
# the tables say and nothing died; in the end no redirect was followed, no
# process has crashed and the worker's memory has stayed bounded.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../t";

use POSIX ();
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time usleep);
use Userpilot;
use Userpilot::Deaf;
use Userpilot::Faults;

plan skip_all => 'needs /proc' unless -r '/proc/self/smaps_rollup';

# What a worker may have for itself, in MB.  Answers below have up to 100.
my $bound = 24;

set_up('protocol', 2);
my $trap = Userpilot::StandIn->new;

my $list = '^/v1/background_jobs$';
my $poll = '^/v1/background_jobs/';

# Call: path, lane, format of jobs, and the call before it
sub calls
{
	return (
		'identify'      => [ identify_path(), 'realtime', 'json' ],
		'json job'      => [ bulk_path(), 'bulk', 'json',   $list ],
		'ndjson job'    => [ bulk_path(), 'bulk', 'ndjson', $list ],
		'list of jobs'  => [ $list, 'bulk', 'json' ],
		'poll of a job' => [ $poll, 'bulk', 'ndjson', bulk_path() ]);
}

# What a fault is taken for: outcomes of identify, a submission, a question.
# Versions of libcurl differ on what else can be read.
my $open  = qr/outage|back-off/;
my $fine  = qr/^acknowledged$/;
my %taken = (
	unreached => [ qr/outage/, qr/outage/,  qr/outage/ ],
	lost      => [ $open,      qr/unknown/, $open ],
	fine      => [ $fine,      $fine,       $fine ],
	garbled   => [ $fine,      qr/unknown/, qr/back-off/ ],
	redirect  => [ $open,      qr/outage/,  qr/back-off/ ],
	unclear   => [ qr/^acknowledged$|$open/, qr/unknown/, $open ]);

# An answer of which these lines are all: the connection is closed after it, when
# another call may have gone out over it already
sub lines { return { raw => join("\r\n", @_) }; }

sub redirect
{
	my ($status, $to) = @_;

	return { status => $status, headers => { Location => $to } };
}

my $ok      = 'HTTP/1.1 200 OK';
my $chunked = 'Transfer-Encoding: chunked';
my $two     = "$ok\r\nContent-Length: 2\r\n\r\n{}";

# Where in the exchange, what, what it is taken for
my @faults = (
	[ 'connect', 'refused',           { away => 0.3 },                 'unreached' ],
	[ 'connect', 'never answered',    { away => 4, silent => true }, 'unreached' ],
	[ 'request', 'reset at once',     { cut => 0 },                    'lost' ],
	[ 'request', 'reset within',      { cut => 20 },                   'lost' ],
	[ 'headers', 'reset within',      { reset => 'headers' },          'lost' ],
	[ 'headers', 'endless',           { endless => 'headers' },        'lost' ],
	[ 'headers', 'dripping',          { drip => 30 },                  'lost' ],
	[ 'headers', 'a flood of 102s',   { interim => 5000 },             'lost' ],
	[ 'headers', 'a few 102s',        { interim => 5 },                'fine' ],
	[ 'headers', '100 and no more',   lines('HTTP/1.1 100 Continue', '', ''), 'lost' ],
	[ 'headers', 'not HTTP',          lines('SSH-2.0-OpenSSH_9.2', ''),       'lost' ],
	[ 'headers', 'HTTP/7.3',          lines('HTTP/7.3 200 OK', '', ''),       'lost' ],
	[ 'headers', 'status 99',         lines('HTTP/1.1 99 What', '', ''),      'lost' ],
	[ 'headers', 'a negative length', lines($ok, 'Content-Length: -7', '', '{}'),            'unclear' ],
	[ 'headers', 'two lengths',       lines($ok, 'Content-Length: 2', 'Content-Length: 9', '', '{}'), 'unclear' ],
	[ 'headers', 'a line of 200 kB',  lines($ok, 'x-request-id: ' . 'x' x 200_000, '', '{}'), 'lost' ],
	[ 'headers', 'NUL and odd bytes', lines($ok, "x-request-id: \0\x01\xff", '', '{}'), 'unclear' ],
	[ 'headers', 'HTTP/1.0',          { http10 => true },              'fine' ],
	[ 'headers', '204',               { status_after => 204 },         'garbled' ],
	(map { [ 'headers', "redirect $_", redirect($_, $trap->url . '/v1/companies/identify'), 'redirect' ] }
		301, 302, 303, 307, 308),
	[ 'headers', 'redirect to itself', redirect(302, '/v1/companies/identify'), 'redirect' ],
	[ 'body',    'reset within',      { reset => 'body' },             'lost' ],
	[ 'body',    'endless',           { endless => 'body' },           'lost' ],
	[ 'body',    'dripping',          { drip => 0.5, body => true }, 'unclear' ],
	[ 'body',    '64 MB',             { oversized => 64 },             'lost' ],
	[ 'body',    '64 MB in chunks',   { oversized => 64, chunked => true }, 'lost' ],
	[ 'body',    'in tiny chunks',    { chunked => true },             'fine' ],
	[ 'body',    'chunks of nonsense', lines($ok, $chunked, '', 'zz', 'no', ''),     'lost' ],
	[ 'body',    'a huge chunk',      lines($ok, $chunked, '', 'ffffffffffffffff', '{}', ''), 'lost' ],
	[ 'body',    'a chunk cut short', lines($ok, $chunked, '', 'ff', '{}'),          'lost' ],
	[ 'body',    'a gzip bomb',       { gzip => 100 },                 'garbled' ],
	[ 'body',    'no gzip at all',    lines($ok, 'Content-Encoding: gzip', 'Content-Length: 2', '', '{}'), 'unclear' ],
	[ 'after',   'closed',            { raw => $two },                 'unclear' ],
	[ 'after',   'a second answer',   { raw => $two . $two },          'unclear' ]);

# ------------------------------------------------------------- what is watched

# MB that processes of this cluster named "userpilot worker" have for
# themselves, at most, and how many there have been; by /proc alone, so that
# nothing is disturbed
sub watch
{
	my ($postmaster, $file) = @_;
	my $parent = getppid;
	my ($most, %seen) = (0);

	while (getppid == $parent && !-e "$file.stop")
	{
		foreach my $pid (split ' ', eval { slurp_file("/proc/$postmaster/task/$postmaster/children") } // '')
		{
			my ($name, $kb) = ('', 0);

			if (open(my $in, '<', "/proc/$pid/cmdline")) { $name = <$in> // ''; }
			next unless $name =~ /userpilot worker/;
			$seen{$pid} = 1;
			open(my $in, '<', "/proc/$pid/smaps_rollup") or next;
			while (<$in>) { $kb += $1 if /^Private_\w+:\s+([0-9]+)/; }
			$most = $kb if $kb > $most;
		}
		usleep(5_000);
	}
	append_to_file($file, sprintf('%.1f %d', $most / 1024, scalar keys %seen));
	return;
}

sub start_watching
{
	my ($file) = @_;
	my ($postmaster) = slurp_file($node->data_dir . '/postmaster.pid') =~ /^([0-9]+)/;
	my $pid = fork // die "fork: $!";

	return $pid if $pid;
	eval { watch($postmaster, $file); };
	POSIX::_exit(0);
}

# ------------------------------------------------------------------- the cells

sub cell
{
	my ($call, $phase, $what, $do, $taken) = @_;
	my ($path, $lane, undef, $before) = @{ { calls() }->{$call} };
	my $column = $path eq identify_path() ? 0 : $path eq bulk_path() ? 1 : 2;
	my %rule;

	if ($phase eq 'connect')
	{
		my $away = $do;

		$rule{at} = $before;
		$do = sub { $api->post('/_/away', { seconds => $away->{away}, silent => $away->{silent} // false }); }
		  unless $before;
	}
	survives("$call, $phase: $what", $do, $path, $lane, $taken{$taken}[$column], %rule);
	is($api->counters->{calls}{other}, 0, '... and no other path was called');
	return;
}

my $file    = $node->basedir . '/watched';
my $watcher = start_watching($file);
my $began   = time;
my %cells;

foreach my $turn (0, 1)
{
	either($turn);

	my %calls = calls();

	foreach my $call (sort keys %calls)
	{
		set_option('bulk_format', $calls{$call}[2]);
		foreach my $fault (@faults)
		{
			cell($call, @$fault);
			$cells{ $fault->[0] }++;
			$cells{all}++;
		}
	}
}
either(0);

# ------------------------------------------------------------------------- TLS

# A certificate for a name, signed by itself; -1 days: it ended yesterday
sub certificate
{
	my ($name, $days) = @_;
	my $base = $node->basedir . "/$name." . ($days + 1);

	system_or_bail('openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-days', 30,
		'-subj', "/CN=$name", '-addext', "subjectAltName=DNS:$name", '-keyout', "$base.key", '-out', "$base.crt");
	system_or_bail('openssl', 'x509', '-in', "$base.crt", '-days', $days, '-signkey', "$base.key",
		'-out', "$base$days.crt");
	return ("$base$days.crt", "$base.key");
}

# Peers at https://localhost: what is trusted, port, what is taken for what
sub tls_peers
{
	my ($other, $other_key) = certificate('elsewhere.example', 30);
	my ($good, $good_key)   = certificate('localhost', 30);
	my ($old, $old_key)     = certificate('localhost', -1);
	my $peer = sub { return Userpilot::StandIn->new(@_ ? ('tls-cert' => $_[0], 'tls-key' => $_[1]) : ()); };

	return (
		[ 'right',             $peer->($good, $good_key),   $good,  qr/^acknowledged$/ ],
		[ 'unknown authority', $peer->($good, $good_key),   undef,  qr/^outage$/ ],
		[ 'another name',      $peer->($other, $other_key), $other, qr/^outage$/ ],
		[ 'expired',           $peer->($old, $old_key),     $old,   qr/^outage$/ ],
		[ 'no TLS',            $peer->(),                   undef,  qr/^outage$/ ],
		[ 'no handshake',      Userpilot::Deaf->new,        undef,  qr/^outage$/ ]);
}

# Both lanes meet that peer; then the endpoint is the right one again
sub tls_cell
{
	my ($what, $peer, $ca, $outcome) = @_;
	my $port = $peer->{port} // $peer->port;
	my $calls = q{SELECT count(DISTINCT path) FROM userpilot_requests WHERE path ~ 'identify$|background_jobs$'};

	forget($node, 'postgres', 'requests', 'jobs');
	sql("ALTER SERVER userpilot OPTIONS (SET endpoint 'https://localhost:$port'" . ($ca ? ", ADD ca_file '$ca')" : ')'));
	change('bulk');
	sql('UPDATE accounts SET version = version + 1 WHERE id <= 5');
	until_true('both lanes have called', sub { return sql($calls) >= 2; });
	like(outcomes($node, 'postgres', '.'), $outcome, "TLS: $what");
	is(sql('SELECT count(*) FROM userpilot_profiles WHERE attempts > 1'), 0, '... uses up no attempt');
	delivered($node, 'postgres') if $what eq 'right';
	sql("ALTER SERVER userpilot OPTIONS (SET endpoint '" . $api->url . "'" . ($ca ? ', DROP ca_file)' : ')'));
	change($_) foreach 'realtime', 'bulk';
	delivered($node, 'postgres');
	is(dead_letters($node, 'postgres'), 0, '... nothing died');
	all_there('...');
	return;
}

foreach my $peer (tls_peers())
{
	tls_cell(@$peer);
	$cells{TLS} += 2;
	$cells{all} += 2;
}
append_to_file("$file.stop", '');
{ local $?; waitpid($watcher, 0); }

my ($most, $workers) = split ' ', slurp_file($file);
cmp_ok($cells{all}, '>=', 260, 'there were enough cells');
cmp_ok($most, '>', 1,      'the worker was watched');
cmp_ok($most, '<', $bound, '... and its own memory stayed bounded');
is($trap->counters->{connections}{total}, 0, 'no redirect was followed');
unlike(slurp_file($node->logfile), qr/PANIC|TRAP|was terminated by signal|userpilot worker.*exited with exit code/,
	'nothing crashed');
no_violations($api, 'all');
diag(sprintf('%d cells in %.0f s: %s', $cells{all}, time - $began,
		join(', ', map { "$_ $cells{$_}" } grep { $_ ne 'all' } sort keys %cells)));
diag(sprintf('%d workers, at most %.1f MB of their own (sampled)', $workers, $most));
$node->stop;
done_testing();
