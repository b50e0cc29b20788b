/* SPDX-License-Identifier: Apache-2.0
 *
 * transfer [PROVIDER]: two processes, by fork before either uses the library, in plain C: writes and
 * reads of many lengths at odd places, every byte checked on both sides. */
#include "target.h"

#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#define MIB UINT64_C(1048576)
#define MEMORY (66 * MIB)
#define MINUTE UINT64_C(60000000000)

static FILE *commands, *answers;
static char *line;
static size_t room;

static char *ask(const char *format, ...) {
    va_list arguments;
    if (format != NULL) {
        va_start(arguments, format);
        vfprintf(commands, format, arguments);
        va_end(arguments);
        fflush(commands);
    }
    CHECK(getline(&line, &room, answers) > 0);
    line[strcspn(line, "\n")] = '\0';
    return line;
}

#define TARGET_OK(...) \
    do { \
        char *answer_ = ask(__VA_ARGS__); \
        if (strcmp(answer_, "ok") != 0) check_failed(__FILE__, __LINE__, "target: %s", answer_); \
    } while (0)

static void transfer(mefa_transport transport, mefa_batch batch, int32_t opcode, void *ours,
                     mefa_segment target, uint64_t theirs, uint64_t length) {
    mefa_request request = {opcode, 0, (uint64_t)(uintptr_t)ours, target, theirs, length, 1};
    int32_t status = -1;
    size_t tasks = 0;
    mefa_task_state state = {-1, 1, 1};
    CHECK_OK(mefa_batch_status(transport, batch, &status, &tasks));
    CHECK_OK(mefa_submit(transport, batch, &request, 1, MINUTE));
    CHECK_OK(mefa_wait(transport, batch, MINUTE, &status));
    CHECK_EQ(status, MEFA_STATUS_COMPLETED);
    CHECK_OK(mefa_task_status(transport, batch, tasks, &state));
    CHECK_EQ(state.status, MEFA_STATUS_COMPLETED);
    CHECK_EQ(state.bytes, length);
    CHECK_EQ(state.reserved, 0);
}

int main(int count, char **arguments) {
    const char *provider = count > 1 ? arguments[1] : "tcp";
    int to[2], from[2];
    check_start(110);
    CHECK_EQ(pipe(to), 0);
    CHECK_EQ(pipe(from), 0);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        close(to[1]);
        close(from[0]);
        return serve_target(fdopen(to[0], "r"), fdopen(from[1], "w"), provider, "there:1", MEMORY, 1);
    }
    close(to[0]);
    close(from[1]);
    commands = fdopen(to[1], "w");
    answers = fdopen(from[0], "r");

    mefa_transport transport = check_install(provider, "here:1");
    unsigned char *memory = map_memory(MEMORY);
    mefa_segment target = 0;
    mefa_batch batch = 0;
    uint64_t theirs = strtoull(ask(NULL), NULL, 10);
    CHECK_OK(mefa_register(transport, memory, MEMORY, "cpu:0", NULL, NULL));
    CHECK_OK(mefa_segment_open_json(transport, ask("descriptor\n"), &target));
    CHECK_OK(mefa_batch_allocate(transport, 16, &batch));

    static const uint64_t lengths[] = {0, 1, 3, 4095, 4096, 65537, MIB + 13, 64 * MIB};
    const uint64_t here = 4097, there = 8191, guard = 4096;
    for (uint64_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        uint64_t length = lengths[i], ours = 3 * i + 1, guards = 3 * i + 2, theirs_back = 3 * i + 3;
        /* Our pattern to the target, whose memory around it stays as it is. */
        TARGET_OK("fill %" PRIu64 " %" PRIu64 " %" PRIu64 "\n", there - guard, length + 2 * guard, guards);
        pattern_fill(memory + here, length, ours, there);
        transfer(transport, batch, MEFA_WRITE, memory + here, target, theirs + there, length);
        TARGET_OK("check %" PRIu64 " %" PRIu64 " %" PRIu64 "\n", there, length, ours);
        TARGET_OK("check %" PRIu64 " %" PRIu64 " %" PRIu64 "\n", there - guard, guard, guards);
        TARGET_OK("check %" PRIu64 " %" PRIu64 " %" PRIu64 "\n", there + length, guard, guards);
        /* Its pattern to us, and ours around it stays. */
        TARGET_OK("fill %" PRIu64 " %" PRIu64 " %" PRIu64 "\n", there, length, theirs_back);
        pattern_fill(memory, length + here + guard, guards, 0);
        transfer(transport, batch, MEFA_READ, memory + here, target, theirs + there, length);
        CHECK_EQ(pattern_differs(memory + here, length, theirs_back, there), length);
        CHECK_EQ(pattern_differs(memory, here, guards, 0), here);
        CHECK_EQ(pattern_differs(memory + here + length, guard, guards, here + length), guard);
    }
    CHECK_OK(mefa_batch_free(transport, batch));
    CHECK_OK(mefa_segment_close(transport, target));
    CHECK_OK(mefa_unregister(transport, memory));
    CHECK_OK(mefa_uninstall(transport));

    int status = -1;
    fclose(commands);
    CHECK_EQ(waitpid(child, &status, 0), child);
    CHECK_EQ(status, 0);
    fclose(answers);
    free(line);
    munmap(memory, MEMORY);
    return 0;
}
