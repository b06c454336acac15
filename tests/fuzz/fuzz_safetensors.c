/* fuzz_safetensors.c - any bytes as the head of a safetensors file, and as a checkpoint's index.
 *
 * Input: two bytes, how much longer the file is than its header (the tensors' bytes are never
 * read), then the JSON. The harness writes the header's size before it, unless the second byte's
 * high bit asks for the input to be the whole file. */
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "proto/base/assert.h"
#include "proto/safetensors.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define ABSENT "no tensor has this name" /* unless the fuzzer finds that one */

static const uint64_t dtype_sizes[] = {
    [SAFETENSORS_BF16] = 2, [SAFETENSORS_F16] = 2, [SAFETENSORS_F32] = 4,
    [SAFETENSORS_F64] = 8,  [SAFETENSORS_I32] = 4, [SAFETENSORS_I64] = 8};

static void check_entry(const struct safetensors *s, size_t i, uint64_t file_size)
{
    const struct safetensors_entry *e = &s->entries[i];
    ASSERT(e->rank <= SAFETENSORS_RANK_MAX && e->dtype <= SAFETENSORS_OTHER);
    ASSERT(e->offset >= 8 && e->offset <= file_size && e->size <= file_size - e->offset);
    if (e->dtype != SAFETENSORS_OTHER) {
        unsigned __int128 bytes = dtype_sizes[e->dtype];
        for (uint32_t k = 0; k < e->rank; k++)
            bytes *= e->shape[k]; /* below 2^64 where all are: zero or checked */
        ASSERT(bytes == e->size);
    }
    ASSERT(safetensors_find(s, e->name) == e);
    if (i)
        ASSERT(strcmp(s->entries[i - 1].name, e->name) < 0);
    for (size_t k = 0; k < i; k++) {
        const struct safetensors_entry *other = &s->entries[k];
        ASSERT(!e->size || !other->size || e->offset + e->size <= other->offset ||
               other->offset + other->size <= e->offset);
    }
}

static void parse_header(const char *file, size_t available, uint64_t file_size)
{
    struct safetensors s;
    struct error err = {0};
    const enum status status = safetensors_parse(file, available, file_size, &s, &err);
    ASSERT(status == STATUS_OK || status == STATUS_INVALID);
    ASSERT((status != STATUS_OK) == (err.message[0] != 0));
    for (size_t i = 0; i < s.count; i++)
        check_entry(&s, i, file_size);
    bool has = false;
    for (size_t i = 0; i < s.count; i++)
        has |= strcmp(s.entries[i].name, ABSENT) == 0;
    ASSERT((safetensors_find(&s, ABSENT) != NULL) == has);
    safetensors_close(&s);
}

static void parse_index(const char *json, size_t size)
{
    char **files;
    size_t count;
    struct error err = {0};
    const enum status status = safetensors_parse_index(json, size, &files, &count, &err);
    ASSERT(status == STATUS_OK || status == STATUS_INVALID);
    ASSERT((status == STATUS_OK) == (count > 0) && (status == STATUS_OK) == !err.message[0]);
    for (size_t i = 0; i < count; i++) {
        ASSERT(files[i][0] && !strchr(files[i], '/'));
        if (i)
            ASSERT(strcmp(files[i - 1], files[i]) < 0);
    }
    for (size_t i = 0; i < count; i++)
        free(files[i]);
    free(files);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 2)
        return 0;
    const uint64_t beyond = data[0] | (uint64_t)(data[1] & 0x7f) << 8;
    const bool whole = data[1] & 0x80;
    data += 2;
    size -= 2;
    const size_t before = whole ? 0 : 8;
    char *file = malloc(size + before + 1);
    ASSERT(file);
    for (size_t i = 0; i < before; i++)
        file[i] = (char)(size >> (8 * i));
    if (size)
        memcpy(file + before, data, size);
    file = realloc(file, size + before ? size + before : 1); /* reading past the end is seen */
    ASSERT(file);
    parse_header(file, size + before, size + before + beyond);
    parse_index(file + before, size);
    free(file);
    return 0;
}
