/* SPDX-License-Identifier: Apache-2.0
 *
 * target.h as a program: target PROVIDER NAME LENGTH PARTS. Settings (MC_...) given as further
 * arguments, NAME=VALUE. */
#include "target.h"

#include <signal.h>
#include <sys/prctl.h>

int main(int count, char **arguments) {
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* also when stopped */
    CHECK(count >= 5);
    check_start(300);
    for (int i = 5; i < count; i++) CHECK_EQ(putenv(arguments[i]), 0);
    return serve_target(stdin, stdout, arguments[1], arguments[2], strtoull(arguments[3], NULL, 10),
                        strtoull(arguments[4], NULL, 10));
}
