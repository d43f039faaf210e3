=pod

=head1 NAME

Userpilot - what the TAP tests share

=head1 DESCRIPTION

The tests need a PostgreSQL cluster with the extension preloaded and the
stand-in for the Userpilot API (test/standin.py), both with clocks that run
equally too fast.  What the stand-in has in the end is compared, record by
record, with what the source tables say: that is the only proof of delivery
that does not rely on the extension's own word.

=cut

package Userpilot;

use strict;
use warnings;

use Exporter 'import';
use FindBin;
use JSON::PP;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time usleep);

use Userpilot::StandIn;

our @EXPORT = qw(
  create_environment
  dead_letters
  delivered
  false
  forget
  new_node
  no_violations
  oracle_equals
  outcomes
  sent_since
  status
  true
  until_true
);

# How many times faster than the clock the API's minutes pass
our $SCALE = 100;

# Any wait that takes longer than this many seconds has failed
our $PATIENCE = 60;

# JSON's truth values, for the stand-in's control endpoints
sub true  { return JSON::PP::true; }
sub false { return JSON::PP::false; }

=pod

=head1 FUNCTIONS

=over

=item new_node($name, scale => N, conf => '...', start => 0, init => [...])

A cluster with the extension preloaded, started unless told otherwise.  init
is passed to its init().

=cut

