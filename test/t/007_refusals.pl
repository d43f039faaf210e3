# What Userpilot refuses for good ends in the dead letters, record by record;
# what it refuses for the key, or cannot be asked at all, waits.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Userpilot;

# A backlog of 10,000 single calls takes the 17 minutes it takes, so 3 seconds
$Userpilot::SCALE = 300;

my $api  = Userpilot::StandIn->new;
my $node = new_node('refusals', conf => 'log_statement = ddl');

sub sql
{
	return $node->safe_psql('postgres', $_[0]);
}

create_environment($node, 'postgres', $api, options => "timeout '5'");
sql(q{
	CREATE TABLE accounts (id text PRIMARY KEY, version int NOT NULL DEFAULT 1);
	CREATE VIEW account_meta AS SELECT id, jsonb_build_object('version', version) AS metadata FROM accounts;
});

# --- poisoned records among 10,000 ---

foreach my $poisoned (1, 10)
{
	sql(qq{TRUNCATE accounts;
		INSERT INTO accounts SELECT CASE WHEN i % (10000 / $poisoned) = 5000 % (10000 / $poisoned)
			THEN 'poison ' ELSE 'company ' END || i, $poisoned FROM generate_series(1, 10000) i});
	$api->reset;
	forget($node, 'postgres', 'profiles', 'jobs', 'requests');
	$api->fault(
		{ status => 422, body => '{"errors":[{"message":"the name is poisoned"}]}' },
		match => { path => 'identify$', body => '"poison ' },
		times => undef);

	is(sql('SELECT userpilot_bulk_identify_companies(id, metadata) FROM account_meta'),
		10000, 'a job that is refused');
	delivered($node, 'postgres');
	is(sql('SELECT count(*) FROM userpilot_dead_letters WHERE entity_id ~ $$^poison$$'),
		$poisoned, "$poisoned poisoned: dead");
	is( sql('SELECT DISTINCT kind, http_status, error, attempts > 0, bulk FROM userpilot_dead_letters'),
		'company|422|the name is poisoned|t|t',
		'... with the reason');
	is(dead_letters($node, 'postgres'), $poisoned, '... and no other');
	oracle_equals($node, 'postgres', $api, 'the others',
		companies => q{SELECT * FROM account_meta WHERE id !~ '^poison'});
	is(sql('SELECT status || records FROM userpilot_jobs'), 'dissolved10000', 'the job was dissolved');
	like(sql('SELECT last_error FROM userpilot_status'), qr/\S/, '... and status has a word on it');

	$api->no_faults;
	is(sql(q{SELECT userpilot_retry(server => 'userpilot')}), $poisoned, 'retried when the cause is gone');
	delivered($node, 'postgres');
	is(dead_letters($node, 'postgres'), 0, '... nothing is dead');
	oracle_equals($node, 'postgres', $api, 'all', companies => 'SELECT * FROM account_meta');
	no_violations($api, "$poisoned poisoned");
}

# --- the key ---

sub paused
{
	my ($name) = @_;
	my $status = until_true(
		'it is paused',
		sub {
			my $status = status($node, 'postgres');
			return $status->{state} eq 'paused' && $status;
		});

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	like($status->{advice}, qr/API key/, "$name: paused, and says why");
	cmp_ok($status->{pending}, '>', 0, '... all stays queued');
	is(dead_letters($node, 'postgres'), 0, '... nothing died');
	return;
}

# Some real-time and some bulk changes
sub change
{
	sql(q{UPDATE accounts SET version = version + 1 WHERE id ~ '0$';
		SELECT count(userpilot_identify_company(id, metadata)::text) FROM account_meta WHERE id ~ '000$';
		SELECT userpilot_bulk_identify_companies(id, metadata) FROM account_meta WHERE id ~ '0$' AND id !~ '000$'});
	return;
}

$api->configure(key => 'second-secret-key');
change();
paused('refused key');
sql(q{ALTER USER MAPPING FOR PUBLIC SERVER userpilot OPTIONS (SET api_key 'second-secret-key')});
delivered($node, 'postgres');
oracle_equals($node, 'postgres', $api, 'resumes with ALTER USER MAPPING',
	companies => q{SELECT * FROM account_meta});
is(sql(q{SELECT max(attempts) FROM userpilot_profiles}), 0, '... and no attempt was used up');

my $key_file = $node->basedir . '/api_key';

# Replaces the key file at once, as one would
sub write_key
{
	my ($key) = @_;

	append_to_file("$key_file.new", "$key\n");
	chmod 0600, "$key_file.new" or die "chmod: $!";
	rename "$key_file.new", $key_file or die "rename: $!";
	return;
}

