# The nightly synchronisation as the cookbook has it: pg_cron runs
# userpilot_sync_table() by itself, as an ordinary role, and what has changed
# since arrives.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes 'time';
use Userpilot;

my ($share) = run_command([ 'pg_config', '--sharedir' ]);

plan skip_all => "pg_cron is not installed (no $share/extension/pg_cron.control); Debian has it in postgresql-NN-cron"
  unless -e "$share/extension/pg_cron.control";

my $api  = Userpilot::StandIn->new;
my $node = new_node('cron', start => 0, conf => <<'END');
shared_preload_libraries = 'userpilot, pg_cron'
cron.database_name = 'postgres'
cron.use_background_workers = on
cron.timezone = 'UTC'
max_worker_processes = 20
END

sub sql
{
	return $node->safe_psql('postgres', $_[0]);
}

$node->start;
create_environment($node, 'postgres', $api);
sql(q{
	CREATE EXTENSION pg_cron;
	CREATE ROLE nightly LOGIN;
	GRANT USAGE ON SCHEMA cron TO nightly;
	GRANT USAGE ON FOREIGN SERVER userpilot TO nightly;
	CREATE TABLE accounts (id int PRIMARY KEY, name text);
	ALTER TABLE accounts OWNER TO nightly;
	CREATE TRIGGER to_userpilot AFTER INSERT OR UPDATE ON accounts FOR EACH ROW
		EXECUTE FUNCTION userpilot_company_trigger('id', 'name');
	SET session_replication_role = replica;
	INSERT INTO accounts SELECT i, 'n' || i FROM generate_series(1, 500) i;
	SET SESSION AUTHORIZATION nightly;
	SELECT cron.schedule('userpilot', '* * * * *', $$SELECT * FROM userpilot_sync_table('accounts')$$);
});
is(sent_since($api), 0, 'nobody was told of the rows yet');

my $begin = time;
my $run   = until_true(
	'pg_cron has run it',
	sub {
		return sql(q{SELECT status || ': ' || coalesce(return_message, '') FROM cron.job_run_details
			WHERE status IN ('succeeded', 'failed') ORDER BY runid LIMIT 1});
	},
	70);
diag(sprintf('pg_cron ran it after %.0f s', time - $begin));
like($run, qr/^succeeded: /, 'pg_cron runs userpilot_sync_table()');
delivered($node, 'postgres');
oracle_equals($node, 'postgres', $api, 'the scheduled run',
	companies => q{SELECT id, jsonb_build_object('name', name) AS metadata FROM accounts});
is(sql('SELECT rows, unchanged, invalid, by FROM userpilot_batches ORDER BY id LIMIT 1'),
	'500|0|0|nightly', 'it was one bulk SELECT, by the role that scheduled it');
is(dead_letters($node, 'postgres'), 0, 'nothing died');
no_violations($api, 'cron');
$node->stop;
done_testing();
