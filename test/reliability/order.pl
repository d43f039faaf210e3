# Transactions that end in another order than they wrote, or not at all, or
# only after a restart: Userpilot gets what was committed, and what others
# commit does not wait for a transaction that has not ended.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../t", $FindBin::RealBin;

use IO::Handle;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Userpilot;
use Reliability;

set_up('order');

my $rounds = rounds(3);
my %table  = (companies => 'accounts', users => 'people');
my %bulk   = (
	companies => 'SELECT userpilot_bulk_identify_companies(id, metadata) FROM account_meta;',
	users     => 'SELECT userpilot_bulk_identify_users(id, metadata, company_id) FROM person_meta;');

# SQL that raises the versions of rows
sub up
{
	my ($kind, $from, $to) = @_;

	return "UPDATE $table{$kind} SET version = version + 1 WHERE id BETWEEN $from AND $to;";
}

# Whether Userpilot comes to have what is committed of one entity
sub arrives
{
	my ($kind, $id) = @_;
	my $version = sql("SELECT version FROM $table{$kind} WHERE id = $id");

	return ok(
		eval {
			until_true('it arrives',
				sub { return $api->entity($kind, $id)->{metadata}{version} == $version; });
		},
		"$kind $id arrives");
}

# A session that has run these statements in a transaction it leaves open;
# what is printed to it comes next
sub open_transaction
{
	my ($statements) = @_;
	my @command = ($node->installed_command('psql'), '-X', '-q', '-o', '/dev/null',
		'-d', $node->connstr('postgres') . ' application_name=open');

	open(my $session, '|-', @command) or die "psql: $!";
	$session->autoflush(1);
	print $session "BEGIN; $statements SELECT 'written';\n";
	$node->poll_query_until('postgres',
		q{SELECT count(*) = 1 FROM pg_stat_activity WHERE application_name = 'open'
			AND state = 'idle in transaction' AND query ~ 'written'})
	  or die 'the transaction is not open';
	return $session;
}

sub end_transaction
{
	my ($session, $how) = @_;

	print $session "$how;\n";
	close($session) or die "psql: $?";
	return;
}

# Rows 1 to 5 wait in an open transaction, perhaps with a bulk SELECT that
# reads what was before it
sub long_transaction
{
	my ($kind, $how, $isolation) = @_;
	my $session = open_transaction(
		"SET TRANSACTION ISOLATION LEVEL $isolation; SELECT count(*) FROM accounts;"
		  . up($kind, 1, 5) . ($isolation eq 'REPEATABLE READ' ? $bulk{$kind} : ''));

	sql(up($kind, 6, 20));
	arrives($kind, 20);
	arrives($kind, 5);
	sql($bulk{$kind});
	sql(up($kind, 150, 300));
	arrives($kind, 300);
	end_transaction($session, $how);
	arrives($kind, 1);
	return;
}

sub savepoints
{
	my ($kind) = @_;

	sql('BEGIN;' . up($kind, 30, 30) . 'SAVEPOINT a;' . up($kind, 30, 31) . 'SAVEPOINT b;'
		  . up($kind, 30, 250) . $bulk{$kind} . 'ROLLBACK TO b;' . up($kind, 32, 32)
		  . 'RELEASE a;' . up($kind, 33, 33) . 'COMMIT');
	sql('BEGIN;' . up($kind, 30, 250) . $bulk{$kind} . 'ROLLBACK');
	arrives($kind, $_) foreach 30 .. 33;
	return;
}

# Two prepared transactions, decided in the other order, perhaps after the
# restart of everything; others commit meanwhile
sub prepared
{
	my ($kind, $restart) = @_;

	sql('BEGIN;' . up($kind, 40, 45) . "PREPARE TRANSACTION 'first'");
	sql('BEGIN;' . up($kind, 46, 190) . "PREPARE TRANSACTION 'second'");
	sql('BEGIN;' . up($kind, 200, 205) . "PREPARE TRANSACTION 'never'");
	sql(up($kind, 210, 215) . $bulk{$kind});
	arrives($kind, 215);
	if ($restart)
	{
		$node->stop($restart);
		$node->start;
	}
	sql(up($kind, 216, 217));
	sql(q{COMMIT PREPARED 'second'});
	arrives($kind, 190);
	sql(up($kind, 46, 46));
	sql(q{ROLLBACK PREPARED 'never'});
	sql(q{COMMIT PREPARED 'first'});
	arrives($kind, $_) foreach 40, 46, 200, 217;
	return;
}

foreach my $round (1 .. $rounds)
{
	foreach my $kind ('companies', 'users')
	{
		foreach my $how ('COMMIT', 'ROLLBACK')
		{
			long_transaction($kind, $how, $_) foreach 'READ COMMITTED', 'REPEATABLE READ';
		}
		savepoints($kind);
		prepared($kind, (undef, 'fast', 'immediate')[ $round % 3 ]);
	}
	ended_well("round $round");
}
is(stale(), 0, 'no version ever went down at Userpilot');
diag("$rounds rounds");
$node->stop;
done_testing();
