#include "vm.h"
#include <sys/socket.h>

static int send_and_receive(int fd) {
    int pair[2];
    char byte = 0, space[CMSG_SPACE(sizeof(int))];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    struct iovec data = { &byte, 1 };
    struct msghdr message = { .msg_iov = &data, .msg_iovlen = 1, .msg_control = space,
                              .msg_controllen = sizeof space };
    struct cmsghdr *part = CMSG_FIRSTHDR(&message);
    part->cmsg_level = SOL_SOCKET;
    part->cmsg_type = SCM_RIGHTS;
    part->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(part), &fd, sizeof fd);
    CHECK(sendmsg(pair[0], &message, 0) == 1);
    CHECK(recvmsg(pair[1], &message, 0) == 1);
    part = CMSG_FIRSTHDR(&message);
    CHECK(part);
    memcpy(&fd, CMSG_DATA(part), sizeof fd);
    close(pair[0]);
    close(pair[1]);
    return fd;
}

static void is_vcpu(int fd) {
    struct kvm_regs regs;
    CHECK(fd >= 0 && ioctl(fd, KVM_GET_REGS, &regs) == 0);
}

int main(void) {
    struct guest g = start(OUT_LOOP, sizeof OUT_LOOP, 0x10000);
    int copies[] = { dup(g.vcpu), fcntl(g.vcpu, F_DUPFD, 40), fcntl(g.vcpu, F_DUPFD_CLOEXEC, 50),
                     dup2(g.vcpu, 60), dup3(g.vcpu, 61, O_CLOEXEC), syscall(SYS_dup, g.vcpu),
                     send_and_receive(g.vcpu) };
    CHECK(copies[1] == 40 && copies[2] == 50 && copies[3] == 60 && copies[4] == 61);
    for (int i = 0; i < 7; i++)
        is_vcpu(copies[i]);

    // A VM that is closed lives on in its vCPUs.
    CHECK(close(g.vm) == 0 && close(g.kvm) == 0 && close(g.vcpu) == 0);
    CHECK(ioctl(g.vcpu, KVM_RUN, 0) == -1 && errno == EBADF);
    CHECK(ioctl(60, KVM_RUN, 0) == 0 && g.run->exit_reason == KVM_EXIT_IO);

    // Another file in the place of one of ours is that file.
    int null = open("/dev/null", O_RDWR);
    CHECK(dup2(null, 60) == 60);
    CHECK(ioctl(60, KVM_RUN, 0) == -1 && errno == ENOTTY);
    CHECK(close_range(40, 61, 0) == 0);
    CHECK(ioctl(61, KVM_RUN, 0) == -1 && errno == EBADF);
    is_vcpu(copies[0]);

    // Only vCPUs can be mapped.
    int kvm = open("/dev/kvm", O_RDWR);
    CHECK(mmap(NULL, 4096, PROT_READ, MAP_SHARED, kvm, 0) == MAP_FAILED && errno == ENODEV);
    int vm = ioctl(kvm, KVM_CREATE_VM, 0);
    CHECK(mmap(NULL, 4096, PROT_READ, MAP_SHARED, vm, 0) == MAP_FAILED && errno == ENODEV);
    struct kvm_enable_cap ring = { .cap = KVM_CAP_DIRTY_LOG_RING, .args = { 65536 } };
    CHECK(ioctl(vm, KVM_ENABLE_CAP, &ring) == 0);
    int vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
    off_t at = KVM_DIRTY_LOG_PAGE_OFFSET * 4096;
    CHECK(mmap(NULL, 65536, PROT_READ, MAP_PRIVATE, vcpu, at) == MAP_FAILED && errno == EINVAL);
    CHECK(mmap(NULL, 65536, PROT_READ | PROT_EXEC, MAP_SHARED, vcpu, at) == MAP_FAILED);
    CHECK(mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, at) != MAP_FAILED);
    return 0;
}
