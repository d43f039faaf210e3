# A sync declared in one CREATE TRIGGER: whatever is done to a table, by
# whomever, Userpilot has its rows in the end, with as few calls as can be.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes 'time';
use Userpilot;

my ($api, $node);

sub sql
{
	return $node->safe_psql('postgres', $_[0]);
}

# --- a thousand updates of a row, by the real clock ---

$Userpilot::SCALE = 1;
$api  = Userpilot::StandIn->new;
$node = new_node('paced');
create_environment($node, 'postgres', $api);
sql(q{
	CREATE TABLE accounts (id int PRIMARY KEY, n int, seen int);
	CREATE TRIGGER to_userpilot AFTER INSERT OR UPDATE ON accounts FOR EACH ROW
		EXECUTE FUNCTION userpilot_company_trigger('id', 'n');
	INSERT INTO accounts VALUES (1, 0), (2, 0);
});
delivered($node, 'postgres');
is(sent_since($api), 2, 'two rows, two calls');
until_true('the row may be called again', sub {
	return sql(q{SELECT min(synced_at) < now() - interval '2.5 s' FROM userpilot_profiles}) eq 't';
});

my $before = sent_since($api);
my $start  = time;

sql(q{DO $$
BEGIN
	FOR i IN 1 .. 1000 LOOP
		UPDATE accounts SET n = i WHERE id = 1;
		COMMIT;
	END LOOP;
END $$});
my $took = time - $start;
delivered($node, 'postgres');
my $calls = sent_since($api, $before);

# one more for each two seconds that a slow machine may have taken
cmp_ok($calls, '<=', 2 + int($took / 2),
	sprintf('a thousand updates of a row, each committed, in %.2f s: at most two calls', $took));
diag(sprintf('1000 updates in %.2f s: %d calls', $took, $calls));
is($api->entity('companies', 1)->{metadata}{n}, 1000, '... and the last value');

$before = sent_since($api);
sql('UPDATE accounts SET seen = 1');
sql('UPDATE accounts SET n = n');
is(sql('SELECT count(*) FROM userpilot_queue'), 0, 'what changes nothing that is sent queues nothing');
sql('BEGIN; UPDATE accounts SET n = n + 1 WHERE id = 2; UPDATE accounts SET n = n - 1 WHERE id = 2; COMMIT');
delivered($node, 'postgres');
is(sent_since($api, $before), 0, 'what changes nothing at Userpilot is no call');
no_violations($api, 'by the real clock');
$node->stop;

# --- whose server ---

$Userpilot::SCALE = 100;
$api  = Userpilot::StandIn->new;
$node = new_node('triggers');
my $other = Userpilot::StandIn->new;

create_environment($node, 'postgres', $api);
create_environment($node, 'postgres', $other, server => 'other');
sql(q{
	CREATE ROLE app LOGIN;
	ALTER ROLE app SET userpilot.server = 'other';
	ALTER ROLE app IN DATABASE postgres SET userpilot.server = 'other';
	CREATE ROLE hidden_owner;
	GRANT USAGE ON FOREIGN SERVER userpilot, other TO hidden_owner;
	CREATE TABLE accounts (id int PRIMARY KEY, name text, meta jsonb);
	ALTER TABLE accounts OWNER TO hidden_owner;
	CREATE TRIGGER to_userpilot AFTER INSERT OR UPDATE ON accounts FOR EACH ROW
		EXECUTE FUNCTION userpilot_company_trigger('id', 'name', 'meta');
	GRANT SELECT, INSERT, UPDATE, DELETE ON accounts TO app;
	INSERT INTO accounts VALUES (1, 'owner');
});

sub as_app
{
	my ($statements) = @_;
	my ($rc, $out, $err) = $node->psql('postgres', $statements, extra_params => [ '-U', 'app' ]);

	is("$rc $err", '0 ', 'a role without USAGE changes rows');
	return;
}

as_app(q{SHOW userpilot.server; UPDATE accounts SET name = 'by app' WHERE id = 1});
{
	local $ENV{PGOPTIONS} = '-c userpilot.server=other';
	as_app(q{INSERT INTO accounts VALUES (2, 'by options')});
}
delivered($node, 'postgres');
is($api->entity('companies', 1)->{metadata}{name}, 'by app', '... which is sent');
is($api->entity('companies', 2)->{metadata}{name},
	'by options', 'role settings and PGOPTIONS do not say where');
