# The versions of 200 companies rise, and leave by every way at once: single
# calls, a trigger, bulk SELECTs of the present and of the past, and dead
# letters that are retried while newer values come.  Userpilot refuses one call
# in ten, and sometimes a job; no version ever goes down there.  A round is four
# seconds of that, with a check after every ten; 50 rounds are the long form.

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

$Userpilot::PATIENCE = 180;

my $entities = 200;
my $rounds   = $ENV{ROUNDS} || 10;
my $api      = Userpilot::StandIn->new(history => 1_000_000);
my $node     = new_node('versions');
my @children;

sub sql
{
	return $node->safe_psql('postgres', $_[0]);
}

# What is refused is dead at once or, if it is trouble, after a few attempts
create_environment($node, 'postgres', $api, options => "timeout '2', max_attempts '3'");
sql(qq{
	CREATE TABLE accounts (id int PRIMARY KEY, version int NOT NULL);
	CREATE VIEW account_meta AS SELECT id, jsonb_build_object('version', version) AS metadata FROM accounts;
	CREATE TABLE retried (n bigint);
	CREATE FUNCTION to_userpilot() RETURNS trigger LANGUAGE plpgsql AS \$\$
	BEGIN
		PERFORM userpilot_identify_company(NEW.id, jsonb_build_object('version', NEW.version));
		RETURN NULL;
	END \$\$;
	-- by the trigger: even ids
	CREATE TRIGGER to_userpilot AFTER INSERT OR UPDATE ON accounts
		FOR EACH ROW WHEN (NEW.id % 2 = 0) EXECUTE FUNCTION to_userpilot();
	-- by a call after the change, under the row's lock: odd ids
	CREATE FUNCTION single(i int) RETURNS void LANGUAGE plpgsql AS \$\$
	DECLARE
		v int;
	BEGIN
		UPDATE accounts SET version = version + 1 WHERE id = i RETURNING version INTO v;
		PERFORM userpilot_identify_company(i, jsonb_build_object('version', v));
	END \$\$;
	INSERT INTO accounts SELECT i, 0 FROM generate_series(1, $entities) i;
	SELECT count(userpilot_identify_company(id, metadata)::text) FROM account_meta});
delivered($node, 'postgres');

my $bulk = 'SELECT userpilot_bulk_identify_companies(id, metadata) FROM account_meta';

# What sessions do again and again; %d is a random row, %e its even neighbour
my %ways = (
	single  => 'SELECT single(%d)',
	trigger => 'UPDATE accounts SET version = version + 1 WHERE id = %e',
	both    => 'BEGIN; SELECT single(%o); UPDATE accounts SET version = version + 1 WHERE id = %e; COMMIT',
	many    => 'UPDATE accounts SET version = version + 1 WHERE id IN'
	  . ' (SELECT id FROM accounts WHERE id %% 2 = 0 AND id > %d / 2 ORDER BY id FOR UPDATE)',
	bulk    => "$bulk; SELECT pg_sleep(0.3)",
	past    => "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM accounts;"
	  . " SELECT pg_sleep(0.5 * random()); $bulk; COMMIT",
	retry   => 'INSERT INTO retried SELECT userpilot_retry(); SELECT pg_sleep(0.2 * random())');

# A session of one way, until it is told to stop or its parent is gone
sub go_one_way
{
	my ($way) = @_;
	my $parent = getppid;
	my $stop   = 0;
	my @psql   = ($node->installed_command('psql'), '-X', '-q', '-v', 'ON_ERROR_STOP=1',
		'-d', $node->connstr('postgres'));

	local $SIG{TERM} = sub { $stop = 1; };
	open(STDOUT, '>', '/dev/null') or die $!;
	open(STDERR, '>>', $node->basedir . '/errors') or die $!;
	while (!$stop && getppid == $parent)
	{
		my @some = map {
			my $id = 1 + int(rand $entities);
			my %row = (d => $id, e => $id + $id % 2, o => $id - 1 + $id % 2);

			('-c', $ways{$way} =~ s/%([deo])/$row{$1}/gr =~ s/%%/%/gr);
		} 1 .. 5;
		append_to_file($node->basedir . "/did_$way", '.') if system(@psql, @some) == 0;
		usleep(10_000);
	}
	return;
}

