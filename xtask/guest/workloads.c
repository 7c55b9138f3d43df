/*
 * What `cargo xtask compare-tcg` runs in its guest, as the first process: workloads in which the
 * guest's kernel does the work. Each prints a line when it begins and one when it ends; the clock
 * is the host's. Called with the argument "boot" it says that it is there and switches off.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>
#include <fcntl.h>

static void must(long result, const char *what)
{
	if (result < 0) {
		perror(what);
		reboot(RB_POWER_OFF);
	}
}

/* The cheapest system call. */
static void syscalls(long count)
{
	while (count--)
		syscall(SYS_getppid);
}

/* What `dd if=/dev/zero of=/dev/null bs=1` does. */
static void copy_bytes(long count)
{
	int from = open("/dev/zero", O_RDONLY), to = open("/dev/null", O_WRONLY);
	char byte;

	must(from, "/dev/zero");
	must(to, "/dev/null");
	while (count--) {
		must(read(from, &byte, 1), "read");
		must(write(to, &byte, 1), "write");
	}
	close(from);
	close(to);
}

/* Fresh pages, touched once and given back. */
static void page_faults(long count)
{
	const long pages = 4096;
	char *memory = mmap(NULL, pages * 4096, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	must(memory == MAP_FAILED ? -1 : 0, "mmap");
	madvise(memory, pages * 4096, MADV_NOHUGEPAGE);
	for (; count > 0; count -= pages) {
		for (long i = 0; i < pages; i++)
			memory[i * 4096] = 1;
		madvise(memory, pages * 4096, MADV_DONTNEED);
	}
	munmap(memory, pages * 4096);
}

/* One byte to another process and back. */
static void pipe_ping_pong(long count)
{
	int there[2], back[2];
	char byte = 0;
	pid_t child;

	must(pipe(there), "pipe");
	must(pipe(back), "pipe");
	child = fork();
	must(child, "fork");
	if (child == 0) {
		close(there[1]);
		while (read(there[0], &byte, 1) == 1)
			must(write(back[1], &byte, 1), "write");
		_exit(0);
	}
	while (count--) {
		must(write(there[1], &byte, 1), "write");
		must(read(back[0], &byte, 1), "read");
	}
	close(there[1]);
	close(there[0]);
	close(back[0]);
	close(back[1]);
	waitpid(child, NULL, 0);
}

static void forks(long count)
{
	while (count--) {
		pid_t child = fork();

		must(child, "fork");
		if (child == 0)
			_exit(0);
		waitpid(child, NULL, 0);
	}
}

/* A new program each time. */
static void executions(long count)
{
	char *const arguments[] = { "workloads", "nothing", NULL };

	while (count--) {
		pid_t child = vfork();

		must(child, "vfork");
		if (child == 0) {
			execv("/init", arguments);
			_exit(1);
		}
		waitpid(child, NULL, 0);
	}
}

static void on_signal(int number)
{
	(void)number;
}

static void signals(long count)
{
	signal(SIGUSR1, on_signal);
	while (count--)
		kill(getpid(), SIGUSR1);
}

/* A file in memory: open, write, stat, remove. */
static void files(long count)
{
	char page[4096] = { 1 };
	struct stat status;

	while (count--) {
		int file = open("/file", O_CREAT | O_RDWR, 0600);

		must(file, "open");
		must(write(file, page, sizeof(page)), "write");
		must(fstat(file, &status), "fstat");
		close(file);
		must(unlink("/file"), "unlink");
	}
}

static const struct {
	const char *name;
	void (*run)(long count);
	long count;
} workloads[] = {
	{ "syscall", syscalls, 500000 },
	{ "copy-bytes", copy_bytes, 150000 },
	{ "page-fault", page_faults, 98304 },
	{ "pipe", pipe_ping_pong, 20000 },
	{ "fork", forks, 2000 },
	{ "exec", executions, 1000 },
	{ "signal", signals, 50000 },
	{ "file", files, 15000 },
};

int main(int count, char **arguments)
{
	if (count > 1 && !strcmp(arguments[1], "nothing"))
		return 0;
	setvbuf(stdout, NULL, _IOLBF, 0);
	mkdir("/dev", 0755);
	if (count > 1 && !strcmp(arguments[1], "boot")) {
		printf("begin nothing\n");
		tcdrain(STDOUT_FILENO);
		reboot(RB_POWER_OFF);
	}
	must(mount("dev", "/dev", "devtmpfs", 0, NULL), "devtmpfs");
	for (unsigned i = 0; i < sizeof(workloads) / sizeof(workloads[0]); i++) {
		printf("begin %s\n", workloads[i].name);
		workloads[i].run(workloads[i].count);
		printf("end %s %ld\n", workloads[i].name, workloads[i].count);
	}
	/* What the kernel says at the end must not stand in the middle of a line. */
	tcdrain(STDOUT_FILENO);
	reboot(RB_POWER_OFF);
	return 1;
}
