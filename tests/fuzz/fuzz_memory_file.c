/* Manifests and part headers of exported memories: whatever the bytes, they are refused or read,
 * and what was read is written again as it was. The first byte says which of the two follows. */
#include <stdlib.h>
#include <string.h>

#include "proto/base/assert.h"
#include "proto/memory_file.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void try_manifest(const char *json, size_t size)
{
    struct memory_file_manifest manifest, again;
    struct error err = {0};
    struct buf first, second;
    const enum status status = memory_file_read_manifest(json, size, &manifest, &err);
    if (status) {
        ASSERT(err.message[0] && !manifest.metadata);
        return;
    }
    for (char *c = manifest.model; *c; c++) /* bytes that are no UTF-8 would not come back */
        *c = *c & 0x80 ? '?' : *c;
    buf_init(&first);
    buf_init(&second);
    ASSERT(memory_file_batch(&manifest) >= 1);
    memory_file_write_manifest(&first, &manifest);
    ASSERT(!memory_file_read_manifest(first.data, first.size, &again, &err));
    memory_file_write_manifest(&second, &again);
    ASSERT(first.size == second.size && memcmp(first.data, second.data, first.size) == 0);
    memory_file_manifest_close(&manifest);
    memory_file_manifest_close(&again);
    buf_close(&first);
    buf_close(&second);
}

static void try_header(const unsigned char *bytes, size_t size)
{
    struct memory_file_part part;
    unsigned char again[MEMORY_FILE_HEADER_BYTES];
    char name[96];
    if (size < MEMORY_FILE_HEADER_BYTES || memory_file_read_header(bytes, &part))
        return;
    memory_file_name_part(&part, name, sizeof name);
    ASSERT(strncmp(name, "part ", 5) == 0);
    /* Of the payload there is what is there. */
    const unsigned char *payload = bytes + MEMORY_FILE_HEADER_BYTES;
    part.bytes = size - MEMORY_FILE_HEADER_BYTES;
    memory_file_write_header(again, &part, payload, 5);
    ASSERT(!memory_file_read_header(again, &part));
    ASSERT(!memory_file_check_part(&part, payload, 5));
    ASSERT(memory_file_check_part(&part, payload, 6));
    part.first ^= 1;
    ASSERT(memory_file_check_part(&part, payload, 5));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (!size)
        return 0;
    if (data[0] & 1)
        try_header(data + 1, size - 1);
    else
        try_manifest((const char *)data + 1, size - 1);
    return 0;
}
