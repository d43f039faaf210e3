# TLS: no key leaves before the peer's certificate has been verified; and
# HTTP/2, which a peer behind TLS may choose.  nginx stands before the stand-in.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use IO::Socket::INET;
use IPC::Run;
use POSIX ();
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes 'usleep';
use Userpilot;

my $program = $ENV{NGINX} // '/usr/sbin/nginx';

plan skip_all => 'nginx is missing' unless -x $program;

my $dir = PostgreSQL::Test::Utils::tempdir();
my $nginx;

# --- certificates ---

sub openssl
{
	my @command = ('openssl', @_);
	my $out;

	IPC::Run::run(\@command, '<', \undef, '>&', \$out) or die "@command: $out";
	return;
}

# An authority: ca.crt and ca.key of that name
sub authority
{
	my ($name) = @_;

	openssl('req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-days', 2, '-subj', "/CN=$name",
		'-keyout', "$dir/$name.key", '-out', "$dir/$name.crt");
	return;
}

# A server's certificate, signed by the authority "ours"
sub certificate
{
	my ($name, $who, $days) = @_;

	append_to_file("$dir/$name.ext", "subjectAltName=$who\n");
	openssl('req', '-newkey', 'rsa:2048', '-nodes', '-subj', "/CN=$name",
		'-keyout', "$dir/$name.key", '-out', "$dir/$name.csr");
	openssl('x509', '-req', '-in', "$dir/$name.csr", '-days', $days, '-extfile', "$dir/$name.ext",
		'-CA', "$dir/ours.crt", '-CAkey', "$dir/ours.key", '-CAcreateserial', '-out', "$dir/$name.crt");
	return;
}

authority($_) foreach 'ours', 'theirs';
certificate('good',    'IP:127.0.0.1',          2);
certificate('other',   'DNS:elsewhere.invalid', 2);
certificate('expired', 'IP:127.0.0.1',          0);

# --- nginx: a port for each certificate ---

my $api  = Userpilot::StandIn->new;
my %port = map { $_ => PostgreSQL::Test::Cluster::get_free_port() } 'good', 'other', 'expired', 'old';
my $log  = "$dir/access.log";

# Servers whose kept connections end after so many requests
sub start_nginx
{
	my ($requests) = @_;
	my $servers = '';

	foreach my $name (sort keys %port)
	{
		my $certificate = $name eq 'old' ? 'good' : $name;
		my $version = $name eq 'old' ? "ssl_protocols TLSv1 TLSv1.1; ssl_ciphers DEFAULT\@SECLEVEL=0;" : '';

		$servers .= <<"END";
	server {
		listen 127.0.0.1:$port{$name} ssl http2;
		ssl_certificate $dir/$certificate.crt;
		ssl_certificate_key $dir/$certificate.key;
		$version
		location / { proxy_pass @{[ $api->url ]}; proxy_http_version 1.1; }
	}
END
	}
	unlink "$dir/nginx.conf";
	append_to_file("$dir/nginx.conf", <<"END");
daemon off;
worker_processes 2;
pid $dir/nginx.pid;
error_log $dir/error.log;
events { worker_connections 256; }
http {
	log_format protocol '\$server_protocol \$status \$request_method \$uri';
	access_log $log protocol;
	client_body_temp_path $dir/body; proxy_temp_path $dir/proxy; fastcgi_temp_path $dir/fastcgi;
	uwsgi_temp_path $dir/uwsgi; scgi_temp_path $dir/scgi;
	client_max_body_size 60m;
	keepalive_requests $requests;
	http2_max_concurrent_streams 4;
$servers}
END
	$nginx = IPC::Run::start([ $program, '-p', $dir, '-c', "$dir/nginx.conf", '-e', "$dir/error.log" ],
		'<', \undef, '>', "$dir/nginx.out", '2>&1');
	until_true('nginx serves', sub { IO::Socket::INET->new(PeerAddr => "127.0.0.1:$port{good}") });
	return;
}

sub stop_nginx
{
	return unless $nginx;
	$nginx->signal('QUIT');
	$nginx->finish;
	$nginx = undef;
	return;
}

sub accesses
{
	return split /\n/, slurp_file($log);
}

END
{
	local $?;
	$nginx->kill_kill if $nginx;
}

start_nginx(1000);

# --- who is not who he says he is gets nothing ---

my $node = new_node('tls');