is(sent_since($other), 0, '... so the other server gets nothing');

sql(q{ALTER DATABASE postgres SET userpilot.server = 'other'});
as_app(q{INSERT INTO accounts VALUES (3, 'by database')});
delivered($node, 'postgres');
is($other->entity('companies', 3)->{metadata}{name}, 'by database', 'ALTER DATABASE does');
sql('ALTER DATABASE postgres RESET userpilot.server');
$node->append_conf('postgresql.conf', "userpilot.server = 'other'");
$node->reload;
until_true('the file is read', sub { return sql('SHOW userpilot.server') eq 'other'; });
as_app(q{INSERT INTO accounts VALUES (4, 'by file')});
delivered($node, 'postgres');
is($other->entity('companies', 4)->{metadata}{name}, 'by file', '... and so does the configuration file');
is($api->entity('companies', 4), undef, '... alone');
$node->append_conf('postgresql.conf', "userpilot.server = 'userpilot'");
$node->reload;
until_true('the file is read', sub { return sql('SHOW userpilot.server') eq 'userpilot'; });
sql('DELETE FROM accounts');
$api->reset;
forget($node, 'postgres', 'profiles');

# --- whatever is done to the table ---

sql(q{
	CREATE TABLE regions (name text PRIMARY KEY);
	CREATE TABLE people (id int, region text REFERENCES regions ON UPDATE CASCADE, email text, account int, junk int,
		score numeric, twice numeric GENERATED ALWAYS AS (score * 2) STORED, at timestamptz, PRIMARY KEY (id, region)) PARTITION BY HASH (region);
	CREATE TABLE people_0 PARTITION OF people FOR VALUES WITH (MODULUS 2, REMAINDER 0);
	CREATE TABLE people_1 PARTITION OF people FOR VALUES WITH (MODULUS 2, REMAINDER 1);
	CREATE TRIGGER to_userpilot AFTER INSERT OR UPDATE ON people FOR EACH ROW
		EXECUTE FUNCTION userpilot_user_trigger('id', 'account AS company_id', 'junk', '*');
	ALTER TABLE people DROP COLUMN junk;
	CREATE OR REPLACE TRIGGER to_userpilot AFTER INSERT OR UPDATE ON people FOR EACH ROW
		EXECUTE FUNCTION userpilot_user_trigger('id', 'account AS company_id', '*');
	CREATE FUNCTION again() RETURNS trigger LANGUAGE plpgsql AS $$
	BEGIN
		IF pg_trigger_depth() = 1 AND NEW.id % 2 = 0 THEN
			EXECUTE format('UPDATE %I SET name = name || ''+'' WHERE id = $1', TG_TABLE_NAME) USING NEW.id;
		END IF;
		RETURN NULL;
	END $$;
	CREATE TRIGGER a_before_ours AFTER INSERT OR UPDATE ON accounts FOR EACH ROW EXECUTE FUNCTION again();
	CREATE TRIGGER z_after_ours AFTER INSERT OR UPDATE ON accounts FOR EACH ROW WHEN (NEW.id % 3 = 0) EXECUTE FUNCTION again();
	CREATE FUNCTION tidy() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN NEW.email := lower(NEW.email); RETURN NEW; END $$;
	CREATE TRIGGER tidy BEFORE INSERT OR UPDATE ON people FOR EACH ROW EXECUTE FUNCTION tidy();
	INSERT INTO regions SELECT 'r' || i FROM generate_series(1, 6) i;
	CREATE VIEW account_meta AS SELECT id, jsonb_build_object('name', name) || coalesce(meta, '{}') AS metadata FROM accounts;
	CREATE VIEW person_meta AS SELECT id, jsonb_build_object('region', region, 'email', email, 'score', score, 'twice', twice,
		'at', to_char(at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS') || '+00:00') AS metadata, account::text AS company_id FROM people;
});
my %all = (
	companies => 'SELECT * FROM account_meta',
	users     => 'SELECT * FROM person_meta');
my $do = q{
	INSERT INTO accounts SELECT i, 'n' || i, jsonb_build_object('k' || i % 3, i) FROM generate_series(1, 60) i;
	INSERT INTO people (id, region, email, account, score, at)
		SELECT i, 'r' || 1 + i % 6, 'P' || i, 1 + i % 60, i / 4.0, '2024-07-01 12:00+02'::timestamptz + i * interval '1 day' FROM generate_series(1, 60) i;
	COMMIT;
	UPDATE accounts SET meta = jsonb_build_object('k' || (id + 1) % 3, id, 'b', true) WHERE id % 4 = 0;
	UPDATE accounts SET meta = NULL WHERE id % 7 = 0;
	UPDATE people SET region = 'r' || 1 + (id + 1) % 6, email = 'Moved' WHERE id % 3 = 0;
	COMMIT;
	SAVEPOINT s; UPDATE accounts SET name = 'never', meta = '{"never": 1}'; UPDATE people SET score = -1; ROLLBACK TO s;
	INSERT INTO accounts SELECT i, 'upserted' FROM generate_series(50, 70) i ON CONFLICT (id) DO UPDATE SET name = excluded.name || accounts.name;
	COMMIT;
	UPDATE regions SET name = name || '!' WHERE name < 'r4';
	MERGE INTO people p USING generate_series(55, 65) s(i) ON p.id = s.i
		WHEN MATCHED THEN UPDATE SET score = NULL, account = 70 WHEN NOT MATCHED THEN INSERT (id, region, email, account) VALUES (s.i, 'r6', 'merged', 2);
	COMMIT;
	UPDATE accounts SET name = 'twice' WHERE id < 9; UPDATE accounts SET name = 'three' || id WHERE id < 5;
};

$do =~ s/COMMIT;/COMMIT; BEGIN;/g;
$node->safe_psql('postgres', "BEGIN; $do COMMIT;");
$node->safe_psql('postgres', "COPY accounts (id, name) FROM stdin;\n71\tcopied\n72\tcopied\n\\.\n");
delivered($node, 'postgres');
oracle_equals($node, 'postgres', $api, 'after inserts, moves, merges, cascades and nested changes', %all);
is(dead_letters($node, 'postgres'), 0, '... and nothing is dead');

# --- many rows are a job, and a fresh change is not behind it ---

$api->configure(records_per_minute => 180);
sql(q{INSERT INTO accounts SELECT i, 'many' FROM generate_series(1000, 1600) i});
my ($job) = until_true(
	'a job runs',
	sub {
		my ($running) = grep { $_->{status} ne 'completed' } @{ $api->jobs };
		return $running;
	});
sql(q{UPDATE accounts SET name = 'fresh' WHERE id = 71});
until_true('the fresh change is there',
	sub { return $api->entity('companies', 71)->{metadata}{name} eq 'fresh'; });
cmp_ok(sql('SELECT count(*) FROM userpilot_jobs WHERE finished_at IS NULL'), '>', 0, 'it overtook the job');
$api->configure(records_per_minute => 1800);
delivered($node, 'postgres');
oracle_equals($node, 'postgres', $api, 'after the job', %all);

# --- prepared, and read by a session with other settings ---

sql(q{BEGIN; UPDATE people SET at = at + interval '1 hour' WHERE id < 5; PREPARE TRANSACTION 'p'});
{
	local $ENV{PGTZ}        = 'Asia/Kathmandu';
	local $ENV{PGDATESTYLE} = 'German';
	sql(q{UPDATE people SET at = at + interval '30 min', score = 0.125 WHERE id > 50});
}
sql(q{COMMIT PREPARED 'p'});
delivered($node, 'postgres');
oracle_equals($node, 'postgres', $api, 'after a prepared transaction and other settings', %all);

# --- what can never be sent does not hold up what can ---

my (undef, undef, $err) = $node->psql('postgres',
	q{INSERT INTO accounts VALUES (2000, repeat('x', 70000)), (2001, 'good'); SELECT lastval()});
like($err, qr/WARNING:  not sent to Userpilot: .* longer than 65535 characters/, 'a warning');
like($err, qr/lastval is not yet defined/, 'lastval() is as it was');
delivered($node, 'postgres');
is($api->entity('companies', 2001)->{metadata}{name}, 'good', 'the row beside it has arrived');
is(dead_letters($node, 'postgres'), 1, 'it is a dead letter');
is($api->entity('companies', 2000), undef, '... and was not sent');

no_violations($api,   'triggers');
no_violations($other, 'the other server');
$node->stop;
done_testing();
