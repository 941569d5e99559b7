/*
 * A stream socket to or from the host, for tests: busybox knows no vsock.
 *
 *   vsock connect CID PORT    connects
 *   vsock listen PORT         takes one connection
 *
 * Standard input goes to the socket, whose sending side is shut down at its end; what comes goes to standard output. Ends when the
 * other side does, and says on standard error how: "closed", or "failed ERRNO" with exit status 1.
 *
 * Built like init.c, on the kernel's own tools/include/nolibc.
 */
#define AF_VSOCK 40
#define ANY 0xffffffffu

struct address {
	unsigned short family, zero;
	unsigned int port, cid;
	unsigned char flags, unused[3];
};

static void say(const char *what, long number)
{
	write(2, what, strlen(what));
	if (number) {
		const char *text = itoa(number);

		write(2, " ", 1);
		write(2, text, strlen(text));
	}
	write(2, "\n", 1);
}

static void die(const char *what, long error)
{
	say(what, -error);
	exit(1);
}

static void write_all(int to, const char *bytes, long length)
{
	while (length > 0) {
		long written = my_syscall3(__NR_write, to, bytes, length);

		if (written < 0)
			die("failed", written);
		bytes += written;
		length -= written;
	}
}

/* Copies a buffer's worth. Returns 0 at the end. */
static int copy(int from, int to)
{
	static char buffer[65536];
	long length = my_syscall3(__NR_read, from, buffer, sizeof(buffer));

	if (length < 0)
		die("failed", length);
	write_all(to, buffer, length);
	return length > 0;
}

int main(int argc, char **argv)
{
	struct address address = { .family = AF_VSOCK };
	long socket = my_syscall3(__NR_socket, AF_VSOCK, 1 /* SOCK_STREAM */, 0), error;
	struct pollfd ends[2];

	if (socket < 0)
		die("no vsock", socket);
	if (argc == 4 && !strcmp(argv[1], "connect")) {
		address.cid = atol(argv[2]);
		address.port = atol(argv[3]);
		error = my_syscall3(__NR_connect, socket, &address, sizeof(address));
	} else if (argc == 3 && !strcmp(argv[1], "listen")) {
		address.cid = ANY;
		address.port = atol(argv[2]);
		error = my_syscall3(__NR_bind, socket, &address, sizeof(address));
		if (!error)
			error = my_syscall2(__NR_listen, socket, 1);
		if (!error) {
			say("listening", 0);
			error = my_syscall3(__NR_accept, socket, 0, 0);
		}
		if (error >= 0) {
			my_syscall1(__NR_close, socket);
			socket = error;
			error = 0;
		}
	} else {
		say("vsock connect CID PORT | vsock listen PORT", 0);
		return 2;
	}
	if (error < 0)
		die("failed", error);
	say("connected", 0);

	ends[0] = (struct pollfd) { .fd = socket, .events = POLLIN };
	ends[1] = (struct pollfd) { .fd = 0, .events = POLLIN };
	for (;;) {
		error = my_syscall3(__NR_poll, ends, 2, -1);
		if (error < 0)
			die("failed", error);
		if (ends[0].revents && !copy(socket, 1)) {
			say("closed", 0);
			return 0;
		}
		if (ends[1].revents && !copy(0, socket)) {
			my_syscall2(__NR_shutdown, socket, 1 /* SHUT_WR */);
			ends[1].fd = -1;
		}
	}
}
