/* Device memory is recognised, and refused with a sentence where the provider cannot take it. Runs
 * with a fake CUDA driver, whose path is the first argument. */
#include <dlfcn.h>
#include <inttypes.h>
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

int main(int argc, char **argv)
{
    static char memory[3 * 65536];
    char *host = memory, *device = memory + 65536, range[64];
    mefa_config config = {0};
    mefa_transport transport = 0;

    config.size = sizeof config;
    config.server_name = "here:1";
    config.provider = "tcp";
    EXPECT(argc == 2);
    snprintf(range, sizeof range, "%" PRIx64 "-%" PRIx64, (uint64_t)device, (uint64_t)device + 65536);
    setenv("DEVICE_RANGE", range, 1);
    EXPECT(dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL));

    EXPECT(mefa_install(&config, &transport) == MEFA_CODE_OK);
    EXPECT(mefa_register(transport, host, 65536, NULL, NULL, NULL) == MEFA_CODE_OK);
    EXPECT(mefa_register(transport, device, 65536, NULL, NULL, NULL) == MEFA_CODE_MEMORY);
    EXPECT(strstr(mefa_last_error(), "CUDA device 3") && strstr(mefa_last_error(), "tcp"));

    /* All or nothing: the host memory beside it is not registered either. */
    mefa_memory both[] = {{memory + 2 * 65536, 65536, NULL}, {device, 65536, NULL}};
    EXPECT(mefa_register_many(transport, both, 2, NULL, NULL) == MEFA_CODE_MEMORY);
    EXPECT(mefa_unregister(transport, both[0].address) == MEFA_CODE_ADDRESS_NOT_REGISTERED);

    strcat(range, "m");
    setenv("DEVICE_RANGE", range, 1);
    EXPECT(mefa_register(transport, device, 65536, NULL, NULL, NULL) == MEFA_CODE_NOT_IMPLEMENTED);
    EXPECT(strstr(mefa_last_error(), "managed"));
    EXPECT(mefa_uninstall(transport) == MEFA_CODE_OK);
    return 0;
}
