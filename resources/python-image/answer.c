/*
 * Asks the warm interpreter: answer EXPRESSION
 *
 * Prints the value and exits with 0, or prints what was raised on standard error and exits with 1. With 2 nobody answers.
 * Further arguments count for nothing, so that a script may begin with `#!/bin/answer EXPRESSION`.
 */
#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define SOCKET "/run/answer.sock"

static int write_all(int fd, const char *bytes, size_t length)
{
	while (length) {
		ssize_t done = write(fd, bytes, length);

		if (done < 0 && errno == EINTR)
			continue;
		if (done < 0)
			return -1;
		bytes += done;
		length -= done;
	}
	return 0;
}

static int fail(const char *what, int error)
{
	const char *why = error ? strerror(error) : "the answer ends before it begins";

	write_all(2, "answer: ", 8);
	write_all(2, what, strlen(what));
	write_all(2, ": ", 2);
	write_all(2, why, strlen(why));
	write_all(2, "\n", 1);
	return 2;
}

int main(int argc, char **argv)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX, .sun_path = SOCKET };
	static char buffer[65536];
	int out = 0;
	int fd;

	if (argc < 2)
		return fail("usage: answer EXPRESSION", EINVAL);
	fd = socket(AF_UNIX, SOCK_STREAM, 0);
	if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof(address)))
		return fail(SOCKET, errno);
	if (write_all(fd, argv[1], strlen(argv[1])) || shutdown(fd, SHUT_WR))
		return fail(SOCKET, errno);
	for (;;) {
		ssize_t length = read(fd, buffer, sizeof(buffer));
		char *text = buffer;

		if (length < 0 && errno == EINTR)
			continue;
		if (length < 0 || (length == 0 && !out))
			return fail(SOCKET, length < 0 ? errno : 0);
		if (length == 0)
			break;
		if (!out) {
			/* The first byte says what the rest is. */
			out = *text++ == '+' ? 1 : 2;
			length--;
		}
		if (write_all(out, text, length))
			return 2;
	}
	write_all(out, "\n", 1);
	return out - 1;
}
