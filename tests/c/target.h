/* SPDX-License-Identifier: Apache-2.0
 *
 * The other process of the tests: it lets its memory be read and written, and obeys one-line commands.
 *
 *   fill OFFSET LENGTH SEED     writes a pattern into its memory         -> ok
 *   check OFFSET LENGTH SEED    compares its memory with one             -> ok, or "bad at OFFSET: ..."
 *   descriptor                  its segment descriptor                   -> JSON
 *   register LENGTH             maps and registers more memory           -> its address
 *   unregister ADDRESS          ends a registration                      -> the return code
 *   handshake JSON              answers a handshake                      -> return code, blank, answer
 *
 * It ends when the commands do. Its first line is its memory's address. */
#ifndef MEFA_TEST_TARGET_H
#define MEFA_TEST_TARGET_H

#include "check.h"

#include <inttypes.h>

static inline int serve_target(FILE *commands, FILE *answers, const char *provider, const char *name,
                               uint64_t length, uint64_t parts) {
    mefa_transport transport = check_install(provider, name);
    unsigned char *memory = map_memory(length);
    for (uint64_t part = 0; part < parts; part++) {
        uint64_t first = length / parts * part;
        uint64_t size = part + 1 < parts ? length / parts : length - first;
        CHECK_OK(mefa_register(transport, memory + first, size, NULL, NULL, NULL));
    }
    fprintf(answers, "%" PRIu64 "\n", (uint64_t)(uintptr_t)memory);
    fflush(answers);
    char *line = NULL;
    size_t room = 0;
    struct text text = {0};
    while (getline(&line, &room, commands) > 0) {
        uint64_t a = 0, b = 0, c = 0;
        line[strcspn(line, "\n")] = '\0';
        if (sscanf(line, "fill %" SCNu64 " %" SCNu64 " %" SCNu64, &a, &b, &c) == 3) {
            pattern_fill(memory + a, b, c, a);
            fprintf(answers, "ok\n");
        } else if (sscanf(line, "check %" SCNu64 " %" SCNu64 " %" SCNu64, &a, &b, &c) == 3) {
            uint64_t at = pattern_differs(memory + a, b, c, a);
            if (at == b)
                fprintf(answers, "ok\n");
            else
                fprintf(answers, "bad at %" PRIu64 ": %02x, not %02x\n", a + at, memory[a + at],
                        pattern_byte(c, a + at));
        } else if (strcmp(line, "descriptor") == 0) {
            CHECK_OK(mefa_descriptor_json(transport, keep_text, &text));
            fprintf(answers, "%s\n", text.text);
        } else if (sscanf(line, "register %" SCNu64, &a) == 1) {
            unsigned char *more = map_memory(a);
            CHECK_OK(mefa_register(transport, more, a, NULL, NULL, NULL));
            fprintf(answers, "%" PRIu64 "\n", (uint64_t)(uintptr_t)more);
        } else if (sscanf(line, "unregister %" SCNu64, &a) == 1) {
            fprintf(answers, "%d\n", mefa_unregister(transport, (void *)(uintptr_t)a));
        } else if (strncmp(line, "handshake ", 10) == 0) {
            int code = mefa_handshake_answer(transport, line + 10, keep_text, &text);
            fprintf(answers, "%d %s\n", code, code == 0 ? text.text : mefa_last_error());
        } else {
            check_failed(__FILE__, __LINE__, "no such command: %s", line);
        }
        fflush(answers);
    }
    free(line);
    free(text.text);
    CHECK_OK(mefa_uninstall(transport));
    munmap(memory, (size_t)length);
    return 0;
}

#endif
