# Userpilot answers anything but what it should, to every sort of call, at
# random, wave after wave, while values flip there and back and bulk SELECTs
# overlap; then it behaves again, and must have what the tables say.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../t", $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes 'usleep';
use Userpilot;
use Reliability;
use Writers;

set_up('answers', options => ", timeout '2'");

# path => [ what may happen, how often ]
my %faults = (
	'/identify$' => [
		0.04, { drop => 'before' }, { drop => 'after' }, { status => 500 }, { status_after => 502 },
		{ status => 429 }, { status => 503 }, { truncate => true }, { garbage => true }
	],
	'/bulk_identify$' => [
		0.1, { drop => 'before' }, { drop => 'after' }, { status => 500 }, { status_after => 500 },
		{ garbage => true }, { status => 413 }, { job => 'fail_half' }, { job => 'fail_none' },
		{ job => 'short', rows => 3 }
	],
	'/background_jobs' => [ 0.1, { status => 503 }, { garbage => true }, { drop => 'after' } ]);

# Values that come back: what was believed of them must not be
my $flip = q{
	CREATE TABLE plans (id int PRIMARY KEY, plan text NOT NULL);
	CREATE VIEW plan_meta AS SELECT 'plan ' || id AS id, jsonb_build_object('plan', plan) AS metadata FROM plans;
	CREATE FUNCTION plan_changed() RETURNS trigger LANGUAGE plpgsql AS $$
	BEGIN
		PERFORM userpilot_identify_company('plan ' || NEW.id, jsonb_build_object('plan', NEW.plan));
		RETURN NULL;
	END $$;
	CREATE TRIGGER changed AFTER INSERT OR UPDATE ON plans FOR EACH ROW EXECUTE FUNCTION plan_changed();
	INSERT INTO plans SELECT i, 'a' FROM generate_series(1, 60) i};

my (%hits, $hits);

sub misbehave
{
	foreach my $path (sort keys %faults)
	{
		my ($probability, @do) = @{ $faults{$path} };

		$api->fault($_, match => { path => $path }, times => undef, probability => $probability)
		  foreach @do;
	}
	return;
}

sub behave
{
	foreach my $rule (@{ $api->get('/_/faults') })
	{
		$hits{ $rule->{match}{path} } += $rule->{hits};
		$hits += $rule->{hits};
	}
	$api->no_faults;
	return;
}

# Everything flips there and back, and is read in bulk meanwhile
sub flip
{
	foreach my $plan ('b', 'a', 'b', 'a')
	{
		sql("UPDATE plans SET plan = '$plan' WHERE random() < 0.7");
		sql('SELECT userpilot_bulk_identify_companies(id, metadata) FROM plan_meta') if rand() < 0.5;
		usleep(rand 400_000);
	}
	return;
}

sub has_all
{
	my ($name) = @_;

	behave();
	delivered($node, 'postgres');
	is(dead_letters($node, 'postgres'), 0, "$name: nothing died");
	oracle_equals($node, 'postgres', $api, $name,
		companies => 'SELECT id::text, metadata FROM account_meta UNION ALL SELECT id, metadata FROM plan_meta',
		users     => 'SELECT * FROM person_meta');
	return;
}

sql($flip);
delivered($node, 'postgres');
my $rounds = rounds(4);

foreach my $round (1 .. $rounds)
{
	my $format = $round % 2 ? 'ndjson' : 'json';

	sql("ALTER SERVER userpilot OPTIONS (" . ($round == 1 ? 'ADD' : 'SET') . " bulk_format '$format')");
	misbehave();
	start_writers(3);
	flip() foreach 1 .. 3;
	stop_writers();
	flip();
	has_all("wave $round, $format");
}
cmp_ok($hits, '>', 10 * $rounds, 'there was enough trouble');
ok($node->poll_query_until('postgres', 'SELECT NOT EXISTS (SELECT FROM userpilot_queue)'),
	'the queue is empty');
no_violations($api, 'all waves');
diag(sprintf('%d waves, %d transactions or more', $rounds, written()));
diag("faults of $_: $hits{$_}") foreach sort keys %hits;
diag('older versions that came after newer ones, on the way: ' . stale());
$node->stop;
done_testing();
