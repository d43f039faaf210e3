# Whatever ends the worker, at whatever moment: nothing waits for it longer
# than for any other process, and nothing is lost.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes 'time';
use Userpilot;
use Userpilot::Deaf;

my $api  = Userpilot::StandIn->new;
my $deaf = Userpilot::Deaf->new;
my $node = new_node('stops', conf => "restart_after_crash = on\nlog_statement = ddl\nmax_wal_size = 1GB");

# How long core waits for others to leave a database
my $grace = 5;

# Runs a sub; tests that it took at most that many seconds
sub takes
{
	my ($name, $most, $sub) = @_;
	my $began = time;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	$sub->();
	return cmp_ok(time - $began, '<=', $most, "$name within $most s");
}

sub worker_pid
{
	my ($db) = @_;

	return $node->safe_psql($db, 'SELECT userpilot_worker_pid()');
}

# Queues n companies real time and many bulk ones, all in table "sent"
sub enqueue
{
	my ($db, $name, $bulk, $bytes) = @_;

	$bytes //= 1;
	$node->safe_psql(
		$db, qq{
		CREATE TABLE IF NOT EXISTS sent (id text PRIMARY KEY, metadata jsonb);
		INSERT INTO sent SELECT '$name ' || i, '{"v":1}' FROM generate_series(1, 50) i;
		SELECT count(userpilot_identify_company(id, metadata)::text) FROM sent
			WHERE id ~ '^$name [0-9]+\$';
		INSERT INTO sent SELECT '$name bulk ' || i, jsonb_build_object('v', repeat('x', $bytes))
			FROM generate_series(1, $bulk) i;
		SELECT userpilot_bulk_identify_companies(id, metadata) FROM sent WHERE id ~ '^$name bulk'});
	return;
}

# A database whose worker waits for a silent server, or is in an upload that
# does not end
sub busy
{
	my ($db, $how) = @_;

	$node->safe_psql('postgres', "CREATE DATABASE $db") if $db ne 'postgres';
	create_environment($node, $db, $how eq 'upload' ? $deaf : $api);
	$api->pause;
	enqueue($db, 'busy', 400, $how eq 'upload' ? 60000 : 1);
	if ($how eq 'upload')
	{
		# sent, and no answer yet
		$node->poll_query_until($db,
			q{SELECT count(*) > 0 FROM userpilot_jobs WHERE attempts = 1 AND status = 'prepared'})
		  or die 'no upload';
	}
	else
	{
		$node->poll_query_until($db, q{SELECT count(*) > 0 FROM userpilot_profiles WHERE attempts > 0})
		  or die 'no call';
	}
	return;
}

# --- what others do to a database whose worker is busy ---

foreach my $how ('silence', 'upload')
{
	busy($how, $how);
	ok(worker_pid($how), "$how: the worker is busy");
	takes('CREATE DATABASE ... TEMPLATE', $grace,
		sub { $node->safe_psql('postgres', "CREATE DATABASE copy_of_$how TEMPLATE $how") });
	$node->poll_query_until($how, 'SELECT userpilot_worker_pid() IS NOT NULL')
	  or die 'no worker';
	ok(1, '... then the worker is back');
	takes('ALTER DATABASE ... RENAME', $grace,
		sub { $node->safe_psql('postgres', "ALTER DATABASE $how RENAME TO ${how}_renamed") });
	$node->poll_query_until("${how}_renamed", 'SELECT userpilot_worker_pid() IS NOT NULL')
	  or die 'no worker';
	ok(1, '... then the worker is back');
	takes('ALTER DATABASE ... SET TABLESPACE', $grace,
		sub { $node->safe_psql('postgres', "ALTER DATABASE ${how}_renamed SET TABLESPACE pg_default") });
	takes('DROP DATABASE', $grace,
		sub { $node->safe_psql('postgres', "DROP DATABASE ${how}_renamed") });

	busy("forced_$how", $how);
	takes('DROP DATABASE ... WITH (FORCE)', 2,
		sub { $node->safe_psql('postgres', "DROP DATABASE forced_$how WITH (FORCE)") });
	$api->go_on;
}
$api->reset;

# --- ends of the processes, while Userpilot is silent ---

busy('postgres', 'silence');
my $pid = worker_pid('postgres');
takes('SIGTERM of the worker', 2,
	sub {
		$node->safe_psql('postgres', "SELECT pg_terminate_backend($pid, 10000)");
	});
$node->poll_query_until('postgres', "SELECT userpilot_worker_pid() <> $pid") or die 'no worker';
ok(1, '... then another one comes');

my $launcher = q{SELECT pid FROM pg_stat_activity WHERE backend_type = 'userpilot launcher'};
$pid = $node->safe_psql('postgres', $launcher);
takes('SIGTERM of the launcher', 2,
	sub { $node->safe_psql('postgres', "SELECT pg_terminate_backend($pid, 10000)") });
