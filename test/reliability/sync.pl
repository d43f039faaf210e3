# The nightly case: a million companies, one in a hundred has changed.  What is
# sent must be exactly that, in one job, and finding it out must not take much
# longer than reading the rows.  ROUNDS is how often the SELECTs are timed.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../t", $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes 'time';
use Userpilot;

my $rows   = 1_000_000;
my $rounds = $ENV{ROUNDS} || 5;

$Userpilot::SCALE    = 300;
$Userpilot::PATIENCE = 120;
my $api  = Userpilot::StandIn->new;
my $node = new_node('sync', conf => <<'END');
shared_buffers = 512MB
max_wal_size = 4GB
maintenance_work_mem = 256MB
checkpoint_timeout = 1h
autovacuum = off
log_statement = none
END

sub sql
{
	return $node->safe_psql('postgres', $_[0]);
}

# Least, median and most
sub spread
{
	my @sorted = sort { $a <=> $b } @_;

	return ($sorted[0], $sorted[ $#sorted / 2 ], $sorted[-1]);
}

# Milliseconds of a SELECT; what it wrote is rolled back
sub timed
{
	my ($select) = @_;
	my @ms = sql("\\timing on\nBEGIN;\n$select;\nROLLBACK;") =~ /^Time: ([0-9.]+) ms/mg;

	return $ms[1];
}

create_environment($node, 'postgres', $api);
sql(qq{
	CREATE TABLE accounts (id int PRIMARY KEY, name text, plan text, mrr numeric(10, 2), seats int, country text, active boolean,
		created_at timestamptz, owner text, metadata jsonb);
	INSERT INTO accounts
	SELECT i, 'Account number ' || i, (ARRAY['free', 'pro', 'enterprise'])[1 + i % 3], (i % 5000) / 7.0, i % 40, 'DE', i % 7 <> 0,
		'2020-01-01 00:00+00'::timestamptz + i * interval '1 minute', 'owner' || i || '\@example.com'
	FROM generate_series(1, $rows) i;
	UPDATE accounts SET metadata = jsonb_build_object('name', name, 'plan', plan, 'mrr', mrr, 'seats', seats, 'country', country,
		'active', active, 'created_at', to_char(created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS') || '+00:00', 'owner', owner);
	-- as a first load leaves it: numbers as they were sent
	INSERT INTO userpilot_profiles (server, kind, entity_id, metadata, versions, synced_at, believed_since)
	SELECT 'userpilot', 'company', id::text, metadata || jsonb_build_object('mrr', trim_scale(mrr)), '[["1", "3", "0"]]', now(), now()
	FROM accounts;
	CREATE TRIGGER to_userpilot AFTER INSERT OR UPDATE ON accounts FOR EACH ROW
		EXECUTE FUNCTION userpilot_company_trigger('id', 'name', 'plan', 'mrr', 'seats', 'country', 'active', 'created_at', 'owner');
	SET session_replication_role = replica;
	UPDATE accounts SET plan = 'changed', metadata = metadata || '{"plan": "changed"}' WHERE id % 100 = 7;
	UPDATE accounts SET seats = NULL, metadata = metadata || '{"seats": null}' WHERE id % 200 = 7;
});
$node->safe_psql('postgres', 'VACUUM ANALYZE accounts; VACUUM ANALYZE userpilot_profiles; CHECKPOINT');

# --- what it takes ---

my %select = (
	read => 'SELECT count(metadata::text) FROM accounts',
	bulk => 'SELECT userpilot_bulk_identify_companies(id, metadata) FROM accounts',
	sync => q{SELECT * FROM userpilot_sync_table('accounts')});
my %ms;

sql('SELECT userpilot_disable(\'userpilot\')');
is(sql("BEGIN; $select{bulk}; ROLLBACK"), 10_000, 'the SELECT finds what has changed');
is(sql("BEGIN; $select{sync}; ROLLBACK"), '1000000|10000|990000|0', '... and so does userpilot_sync_table()');
foreach (1 .. $rounds)
{
	push @{ $ms{$_} }, timed($select{$_}) foreach sort keys %select;
}
my %spread = map { $_ => [ spread(@{ $ms{$_} }) ] } keys %ms;

diag(sprintf('%-5s %d times: least %.0f ms, median %.0f ms, most %.0f ms (%.2f times reading)',
		$_, $rounds, @{ $spread{$_} }, $spread{$_}[1] / $spread{read}[1]))
  foreach ('read', 'bulk', 'sync');
cmp_ok($spread{bulk}[1], '<=', 3 * $spread{read}[1],
	'the SELECT takes at most three times what reading the rows does');

# --- what is sent ---

sql(q{SELECT userpilot_enable('userpilot')});
is(sql($select{sync}), '1000000|10000|990000|0', 'synchronised');
delivered($node, 'postgres');
is(sql(q{SELECT string_agg(status || ' ' || records, ', ') FROM userpilot_jobs}), 'completed 10000', 'one job');
is(sent_since($api), 0, 'no call of its own for any');

# the stand-in knew none of them before: it has what was sent, and no more
oracle_equals($node, 'postgres', $api, 'exactly the changed keys',
	companies => q{SELECT id, jsonb_build_object('plan', plan) AS metadata FROM accounts WHERE id % 100 = 7});
is(join(',', sort keys %{ $api->get("/_/history?kind=companies&id=$_->[0]")->[-1]{sent} }), $_->[1], "... of company $_->[0]")
  foreach ([ 107, 'plan' ], [ 207, 'plan,seats' ], [ 999907, 'plan' ]);
is(sql($select{sync}), '1000000|0|1000000|0', 'then nothing is left to do');
is(sql('SELECT count(*) FROM userpilot_queue'), 0, '... and nothing is queued');
no_violations($api, 'a million');
$node->stop;
done_testing();
