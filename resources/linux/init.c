/*
 * PID 1 of the test guest: prepares the system, and becomes the shell that reads commands from the console.
 *
 * In C, because each of these steps as a command of its own is a fork and an exec, which take a second where guest
 * ring 0 is emulated. Built without a C library, on the kernel's own tools/include/nolibc.
 */
#include <linux/sockios.h>

/* struct ifreq as SIOCSIFFLAGS sees it; <linux/if.h> wants a C library. */
struct interface_flags {
	char name[16];
	short flags;
	char unused[22];
};

static void die(const char *what)
{
	/* PID 1 ends, and the kernel's panic names the exit status. */
	write(2, what, strlen(what));
	write(2, " failed\n", 8);
	exit(1);
}

static void mount_on(const char *directory, const char *type)
{
	if (mount(type, directory, type, 0, NULL) < 0)
		die(directory);
}

/* The kernel gives the interface its address as it comes up. */
static void start_loopback(void)
{
	struct interface_flags request = { .name = "lo", .flags = 1 /* IFF_UP */ };
	int socket = my_syscall3(__NR_socket, 2 /* AF_INET */, 2 /* SOCK_DGRAM */, 0);

	if (socket < 0 || ioctl(socket, SIOCSIFFLAGS, &request) < 0)
		die("lo");
	close(socket);
}

/* A session leader that opens a terminal other than /dev/console gets it as its controlling terminal: Ctrl-C works. */
static void open_console(void)
{
	char path[64] = "/dev/", names[48], *name = names;
	int file = open("/sys/class/tty/console/active", O_RDONLY, 0);
	int length = file < 0 ? -1 : read(file, names, sizeof(names) - 1);

	if (length < 2)
		die("console");
	close(file);
	names[length - 1] = 0;
	/* The last of several is the one that /dev/console stands for. */
	if (strrchr(names, ' '))
		name = strrchr(names, ' ') + 1;
	strlcat(path, name, sizeof(path));

	setsid();
	file = open(path, O_RDWR, 0);
	if (file < 0)
		die(path);
	for (int i = 0; i < 3; i++)
		dup2(file, i);
	close(file);
}

int main(int count, char **words, char **given)
{
	static const char tunables[] = "GLIBC_TUNABLES=";
	char *const arguments[] = { "sh", "/console", NULL };
	char *environment[] = { "HOME=/", "PATH=/bin", "TERM=linux", NULL, NULL };

	(void)count;
	(void)words;
	/* From the kernel's command line: what the C library is not to use of this processor. */
	for (; *given; given++)
		if (!memcmp(*given, tunables, sizeof(tunables) - 1))
			environment[3] = *given;
	mount_on("/proc", "proc");
	mount_on("/sys", "sysfs");
	mount_on("/dev", "devtmpfs");
	mount_on("/tmp", "tmpfs");
	start_loopback();
	open_console();
	execve("/bin/busybox", arguments, environment);
	die("busybox");
	return 1;
}
