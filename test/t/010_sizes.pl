# Sizes at their limits: records and bytes of a job, characters of a value and
# of an id, in databases of three encodings; and poisoned records, of which each
# gets its own reason.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Userpilot;

# A job of 10,000 takes 333 seconds at Userpilot, so half a second here
$Userpilot::SCALE = 600;

# What a job's records may have, a newline each; Userpilot takes 50,000,000
my $most = 50_000_000 - 1024;

my $api  = Userpilot::StandIn->new;
my $node = new_node('sizes', conf => "log_statement = none\nmax_wal_size = 1GB");

sub sql
{
	return $node->safe_psql('postgres', $_[0]);
}

# Empties stand-in and extension, as if nothing had ever been sent
sub start_over
{
	my ($db) = @_;

	delivered($node, $db // 'postgres');
	$api->reset;
	forget($node, $db // 'postgres', 'profiles', 'jobs', 'batches', 'dead_letters');
	return;
}

create_environment($node, 'postgres', $api, options => "bulk_format 'json'");
sql(q{CREATE TABLE accounts (id text PRIMARY KEY, metadata jsonb)});

my $bulk  = 'SELECT userpilot_bulk_identify_companies(id, metadata) FROM accounts';
my @all   = (companies => 'SELECT * FROM accounts');
my @users = (users => 'SELECT id, metadata, id AS company_id FROM accounts');

# --- none, and just above a job, of users too ---

is(sql($bulk), 0, 'no rows: none are queued');
delivered($node, 'postgres');
is(sql('SELECT count(*) FROM userpilot_jobs'), 0, '... no job is made');
is($api->counters->{calls}{bulk}, 0, '... and no call');

sql(q{INSERT INTO accounts SELECT i, jsonb_build_object('n', i) FROM generate_series(1, 10001) i});
sql('SELECT userpilot_bulk_identify_users(id, metadata, id) FROM accounts');
delivered($node, 'postgres');
is(sql(q{SELECT string_agg(kind || ' ' || records, ', ' ORDER BY id) FROM userpilot_jobs}),
	'user 10000, user 1', '10,001 users make two jobs');
oracle_equals($node, 'postgres', $api, '10,001 users', @users);

# --- poisoned records, each refused for a reason of its own ---

start_over();
my @poison = (
	[ 400, 'bad' ], [ 404, 'gone' ], [ 405, 'no way' ], [ 409, 'twice' ], [ 410, 'was here' ],
	[ 413, 'too much' ], [ 415, 'what type' ], [ 418, 'a teapot' ], [ 422, 'wrong' ], [ 451, 'forbidden by law' ]);
foreach my $i (0 .. $#poison)
{
	$api->fault(
		{ status => $poison[$i][0], body => qq({"errors":[{"message":"$poison[$i][1]"}]}) },
		match => { path => '/companies/identify$', body => '"company_id":"' . (500 + 1000 * $i) . '"' },
		times => undef);
}
$api->fault({ status => 422 }, match => { path => 'bulk_identify$', body => '"company_id":"500"' }, times => undef);
sql("$bulk WHERE id <> '10001'");
delivered($node, 'postgres');
is( sql(q{SELECT string_agg(concat_ws(' ', entity_id, http_status, error), ', ' ORDER BY entity_id::int)
		FROM userpilot_dead_letters}),
	join(', ', map { 500 + 1000 * $_ . " @{ $poison[$_] }" } 0 .. $#poison),
	'ten poisoned among 10,000 are dead, each with its reason');
is(sql(q{SELECT string_agg(status || ' ' || records, ', ' ORDER BY id) FROM userpilot_jobs}),
	'dissolved 10000', '... as the job was dissolved');
oracle_equals($node, 'postgres', $api, 'the others',
	companies => q{SELECT * FROM accounts WHERE id::int % 1000 <> 500 AND id <> '10001'});
no_violations($api, 'poisoned');

# --- bodies at 50 MB ---

# Records whose bodies have so many bytes, newlines included: most of them of
# 60,000, and the last one's name makes up the rest
sub records
{
	my ($bytes) = @_;

	sql(qq{
		TRUNCATE accounts;
		INSERT INTO accounts SELECT i, jsonb_build_object('a', repeat('x', 59950)) FROM generate_series(10000, $bytes / 60000 + 9998) i;
		INSERT INTO accounts SELECT 'last', jsonb_build_object('a', repeat('y', 50000),
			'b', repeat('z', ($bytes - octet_length(userpilot_companies_ndjson(id, metadata)) - 50049)::int)) FROM accounts});
	is(sql('SELECT octet_length(userpilot_companies_ndjson(id, metadata)) FROM accounts'),
		$bytes, "records of $bytes bytes");
	return;
}

foreach my $case ([ 'json', $most ], [ 'ndjson', $most ], [ 'ndjson', $most + 1 ])
{
	my ($format, $bytes) = @$case;
	my $n;

	start_over();
	records($bytes);
	$n = sql('SELECT count(*) FROM accounts');
	sql("ALTER SERVER userpilot OPTIONS (SET bulk_format '$format'); $bulk");
	delivered($node, 'postgres');
	is( sql(q{SELECT string_agg(format || ' ' || records, ', ' ORDER BY id) FROM userpilot_jobs}),
		$bytes > $most ? "$format " . ($n - 1) . ", $format 1" : "$format $n",
		"... make these $format jobs");
	is($api->counters->{statuses}{413} // 0, 0, '... none too large for Userpilot');
	cmp_ok($_->{file_size}, '<=', 50_000_000, '... by its own count') foreach @{ $api->jobs };
	oracle_equals($node, 'postgres', $api, '...', @all);
}
no_violations($api, '50 MB');

# A record that is too large for any job is dead, and no other; in real time it
# is Userpilot that says so
start_over();
sql(q{TRUNCATE accounts;
	INSERT INTO accounts SELECT i, '{"v":1}' FROM generate_series(1, 3) i;
	CREATE FUNCTION huge() RETURNS jsonb LANGUAGE sql AS
		$$SELECT jsonb_object_agg(i, repeat(chr(1), 65535)) FROM generate_series(1, 128) i$$;
	SELECT userpilot_bulk_identify_companies(id, metadata) FROM
		(SELECT * FROM accounts UNION ALL SELECT 'huge', huge()) s});
delivered($node, 'postgres');
like(sql(q{SELECT string_agg(entity_id || ': ' || error, ', ') FROM userpilot_dead_letters}),
	qr/^huge: the record has 503[0-9]{5} bytes; Userpilot takes 50 MB in one request$/,
	'a record of 50.3 MB is dead, with the reason');
oracle_equals($node, 'postgres', $api, '... the others are not', @all);

# --- characters of values ---

start_over();
sql(q{TRUNCATE accounts;
	INSERT INTO accounts SELECT name, jsonb_build_object('v', repeat(what, 65535), repeat(what, 255), 1)
	FROM (VALUES ('ascii', 'x'), ('two bytes', chr(233)), ('four bytes', chr(128512)), ('control', chr(1)),
		('quote', '"'), ('backslash', '\')) v (name, what)});
sql($bulk);
sql('SELECT count(userpilot_identify_user(id, metadata, id)::text) FROM accounts');
delivered($node, 'postgres');
oracle_equals($node, 'postgres', $api, 'values of 65,535 characters, names of 255', @all, @users);
foreach my $call ('userpilot_identify_company', 'userpilot_bulk_identify_users')
{
	foreach my $character ('x', '\U0001F600')
	{
		my (undef, undef, $err) = $node->psql('postgres',
			"\\set VERBOSITY verbose\nSELECT $call('c', jsonb_build_object('v', repeat(U&'" . ($character =~ s/U000/+0/r) . "', 65536)))");
		like($err, qr/ERROR:  22001: metadata\."v" is longer than 65535 characters/, "$call refuses 65,536");
	}
}
is(sql('SELECT count(*) FROM userpilot_queue'), 0, '... and queues nothing');

# --- changes of 300 properties each, together more than a body takes ---

sub properties
{
	my ($from, $to) = @_;

	return "(SELECT jsonb_object_agg('p' || i, i) FROM generate_series($from, $to) i)";
}

start_over();
sql('TRUNCATE accounts; INSERT INTO accounts SELECT i, ' . properties(1, 600) . ' FROM generate_series(1, 4) i');
sql("BEGIN; SELECT userpilot_identify_user('1', " . properties(1, 300) . q{, 'c');
	SELECT userpilot_identify_user('1', } . properties(301, 600) . '); COMMIT');
sql("BEGIN; SELECT userpilot_bulk_identify_companies(i, " . properties(1, 300) . q{) FROM generate_series(1, 4) i;
	SELECT userpilot_bulk_identify_companies(i, } . properties(301, 600) . ') FROM generate_series(1, 4) i; COMMIT');
delivered($node, 'postgres');
oracle_equals($node, 'postgres', $api, '600 properties of two changes', @all,
	users => q{SELECT id, metadata, 'c' AS company_id FROM accounts WHERE id = '1'});
is(sql('SELECT count(*) FROM userpilot_dead_letters'), 0, '... none of them dead');
is($api->counters->{calls}{identify}, 2, '... in two calls of a user');
is(sql(q{SELECT string_agg(status || ' ' || records, ', ' ORDER BY id) FROM userpilot_jobs}),
	'completed 4, completed 4', '... and two jobs of companies');
no_violations($api, '600 properties');

# --- more than is kept of one: it is dead, and no other; nor does it fill the memory ---

start_over();
my $too_much = qr/^a (company|user) of more than 10000 properties, or of more than 64 MB/;
sql('TRUNCATE accounts; INSERT INTO accounts SELECT i, \'{"v":1}\' FROM generate_series(1, 3) i');
sql(q{BEGIN; SELECT count(userpilot_identify_user('greedy', properties)::text) FROM (
		SELECT jsonb_object_agg('p' || i, i) AS properties FROM generate_series(0, 10500) i GROUP BY i / 500) s;
	SELECT count(userpilot_identify_user(id, metadata)::text) FROM accounts; COMMIT});
sql(q{SELECT userpilot_bulk_identify_companies(id, metadata) FROM (
		SELECT 'greedy' AS id, jsonb_object_agg('p' || i, i) AS metadata FROM generate_series(0, 10500) i GROUP BY i / 500
		UNION ALL SELECT * FROM accounts) s});
delivered($node, 'postgres');
oracle_equals($node, 'postgres', $api, 'beside 10,501 properties', @all,
	users => 'SELECT id, metadata, NULL AS company_id FROM accounts');
is(sql(q{SELECT string_agg(DISTINCT kind || ' ' || entity_id, ', ') || ', ' || count(*) FROM userpilot_dead_letters}),
	'company greedy, user greedy, 44', '... these are dead');
like($_, $too_much, '... with the reason')
  foreach split /\n/, sql('SELECT DISTINCT error FROM userpilot_dead_letters');

start_over();
sql(q{SELECT userpilot_bulk_identify_companies(id, metadata) FROM (
		SELECT * FROM accounts
		UNION ALL SELECT 'greedy', (SELECT jsonb_object_agg(r || '_' || i, repeat('x', 65535)) FROM generate_series(1, 500) i)
			FROM generate_series(1, 20) r) s});
my $most_memory = 0;
until_true('20 rows of 32 MB are dead',
	sub {
		my $pid = sql('SELECT coalesce(userpilot_worker_pid(), 0)');

		if ($pid && open my $status, '<', "/proc/$pid/status")
		{
			/^VmHWM:\s+(\d+)/ and $most_memory = $1 / 1024 > $most_memory ? $1 / 1024 : $most_memory
			  while <$status>;
		}
		return sql('SELECT count(*) FROM userpilot_dead_letters') == 20;
	});
cmp_ok($most_memory, '>', 0, "... the worker's memory was seen");
cmp_ok($most_memory, '<', 400, '... and was some of theirs');
delivered($node, 'postgres');
until_true('nothing is said to be pending', sub { return sql('SELECT sum(pending) FROM userpilot_batches') == 0 });
oracle_equals($node, 'postgres', $api, '... the others are delivered', @all);

# Each of these has its place in a group with its first row
start_over();
sql(q{TRUNCATE accounts;
	INSERT INTO accounts SELECT i, jsonb_build_object('first', i) || (
		SELECT jsonb_object_agg('p' || j, repeat('x', 65000)) FROM generate_series(1, 400) j) FROM generate_series(1, 6) i;
	SELECT userpilot_bulk_identify_companies(id, metadata) FROM (
		SELECT id, jsonb_build_object('first', id::int) AS metadata FROM accounts
		UNION ALL SELECT id, metadata - 'first' FROM accounts) s});
delivered($node, 'postgres');
oracle_equals($node, 'postgres', $api, 'what is too large together goes in turn', @all);
is(dead_letters($node, 'postgres'), 0, '... none of it is dead');

# A job is dissolved of which each entity has rows of 35 MB: one by one they are
# held, and sent
start_over();
$api->fault({ status => 422 }, match => { path => 'bulk_identify$' }, times => 1);
sql(q{TRUNCATE accounts;
	INSERT INTO accounts SELECT i, jsonb_build_object('r', 9) || (
		SELECT jsonb_object_agg('p' || j, repeat('x', 65000)) FROM generate_series(1, 60) j) FROM generate_series(1, 4) i;
	SELECT userpilot_bulk_identify_companies(id, metadata || jsonb_build_object('r', r)) FROM (
		SELECT * FROM generate_series(1, 9) r, accounts ORDER BY r) s});
delivered($node, 'postgres');
is(sql('SELECT string_agg(status, \', \') FROM userpilot_jobs'), 'dissolved', 'a job of large entities is dissolved');
oracle_equals($node, 'postgres', $api, '... and they go one by one', @all);
is(dead_letters($node, 'postgres'), 0, '... none of it is dead');
no_violations($api, 'more than is kept');

# --- ids of every sort, through every way, in three encodings ---

my %more = (
	UTF8   => q{, (U&'four bytes \+01F600\+010FFFF'), (U&'\2028\2029\FEFF\FFFD'), (repeat(U&'\+01F600', 512)),
		(U&'combined e\0301'), (U&'\00E9'), (repeat(U&'\00E9', 512))},
	LATIN1 => q{, (chr(233)), (repeat(chr(255), 512)), (chr(128) || chr(159)), (chr(160))},
	# UTF-8 there, too: E'\xf0…' are the bytes of an emoji
	SQL_ASCII => q{, (E'\xc3\xa9'), (E'\xf0\x9f\x98\x80'), (repeat(E'\xc3\xa9', 256))});

# Copies a database's accounts, byte by byte, to where Userpilot's state can be
# read whatever is in it
sub want
{
	my ($db) = @_;
	my $bytes = join ', ', map { "encode(convert_to($_, getdatabaseencoding()), 'hex')" } 'id', 'metadata::text';
	my $text  = join ', ', map { "convert_from(decode($_, 'hex'), '$db')" } 'id', 'm';
	my $rows  = $node->safe_psql($db, "SELECT json_agg(json_build_array($bytes)) FROM accounts") =~ s/\n//gr;

	$text =~ s/'sql_ascii'/'utf8'/g;
	$node->safe_psql('wanted', qq{
		DROP TABLE IF EXISTS accounts;
		CREATE TABLE accounts AS SELECT i AS id, t::jsonb AS metadata FROM
			(SELECT $text FROM (SELECT r ->> 0 AS id, r ->> 1 AS m FROM json_array_elements('$rows') r) h) v (i, t)});
	return;
}

$node->safe_psql('postgres', "CREATE DATABASE wanted TEMPLATE template0 ENCODING 'UTF8' LC_COLLATE 'C' LC_CTYPE 'C'");
foreach my $encoding (sort keys %more)
{
	my $db = lc $encoding;

	start_over();
	$node->safe_psql('postgres',
		"CREATE DATABASE $db TEMPLATE template0 ENCODING '$encoding' LC_COLLATE 'C' LC_CTYPE 'C'");
	create_environment($node, $db, $api, options => "bulk_format 'json'");
	$node->safe_psql(
		$db, qq{
		CREATE TABLE accounts AS SELECT id, jsonb_build_object('v', id, left(id, 254), 1) AS metadata FROM (VALUES
			(E'quote" and \\'apostrophe\\''), (E'back\\\\slash'), (E'line\\nbreak\\r'), (E'tab\\t'),
			(E'\\x01\\x02\\x1f\\x7f'), ('100%41'), ('a/b/../c?d=e&f#g'), (' '), ('{"json":true}'), ('null'), ('0'),
			(E'\\\\u0041\\\\u0000'), (repeat('x', 512)), (repeat('"', 512)), (repeat(chr(1), 512))
			$more{$encoding}) AS v (id)});
	want($db);
	foreach my $format ('json', 'ndjson', 'single')
	{
		start_over($db);
		$node->safe_psql($db,
			$format eq 'single'
			? 'SELECT count(userpilot_identify_company(id, metadata)::text),'
			  . ' count(userpilot_identify_user(id, metadata, id)::text) FROM accounts'
			: qq{ALTER SERVER userpilot OPTIONS (SET bulk_format '$format');
				SELECT userpilot_bulk_identify_companies(id, metadata),
					userpilot_bulk_identify_users(id, metadata, id) FROM accounts});
		delivered($node, $db);
		is(dead_letters($node, $db), 0, "$encoding, $format: nothing died");
		oracle_equals($node, 'wanted', $api, "$encoding, $format", @all, @users);
	}
}
no_violations($api, 'ids');

# What is no UTF-8, or longer, is refused where it is said
foreach my $refused (
	[ 'sql_ascii', q{E'\xe9'},                  '22021: company_id is not valid UTF-8' ],
	[ 'utf8',      q{repeat(U&'\+01F600', 513)}, '22001: company_id is longer than 512 characters' ],
	[ 'latin1',    q{repeat(chr(233), 513)},    '22001: company_id is longer than 512 characters' ])
{
	my ($db, $id, $words) = @$refused;
	my (undef, undef, $err) =
	  $node->psql($db, "\\set VERBOSITY verbose\nSELECT userpilot_bulk_identify_companies($id, '{}')");

	like($err, qr/ERROR:  \Q$words\E/, "$db: $words");
}

done_testing();
