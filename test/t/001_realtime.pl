# Real time: what a transaction queues reaches Userpilot soon after it commits,
# and only then; what Userpilot has is not sent again.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use JSON::PP;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Userpilot;

my $api  = Userpilot::StandIn->new;
my $node = new_node('realtime');
my ($rc, $out, $err);

# --- the check procedure, step by step ---

$node->safe_psql('postgres', 'CREATE EXTENSION userpilot');
(undef, undef, $err) = $node->psql('postgres', 'CALL userpilot_check()');
like($err, qr/server "userpilot" does not exist/, 'check: no server');
like($err, qr/CREATE SERVER userpilot/,           'check: says how to make one');

create_environment($node, 'postgres', $api, key => 'wrong-key', enable => 0);
($rc, undef, $err) = $node->psql('postgres', 'CALL userpilot_check()');
is($rc, 0, 'check succeeds whatever it finds');
like($err, qr/INFO: .*\[ok\] the launcher is running/, 'check: launcher');
like($err, qr/INFO: .*\[!!\] disabled: SELECT userpilot_enable\('userpilot'\)/,
	'check: not enabled');
like($err, qr/INFO: .*\[!!\] the API key is not accepted/, 'check: wrong key');
unlike($err, qr/wrong-key/, 'check does not show the key');

$node->safe_psql('postgres',
	"ALTER USER MAPPING FOR PUBLIC SERVER userpilot OPTIONS (SET api_key 'test-key');"
	  . "SELECT userpilot_enable('userpilot')");
(undef, undef, $err) = $node->psql('postgres', "CALL userpilot_check('userpilot')");
like($err, qr/INFO: .*\[ok\] this database is the sender/, 'check: enabled');
like($err, qr/INFO: .*\[ok\] http:\S+ is reached/,         'check: reachable');
like($err, qr/INFO: .*\[ok\] the API key is accepted/,     'check: right key');
like($err, qr/INFO: .*\[ok\] the job slot is free/,        'check: slot free');
unlike($err, qr/\[!!\]/, 'check: nothing is wrong');

$api->foreign_job(10000);
(undef, undef, $err) = $node->psql('postgres', 'CALL userpilot_check()');
like($err, qr/the job slot is held by job/, 'check: slot taken');
$api->finish_jobs;

($rc, undef, $err) = $node->psql('postgres', "BEGIN;\nCALL userpilot_check();");
isnt($rc, 0, 'check refuses a transaction block');

# The wrong key of above counts as a violation
$api->reset;

# --- one company, one user, their changes ---

sub company { return $api->entity('companies', $_[0]); }
sub user    { return $api->entity('users', $_[0]); }

sub sql
{
	return $node->safe_psql('postgres', $_[0]);
}

# Runs SQL, waits until all is delivered
sub deliver
{
	sql($_[0]);
	delivered($node, 'postgres');
	return;
}

deliver(q{SELECT userpilot_identify_company('c1', '{"name":"Acme","spend":1000.5,"trial":false,"plan":"x"}')});
is_deeply(
	company('c1'),
	{ metadata => { name => 'Acme', spend => 1000.5, trial => JSON::PP::false, plan => 'x' } },
	'a company arrives');
deliver(q{SELECT userpilot_identify_user(42, '{"name":"Jane"}', 'c1')});
is_deeply(
	user('42'),
	{ metadata => { name => 'Jane' }, company_id => 'c1' },
	'a user arrives, with the company');
is($node->safe_psql('postgres', 'SELECT count(*) FROM userpilot_queue'),
	0, 'acknowledged rows leave the queue');

deliver(q{SELECT userpilot_identify_company('c1', '{"plan":null}')});
is_deeply(
	company('c1'),
	{ metadata => { name => 'Acme', spend => 1000.5, trial => JSON::PP::false } },
	'null removes a property');

my $calls = sent_since($api);
deliver(q{SELECT userpilot_identify_company('c1', '{"name":"Acme","spend":1000.5,"plan":null}');
	SELECT userpilot_identify_user(42, '{"name":"Jane"}', 'c1')});
is(sent_since($api, $calls), 0, 'equal values are not sent again');
is($node->safe_psql('postgres', 'SELECT count(*) FROM userpilot_queue'),
	0, '... and leave the queue too');

