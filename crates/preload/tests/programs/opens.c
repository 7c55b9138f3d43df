#include "vm.h"
#include <linux/openat2.h>
#include <sys/stat.h>

static void works(int fd) {
    CHECK(fd >= 0);
    CHECK(ioctl(fd, KVM_GET_API_VERSION, 0) == 12);
    CHECK(close(fd) == 0);
    CHECK(ioctl(fd, KVM_GET_API_VERSION, 0) == -1 && errno == EBADF);
}

int main(void) {
    works(open("/dev/kvm", O_RDWR));
    works(open64("/dev/kvm", O_RDWR | O_CLOEXEC));
    works(openat(AT_FDCWD, "/dev/kvm", O_RDWR));
    works(openat64(-1, "/dev/kvm", O_RDWR));
    works(syscall(SYS_open, "/dev/kvm", O_RDWR));
    works(syscall(SYS_openat, AT_FDCWD, "/dev/kvm", O_RDWR));
    struct open_how how = { .flags = O_RDWR };
    works(syscall(SYS_openat2, AT_FDCWD, "/dev/kvm", &how, sizeof how));
    FILE *file = fopen("/dev/kvm", "r+");
    CHECK(file);
    CHECK(syscall(SYS_ioctl, fileno(file), KVM_GET_API_VERSION, 0) == 12);
    CHECK(fclose(file) == 0);

    int fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    CHECK(fcntl(fd, F_GETFD) == FD_CLOEXEC);
    close(fd);
    fd = open("/dev/kvm", O_RDWR);
    CHECK(fcntl(fd, F_GETFD) == 0);
    int vm = ioctl(fd, KVM_CREATE_VM, 0);
    CHECK(fcntl(vm, F_GETFD) == FD_CLOEXEC);

    CHECK(access("/dev/kvm", R_OK | W_OK) == 0);
    CHECK(faccessat(AT_FDCWD, "/dev/kvm", R_OK, 0) == 0);
    struct stat st;
    CHECK(stat("/dev/kvm", &st) == 0 && S_ISCHR(st.st_mode));
    CHECK(access("/dev/kvm-not-there", R_OK) == -1 && errno == ENOENT);

    char text[4] = "";
    file = fopen("/sys/module/kvm/parameters/tdp_mmu", "r");
    CHECK(file && fgets(text, sizeof text, file) && text[0] == 'Y');
    fclose(file);
    return 0;
}
