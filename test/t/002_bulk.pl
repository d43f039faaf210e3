# Bulk: a SELECT over any number of rows becomes jobs, one at a time, within
# the API's limits; what is newer wins whichever way it was sent.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Userpilot;

# A job of 10,000 takes 333 seconds at Userpilot, so one second here
$Userpilot::SCALE = 300;

my $api  = Userpilot::StandIn->new;
my $node = new_node('bulk', conf => "log_statement = none\nmax_wal_size = 1GB");

sub sql
{
	return $node->safe_psql('postgres', $_[0]);
}

# Empties stand-in and extension, as if nothing had ever been sent
sub start_over
{
	delivered($node, 'postgres');
	$api->reset;
	forget($node, 'postgres', 'profiles', 'jobs', 'batches');
	return;
}

create_environment($node, 'postgres', $api);
sql(q{
	CREATE TABLE accounts (id int PRIMARY KEY, name text, plan text, mrr numeric(10, 2));
	CREATE TABLE people (id bigint PRIMARY KEY, email text, account_id int);
	INSERT INTO accounts SELECT i, 'Account ' || i, (ARRAY['free', 'pro', NULL])[1 + i % 3], i / 7.0
		FROM generate_series(1, 25000) i;
	INSERT INTO people SELECT i, 'p' || i || '@example.com', 1 + i % 25000 FROM generate_series(1, 12000) i;
	CREATE VIEW account_meta AS SELECT id,
		jsonb_build_object('name', name, 'plan', plan, 'mrr', mrr) AS metadata FROM accounts;
	CREATE VIEW person_meta AS SELECT id, jsonb_build_object('email', email) AS metadata,
		account_id::text AS company_id FROM people;
});
my %all = (
	companies => 'SELECT * FROM account_meta',
	users     => 'SELECT * FROM person_meta');

# --- two tables, one SELECT each ---

is(sql('SELECT userpilot_bulk_identify_companies(id, metadata) FROM account_meta'),
	25000, 'one SELECT queues every company');
is(sql('SELECT userpilot_bulk_identify_users(id, metadata, company_id) FROM person_meta'),
	12000, 'one SELECT queues every user');

my (%seen, @percents, $eta);
until_true(
	'all is delivered',
	sub {
		my $status = status($node, 'postgres');

		$seen{ $status->{state} }++;
		if (defined $status->{job} && $status->{pending} > 0)
		{
			push @percents, [ $status->{job}, $status->{job_percent} ];
			$eta //= $status->{eta};
		}
		return $status->{pending} == 0;
	});
delivered($node, 'postgres');

