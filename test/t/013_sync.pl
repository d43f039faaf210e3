# Whole tables: what is sent is what has changed, how far it is can be seen, and
# whatever else goes on meanwhile, Userpilot has what the tables say.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time usleep);
use Userpilot;

# A job of 10,000 takes 333 seconds at Userpilot, so 3.3 seconds here
$Userpilot::SCALE = 100;

my $api  = Userpilot::StandIn->new;
my $node = new_node('sync', conf => "max_wal_size = 1GB\n");

sub sql
{
	return $node->safe_psql('postgres', $_[0]);
}

# rows|queued|unchanged|invalid of a synchronisation
sub synced
{
	return sql("SELECT * FROM userpilot_sync_table('accounts')");
}

# All bulk records that were sent so far
sub records
{
	return sql(q{SELECT coalesce(sum(records), 0) FROM userpilot_jobs});
}

# Changes of the table that nothing is told of: as before the trigger was made
sub behind_its_back
{
	return sql("SET session_replication_role = replica; $_[0]");
}

create_environment($node, 'postgres', $api, options => "exclude_properties 'secret'");
sql(q{
	CREATE TABLE accounts (id int PRIMARY KEY, name text, plan text, owner int, secret text DEFAULT 'secret', active boolean DEFAULT true);
	CREATE TRIGGER a_company AFTER INSERT OR UPDATE ON accounts FOR EACH ROW WHEN (NEW.active)
		EXECUTE FUNCTION userpilot_company_trigger('id', 'name', 'plan', 'secret');
	CREATE TRIGGER b_user AFTER INSERT OR UPDATE ON accounts FOR EACH ROW WHEN (NEW.owner IS NOT NULL)
		EXECUTE FUNCTION userpilot_user_trigger('owner', 'secret', 'plan', 'id AS company_id');
	CREATE VIEW account_meta AS SELECT id, jsonb_build_object('name', name, 'plan', plan) AS metadata FROM accounts WHERE active;
	CREATE VIEW owner_meta AS SELECT owner AS id, jsonb_build_object('plan', plan) AS metadata, id::text AS company_id
		FROM accounts WHERE owner IS NOT NULL;
});
behind_its_back(q{INSERT INTO accounts SELECT i, 'n' || i, (ARRAY['free', 'pro', NULL])[1 + i % 3],
	CASE WHEN i % 10 = 0 THEN 100000 + i END, 'secret', i % 50 <> 0 FROM generate_series(1, 1500) i});
my %all = (
	companies => 'SELECT * FROM account_meta',
	users     => 'SELECT * FROM owner_meta');

# --- first load, and again ---

is(synced(), '1620|1620|0|0', 'the first time everything is queued, companies and users');
delivered($node, 'postgres');
oracle_equals($node, 'postgres', $api, 'the first load', %all);
is(records(), 1620, 'each was one record of a job');
is(sql(q{SELECT count(*) FROM userpilot_batches WHERE pending > 0}), 0, 'every bulk SELECT has come to its end');
my $calls = sent_since($api);
is(synced(), '1620|0|1620|0', 'the second time nothing is');
is(sql(q{SELECT string_agg(kind || rows || '/' || unchanged || '/' || pending, ' ' ORDER BY id) FROM
	(SELECT * FROM userpilot_batches ORDER BY id DESC LIMIT 2) b}), 'company0/1470/0 user0/150/0', '... and says so');

# --- one in a hundred has changed ---

behind_its_back(q{UPDATE accounts SET plan = 'changed' WHERE id % 100 = 1; UPDATE accounts SET name = NULL WHERE id % 100 = 2;
	UPDATE accounts SET secret = 'other'});
my $preview = sql(q{SELECT (userpilot_preview_companies(id, metadata)).* FROM account_meta});
is($preview, '1470|0|30|1440|0|30|1|0', 'a preview tells what it would come to');
is(synced(), '1620|30|1590|0', '... and that is what it comes to');
delivered($node, 'postgres');
oracle_equals($node, 'postgres', $api, 'one in a hundred', %all);
is(sent_since($api, $calls), 0, 'none was a call of its own');
is(records(), 1650, 'thirty records more');
my @keys = map { join(',', sort keys %{ $_->[-1]{sent} }) }
  map { $api->get("/_/history?kind=companies&id=$_") } (1, 2, 101, 102);
is("@keys", 'plan name plan name', 'of each only the key that has changed');
is($api->raw('/_/state?kind=companies') =~ /secret/ || $api->raw('/_/state?kind=users') =~ /secret/ ? 'sent' : 'never',
	'never', 'what is excluded never left');
is(sql(q{SELECT count(*) FROM userpilot_profiles p WHERE p::text ~ 'secret'}), 0, '... and is not in the profiles');

# --- believed for so long only ---

