# What the README and the cookbook show is run as it stands: a page that is not
# tried goes wrong with the first change that forgets it.
#
# Blocks of SQL under a line "<!-- run -->" are run in order, each in a session
# of its own.  Only what must differ is replaced: a region by the endpoint of a
# stand-in, and the path of a key file.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Userpilot;

# A job of 10,000 takes 333 seconds at Userpilot, so one second here
$Userpilot::SCALE = 300;

my $tree = "$FindBin::RealBin/../..";
my %api  = (us => Userpilot::StandIn->new, eu => Userpilot::StandIn->new);
my $node = new_node('readme');
my $key  = $node->basedir . '/userpilot.key';

# Companies and people as the README's blocks send them
my %tour = (
	companies => q{SELECT id, jsonb_build_object('name', name, 'plan', plan,
		'monthly_spend', mrr) AS metadata FROM accounts},
	users => q{SELECT id, jsonb_build_object('email', email) AS metadata,
		account_id::text AS company_id FROM people});

sub sql
{
	return $node->safe_psql('postgres', $_[0]);
}

# The marked blocks of a page, each { line => where it begins, sql => ... }.
# Dies of a mark without block and of a block without end.
sub blocks
{
	my ($page) = @_;
	my @lines = split /\n/, slurp_file("$tree/$page");
	my @blocks;

	for (my $i = 0; $i < @lines; $i++)
	{
		next unless $lines[$i] =~ /^\s*<!-- run -->\s*$/;
		die "$page, line " . ($i + 1) . ': no block of SQL follows the mark'
		  unless ($lines[ ++$i ] // '') =~ /^(\s*)```sql\s*$/;

		# a block within a list is indented
		my $indent = $1;
		my $block  = { line => $i + 1, sql => '' };

		while (($lines[ ++$i ] // die "$page: a block has no end") !~ /^\s*```\s*$/)
		{
			$block->{sql} .= ($lines[$i] =~ s/^\Q$indent\E//r) . "\n";
		}
		push @blocks, $block;
	}
	return @blocks;
}

# Puts the stand-ins and the key file in the place of the real ones
sub replaced
{
	my ($sql) = @_;

	$sql =~ s{\bregion '(us|eu)'}{"endpoint '" . $api{$1}->url . "'"}ge;
	$sql =~ s{'/etc/userpilot[\w.-]*\.key'}{'$key'}g;
	return $sql;
}

# Runs a block as one test; returns its messages and its rows
sub run_block
{
	my ($page, $block) = @_;
	my $late = 0;
	my ($rc, $out, $err) = $node->psql(
		'postgres', replaced($block->{sql}),
		timeout   => $Userpilot::PATIENCE,
		timed_out => \$late);

	is($late ? 'too long' : $rc, 0, "$page, line $block->{line}: runs")
	  or diag("$block->{sql}\n$err\n", status($node, 'postgres')->{advice} // '');
	return ($err, $out);
}

# How many records have left for a stand-in, one by one or in jobs
sub records_sent
{
	my $counters = $_[0]->counters;

	return $counters->{bulk_records} + $counters->{calls}{identify};
}

sub jobs
{
	return sql('SELECT count(*) FROM userpilot_jobs');
}

umask 0077;
append_to_file($key, $api{us}->key . "\n");
sql('CREATE ROLE app LOGIN');

# --- the README ---

my (@synced, @before, $checks);
foreach my $block (blocks('README.md'))
{
	my $syncs = $block->{sql} =~ /userpilot_sync_table/;

	@before = (jobs(), records_sent($api{us})) if $syncs;
	my ($err, $out) = run_block('README.md', $block);
	push @synced, split /\n/, $out if $syncs;
	$checks .= $err if $block->{sql} =~ /userpilot_check\(/;
}
delivered($node, 'postgres');

is( join("\n", grep { /\[!!\]/ && !/ makes this database the sender$/ } split /\n/, $checks // ''),
	'', 'userpilot_check finds all well, but that nobody is the sender');
like($checks, qr/\[ok\] the API key is accepted/, '... and has asked Userpilot');
is_deeply(\@synced, [ '2500|2500|0|0', '500|500|0|0', '2500|0|2500|0' ],
	'the tables are queued as a whole, and a second time not at all');
cmp_ok($before[0], '>', 0, 'there were jobs');
is(jobs(), $before[0], '... and none more for what Userpilot has already');
is(records_sent($api{us}), $before[1],
	'... which was not sent again in real time either');
is_deeply($api{us}->entity('companies', '42'),
	{ metadata => { name => 'Company 42', plan => 'enterprise', monthly_spend => 42 } },
	'the single change has arrived');
oracle_equals($node, 'postgres', $api{us}, 'README', %tour);
is(dead_letters($node, 'postgres'), 0, 'no dead letters');
no_violations($api{us}, 'README');

# --- the cookbook, whose recipes go on with the README's tables ---

foreach my $block (blocks('doc/cookbook.md'))
{
	run_block('doc/cookbook.md', $block);
}

delivered($node, 'postgres');
is(sql('SELECT count(*) FROM userpilot_queue'), 0, 'all the cookbook sends arrives');
is_deeply(
	$api{us}->entity('users', sql('SELECT id FROM contacts')),
	{
		company_id => '42',
		metadata   => {
			name       => 'Jane Doe',
			email      => 'jane@example.com',
			is_admin   => true,
			created_at => '2025-01-31T11:00:00+00:00',
			theme      => 'dark',
			tours      => 3
		}
	},
	'... as the cookbook says');
is_deeply($api{us}->entity('companies', '44'),
	{ metadata =>
		  { name => 'Company 44', plan => 'free', monthly_spend => 44, seats => 5 } },
	'... with the property added');
is(dead_letters($node, 'postgres'), 0, '... without dead letters');
cmp_ok(scalar keys %{ $api{eu}->get('/_/state?kind=companies') },
	'>', 0, '... also in the other region');
no_violations($api{$_}, "cookbook, $_") foreach sort keys %api;

done_testing();
