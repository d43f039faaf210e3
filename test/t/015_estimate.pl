# Once a job runs, userpilot_status says when all will be delivered, right within
# 20 percent.  The clock runs only as fast as leaves the machine's own time small.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time usleep);
use Userpilot;

my $scale = 25;
my $api   = Userpilot::StandIn->new(scale => $scale);
my $node  = new_node('estimate', scale => $scale);
my (@estimates, $end);

sub sql
{
	return $node->safe_psql('postgres', $_[0]);
}

create_environment($node, 'postgres', $api);
is(sql(q{SELECT userpilot_bulk_identify_companies(i, jsonb_build_object('name', 'n' || i))
	FROM generate_series(1, 12000) i}), 12000, 'more than a job takes');
until_true(
	'all is delivered',
	sub {
		my ($running, $left, $eta) = split /\|/,
		  sql(q{SELECT coalesce(job_percent, 0) > 0, pending, extract(epoch FROM eta) FROM userpilot_status});

		push @estimates, [ time, $eta / $scale ] if $running eq 't' && $left > 0;
		$end = time;
		return $left == 0;
	});

# Of the last seconds an estimate says little: half a second that this machine
# is late is a quarter of two
my @judged = grep { $end - $_->[0] > 5 } @estimates;
my @ratios = sort { $a <=> $b } map { $_->[1] / ($end - $_->[0]) } @judged;

cmp_ok(scalar(@judged), '>', 20, 'there were estimates while a job ran');
diag(sprintf('%d estimates over %.1f s, estimated to real: %.2f to %.2f',
		scalar(@judged), $end - $judged[0][0], @ratios[ 0, -1 ]));
cmp_ok($ratios[0],  '>=', 0.8, '... none was 20 percent too short');
cmp_ok($ratios[-1], '<=', 1.2, '... nor too long');
no_violations($api, 'estimate');
$node->stop;
done_testing();
