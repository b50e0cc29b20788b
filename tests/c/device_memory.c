/* Device memory is recognised, and refused with a sentence where the provider cannot take it. Runs
 * with a fake CUDA driver, whose path is the first argument. */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "mooncake_efa.h"

#define EXPECT(what)                                                                               \
    do {                                                                                           \
        if (!(what)) {                                                                             \
            fprintf(stderr, "%s:%d: not so: %s; last error: %s\n", __FILE__, __LINE__, #what,      \
                    mefa_last_error());                                                            \
            return 1;                                                                              \
        }                                                                                          \
    } while (0)

static void *driver;

static int (*function(const char *name))() { return (int (*)())dlsym(driver, name); }

int main(int argc, char **argv)
{
    static char memory[2 * 65536];
    uint64_t device = 0, managed = 0;
    void *context = NULL;
    mefa_config config = {0};
    mefa_transport transport = 0;

    config.size = sizeof config;
    config.server_name = "here:1";
    config.provider = "tcp";
    EXPECT(argc == 2);
    setenv("FAKE_CUDA_DEVICES", "4", 1);
    driver = dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL);
    EXPECT(driver);
    EXPECT(function("cuInit")(0) == 0 && function("cuDevicePrimaryCtxRetain")(&context, 3) == 0);
    EXPECT(function("cuCtxPushCurrent_v2")(context) == 0);
    EXPECT(function("cuMemAlloc_v2")(&device, (size_t)65536) == 0);
    EXPECT(function("cuMemAllocManaged")(&managed, (size_t)65536, 1) == 0);

    EXPECT(mefa_install(&config, &transport) == MEFA_CODE_OK);
    EXPECT(mefa_register(transport, memory, 65536, NULL, NULL, NULL) == MEFA_CODE_OK);
    EXPECT(mefa_register(transport, (void *)device, 65536, NULL, NULL, NULL) == MEFA_CODE_MEMORY);
    EXPECT(strstr(mefa_last_error(), "CUDA device 3") && strstr(mefa_last_error(), "tcp"));

    /* All or nothing: the host memory beside it is not registered either. */
    mefa_memory both[] = {{memory + 65536, 65536, NULL}, {(void *)device, 65536, NULL}};
    EXPECT(mefa_register_many(transport, both, 2, NULL, NULL) == MEFA_CODE_MEMORY);
    EXPECT(mefa_unregister(transport, both[0].address) == MEFA_CODE_ADDRESS_NOT_REGISTERED);

    EXPECT(mefa_register(transport, (void *)managed, 65536, NULL, NULL, NULL) == MEFA_CODE_NOT_IMPLEMENTED);
    EXPECT(strstr(mefa_last_error(), "managed"));
    EXPECT(mefa_uninstall(transport) == MEFA_CODE_OK);
    return 0;
}