sql(q{UPDATE userpilot_profiles SET believed_since = now() - interval '31 days' WHERE entity_id IN ('3', '4')});
is(synced(), '1620|2|1618|0', 'what was acknowledged too long ago is queued again');
delivered($node, 'postgres');
is(records(), 1652, '... and sent again');
sql(q{UPDATE userpilot_profiles SET believed_since = now() - interval '31 days' WHERE entity_id IN ('5', '6')});
$calls = sent_since($api);
sql(q{SELECT count(userpilot_identify_company(id, metadata)::text) FROM account_meta WHERE id IN (5, 7)});
delivered($node, 'postgres');
is(sent_since($api, $calls), 1, 'by the worker, too');
is(sql(q{SELECT min(believed_since) > now() - interval '1 hour' FROM userpilot_profiles WHERE entity_id = '5'}), 't', '... once');
is(sql(q{SELECT userpilot_invalidate('userpilot', 'user')}), 150, 'all users invalidated');
is(synced(), '1620|151|1469|0', '... go again, and the company that was not asked for yet');
delivered($node, 'postgres');
oracle_equals($node, 'postgres', $api, 'refreshed', %all);

# --- an old snapshot, while values go there and back ---

foreach my $with_cursor (0, 1)
{
	my $old = $node->background_psql('postgres');

	behind_its_back(q{UPDATE accounts SET plan = 'there' WHERE id <= 40});
	$old->query_safe('BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM accounts') unless $with_cursor;
	$old->query_safe('BEGIN; DECLARE c CURSOR FOR SELECT userpilot_bulk_identify_companies(id, metadata) FROM account_meta') if $with_cursor;
	behind_its_back(q{UPDATE accounts SET plan = CASE id % 100 WHEN 1 THEN 'changed' ELSE (ARRAY['free', 'pro', NULL])[1 + id % 3] END WHERE id <= 40});
	sql('SELECT userpilot_bulk_identify_companies(id, metadata) FROM account_meta');
	delivered($node, 'postgres');
	$old->query_safe($with_cursor ? 'FETCH c; COMMIT' : 'SELECT userpilot_bulk_identify_companies(id, metadata) FROM account_meta; COMMIT');
	$old->quit;
	delivered($node, 'postgres');
	oracle_equals($node, 'postgres', $api,
		$with_cursor ? 'an older cursor' : 'an older snapshot', %all);
}

# --- rows that can never be sent ---

behind_its_back(q{INSERT INTO accounts (id, name) VALUES (9001, repeat('x', 70000)), (9002, 'good')});
is(synced(), '1622|1|1620|1', 'an invalid row does not stop the others');
is(synced() =~ s/\|\d+\|\d+\|/|_|_|/r, '1622|_|_|1', '... is told of each time');
delivered($node, 'postgres');
is(dead_letters($node, 'postgres'), 1, '... and is one dead letter');
is($api->entity('companies', 9002)->{metadata}{name}, 'good', 'the other has arrived');
behind_its_back('DELETE FROM accounts WHERE id = 9001');

# --- how far it is ---

behind_its_back(q{INSERT INTO accounts (id, name) SELECT i, 'n' || i FROM generate_series(20001, 40000) i});
is(synced(), '21621|20000|1621|0', 'twenty thousand more');
my $batch = sql(q{SELECT max(id) FROM userpilot_batches WHERE rows = 20000});
my @pending;
until_true(
	'all is delivered',
	sub {
		my ($pending, $left) = split /\|/,
		  sql("SELECT b.pending, s.pending FROM userpilot_batches b, userpilot_status s WHERE b.id = $batch");

		push @pending, $pending if !@pending || $pending[-1] != $pending;
		return $left == 0 && $pending == 0;
	});

is("$pending[0] $pending[-1]", '20000 0', 'pending of the bulk SELECT came down to nothing');
is(join(' ', sort { $b <=> $a } @pending), join(' ', @pending), '... and never went up');
cmp_ok(scalar(@pending), '>', 2, '... but step by step');
oracle_equals($node, 'postgres', $api, 'twenty thousand more', %all);

# --- taken back ---

behind_its_back(q{UPDATE accounts SET plan = 'mistake' WHERE id > 20000});
sql(q{CREATE TABLE before AS TABLE accounts});
is(synced(), '21621|20000|1621|0', 'a mistake');
until_true('a job runs', sub { return sql(q{SELECT count(*) FROM userpilot_jobs WHERE finished_at IS NULL AND submitted_at IS NOT NULL}) > 0; });
my $back = sql(q{SELECT userpilot_cancel((SELECT max(id) FROM userpilot_batches WHERE rows = 20000))});
delivered($node, 'postgres');
my $mistakes = () = $api->raw('/_/state?kind=companies') =~ /mistake/g;
cmp_ok($back, '>', 5000, "what is not under way is taken back ($back rows)");
cmp_ok($mistakes, '>=', 10000, 'the job that ran ran on');
is($back + $mistakes, 20000, '... and nothing was sent that had been taken back');
behind_its_back(q{UPDATE accounts SET plan = NULL WHERE id > 20000});
like(synced(), qr/^21621\|\d+\|/, 'the mended table');
delivered($node, 'postgres');
oracle_equals($node, 'postgres', $api, 'mended', %all);

