# Limits are an application's: databases and servers that share endpoint and
# key share its 600 calls a minute and its one job at a time, and each gets its
# turn.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Userpilot;

my $api  = Userpilot::StandIn->new(history => 5);
my $node = new_node('shared_key');
my @dbs  = ('postgres', 'second');

# Two databases, in each two servers; endpoints are written differently
my %servers = (userpilot => $api->url, other => $api->url . '/v1');

$node->safe_psql('postgres', 'CREATE DATABASE second');
foreach my $db (@dbs)
{
	foreach my $server (sort keys %servers)
	{
		create_environment($node, $db, $api, server => $server);
		$node->safe_psql($db, "ALTER SERVER $server OPTIONS (SET endpoint '$servers{$server}')");
	}
	$node->safe_psql(
		$db, q{
		CREATE TABLE sent (server text, id text, version int, bulk bool, PRIMARY KEY (server, id));
		CREATE VIEW sent_meta AS SELECT id, jsonb_build_object('version', version) AS metadata,
			server, bulk FROM sent});
}

# New versions of 400 companies singly and of 1,500 in bulk, of each server of
# a database
sub enqueue
{
	my ($db, $version) = @_;

	foreach my $server (sort keys %servers)
	{
		$node->safe_psql(
			$db, qq{
			SET userpilot.server = '$server';
			INSERT INTO sent SELECT '$server', '$db $server ' || i, $version, i > 400 FROM generate_series(1, 1900) i
				ON CONFLICT (server, id) DO UPDATE SET version = $version;
			SELECT userpilot_bulk_identify_companies(id, metadata) FROM sent_meta WHERE bulk AND server = '$server';
			DO \$\$
			DECLARE
				n int := 0;
				r record;
			BEGIN
				FOR r IN SELECT id, metadata FROM sent_meta WHERE NOT bulk AND server = '$server' LOOP
					PERFORM userpilot_identify_company(r.id, r.metadata);
					n := n + 1;
					IF n % 100 = 0 THEN COMMIT; END IF;
				END LOOP;
			END \$\$});
	}
	return;
}

# Counters of Userpilot, and companies that have come, by database and server
sub come
{
	my ($version) = @_;
	my $state = $api->get('/_/state?kind=companies');
	my %come;

	foreach my $id (keys %$state)
	{
		my ($who) = $id =~ /^(\w+ \w+) /;

		$come{$who}++ if $state->{$id}{metadata}{version} == $version;
	}
	return \%come;
}

foreach my $version (1, 2)
{
	my $began = $api->counters->{now};
	my $minutes;

	# all are to begin at once
	$api->pause;
	enqueue($_, $version) foreach @dbs;
	$api->go_on;
	until_true(
		'all are under way',
		sub {
			my $come = come($version);
			return 4 == grep { $come->{$_} >= 10 } keys %$come;
		});
	my @unfinished = grep { $_ < 1900 } values %{ come($version) };
	cmp_ok(scalar(@unfinished), '>=', 2, "round $version: nobody waits for the others to end");
	delivered($node, $_) foreach @dbs;
	$minutes = ($api->counters->{now} - $began) / 60;
	diag(sprintf('round %d: 7,600 companies in %.1f API minutes; %d of 4 unfinished when all were under way',
			$version, $minutes, scalar @unfinished));
}

# Everybody's, in one list
my $elsewhere = $node->safe_psql('second',
	q{SELECT json_agg(json_build_object('id', id, 'metadata', metadata)) FROM sent_meta});
$node->safe_psql('postgres', 'CREATE TABLE elsewhere (id text, metadata jsonb)');
$node->safe_psql('postgres', "INSERT INTO elsewhere SELECT * FROM"
	  . " jsonb_to_recordset('$elsewhere') AS r (id text, metadata jsonb)");
oracle_equals($node, 'postgres', $api, 'all four',
	companies => 'SELECT id, metadata FROM sent_meta UNION ALL SELECT id, metadata FROM elsewhere');

my $counters = $api->counters;
my %jobs;

