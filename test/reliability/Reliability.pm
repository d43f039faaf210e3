=pod

=head1 NAME

Reliability - what the long runs share: two tables and the verdict

=head1 DESCRIPTION

Every row of accounts and people has a version that only ever rises, and
triggers and bulk SELECTs that send it.  So whatever is done to the processes
meanwhile, three things can be told from outside: whether a version was lost,
whether an older one came after a newer one, and whether Userpilot has one that
the tables do not.  ROUNDS in the environment says how long a run is.

=cut

package Reliability;

use strict;
use warnings;

use Exporter 'import';
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Userpilot;

our @EXPORT = qw(
  $api
  $node
  above_tables
  ended_well
  rounds
  set_up
  sql
  stale
  with_once
);

our ($api, $node);

my ($entities, $once);

my $tables = q{
	CREATE TABLE accounts (id int PRIMARY KEY, version int NOT NULL);
	CREATE TABLE people (id int PRIMARY KEY, account_id int NOT NULL, version int NOT NULL);
	CREATE VIEW account_meta AS
		SELECT id, jsonb_build_object('version', version) AS metadata FROM accounts;
	CREATE VIEW person_meta AS
		SELECT id, jsonb_build_object('version', version) AS metadata,
			account_id::text AS company_id FROM people;
	CREATE FUNCTION account_changed() RETURNS trigger LANGUAGE plpgsql AS $$
	BEGIN
		PERFORM userpilot_identify_company(NEW.id, jsonb_build_object('version', NEW.version));
		RETURN NULL;
	END $$;
	CREATE FUNCTION person_changed() RETURNS trigger LANGUAGE plpgsql AS $$
	BEGIN
		PERFORM userpilot_identify_user(NEW.id, jsonb_build_object('version', NEW.version),
			NEW.account_id);
		RETURN NULL;
	END $$;
	CREATE TRIGGER changed AFTER INSERT OR UPDATE ON accounts
		FOR EACH ROW EXECUTE FUNCTION account_changed();
	CREATE TRIGGER changed AFTER INSERT OR UPDATE ON people
		FOR EACH ROW EXECUTE FUNCTION person_changed();
	INSERT INTO accounts SELECT i, 0 FROM generate_series(1, 300) i;
	INSERT INTO people SELECT i, i, 0 FROM generate_series(1, 300) i};

# A loss among rows that change again and again is made good by the next change.
# These are sent once: by a trigger, in either lane, or by one bulk SELECT; and
# a value that flips there and back must not be believed too early.
my $once_tables = q{
	CREATE TABLE once (id text PRIMARY KEY DEFAULT gen_random_uuid(), value int NOT NULL);
	CREATE TABLE once_in_bulk (LIKE once INCLUDING ALL);
	CREATE TABLE plans (id int PRIMARY KEY, plan text NOT NULL);
	CREATE VIEW company_meta AS
		SELECT id::text, metadata FROM account_meta
		UNION ALL SELECT id, jsonb_build_object('value', value) FROM once
		UNION ALL SELECT id, jsonb_build_object('value', value) FROM once_in_bulk
		UNION ALL SELECT 'plan ' || id, jsonb_build_object('plan', plan) FROM plans;
	CREATE FUNCTION once_inserted() RETURNS trigger LANGUAGE plpgsql AS $$
	BEGIN
		PERFORM userpilot_identify_company(NEW.id, jsonb_build_object('value', NEW.value));
		RETURN NULL;
	END $$;
	CREATE TRIGGER inserted AFTER INSERT ON once
		FOR EACH ROW EXECUTE FUNCTION once_inserted();
	CREATE FUNCTION plan_changed() RETURNS trigger LANGUAGE plpgsql AS $$
	BEGIN
		PERFORM userpilot_identify_company('plan ' || NEW.id, jsonb_build_object('plan', NEW.plan));
		RETURN NULL;
	END $$;
	CREATE TRIGGER changed AFTER INSERT OR UPDATE ON plans
		FOR EACH ROW EXECUTE FUNCTION plan_changed();
	INSERT INTO plans SELECT i, 'a' FROM generate_series(1, 300) i};

=pod

=head1 FUNCTIONS

=over

=item rounds($default)

How many rounds were asked for.

=cut

sub rounds { my ($default) = @_; return $ENV{ROUNDS} || $default; }

=pod

=item set_up($name, conf => '...', options => '...', entities => N, once => 0, init => [...])

Starts stand-in and cluster, everything published; delivers the entities, 300
of a kind unless told otherwise; if once is true, also companies that are sent
once only, which writers then insert.  init is passed to the cluster's init().

=cut

sub set_up
{
	my ($name, %args) = @_;

	$Userpilot::PATIENCE = 300;
	$api  = Userpilot::StandIn->new(history => 100000);
	$node = new_node($name,
		init => $args{init} // [],
		conf => "restart_after_crash = on\nwal_level = logical\n" . ($args{conf} // ''));

	# a crash is nobody's failure, but does count as an attempt
	create_environment($node, 'postgres', $api,
		options => "max_attempts '1000'" . ($args{options} // ''));
	sql('CREATE PUBLICATION everything FOR ALL TABLES');
	$entities = $args{entities} // 300;
	sql($tables =~ s/\(1, 300\)/(1, $entities)/gr);
	$once = $args{once};
	sql($once_tables) if $once;
	delivered($node, 'postgres');
	return;
}

sub sql
{
	my ($statements) = @_;

	return $node->safe_psql('postgres', $statements);
}

=pod

=item with_once()

Whether there are companies that are sent once only.

=cut

sub with_once { return $once; }

=pod

=item stale()

How often an older version came to Userpilot after a newer one, with an example.

=cut

sub stale
{
	my $times = 0;
	my $example;

	foreach my $kind ('companies', 'users')
	{
		foreach my $id (1 .. $entities)
		{
			my $highest = -1;

			foreach my $entry (@{ $api->get("/_/history?kind=$kind&id=$id") })
			{
				my $version = $entry->{sent}{version} // next;

				if ($version < $highest)
				{
					$times++;
					$example //= "$kind $id: $version after $highest, by $entry->{source}";
				}
				$highest = $version if $version > $highest;
			}
		}
	}
	diag("stale, for instance: $example") if $example;
	return $times;
}

=pod

=item above_tables(\%state)

How many entities have a version in that state, as $api->get('/_/state')
returns it, that the tables do not have.

=cut

sub above_tables
{
	my ($state) = @_;
	my %table = (companies => 'accounts', users => 'people');
	my $above = 0;

	foreach my $kind (sort keys %table)
	{
		my %version = map { split /\|/ } split /\n/, sql("SELECT id, version FROM $table{$kind}");

		foreach my $id (keys %{ $state->{$kind} })
		{
			my $sent = $state->{$kind}{$id}{metadata}{version};

			$above++ if defined $sent && $sent > ($version{$id} // -1);
		}
	}
	return $above;
}

=pod

=item ended_well($name)

Tests that all is delivered, nothing died, the queue is empty, and Userpilot
has what the tables say.

=back

=cut

sub ended_well
{
	my ($name) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	delivered($node, 'postgres');
	is(dead_letters($node, 'postgres'), 0, "$name: nothing died");
	ok( $node->poll_query_until('postgres',
			'SELECT NOT EXISTS (SELECT FROM userpilot_queue)'),
		"$name: the queue is empty");
	oracle_equals($node, 'postgres', $api, $name,
		companies => 'SELECT * FROM ' . ($once ? 'company_meta' : 'account_meta'),
		users     => 'SELECT * FROM person_meta');
	no_violations($api, $name);
	return;
}

1;
