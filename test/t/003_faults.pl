# Whatever Userpilot answers, or does not, in the end it has what the tables
# say; and the tables tell what happened.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Userpilot;

# The rare probe of a paused server, every 15 minutes, comes after 3 seconds
$Userpilot::SCALE = 300;

my $api  = Userpilot::StandIn->new;
my $node = new_node('faults');

sub sql
{
	return $node->safe_psql('postgres', $_[0]);
}

create_environment($node, 'postgres', $api, options => "timeout '1'");
sql(q{
	CREATE TABLE accounts (id int PRIMARY KEY, version int NOT NULL);
	CREATE VIEW account_meta AS SELECT id, jsonb_build_object('version', version) AS metadata FROM accounts;
	CREATE FUNCTION to_userpilot() RETURNS trigger LANGUAGE plpgsql AS $$
	BEGIN
		PERFORM userpilot_identify_company(NEW.id, jsonb_build_object('version', NEW.version));
		RETURN NULL;
	END $$;
	CREATE TRIGGER to_userpilot AFTER INSERT OR UPDATE ON accounts
		FOR EACH ROW EXECUTE FUNCTION to_userpilot();
	INSERT INTO accounts SELECT i, 0 FROM generate_series(1, 30) i;
});
delivered($node, 'postgres');

# What a change of all rows does, by lane
my %change = (
	realtime => 'UPDATE accounts SET version = version + 1',
	bulk     => q{SET session_replication_role = replica; UPDATE accounts SET version = version + 1;
		SELECT userpilot_bulk_identify_companies(id, metadata) FROM account_meta});

# Changes all rows while a rule is in force; tests that the rule acted, that
# the request log names this outcome for this path, that nothing is left in
# queue and payloads, and that all has arrived.
sub survives
{
	my ($name, $do, $path, $lane, $outcome, %rule) = @_;
	my $logged;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	sql('TRUNCATE userpilot_requests, userpilot_jobs, userpilot_job_chunks');
	$api->fault($do, match => { path => $path }, %rule);
	sql($change{$lane});
	delivered($node, 'postgres');

	cmp_ok($api->fault_hits, '>=', 1, "$name: it happened");
	$api->no_faults;
	$logged = outcomes($node, 'postgres', $path);
	like($logged, $outcome, '... and was logged for what it is');
	until_true(
		'payloads are dropped',
		sub {
			return sql(q{SELECT count(*) FROM userpilot_job_chunks}) eq '0'
			  && sql(q{SELECT count(*) FROM userpilot_jobs WHERE finished_at IS NULL}) eq '0';
		});
	is(dead_letters($node, 'postgres'), 0, '... nothing died');
	oracle_equals($node, 'postgres', $api, '...', companies => 'SELECT * FROM account_meta');
	return;
}

# The jobs since the rule came into force: status and records of each
sub jobs
{
	return sql(q{SELECT string_agg(status || ' ' || records, ', ' ORDER BY id) FROM userpilot_jobs});
}

my $retried  = qr/outage|back-off/;
my $accepted = qr/^acknowledged$/;

# Answers that mean the same to every call, but for what is done about them
my %answers = (
	'500'                  => { status => 500 },
	'500 after applying'   => { status_after => 500, body => 'oops' },
	'502'                  => { status => 502, body => '<html>Bad gateway</html>', headers => { 'content-type' => 'text/html' } },
	'503'                  => { status => 503 },
	'503 with Retry-After' => { status => 503, headers => { 'Retry-After' => '3' } },
	'429'                  => { status => 429 },
	'429 with Retry-After' => { status => 429, headers => { 'Retry-After' => '5' } },
	'408'                  => { status => 408 },
	'401'                  => { status => 401 },
	'403'                  => { status => 403 },
	'silence'              => { hang => 4 },
	'late answer'          => { hang => 0.5, apply => Userpilot::true },
	'too late an answer'   => { hang => 3,   apply => Userpilot::true },
	'closed before'        => { drop => 'before' },
	'closed after'         => { drop => 'after' },
	'truncated'            => { truncate => Userpilot::true },
	'garbage'              => { garbage => Userpilot::true },
	'oversized'            => { oversized => 3 },
	'a page of HTML'       => { content_type => 'text/html' },
	'dripping'             => { drip => 50 },
);

# --- real time ---

my $identify = '^/v1/companies/identify$';
my %of_identify = (
	'503 with Retry-After' => qr/throttled/,
	'429'                  => qr/throttled/,
	'429 with Retry-After' => qr/throttled/,
	'401'                  => qr/paused/,
	'403'                  => qr/paused/,
	'late answer'          => $accepted,
	'garbage'              => $accepted,
	'a page of HTML'       => $accepted,

	# libcurl repeats a call if a kept connection has closed without an answer
	'closed before' => qr/acknowledged/,
	'closed after'  => qr/acknowledged/,
);

