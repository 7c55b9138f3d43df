// A library that allocates when it is initialised, which is before the one that is tested is.
#include <stdlib.h>

__attribute__((constructor)) static void early(void) {
    void *volatile block = malloc(1);
    free(block);
}
