// Guest memory that the program takes away, gives back, and watches, while a vCPU runs.
#include "vm.h"
#include <linux/userfaultfd.h>
#include <poll.h>

#define SIZE (16 << 20)
#define SPOT 0x8000
static volatile int stop;
static struct guest g;

static void *discard(void *unused) {
    while (!stop) {
        madvise(g.memory + SPOT, 0x4000, MADV_DONTNEED);
        usleep(100);
    }
    return NULL;
}

static int uffd;
static volatile int served;
static void *serve(void *unused) {
    static char page[4096] __attribute__((aligned(4096))) = { 77 };
    struct pollfd wait = { uffd, POLLIN, 0 };
    struct uffd_msg message;
    while (poll(&wait, 1, 3000) == 1 && read(uffd, &message, sizeof message) == sizeof message) {
        struct uffdio_copy copy = { .src = (uintptr_t)page, .len = 4096,
                                    .dst = message.arg.pagefault.address & ~4095ull };
        served++; // Before the copy, which lets the vCPU go on.
        ioctl(uffd, UFFDIO_COPY, &copy);
        if (stop)
            break;
    }
    return NULL;
}

// mov (SPOT), %al; out %al, $0x10; incb (SPOT); jmp back
static const uint8_t TOUCH[] = { 0xa0, 0x00, 0x80, 0xe6, 0x10, 0xfe, 0x06, 0x00, 0x80, 0xeb, 0xf5 };

static int run(void) {
    return ioctl(g.vcpu, KVM_RUN, 0);
}

static uint8_t port(void) {
    return ((uint8_t *)g.run)[g.run->io.data_offset];
}

int main(void) {
    g = start(TOUCH, sizeof TOUCH, SIZE);
    for (int i = 0; i < 3; i++)
        CHECK(run() == 0 && g.run->exit_reason == KVM_EXIT_IO && port() == i);

    // Discarded while it runs: zeros, never a crash.
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, discard, NULL) == 0);
    for (int i = 0; i < 20000; i++)
        CHECK(run() == 0 && g.run->exit_reason == KVM_EXIT_IO);
    stop = 1;
    pthread_join(thread, NULL);

    // Unmapped: EFAULT, and it goes on when memory is back.
    CHECK(munmap(g.memory + SPOT, 4096) == 0);
    int answer = run();
    for (int i = 0; answer == 0 && i < 4; i++)
        answer = run();
    CHECK(answer == -1 && errno == EFAULT);
    CHECK(mmap(g.memory + SPOT, 4096, PROT_READ | PROT_WRITE,
               MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == g.memory + SPOT);
    CHECK(run() == 0 && g.run->exit_reason == KVM_EXIT_IO);

    // Watched: the vCPU waits for the page, and goes on with what was put there.
    uffd = syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
    if (uffd < 0)
        return 0;
    struct uffdio_api api = { .api = UFFD_API };
    CHECK(ioctl(uffd, UFFDIO_API, &api) == 0);
    CHECK(madvise(g.memory + SPOT, 4096, MADV_DONTNEED) == 0);
    struct uffdio_register watch = { .range = { (uintptr_t)g.memory + SPOT, 4096 },
                                     .mode = UFFDIO_REGISTER_MODE_MISSING };
    CHECK(ioctl(uffd, UFFDIO_REGISTER, &watch) == 0);
    CHECK(pthread_create(&thread, NULL, serve, NULL) == 0);
    set_ip(&g, 0x1000);
    CHECK(run() == 0 && g.run->exit_reason == KVM_EXIT_IO && port() == 77 && served == 1);
    return 0;
}
