/* safetensors.h - the header of a safetensors file and the index of a sharded checkpoint.
 * Thread: any (pure functions). Owns what the structs hold, until their close.
 * Format: 8 bytes little-endian header size, a JSON header, the tensors' bytes. */
#ifndef PROTO_SAFETENSORS_H
#define PROTO_SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>

#include "proto/status.h"

#define SAFETENSORS_RANK_MAX 8
#define SAFETENSORS_HEADER_MAX ((size_t)64 << 20)

enum safetensors_dtype {
    SAFETENSORS_BF16,
    SAFETENSORS_F16,
    SAFETENSORS_F32,
    SAFETENSORS_F64,
    SAFETENSORS_I32,
    SAFETENSORS_I64,
    SAFETENSORS_OTHER /* known to others, not to us; its size is not checked */
};

struct safetensors_entry {
    char *name;
    enum safetensors_dtype dtype;
    char dtype_name[16];
    uint32_t rank;
    uint64_t shape[SAFETENSORS_RANK_MAX];
    uint64_t offset, size; /* bytes, from the start of the file */
};

struct safetensors {
    struct safetensors_entry *entries; /* sorted by name */
    size_t count;
};

/* `file` (borrowed) begins the file; `available` bytes of it are readable and must cover the
 * header; `file_size` is the whole. Every extent lies in the file, matches its shape, and overlaps
 * no other. STATUS_INVALID, STATUS_NO_MEMORY. */
STATUS_CHECKED enum status safetensors_parse(const void *file, size_t available, uint64_t file_size,
                                             struct safetensors *out, struct error *err);
void safetensors_close(struct safetensors *safetensors);
/* NULL when there is none of that name. */
const struct safetensors_entry *safetensors_find(const struct safetensors *safetensors,
                                                 const char *name);

/* The distinct file names of a model.safetensors.index.json, sorted; plain names without a slash.
 * Free each and the array. STATUS_INVALID, STATUS_NO_MEMORY. */
STATUS_CHECKED enum status safetensors_parse_index(const char *json, size_t size, char ***files,
                                                   size_t *count, struct error *err);

#endif
