# Whatever Userpilot answers to a real-time call or a question about jobs, or
# does not answer, in the end it has what the tables say; and the tables tell
# what happened.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Userpilot;
use Userpilot::Faults;

set_up('faults');

my $retried  = qr/outage|back-off/;
my $accepted = qr/^acknowledged$/;
my %always   = (
	'503 with Retry-After' => qr/throttled/,
	'429'                  => qr/throttled/,
	'429 with Retry-After' => qr/throttled/,
	'401'                  => qr/paused/,
	'403'                  => qr/paused/,
	'late answer'          => $accepted,

	# libcurl repeats a call if a kept connection has closed without an answer
	'closed before' => qr/acknowledged/,
	'closed after'  => qr/acknowledged/,
);

# --- real time: the status alone is the answer ---

my %of_identify = (%always, 'garbage' => $accepted, 'a page of HTML' => $accepted);

foreach my $turn (0, 1)
{
	either($turn);
	foreach my $name (sort keys %answers)
	{
		survives("identify, $name", $answers{$name}, identify_path(), 'realtime',
			$of_identify{$name} // $retried, times => $name =~ /40[13]/ ? 1 : 3);
	}
}

# What is refused for what it says is dead at once, and can be retried
my $turns = 0;

foreach my $status (400, 404, 413, 422)
{
	either($turns++);
	my ($one, $table) = $kind eq 'users' ? ('user', 'people') : ('company', 'accounts');

	forget($node, 'postgres', 'requests');
	$api->fault({ status => $status, body => '{"errors":[{"message":"no such luck"}]}' },
		match => { path => identify_path(), body => qq{"${one}_id":"7"} });
	change('realtime');
	delivered($node, 'postgres');
	$api->no_faults;
	is( sql(qq{SELECT d.kind, d.entity_id, d.http_status, d.attempts, d.metadata ->> 'version' = t.version::text
			FROM userpilot_dead_letters d JOIN $table t ON t.id = 7}),
		"$one|7|$status|1|t", "identify, $status: one dead letter");
	like(sql('SELECT error FROM userpilot_dead_letters'), qr/no such luck/, '... with the reason');
	like(outcomes($node, 'postgres', identify_path()), qr/dead letter/, '... so logged');
	is(sql('SELECT userpilot_retry()'), 1, '... can be retried');
	delivered($node, 'postgres');
	is(dead_letters($node, 'postgres'), 0, '... and then is dead no more');
	all_there('...');
}

# Trouble with one record while others succeed uses up its attempts; so does 403,
# which a firewall may say of its body
either(0);
foreach my $status (403, 500)
{
	$api->no_faults;
	sql('SELECT userpilot_retry()');
	delivered($node, 'postgres');
	forget($node, 'postgres', 'requests');
	$api->fault({ status => $status }, match => { path => identify_path(), body => '"company_id":"7"' }, times => undef);
	change('realtime');
	until_true(
		'company 7 is given up',
		sub {
			sql('UPDATE accounts SET version = version + 1 WHERE id = 1');
			return dead_letters($node, 'postgres') > 0;
		});
	delivered($node, 'postgres');
	is(sql('SELECT entity_id, http_status, attempts FROM userpilot_dead_letters'),
		"7|$status|4", "$status to one record ends after max_attempts");
	like(outcomes($node, 'postgres', identify_path()), $status == 403 ? qr/paused/ : qr/back-off/,
		'... and was logged for what it may be at first');
}

# A newer change of it goes out by itself, and an older one does not undo it
$api->no_faults;
sql('UPDATE accounts SET version = version + 1 WHERE id = 7');
delivered($node, 'postgres');
all_there('a newer change passes the dead letter');
sql(q{SELECT userpilot_retry(kind => 'company', entity_id => '7')});
delivered($node, 'postgres');
all_there('... which, retried, undoes nothing');
is(dead_letters($node, 'postgres'), 0, '... and is gone');

# --- polling a job, and the list of jobs ---

# While other calls succeed nobody waits for a list that is not to be had
my %of_get = (%always, 'garbage' => qr/back-off/, 'a page of HTML' => qr/back-off/,
	map { $_ => qr/acknowledged|back-off/ } 'closed before', 'closed after');

foreach my $path ('^/v1/background_jobs/', '^/v1/background_jobs$')
{
	my $what = $path =~ /\$/ ? 'list' : 'poll';

	foreach my $name (sort keys %answers)
	{
		either($turns++);
		survives("$what, $name", $answers{$name}, $path, 'bulk', $of_get{$name} // $retried);
		is(jobs_said(), 'completed 30', '... and the one job was completed');
	}
	foreach my $status (400, 404, 413)
	{
		survives("$what, $status", { status => $status }, $path, 'bulk',
			$status == 404 && $what eq 'poll' ? qr/unknown/ : qr/back-off/);
		like(jobs_said(), qr/^(refused 30, )?completed 30$/, '... and a job was completed');
	}
}

no_violations($api, 'faults');

done_testing();
