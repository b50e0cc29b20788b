/* SPDX-License-Identifier: Apache-2.0
 *
 * bad_input [PROVIDER]: every function with every kind of bad argument. Each gives the documented code
 * and a text, writes nothing, and leaves nothing half-done. */
#include "check.h"

#define MIB UINT64_C(1048576)
#define NO_HANDLE UINT64_C(0xdeaddeaddeaddead)

/* A test of so much goes on after a failure. */
static int complaints;

static void complain(int line, const char *format, ...) __attribute__((format(printf, 2, 3)));

static void complain(int line, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "%s:%d: ", __FILE__, line);
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "; last error: \"%s\"\n", mefa_last_error());
    va_end(arguments);
    complaints++;
}

/* That a call fails with this code, and with a text of its own, not the one of an earlier error. */
#define FAILS(code, call) \
    do { \
        int got_; \
        (void)mefa_segment_close(UINT64_C(0xfeedfeedfeedfeed), 1); \
        char *before_ = strdup(mefa_last_error()); \
        got_ = (call); \
        if (got_ != (code)) \
            complain(__LINE__, "%s gives %d, not %s", #call, got_, #code); \
        else if (mefa_last_error()[0] == '\0' || strcmp(before_, mefa_last_error()) == 0) \
            complain(__LINE__, "%s tells no error", #call); \
        else if (strchr(mefa_last_error(), '\n') != NULL) \
            complain(__LINE__, "%s tells it in two lines", #call); \
        free(before_); \
    } while (0)

#define INVALID(call) FAILS(MEFA_CODE_INVALID_ARGUMENT, call)
#define MALFORMED(call) FAILS(MEFA_CODE_MALFORMED_JSON, call)

static const char *provider = "tcp";
static mefa_transport transport;
static mefa_segment segment;
static mefa_batch batch;
static unsigned char *memory; /* 4 MiB; the second of them is registered */
static unsigned char *ours;
static struct text descriptor;

static void never_text(void *context, const char *text, size_t length) {
    (void)context, (void)text, (void)length;
    check_failed(__FILE__, __LINE__, "a text after an error");
}

static void never_segment(void *context, const mefa_segment_desc *desc) {
    (void)context, (void)desc;
    check_failed(__FILE__, __LINE__, "a descriptor after an error");
}

static void never_regions(void *context, const mefa_region *regions, size_t count) {
    (void)context, (void)regions, (void)count;
    check_failed(__FILE__, __LINE__, "regions after an error");
}

static size_t buffers_now(void);

static void count_buffers(void *context, const mefa_segment_desc *desc) {
    *(size_t *)context = desc->buffer_count;
}

static size_t buffers_now(void) {
    size_t count = SIZE_MAX;
    CHECK_OK(mefa_descriptor(transport, count_buffers, &count));
    return count;
}

static size_t tasks_now(void) {
    size_t tasks = SIZE_MAX;
    int32_t status = -1;
    CHECK_OK(mefa_batch_status(transport, batch, &status, &tasks));
    return tasks;
}

/* `from` with its first `what` replaced; to be freed. */
static char *replaced(const char *from, const char *what, const char *with) {
    const char *at = strstr(from, what);
    if (at == NULL) check_failed(__FILE__, __LINE__, "no %s in %s", what, from);
    char *text = (char *)malloc(strlen(from) + strlen(with) + 1);
    sprintf(text, "%.*s%s%s", (int)(at - from), from, with, at + strlen(what));
    return text;
}

/* ---- every function of a transport, given a number that is none ------------------------------ */

static void unknown_transport(mefa_transport bad) {
    mefa_segment segment_out = 77;
    mefa_batch batch_out = 77;
    mefa_request request = {MEFA_WRITE, 0, (uint64_t)(uintptr_t)ours, segment, (uint64_t)(uintptr_t)ours, 1, 1};
    mefa_task_state state = {77, 77, 77};
    mefa_memory one = {memory, 4096, NULL};
    mefa_segment_desc desc = {0};
    mefa_device device = {"nic", "fe80::1", 0};
    mefa_nic_stats stats = {0};
    int32_t status = 77, quiet = 77;
    size_t count = 77;
    void *address = ours;
    stats.size = sizeof stats;
    desc.size = sizeof desc;
    desc.name = "there:1";
    desc.devices = &device;
    desc.device_count = 1;
    INVALID(mefa_uninstall(bad));
    INVALID(mefa_register(bad, memory, 4096, NULL, never_regions, NULL));
    INVALID(mefa_register_many(bad, &one, 1, never_regions, NULL));
    INVALID(mefa_unregister(bad, ours));
    INVALID(mefa_unregister_many(bad, &address, 1));
    INVALID(mefa_descriptor_json(bad, never_text, NULL));
    INVALID(mefa_descriptor(bad, never_segment, NULL));
    INVALID(mefa_segment_open_json(bad, descriptor.text, &segment_out));
    INVALID(mefa_segment_open(bad, &desc, &segment_out));
    INVALID(mefa_segment_open_name(bad, "there:1", &segment_out));
    INVALID(mefa_segment_update_json(bad, segment, descriptor.text));
    INVALID(mefa_segment_update(bad, segment, &desc));
    INVALID(mefa_segment_close(bad, segment));
    INVALID(mefa_segment_warm_up(bad, segment));
    INVALID(mefa_handshake_answer(bad, "{}", never_text, NULL));
    INVALID(mefa_batch_allocate(bad, 1, &batch_out));
    INVALID(mefa_batch_free(bad, batch));
    INVALID(mefa_submit(bad, batch, &request, 1, 0));
    INVALID(mefa_submit(bad, batch, NULL, 0, 0));
    INVALID(mefa_task_status(bad, batch, 0, &state));
    INVALID(mefa_batch_status(bad, batch, &status, &count));
    INVALID(mefa_task_error(bad, batch, 0, never_text, NULL));
    INVALID(mefa_wait(bad, batch, 0, &status));
    INVALID(mefa_cancel(bad, batch));
    INVALID(mefa_batch_quiet(bad, batch, &quiet));
    INVALID(mefa_wait_quiet(bad, batch, 0));
    INVALID(mefa_nic_count(bad, &count));
    INVALID(mefa_stats(bad, 0, &stats));
    INVALID(mefa_stats_json(bad, never_text, NULL));
    CHECK_EQ(segment_out, 77);
    CHECK_EQ(batch_out, 77);
    CHECK(state.status == 77 && state.reserved == 77 && state.bytes == 77);
    CHECK(status == 77 && quiet == 77 && count == 77);
    CHECK_EQ(stats.posted, 0);
}

static void unknown_segment(mefa_segment bad) {
    mefa_request request = {MEFA_WRITE, 0, (uint64_t)(uintptr_t)ours, bad, (uint64_t)(uintptr_t)ours, 1, 1};
    mefa_segment_desc desc = {0};
    size_t before = tasks_now();
    desc.size = sizeof desc;
    desc.name = "there:1";
    INVALID(mefa_segment_update_json(transport, bad, descriptor.text));
    INVALID(mefa_segment_update(transport, bad, &desc));
    INVALID(mefa_segment_close(transport, bad));
    INVALID(mefa_segment_warm_up(transport, bad));
    INVALID(mefa_submit(transport, batch, &request, 1, 0));
    request.length = 0;
    INVALID(mefa_submit(transport, batch, &request, 1, 0));
    CHECK_EQ(tasks_now(), before);
}

static void unknown_batch(mefa_batch bad) {
    mefa_request request = {MEFA_WRITE, 0, (uint64_t)(uintptr_t)ours, segment, (uint64_t)(uintptr_t)ours, 1, 1};
    mefa_task_state state = {77, 77, 77};
    int32_t status = 77, quiet = 77;
    size_t count = 77;
    INVALID(mefa_batch_free(transport, bad));
    if (bad != 0) { /* 0 asks for no batch */
        INVALID(mefa_submit(transport, bad, &request, 1, 0));
        INVALID(mefa_submit(transport, bad, NULL, 0, 0));
    }
    INVALID(mefa_task_status(transport, bad, 0, &state));
    INVALID(mefa_batch_status(transport, bad, &status, &count));
    INVALID(mefa_batch_status(transport, bad, &status, NULL));
    INVALID(mefa_task_error(transport, bad, 0, never_text, NULL));
    INVALID(mefa_wait(transport, bad, UINT64_MAX, &status));
    INVALID(mefa_cancel(transport, bad));
    INVALID(mefa_batch_quiet(transport, bad, &quiet));
    INVALID(mefa_wait_quiet(transport, bad, UINT64_MAX));
    CHECK(state.status == 77 && state.reserved == 77 && state.bytes == 77);
    CHECK(status == 77 && quiet == 77 && count == 77);
}

/* ---- one function after the other ------------------------------------------------------------ */

static void installing(void) {
    struct {
        mefa_config config;
        unsigned char tail[4096];
    } longer = {0};
    mefa_config config = {0};
    mefa_transport out = 77;
    const char *devices[] = {NULL};
    config.size = sizeof config;
    config.server_name = "here:2";
    config.provider = provider;
    INVALID(mefa_install(NULL, &out));
    INVALID(mefa_install(&config, NULL));

    config.server_name = NULL;
    INVALID(mefa_install(&config, &out));
    config.server_name = "\xff\xfe:1";
    INVALID(mefa_install(&config, &out));
    config.server_name = "here:2\n";
    INVALID(mefa_install(&config, &out));
    config.server_name = "";
    INVALID(mefa_install(&config, &out));
    if (out != 77) mefa_uninstall(out);
    out = 77;
    config.server_name = "here:2";

    config.provider = "\xff";
    INVALID(mefa_install(&config, &out));
    config.provider = provider;

    config.device_count = 1;
    INVALID(mefa_install(&config, &out));
    config.devices = devices;
    INVALID(mefa_install(&config, &out));
    config.device_count = SIZE_MAX;
    INVALID(mefa_install(&config, &out));
    config.devices = NULL;
    config.device_count = 0;

    static const char *const topologies[] = {
        "", " ", "{", "[]", "7", "{\"cpu:0\":7}", "{\"cpu:0\":[]}", "{\"cpu:0\":[[1],[]]}",
        "{\"cpu:0\":[[\"a\"],[]]} x", "{\"cpu:0\":[[\"\"],[]]}", "{\"\":[[\"a\"],[]]}"};
    for (size_t i = 0; i < sizeof topologies / sizeof *topologies; i++) {
        config.topology_json = topologies[i];
        MALFORMED(mefa_install(&config, &out));
    }
    config.topology_json = "\xff";
    INVALID(mefa_install(&config, &out));
    config.topology_json = NULL;

    /* Sizes that no header ever had. One that ends within a field would take half a pointer. */
    static const size_t sizes[] = {0, 1, 8, 15, 17, 20, sizeof config - 1, sizeof config + 1, SIZE_MAX};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        longer.config = config;
        longer.config.size = sizes[i];
        INVALID(mefa_install(&longer.config, &out));
        if (out != 77) mefa_uninstall(out);
        out = 77;
    }
    /* A newer header's structure: fine while what it has more is zero. */
    longer.config.size = sizeof longer;
    for (size_t at = 0; at < sizeof longer.tail; at += sizeof longer.tail - 1) {
        longer.tail[at] = 1;
        INVALID(mefa_install(&longer.config, &out));
        longer.tail[at] = 0;
    }
    CHECK_EQ(out, 77);
    CHECK_OK(mefa_install(&longer.config, &out));
    CHECK(out != 77 && out != 0 && out != transport);
    CHECK_OK(mefa_uninstall(out));
    INVALID(mefa_uninstall(out));
    unknown_transport(out);

    /* An older header's: what it has not is zero, whatever lies there. */
    setenv("MC_EFA_PROVIDER", provider, 1);
    memset(&longer, 0xa5, sizeof longer);
    longer.config.size = 16;
    longer.config.server_name = "here:2";
    out = 77;
    CHECK_OK(mefa_install(&longer.config, &out));
    CHECK_OK(mefa_uninstall(out));
    unsetenv("MC_EFA_PROVIDER");
}

static void registering(void) {
    const size_t before = buffers_now();
    mefa_memory many[3] = {{memory, 4096, NULL}, {memory + 8192, 4096, NULL}, {memory + 16384, 4096, NULL}};
    CHECK_EQ(before, 1);
    INVALID(mefa_register(transport, NULL, 4096, NULL, never_regions, NULL));
    INVALID(mefa_register(transport, memory, 0, NULL, never_regions, NULL));
    INVALID(mefa_register(transport, memory, UINT64_MAX, NULL, never_regions, NULL));
    INVALID(mefa_register(transport, memory, UINT64_MAX - (uint64_t)(uintptr_t)memory + 1, NULL, never_regions, NULL));
    INVALID(mefa_register(transport, memory, 4096, "\xff", never_regions, NULL));
    INVALID(mefa_register(transport, memory, 4096, "cpu:0\r", never_regions, NULL));
    INVALID(mefa_register_many(transport, NULL, 1, never_regions, NULL));
    INVALID(mefa_register_many(transport, many, SIZE_MAX, never_regions, NULL));

    /* Overlaps: the same, inside, around, from below, from above; but a neighbour is none. */
    struct {
        unsigned char *address;
        uint64_t length;
    } overlaps[] = {{ours, MIB}, {ours + 1, 1}, {memory, 3 * MIB}, {ours - 1, 2}, {ours + MIB - 1, 2}, {ours, 1}};
    for (size_t i = 0; i < sizeof overlaps / sizeof *overlaps; i++)
        FAILS(MEFA_CODE_ADDRESS_OVERLAPPED, mefa_register(transport, overlaps[i].address, overlaps[i].length, NULL,
                                                          never_regions, NULL));
    CHECK_OK(mefa_register(transport, ours - 1, 1, NULL, NULL, NULL));
    CHECK_OK(mefa_register(transport, ours + MIB, 1, NULL, NULL, NULL));
    CHECK_OK(mefa_unregister(transport, ours - 1));
    CHECK_OK(mefa_unregister(transport, ours + MIB));

    /* One bad range among good ones: none is registered. */
    many[1].address = ours + 5;
    FAILS(MEFA_CODE_ADDRESS_OVERLAPPED, mefa_register_many(transport, many, 3, never_regions, NULL));
    many[1].address = memory + 4095;
    FAILS(MEFA_CODE_ADDRESS_OVERLAPPED, mefa_register_many(transport, many, 3, never_regions, NULL));
    many[1].address = NULL;
    INVALID(mefa_register_many(transport, many, 3, never_regions, NULL));
    many[1].address = memory + 8192;
    many[2].length = 0;
    INVALID(mefa_register_many(transport, many, 3, never_regions, NULL));
    many[2].length = 4096;
    many[2].location = "\xff";
    INVALID(mefa_register_many(transport, many, 3, never_regions, NULL));
    CHECK_EQ(buffers_now(), before);
    for (int i = 0; i < 3; i++)
        FAILS(MEFA_CODE_ADDRESS_NOT_REGISTERED, mefa_unregister(transport, many[i].address));
    many[2].location = NULL;
    CHECK_OK(mefa_register_many(transport, many, 3, NULL, NULL));
    CHECK_OK(mefa_register_many(transport, NULL, 0, NULL, NULL));
    CHECK_EQ(buffers_now(), before + 3);

    /* It goes on after an error, and returns the first one. */
    void *addresses[] = {many[0].address, memory + 1, many[1].address, NULL, many[2].address};
    FAILS(MEFA_CODE_ADDRESS_NOT_REGISTERED, mefa_unregister_many(transport, addresses, 5));
    CHECK_EQ(buffers_now(), before);
    FAILS(MEFA_CODE_ADDRESS_NOT_REGISTERED, mefa_unregister(transport, NULL));
    FAILS(MEFA_CODE_ADDRESS_NOT_REGISTERED, mefa_unregister(transport, ours + 1));
    FAILS(MEFA_CODE_ADDRESS_NOT_REGISTERED, mefa_unregister(transport, memory));
    INVALID(mefa_unregister_many(transport, NULL, 1));
    INVALID(mefa_unregister_many(transport, addresses, SIZE_MAX));
    CHECK_OK(mefa_unregister_many(transport, NULL, 0));
    CHECK_EQ(buffers_now(), before);

    /* What we tell peers, they must be able to read. */
    char *location = (char *)calloc(1, 70000);
    memset(location, 'x', 69999);
    if (mefa_register(transport, memory, 4096, location, NULL, NULL) == 0) {
        struct text text = {0};
        mefa_segment opened = 0;
        CHECK_OK(mefa_descriptor_json(transport, keep_text, &text));
        if (mefa_segment_open_json(transport, text.text, &opened) != 0)
            complain(__LINE__, "our own descriptor is refused");
        else
            CHECK_OK(mefa_segment_close(transport, opened));
        CHECK_OK(mefa_unregister(transport, memory));
        free(text.text);
    }
    free(location);
}

static void describing(void) {
    INVALID(mefa_descriptor_json(transport, NULL, NULL));
    INVALID(mefa_descriptor(transport, NULL, NULL));
    INVALID(mefa_stats_json(transport, NULL, NULL));
    INVALID(mefa_handshake_answer(transport, "{}", NULL, NULL));
    INVALID(mefa_handshake_answer(transport, NULL, never_text, NULL));
    INVALID(mefa_handshake_answer(transport, "\xff", never_text, NULL));
    static const char *const handshakes[] = {
        "", "{", "[]", "7", "null", "{\"efa_addr\":7}", "{\"efa_addr\":\"0\"}", "{\"efa_addr\":\"zz\"}"};
    for (size_t i = 0; i < sizeof handshakes / sizeof *handshakes; i++)
        MALFORMED(mefa_handshake_answer(transport, handshakes[i], never_text, NULL));
    /* One that can be read, but not be meant for us, is answered with the reason. */
    struct text text = {0};
    CHECK_OK(mefa_handshake_answer(
        transport, "{\"local_nic_path\":\"there:1@x\",\"peer_nic_path\":\"here:1@y\",\"efa_addr\":\"00\"}",
        keep_text, &text));
    CHECK_EQ(text.calls, 1);
    CHECK_EQ(text.length, strlen(text.text));
    CHECK(strstr(text.text, "\"reply_msg\":\"here:1@y is not a NIC of here:1\"") != NULL);
    free(text.text);
}

struct opened {
    int code;
    mefa_segment segment;
    int what;
};

/* Opens the descriptor given, spoilt in one way. */
static void open_spoilt(void *context, const mefa_segment_desc *good) {
    struct opened *opened = (struct opened *)context;
    struct {
        mefa_segment_desc desc;
        unsigned char tail[64];
    } longer = {0};
    mefa_segment_desc *desc = &longer.desc;
    mefa_device devices[64];
    mefa_buffer buffers[64];
    CHECK(good->size == sizeof *good && good->device_count <= 64 && good->buffer_count <= 64);
    memcpy(devices, good->devices, good->device_count * sizeof *devices);
    memcpy(buffers, good->buffers, good->buffer_count * sizeof *buffers);
    *desc = *good;
    desc->devices = devices;
    desc->buffers = buffers;
    switch (opened->what) {
    case 0: break;
    case 1: desc->size = sizeof longer; break;
    case 2: desc->topology_json = NULL; break;
    /* MEFA_CODE_INVALID_ARGUMENT from here on ... */
    case 3: desc->size = 0; break;
    case 4: desc->size = sizeof *desc - 8; break;
    case 5: desc->size = SIZE_MAX; break;
    case 6: desc->size = sizeof longer; longer.tail[0] = 1; break;
    case 7: desc->size = sizeof longer; longer.tail[63] = 1; break;
    case 8: desc->name = NULL; break;
    case 9: desc->devices = NULL; break;
    case 10: desc->device_count = SIZE_MAX; break;
    case 11: desc->buffers = NULL; break;
    case 12: desc->buffer_count = SIZE_MAX; break;
    case 13: devices[0].name = NULL; break;
    case 14: devices[0].gid = NULL; break;
    case 15: buffers[0].name = NULL; break;
    case 16: buffers[0].rkeys = NULL; break;
    case 17: desc->name = "\xff"; break;
    /* ... MEFA_CODE_MALFORMED_JSON from here on ... */
    case 18: devices[0].name = ""; break;
    case 19: devices[0].gid = ""; break;
    case 20: buffers[0].name = ""; break;
    case 21: buffers[0].address = 0; break;
    case 22: buffers[0].length = 0; break;
    case 23: buffers[0].length = UINT64_MAX; break;
    case 24: desc->device_count--; break;
    case 25: desc->topology_json = "{"; break;
    /* ... and another provider. */
    default: devices[0].gid = "mefa1:other:00"; break;
    }
    opened->segment = 77;
    opened->code = mefa_segment_open(transport, desc, &opened->segment);
}

static void opening(void) {
    mefa_segment out = 77;
    INVALID(mefa_segment_open_json(transport, NULL, &out));
    INVALID(mefa_segment_open_json(transport, descriptor.text, NULL));
    INVALID(mefa_segment_open_json(transport, "\xff", &out));
    INVALID(mefa_segment_open(transport, NULL, &out));
    INVALID(mefa_segment_open_name(transport, NULL, &out));
    INVALID(mefa_segment_open_name(transport, "there:1", NULL));
    INVALID(mefa_segment_open_name(transport, "\xff", &out));
    /* No function to ask for it was given. */
    FAILS(MEFA_CODE_METADATA, mefa_segment_open_name(transport, "there:1", &out));
    INVALID(mefa_segment_update_json(transport, segment, NULL));
    INVALID(mefa_segment_update(transport, segment, NULL));

    static const char *const texts[] = {
        "", " ", "{", "}", "[]", "7", "null", "\"efa\"", "{}", "{\"protocol\":7}", "{\"protocol\":\"tcp\"}",
        "{\"protocol\":\"efa\"} x", "{\"protocol\":\"efa\",\"devices\":7}", "{\"protocol\":\"efa\",\"devices\":[7]}",
        "{\"protocol\":\"efa\",\"buffers\":{}}", "{\"protocol\":\"efa\",\"devices\":[{}]}",
        "{\"protocol\":\"efa\",\"devices\":[{\"name\":\"a\",\"gid\":\"\"}]}",
        "{\"protocol\":\"efa\",\"devices\":[{\"name\":\"a\",\"gid\":\"x\",\"lid\":65536}]}",
        "{\"protocol\":\"efa\",\"buffers\":[{\"name\":\"cpu:0\",\"addr\":-1,\"length\":1}]}"};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        MALFORMED(mefa_segment_open_json(transport, texts[i], &out));
        MALFORMED(mefa_segment_update_json(transport, segment, texts[i]));
    }
    static const char *const spoils[][2] = {
        {"\"rkey\":[", "\"rkey\":[1,"}, {"\"rkey\":[", "\"rkey\":[\"a\","}, {"\"length\":", "\"length\":-"},
        {"\"length\":1048576", "\"length\":0"}, {"\"length\":1048576", "\"length\":18446744073709551615"},
        {"\"length\":1048576", "\"length\":18446744073709551616"}, {"\"gid\":\"", "\"gid\":\"\",\"gid\":\""},
        {"\"protocol\":\"efa\"", "\"protocol\":\"rdma\""}, {"\"priority_matrix\":{", "\"priority_matrix\":{\"x\":1,"}};
    for (size_t i = 0; i < sizeof spoils / sizeof *spoils; i++) {
        char *text = replaced(descriptor.text, spoils[i][0], spoils[i][1]);
        MALFORMED(mefa_segment_open_json(transport, text, &out));
        MALFORMED(mefa_segment_update_json(transport, segment, text));
        free(text);
    }
    char *deep = (char *)calloc(1, 200001);
    memset(deep, '[', 200000);
    MALFORMED(mefa_segment_open_json(transport, deep, &out));
    memcpy(deep, "{\"protocol\":\"efa\",\"x\":", 22);
    MALFORMED(mefa_segment_open_json(transport, deep, &out));
    free(deep);
    char *other = replaced(descriptor.text, "\"gid\":\"mefa1:", "\"gid\":\"mefa1:other");
    FAILS(MEFA_CODE_ENDPOINT, mefa_segment_open_json(transport, other, &out));
    FAILS(MEFA_CODE_ENDPOINT, mefa_segment_update_json(transport, segment, other));
    free(other);
    CHECK_EQ(out, 77);

    for (int what = 0; what <= 26; what++) {
        struct opened opened = {0, 0, what};
        int wanted = what < 3 ? 0 : what < 18 ? MEFA_CODE_INVALID_ARGUMENT : what < 26 ? MEFA_CODE_MALFORMED_JSON : MEFA_CODE_ENDPOINT;
        CHECK_OK(mefa_descriptor(transport, open_spoilt, &opened));
        if (opened.code != wanted)
            complain(__LINE__, "case %d gives %d, not %d", what, opened.code, wanted);
        if (wanted == 0) {
            CHECK_OK(mefa_segment_close(transport, opened.segment));
            INVALID(mefa_segment_close(transport, opened.segment));
            unknown_segment(opened.segment);
        } else {
            CHECK_EQ(opened.segment, 77);
            CHECK(mefa_last_error()[0] != '\0');
        }
    }
    /* A descriptor that is refused leaves the former one as it was. */
    mefa_request request = {MEFA_WRITE, 0, (uint64_t)(uintptr_t)ours, segment, (uint64_t)(uintptr_t)ours + MIB - 1, 2, 1};
    FAILS(MEFA_CODE_ADDRESS_NOT_REGISTERED, mefa_submit(transport, batch, &request, 1, 0));
    CHECK_OK(mefa_segment_update_json(transport, segment, descriptor.text));
    CHECK_OK(mefa_segment_warm_up(transport, segment));
}

static size_t resident_mib(void) {
    size_t total = 0, resident = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    CHECK(file != NULL && fscanf(file, "%zu %zu", &total, &resident) == 2);
    fclose(file);
    return resident * (size_t)sysconf(_SC_PAGESIZE) / MIB;
}

static void allocating(void) {
    static const size_t sizes[] = {0, 1048577, UINT32_MAX, (size_t)UINT32_MAX + 2, SIZE_MAX};
    mefa_batch out = 77;
    INVALID(mefa_batch_allocate(transport, 1, NULL));
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        INVALID(mefa_batch_allocate(transport, sizes[i], &out));
    CHECK_EQ(out, 77);
    /* One as large as can be costs what it needs, not that many times over. */
    const size_t resident = resident_mib();
    CHECK_OK(mefa_batch_allocate(transport, 1048576, &out));
    if (resident_mib() > resident + 512) complain(__LINE__, "one batch takes %zu MiB", resident_mib() - resident);
    CHECK_OK(mefa_batch_free(transport, out));
    CHECK_OK(mefa_batch_allocate(transport, 1, &out));
    CHECK_OK(mefa_batch_free(transport, out));
    INVALID(mefa_batch_free(transport, out));
    unknown_batch(out);
    /* Its place may be taken again, its number not. */
    mefa_batch next = 0;
    CHECK_OK(mefa_batch_allocate(transport, 1, &next));
    CHECK(next != out);
    unknown_batch(out);
    CHECK_OK(mefa_batch_free(transport, next));
}

static void submitting(void) {
    const uint64_t us = (uint64_t)(uintptr_t)ours, outside = (uint64_t)(uintptr_t)memory;
    const mefa_request good = {MEFA_WRITE, 0, us, segment, us + 4096, 16, 1};
    struct {
        int code;
        mefa_request request;
    } bad[] = {
        {MEFA_CODE_INVALID_ARGUMENT, {2, 0, us, segment, us, 16, 1}},
        {MEFA_CODE_INVALID_ARGUMENT, {-1, 0, us, segment, us, 16, 1}},
        {MEFA_CODE_INVALID_ARGUMENT, {MEFA_WRITE, 1, us, segment, us, 16, 1}},
        {MEFA_CODE_INVALID_ARGUMENT, {MEFA_READ, 0x80000000, us, segment, us, 16, 1}},
        {MEFA_CODE_INVALID_ARGUMENT, {MEFA_WRITE, 0, us, segment, us, UINT64_MAX, 1}},
        {MEFA_CODE_INVALID_ARGUMENT, {MEFA_WRITE, 0, us, segment, UINT64_MAX, 2, 1}},
        {MEFA_CODE_INVALID_ARGUMENT, {MEFA_WRITE, 0, UINT64_MAX, segment, us, 2, 1}},
        {MEFA_CODE_INVALID_ARGUMENT, {MEFA_WRITE, 0, us, 0, us, 16, 1}},
        {MEFA_CODE_INVALID_ARGUMENT, {MEFA_WRITE, 0, us, NO_HANDLE, us, 16, 1}},
        {MEFA_CODE_ADDRESS_NOT_REGISTERED, {MEFA_WRITE, 0, 0, segment, us, 16, 1}},
        {MEFA_CODE_ADDRESS_NOT_REGISTERED, {MEFA_READ, 0, outside, segment, us, 16, 1}},
        {MEFA_CODE_ADDRESS_NOT_REGISTERED, {MEFA_READ, 0, us - 1, segment, us, 16, 1}},
        {MEFA_CODE_ADDRESS_NOT_REGISTERED, {MEFA_READ, 0, us + MIB - 15, segment, us, 16, 1}},
        {MEFA_CODE_ADDRESS_NOT_REGISTERED, {MEFA_READ, 0, us + MIB, segment, us, 1, 1}},
        {MEFA_CODE_ADDRESS_NOT_REGISTERED, {MEFA_WRITE, 0, us, segment, 0, 16, 1}},
        {MEFA_CODE_ADDRESS_NOT_REGISTERED, {MEFA_WRITE, 0, us, segment, outside, 16, 1}},
        {MEFA_CODE_ADDRESS_NOT_REGISTERED, {MEFA_WRITE, 0, us, segment, us - 1, 16, 1}},
        {MEFA_CODE_ADDRESS_NOT_REGISTERED, {MEFA_WRITE, 0, us, segment, us + MIB - 15, 16, 1}},
        {MEFA_CODE_ADDRESS_NOT_REGISTERED, {MEFA_READ, 0, us, segment, us, MIB + 1, 1}},
        {MEFA_CODE_ADDRESS_NOT_REGISTERED, {MEFA_READ, 0, us, segment, us, UINT64_MAX / 2, 1}},
    };
    const size_t before = tasks_now();
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        /* Alone; and with good ones around it, of which none is started either. */
        for (size_t place = 0; place < 4; place++) {
            mefa_request list[3] = {good, good, good};
            list[place % 3] = bad[i].request;
            int got = mefa_submit(transport, batch, list, place == 3 ? 1 : 3, 0);
            if (place == 3) list[0] = bad[i].request, got = mefa_submit(transport, batch, list, 1, 0);
            if (got != bad[i].code)
                complain(__LINE__, "request %zu at %zu gives %d, not %d", i, place, got, bad[i].code);
            CHECK(mefa_last_error()[0] != '\0');
            CHECK_EQ(tasks_now(), before);
        }
    }
    INVALID(mefa_submit(transport, batch, NULL, 1, 0));
    INVALID(mefa_submit(transport, batch, &good, SIZE_MAX, 0));
    INVALID(mefa_submit(transport, batch, &good, SIZE_MAX / sizeof good, 0));
    CHECK_OK(mefa_submit(transport, batch, NULL, 0, 0));
    CHECK_OK(mefa_submit(transport, batch, &good, 0, 0));
    CHECK_EQ(tasks_now(), before);
    mefa_request list[9] = {good, good, good, good, good, good, good, good, good};
    FAILS(MEFA_CODE_TOO_MANY_REQUESTS, mefa_submit(transport, batch, list, 9, 0));
    CHECK_EQ(tasks_now(), before);

    /* Nothing was written, and nothing is in use. */
    unsigned char zeros[64] = {0};
    CHECK_EQ(memcmp(ours + 4096, zeros, sizeof zeros), 0);
    int32_t status = -1, quiet = -1;
    CHECK_OK(mefa_batch_status(transport, batch, &status, NULL));
    CHECK_EQ(status, MEFA_STATUS_COMPLETED);
    CHECK_OK(mefa_batch_quiet(transport, batch, &quiet));
    CHECK_EQ(quiet, 1);
}