sub new_node
{
	my ($name, %args) = @_;
	my $scale = $args{scale} // $SCALE;
	my $node  = PostgreSQL::Test::Cluster->new($name);

	$node->init(@{ $args{init} // [] });
	$node->append_conf('postgresql.conf', <<"END");
shared_preload_libraries = 'userpilot'
userpilot.time_scale = $scale
max_connections = 30
max_prepared_transactions = 10
log_min_messages = info
END
	$node->append_conf('postgresql.conf', $args{conf}) if $args{conf};
	$node->start if $args{start} // 1;
	return $node;
}

=pod

=item create_environment($node, $db, $api, server => NAME, options => '...', key_file => PATH, enable => 0)

The extension, a foreign server for the stand-in with these further options,
and its user mapping; enabled unless told otherwise.

=cut

sub create_environment
{
	my ($node, $db, $api, %args) = @_;
	my $server  = $args{server} // 'userpilot';
	my $options = "endpoint '" . $api->url . "'";
	my $key     = $args{key} // $api->key;

	$options .= ", $args{options}" if $args{options};
	$key = $args{key_file} ? "api_key_file '$args{key_file}'" : "api_key '$key'";
	$node->safe_psql(
		$db, qq{
		SET client_min_messages = warning;
		CREATE EXTENSION IF NOT EXISTS userpilot;
		CREATE SERVER $server FOREIGN DATA WRAPPER userpilot OPTIONS ($options);
		CREATE USER MAPPING FOR PUBLIC SERVER $server OPTIONS ($key);
	});
	$node->safe_psql($db, "SELECT userpilot_enable('$server')")
	  if $args{enable} // 1;
	return;
}

=pod

=item delivered($node, $db)

Waits until what was committed so far is delivered or dead.

=cut

sub delivered
{
	my ($node, $db) = @_;
	my ($rc, $out, $err) = $node->psql($db, "CALL userpilot_wait('$PATIENCE s')");

	return if $rc == 0;
	diag($node->safe_psql($db, 'SELECT row_to_json(s) FROM userpilot_status s'));
	diag($node->safe_psql($db,
			'SELECT row_to_json(j) FROM userpilot_jobs j ORDER BY id DESC LIMIT 3'));
	diag($node->safe_psql($db,
		    'SELECT row_to_json(r) FROM userpilot_requests r'
		  . ' ORDER BY id DESC LIMIT 5'));
	die "not delivered: $err";
}

=pod

=item forget($node, $db, @tables)

Empties tables of the extension.  Not by TRUNCATE, whose lock on one table
could wait for the worker while that waits for another.

=cut

sub forget
{
	my ($node, $db, @tables) = @_;

	$node->safe_psql($db, join('', map { "DELETE FROM userpilot_$_;\n" } @tables));
	return;
}

=pod

=item until_true($what, $sub)

Calls the sub until it returns a true value, and returns that.  Dies when
patience ends.

=cut

sub until_true
{
	my ($what, $sub, $patience) = @_;
	my $end = time + ($patience // $PATIENCE);

	while (time < $end)
	{
		my $result = $sub->();

		return $result if $result;
		usleep(50_000);
	}
	die "waited in vain until $what";
}

=pod

=item status($node, $db, $server)

The server's row of userpilot_status, as a hash.

=cut

sub status
{
	my ($node, $db, $server) = @_;

	$server //= 'userpilot';
	return decode_json(
		$node->safe_psql(
			$db,
			'SET client_encoding = utf8; SELECT row_to_json(s)'
			  . " FROM userpilot_status s WHERE server = '$server'"));
}

=pod

=item outcomes($node, $db, $path)

The different outcomes of the calls logged under paths that match, sorted and
joined by commas.

=cut

sub outcomes
{
	my ($node, $db, $path) = @_;

	return $node->safe_psql($db,
		    "SELECT coalesce(string_agg(DISTINCT outcome, ', ' ORDER BY outcome), '')"
		  . " FROM userpilot_requests WHERE path ~ '$path'");
}

=pod

=item dead_letters($node, $db)

How many there are.

=cut

sub dead_letters
{
	my ($node, $db) = @_;

	return $node->safe_psql($db, 'SELECT count(*) FROM userpilot_dead_letters');
}

=pod

=item sent_since($api, $before)

How many identify calls the stand-in has met, less those counted before.

=cut

sub sent_since
{
	my ($api, $before) = @_;

	return $api->counters->{calls}{identify} - ($before // 0);
}

# SQL that lists where the stand-in's state of a kind, in a file, differs from
# what a query says
sub _differences
{
	my ($kind, $file, $query) = @_;
	my $company =
	  $kind eq 'users' ? "|| jsonb_build_object('company_id', q.company_id)" : '';

	return qq{
		SET client_encoding = utf8;
		WITH seen AS (
			SELECT key AS id, value FROM jsonb_each(pg_read_file('$file')::jsonb)
		), wanted AS (
			SELECT q.id::text AS id,
				jsonb_build_object('metadata', jsonb_strip_nulls(q.metadata)) $company AS value
			FROM ($query) AS q
		), different AS (
			SELECT format('%s: Userpilot has %s, the tables say %s', to_json(id),
				left(seen.value::text, 300), left(wanted.value::text, 300)) AS words
			FROM seen FULL JOIN wanted USING (id)
			WHERE seen.value IS DISTINCT FROM wanted.value
		)
		SELECT count(*) || coalesce(' of them: '
			|| array_to_string((array_agg(words))[1:3], '; '), '')
		FROM different};
}

=pod

=item oracle_equals($node, $db, $api, $name, companies => SQL, users => SQL)

Tests that the stand-in has exactly the entities the queries return, each with
exactly that metadata (and company).  The queries have columns id, metadata
and, for users, company_id; null properties count as absent.  A kind without
query must be empty.

=cut

sub oracle_equals
{
	my ($node, $db, $api, $name, %queries) = @_;
	my $none = 'SELECT NULL::text AS id, NULL::jsonb AS metadata,'
	  . ' NULL::text AS company_id WHERE false';
	my $found = '';

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	foreach my $kind ('companies', 'users')
	{
		my $file = $node->basedir . "/state_$kind";
		my $different;

		unlink $file;
		append_to_file($file, $api->raw("/_/state?kind=$kind"));
		$different = $node->safe_psql($db,
			_differences($kind, $file, $queries{$kind} // $none));
		$found .= "$kind differ: $different " if $different ne '0';
	}
	return is($found, '', "$name: Userpilot has what the tables say");
}

=pod

=item no_violations($api, $name)

Tests that the stand-in met nothing that the documentation does not allow.

=cut

sub no_violations
{
	my ($api, $name) = @_;
	my $counters = $api->counters;
	my $calls    = $counters->{max_identify_per_minute};
	my $jobs     = $counters->{max_concurrent_jobs} // 0;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	is_deeply($counters->{violations}, [], "$name: nothing undocumented was sent");
	cmp_ok($calls, '<=', $api->config('requests_per_minute'),
		"$name: at most 600 identify calls in any minute");
	cmp_ok($jobs, '<=', 1, "$name: never two jobs at once");
	return;
}

=pod

=back

=cut

1;
