// KVM from a library that is loaded at run time, by addresses that dlsym gives.
#include "vm.h"
#include <dlfcn.h>

int main(void) {
    int (*opens)(const char *, int, ...) = dlsym(RTLD_DEFAULT, "open");
    int (*calls)(int, unsigned long, ...) = dlsym(RTLD_DEFAULT, "ioctl");
    CHECK(opens && calls);
    int kvm = opens("/dev/kvm", O_RDWR);
    CHECK(kvm >= 0 && calls(kvm, KVM_GET_API_VERSION, 0) == 12);
    CHECK(dlopen("libm.so.6", RTLD_NOW) != NULL);
    CHECK(calls(kvm, KVM_CREATE_VM, 0) >= 0);
    return 0;
}
