# Hours of a dead API while 30,000 changes are made: connections refused, then
# 5xx, then silence.  Nothing dies, no attempt is used up, few calls are made;
# when it is back, everything is delivered, within the limits.  ROUNDS is the
# number of Userpilot's hours.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../t";

use List::Util 'max';
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time usleep);
use Userpilot;

# An hour is 18 seconds; a call that hangs takes 3 minutes and 20 seconds
$Userpilot::SCALE    = 200;
$Userpilot::PATIENCE = 180;

my $hours   = $ENV{ROUNDS} || 3;
my $changes = 30_000;
my $each    = $changes / 30;
my $api     = Userpilot::StandIn->new(history => 10);
my $node    = new_node('outage');

sub sql
{
	return $node->safe_psql('postgres', $_[0]);
}

create_environment($node, 'postgres', $api, options => "timeout '1'");
sql(q{
	CREATE TABLE accounts (id int PRIMARY KEY, version int NOT NULL);
	CREATE VIEW account_meta AS SELECT id, jsonb_build_object('version', version) AS metadata FROM accounts;
	CREATE FUNCTION to_userpilot() RETURNS trigger LANGUAGE plpgsql AS $$
	BEGIN
		PERFORM userpilot_identify_company(NEW.id, jsonb_build_object('version', NEW.version));
		RETURN NULL;
	END $$;
	CREATE TRIGGER to_userpilot AFTER INSERT OR UPDATE ON accounts
		FOR EACH ROW EXECUTE FUNCTION to_userpilot();
	INSERT INTO accounts SELECT i, 0 FROM generate_series(1, 50) i});
delivered($node, 'postgres');

# 1,000 changes, each in a transaction of its own: new rows, and every second
# time newer versions of them
sub change
{
	my ($n) = @_;
	my $from = 1000 * int($n / 2);

	sql(qq{DO \$\$ BEGIN FOR i IN 1 .. $each LOOP
			INSERT INTO accounts VALUES ($from + 100 + i, $n)
				ON CONFLICT (id) DO UPDATE SET version = $n;
			COMMIT;
		END LOOP; END \$\$});
	return;
}

# Nothing may be used up or given up, whatever the outage is like
sub check
{
	my ($what) = @_;
	my $status = status($node, 'postgres');

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	is($status->{state}, 'outage', "$what: an outage");
	is(dead_letters($node, 'postgres'), 0, '... nothing died');
	is(sql('SELECT coalesce(max(attempts), 0) FROM userpilot_profiles WHERE attempts > 1'),
		0, '... and no attempt was used up');
	return;
}

my $seconds = 3600 / $Userpilot::SCALE * $hours / 3;
my $n       = 0;
my $began   = time;

# How outages begin, each before the one before it has ended
my %outages = (
	'1 refused' => sub {
		$api->fault({ status => 502, body => 'Bad gateway' }, match => { path => '^/v1/' }, times => undef);
		$api->post('/_/away', { seconds => $seconds });
	},
	'2 5xx'     => sub { },
	'3 silence' => sub { $api->pause; });

foreach my $outage (sort keys %outages)
{
	my $end = time + $seconds;

	$outages{$outage}->();
	foreach my $part (1 .. 10)
	{
		change($n++);
		my $left = $end - 1 - time;
		usleep(1e6 * $left / (11 - $part)) if $left > 0;
	}
	check($outage);
	until_true('the hour is over', sub { return time >= $end; });
}
is(sql('SELECT count(*) FROM userpilot_queue'), $changes, "all $changes changes are queued");

# Calls by lane.  The first ones are under way when the outage begins, and then
# 1, 2, 4, 8, 16 and 32 s lie between probes; from then on 60 s.
my $minutes = (time - $began) * $Userpilot::SCALE / 60;
my %path    = (realtime => '^/v1/companies/identify$', bulk => '^/v1/(background_jobs|companies/bulk)');

foreach my $lane (sort keys %path)
{
	my @gaps = split ' ', sql(
		qq{SELECT coalesce(string_agg(round(gap)::text, ' ' ORDER BY began), '') FROM (
			SELECT began, $Userpilot::SCALE * extract(epoch FROM began - lag(began) OVER (ORDER BY began)) AS gap
			FROM (SELECT at - ms * interval '1 ms' AS began FROM userpilot_requests
				WHERE path ~ '$path{$lane}' AND outcome <> 'acknowledged') r) g WHERE gap IS NOT NULL});

	# the clocks of this test are 200 times less exact than others
	my @short = grep { $_ < 55 } @gaps;
	my @sorted = sort { $a <=> $b } @gaps;

	cmp_ok(scalar(@gaps), '>', 5, "$lane: it was probed");
	cmp_ok(scalar(@short), '<=', $lane eq 'realtime' ? 16 + 6 : 6,
		'... at most once a minute, and more often at first only')
	  or diag("seconds between calls: @gaps");
	diag(sprintf('%s: %d calls in %.0f API minutes; seconds between them: median %s, most %s',
			$lane, @gaps + 1, $minutes, $sorted[ @gaps / 2 ], $sorted[-1]));
}
is(outcomes($node, 'postgres', '.') =~ s/acknowledged, //r, 'outage', 'the log calls it that');

# --- it is back ---

my $before  = $api->counters;
my $back    = time;
my $records = sql('SELECT count(*) FROM accounts');

$api->no_faults;
$api->go_on;
until_true('the first call succeeds',
	sub { return sql("SELECT count(*) > 50 FROM userpilot_requests WHERE outcome = 'acknowledged'") eq 't'; });
my $resumed = (time - $back) * $Userpilot::SCALE;

delivered($node, 'postgres');
$minutes = (time - $back) * $Userpilot::SCALE / 60;
cmp_ok($resumed, '<', 600, 'delivery resumes by itself');
is(dead_letters($node, 'postgres'), 0, 'nothing died');
ok($node->poll_query_until('postgres', 'SELECT NOT EXISTS (SELECT FROM userpilot_queue)'), 'the queue is empty');
oracle_equals($node, 'postgres', $api, 'after the outage', companies => 'SELECT * FROM account_meta');
no_violations($api, 'outage');
is($api->counters->{statuses}{429} // 0, 0, '... nor was it throttled');
diag(sprintf('%d companies delivered in %.1f API minutes after the first call, which came after %.0f API seconds',
		$records, $minutes, $resumed));
unlike(slurp_file($node->logfile), qr/PANIC|TRAP|was terminated by signal/, 'nothing crashed');
$node->stop;
done_testing();