ok($seen{sending}, 'status says sending meanwhile');
isnt($eta, undef, '... and when it will be done');
my ($rising, $falling) = (0, 0);
foreach my $i (1 .. $#percents)
{
	next if $percents[$i][0] != $percents[ $i - 1 ][0];
	$rising++  if $percents[$i][1] > $percents[ $i - 1 ][1];
	$falling++ if $percents[$i][1] < $percents[ $i - 1 ][1];
}
cmp_ok($rising, '>=', 3, '... and how far the job is, which rises');
is($falling, 0, '... and never falls');
oracle_equals($node, 'postgres', $api, 'two tables', %all);
no_violations($api, 'two tables');

# What no job has yet, the real-time lane helps with
sub records_sent
{
	my $counters = $api->counters;

	return $counters->{bulk_records} + $counters->{calls}{identify};
}

like( sql(q{SELECT string_agg(concat_ws(' ', kind, records, total_rows - records, completed_rows - records, status),
		', ' ORDER BY id) FROM userpilot_jobs}),
	qr/^company 10000 0 0 completed, .*user \d+ 0 0 completed/,
	'the jobs, as userpilot_jobs tells them');
cmp_ok($api->counters->{calls}{identify}, '>', 0, '... and the real-time lane has helped');
is( sql(q{SELECT count(*) FROM userpilot_jobs WHERE job_id IS NULL OR request_id IS NULL
		OR http_status <> 200 OR attempts <> 1 OR error IS NOT NULL OR response IS NULL
		OR bytes = 0 OR server <> 'userpilot'
		OR NOT (created_at <= submitted_at AND submitted_at <= polled_at AND polled_at <= finished_at)}),
	0, '... with all that is known of each');
is( sql(q{SELECT count(*) FROM userpilot_jobs j JOIN userpilot_jobs k
		ON k.id > j.id AND k.submitted_at < j.finished_at}),
	0, '... one after the other');
is_deeply(
	[ map { $_->{job_id} } @{ $api->jobs } ],
	[ split /\n/, sql('SELECT job_id FROM userpilot_jobs ORDER BY id') ],
	'Userpilot has met the same jobs');
is(sql('SELECT count(*) FROM userpilot_queue'),      0, 'the queue is empty');
is(sql('SELECT count(*) FROM userpilot_job_chunks'), 0, '... and no payload is kept');
is(records_sent(), 37000, 'every record was sent once');

# --- again: nothing has changed, then little ---

sql('SELECT userpilot_bulk_identify_companies(id, metadata) FROM account_meta');
delivered($node, 'postgres');
is(records_sent(), 37000, 'what Userpilot has is not sent again');
sql(q{UPDATE accounts SET plan = 'gold' WHERE id % 1000 = 0;
	SELECT userpilot_bulk_identify_companies(id, metadata) FROM account_meta});
delivered($node, 'postgres');
is(records_sent(), 37025, '... but the difference is');
oracle_equals($node, 'postgres', $api, 'the difference', %all);

is( sql(q{SELECT string_agg(plan || ' ' || n, ', ' ORDER BY plan) FROM (
		SELECT plan, userpilot_bulk_identify_companies(id, metadata || '{"grouped":true}') AS n
		FROM account_meta JOIN accounts USING (id) WHERE id <= 30 AND plan IS NOT NULL GROUP BY plan) g}),
	'free 10, pro 10', 'GROUP BY counts by group');
delivered($node, 'postgres');
oracle_equals($node, 'postgres', $api, 'groups', %all,
	companies => q{SELECT id, metadata || CASE WHEN id <= 30 AND metadata ->> 'plan' IS NOT NULL
		THEN '{"grouped":true}' ELSE '{}' END::jsonb AS metadata FROM account_meta});

# --- sizes around a job's ---

foreach my $size (1, 9999, 10000, 10001)
{
	my $select = "SELECT id, metadata FROM account_meta WHERE id <= $size";
	my $jobs   = $size > 10000 ? '10000,1' : $size;

	start_over();
	is(sql("SELECT userpilot_bulk_identify_companies(id, metadata) FROM ($select) s"),
		$size, "$size records are queued");
	delivered($node, 'postgres');
	is(sql(q{SELECT string_agg(records::text, ',' ORDER BY id) FROM userpilot_jobs WHERE status = 'completed'}),
		$jobs, '... and sent in as many jobs as needed');
	oracle_equals($node, 'postgres', $api, $size, companies => $select);
}

# --- formats and payloads ---

# A running worker knows a changed option when it sees what was queued after
my $add = 'ADD';
foreach my $format (('json', 'ndjson') x 3)
{
	my $select = 'SELECT id, metadata FROM account_meta WHERE id <= 2000 ORDER BY id';

	start_over();
	$api->fault({ job => 'stuck' }, match => { path => '/bulk_identify$' });
	sql(q{SELECT userpilot_identify_company(1, '{"name":"so that a worker runs"}')});
	delivered($node, 'postgres');
	sql("ALTER SERVER userpilot OPTIONS ($add bulk_format '$format');
		SELECT userpilot_bulk_identify_companies(id, metadata) FROM ($select) s");
	$add = 'SET';
	ok( $node->poll_query_until('postgres', q{SELECT count(*) = 1 FROM userpilot_jobs WHERE job_id IS NOT NULL}),
		"$format: a job runs");
	is( sql(q{SELECT md5(string_agg(records, '' ORDER BY seq)) FROM userpilot_job_chunks}),
		sql("SELECT md5(userpilot_companies_ndjson(id, metadata)) FROM ($select) s"),
		'... with the payload that userpilot_companies_ndjson shows');
	$api->no_faults;
	$api->finish_jobs;
	delivered($node, 'postgres');
	is( sql(q{SELECT format || ' ' || bytes FROM userpilot_jobs}),
		"$format " . sql("SELECT octet_length(userpilot_companies_ndjson(id, metadata)) FROM ($select) s"),
		'... and so the history says');
	like($api->jobs->[0]{filename}, $format eq 'ndjson' ? qr/^userpilot-.*\.ndjson$/ : qr/\.json$/,
		'... and Userpilot saw');
	oracle_equals($node, 'postgres', $api, $format, companies => $select);
}
no_violations($api, 'formats');

# What is shown as the body can be sent as it is
start_over();
my $body = sql('SELECT userpilot_users_payload(id, metadata, company_id) FROM person_meta WHERE id <= 500');
my $answer = HTTP::Tiny->new(http_proxy => undef, proxy => undef)->post(
	$api->url . '/v1/users/bulk_identify',
	{
		content => $body,
		headers => {
			'accept'        => 'application/json',
			'authorization' => 'Token ' . $api->key,
			'content-type'  => 'application/json'
		}
	});
is($answer->{status}, 202, 'userpilot_users_payload is a request body');
$api->finish_jobs;
oracle_equals($node, 'postgres', $api, 'payload',
	users => 'SELECT * FROM person_meta WHERE id <= 500');

# --- bodies by their bytes ---

sql(q{ALTER SERVER userpilot OPTIONS (DROP bulk_format);
	CREATE VIEW heavy AS SELECT i AS id, (SELECT jsonb_object_agg('p' || p, repeat(chr(97 + p), 60000))
		FROM generate_series(1, 10) p) AS metadata FROM generate_series(1, 95) i});

# n records of 600 kB each
sub send_heavy
{
	my ($n) = @_;

	start_over();
	sql("SELECT userpilot_bulk_identify_companies(id, metadata) FROM heavy WHERE id <= $n");
	delivered($node, 'postgres');
	return sql(q{SELECT string_agg(format || ' ' || records, ', ' ORDER BY id)
		FROM userpilot_jobs WHERE status = 'completed'});
}
is(send_heavy(13), 'json 13',   'below 8 MB JSON is sent');
is(send_heavy(14), 'ndjson 14', 'above it, a file');
is(send_heavy(95), 'ndjson 83, json 12', '57 MB make two jobs below 50 MB');
is(sql('SELECT count(*) FROM userpilot_jobs WHERE bytes > 50000000'), 0, '... each');
oracle_equals($node, 'postgres', $api, 'heavy', companies => 'SELECT * FROM heavy');
no_violations($api, 'heavy');

# --- the newer value wins ---

start_over();
sql('TRUNCATE people; DELETE FROM accounts WHERE id > 5000');
sql('SELECT userpilot_bulk_identify_companies(id, metadata) FROM account_meta');
ok( $node->poll_query_until('postgres',
		q{SELECT count(*) = 1 FROM userpilot_jobs WHERE status = 'processing' AND completed_rows > 0}),
	'while a job runs');
sql(q{UPDATE accounts SET name = 'newer ' || id WHERE id % 100 = 0;
	SELECT count(userpilot_identify_company(id, metadata)::text) FROM account_meta WHERE id % 100 = 0;
	SELECT userpilot_identify_company(1, '{"name":"between"}');
	UPDATE accounts SET name = 'last' WHERE id = 1;
	SELECT userpilot_identify_company(1, '{"name":"last"}')});
is(sql(q{SELECT count(*) FROM userpilot_jobs WHERE finished_at IS NULL}),
	1, '... its companies change');
delivered($node, 'postgres');
oracle_equals($node, 'postgres', $api, 'changes during a job', companies => 'SELECT * FROM account_meta');

# A SELECT that reads the past must not bring it back
my $old = $node->background_psql('postgres');
$old->query_safe('BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM accounts');
sql(q{UPDATE accounts SET name = 'newest ' || id WHERE id <= 50;
	SELECT count(userpilot_identify_company(id, metadata)::text) FROM account_meta WHERE id <= 50});
delivered($node, 'postgres');
sql(q{UPDATE accounts SET plan = 'later' WHERE id BETWEEN 40 AND 90;
	SELECT count(userpilot_identify_company(id, metadata)::text) FROM account_meta WHERE id BETWEEN 40 AND 90});
$old->query_safe(q{SELECT userpilot_bulk_identify_companies(id, metadata || '{"from the past":1}') FROM account_meta; COMMIT});
$old->quit;
delivered($node, 'postgres');
oracle_equals($node, 'postgres', $api, 'a bulk SELECT with an old snapshot',
	companies => q{SELECT id, metadata || '{"from the past":1}' AS metadata FROM account_meta});

# Within one transaction the order of its own changes counts
sql(q{BEGIN;
	SELECT userpilot_identify_company(5001, '{"v":1}');
	SELECT userpilot_bulk_identify_companies(5001, '{"v":2,"w":2}');
	SELECT userpilot_identify_company(5001, '{"v":3}');
	COMMIT});
delivered($node, 'postgres');
is_deeply($api->entity('companies', '5001'), { metadata => { v => 3, w => 2 } },
	'direct, bulk and direct in one transaction');

is(sql('SELECT count(*) FROM userpilot_queue'), 0, 'the queue is empty again');
is(dead_letters($node, 'postgres'),             0, 'nothing died');
no_violations($api, 'all');

done_testing();
