# One pass over the queue plans several jobs: what happens to rows between the
# pass and their turn, and what is left when there is nothing to plan for.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Userpilot;

my $api  = Userpilot::StandIn->new(scale => 100);
my $node = new_node('plan', scale => 100);

sub sql
{
	my ($sql, $database) = @_;

	return $node->safe_psql($database // 'postgres', $sql);
}

sub value_of
{
	my ($id) = @_;

	return $api->get("/_/state?kind=companies&id=$id")->{metadata}{a};
}

sub no_worker
{
	return sql('SELECT count(worker) FROM userpilot_status') == 0;
}

sub job_runs
{
	return sql(q{SELECT count(*) FROM userpilot_jobs WHERE finished_at IS NULL AND submitted_at IS NOT NULL}) > 0;
}

# Real-time changes, fifty a transaction
sub one_by_one
{
	my ($kind, $prefix, $n) = @_;

	return sql(qq{DO \$\$
		BEGIN
			FOR i IN 1..$n LOOP
				PERFORM userpilot_identify_$kind('$prefix' || i, '{"a": 1}');
				IF i % 50 = 0 THEN COMMIT; END IF;
			END LOOP;
		END \$\$});
}

create_environment($node, 'postgres', $api);

# --- a bulk row is judged with the direct changes it saw ---

# x was called just now, so its second change waits
$node->safe_psql('postgres', q{SELECT userpilot_identify_company('x', '{"a": 1}');
	SELECT userpilot_identify_company('x', '{"a": 2}');
	SELECT userpilot_bulk_identify_companies(i, '{"a": 3}'::jsonb) FROM (VALUES ('x')) v(i)});
delivered($node, 'postgres');
is(value_of('x'), 3, 'a bulk SELECT wins over the direct change it saw, which waited');

sql(q{SELECT userpilot_bulk_identify_companies('c' || i, '{"a": 1}'::jsonb) FROM generate_series(1, 3000) i});
until_true('a job runs', \&job_runs);
sql(q{SELECT userpilot_identify_company('c1', '{"a": 2}')});
sql(q{SELECT userpilot_bulk_identify_companies(i, '{"a": 3}'::jsonb) FROM (VALUES ('c1')) v(i)});
delivered($node, 'postgres');
is(value_of('c1'), 3, '... which was held by a job');

# --- units whose rows are gone, or elsewhere, when they have their turn ---

sub in_units
{
	my ($a) = @_;

	sql(qq{SELECT userpilot_bulk_identify_companies('u' || i, '{"a": $a}'::jsonb) FROM generate_series(1, 30000) i});
	until_true('the first of several jobs runs', \&job_runs);
}

in_units(1);
sql('VACUUM FULL userpilot_queue');
delivered($node, 'postgres');
is(sql(q{SELECT count(*) FROM userpilot_profiles WHERE metadata = '{"a": 1}' AND entity_id LIKE 'u%'}),
	30000, 'a rewritten queue is delivered all the same');

in_units(2);
sql(q{SELECT userpilot_cancel((SELECT id FROM userpilot_batches ORDER BY started_at DESC LIMIT 1))});
delivered($node, 'postgres');
cmp_ok(sql(q{SELECT count(*) FROM userpilot_profiles WHERE metadata = '{"a": 2}'}),
	'<', 20000, 'a cancelled bulk SELECT ends with its first job');

in_units(3);
sql('TRUNCATE userpilot_queue');
until_true('the worker leaves an emptied queue', \&no_worker);

# --- a job that is prepared while another runs ---

# The number of the prepared one
sub ahead
{
	my $job;

	until_true(
		'the next job is prepared',
		sub {
			$job = sql(q{SELECT max(id) FILTER (WHERE submitted_at IS NULL) FROM userpilot_jobs
				WHERE finished_at IS NULL HAVING count(submitted_at) = 1});
		});
	return $job;
}

sub put_back
{
	my ($job, $why) = @_;

	until_true("it is put back: $why", sub { return sql("SELECT count(*) FROM userpilot_jobs WHERE id = $job") == 0; });
}

sub all_have
{
	my ($a, $what) = @_;

	delivered($node, 'postgres');
	is(sql(qq{SELECT count(*) FROM userpilot_profiles WHERE metadata = '{"a": $a}' AND entity_id LIKE 'u%' AND job IS NULL}),
		30000, $what);
	is(() = ($api->raw('/_/state?kind=companies') =~ /"a": ?$a\b/g), 30000, '... and so it is at Userpilot');
}

in_units(4);
my $job = ahead();
cmp_ok(sql(qq{SELECT pending FROM userpilot_status}), '>=', 20000, 'a job is prepared while another runs');
isnt(sql(qq{SELECT job FROM userpilot_status}), $job, '... which is the one that is shown');
$node->stop('immediate');
$node->start;
put_back($job, 'the worker was killed');
all_have(4, 'a job that had not left when the server crashed is bound anew');

# the first does not end: what was prepared beside it is not held with it
$api->fault({ job => 'stuck', status => 'validating' }, match => { path => '/bulk_identify$' });
in_units(5);
$api->no_faults;
$job = ahead();
my $in_next = sql(qq{SELECT max(entity_id) FROM userpilot_profiles WHERE job = $job});
put_back($job, 'the running job is overdue');
sql(qq{SELECT userpilot_identify_company('$in_next', '{"a": 6}')});
until_true('a fresh change of it leaves', sub { return value_of($in_next) == 6; });
sql(qq{SELECT userpilot_identify_company('$in_next', '{"a": 5}')});
is(sql(q{SELECT count(*) FROM userpilot_jobs WHERE finished_at IS NULL}), 1, '... while the job still runs');
$api->finish_jobs;
all_have(5, 'after an overdue job all is delivered');

# the first is sent record by record: that does not wait for the next
$api->fault({ job => 'short', rows => 9999 }, match => { path => '/bulk_identify$' });
in_units(6);
$api->no_faults;
$job = ahead();
put_back($job, 'the running job was short');
all_have(6, 'after a short job all is delivered');

# the first gets lost: the next need not wait until it is found
$api->fault({ job => 'slow', factor => 2 }, match => { path => '/bulk_identify$' });
in_units(7);
$api->no_faults;
$job = ahead();
$api->fault({ status => 404 }, match => { path => '/background_jobs/.' });
put_back($job, 'the running job is not known any more');
all_have(7, 'after a job that got lost all is delivered');

# --- rows of a running job that are elsewhere when it ends ---

$api->fault({ job => 'stuck' }, match => { path => '/bulk_identify$' });
one_by_one('company', 'd', 1500);
until_true(
	'the job is all that is left',
	sub {
		return sql(q{SELECT (SELECT max(records) FROM userpilot_jobs WHERE finished_at IS NULL) = (SELECT count(*) FROM userpilot_queue)}) eq 't';
	});
$api->no_faults;

# what was deleted just now keeps its place while the worker's snapshot may see it
until_true(
	'rows are elsewhere',
	sub {
		return sql(q{CREATE TEMP TABLE before AS SELECT ctid AS place, entity_id FROM userpilot_queue;
			VACUUM FULL userpilot_queue;
			SELECT count(*) FROM before b JOIN userpilot_queue q USING (entity_id) WHERE q.ctid <> b.place}) > 0;
	});
$api->finish_jobs;
my $trickle = 0;
until_true(
	'they are found while others come',
	sub {
		$trickle++;
		sql(qq{SELECT userpilot_identify_company('trickle$trickle', '{"a": 1}')});
		return sql(q{SELECT count(*) FROM userpilot_queue WHERE entity_id LIKE 'd%'}) == 0;
	});

# --- both lanes end together ---

# Changes of so many companies, so many a transaction, all there when delivery
# begins; the records of the one job
sub one_job
{
	my ($prefix, $transactions, $each) = @_;
	my $jobs = sql('SELECT count(*) FROM userpilot_jobs');

	until_true('the worker has left', \&no_worker);
	sql(q{SELECT userpilot_disable('userpilot')});
	sql(qq{DO \$\$
		BEGIN
			FOR i IN 1..$transactions LOOP
				PERFORM userpilot_identify_company('$prefix' || i || '-' || j, '{"a": 1}') FROM generate_series(1, $each) j;
				COMMIT;
			END LOOP;
		END \$\$});
	sql(q{SELECT userpilot_enable('userpilot')});
	delivered($node, 'postgres');
	is(sql('SELECT count(*) FROM userpilot_jobs') - $jobs, 1, 'a backlog is one job');
	return sql('SELECT records FROM userpilot_jobs ORDER BY id DESC LIMIT 1');
}

cmp_ok(one_job('s', 40, 50), '<', 1450, '... of what the calls that may be made until its end cannot do');
# what a transaction queues beyond its first 100 rows is bulk
my $records = one_job('m', 20, 250);
cmp_ok($records, '>=', 3000, '... of all that was queued as bulk ...');
cmp_ok($records, '<', 3600, '... and of the rest no more than that');

# --- smaller jobs after 413, and larger again ---

$api->fault({ status => 413 }, match => { path => '/bulk_identify$' }, times => 1);
$api->fault({ job => 'stuck' }, match => { path => '/bulk_identify$' }, times => undef);
sql(q{SELECT userpilot_bulk_identify_companies('large' || i, '{"a": 1}'::jsonb) FROM generate_series(1, 40) i});
until_true('a job is half as large', sub { return sql('SELECT max(records) FROM userpilot_jobs WHERE finished_at IS NULL AND submitted_at IS NOT NULL') eq '20' });
sql(q{SELECT userpilot_bulk_identify_users('large' || i, '{"a": 1}'::jsonb) FROM generate_series(1, 400) i});
$api->no_faults;
$api->finish_jobs;
delivered($node, 'postgres');
is( sql(q{SELECT string_agg(DISTINCT records::text, ',') FROM userpilot_jobs WHERE kind = 'user'}),
	'20,40', '... until ten of them were taken');
until_true('the worker has left, and forgotten it', \&no_worker);

# --- progress ---

sql(q{SELECT userpilot_bulk_identify_companies('p' || i, '{"a": 1}'::jsonb) FROM generate_series(1, 24000) i});
my ($last, $seen, @fell) = (0, 0);
until_true(
	'several jobs are delivered',
	sub {
		my ($percent, $pending) = split /\|/, sql('SELECT coalesce(percent, 100), pending FROM userpilot_status');

		push @fell, "$last to $percent" if $percent < $last;
		($last, $seen) = ($percent, $seen + 1);
		return $pending == 0;
	});
cmp_ok($seen, '>', 20, 'progress was looked at often');
is("@fell", '', '... and never fell');

# --- a plan that is left behind ---

# The slot is wanted by another database when the companies' job ends, and the
# planned users go through the real-time lane meanwhile
$node->safe_psql('postgres', 'CREATE DATABASE second');
create_environment($node, 'second', $api, server => 'other');
$api->pause;
one_by_one('company', 'k', 600);
one_by_one('user', 'u', 600);
sql(q{SET userpilot.server = 'other';
	SELECT userpilot_bulk_identify_companies('o' || i, '{"a": 1}'::jsonb) FROM generate_series(1, 50) i}, 'second');
$api->go_on;
delivered($node, 'postgres');
delivered($node, 'second');
until_true('the worker leaves instead of looking for work for ever', \&no_worker);

no_violations($api, 'plan');
$node->stop;
done_testing();
