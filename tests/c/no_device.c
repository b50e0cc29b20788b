/* SPDX-License-Identifier: Apache-2.0
 *
 * What installing says where there is nothing to install on. Never a silent fallback. */
#include "check.h"

int main(void) {
    mefa_config config = {0};
    mefa_transport transport = 77;
    check_start(60);
    config.size = sizeof config;
    config.server_name = "here:1";

    setenv("MC_EFA_LIBFABRIC", "/nonexistent/libfabric.so.1", 1);
    CHECK_EQ(mefa_install(&config, &transport), MEFA_CODE_CONTEXT);
    CHECK(strstr(mefa_last_error(), "/nonexistent/libfabric.so.1") != NULL);
    unsetenv("MC_EFA_LIBFABRIC");

    /* A failure is not kept: the next try is a new one. */
    setenv("MC_EFA_PROVIDER", "nonsense", 1);
    CHECK_EQ(mefa_install(&config, &transport), MEFA_CODE_DEVICE_NOT_FOUND);
    CHECK(strstr(mefa_last_error(), "nonsense") != NULL);
    unsetenv("MC_EFA_PROVIDER");

    /* The structure goes before the environment. */
    setenv("MC_EFA_PROVIDER", "tcp", 1);
    config.provider = "nonsense";
    CHECK_EQ(mefa_install(&config, &transport), MEFA_CODE_DEVICE_NOT_FOUND);
    config.provider = NULL;
    unsetenv("MC_EFA_PROVIDER");
    CHECK_EQ(transport, 77);

    int code = mefa_install(&config, &transport);
    if (code == 0) {
        CHECK_OK(mefa_uninstall(transport));
        skip("this machine has an EFA device");
    }
    CHECK_EQ(code, MEFA_CODE_DEVICE_NOT_FOUND);
    CHECK(strstr(mefa_last_error(), "No EFA devices found") != NULL);
    CHECK(strstr(mefa_last_error(), "MC_EFA_PROVIDER") != NULL);
    CHECK_EQ(transport, 77);

    /* Devices of other names than there are. */
    config.provider = "tcp";
    const char *device = "no-such-nic0";
    config.devices = &device;
    config.device_count = 1;
    CHECK_EQ(mefa_install(&config, &transport), MEFA_CODE_DEVICE_NOT_FOUND);
    CHECK_EQ(transport, 77);
    return 0;
}
