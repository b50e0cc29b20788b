/* A CUDA driver that knows one range of "device memory": what libmooncake_efa asks of the real one. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int cuPointerGetAttribute(void *data, unsigned attribute, uint64_t pointer);

int cuPointerGetAttribute(void *data, unsigned attribute, uint64_t pointer)
{
    /* DEVICE_RANGE=start-end[m], m for managed. */
    const char *range = getenv("DEVICE_RANGE");
    char *rest;
    uint64_t start = range ? strtoull(range, &rest, 16) : 0;
    uint64_t end = start ? strtoull(rest + 1, &rest, 16) : 0;
    if (!start || pointer < start || pointer >= end)
        return 1; /* CUDA_ERROR_INVALID_VALUE: not a pointer of CUDA's */
    switch (attribute) {
    case 2: /* memory type: device */
        memcpy(data, &(unsigned){2}, sizeof(unsigned));
        return 0;
    case 8: /* is managed */
        memcpy(data, &(unsigned char){*rest == 'm'}, 1);
        return 0;
    case 9: /* device ordinal */
        memcpy(data, &(int){3}, sizeof(int));
        return 0;
    default:
        return 1;
    }
}
