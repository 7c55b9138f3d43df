/* A program for the guest: it makes pages of which the host asks, step by step. The host says when
 * to go on, by the first byte of a disk. Meanwhile it spins in user mode, so that its address space
 * is the one that the vCPU has loaded. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

static int disk;
static char *sector;

static void wait_for(char step)
{
	do {
		for (volatile long i = 0; i < 3000000; i++)
			;
		if (pread(disk, sector, 512, 0) != 512)
			exit(9);
	} while (*sector < step);
}

int main(void)
{
	char on_the_stack = 1;
	volatile char *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE,
				   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	disk = open("/dev/vda", O_RDONLY | O_DIRECT);
	if (disk < 0 || page == MAP_FAILED || posix_memalign((void **)&sector, 4096, 4096))
		return 8;
	*page = 42;
	printf("stack %p page %p code %p\n\n", (void *)&on_the_stack, (void *)page, (void *)main);
	fflush(stdout);
	wait_for('1');
	pid_t child = fork();
	if (child == 0) {
		printf("forked\n\n");
		fflush(stdout);
		wait_for('2');
		*page = 43;
		printf("written\n\n");
		fflush(stdout);
		wait_for('3');
		_exit(*page == 43 ? 0 : 7);
	}
	int status = -1;
	waitpid(child, &status, 0);
	printf("parent %d child %d\n", *page, WEXITSTATUS(status));
	return *page == 42 && status == 0 ? 0 : 1;
}
