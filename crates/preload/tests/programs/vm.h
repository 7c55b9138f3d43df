// What the programs share: a guest of a few bytes in real mode at 0x1000.
#define _GNU_SOURCE
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
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(what) do { if (!(what)) { \
    fprintf(stderr, "%s:%d: %s: errno %d\n", __FILE__, __LINE__, #what, errno); exit(1); } } while (0)

struct guest {
    int kvm, vm, vcpu;
    struct kvm_run *run;
    uint8_t *memory;
    size_t size;
};

static inline void set_ip(struct guest *g, uint64_t ip) {
    struct kvm_regs regs;
    CHECK(ioctl(g->vcpu, KVM_GET_REGS, &regs) == 0);
    regs.rip = ip;
    regs.rflags = 2;
    CHECK(ioctl(g->vcpu, KVM_SET_REGS, &regs) == 0);
}

static inline struct guest start(const void *code, size_t len, size_t size) {
    struct guest g = { .size = size };
    g.kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    CHECK(g.kvm >= 0);
    CHECK(ioctl(g.kvm, KVM_GET_API_VERSION, 0) == 12);
    g.vm = ioctl(g.kvm, KVM_CREATE_VM, 0);
    CHECK(g.vm >= 0);
    g.memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(g.memory != MAP_FAILED);
    memcpy(g.memory + 0x1000, code, len);
    struct kvm_userspace_memory_region region = {
        .memory_size = size, .userspace_addr = (uintptr_t)g.memory,
    };
    CHECK(ioctl(g.vm, KVM_SET_USER_MEMORY_REGION, &region) == 0);
    g.vcpu = ioctl(g.vm, KVM_CREATE_VCPU, 0);
    CHECK(g.vcpu >= 0);
    int room = ioctl(g.kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    CHECK(room >= 4096);
    g.run = mmap(NULL, room, PROT_READ | PROT_WRITE, MAP_SHARED, g.vcpu, 0);
    CHECK(g.run != MAP_FAILED);
    struct kvm_sregs sregs;
    CHECK(ioctl(g.vcpu, KVM_GET_SREGS, &sregs) == 0);
    sregs.cs.base = sregs.cs.selector = 0;
    CHECK(ioctl(g.vcpu, KVM_SET_SREGS, &sregs) == 0);
    set_ip(&g, 0x1000);
    return g;
}

// out %al, $0x10; jmp back
static const uint8_t OUT_LOOP[] = { 0xe6, 0x10, 0xeb, 0xfc };
// jmp to itself
static const uint8_t SPIN[] = { 0xeb, 0xfe };
