/* golden.h - golden vectors: a folder's golden.safetensors, mapped.
 * Thread: the test's. Owns the mapping. */
#ifndef TESTS_LIB_GOLDEN_H
#define TESTS_LIB_GOLDEN_H

#include <stdbool.h>

#include "proto/safetensors.h"

struct golden {
    void *map;
    size_t size;
    struct safetensors header;
};

/* False when the file is not there; any other failure ends the test. */
bool golden_open(const char *folder, struct golden *golden);
void golden_close(struct golden *golden);
/* The values of one tensor; NULL when it is missing. */
const float *golden_floats(const struct golden *golden, const char *name, size_t *count);
const int64_t *golden_integers(const struct golden *golden, const char *name, size_t *count);

/* FOLDER/NAME of the published data: $RAMBAD_SHARED, by default ../shared. */
const char *golden_shared(const char *name);

#endif
