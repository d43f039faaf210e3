# What Userpilot is known to have can be made unknown: then it is sent again,
# but still never an older value over a newer one.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Userpilot;

my $api  = Userpilot::StandIn->new;
my $node = new_node('invalidate');

sub calls { return $api->counters->{calls}{identify}; }

sub send_company
{
	my ($id, $metadata) = @_;

	$node->safe_psql('postgres', "SELECT userpilot_identify_company('$id', '$metadata')");
	$node->safe_psql('postgres', "CALL userpilot_wait('30 s')");
	return;
}

$node->safe_psql('postgres', 'CREATE EXTENSION userpilot');
create_environment($node, 'postgres', $api);

send_company('a', '{"name":"Acme","plan":"free"}');
send_company('b', '{"name":"Best"}');
$node->safe_psql('postgres', q{SELECT userpilot_identify_user('u', '{"role":"admin"}', 'a')});
$node->safe_psql('postgres', "CALL userpilot_wait('30 s')");
is(calls(), 3, 'three calls to begin with');

send_company('a', '{"name":"Acme","plan":"free"}');
is(calls(), 3, 'what is known is not sent again');

is($node->safe_psql('postgres', "SELECT userpilot_invalidate('userpilot', 'company', 'a')"),
	'1', 'one profile made unknown');
is( $node->safe_psql('postgres',
		q{SELECT metadata, versions -> 0 -> 3, versions -> 0 -> 4 FROM userpilot_profiles WHERE entity_id = 'a'}),
	'{}|"name"|"plan"', 'its keys keep their versions');
send_company('a', '{"name":"Acme","plan":"free"}');
is(calls(), 4, 'it is sent again');
send_company('a', '{"name":"Acme","plan":"free"}');
is(calls(), 4, 'and is known then');

is( $node->safe_psql('postgres',
		"SELECT userpilot_invalidate('userpilot', since => now() + interval '1 hour')"),
	'0', 'none was acknowledged since');
is($node->safe_psql('postgres', "SELECT userpilot_invalidate('userpilot')"),
	'3', 'all of them');
$node->safe_psql('postgres', q{SELECT userpilot_identify_user('u', '{}', 'a')});
$node->safe_psql('postgres', "CALL userpilot_wait('30 s')");
is(calls(), 5, "a user's company is unknown, too");

# An older change that comes back finds its key unknown, but written since
$api->fault({ status => 422 }, match => { path => 'identify$', body => 'old' }, times => 1);
$node->safe_psql('postgres', q{SELECT userpilot_identify_company('b', '{"name":"old"}')});
$node->safe_psql('postgres', "CALL userpilot_wait('30 s')");
is($node->safe_psql('postgres', 'SELECT count(*) FROM userpilot_dead_letters'), '1', 'a dead letter');
send_company('b', '{"name":"new"}');
$node->safe_psql('postgres', "SELECT userpilot_invalidate('userpilot')");
is($node->safe_psql('postgres', 'SELECT userpilot_retry()'), '1', 'retried');
$node->safe_psql('postgres', "CALL userpilot_wait('30 s')");
is($api->entity('companies', 'b')->{metadata}{name}, 'new', 'the older value stays away');

# A change that was never sent, and has been overtaken by a bulk SELECT, does not
# come back over it, whichever worker is asked
$node->safe_psql('postgres', q{
	INSERT INTO userpilot_dead_letters (lsn, xid, enqueued_at, bulk, server, kind, entity_id, metadata, error, attempts)
	VALUES (pg_current_wal_insert_lsn(), pg_current_xact_id(), now(), false, 'userpilot', 'company', 'o', '{"name":"overtaken"}', 'mended', 0);
	SELECT userpilot_bulk_identify_companies('o', '{"name":"newer"}'::jsonb);
	CALL userpilot_wait('30 s')});
until_true('the worker leaves', sub { return $node->safe_psql('postgres', 'SELECT userpilot_worker_pid() IS NULL') eq 't'; });
is($node->safe_psql('postgres', q{SELECT userpilot_retry(entity_id => 'o')}), '1', 'a change that was overtaken is retried');
$node->safe_psql('postgres', "CALL userpilot_wait('30 s')");
is($api->entity('companies', 'o')->{metadata}{name}, 'newer', '... and stays away');

# A user whose company is made unknown while a call is under way, which does not
# name it: that stays unknown
$node->safe_psql('postgres', q{SELECT userpilot_identify_user('u', '{"v":1}', 'c'); CALL userpilot_wait('30 s')});
$api->fault({ hang => 1, apply => true }, match => { path => '^/v1/identify$' });
$node->safe_psql('postgres', q{SELECT userpilot_identify_user('u', '{"v":2}')});
until_true('it is called', sub { return $api->fault_hits; });
$node->safe_psql('postgres', q{SELECT userpilot_invalidate('userpilot', 'user', 'u'); CALL userpilot_wait('30 s')});
$api->no_faults;
is($node->safe_psql('postgres', q{SELECT metadata, company_id IS NULL FROM userpilot_profiles WHERE kind = 'user' AND entity_id = 'u'}),
	'{"v": 2}|t', 'what was acknowledged is learnt, and nothing else');

