// A VM protected by software: guest memory that the program can't read, write or map, and frames that
// are private or shared.
#include "vm.h"

// Newer than many systems' headers: as in the kernel's include/uapi/linux/kvm.h.
#ifndef KVM_CREATE_GUEST_MEMFD
#define KVM_X86_SW_PROTECTED_VM 1
#define KVM_CAP_VM_TYPES 235
#define KVM_MEM_GUEST_MEMFD 4
#define KVM_MEMORY_ATTRIBUTE_PRIVATE 8
struct kvm_userspace_memory_region2 {
    uint32_t slot, flags;
    uint64_t guest_phys_addr, memory_size, userspace_addr, guest_memfd_offset;
    uint32_t guest_memfd, pad1;
    uint64_t pad2[14];
};
struct kvm_memory_attributes { uint64_t address, size, attributes, flags; };
struct kvm_create_guest_memfd { uint64_t size, flags, reserved[6]; };
#define KVM_SET_USER_MEMORY_REGION2 _IOW(KVMIO, 0x49, struct kvm_userspace_memory_region2)
#define KVM_SET_MEMORY_ATTRIBUTES _IOW(KVMIO, 0xd2, struct kvm_memory_attributes)
#define KVM_CREATE_GUEST_MEMFD _IOWR(KVMIO, 0xd4, struct kvm_create_guest_memfd)
#endif
#ifndef KVM_EXIT_MEMORY_FAULT
#define KVM_EXIT_MEMORY_FAULT 39
#define KVM_MEMORY_EXIT_FLAG_PRIVATE 8
#endif
// `memory_fault` of struct kvm_run: flags, address, size.
#define MEMORY_FAULT(run) ((uint64_t *)&(run)->io)

#define SIZE (4 << 20)
#define SPOT 0x8000
static struct guest g;

// mov (SPOT), %al; out %al, $0x10; incb (SPOT), when it is run again; jmp back
static const uint8_t TOUCH[] = { 0xa0, 0x00, 0x80, 0xe6, 0x10, 0xfe, 0x06, 0x00, 0x80, 0xeb, 0xf5 };

static int run(void) {
    return ioctl(g.vcpu, KVM_RUN, 0);
}

static int port(void) {
    CHECK(run() == 0 && g.run->exit_reason == KVM_EXIT_IO);
    return ((uint8_t *)g.run)[g.run->io.data_offset];
}

static void set(uint64_t gpa, uint64_t attributes) {
    struct kvm_memory_attributes asked = { .address = gpa, .size = 4096, .attributes = attributes };
    CHECK(ioctl(g.vm, KVM_SET_MEMORY_ATTRIBUTES, &asked) == 0);
}

// The dirty pages of slot 0, of its first 64.
static uint64_t dirty(void) {
    static uint64_t bitmap[SIZE / 4096 / 64];
    struct kvm_dirty_log log = { .dirty_bitmap = bitmap };
    CHECK(ioctl(g.vm, KVM_GET_DIRTY_LOG, &log) == 0);
    for (size_t i = 1; i < sizeof bitmap / sizeof *bitmap; i++)
        CHECK(bitmap[i] == 0);
    return bitmap[0];
}

// An ordinary slot that logs, around private frames: its log is one, and a change of frames leaves it
// alone.
static void logs(struct kvm_userspace_memory_region *plain) {
    const uint64_t spot = 1 << SPOT / 4096, private = KVM_MEMORY_ATTRIBUTE_PRIVATE;
    set(SPOT, 0);
    set(0x4000, private);
    plain->flags = KVM_MEM_LOG_DIRTY_PAGES;
    CHECK(ioctl(g.vm, KVM_SET_USER_MEMORY_REGION, plain) == 0);
    set_ip(&g, 0x1000);
    CHECK(port() + 1 == port());
    CHECK(dirty() == spot && dirty() == 0);
    port();
    set(0x6000, private);
    CHECK(dirty() == spot && dirty() == 0);
    // The next write after a harvest is noticed.
    port(), port();
    CHECK(dirty() == spot && dirty() == 0);
    port(), port();
    set(SPOT, private);
    CHECK(dirty() == spot && dirty() == 0);
    set(SPOT, 0);
    CHECK(dirty() == 0);
    set(0x4000, 0);
    set(0x6000, 0);
    port(), port();
    CHECK(dirty() == spot && dirty() == 0);
    // No slots of the program's.
    uint64_t word;
    struct kvm_dirty_log none = { .dirty_bitmap = &word };
    for (none.slot = 1; none.slot < 32764; none.slot++)
        CHECK(ioctl(g.vm, KVM_GET_DIRTY_LOG, &none) == -1 && errno == ENOENT);
}