write_key('third-secret-key');
$api->configure(key => 'third-secret-key');
sql(qq{ALTER USER MAPPING FOR PUBLIC SERVER userpilot OPTIONS (DROP api_key, ADD api_key_file '$key_file')});
change();
delivered($node, 'postgres');
$api->configure(key => 'fourth-secret-key');
change();
paused('refused key file');
write_key('fourth-secret-key');
delivered($node, 'postgres');
oracle_equals($node, 'postgres', $api, 'resumes with the key file',
	companies => q{SELECT * FROM account_meta});

# A file that cannot be used pauses too
$node->poll_query_until('postgres', 'SELECT userpilot_worker_pid() IS NULL') or die 'the worker stays';
chmod 0644, $key_file or die "chmod: $!";
change();
until_true('the file is refused',
	sub { return status($node, 'postgres')->{advice} =~ /readable by everyone/ });
is(status($node, 'postgres')->{state}, 'paused', 'a key file for everyone is not used');
sql('CREATE ROLE sender LOGIN; GRANT USAGE ON FOREIGN SERVER userpilot TO sender');
my (undef, undef, $seen) = $node->psql('postgres', 'CALL userpilot_check()', extra_params => [ '-U', 'sender' ]);
like($seen, qr/no API key that can be used/, 'userpilot_check() says so to whoever may send');
unlike($seen, qr/api_key/, '... but not where the key is');
(undef, undef, $seen) = $node->psql('postgres', 'CALL userpilot_check()');
like($seen, qr/\Q$key_file\E/, '... which it tells the owner');
chmod 0600, $key_file or die "chmod: $!";
delivered($node, 'postgres');
oracle_equals($node, 'postgres', $api, 'resumes with a private file',
	companies => q{SELECT * FROM account_meta});
my @said = slurp_file($node->logfile) =~ /server "userpilot" (is paused: api_key_file .* everyone|resumes: it has a key)/g;
is(scalar @said, 2, '... the log says once that it was paused, and that it resumed')
  or diag("@said");

# What is deleted while it waits is not sent
$api->configure(key => 'fifth-secret-key');
sql(q{SELECT count(userpilot_identify_company(id, '{}')::text) FROM unnest('{kept,deleted}'::text[]) id});
paused('changes that wait');
is(sql(q{WITH gone AS (DELETE FROM userpilot_queue WHERE entity_id = 'deleted' RETURNING 1) SELECT count(*) FROM gone}),
	1, '... one of them is deleted');
write_key('fifth-secret-key');
delivered($node, 'postgres');
ok($api->entity('companies', 'kept'), '... the other one is sent');
is($api->entity('companies', 'deleted'), undef, '... that one is not');

unlike(slurp_file($node->logfile), qr/(third|fourth|fifth)-secret-key/, 'no key is in the log');
is( sql(q{SELECT count(*) FROM userpilot_requests r, userpilot_status s, userpilot_jobs j
		WHERE concat(r, s, j) ~ 'secret-key'}),
	0, '... nor in a table');

# --- an outage, while changes go on ---

# what it had, it forgets; so these are others
sql(q{CREATE TABLE fresh (id int PRIMARY KEY, version int);
	CREATE VIEW fresh_meta AS SELECT id, jsonb_build_object('version', version) AS metadata FROM fresh});
forget($node, 'postgres', 'requests');
$api->stop;
sql(q{DO $$ BEGIN FOR i IN 1 .. 30 LOOP
		INSERT INTO fresh SELECT 100 * i + j, i FROM generate_series(0, 99) j;
		PERFORM userpilot_identify_company(id, metadata) FROM fresh_meta WHERE id >= 100 * i;
		COMMIT;
	END LOOP; END $$});
my $status = until_true(
	'the outage is noticed',
	sub {
		my $status = status($node, 'postgres');
		return $status->{state} eq 'outage' && $status;
	});
like($status->{advice},     qr/everything stays queued/, 'outage: all is kept');
like($status->{last_error}, qr/\S/,                      '... and the last error said');
is($status->{pending}, 3000, '... all 3,000 changes');
until_true('it has been probed a few times',
	sub { return sql(q{SELECT count(*) FROM userpilot_requests WHERE outcome = 'outage'}) > 5 });
is(outcomes($node, 'postgres', '.'), 'outage', 'the calls are logged as that');
cmp_ok(sql('SELECT count(*) FROM userpilot_requests'), '<', 300, '... and are few');
is(dead_letters($node, 'postgres'), 0, '... nothing died');
is(sql('SELECT max(attempts) FROM userpilot_profiles'), 0, '... and no attempt was used up');

$api->start;
delivered($node, 'postgres');
oracle_equals($node, 'postgres', $api, 'after the outage', companies => 'SELECT * FROM fresh_meta');
is(dead_letters($node, 'postgres'), 0, 'nothing died');
no_violations($api, 'after the outage');

done_testing();