$jobs{ $_->{status} }++ foreach @{ $api->jobs };
cmp_ok($jobs{completed}, '>=', 8, 'each server had jobs');
is_deeply([ keys %jobs ], ['completed'], '... all completed');
is($counters->{conflicts_own}, 0, 'no job met another');
is($counters->{statuses}{429} // 0, 0, 'no call was above the limit');
cmp_ok($counters->{calls}{identify}, '>', 1200, 'there were more calls than one minute has');
cmp_ok($counters->{max_identify_per_minute}, '>', 300, '... and capacity was used');
foreach my $db (@dbs)
{
	is(dead_letters($node, $db), 0, "$db: nothing died");
	is( $node->safe_psql($db, q{SELECT count(DISTINCT server) FROM userpilot_jobs WHERE status = 'completed'}),
		2, '... and both servers had jobs');
}
no_violations($api, 'shared key');

# The jobs of two databases, each by its own clock, never overlapped
my $times = q{SELECT string_agg(extract(epoch FROM submitted_at) || ' ' || extract(epoch FROM finished_at), ',')
	FROM userpilot_jobs WHERE status = 'completed'};
my @jobs = sort { $a->[0] <=> $b->[0] }
  map { [split] } map { split /,/, $node->safe_psql($_, $times) } @dbs;
is(scalar(grep { $jobs[$_][0] < $jobs[ $_ - 1 ][1] } 1 .. $#jobs),
	0, '... as the databases tell it, too');

# --- one of them is refused the key: the others' limits stay theirs ---

$node->safe_psql('second', q{ALTER USER MAPPING FOR PUBLIC SERVER other OPTIONS (SET api_key 'not-the-key')});
enqueue($_, 3) foreach @dbs;
delivered($node, 'postgres');
is(status($node, 'second', 'other')->{state}, 'paused', 'a server with another key is paused alone');
until_true('its neighbour is not', sub { return (come(3)->{'second userpilot'} // 0) == 1900; });
is(come(3)->{'second other'}, undef, '... and sends nothing');
$node->safe_psql('second', q{ALTER USER MAPPING FOR PUBLIC SERVER other OPTIONS (SET api_key 'test-key')});
delivered($node, 'second');
is_deeply(come(3), { map { ("postgres $_" => 1900, "second $_" => 1900) } keys %servers },
	'then all has come');
$counters = $api->counters;
is($counters->{conflicts_own}, 0, '... one job at a time');
cmp_ok($counters->{max_identify_per_minute}, '<=', 600, '... and within the limit');

# --- a crash: what the others called counts, whoever is at work first ---

my $slow_api  = Userpilot::StandIn->new(scale => 10);
my $other_api = Userpilot::StandIn->new(scale => 10, key => 'another-key');
my $slow_node = new_node('shared_key_crash', scale => 10);
my $each      = 300;

$slow_node->safe_psql('postgres', 'CREATE DATABASE second');
$slow_api->pause;
$other_api->pause;

# As many real-time changes as do not make a job
sub queue_each
{
	my ($db, $server, $at) = @_;

	create_environment($slow_node, $db, $at, server => $server);
	$slow_node->safe_psql(
		$db, qq{
		SET userpilot.server = '$server';
		DO \$\$
		BEGIN
			FOR i IN 1..$each LOOP
				PERFORM userpilot_identify_company('$db $server ' || i, '{"a": 1}');
				IF i % 100 = 0 THEN COMMIT; END IF;
			END LOOP;
		END \$\$});
	return;
}

foreach my $db (@dbs)
{
	queue_each($db, $_, $slow_api) foreach sort keys %servers;
}
queue_each('postgres', "another_$_", $other_api) foreach 1 .. 3;
$other_api->go_on;
$slow_api->go_on;
foreach my $one ($slow_api, $other_api)
{
	until_true('the minute is nearly used up',
		sub { return ($one->counters->{calls}{identify} // 0) >= 540; });
}
$slow_node->stop('immediate');
$slow_node->start;
delivered($slow_node, $_) foreach @dbs;
$counters = $slow_api->counters;
cmp_ok($counters->{calls}{identify}, '>=', 4 * $each, 'a crash: all was called');
cmp_ok($counters->{max_identify_per_minute}, '<=', 600, '... within the limit');
is(scalar(keys %{ $slow_api->get('/_/state?kind=companies') }), 4 * $each, '... and has come');
no_violations($slow_api, 'crash');
is(scalar(keys %{ $other_api->get('/_/state?kind=companies') }), 3 * $each, '... with another key, too');
no_violations($other_api, 'crash, another key');

$slow_node->stop;

# --- more keys than databases: none forgets what another has called ---

my $few = new_node('few', scale => 10, conf => "userpilot.max_databases = 1\n");
my ($one, $two) = map { Userpilot::StandIn->new(history => 5, scale => 10) } 1 .. 2;

$one->foreign_job(100_000);		# so that all goes by calls
create_environment($few, 'postgres', $one);
create_environment($few, 'postgres', $two, server => 'other');
$few->safe_psql(
	'postgres', q{
	DO $$
	BEGIN
		FOR i IN 1..700 LOOP
			PERFORM userpilot_identify_company(i, '{"a": 1}');
			IF i % 100 = 0 THEN COMMIT; END IF;
		END LOOP;
	END $$});
until_true('the minute is used up', sub { return ($one->counters->{calls}{identify} // 0) >= 600; });
$few->safe_psql('postgres', q{SET userpilot.server = 'other'; SELECT userpilot_identify_company('x', '{}')});
delivered($few, 'postgres');
ok(defined $two->entity('companies', 'x'), 'another key has its own minute');
is(scalar(keys %{ $one->get('/_/state?kind=companies') }), 700, '... all has come with the first');
cmp_ok($one->counters->{max_identify_per_minute}, '<=', 600, '... within its limit');
no_violations($one, 'few');

done_testing();
