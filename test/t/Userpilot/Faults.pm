=pod

=head1 NAME

Userpilot::Faults - tables whose changes must survive whatever Userpilot does

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
  $kind
  $node
  %answers
  all_there
  bulk_path
  change
  either
  identify_path
  jobs_said
  set_option
  set_up
  sql
  survives
);

our ($api, $node);

# What change() changes: "companies" or "users"
our $kind = 'companies';

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

# Where the API takes them, and the table they come from
my %identify = (companies => '^/v1/companies/identify$', users => '^/v1/identify$');
my %table    = (companies => 'accounts', users => 'people');

# A bulk SELECT of all rows
my %bulk = (
	companies => 'SELECT userpilot_bulk_identify_companies(id, metadata) FROM account_meta',
	users     => 'SELECT userpilot_bulk_identify_users(id, metadata, company_id) FROM people_meta');

=pod

=head1 FUNCTIONS

=over

=item set_up($name, $timeout)

Starts stand-in and cluster, and creates tables of 30 companies and of 30 users,
who move to another company with each version.  Calls may take a second, or as
many as are given.

=cut

sub set_up
{
	my ($name, $timeout) = @_;

	$timeout //= 1;

	# the rare probes of a paused server, after 1 to 15 minutes, come soon
	$Userpilot::SCALE = 600;
	$api  = Userpilot::StandIn->new;
	$node = new_node($name);
	create_environment($node, 'postgres', $api,
		options => "timeout '$timeout', max_attempts '4'");
	sql(q{
		CREATE TABLE accounts (id int PRIMARY KEY, version int NOT NULL);
		CREATE TABLE people (LIKE accounts INCLUDING ALL);
		CREATE VIEW account_meta AS
			SELECT id, jsonb_build_object('version', version) AS metadata FROM accounts;
		CREATE VIEW people_meta AS
			SELECT id, jsonb_build_object('version', version) AS metadata,
				'of ' || version % 3 AS company_id FROM people;
		CREATE FUNCTION to_userpilot() RETURNS trigger LANGUAGE plpgsql AS $$
		BEGIN
			IF TG_RELID = 'accounts'::regclass THEN
				PERFORM userpilot_identify_company(id, metadata) FROM account_meta WHERE id = NEW.id;
			ELSE
				PERFORM userpilot_identify_user(id, metadata, company_id) FROM people_meta WHERE id = NEW.id;
			END IF;
			RETURN NULL;
		END $$;
		CREATE TRIGGER to_userpilot AFTER INSERT OR UPDATE ON accounts
			FOR EACH ROW EXECUTE FUNCTION to_userpilot();
		CREATE TRIGGER to_userpilot AFTER INSERT OR UPDATE ON people
			FOR EACH ROW EXECUTE FUNCTION to_userpilot();
		INSERT INTO accounts SELECT i, 0 FROM generate_series(1, 30) i;
		INSERT INTO people SELECT i, 0 FROM generate_series(1, 30) i;
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

=item either($n)

Takes turns: from now on companies are changed for one $n, users for the next.

=item identify_path(), bulk_path()

What matches the paths of calls about the kind that is being changed.

=cut

sub either
{
	my ($n) = @_;

	$kind = $n % 2 ? 'users' : 'companies';
	return;
}

sub identify_path { return $identify{$kind}; }
sub bulk_path     { return "^/v1/$kind/bulk_identify\$"; }

=pod

=item change($lane)

Changes every row of one kind, through lane "realtime" or "bulk".

=cut

sub change
{
	my ($lane) = @_;
	my $update = "UPDATE $table{$kind} SET version = version + 1";

	return sql($lane eq 'bulk' ?
		  "SET session_replication_role = replica; $update; $bulk{$kind}" : $update);
}

=pod

=item all_there($name)

Tests that Userpilot has what both tables say.

=cut

sub all_there
{
	my ($name) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return oracle_equals($node, 'postgres', $api, $name,
		companies => 'SELECT * FROM account_meta', users => 'SELECT * FROM people_meta');
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

Changes all rows of the kind while a rule of the stand-in is in force, for that path or the
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

	cmp_ok(ref $do eq 'CODE' || $api->fault_hits, '>=', 1, "$kind: $name: it happened");
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
	all_there('...');
	return;
}

1;