foreach my $name (sort keys %answers)
{
	survives("identify, $name", $answers{$name}, $identify, 'realtime',
		$of_identify{$name} // $retried, times => $name =~ /40[13]/ ? 1 : 3);
}

# What is refused for what it says is dead at once, and can be retried
foreach my $status (400, 404, 413, 422)
{
	sql('TRUNCATE userpilot_requests');
	$api->fault({ status => $status, body => '{"errors":[{"message":"no such luck"}]}' },
		match => { path => $identify, body => '"company_id":"7"' });
	sql($change{realtime});
	delivered($node, 'postgres');
	$api->no_faults;
	is( sql('SELECT d.kind, d.entity_id, d.http_status, d.attempts, d.metadata ->> $$version$$ = a.version::text'
			  . ' FROM userpilot_dead_letters d JOIN accounts a ON a.id = 7'),
		"company|7|$status|1|t", "identify, $status: one dead letter");
	like(sql('SELECT error FROM userpilot_dead_letters'), qr/no such luck/, '... with the reason');
	like(outcomes($node, 'postgres', $identify), qr/dead letter/, '... so logged');
	is(sql('SELECT userpilot_retry()'), 1, '... can be retried');
	delivered($node, 'postgres');
	is(dead_letters($node, 'postgres'), 0, '... and then is dead no more');
	oracle_equals($node, 'postgres', $api, '...', companies => 'SELECT * FROM account_meta');
}

# Trouble with one record while others succeed uses up its attempts
sql(q{ALTER SERVER userpilot OPTIONS (ADD max_attempts '4')});
$api->fault({ status => 500 }, match => { path => $identify, body => '"company_id":"7"' }, times => undef);
sql($change{realtime});
until_true(
	'company 7 is given up',
	sub {
		sql('UPDATE accounts SET version = version + 1 WHERE id = 1');
		return dead_letters($node, 'postgres') > 0;
	});
delivered($node, 'postgres');
is(sql('SELECT entity_id, http_status, attempts FROM userpilot_dead_letters'),
	'7|500|4', 'trouble with one record ends after max_attempts');
$api->no_faults;
sql(q{SELECT userpilot_retry(kind => 'company', entity_id => '7')});
delivered($node, 'postgres');
oracle_equals($node, 'postgres', $api, '... until it is retried',
	companies => 'SELECT * FROM account_meta');

# --- submitting a job, in either format ---

my $bulk      = '^/v1/companies/bulk_identify$';
my %of_submit = (
	'503 with Retry-After' => qr/throttled/,
	'429'                  => qr/throttled/,
	'429 with Retry-After' => qr/throttled/,
	'401'                  => qr/paused/,
	'403'                  => qr/paused/,
	'late answer'          => $accepted,
);

foreach my $format ('json', 'ndjson')
{
	sql("ALTER SERVER userpilot OPTIONS ("
		  . ($format eq 'json' ? 'ADD' : 'SET') . " bulk_format '$format')");
	foreach my $name (sort keys %answers)
	{
		survives("$format job, $name", $answers{$name}, $bulk, 'bulk',
			$of_submit{$name} // qr/unknown/);

		# a job that arrived is found again by the name of its file
		if ($format eq 'ndjson' && $name =~ /after|too late|truncated|garbage|HTML|dripping/ && $name !~ /Retry/)
		{
			is(jobs(), 'completed 30', '... and the job was found again');
		}
		else
		{
			like(jobs(), qr/^(refused 30, )?completed 30$/, '... and a job was completed');
		}
	}
}

survives('409', { status => 409 }, $bulk, 'bulk', qr/slot taken/);
is(jobs(), 'refused 30, completed 30', '... and the rows were bound anew');
survives('413', { status => 413 }, $bulk, 'bulk', qr/too large/);
is(jobs(), 'refused 30, completed 15, completed 15', '... and sent in halves');
foreach my $status (400, 404, 422)
{
	survives("job, $status", { status => $status }, $bulk, 'bulk', qr/dissolved/);
	is(jobs(), 'dissolved 30', '... and its records went one by one');
}

# --- polling it, and the list of jobs ---

my %of_get = (
	%of_submit,
	'garbage'        => qr/back-off/,
	'a page of HTML' => qr/back-off/);

foreach my $path ('^/v1/background_jobs/', '^/v1/background_jobs$')
{
	my $what = $path =~ /\$/ ? 'list' : 'poll';

	foreach my $name (sort keys %answers)
	{
		survives("$what, $name", $answers{$name}, $path, 'bulk', $of_get{$name} // $retried);
		is(jobs(), 'completed 30', '... and the one job was completed');
	}
	foreach my $status (400, 404, 413)
	{
		survives("$what, $status", { status => $status }, $path, 'bulk',
			$status == 404 && $what eq 'poll' ? qr/unknown/ : qr/back-off/);
		is(jobs(), 'completed 30', '... and the one job was completed');
	}
}

no_violations($api, 'faults');

done_testing();
