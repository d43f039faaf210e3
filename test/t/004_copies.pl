# Only the original sends: whatever copy of a database comes to life, it says
# that it is one, and sends nothing until somebody makes it the sender.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Userpilot;

my $api  = Userpilot::StandIn->new;
my $node = new_node(
	'original',
	init => [ allows_streaming => 1 ],
	conf => 'max_connections = 30');
my $calls;

create_environment($node, 'postgres', $api);
$node->safe_psql('postgres', 'CREATE TABLE sent (id text PRIMARY KEY, metadata jsonb)');

# Queues a company in a database, which the table "sent" there then holds;
# bulk too, as "ID bulk"
sub enqueue
{
	my ($where, $db, $id) = @_;

	$where->safe_psql(
		$db, qq{
		INSERT INTO sent VALUES ('$id', '{"of":"$id"}'), ('$id bulk', '{"of":"$id"}');
		SELECT userpilot_identify_company(id, metadata) FROM sent WHERE id = '$id';
		SELECT userpilot_bulk_identify_companies(id, metadata) FROM sent WHERE id = '$id bulk'});
	return;
}

# Tests that a database says why it does not send, and that it does not: its
# worker has come, seen and left, and no call was made
sub silent
{
	my ($where, $db, $name, $reason) = @_;
	my $status = status($where, $db);

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	is($status->{state}, 'disabled', "$name: disabled");
	like($status->{advice}, $reason, '... and says why');
	cmp_ok($status->{pending}, '>=', 2, '... changes are queued');
	$where->poll_query_until($db, 'SELECT userpilot_worker_pid() IS NULL')
	  or die 'the worker does not leave';
	is($api->counters->{calls}{identify} + $api->counters->{calls}{bulk},
		$calls, '... and not sent');
	return;
}

sub calls
{
	my $counters = $api->counters->{calls};

	return $counters->{identify} + $counters->{bulk};
}

enqueue($node, 'postgres', 'first');
delivered($node, 'postgres');
oracle_equals($node, 'postgres', $api, 'original', companies => 'SELECT * FROM sent');

# What is queued while copies are made is sent by the original alone
$api->foreign_job(1_000_000);
enqueue($node, 'postgres', 'while copied');
until_true('real time is delivered', sub { return defined $api->entity('companies', 'while copied') });

# --- a template copy ---

# the worker makes way, and comes back
my $began = time;
$node->safe_psql('template1', 'CREATE DATABASE copied TEMPLATE postgres');
cmp_ok(time - $began, '<=', 6, 'a database with work can be a template');

# --- a dump, restored into another database ---

command_ok(
	[ 'pg_dump', '-Fc', '-f', $node->basedir . '/dump', $node->connstr('postgres') ],
	'pg_dump');
$node->safe_psql('template1', 'CREATE DATABASE restored TEMPLATE template0');
command_ok(
	[ 'pg_restore', '--exit-on-error', '-d', $node->connstr('restored'), $node->basedir . '/dump' ],
	'pg_restore');

$api->finish_jobs;
delivered($node, 'postgres');
oracle_equals($node, 'postgres', $api, 'original, meanwhile', companies => 'SELECT * FROM sent');

my $copy = qr/disabled: this looks like a copy of another database; SELECT userpilot_enable\('userpilot'\) makes it the sender/;
my $never = qr/disabled: SELECT userpilot_enable\('userpilot'\) makes this database the sender/;