static void files(int fd) {
    char byte = 1;
    CHECK(read(fd, &byte, 1) == -1 && write(fd, &byte, 1) == -1);
    CHECK(pread(fd, &byte, 1, 0) == -1 && pwrite(fd, &byte, 1, 0) == -1);
    CHECK(mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0) == MAP_FAILED && errno == ENODEV);
    CHECK(ftruncate(fd, 4096) == -1);
    CHECK(fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, SIZE) == 0);
    CHECK(fallocate(fd, 0, 0, SIZE) == -1 && errno == EOPNOTSUPP);
    CHECK(fallocate(fd, FALLOC_FL_KEEP_SIZE, SIZE, 4096) == -1 && errno == EINVAL);
    CHECK(syscall(SYS_fallocate, fd, FALLOC_FL_KEEP_SIZE, 1, 4096) == -1 && errno == EINVAL);
}

int main(void) {
    g.kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    CHECK(ioctl(g.kvm, KVM_CHECK_EXTENSION, KVM_CAP_VM_TYPES) & 1 << KVM_X86_SW_PROTECTED_VM);
    g.vm = ioctl(g.kvm, KVM_CREATE_VM, KVM_X86_SW_PROTECTED_VM);
    CHECK(g.vm >= 0);
    struct kvm_create_guest_memfd create = { .size = SIZE };
    int fd = ioctl(g.vm, KVM_CREATE_GUEST_MEMFD, &create);
    CHECK(fd >= 0);
    files(fd);

    g.memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memcpy(g.memory + 0x1000, TOUCH, sizeof TOUCH);
    struct kvm_userspace_memory_region2 region = {
        .flags = KVM_MEM_GUEST_MEMFD, .memory_size = SIZE,
        .userspace_addr = (uintptr_t)g.memory, .guest_memfd = fd,
    };
    // Writes to private memory are not logged.
    region.flags |= KVM_MEM_LOG_DIRTY_PAGES;
    CHECK(ioctl(g.vm, KVM_SET_USER_MEMORY_REGION2, &region) == -1 && errno == EINVAL);
    region.flags = KVM_MEM_GUEST_MEMFD;
    CHECK(ioctl(g.vm, KVM_SET_USER_MEMORY_REGION2, &region) == 0);
    g.vcpu = ioctl(g.vm, KVM_CREATE_VCPU, 0);
    g.run = mmap(NULL, ioctl(g.kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED,
                 g.vcpu, 0);
    struct kvm_sregs sregs;
    CHECK(ioctl(g.vcpu, KVM_GET_SREGS, &sregs) == 0);
    sregs.cs.base = sregs.cs.selector = 0;
    CHECK(ioctl(g.vcpu, KVM_SET_SREGS, &sregs) == 0);
    set_ip(&g, 0x1000);

    // Shared at first: the program sees what the guest writes.
    g.memory[SPOT] = 40;
    CHECK(port() == 40 && port() == 41 && g.memory[SPOT] == 41);
    // Private: another memory, which the program does not see.
    set(SPOT, KVM_MEMORY_ATTRIBUTE_PRIVATE);
    CHECK(port() == 1 && port() == 2 && port() == 3);
    CHECK(g.memory[SPOT] == 41);
    // A hole: zeros again.
    CHECK(fallocate(fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, SPOT, 4096) == 0);
    CHECK(port() == 1);
    // Shared again, as it was.
    g.memory[SPOT] = 90;
    set(SPOT, 0);
    CHECK(port() == 91 && g.memory[SPOT] == 91);

    // Private frames of a slot that has no private memory.
    region.memory_size = 0;
    CHECK(ioctl(g.vm, KVM_SET_USER_MEMORY_REGION2, &region) == 0);
    struct kvm_userspace_memory_region plain = {
        .memory_size = SIZE, .userspace_addr = (uintptr_t)g.memory,
    };
    CHECK(ioctl(g.vm, KVM_SET_USER_MEMORY_REGION, &plain) == 0);
    set(SPOT, KVM_MEMORY_ATTRIBUTE_PRIVATE);
    set_ip(&g, 0x1000);
    int answer = run();
    for (int i = 0; answer == 0 && i < 2; i++)
        answer = run();
    CHECK(answer == -1 && errno == EFAULT && g.run->exit_reason == KVM_EXIT_MEMORY_FAULT);
    uint64_t *fault = MEMORY_FAULT(g.run);
    CHECK(fault[0] == KVM_MEMORY_EXIT_FLAG_PRIVATE && fault[1] == SPOT && fault[2] == 4096);
    logs(&plain);
    return 0;
}