static void asking(void) {
    static const size_t tasks[] = {0, 1, 7, 8, UINT32_MAX, (size_t)UINT32_MAX + 1, SIZE_MAX};
    mefa_task_state state = {77, 77, 77};
    int32_t status = 77;
    size_t count = 77;
    for (size_t i = 0; i < sizeof tasks / sizeof *tasks; i++) {
        INVALID(mefa_task_status(transport, batch, tasks[i], &state));
        INVALID(mefa_task_error(transport, batch, tasks[i], never_text, NULL));
    }
    INVALID(mefa_task_status(transport, batch, 0, NULL));
    INVALID(mefa_task_error(transport, batch, 0, NULL, NULL));
    INVALID(mefa_batch_status(transport, batch, NULL, &count));
    INVALID(mefa_wait(transport, batch, 0, NULL));
    INVALID(mefa_batch_quiet(transport, batch, NULL));
    CHECK(state.status == 77 && count == 77);
    /* An empty batch has nothing to wait for. */
    CHECK_OK(mefa_wait(transport, batch, 0, &status));
    CHECK_EQ(status, MEFA_STATUS_COMPLETED);
    CHECK_OK(mefa_wait_quiet(transport, batch, 0));
    CHECK_OK(mefa_wait_quiet(transport, batch, UINT64_MAX));
    CHECK_OK(mefa_cancel(transport, batch));
    CHECK_OK(mefa_batch_status(transport, batch, &status, NULL));
    CHECK_EQ(status, MEFA_STATUS_COMPLETED);

    struct {
        mefa_nic_stats stats;
        unsigned char tail[64];
    } longer;
    size_t nics = 0;
    INVALID(mefa_nic_count(transport, NULL));
    CHECK_OK(mefa_nic_count(transport, &nics));
    CHECK(nics >= 1);
    static const size_t sizes[] = {0, 1, 8, 12, sizeof(mefa_nic_stats) - 1};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        memset(&longer, 0xa5, sizeof longer);
        longer.stats.size = sizes[i];
        INVALID(mefa_stats(transport, 0, &longer.stats));
        CHECK_EQ(longer.stats.posted, UINT64_C(0xa5a5a5a5a5a5a5a5));
    }
    longer.stats.size = sizeof longer.stats;
    INVALID(mefa_stats(transport, 0, NULL));
    INVALID(mefa_stats(transport, nics, &longer.stats));
    INVALID(mefa_stats(transport, SIZE_MAX, &longer.stats));
    CHECK_EQ(longer.stats.posted, UINT64_C(0xa5a5a5a5a5a5a5a5));
    /* Older and newer headers: never past the size that the caller gave, nor past what we know. */
    longer.stats.size = 16;
    CHECK_OK(mefa_stats(transport, 0, &longer.stats));
    CHECK_EQ(longer.stats.size, 16);
    CHECK_EQ(longer.stats.posted, 0);
    CHECK_EQ(longer.stats.completed, UINT64_C(0xa5a5a5a5a5a5a5a5));
    longer.stats.size = sizeof longer;
    CHECK_OK(mefa_stats(transport, 0, &longer.stats));
    CHECK_EQ(longer.stats.size, sizeof longer.stats);
    CHECK_EQ(longer.tail[0], 0xa5);
}