like($node->safe_psql('postgres', 'SELECT advice FROM userpilot_status'),
	qr/^(the userpilot launcher is not running)?$/, '... the status says so, if it is asked');
$node->poll_query_until('postgres', "SELECT EXISTS ($launcher)") or die 'no launcher';
ok(1, '... then the postmaster starts another');

takes('fast shutdown', 2, sub { $node->stop('fast') });
$node->start;
$node->poll_query_until('postgres', 'SELECT userpilot_worker_pid() IS NOT NULL') or die 'no worker';
ok(1, 'after a start the worker comes without being asked');
$api->go_on;
delivered($node, 'postgres');
oracle_equals($node, 'postgres', $api, 'after all that', companies => 'SELECT * FROM sent');

# The same with an upload under way
$node->safe_psql('postgres', q{ALTER SERVER userpilot OPTIONS (SET endpoint '} . $deaf->url . q{')});
$node->poll_query_until('postgres', 'SELECT userpilot_worker_pid() IS NULL') or die 'still there';
enqueue('postgres', 'upload', 400, 60000);
$node->poll_query_until('postgres', q{SELECT count(*) > 0 FROM userpilot_jobs WHERE status = 'prepared' AND attempts = 1});
$node->safe_psql('postgres', q{ALTER SERVER userpilot OPTIONS (SET endpoint '} . $api->url . q{')});
takes('fast shutdown during an upload', 2, sub { $node->stop('fast') });
$node->start;
delivered($node, 'postgres');
oracle_equals($node, 'postgres', $api, '... is lost to nobody', companies => 'SELECT * FROM sent');

# --- pg_upgrade: what it has read must not change under its hands ---

$node->stop;
system_or_bail('pg_ctl', '-s', '-w', '-D', $node->data_dir, '-l', $node->logfile, '-o', '-b', 'start');
is( $node->safe_psql('postgres', q{SELECT count(*) FROM pg_stat_activity WHERE backend_type ~ 'userpilot'}),
	0, 'no launcher in binary upgrade mode');
system_or_bail('pg_ctl', '-s', '-w', '-D', $node->data_dir, 'stop');
$node->start;

# --- crashes ---

# Kills the worker and waits until the server has restarted itself
sub crash
{
	my $worker = worker_pid('postgres');

	kill 'KILL', $worker;
	until_true('the crash is noticed',
		sub { return slurp_file($node->logfile) =~ /PID $worker\) was terminated by signal 9/ });
	until_true('the server is back',
		sub { return ($node->psql('postgres', 'SELECT 1'))[0] == 0 });
	return;
}

$api->configure(history => 20);
foreach my $round (1 .. 3)
{
	enqueue('postgres', "crash $round", 3000);
	$node->safe_psql('postgres', qq{UPDATE sent SET metadata = metadata || jsonb_build_object('w', $round);
		SELECT userpilot_bulk_identify_companies(id, metadata) FROM sent WHERE id ~ 'bulk'});
	$node->poll_query_until('postgres', 'SELECT userpilot_worker_pid() IS NOT NULL') or die 'no worker';

	# at another moment each time: while it prepares, sends, is answered
	until_true('something is under way',
		sub { return $api->counters->{calls}{list} >= $round })
	  if $round > 1;
	crash();
}
delivered($node, 'postgres');
$node->safe_psql('postgres', q{SELECT count(userpilot_identify_company(id, metadata)::text)
	FROM sent WHERE id !~ 'bulk'});
delivered($node, 'postgres');
oracle_equals($node, 'postgres', $api, 'kill -9 of the worker', companies => 'SELECT * FROM sent');

foreach my $round (1 .. 2)
{
	enqueue('postgres', "immediate $round", 3000);
	$node->stop('immediate');
	$node->start;
}
delivered($node, 'postgres');
oracle_equals($node, 'postgres', $api, 'immediate stops', companies => 'SELECT * FROM sent');
is(dead_letters($node, 'postgres'), 0, 'nothing died');
no_violations($api, 'crashes');

# --- the clock is set back: the last start lies in the future ---

$node->poll_query_until('postgres', 'SELECT userpilot_worker_pid() IS NULL') or die 'the worker stays';
$node->safe_psql('postgres', q{UPDATE userpilot_worker_starts SET at = at + '1 hour'});
enqueue('postgres', 'set back', 10);
delivered($node, 'postgres');
oracle_equals($node, 'postgres', $api, 'a clock that was set back', companies => 'SELECT * FROM sent');

# --- the extension goes and comes ---

$api->pause;
enqueue('postgres', 'dropped', 100);
$node->poll_query_until('postgres', 'SELECT userpilot_worker_pid() IS NOT NULL') or die 'no worker';
takes('DROP EXTENSION under a busy worker', 2,
	sub {
		$node->safe_psql('postgres',
			'SET client_min_messages = warning; DROP EXTENSION userpilot CASCADE; TRUNCATE sent');
	});
