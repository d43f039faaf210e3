=pod

=head1 NAME

Userpilot::Deaf - a server that takes a job's headers and never reads its body

=head1 DESCRIPTION

An upload to it stays under way for ever.  Every GET is told that there are no
jobs, so that the worker begins to upload.

=cut

package Userpilot::Deaf;

use strict;
use warnings;

use IO::Select;
use IO::Socket::INET;

# Reads a request's head, no byte more; undef if the client has left
sub _read_head
{
	my ($client) = @_;
	my $head = '';

	while ($head !~ /\r\n\r\n$/)
	{
		return unless sysread($client, my $byte, 1);
		$head .= $byte;
	}
	return $head;
}

sub _serve
{
	my ($listener) = @_;
	my $clients = IO::Select->new($listener);
	my @kept;

	while (1)
	{
		foreach my $client ($clients->can_read)
		{
			my $head;

			if ($client == $listener)
			{
				$clients->add($listener->accept);
				next;
			}
			$head = _read_head($client);

			# a body is left where it is
			$clients->remove($client) if !defined $head || $head =~ /^POST/;
			syswrite($client, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]")
			  if defined $head && $head =~ /^GET/;
			push @kept, $client;
		}
	}
	return;
}

# Starts one, in a process of its own
sub new
{
	my ($class) = @_;
	my $listener = IO::Socket::INET->new(LocalAddr => '127.0.0.1', Listen => 10)
	  or die "listen: $!";
	my $pid = fork() // die "fork: $!";

	if ($pid == 0)
	{
		$SIG{PIPE} = 'IGNORE';
		$SIG{ALRM} = 'DEFAULT';
		alarm 300;
		_serve($listener);
	}
	return bless { pid => $pid, port => $listener->sockport }, $class;
}

sub url { my ($self) = @_; return "http://127.0.0.1:$self->{port}"; }
sub key { return 'any-key'; }

sub DESTROY
{
	my ($self) = @_;

	local ($?, $!);
	kill 'KILL', $self->{pid};
	waitpid($self->{pid}, 0);
	return;
}

1;
