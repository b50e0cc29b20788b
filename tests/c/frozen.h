/* SPDX-License-Identifier: Apache-2.0
 *
 * What a binary interface promises, checked when a test is compiled. */
#ifndef MEFA_TEST_FROZEN_H
#define MEFA_TEST_FROZEN_H

#include <stddef.h>

#define FIELD(type, field, offset) _Static_assert(offsetof(type, field) == (offset), #type "." #field)
#define SIZE(type, size) _Static_assert(sizeof(type) == (size), #type)
#define NUMBER(name, number) _Static_assert((name) == (number), #name)

#endif
