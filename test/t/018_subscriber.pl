# A subscriber: with a trigger that fires always it can be the sender of what it
# subscribes to, but not while the queue itself comes from the publisher.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Userpilot;

my $api        = Userpilot::StandIn->new;
my $publisher  = new_node('publisher', init => [ allows_streaming => 'logical' ]);
my $subscriber = new_node('subscriber');
my $table      = 'CREATE TABLE accounts (id int PRIMARY KEY, name text)';
my $trigger    = q{CREATE TRIGGER to_userpilot AFTER INSERT OR UPDATE ON accounts
	FOR EACH ROW EXECUTE FUNCTION userpilot_company_trigger('id', 'name')};
my $copy = q{SELECT NOT EXISTS (SELECT FROM pg_subscription_rel WHERE srsubstate NOT IN ('r', 's'))
	AND EXISTS (SELECT FROM pg_subscription_rel)};

create_environment($publisher, 'postgres', $api, enable => 0);
$publisher->safe_psql('postgres', "$table; $trigger;
	CREATE PUBLICATION accounts FOR TABLE accounts; CREATE PUBLICATION everything FOR ALL TABLES;
	INSERT INTO accounts VALUES (1, 'before')");

create_environment($subscriber, 'postgres', $api);
$subscriber->safe_psql('postgres', "$table; $trigger; ALTER TABLE accounts ENABLE ALWAYS TRIGGER to_userpilot");

sub subscribe
{
	my ($publication) = @_;
	my $connection  = $publisher->connstr . ' dbname=postgres';

	$subscriber->safe_psql('postgres',
		"CREATE SUBSCRIPTION $publication CONNECTION '$connection' PUBLICATION $publication");
	return;
}

# --- the table alone ---

subscribe('accounts');
$subscriber->poll_query_until('postgres', $copy) or die 'not copied';
$publisher->safe_psql('postgres', q{INSERT INTO accounts VALUES (2, 'after'); UPDATE accounts SET name = name || '!'});
$publisher->wait_for_catchup('accounts');
delivered($subscriber, 'postgres');
oracle_equals($subscriber, 'postgres', $api, 'what is subscribed to is sent',
	companies => q{SELECT id, jsonb_build_object('name', name) AS metadata FROM accounts});
is($subscriber->safe_psql('postgres', q{SELECT finding FROM userpilot_check_trigger('accounts')}),
	'ok', '... and nothing is wrong with the trigger');
$subscriber->safe_psql('postgres', 'DROP SUBSCRIPTION accounts; TRUNCATE accounts');

# --- everything, and so the publisher's queue ---

my $before = sent_since($api);
subscribe('everything');
is(status($subscriber, 'postgres')->{state}, 'disabled', 'with the queue of another it sends nothing');
like(status($subscriber, 'postgres')->{advice}, qr/a subscription fills userpilot_queue/, '... and says why');
$subscriber->poll_query_until('postgres', q{SELECT EXISTS (SELECT FROM userpilot_queue)}) or die 'nothing came';
is(sent_since($api, $before), 0, '... though there is something queued');
$subscriber->safe_psql('postgres', 'DROP SUBSCRIPTION everything');
is(status($subscriber, 'postgres')->{advice}, undef, 'without it it is the sender again');
no_violations($api, 'subscriber');

done_testing();
