# A job of nearly the largest size is prepared and uploaded: how much memory
# that takes of the worker, compared with an idle session.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../t", $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes 'usleep';
use Userpilot;

plan skip_all => 'needs /proc' unless -r '/proc/self/status';

my $api  = Userpilot::StandIn->new;
my $node = new_node('memory', conf => "wal_level = logical\nshared_buffers = 128MB\nmax_wal_size = 1GB");

# What /proc says of a process, in MB
sub memory
{
	my ($pid, $what) = @_;

	open(my $file, '<', "/proc/$pid/status") or return 0;
	my ($kb) = map { /^$what:\s+([0-9]+)/ ? $1 : () } <$file>;
	close $file;
	return ($kb // 0) / 1024;
}

create_environment($node, 'postgres', $api, options => "bulk_format 'ndjson'");
$node->safe_psql(
	'postgres', q{
	CREATE PUBLICATION everything FOR ALL TABLES;
	CREATE TABLE accounts AS SELECT i AS id,
			jsonb_build_object('text', (SELECT string_agg(md5(i::text || j::text), '') FROM generate_series(1, 141) j)) AS metadata
		FROM generate_series(1, 10000) i});
$node->safe_psql('postgres', 'SELECT userpilot_bulk_identify_companies(id, metadata) FROM accounts');

my $pid = until_true('a worker',
	sub { return $node->safe_psql('postgres', 'SELECT userpilot_worker_pid()'); });
my ($most, $own) = (0, 0);

until_true(
	'the job is over',
	sub {
		my $now = memory($pid, 'VmHWM');

		$most = $now if $now > $most;
		$now = memory($pid, 'RssAnon');
		$own = $now if $now > $own;
		return $node->safe_psql('postgres',
			q{SELECT count(*) FROM userpilot_jobs WHERE status = 'completed'}) > 0;
	});
delivered($node, 'postgres');

my $bytes = $node->safe_psql('postgres', 'SELECT max(bytes) FROM userpilot_jobs');
my ($idle, $idle_own) = split ' ',
  $node->safe_psql(
	'postgres', q{SELECT
	substring(pg_read_file('/proc/' || pg_backend_pid() || '/status') FROM 'VmHWM:\s+(\d+)')::int / 1024.0 || ' ' ||
	substring(pg_read_file('/proc/' || pg_backend_pid() || '/status') FROM 'RssAnon:\s+(\d+)')::int / 1024.0});

cmp_ok($bytes, '>', 40_000_000, 'the job is large');
is($node->safe_psql('postgres', 'SELECT count(*) FROM userpilot_jobs'), 1, '... and only one');
cmp_ok($own, '<', 150, 'the worker\'s own memory stays bounded');
diag(sprintf('job of %.1f MB: worker at most %.1f MB resident, %.1f MB of it its own (sampled); idle session %.1f MB and %.1f MB',
		$bytes / 1e6, $most, $own, $idle, $idle_own));
oracle_equals($node, 'postgres', $api, 'the large job', companies => 'SELECT * FROM accounts');
no_violations($api, 'the large job');
$node->stop;
done_testing();