$api->go_on;
$node->poll_query_until('postgres',
	q{SELECT count(*) = 0 FROM pg_stat_activity WHERE backend_type = 'userpilot worker'})
  or die 'the worker stays';
ok(1, '... and then it leaves');
$api->reset;
create_environment($node, 'postgres', $api);
enqueue('postgres', 'again', 100);
delivered($node, 'postgres');
oracle_equals($node, 'postgres', $api, 'created again', companies => 'SELECT * FROM sent');

# A worker that knows the extension of before would lock that one
$node->safe_psql('postgres',
	'SET client_min_messages = warning; DROP EXTENSION userpilot CASCADE; TRUNCATE sent');
$api->reset;
create_environment($node, 'postgres', $api);
my $owner = $node->background_psql('postgres');
$owner->query_safe(q{BEGIN; SELECT userpilot_invalidate('userpilot')});
enqueue('postgres', 'made anew', 100);
$node->poll_query_until('postgres', q{SELECT count(*) > 0 FROM pg_locks
	WHERE NOT granted AND relation = 'userpilot_profiles'::regclass}) or die 'nobody waits';
is( $node->safe_psql('postgres', q{SELECT count(*) FROM pg_locks w JOIN pg_locks h USING (pid)
		WHERE NOT w.granted AND w.relation = 'userpilot_profiles'::regclass AND h.granted
		AND h.classid = 'pg_extension'::regclass AND h.objid = (SELECT oid FROM pg_extension WHERE extname = 'userpilot')}),
	1, 'no worker is in an extension that was made anew without its lock');
$owner->query_safe('COMMIT');
$owner->quit;
delivered($node, 'postgres');
oracle_equals($node, 'postgres', $api, '... and all is delivered', companies => 'SELECT * FROM sent');
unlike(slurp_file($node->logfile), qr/PANIC|signal 11|signal 6|TRAP/, 'nothing else crashed');
$node->stop;

# --- no room for a worker ---

my $small = new_node('small', conf => 'max_worker_processes = 2');
my $err;

$api->reset;
create_environment($small, 'postgres', $api);
$small->safe_psql('postgres', q{SELECT userpilot_identify_company('c', '{"v":1}')});
$small->poll_query_until('postgres',
	q{SELECT advice = 'no background worker slot is free: raise max_worker_processes' FROM userpilot_status})
  or die 'no advice';
ok(1, 'the status says that max_worker_processes is exhausted');
(undef, undef, $err) = $small->psql('postgres', 'CALL userpilot_check()');
like($err, qr/\[!!\] 0 of 2 background worker slots are free.*HINT:  Raise max_worker_processes/s,
	'... so does the check');
$small->append_conf('postgresql.conf', "max_worker_processes = 4\nuserpilot.max_databases = 2");
$small->restart;
delivered($small, 'postgres');
oracle_equals($small, 'postgres', $api, '... with room, all is delivered',
	companies => q{SELECT 'c' AS id, '{"v":1}'::jsonb AS metadata});

# --- databases that come and go, more than have room at once ---

foreach my $db ('one', 'two', 'three')
{
	$small->safe_psql('postgres', "CREATE DATABASE $db");
	create_environment($small, $db, $api);
	$small->safe_psql($db, qq{SELECT userpilot_identify_company('$db', '{}')});
	delivered($small, $db);
	ok($api->entity('companies', $db), "database $db delivers");
	$small->poll_query_until($db, 'SELECT userpilot_worker_pid() IS NULL') or die 'the worker stays';
	$small->safe_psql('postgres', "DROP DATABASE $db") if $db ne 'three';
}
$small->safe_psql('postgres', q{SELECT userpilot_identify_company('again', '{}')});
delivered($small, 'postgres');
ok($api->entity('companies', 'again'), '... and so does the first one still');

# --- no call before all have counted; one whose worker was stopped counts later ---

my $late = new_node('late', scale => 1);

create_environment($late, 'postgres', $api);
$late->safe_psql('postgres', 'CREATE DATABASE other');
$late->safe_psql('other', q{CREATE EXTENSION userpilot;
	BEGIN; LOCK TABLE userpilot_enabled; PREPARE TRANSACTION 'other'});
$late->restart;
$late->safe_psql('postgres', q{SELECT userpilot_identify_company('late', '{}')});
$late->poll_query_until('postgres',
	q{SELECT count(pg_terminate_backend(pid)) = 1 FROM pg_stat_activity
		WHERE backend_type = 'userpilot worker' AND datname = 'other' AND wait_event_type = 'Lock'})
  or die 'no worker waits';
ok(!$api->entity('companies', 'late'), 'nothing is called while a database has not counted');
$late->safe_psql('other', q{ROLLBACK PREPARED 'other'});
takes('the first call', 30, sub { delivered($late, 'postgres') });
ok($api->entity('companies', 'late'), '... comes once it has');
no_violations($api, 'stops');

done_testing();