create_environment($node, 'postgres', $api, enable => 0);
$node->safe_psql('postgres', qq{
	ALTER SERVER userpilot OPTIONS (SET endpoint 'https://127.0.0.1:$port{good}', ADD ca_file '$dir/theirs.crt');
	SELECT userpilot_enable('userpilot');
	CREATE TABLE accounts (id int PRIMARY KEY, metadata jsonb);
	INSERT INTO accounts VALUES (1, '{"v": 0, "text": ""}');
	SELECT userpilot_identify_company(id, metadata) FROM accounts});

# Tests that a call to that port fails for that reason, and nothing is sent
sub refused
{
	my ($name, $ca_file, $reason) = @_;

	$node->safe_psql('postgres', "ALTER SERVER userpilot OPTIONS ("
		  . "SET endpoint 'https://127.0.0.1:$port{$name}', SET ca_file '$ca_file')");
	is( until_true(
			$reason,
			sub {
				return $node->safe_psql('postgres',
					"SELECT DISTINCT outcome FROM userpilot_requests WHERE error ~* '$reason'");
			}),
		'outage',
		"a certificate that is not good: $reason");
	return;
}

refused('good', "$dir/theirs.crt", 'self.signed certificate|unable to get local issuer');
refused('other', "$dir/ours.crt", 'no alternative certificate subject name matches');
refused('expired', "$dir/ours.crt", 'certificate has expired');
refused('old', "$dir/ours.crt", 'protocol');
is_deeply([accesses()], [], 'nobody was sent a request');
is($api->counters->{calls}{identify}, 0, '... so the key has not left');
is($node->safe_psql('postgres', 'SELECT count(*) FROM userpilot_queue'), 1, '... and the change waits');

$node->safe_psql('postgres', "ALTER SERVER userpilot OPTIONS ("
	  . "SET endpoint 'https://127.0.0.1:$port{good}', SET ca_file '$dir/ours.crt')");
delivered($node, 'postgres');
oracle_equals($node, 'postgres', $api, 'a certificate that is good', companies => 'SELECT * FROM accounts');
is_deeply([accesses()], ['HTTP/2.0 200 POST /v1/companies/identify'], '... over HTTP/2');

# --- HTTP/2: calls share connections, whose ends are no trouble ---

# Both lanes at work, as JSON or as a file
sub both_lanes
{
	my ($version) = @_;

	$node->safe_psql('postgres', qq{
		TRUNCATE accounts;
		INSERT INTO accounts SELECT i, jsonb_build_object('v', $version, 'text', repeat('x', 300))
			FROM generate_series(1, 6000) i;
		SELECT userpilot_bulk_identify_companies(id, metadata) FROM accounts});
	for my $i (0 .. 4)
	{
		$node->safe_psql('postgres', "SELECT count(userpilot_identify_user(id, metadata, id)::text)"
			  . " FROM accounts WHERE id BETWEEN 80 * $i + 1 AND 80 * $i + 80");
	}
	delivered($node, 'postgres');
	oracle_equals($node, 'postgres', $api, "version $version: both lanes over HTTP/2",
		companies => 'SELECT * FROM accounts',
		users     => 'SELECT id, metadata, id::text AS company_id FROM accounts WHERE id <= 400');
	is(dead_letters($node, 'postgres'), 0, '... nothing died');
	is(scalar(grep { !m{^HTTP/2} } accesses()), 0, '... every call over HTTP/2');
	return;
}

forget($node, 'postgres', 'requests', 'profiles');
stop_nginx();
start_nginx(20);
both_lanes(1);
unlike(outcomes($node, 'postgres', '.'), qr/outage/, '... and connections that end after 20 calls are no outage');
like(outcomes($node, 'postgres', 'identify'), qr/back-off/, '... which did end calls');

# New processes take over again and again
forget($node, 'postgres', 'profiles');
$node->safe_psql('postgres', q{ALTER SERVER userpilot OPTIONS (ADD bulk_format 'ndjson')});
{
	my $reload = fork() // die "fork: $!";

	if ($reload == 0)
	{
		for (1 .. 40)
		{
			$nginx->signal('HUP');
			usleep(100_000);
		}
		POSIX::_exit(0);
	}
	both_lanes(2);
	waitpid($reload, 0);
}
is($node->safe_psql('postgres', q{SELECT string_agg(DISTINCT format, ',') FROM userpilot_jobs WHERE status = 'completed'}),
	'json,ndjson', 'both formats were taken');
no_violations($api, 'TLS');

stop_nginx();
done_testing();
