// A monitor that knows nothing of Fourfold: two vCPUs in long mode, one that never leaves guest code
// and one that leaves it all the time. A line on standard input sends the first one's thread a signal.
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define CHECK(what) do { if (!(what)) { \
    fprintf(stderr, "%s:%d: %s: errno %d\n", __FILE__, __LINE__, #what, errno); exit(1); } } while (0)

enum { SIZE = 4 << 20, PML4 = 0x9000, PDPT = 0xa000, PD = 0xb000, HIGH_PDPT = 0xc000,
       HIGH_PD = 0xd000, HIGH_PT = 0xe000, COUNTERS = 0x20000 };
#define ALIAS 0x4000000000ull

static int vm;
static uint8_t *memory;

static void entry(uint64_t table, int index, uint64_t value) {
    memcpy(memory + table + 8 * index, &value, 8);
}

// inc qword [rbx]; jmp back   and   inc qword [rbx]; out 0x10, al; jmp back
static const uint8_t SPIN[] = { 0x48, 0xff, 0x03, 0xeb, 0xfb };
static const uint8_t LEAVE[] = { 0x48, 0xff, 0x03, 0xe6, 0x10, 0xeb, 0xf9 };

static void interrupted(int signal) {}

static void *run(void *number) {
    long n = (long)number;
    int vcpu = ioctl(vm, KVM_CREATE_VCPU, n);
    CHECK(vcpu >= 0);
    struct kvm_sregs sregs;
    CHECK(ioctl(vcpu, KVM_GET_SREGS, &sregs) == 0);
    struct kvm_segment code = { .limit = ~0u, .selector = 8, .type = 11, .present = 1, .s = 1,
                                .l = 1, .g = 1 };
    struct kvm_segment data = code;
    data.type = 3, data.selector = 16, data.l = 0, data.db = 1;
    sregs.cs = code;
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
    sregs.cr0 = 0x80000011, sregs.cr3 = PML4, sregs.cr4 = 0x20, sregs.efer = 0x500;
    CHECK(ioctl(vcpu, KVM_SET_SREGS, &sregs) == 0);
    struct kvm_regs regs = { .rip = n ? 0x2000 : 0x1000, .rflags = 2, .rbx = ALIAS + 8 * n };
    CHECK(ioctl(vcpu, KVM_SET_REGS, &regs) == 0);
    while (1) {
        if (ioctl(vcpu, KVM_RUN, 0) != 0) {
            CHECK(errno == EINTR);
            printf("EINTR\n");
        }
    }
}

int main(void) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    CHECK(kvm >= 0);
    vm = ioctl(kvm, KVM_CREATE_VM, 0);
    CHECK(vm >= 0);
    memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(memory != MAP_FAILED);
    memcpy(memory + 0x1000, SPIN, sizeof SPIN);
    memcpy(memory + 0x2000, LEAVE, sizeof LEAVE);
    entry(PML4, 0, PDPT | 3), entry(PDPT, 0, PD | 3), entry(PD, 0, 0x83);
    entry(PDPT, 256, HIGH_PD | 3), entry(HIGH_PD, 0, HIGH_PT | 3);
    entry(HIGH_PT, 0, COUNTERS | 3);
    struct kvm_userspace_memory_region region = {
        .slot = 7, .memory_size = SIZE, .userspace_addr = (uintptr_t)memory,
    };
    CHECK(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) == 0);
    struct sigaction action = { .sa_handler = interrupted };
    CHECK(sigaction(SIGUSR1, &action, NULL) == 0);
    pthread_t threads[2];
    for (long n = 0; n < 2; n++)
        CHECK(pthread_create(&threads[n], NULL, run, (void *)n) == 0);
    volatile uint64_t *counters = (volatile uint64_t *)(memory + COUNTERS);
    while (!counters[0] || !counters[1])
        usleep(1000);
    printf("ready %p\n", (void *)memory);
    while (getchar() == '\n')
        pthread_kill(threads[0], SIGUSR1);
    return 0;
}