int main(int argument_count, char **arguments) {
    if (argument_count > 1) provider = arguments[1];
    check_start(110);
    /* Before there is any transport, and the first slot is not in use. */
    INVALID(mefa_uninstall(0));
    INVALID(mefa_uninstall(UINT64_C(1) << 32));
    transport = check_install(provider, "here:1");
    memory = map_memory(4 * MIB);
    ours = memory + MIB;
    CHECK_OK(mefa_register(transport, ours, MIB, NULL, NULL, NULL));
    CHECK_OK(mefa_descriptor_json(transport, keep_text, &descriptor));
    CHECK_OK(mefa_segment_open_json(transport, descriptor.text, &segment));
    CHECK_OK(mefa_batch_allocate(transport, 8, &batch));
    CHECK(segment != 0 && batch != 0);

    static const uint64_t handles[] = {0, 1, UINT64_MAX, NO_HANDLE, UINT64_C(1) << 32, UINT64_C(0xffffffff), INT64_MAX};
    for (size_t i = 0; i < sizeof handles / sizeof *handles; i++) {
        if (handles[i] != transport) unknown_transport(handles[i]);
        if (handles[i] != segment) unknown_segment(handles[i]);
        if (handles[i] != batch) unknown_batch(handles[i]);
    }
    for (int bit = 0; bit < 64; bit++) {
        unknown_transport(transport ^ UINT64_C(1) << bit);
        unknown_segment(segment ^ UINT64_C(1) << bit);
        unknown_batch(batch ^ UINT64_C(1) << bit);
    }
    installing();
    registering();
    describing();
    opening();
    allocating();
    submitting();
    asking();

    CHECK_OK(mefa_log_to(NULL, NULL));
    CHECK_OK(mefa_batch_free(transport, batch));
    INVALID(mefa_batch_free(transport, batch));
    CHECK_OK(mefa_segment_close(transport, segment));
    CHECK_OK(mefa_unregister(transport, ours));
    FAILS(MEFA_CODE_ADDRESS_NOT_REGISTERED, mefa_unregister(transport, ours));
    /* What still exists is gone with the transport. */
    mefa_batch left = 0;
    CHECK_OK(mefa_batch_allocate(transport, 1, &left));
    CHECK_OK(mefa_segment_open_json(transport, descriptor.text, &segment));
    CHECK_OK(mefa_register(transport, ours, MIB, NULL, NULL, NULL));
    CHECK_OK(mefa_uninstall(transport));
    INVALID(mefa_uninstall(transport));
    batch = left;
    unknown_transport(transport);
    free(descriptor.text);
    munmap(memory, 4 * MIB);
    return complaints > 0;
}