foreach my $case ([ 'copied', $copy ], [ 'restored', $never ])
{
	my ($db, $reason) = @$case;
	my $err;

	$calls = calls();
	is($node->safe_psql($db, 'SELECT count(*) FROM userpilot_queue'),
		1, "$db: what was pending came along");
	enqueue($node, $db, "from $db");
	silent($node, $db, $db, $reason);
	(undef, undef, $err) = $node->psql($db, 'CALL userpilot_check()');
	like($err, $reason, '... the check says the same');

	# nor does a restart make it send
	$node->restart;
	silent($node, $db, "$db, after a restart", $reason);

	$node->safe_psql($db, q{SELECT userpilot_enable('userpilot')});
	delivered($node, $db);
	ok($api->entity('companies', "from $db"),      '... enabled, it sends what was queued');
	ok($api->entity('companies', "from $db bulk"), '... in both lanes');
	is(status($node, $db)->{state}, 'idle', '... and is enabled');

	$node->safe_psql($db, q{SELECT userpilot_disable('userpilot')});
	$calls = calls();
	enqueue($node, $db, "$db, disabled");
	silent($node, $db, "$db, disabled", $never);
}
enqueue($node, 'postgres', 'original goes on');
delivered($node, 'postgres');
ok($api->entity('companies', 'original goes on bulk'), '... and still can');

# --- only_on and userpilot.deliver ---

$calls = calls();
$node->safe_psql('postgres', q{ALTER SERVER userpilot OPTIONS (ADD only_on 'elsewhere')});
$node->poll_query_until('postgres', 'SELECT userpilot_worker_pid() IS NULL');
enqueue($node, 'postgres', 'bound elsewhere');
silent($node, 'postgres', 'only_on', qr/disabled: only_on is "elsewhere" but cluster_name is "original"/);
$node->safe_psql('postgres', q{ALTER SERVER userpilot OPTIONS (SET only_on 'original')});
delivered($node, 'postgres');
ok($api->entity('companies', 'bound elsewhere bulk'), 'only_on of this cluster: sends');

$calls = calls();
$node->append_conf('postgresql.conf', 'userpilot.deliver = off');
$node->reload;
$node->poll_query_until('postgres',
	q{SELECT current_setting('userpilot.deliver') = 'off' AND userpilot_worker_pid() IS NULL});
enqueue($node, 'postgres', 'undelivered');
silent($node, 'postgres', 'userpilot.deliver off', qr/disabled: userpilot.deliver is off/);
$node->append_conf('postgresql.conf', 'userpilot.deliver = on');
$node->reload;
delivered($node, 'postgres');
ok($api->entity('companies', 'undelivered bulk'), 'userpilot.deliver on: a reload suffices');

# --- a standby, and its promotion ---

my $standby = PostgreSQL::Test::Cluster->new('standby');
$node->backup('backup');
$standby->init_from_backup($node, 'backup', has_streaming => 1);
$standby->start;
$node->wait_for_catchup($standby);

$api->foreign_job(1_000_000);
enqueue($node, 'postgres', 'replicated');
$node->wait_for_catchup($standby);
is(status($standby, 'postgres')->{advice}, 'disabled: this is a standby', 'a standby says what it is');
is( $standby->safe_psql('postgres',
		q{SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'userpilot%'}),
	0, '... and runs no process');

# Promoted, it is the original; what only_on binds elsewhere still is not
$node->stop('immediate');
$calls = calls();
cmp_ok($standby->safe_psql('postgres', 'SELECT count(*) FROM userpilot_queue'),
	'>=', 1, 'the primary is lost with work to do');
is(calls(), $calls, '... the standby does not do it');
$standby->promote;
$standby->poll_query_until('postgres',
	q{SELECT count(*) = 1 FROM pg_stat_activity WHERE backend_type = 'userpilot launcher'});
$api->finish_jobs;
enqueue($standby, 'postgres', 'bound to the lost');
silent($standby, 'postgres', 'promoted',
	qr/disabled: only_on is "original" but cluster_name is "standby"/);
$standby->safe_psql('postgres', q{ALTER SERVER userpilot OPTIONS (DROP only_on)});
delivered($standby, 'postgres');
ok($api->entity('companies', 'replicated bulk'), '... until it is bound no more');
enqueue($standby, 'postgres', 'promoted');
delivered($standby, 'postgres');
ok($api->entity('companies', 'promoted bulk'), '... then it goes on');
is(dead_letters($standby, 'postgres'), 0, 'nothing died');
no_violations($api, 'copies');

done_testing();
