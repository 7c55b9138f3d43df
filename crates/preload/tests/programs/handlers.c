// A program's own signal handlers: they end KVM_RUN, they find KVM at rest, they may call it, jump
// away, or end the thread.
#include "vm.h"
#include <setjmp.h>

static struct guest g;
static volatile int handled, in_handler_run;
static sigjmp_buf back;

static void on_alarm(int signal) {
    struct kvm_regs regs;
    // The vCPU is not in the middle of anything: its registers can be had.
    CHECK(ioctl(g.vcpu, KVM_GET_REGS, &regs) == 0);
    CHECK(regs.rip == 0x1000);
    handled++;
}

static void on_usr1(int signal) {
    handled++;
    siglongjmp(back, 1);
}

static void *stuck(void *unused) {
    pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, NULL);
    while (1)
        ioctl(g.vcpu, KVM_RUN, 0);
}

static volatile int faults;
static void on_fault(int signal) {
    faults++;
    siglongjmp(back, 1);
}

static void arm(int ms) {
    struct { long interval[2], value[2]; } timer = { { 0, 0 }, { 0, ms * 1000 } };
    CHECK(syscall(SYS_setitimer, 0, &timer, NULL) == 0);
}

int main(void) {
    g = start(SPIN, sizeof SPIN, 0x10000);
    struct sigaction action = { .sa_handler = on_alarm };
    CHECK(sigaction(SIGALRM, &action, NULL) == 0);
    arm(30);
    CHECK(ioctl(g.vcpu, KVM_RUN, 0) == -1 && errno == EINTR && handled == 1);

    // Out of KVM_RUN by a jump; the next calls work, and later handlers run at once.
    action.sa_handler = on_usr1;
    CHECK(sigaction(SIGALRM, &action, NULL) == 0);
    if (sigsetjmp(back, 1) == 0) {
        arm(30);
        ioctl(g.vcpu, KVM_RUN, 0);
        CHECK(!"came back");
    }
    CHECK(handled == 2);
    struct kvm_regs regs;
    CHECK(ioctl(g.vcpu, KVM_GET_REGS, &regs) == 0);
    struct sigaction seen;
    CHECK(sigaction(SIGALRM, NULL, &seen) == 0 && seen.sa_handler == on_usr1);

    // Faults of the program's own, after the engine has installed its handlers.
    struct sigaction fault = { .sa_handler = on_fault, .sa_flags = SA_NODEFER };
    CHECK(sigaction(SIGSEGV, &fault, NULL) == 0 && sigaction(SIGFPE, &fault, NULL) == 0);
    if (sigsetjmp(back, 1) == 0)
        *(volatile int *)0 = 1;
    if (sigsetjmp(back, 1) == 0)
        raise(SIGFPE);
    CHECK(faults == 2);
    // A guest that divides by zero is still the engine's affair: #DE, and with no IDT a triple
    // fault or whatever the guest's vector leads to, but never the program's handler.
    static const uint8_t DIVIDE[] = { 0x31, 0xc9, 0xf7, 0xf1 };
    memcpy(g.memory + 0x2000, DIVIDE, sizeof DIVIDE);
    memcpy(g.memory + 0x3000, OUT_LOOP, sizeof OUT_LOOP);
    g.memory[0] = 0x00;
    g.memory[1] = 0x30;
    set_ip(&g, 0x2000);
    CHECK(ioctl(g.vcpu, KVM_RUN, 0) == 0 && g.run->exit_reason == KVM_EXIT_IO);
    CHECK(faults == 2);

    // A thread that is cancelled in guest code.
    set_ip(&g, 0x1000);
    pthread_t thread;
    void *result;
    CHECK(pthread_create(&thread, NULL, stuck, NULL) == 0);
    usleep(50000);
    CHECK(pthread_cancel(thread) == 0);
    CHECK(pthread_join(thread, &result) == 0 && result == PTHREAD_CANCELED);
    CHECK(ioctl(g.vcpu, KVM_GET_REGS, &regs) == 0);
    return 0;
}
