=pod

=head1 NAME

Userpilot::Faults - a table whose changes must survive whatever Userpilot does

=cut

package Userpilot::Faults;

use strict;
use warnings;

use Exporter 'import';
use PostgreSQL::Test::Utils;
use Test::More;
use Userpilot;

our @EXPORT = qw(
  $api
  $node
  %answers
  change
  jobs_said
  set_option
  set_up
  sql
  survives
);

our ($api, $node);

# Answers that every call may meet
our %answers = (
	'500'                => { status => 500 },
	'500 after applying' => { status_after => 500, body => 'oops' },
	'502'                => {
		status  => 502,
		body    => '<html>Bad gateway</html>',
		headers => { 'content-type' => 'text/html' }
	},
	'503'                  => { status => 503 },
	'503 with Retry-After' => { status => 503, headers => { 'Retry-After' => '3' } },
	'429'                  => { status => 429 },
	'429 with Retry-After' => { status => 429, headers => { 'Retry-After' => '5' } },
	'408'                  => { status => 408 },
	'401'                  => { status => 401 },
	'403'                  => { status => 403 },
	'silence'              => { hang => 4 },
	'late answer'          => { hang => 0.4, apply => Userpilot::true },
	'too late an answer'   => { hang => 3, apply => Userpilot::true },
	'closed before'        => { drop => 'before' },
	'closed after'         => { drop => 'after' },
	'truncated'            => { truncate => Userpilot::true },
	'garbage'              => { garbage => Userpilot::true },
	'oversized'            => { oversized => 3 },
	'a page of HTML'       => { content_type => 'text/html' },
	'dripping'             => { drip => 50 },
);

# What a change of all rows does, by lane
my %change = (
	realtime => 'UPDATE accounts SET version = version + 1',
	bulk     => q{
		SET session_replication_role = replica;
		UPDATE accounts SET version = version + 1;
		SELECT userpilot_bulk_identify_companies(id, metadata) FROM account_meta});

=pod

=head1 FUNCTIONS

=over

=item set_up($name, $timeout)

Starts stand-in and cluster, and creates a table of 30 companies.  Calls may
take a second, or as many as are given.

=cut

sub set_up
{
	my ($name, $timeout) = @_;

	$timeout //= 1;

	# the rare probe of a paused server, every 15 minutes, comes soon
	$Userpilot::SCALE = 600;
	$api  = Userpilot::StandIn->new;
	$node = new_node($name);
	create_environment($node, 'postgres', $api,
		options => "timeout '$timeout', max_attempts '4'");
	sql(q{
		CREATE TABLE accounts (id int PRIMARY KEY, version int NOT NULL);
		CREATE VIEW account_meta AS
			SELECT id, jsonb_build_object('version', version) AS metadata FROM accounts;
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
	return;
}

sub sql
{
	my ($statements) = @_;

	return $node->safe_psql('postgres', $statements);
}

=pod

=item change($lane)

Changes every row, through lane "realtime" or "bulk".

=cut

sub change
{
	my ($lane) = @_;

	return sql($change{$lane});
}

=pod

=item set_option($name, $value)

Sets an option that the server has, or adds it, and waits until no worker is
there that knows the old one.

=cut

sub set_option
{
	my ($name, $value) = @_;
	my $action = sql("SELECT CASE WHEN srvoptions::text ~ '$name=' THEN 'SET' ELSE 'ADD' END"
		  . ' FROM pg_foreign_server');

	sql("ALTER SERVER userpilot OPTIONS ($action $name '$value')");
	$node->poll_query_until('postgres', 'SELECT userpilot_worker_pid() IS NULL')
	  or die 'the worker does not leave';
	return;
}

=pod

=item jobs_said()

Status and records of each job since the last survives().

=cut

sub jobs_said
{
	return sql(q{SELECT string_agg(status || ' ' || records, ', ' ORDER BY id) FROM userpilot_jobs});
}

=pod

=item survives($name, $do, $path, $lane, $outcome, times => N, at => PATH)

Changes all rows while a rule of the stand-in is in force, for that path or the
one given as "at"; tests that the rule acted, that the request log names the
outcome for that path, that nothing died and that all has arrived.  A rule may
be a sub to call instead.

=back

=cut

sub survives
{
	my ($name, $do, $path, $lane, $outcome, %rule) = @_;

	my $at = delete $rule{at} // $path;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	forget($node, 'postgres', 'requests', 'jobs');
	ref $do eq 'CODE' ? $do->() : $api->fault($do, match => { path => $at }, %rule);
	change($lane);
	delivered($node, 'postgres');

	cmp_ok(ref $do eq 'CODE' || $api->fault_hits, '>=', 1, "$name: it happened");
	$api->no_faults;
	like(outcomes($node, 'postgres', $path), $outcome, '... and was logged for what it is')
	  or diag($name);
	until_true(
		'jobs are over and payloads dropped',
		sub {
			return sql(q{SELECT (SELECT count(*) FROM userpilot_job_chunks)
				+ (SELECT count(*) FROM userpilot_jobs WHERE finished_at IS NULL)}) eq '0';
		});
	is(dead_letters($node, 'postgres'), 0, '... nothing died');
	oracle_equals($node, 'postgres', $api, '...', companies => 'SELECT * FROM account_meta');
	return;
}

1;
