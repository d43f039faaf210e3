=pod

=head1 NAME

Writers - processes that change and send the tables of Reliability

=head1 DESCRIPTION

They go on whatever happens to the server: a transaction that failed is
followed by another.

=cut

package Writers;

use strict;
use warnings;

use Exporter 'import';
use POSIX ();
use PostgreSQL::Test::Utils;
use Time::HiRes 'usleep';
use Reliability;

our @EXPORT = qw(
  start_writers
  stop_writers
  written
);

my $bulk_companies = 'SELECT userpilot_bulk_identify_companies(id, metadata) FROM account_meta';
my $bulk_users = 'SELECT userpilot_bulk_identify_users(id, metadata, company_id) FROM person_meta';

# What a writer does in one transaction; %d is a random row
my @transactions = (
	('UPDATE accounts SET version = version + 1 WHERE id = %d') x 4,
	('UPDATE people SET version = version + 1, account_id = 1 + account_id %% 300 WHERE id = %d') x 4,
	# beyond the first 100 rows it is the bulk lane's
	'UPDATE accounts SET version = version + 1 WHERE id IN'
	  . ' (SELECT id FROM accounts WHERE id %% 2 = %d %% 2 ORDER BY id FOR UPDATE)',
	$bulk_companies,
	$bulk_users,
	# reads what others change meanwhile
	"BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT %d; SELECT pg_sleep(0.2); $bulk_companies; COMMIT",
	"BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT %d; SELECT pg_sleep(0.2); $bulk_users; COMMIT",
	# half of it never happened
	'BEGIN; UPDATE accounts SET version = version + 1 WHERE id = %1$d; SAVEPOINT s;'
	  . ' UPDATE accounts SET version = version + 1000 WHERE id = %1$d; ROLLBACK TO s; COMMIT',
	'BEGIN; UPDATE people SET version = version + 1000 WHERE id = %d; ROLLBACK');

# ... and of what is sent once only, or flips; one time in five many at once
my @once = (
	('INSERT INTO once (value) SELECT %d FROM generate_series(1, 3)') x 2,
	'INSERT INTO once (value) SELECT %d FROM generate_series(1, 120 * (random() < 0.2)::int)',
	'WITH new AS (INSERT INTO once_in_bulk (value)'
	  . ' SELECT %d FROM generate_series(1, 50 * (random() < 0.2)::int) RETURNING id, value)'
	  . q{ SELECT userpilot_bulk_identify_companies(id, jsonb_build_object('value', value)) FROM new},
	(q{UPDATE plans SET plan = translate(plan, 'ab', 'ba') WHERE id = %d}) x 2,
	q{UPDATE plans SET plan = translate(plan, 'ab', 'ba') WHERE id %% 2 = %d %% 2});

my @writers;

# A byte here for every five transactions
sub _log { return $node->basedir . '/written'; }

# A writer: transactions until it is told to stop or its parent is gone
sub _write
{
	my ($conf) = @_;
	my $parent = getppid;
	my $stop   = 0;
	my @psql   = ($node->installed_command('psql'), '-X', '-q', '-v', 'ON_ERROR_STOP=1',
		'-d', $node->connstr('postgres'));

	push @transactions, @once if with_once();
	$ENV{PGOPTIONS} = $conf;
	local $SIG{TERM} = sub { $stop = 1; };
	open(STDOUT, '>', '/dev/null') or die $!;
	open(STDERR, '>', '/dev/null') or die $!;
	while (!$stop && getppid == $parent)
	{
		# several a connection, each one an SQL string and so a transaction
		my @some = map { ('-c', sprintf($transactions[ rand @transactions ], 1 + int(rand 300))) } 1 .. 5;

		append_to_file(_log(), '.') if system(@psql, @some) == 0;
		usleep(20_000);
	}
	return;
}

=pod

=head1 FUNCTIONS

=over

=item start_writers($n, $conf), stop_writers()

n processes that change and send the tables until stopped; every second one
with these settings (as in PGOPTIONS).

=item written()

How many of those transactions they ended, at least.

=back

=cut

sub start_writers
{
	my ($n, $conf) = @_;

	foreach my $i (1 .. $n)
	{
		my $pid = fork // die "fork: $!";

		if ($pid == 0)
		{
			srand($$);
			eval { _write($i % 2 ? $conf // '' : '') };
			# no END blocks: node and stand-in are the parent's
			POSIX::_exit(0);
		}
		push @writers, $pid;
	}
	return;
}

sub stop_writers
{
	local $?;
	kill 'TERM', @writers;
	waitpid($_, 0) foreach @writers;
	@writers = ();
	return;
}

sub written { return 5 * ((-s _log()) // 0); }

1;
