# Whatever happens to a job, from its submission to its end, Userpilot comes to
# have what the tables say.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Userpilot;
use Userpilot::Faults;

set_up('jobs');

# --- submitting a job, in either format ---

my %of_submit = (
	'503 with Retry-After' => qr/throttled/,
	'429'                  => qr/throttled/,
	'429 with Retry-After' => qr/throttled/,
	'401'                  => qr/paused/,
	'403'                  => qr/paused/,
	'late answer'          => qr/^acknowledged$/,
);

# These jobs arrived although no answer says so
my $arrived = qr/after|too late|truncated|garbage|HTML|dripping|oversized/;

my $turns = 0;

foreach my $format ('json', 'ndjson')
{
	set_option('bulk_format', $format);
	$turns = $format eq 'json' ? 0 : 1;
	foreach my $name (sort keys %answers)
	{
		either($turns++);
		survives("$format job, $name", $answers{$name}, bulk_path(), 'bulk',
			$of_submit{$name} // qr/unknown/);

		# ... and are found again by the name of the file
		if ($format eq 'ndjson' && $name =~ $arrived && $name !~ /Retry/)
		{
			is(jobs_said(), 'completed 30', '... and the job was found again');
		}
		else
		{
			like(jobs_said(), qr/^(refused 30, )?completed 30$/, '... and a job was completed');
		}
	}
}

survives('409', { status => 409 }, bulk_path(), 'bulk', qr/slot taken/);
is(jobs_said(), 'refused 30, completed 30', '... and the rows were bound anew');
survives('413', { status => 413 }, bulk_path(), 'bulk', qr/too large/);
is(jobs_said(), 'refused 30, completed 15, completed 15', '... and sent in halves');
ok($node->poll_query_until('postgres', 'SELECT userpilot_worker_pid() IS NULL'),
	'... until the worker leaves, or ten jobs were taken');
foreach my $status (400, 404, 422)
{
	either($turns++);
	survives("job, $status", { status => $status }, bulk_path(), 'bulk', qr/dissolved/);
	is(jobs_said(), 'dissolved 30', '... and its records went one by one');
}

# --- jobs that were accepted and then fare badly ---

my %fates = (
	'failed after half'   => [ { job => 'fail_half' }, 1, 'completed 30' ],
	'failed at once'      => [ { job => 'fail_none' }, 1, 'completed 30' ],
	'failed twice'        => [ { job => 'fail_half' }, 2, 'dissolved 30' ],
	'failed and nothing'  => [ { job => 'fail_none' }, 2, 'dissolved 30' ],
	'completed short'     => [ { job => 'short', rows => 3 }, 1, 'dissolved 30' ],
	'in an odd status'    => [ { job => 'unknown_status' }, 1, 'completed 30' ],
	'slow'                => [ { job => 'slow', factor => 200 }, 1, 'completed 30' ],
	'accepted in brief'   => [ { job => 'terse' }, 1, 'completed 30' ],
	'with a shorter id'   => [ { job => 'bare' }, 1, 'completed 30' ],
	'with a number as id' => [ { job => 'numbered' }, 1, 'completed 30' ],
);

foreach my $name (sort keys %fates)
{
	my ($do, $times, $said) = @{ $fates{$name} };

	either($turns++);
	survives("job $name", $do, bulk_path(), 'bulk', qr/^acknowledged$/, times => $times);
	is(jobs_said(), $said, '... and the history says so');
	is(sql(q{SELECT max(attempts) FROM userpilot_jobs}),
		$name =~ /failed/ ? 2 : 1, '... and how often it was submitted');
}
like(sql(q{SELECT coalesce(string_agg(error, ''), 'none') FROM userpilot_jobs}),
	qr/^none$/, 'a slow job is no error');
either(0);
survives('job short', { job => 'short', rows => 3 }, bulk_path(), 'bulk', qr/^acknowledged$/);
is( sql('SELECT completed_rows, error FROM userpilot_jobs'),
	'27|completed with 27 of 30 records',
	'a short job says how short');

# --- a job that does not end ---

$api->fault({ job => 'stuck', status => 'processing' }, match => { path => bulk_path() });
change('bulk');
until_true('the job is stuck',
	sub { return sql(q{SELECT max(completed_rows) FROM userpilot_jobs WHERE finished_at IS NULL}) eq '15' });
sql('UPDATE accounts SET version = version + 1 WHERE id > 25;
	INSERT INTO accounts VALUES (31, 1); INSERT INTO people VALUES (31, 1)');
until_true('others are not held up', sub { return defined $api->entity('companies', '31') });
ok(1, 'a stuck job holds up its own companies only');
cmp_ok($api->entity('companies', '30')->{metadata}{version},
	'<', sql('SELECT version FROM accounts WHERE id = 30'), '... while it may still end');

# half an hour, so 3 seconds here
my $overdue = eval {
	until_true(
		'newer changes leave',
		sub {
			return $api->entity('companies', '30')->{metadata}{version} ==
			  sql('SELECT version FROM accounts WHERE id = 30');
		},
		12);
};
ok($overdue, '... and not even those once it is overdue');
until_true('status says so', sub { return status($node, 'postgres')->{advice} =~ /^job [0-9]+ is overdue/ });
$api->finish_jobs;
$api->no_faults;
delivered($node, 'postgres');
all_there('a stuck job that ends after all');

# All was applied, but the refresh does not end: 3 seconds later that is over
survives('a refresh that does not end', { job => 'stuck' }, bulk_path(), 'bulk', qr/^acknowledged$/);
is(jobs_said(), 'completed 31', '... and the job is completed');
$api->finish_jobs;

# Without the counts that is not believed
survives('a refresh that does not end, and tells nothing', { job => 'mute' }, bulk_path(), 'bulk', qr/^acknowledged$/);
is(sql('SELECT status, error FROM userpilot_jobs'), 'dissolved|the job is "pending_refresh", and overdue',
	'... and the job is given up');
$api->finish_jobs;

# Nobody knows what this status means: record by record, and the slot may be free
survives('a status that nobody knows', { job => 'stuck', status => 'archived' }, bulk_path(), 'bulk',
	qr/^acknowledged$/);
is(sql('SELECT status, error FROM userpilot_jobs'), 'dissolved|the job is "archived", and overdue',
	'... and the job is given up');
is($api->counters->{conflicts_own}, 0, 'no job of ours met another of ours');
change('bulk');
until_true('a submission finds out', sub { return sql(q{SELECT count(*) > 0 FROM userpilot_requests WHERE outcome = 'slot taken'}) eq 't' });
ok(1, 'a job in such a status is not taken to be in the slot, before a submission says so');
$api->finish_jobs;
delivered($node, 'postgres');
all_there('... and all is delivered once it is free');

my $met = $api->counters->{conflicts_own};

# --- a job that is in the list only ---

foreach my $format ('json', 'ndjson')
{
	set_option('bulk_format', $format);
	either($turns++);
	survives("$format job that polls do not find", { status => 404 }, '^/v1/background_jobs/.', 'bulk', qr/unknown/,
		times => 1000);
	is(jobs_said(), 'dissolved 31', '... is over when the list says so, which does not say for how many records');
	is(sql(q{SELECT max(attempts) FROM userpilot_jobs}), 1, '... and was submitted once');

	$api->fault({ job => 'short', rows => 3 }, match => { path => bulk_path() }, times => 1);
	survives("$format job that dropped records, and one poll does not find", { status => 404 },
		'^/v1/background_jobs/.', 'bulk', qr/unknown/, times => 1);
	is(jobs_said(), 'dissolved 31', '... is seen for what it is');
	survives("$format job that one poll does not find", { status => 404 },
		'^/v1/background_jobs/.', 'bulk', qr/unknown/, times => 1);
	is(jobs_said(), 'completed 31', '... is completed with the next');
}

is($api->counters->{conflicts_own}, $met, 'no job of ours met another of ours, but the one given up');

# --- a job that arrived, which nothing tells: newer changes are not overwritten ---

my %untold = (
	'no answer, and a list that does not show it' => { drop => 'after' },
	'503 with Retry-After though accepted' =>
	  { status_after => 503, headers => { 'Retry-After' => '1' } },
	'a redirect though accepted' => { status_after => 302, headers => { location => '/' } },
	'no answer, and 404 to the second submission' => [ { drop => 'after' }, { status => 404 } ],
	'no answer, and 413 to the second submission' => [ { drop => 'after' }, { status => 413 } ],
);

foreach my $format ('json', 'ndjson')
{
	set_option('bulk_format', $format);
	$api->configure(list_limit => 0);
	foreach my $name (sort keys %untold)
	{
		my $before = scalar(@{ $api->jobs });

		either($turns++);
		forget($node, 'postgres', 'requests', 'jobs');
		$api->fault({ job => 'slow', factor => 200 }, match => { path => bulk_path() }, times => 1);
		$api->fault($_, match => { path => bulk_path() }, times => 1)
		  foreach ref $untold{$name} eq 'ARRAY' ? @{ $untold{$name} } : $untold{$name};
		change('bulk');
		until_true('it runs', sub { return @{ $api->jobs } > $before; });
		change('realtime');
		delivered($node, 'postgres');
		until_true('it is over', sub { return !grep { $_->{status} !~ /completed|failed/ } @{ $api->jobs }; });
		all_there("$format, $name");
		is(jobs_said(), 'completed 31', '... one job to us');
		$api->no_faults;
	}
	$api->configure(list_limit => 50);
}
$met = $api->counters->{conflicts_own};

either(0);

# The first run has failed, the answer to the second is lost: the list has both
$api->fault({ job => 'fail_half' }, match => { path => bulk_path() }, times => 1);
$api->fault({ drop => 'after' }, match => { path => bulk_path() }, skip => 1, times => 1);
forget($node, 'postgres', 'requests', 'jobs');
change('bulk');
delivered($node, 'postgres');
is(jobs_said(), 'completed 31', 'the second run is found, not the first');
is(sql('SELECT max(attempts) FROM userpilot_jobs'), 2, '... which had another name');
$api->no_faults;
all_there('... and is what counts');

# --- somebody else's job ---

$api->foreign_job(100_000);
change('bulk');
until_true('it waits', sub { return status($node, 'postgres')->{state} eq 'waiting for the slot' });
like(status($node, 'postgres')->{advice}, qr/another job runs at Userpilot/, 'a foreign job is named as the reason');
sql(q{INSERT INTO accounts VALUES (32, 1)});
until_true('real time goes on', sub { return defined $api->entity('companies', '32') });
ok(1, 'real time goes on meanwhile');
$api->finish_jobs;
delivered($node, 'postgres');
all_there('after a foreign job');
is(sql('SELECT count(*) FROM userpilot_jobs WHERE error IS NOT NULL AND finished_at > now() - $$1 s$$::interval'),
	0, '... which is no error');

# --- refused for the moment, or so it seems ---

# A firewall that dislikes one body says 403, as if it were about the key
my $disliked = '"company_id":"9"';
$api->fault({ status => 403 }, match => { path => $_, body => $disliked }, times => undef)
  foreach bulk_path(), identify_path();
forget($node, 'postgres', 'requests', 'jobs');
change('bulk');
until_true(
	'the record is found',
	sub {
		sql('UPDATE accounts SET version = version + 1 WHERE id = 31');
		return dead_letters($node, 'postgres') > 0;
	});
delivered($node, 'postgres');
is(sql('SELECT DISTINCT entity_id FROM userpilot_dead_letters'), '9', '403 to a job: one record dies of it');
like(jobs_said(), qr/^(refused \d+, )+dissolved \d+$/, '... as the others went one by one');
$api->no_faults;
sql('SELECT userpilot_retry()');
delivered($node, 'postgres');
all_there('... and all is well when it is taken');

# 429 for hours: what the job would hold up goes by other ways
$api->fault({ status => 429, headers => { 'Retry-After' => '1800' } }, match => { path => bulk_path() }, times => undef);
change('bulk');
until_true('the job is refused', sub { return $api->fault_hits > 0 });
sql('UPDATE accounts SET version = version + 1 WHERE id = 30');
until_true(
	'a newer change leaves',
	sub {
		return $api->entity('companies', '30')->{metadata}{version} ==
		  sql('SELECT version FROM accounts WHERE id = 30');
	});
ok(defined $api->entity('companies', '30'), 'a job that is refused for hours holds nothing up');
$api->no_faults;
delivered($node, 'postgres');
all_there('... and goes in the end');

# --- a job of which polls tell nothing ---

my %silent = ('500' => { status => 500 }, 'silence' => { hang => 4 }, 'oversized' => { oversized => 3 });

foreach my $name (sort keys %silent)
{
	survives("polls: $name, always", $silent{$name}, '^/v1/background_jobs/.', 'bulk', qr/outage|back-off/,
		times => undef);
	is(jobs_said(), 'dissolved 32', '... is over when the list says so');
}

# --- answers of another shape, or of another job ---

survives('a list with pages', { status => 200, body => '{"page":1,"jobs":[]}' }, '^/v1/background_jobs$', 'bulk',
	qr/^acknowledged$/, times => 1);
is(jobs_said(), 'completed 32', '... is a list');
survives('a list with an error in it', { status => 200, body => '{"errors":[{"message":"no"}]}' },
	'^/v1/background_jobs$', 'bulk', qr/back-off/, times => 1);
survives('a poll that tells of another job',
	{ status => 200, body => '{"job_id":"another","status":"completed","total_rows":32,"completed_rows":32}' },
	'^/v1/background_jobs/.', 'bulk', qr/back-off/, times => 1);
is(jobs_said(), 'completed 32', '... is not believed');

is(dead_letters($node, 'postgres'), 0, 'nothing died');
is($api->counters->{conflicts_own}, $met, 'no job of ours met another of ours, but those that nothing told of');
no_violations($api, 'jobs');

done_testing();