# While it is not committed a worker that starts waits for it; that must not be
# taken for an older bulk SELECT that may come to an end later
send_company('known', '{"name":"Acme"}');
until_true('the worker leaves', sub { return $node->safe_psql('postgres', 'SELECT userpilot_worker_pid() IS NULL') eq 't'; });
my $open = $node->background_psql('postgres');
$open->query_safe("BEGIN; SELECT userpilot_invalidate('userpilot', 'company', 'b')");
$node->safe_psql('postgres', q{SELECT userpilot_identify_company('wakes', '{}')});
until_true(
	'the worker waits',
	sub {
		return $node->safe_psql('postgres', q{SELECT count(*) FROM pg_locks WHERE NOT granted
			AND relation = 'userpilot_profiles'::regclass}) > 0;
	});
is( $node->safe_psql('postgres', q{SELECT count(*) FROM pg_locks h JOIN pg_locks w USING (pid) WHERE h.granted AND NOT w.granted
		AND h.classid = 'pg_extension'::regclass AND w.relation = 'userpilot_profiles'::regclass}),
	1, 'DROP EXTENSION would wait for it with no table locked');
like(status($node, 'postgres')->{advice}, qr/^the worker waits for a lock: process \d+ holds it$/, '... and status says for whom');
is($open->query_safe(q{SELECT userpilot_bulk_identify_companies('known', '{"name":"Acme"}'::jsonb)}),
	0, 'a bulk SELECT in the same transaction leaves out what Userpilot has');
$open->query_safe('COMMIT');
$open->quit;
$node->safe_psql('postgres', "CALL userpilot_wait('30 s')");

# A job that was acknowledged, and not yet learnt when its worker died
sub acknowledged
{
	my ($id) = @_;

	$node->safe_psql('postgres', qq{
		INSERT INTO userpilot_jobs (id, server, kind, format, records, bytes, status, finished_at)
		  SELECT $id, server, kind, 'json', 1, 50, 'completed', now() - interval '1 min' FROM userpilot_profiles WHERE entity_id = 'b';
		INSERT INTO userpilot_job_chunks (job, seq, records)
		  VALUES ($id, 0, '{"company_id": "b", "metadata": {"name": "job $id"}}' || chr(10));
		UPDATE userpilot_profiles SET job = $id, metadata = '{}' WHERE entity_id = 'b'});
	return;
}

sub learnt
{
	$node->safe_psql('postgres', q{SELECT userpilot_enable('userpilot')});
	until_true('a worker has dealt with it',
		sub { return $node->safe_psql('postgres', 'SELECT count(*) FROM userpilot_job_chunks') == 0; });
	my $known = $node->safe_psql('postgres', q{SELECT metadata ->> 'name', job FROM userpilot_profiles WHERE entity_id = 'b'});
	$node->safe_psql('postgres', q{SELECT userpilot_disable('userpilot')});
	until_true('the worker leaves', sub { return $node->safe_psql('postgres', 'SELECT userpilot_worker_pid() IS NULL') eq 't'; });
	return $known;
}

$node->safe_psql('postgres', q{SELECT userpilot_disable('userpilot')});
until_true('the worker leaves', sub { return $node->safe_psql('postgres', 'SELECT userpilot_worker_pid() IS NULL') eq 't'; });
acknowledged(1001);
is(learnt(), 'job 1001|', 'an acknowledged job is learnt by the next worker');
acknowledged(1002);
$node->safe_psql('postgres', q{SELECT userpilot_invalidate('userpilot', since => now())});
is(learnt(), 'job 1002|', '... unless it was made unknown');
acknowledged(1003);
is($node->safe_psql('postgres', q{SELECT userpilot_invalidate('userpilot', since => now() - interval '2 min')}) > 0,
	1, 'what was acknowledged since then includes it');
is(learnt(), '|', '... and then it stays unknown');

my ($rc, undef, $err) = $node->psql('postgres', "SELECT userpilot_invalidate('nosuch')");
like($err, qr/server "nosuch" does not exist/, 'no such server');
(undef, undef, $err) = $node->psql('postgres', "SELECT userpilot_invalidate('userpilot', kind => 'companies')");
like($err, qr/kind must be "company" or "user", not "companies"/, 'no such kind');
$node->safe_psql('postgres', 'CREATE ROLE stranger');
($rc, undef, $err) = $node->psql('postgres',
	"SET ROLE stranger; SELECT userpilot_invalidate('userpilot')");
like($err, qr/must be owner of foreign server "userpilot"/, 'for its owner only');

no_violations($api);
$node->stop;
done_testing();