sub start_all
{
	foreach my $way (sort keys %ways)
	{
		my $pid = fork // die "fork: $!";

		if ($pid == 0)
		{
			srand($$);
			eval { go_one_way($way) };
			POSIX::_exit(0);
		}
		push @children, $pid;
	}
	return;
}

sub stop_all
{
	local $?;
	kill 'TERM', @children;
	waitpid($_, 0) foreach @children;
	@children = ();
	return;
}

# Refusals and lost answers: nothing here arrives later than it was sent
sub misbehave
{
	my $identify = { path => '/identify$' };
	my $job      = { path => '/bulk_identify$' };

	$api->fault({ status => 422, body => '{"errors":[{"message":"not today"}]}' },
		match => $identify, times => undef, probability => 0.1);
	$api->fault({ status => 500 },       match => $identify, times => undef, probability => 0.05);
	$api->fault({ drop   => 'after' },   match => $identify, times => undef, probability => 0.02);
	$api->fault({ status => 422 },       match => $job,      times => undef, probability => 0.05);
	$api->fault({ job    => 'fail_half' }, match => $job,    times => undef, probability => 0.05);
	$api->fault({ job => 'short', rows => 3 }, match => $job, times => undef, probability => 0.05);
	return;
}

# How often a version came after a higher one, with an example, and how many came
sub judge
{
	my ($down, $came, $example) = (0, 0);

	foreach my $id (1 .. $entities)
	{
		my $highest = -1;

		foreach my $entry (@{ $api->get("/_/history?kind=companies&id=$id") })
		{
			my $version = $entry->{sent}{version};

			$came++;
			if ($version < $highest)
			{
				$down++;
				$example //= "company $id: $version after $highest, by $entry->{source} at $entry->{at}";
			}
			$highest = $version if $version > $highest;
		}
	}
	diag("down, for instance: $example") if $example;
	return ($down, $came);
}

my ($began, $load, $buried) = (time, 0, 0);

foreach my $part (1 .. POSIX::ceil($rounds / 10))
{
	my $some  = $part * 10 > $rounds ? $rounds - 10 * ($part - 1) : 10;
	my $start = time;

	misbehave();
	start_all();
	usleep(4_000_000) foreach 1 .. $some;
	$load += time - $start;
	stop_all();

	# the end: nothing is refused any more, and all dead letters are retried
	$buried += dead_letters($node, 'postgres');
	$api->no_faults;
	delivered($node, 'postgres');
	sql('SELECT userpilot_retry()');
	sql($bulk);
	sql('SELECT count(userpilot_identify_company(id, metadata)::text) FROM account_meta');
	delivered($node, 'postgres');
	is(dead_letters($node, 'postgres'), 0, "part $part: nothing is dead in the end");
	oracle_equals($node, 'postgres', $api, "part $part", companies => 'SELECT * FROM account_meta');
}

my ($down, $came) = judge();
my $retried = sql('SELECT coalesce(sum(n), 0) FROM retried');
my %did = map { $_ => 5 * ((-s $node->basedir . "/did_$_") // 0) } keys %ways;

is($down, 0, 'no version ever went down at Userpilot');
cmp_ok($retried, '>=', 5 * $rounds, 'dead letters were retried meanwhile');
cmp_ok($did{$_}, '>=', $rounds, "... and there was enough of way \"$_\"") foreach sort keys %did;
ok($node->poll_query_until('postgres', 'SELECT NOT EXISTS (SELECT FROM userpilot_queue)'), 'the queue is empty');
no_violations($api, 'versions');
unlike(slurp_file($node->logfile), qr/PANIC|TRAP|was terminated by signal/, 'nothing crashed');
diag(sprintf('%.0f s of load in %.0f s; %d records came; %d dead letters retried meanwhile, %d left at the ends',
		$load, time - $began, $came, $retried, $buried));
diag('transactions: ' . join(', ', map { "$_ $did{$_}" } sort keys %did));
diag('jobs: ' . sql(q{SELECT string_agg(status || ' ' || n, ', ' ORDER BY status)
	FROM (SELECT status, count(*) AS n FROM userpilot_jobs GROUP BY 1) j}));
$node->stop;
done_testing();
