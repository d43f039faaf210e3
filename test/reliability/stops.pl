# The whole cluster stops at once (immediate) while things are under way; half
# of the writers do not wait for their commits to be on disk.  What is lost so
# must never have left for Userpilot.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../t", $FindBin::RealBin;

use POSIX ();
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes 'usleep';
use Userpilot;
use Reliability;
use Writers;

# the longest time that a commit may stay in memory
set_up('stops', conf => "wal_writer_delay = 10s\nfull_page_writes = off");

my $rounds = rounds(6);
my ($above, $lost) = (0, 0);

# A session that raises one version as fast as it can without waiting for the
# disk, and writes down what was committed: the witness that commits get lost
sub start_witness
{
	my $script = $node->basedir . '/witness.sql';
	my $pid;

	if (!-e $script)
	{
		append_to_file($script, "SET synchronous_commit = off;\n"
			  . "UPDATE accounts SET version = version + 1 WHERE id = 300 RETURNING version;\n" x 100_000);
	}
	$pid = fork // die "fork: $!";
	return $pid if $pid;
	open(STDOUT, '>', $node->basedir . '/witnessed') or die $!;
	open(STDERR, '>', '/dev/null') or die $!;
	exec($node->installed_command('psql'), '-X', '-q', '-At', '-f', $script, '-d', $node->connstr('postgres'))
	  or POSIX::_exit(1);
}

sub witnessed
{
	my ($last) = slurp_file($node->basedir . '/witnessed') =~ /([0-9]+)\n[^\n]*\z/;

	return $last // 0;
}

# Stops; counts what left and did not stay, before anything more is sent
sub stop_and_look
{
	my $state;

	$node->stop('immediate');
	stop_writers();
	$api->no_faults;

	# a job accepted before goes on at Userpilot, with what was in it
	$api->finish_jobs;
	$state = { map { $_ => $api->get("/_/state?kind=$_") } 'companies', 'users' };
	$node->append_conf('postgresql.conf', 'userpilot.deliver = off');
	$node->start;
	$above += above_tables($state);
	$node->append_conf('postgresql.conf', 'userpilot.deliver = on');
	return;
}

# Many write; every other time the next stop comes before all is delivered
sub busy_stop
{
	my $witness;

	start_writers(4, '-c synchronous_commit=off');
	$witness = start_witness();
	usleep(1_000_000 + rand 1_500_000);
	stop_and_look();
	{ local $?; waitpid($witness, 0); }
	$lost++ if sql('SELECT version FROM accounts WHERE id = 300') < witnessed();
	$node->reload;
	return;
}

# Nobody else makes anybody's commit durable, and the stop comes as soon as
# Userpilot has the change
sub quiet_stop
{
	my $version;

	delivered($node, 'postgres');
	$api->fault({ hang => 5, apply => true }, match => { path => '/identify$' });
	$version = sql('SET synchronous_commit = off;'
		  . ' UPDATE accounts SET version = version + 1 WHERE id = 1 RETURNING version');
	until_true('it arrives', sub { return $api->entity('companies', 1)->{metadata}{version} == $version; });
	stop_and_look();
	$node->reload;
	return;
}

foreach my $round (1 .. $rounds)
{
	busy_stop();
	quiet_stop() if $round % 2;
}
is($above, 0, 'nothing was sent that the database does not hold');
ended_well("$rounds immediate stops");
diag(sprintf('%d stops under load, with commits lost in %d; %d quiet ones; %d transactions or more',
		$rounds, $lost, int(($rounds + 1) / 2), written()));
unlike(slurp_file($node->logfile), qr/PANIC|signal 11|signal 6|TRAP/, '... nothing else crashed');
$node->stop;
done_testing();