deliver(q{SELECT userpilot_identify_user(42, '{"name":"Jane D"}')});
is(user('42')->{company_id}, 'c1', 'without company a user stays');
deliver(q{SELECT userpilot_identify_user(42, NULL, 'c2')});
is_deeply(
	user('42'),
	{ metadata => { name => 'Jane D' }, company_id => 'c2' },
	'with another company a user moves');

# --- transactions ---

deliver(q{BEGIN; SELECT userpilot_identify_company('gone', '{"a":1}'); ROLLBACK;
	SELECT userpilot_identify_company('stays', '{"a":1}')});
is(company('gone'), undef, 'a rollback sends nothing');
ok(company('stays'), '... and later commits do');

deliver(q{BEGIN;
	SELECT userpilot_identify_company('before', '{"a":1}');
	SAVEPOINT s;
	SELECT userpilot_identify_company('within', '{"a":1}');
	SELECT userpilot_identify_company('before', '{"a":2}');
	ROLLBACK TO s;
	SELECT userpilot_identify_company('after', '{"a":1}');
	COMMIT});
is(company('within'), undef, 'what a savepoint takes back is not sent');
is(company('before')->{metadata}{a}, 1, '... nor is a newer value of another');
ok(company('after'), '... the rest is');

# --- a table whose trigger calls the functions ---

sql(q{
	CREATE TABLE accounts (id text PRIMARY KEY, name text, clicks int);
	CREATE FUNCTION to_userpilot() RETURNS trigger LANGUAGE plpgsql AS $$
	BEGIN
		PERFORM userpilot_identify_company(NEW.id,
			jsonb_build_object('name', NEW.name, 'clicks', NEW.clicks));
		RETURN NULL;
	END $$;
	CREATE TRIGGER to_userpilot AFTER INSERT OR UPDATE ON accounts
		FOR EACH ROW EXECUTE FUNCTION to_userpilot();
});
$api->reset;
forget($node, 'postgres', 'profiles');

my @accounts = (companies =>
	  q{SELECT id, jsonb_build_object('name', name, 'clicks', clicks) AS metadata FROM accounts});

sub accounts_equal
{
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return oracle_equals($node, 'postgres', $api, $_[0], @accounts);
}

deliver(q{INSERT INTO accounts SELECT 'acc' || i, 'Account ' || i, i FROM generate_series(1, 50) i});
accounts_equal('inserted by trigger');
deliver('UPDATE accounts SET clicks = clicks + 1 WHERE clicks % 2 = 0');
accounts_equal('updated by trigger');

# While the first call is under way, all further versions come
$api->fault({ hang => 0.3, apply => true }, match => { body => 'hot' });
$calls = sent_since($api);
deliver(q{INSERT INTO accounts VALUES ('hot', 'Hot', 0);
	DO $$ BEGIN FOR i IN 1 .. 1000 LOOP
		UPDATE accounts SET clicks = i WHERE id = 'hot'; COMMIT;
	END LOOP; END $$});
accounts_equal('1,000 commits on one row');
cmp_ok(sent_since($api, $calls), '<=', 300, '... take few calls');

deliver(q{DO $$ BEGIN FOR i IN 1 .. 1000 LOOP
		UPDATE accounts SET clicks = -i WHERE id = 'hot';
	END LOOP; END $$});
accounts_equal('1,000 updates in one transaction');

# --- ids and values of all sorts ---

sql(q{CREATE FUNCTION odd_ids() RETURNS SETOF text LANGUAGE sql AS $$
	VALUES (E'quote" and \'apostrophe\''), (E'back\\slash'), (E'line\nbreak\r'), (E'tab\t'),
		(E'\u0001\u001f\u007f'), (U&'four bytes: \+01F600 \+010FFFF'), ('100%41'), ('a/b/../c?d=e&f#g'),
		('bulk:jobs:NX-1:2'), (' '), ('{"json":true}'), ('null'), (U&'\2028\FEFF'), (repeat('x', 512)) $$});
deliver(q{INSERT INTO accounts SELECT id, 'name of ' || id FROM odd_ids() AS id});
accounts_equal('odd ids and values');
sql('DELETE FROM accounts');
$api->reset;
forget($node, 'postgres', 'profiles');
deliver(q{SELECT userpilot_identify_user(id, jsonb_build_object(left(id, 255), id), id) FROM odd_ids() AS id});
oracle_equals($node, 'postgres', $api, 'odd users',
	users => 'SELECT id, jsonb_build_object(left(id, 255), id) AS metadata, id AS company_id FROM odd_ids() AS id');
