/* golden.c - see golden.h. */
#include "tests/lib/golden.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "proto/base/assert.h"

bool golden_open(const char *folder, struct golden *golden)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/golden.safetensors", folder);
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    struct stat info;
    ASSERT(!fstat(fd, &info));
    golden->size = (size_t)info.st_size;
    golden->map = mmap(NULL, golden->size, PROT_READ, MAP_PRIVATE, fd, 0);
    ASSERT(golden->map != MAP_FAILED);
    close(fd);
    struct error err;
    ASSERT(!safetensors_parse(golden->map, golden->size, golden->size, &golden->header, &err));
    return true;
}

void golden_close(struct golden *golden)
{
    safetensors_close(&golden->header);
    munmap(golden->map, golden->size);
}

static const void *values(const struct golden *golden, const char *name,
                          enum safetensors_dtype dtype, size_t element, size_t *count)
{
    const struct safetensors_entry *entry = safetensors_find(&golden->header, name);
    if (!entry)
        return NULL;
    ASSERT(entry->dtype == dtype);
    if (count)
        *count = entry->size / element;
    return (const char *)golden->map + entry->offset;
}

const float *golden_floats(const struct golden *golden, const char *name, size_t *count)
{
    return values(golden, name, SAFETENSORS_F32, 4, count);
}

const int64_t *golden_integers(const struct golden *golden, const char *name, size_t *count)
{
    return values(golden, name, SAFETENSORS_I64, 8, count);
}

const char *golden_shared(const char *name)
{
    static char path[4096];
    const char *root = getenv("RAMBAD_SHARED");
    snprintf(path, sizeof path, "%s/%s", root ? root : "../shared", name);
    return path;
}
