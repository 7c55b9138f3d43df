#include "vm.h"

static int status_of(pid_t child) {
    int status;
    CHECK(child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status));
    return WEXITSTATUS(status);
}

int main(int argc, char **argv) {
    if (argc > 2) {
        // After execve: /dev/kvm still serves, a VM is another process's.
        int kvm = atoi(argv[1]), vm = atoi(argv[2]);
        CHECK(ioctl(kvm, KVM_GET_API_VERSION, 0) == 12);
        CHECK(ioctl(kvm, KVM_CREATE_VM, 0) >= 0);
        CHECK(ioctl(vm, KVM_CREATE_VCPU, 3) == -1 && errno == EIO);
        return 0;
    }
    struct guest g = start(OUT_LOOP, sizeof OUT_LOOP, 0x10000);
    pid_t child = fork();
    if (child == 0) {
        CHECK(ioctl(g.vcpu, KVM_RUN, 0) == -1 && errno == EIO);
        CHECK(ioctl(g.vm, KVM_CREATE_VCPU, 7) == -1 && errno == EIO);
        CHECK(ioctl(g.kvm, KVM_GET_API_VERSION, 0) == 12);
        close(g.vcpu);
        close(g.vm);
        // A VM of its own.
        struct guest own = start(OUT_LOOP, sizeof OUT_LOOP, 0x10000);
        CHECK(ioctl(own.vcpu, KVM_RUN, 0) == 0 && own.run->exit_reason == KVM_EXIT_IO);
        _exit(0);
    }
    CHECK(status_of(child) == 0);
    // What a child of vfork closes is closed in the child alone.
    child = vfork();
    if (child == 0) {
        close(g.vcpu);
        close(g.vm);
        _exit(0);
    }
    CHECK(status_of(child) == 0);
    CHECK(ioctl(g.vcpu, KVM_RUN, 0) == 0 && g.run->exit_reason == KVM_EXIT_IO);
    fcntl(g.kvm, F_SETFD, 0);
    fcntl(g.vm, F_SETFD, 0);
    child = fork();
    if (child == 0) {
        char kvm[12], vm[12];
        sprintf(kvm, "%d", g.kvm);
        sprintf(vm, "%d", g.vm);
        execl("/proc/self/exe", argv[0], kvm, vm, NULL);
        _exit(9);
    }
    CHECK(status_of(child) == 0);
    return 0;
}