no_violations($api, 'real time');

# --- a database that is not UTF-8, and a second one for the same cluster ---

my $latin_api = Userpilot::StandIn->new;

$node->safe_psql('postgres',
	q{CREATE DATABASE latin TEMPLATE template0 ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C'});
create_environment($node, 'latin', $latin_api);
$node->safe_psql('latin', q{SELECT userpilot_identify_company(chr(233) || '1',
	jsonb_build_object(chr(252), 'Caf' || chr(233)))});
delivered($node, 'latin');
is_deeply(
	$latin_api->get('/_/state?kind=companies'),
	{ "\xe91" => { metadata => { "\xfc" => "Caf\xe9" } } },
	'LATIN1 becomes UTF-8');
$node->safe_psql('latin', q{SELECT userpilot_bulk_identify_users(chr(233) || i,
	jsonb_build_object(chr(252), 'Caf' || chr(233)), chr(233) || '1') FROM generate_series(1, 20) i});
delivered($node, 'latin');
oracle_equals($node, 'latin', $latin_api, 'LATIN1',
	companies => q{SELECT chr(233) || '1' AS id, jsonb_build_object(chr(252), 'Caf' || chr(233)) AS metadata},
	users => q{SELECT chr(233) || i AS id, jsonb_build_object(chr(252), 'Caf' || chr(233)) AS metadata,
		chr(233) || '1' AS company_id FROM generate_series(1, 20) i});
no_violations($latin_api, 'LATIN1');

# --- an encoding with holes: what UTF-8 has no equivalent for holds nothing up ---

$latin_api->reset;
$node->safe_psql('postgres',
	q{CREATE DATABASE holes TEMPLATE template0 ENCODING 'WIN1252' LC_COLLATE 'C' LC_CTYPE 'C'});
create_environment($node, 'holes', $latin_api);
foreach my $call (
	q{userpilot_identify_company('1', jsonb_build_object('a', chr(129)))},
	q{userpilot_identify_company('1', jsonb_build_object(chr(129), 'a'))},
	q{userpilot_identify_company(chr(129), '{}')},
	q{userpilot_identify_user('1', '{}', chr(129))},
	q{userpilot_bulk_identify_companies('1', jsonb_build_object('a', chr(129)))})
{
	my (undef, undef, $err) = $node->psql('holes', "\\set VERBOSITY verbose\nSELECT $call");

	like($err, qr/22P05: .* has a character without an equivalent in UTF-8.*WIN1252/s, "refused: $call");
}
(undef, undef, $err) = $node->psql('holes', q{
	CREATE TABLE accounts (id int, name text);
	CREATE TRIGGER to_userpilot AFTER INSERT ON accounts FOR EACH ROW
		EXECUTE FUNCTION userpilot_company_trigger('id', 'name');
	INSERT INTO accounts VALUES (1, chr(129)), (2, chr(128))});
like($err, qr/WARNING:  not sent to Userpilot/, '... by a trigger with a warning');
delivered($node, 'holes');
is($node->safe_psql('holes', 'SELECT entity_id, error FROM userpilot_dead_letters'),
	'1|trigger "to_userpilot" of table "accounts": metadata."name" has a character without an equivalent in UTF-8', '... it is a dead letter');
is($node->safe_psql('holes', 'SELECT userpilot_retry()'), 0, '... and stays one');
is_deeply(
	$latin_api->get('/_/state?kind=companies'),
	{ 2 => { metadata => { name => "\x{20ac}" } } },
	'... and what follows it arrives');
no_violations($latin_api, 'WIN1252');

# --- two servers in one database ---

my $second = Userpilot::StandIn->new(key => 'second-key');

create_environment($node, 'postgres', $second, server => 'second');
$api->reset;
deliver(q{SELECT userpilot_identify_company('both', '{"at":"first"}');
	SET userpilot.server = 'second';
	SELECT userpilot_identify_company('both', '{"at":"second"}');
	SELECT userpilot_bulk_identify_companies('bulk' || i, '{}') FROM generate_series(1, 3) i});
is(company('both')->{metadata}{at}, 'first', 'the first server has its own');
is($second->entity('companies', 'both')->{metadata}{at}, 'second', 'the second has its own');
is(scalar(keys %{ $second->get('/_/state?kind=companies') }), 4, '... and its own bulk jobs');
is(scalar(keys %{ $api->get('/_/state?kind=companies') }), 1, '... which the first has not');
no_violations($second, 'second server');

# --- userpilot_wait ---

($rc, undef, $err) = $node->psql('postgres', q{BEGIN;
	SELECT userpilot_identify_company('w', '{}'); CALL userpilot_wait('1 s');});
like($err, qr/this transaction has made changes that are not committed/,
	'wait refuses a transaction that has queued');
($rc, undef, $err) = $node->psql('postgres',
	q{BEGIN ISOLATION LEVEL REPEATABLE READ; CALL userpilot_wait('1 s');});
like($err, qr/cannot be called in a repeatable read/, 'wait refuses a frozen snapshot');
is(company('w'), undef, 'what it was refused for is not sent');

$api->pause;
sql(q{SELECT userpilot_identify_company('waiting', '{}')});
($rc, undef, $err) =
  $node->psql('postgres', "\\set VERBOSITY verbose\nCALL userpilot_wait('0.2 s')");
isnt($rc, 0, 'wait fails at its timeout');
like($err, qr/ERROR:  57014/, '... as a cancelled query');

# --- the processes, while the worker waits for an answer ---

is( sql(q{SELECT string_agg(backend_type, ', ' ORDER BY backend_type) FROM pg_stat_activity
	WHERE backend_type LIKE 'userpilot%' AND coalesce(datname, 'postgres') = 'postgres'}),
	'userpilot launcher, userpilot worker',
	'both processes have names');
my $worker = sql('SELECT worker FROM userpilot_status WHERE server = $$userpilot$$');
is(sql("SELECT count(*) FROM pg_stat_activity WHERE pid = $worker AND datname = 'postgres'"),
	1, 'the status view names the worker');
SKIP:
{
	skip 'wait events of extensions have names from 17 on', 1
	  if $node->pg_version < 17;
	ok($node->poll_query_until('postgres', q{SELECT array_agg(wait_event ORDER BY wait_event)
		= '{UserpilotLauncherMain,UserpilotWorkerMain}' FROM pg_stat_activity
		WHERE backend_type LIKE 'userpilot%' AND coalesce(datname, 'postgres') = 'postgres'}),
		'both wait under their own names');
}
$api->go_on;
delivered($node, 'postgres');
ok(company('waiting'), 'the answer comes at last');

ok($node->poll_query_until('postgres', 'SELECT userpilot_worker_pid() IS NULL'),
	'the worker leaves after an idle minute');
ok($node->poll_query_until('postgres',
		q{SELECT count(*) = 0 FROM pg_stat_activity WHERE backend_type = 'userpilot worker'}),
	'... so that no worker is there');
deliver(q{SELECT userpilot_identify_company('back', '{}')});
ok(company('back'), 'the next commit starts one again');
is(status($node, 'postgres')->{state}, 'idle', 'then all is idle');

# --- the tables as a DBA may leave them ---

sql(q{UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'userpilot_queue_look'::regclass});
deliver(q{SELECT userpilot_identify_company('unindexed', '{"a":1}')});
deliver(q{SELECT userpilot_identify_company('unindexed', '{"a":2}');
	SELECT userpilot_bulk_identify_companies('beside ' || i, '{}') FROM generate_series(1, 3) i});
is(company('unindexed')->{metadata}{a}, 2, 'looks do without their index while it is not valid');
sql(q{UPDATE pg_index SET indisvalid = true WHERE indexrelid = 'userpilot_queue_look'::regclass});

sql(q{CREATE TABLE learnt (op text, id text);
	CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog AS
	$$BEGIN INSERT INTO public.learnt VALUES (TG_WHEN || ' ' || TG_OP, NEW.entity_id); RETURN NEW; END$$;
	CREATE TRIGGER before BEFORE INSERT OR UPDATE ON userpilot_profiles FOR EACH ROW EXECUTE FUNCTION note();
	CREATE TRIGGER after AFTER INSERT OR UPDATE ON userpilot_profiles FOR EACH ROW EXECUTE FUNCTION note()});
deliver(q{SELECT userpilot_identify_company('noted', '{"a":1}');
	SELECT count(userpilot_identify_company('too ' || i, '{"a":1}')::text) FROM generate_series(1, 50) i});
is(sql(q{SELECT string_agg(op, ', ') FROM learnt WHERE id = 'noted'}),
	'BEFORE INSERT, AFTER INSERT, BEFORE UPDATE, AFTER UPDATE', 'triggers on profiles see mark and answer');
unlike(slurp_file($node->logfile), qr/leak|was not closed/, '... and leave nothing open');
sql('DROP TRIGGER before ON userpilot_profiles; DROP TRIGGER after ON userpilot_profiles; DROP TABLE learnt');

# The profile goes while the worker waits for its lock: a mark's, an answer's
foreach my $waits ('mark', 'answer')
{
	my $holder = $node->background_psql('postgres');

	deliver(qq{SELECT userpilot_identify_company('gone $waits', '{"a":1}')});
	if ($waits eq 'mark')
	{
		$holder->query_safe(qq{BEGIN; DELETE FROM userpilot_profiles WHERE entity_id = 'gone $waits'});
		sql(qq{SELECT userpilot_identify_company('gone $waits', '{"a":2}')});
	}
	else
	{
		$api->pause;
		sql(qq{SELECT userpilot_identify_company('gone $waits', '{"a":2}')});
		until_true('it is marked',
			sub { return sql(qq{SELECT attempts FROM userpilot_profiles WHERE entity_id = 'gone $waits'}) == 1; });
		$holder->query_safe(qq{BEGIN; DELETE FROM userpilot_profiles WHERE entity_id = 'gone $waits'});
		$api->go_on;
	}
	ok( $node->poll_query_until('postgres',
			q{SELECT count(*) = 1 FROM pg_locks l JOIN pg_stat_activity a USING (pid)
			WHERE a.backend_type = 'userpilot worker' AND l.locktype = 'transactionid' AND NOT l.granted}),
		"the $waits waits for who deletes the profile");
	$holder->query_safe('COMMIT');
	$holder->quit;
	delivered($node, 'postgres');
	is(sql(qq{SELECT metadata, synced_at > now() - interval '1 hour' FROM userpilot_profiles
			WHERE entity_id = 'gone $waits'}), '{"a": 2}|t', '... and makes a new one');
}

# --- prepared transactions ---

sql(q{BEGIN; SELECT userpilot_identify_company('prepared yes', '{"a":1}'); PREPARE TRANSACTION 'yes';
	BEGIN; SELECT userpilot_identify_company('prepared no', '{"a":1}'); PREPARE TRANSACTION 'no';
	BEGIN; SELECT userpilot_identify_company('prepared later', '{"a":1}');
	SELECT userpilot_bulk_identify_companies('later ' || i, '{}') FROM generate_series(1, 3) i;
	PREPARE TRANSACTION 'later'});
deliver(q{SELECT userpilot_identify_company('other', '{"a":1}')});
ok(company('other'), 'prepared transactions hold nobody up');
is(company('prepared yes'), undef, '... and are not sent before they are decided');
sql(q{ROLLBACK PREPARED 'no'});
deliver(q{COMMIT PREPARED 'yes'});
ok(company('prepared yes'), 'COMMIT PREPARED is delivered');
is(company('prepared no'), undef, 'ROLLBACK PREPARED is not');

# Nobody tells the worker when: decided as soon as it is prepared, its bulk rows
# are found although there is never a quiet minute
sql(q{BEGIN; SELECT userpilot_bulk_identify_companies('at once ' || i, '{}') FROM generate_series(1, 3) i;
	PREPARE TRANSACTION 'at once'; COMMIT PREPARED 'at once'});
my $beat = 0;
until_true('they come', sub {
	sql(q{SELECT userpilot_identify_company('beat', jsonb_build_object('n', } . ++$beat . '))');
	return defined company('at once 3');
});
ok($beat, 'what is decided at once is delivered beside other changes');

$node->restart;
is(company('prepared later'), undef, 'what is prepared survives a restart undelivered');
deliver(q{COMMIT PREPARED 'later'});
ok(company('prepared later'), '... and is delivered after its COMMIT PREPARED');
ok(company('later 3'), '... its bulk rows too');

is(dead_letters($node, 'postgres'), 0, 'nothing died');
no_violations($api, 'all');

done_testing();
