# A dump restored into a younger cluster: what it holds is ahead of that
# cluster's WAL, and must not pass for newer than all that is to come.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Userpilot;

my $api = Userpilot::StandIn->new;
my $old = new_node('old');
my $new = new_node('new');

sub calls { return $api->counters->{calls}{identify}; }
sub name_of { return $api->entity('companies', $_[0])->{metadata}{name}; }

create_environment($old, 'postgres', $api);

# far ahead of a new cluster, in WAL and in transactions
$old->safe_psql('postgres', 'CREATE TABLE filler (i int)');
$old->safe_psql('postgres', 'INSERT INTO filler VALUES (1); SELECT pg_switch_wal()') for 1 .. 4;
$old->safe_psql('postgres',
	'DO $$ BEGIN FOR i IN 1..3000 LOOP INSERT INTO filler VALUES (i); COMMIT; END LOOP; END $$');

$old->safe_psql('postgres', q{SELECT userpilot_identify_company('a', '{"name":"first","plan":"free"}')});
delivered($old, 'postgres');
$api->fault({ status => 422 }, match => { path => 'identify$', body => 'refused' });
$old->safe_psql('postgres', q{SELECT userpilot_identify_company('b', '{"name":"refused"}')});
delivered($old, 'postgres');
$old->safe_psql('postgres', q{SELECT userpilot_identify_company('b', '{"name":"mended"}')});
delivered($old, 'postgres');
$old->safe_psql('postgres', q{SELECT userpilot_disable('userpilot')});
$old->safe_psql('postgres', q{SELECT userpilot_identify_company('a', '{"name":"second"}')});
$old->safe_psql('postgres', q{SELECT userpilot_identify_company('a', '{"name":"third"}')});
$old->safe_psql('postgres', q{SELECT userpilot_bulk_identify_companies('c', '{"name":"bulk"}')});
is(calls(), 3, 'three calls so far');

command_ok([ 'pg_dump', '-Fc', '-f', $old->basedir . '/dump', $old->connstr('postgres') ], 'pg_dump');
command_ok(
	[ 'pg_restore', '--exit-on-error', '-d', $new->connstr('postgres'), $old->basedir . '/dump' ],
	'pg_restore');
cmp_ok(
	$new->safe_psql('postgres', q{SELECT min(lsn - pg_current_wal_insert_lsn()) FROM userpilot_queue}),
	'>', 0, 'the new cluster is behind');

my (undef, undef, $err) = $new->psql('postgres', "SELECT userpilot_enable('userpilot')");
like($err, qr/rows of bulk SELECTs from another cluster are still queued/, 'bulk rows are refused');
$new->safe_psql('postgres', 'DELETE FROM userpilot_queue WHERE batch IS NOT NULL');
(undef, undef, $err) = $new->psql('postgres', "SELECT userpilot_enable('userpilot')");
like($err, qr/NOTICE:  what is queued and known came from a cluster that is ahead/, 'and then enabled');
delivered($new, 'postgres');
is(name_of('a'), 'third', 'what was pending arrives, in its order');
is(calls(), 4, '... with one call');

$new->safe_psql('postgres', q{SELECT userpilot_identify_company('a', '{"name":"third","plan":"free"}')});
delivered($new, 'postgres');
is(calls(), 4, 'what was acknowledged there is known here');
$new->safe_psql('postgres', q{SELECT userpilot_identify_company('a', '{"name":"fourth"}')});
delivered($new, 'postgres');
is(name_of('a'), 'fourth', 'a new change is newer');
$new->safe_psql('postgres', q{SELECT userpilot_bulk_identify_companies('a', '{"name":"fifth"}')});
delivered($new, 'postgres');
is(name_of('a'), 'fifth', '... and so is a bulk SELECT');

is($new->safe_psql('postgres', 'SELECT userpilot_retry()'), '1', 'a dead letter of then is retried');
delivered($new, 'postgres');
is(name_of('b'), 'mended', '... and is still older than what came after it');

(undef, undef, $err) = $new->psql('postgres', "SELECT userpilot_enable('userpilot')");
is($err, '', 'enabling again changes nothing');
no_violations($api, 'all');
$old->stop;
$new->stop;
done_testing();
