=pod

=head1 NAME

Userpilot::StandIn - the stand-in for the Userpilot API, as a process

=head1 DESCRIPTION

Starts and stops test/standin.py on the loopback interface and speaks to its
control endpoints, which its own documentation describes.  Only core modules
are used.

=cut

package Userpilot::StandIn;

use strict;
use warnings;

use Cwd 'abs_path';
use File::Basename;
use HTTP::Tiny;
use JSON::PP;
use PostgreSQL::Test::Utils;

my $program = dirname(abs_path(__FILE__)) . '/../../standin.py';
my $json    = JSON::PP->new->utf8->allow_nonref;
my @running;

=pod

=head1 METHODS

=over

=item Userpilot::StandIn->new(scale => N, key => K, 'records-per-minute' => N, ...)

Starts one; arguments are those of the program.

=cut

sub new
{
	my ($class, %args) = @_;
	my $self = bless {
		args => { key => 'test-key', scale => $Userpilot::SCALE, port => 0, %args },
		http => HTTP::Tiny->new(
			timeout     => 30,
			keep_alive  => 0,
			http_proxy  => undef,
			https_proxy => undef,
			proxy       => undef),
	}, $class;

	push @running, $self;
	$self->start;
	return $self;
}

=pod

=item $api->start

Starts it again after stop, with nothing but its arguments and port left.

=cut

sub start
{
	my ($self) = @_;
	my @command = ($ENV{PYTHON} // 'python3', $program, '--parent-pid', $$);
	my $port;

	push @command, "--$_", $self->{args}{$_} foreach sort keys %{ $self->{args} };
	$self->{pid} = open($self->{out}, '-|', @command)
	  or die "could not start the stand-in: $!";
	$port = readline($self->{out});
	die 'the stand-in did not start' unless defined $port;
	chomp($port);
	$self->{args}{port} = $port;
	return;
}

=pod

=item $api->stop

Ends the process: connections are refused from now on.

=cut

sub stop
{
	my ($self) = @_;

	return unless $self->{pid};
	local $?;
	kill 'TERM', $self->{pid};
	close $self->{out};
	$self->{pid} = undef;
	return;
}

sub port { my ($self) = @_; return $self->{args}{port}; }
sub url  { my ($self) = @_; return "http://127.0.0.1:$self->{args}{port}"; }
sub key  { my ($self) = @_; return $self->{args}{key}; }

=pod

=item $api->raw($path)

The answer to GET, as text.

=cut

sub raw
{
	my ($self, $path) = @_;

	return $self->_call('GET', $path);
}

sub _call
{
	my ($self, $method, $path, $argument) = @_;
	my %options =
	  defined $argument ? (content => $json->encode($argument)) : ();
	my $answer = $self->{http}->request($method, $self->url . $path, \%options);

	die "$method $path: $answer->{status} $answer->{content}"
	  unless $answer->{success};
	return $answer->{content};
}

# GET and POST of control endpoints, decoded
sub get
{
	my ($self, $path) = @_;

	return $json->decode($self->_call('GET', $path));
}

sub post
{
	my ($self, $path, $argument) = @_;

	return $json->decode($self->_call('POST', $path, $argument // {}));
}

=pod

=item $api->fault($do, match => {...}, times => N, skip => N)

Appends a rule; times is 1 unless given, undef for ever.

=item $api->no_faults

Drops all rules and ends hangs.

=item $api->fault_hits

How often the rules acted.

=cut

sub fault
{
	my ($self, $do, %rule) = @_;

	$rule{times} = 1 unless exists $rule{times};
	$self->post('/_/faults', [ { do => $do, %rule } ]);
	return;
}

sub no_faults
{
	my ($self) = @_;

	$self->_call('DELETE', '/_/faults');
	return;
}

sub fault_hits
{
	my ($self) = @_;
	my $hits = 0;

	$hits += $_->{hits} foreach @{ $self->get('/_/faults') };
	return $hits;
}

=pod

=item $api->configure(name => value, ...)

=item $api->config($name)

=item $api->pause, $api->go_on

While paused it reads requests and answers none.

=cut

sub configure
{
	my ($self, %settings) = @_;

	$self->{args}{key} = $settings{key} if defined $settings{key};
	return $self->post('/_/config', \%settings);
}

sub config
{
	my ($self, $name) = @_;

	return $self->post('/_/config')->{$name};
}

sub pause { my ($self) = @_; return $self->configure(paused => JSON::PP::true); }
sub go_on { my ($self) = @_; return $self->configure(paused => JSON::PP::false); }

=pod

=item $api->counters, $api->jobs, $api->reset

=item $api->entity($kind, $id)

What it has of a company or user (kind: companies, users), or undef.

=item $api->foreign_job($seconds), $api->finish_jobs

=back

=cut

sub counters { my ($self) = @_; return $self->get('/_/counters'); }
sub jobs     { my ($self) = @_; return $self->get('/_/jobs'); }
sub reset    { my ($self) = @_; return $self->post('/_/reset'); }

sub finish_jobs { my ($self) = @_; return $self->post('/_/finish_jobs'); }

sub foreign_job
{
	my ($self, $seconds) = @_;

	return $self->post('/_/foreign_job', { seconds => $seconds });
}

sub entity
{
	my ($self, $kind, $id) = @_;

	return $self->get("/_/state?kind=$kind")->{$id};
}

END
{
	$_->stop foreach grep { defined } @running;
}

1;