# --- beside others' transactions ---

# One that stays open is waited for in vain, which says nothing of short ones
my $stays = $node->background_psql('postgres');
my $again = $node->background_psql('postgres');
$stays->query_safe('BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1');
like($again->query_safe(q{SELECT queued FROM userpilot_sync_table('accounts')}), qr/^21621$/m,
	'beside an older snapshot that stays open nothing is left out');
$stays->quit;
delivered($node, 'postgres');
my @short = map { $node->background_psql('postgres') } 1 .. 2;
$_->query_until(qr/start/, q{\echo start
	DO $$BEGIN LOOP PERFORM pg_sleep(0.02); COMMIT; END LOOP; END$$;
}) for @short;
until_true('short ones run',
	sub { return sql(q{SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'DO%' AND backend_xmin IS NOT NULL}) > 0; });
my $left_out = 0;
for (1 .. 20)
{
	last if $left_out = $again->query_safe(q{SELECT queued FROM userpilot_sync_table('accounts')}) =~ /^0$/m;
	delivered($node, 'postgres');
}
ok($left_out, 'beside short ones it is');
sql(q{SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'DO%'});
$again->quit;

# --- two triggers of one kind: the second leaves out as the first does ---

sql(q{CREATE TABLE plans (id int PRIMARY KEY, name text, price int);
	INSERT INTO plans SELECT i, 'p' || i, i FROM generate_series(1, 50) i;
	CREATE TRIGGER a_company AFTER INSERT OR UPDATE ON plans FOR EACH ROW
		EXECUTE FUNCTION userpilot_company_trigger('id', 'name AS plan_name');
	CREATE TRIGGER b_company AFTER INSERT OR UPDATE ON plans FOR EACH ROW
		EXECUTE FUNCTION userpilot_company_trigger('name', 'price AS plan_price')});
is(sql(q{SELECT * FROM userpilot_sync_table('plans')}), '100|100|0|0', 'two triggers of one kind');
delivered($node, 'postgres');
is(sql(q{SELECT * FROM userpilot_sync_table('plans')}), '100|0|100|0', '... leave out what Userpilot has, both');
is(sql(q{SELECT a.unchanged, b.unchanged FROM userpilot_sync_table('plans') a, userpilot_sync_table('plans') b}),
	'100|100', '... and so do two syncs in one statement');

# --- what is excluded only when it is queued already ---

sql(q{SELECT userpilot_disable('userpilot');
	SELECT userpilot_identify_company('late', '{"name": "n", "late": "not for others"}');
	ALTER SERVER userpilot OPTIONS (SET exclude_properties 'secret, late');
	SELECT userpilot_enable('userpilot')});
delivered($node, 'postgres');
is_deeply($api->entity('companies', 'late')->{metadata}, { name => 'n' }, 'what is excluded later does not leave either');

# ... nor what is in a job already, or marked to be called, but has not left
$api->fault({ status => 429 }, match => { path => 'identify$', method => 'POST' }, times => undef);
$api->fault({ away => 3 }, match => { path => '^/v1/background_jobs$' }, times => 1);
sql(q{SELECT userpilot_bulk_identify_companies('later' || i, '{"name": "n", "later": "not for others"}') FROM generate_series(1, 500) i;
	SELECT userpilot_identify_company('latest', '{"name": "n", "later": "not for others"}')});
until_true('the job cannot leave', sub { return sql(q{SELECT count(*) FROM userpilot_jobs WHERE status = 'prepared' AND error IS NOT NULL}) == 1; });
sql(q{ALTER SERVER userpilot OPTIONS (SET exclude_properties 'secret, late, later')});
until_true('the job is taken back', sub { return sql(q{SELECT count(*) FROM userpilot_jobs WHERE status = 'refused' AND error ~ 'excluded'}) == 1; });
until_true('Userpilot is back', sub { return eval { $api->no_faults; 1 } });
delivered($node, 'postgres');
is_deeply($api->entity('companies', $_)->{metadata}, { name => 'n' }, "$_: what was excluded after it was prepared has not left")
  for 'later1', 'later500', 'latest';

is(sql('SELECT count(*) FROM userpilot_queue'), 0, 'the queue is empty');
no_violations($api, 'sync');
$node->stop;
done_testing();
