// A program with an allocator of its own, which makes system calls while it holds its lock, as
// jemalloc does when it starts: whatever stands in front of these calls must not allocate.
#include "vm.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread int inside;
static char *next, *end;

static void enter(void) {
    if (inside) {
        static const char what[] = "memory was asked for inside the allocator\n";
        if (write(2, what, sizeof what - 1)) {}
        _exit(3);
    }
    inside = 1;
    pthread_mutex_lock(&lock);
}

static void leave(void) {
    pthread_mutex_unlock(&lock);
    inside = 0;
}

// Looks at the system, by functions and by number.
static void ask(void) {
    char text[8];
    int fd = syscall(SYS_open, "/proc/sys/vm/overcommit_memory", O_RDONLY | O_CLOEXEC);
    if (read(fd, text, sizeof text)) {}
    syscall(SYS_close, fd);
    fd = open("/dev/zero", O_RDONLY);
    int copy = dup(fd);
    fcntl(copy, F_SETFD, FD_CLOEXEC);
    ioctl(copy, 0x5401, text);
    close(copy);
    close(fd);
    fd = open("/dev/kvm-not-there", O_RDWR);
    fd = open("/sys/module/kvm/not-there", O_RDONLY);
}

static void *take(size_t size) {
    size = (size + 31) & ~(size_t)15;
    enter();
    if ((size_t)(end - next) < size) {
        ask();
        size_t chunk = size + (1 << 20);
        next = mmap(NULL, chunk, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        madvise(next, chunk, MADV_NOHUGEPAGE);
        end = next + chunk;
    }
    size_t *block = (size_t *)next;
    next += size;
    leave();
    block[0] = size - 16;
    return block + 2;
}

void *malloc(size_t size) { return take(size); }
void *calloc(size_t count, size_t size) { return take(count * size); } // Fresh pages are zero.
void free(void *block) { (void)block; }

void *realloc(void *old, size_t size) {
    void *block = take(size);
    if (old) {
        size_t had = ((size_t *)old)[-2];
        memcpy(block, old, had < size ? had : size);
    }
    return block;
}

int posix_memalign(void **block, size_t align, size_t size) {
    uintptr_t at = (uintptr_t)take(size + align + 16);
    at = (at + 16 + align - 1) & ~(align - 1);
    ((size_t *)at)[-2] = size;
    *block = (void *)at;
    return 0;
}

void *aligned_alloc(size_t align, size_t size) {
    void *block;
    posix_memalign(&block, align, size);
    return block;
}

int main(void) {
    struct guest g = start(OUT_LOOP, sizeof OUT_LOOP, 0x10000);
    for (int i = 0; i < 100; i++) {
        CHECK(ioctl(g.vcpu, KVM_RUN, 0) == 0 && g.run->exit_reason == KVM_EXIT_IO);
        free(malloc(100000));
    }
    return 0;
}
