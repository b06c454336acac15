/* alloc_shim.c - preloaded into the daemon: counts what it allocates, into the shared file that
 * ALLOC_COUNT_FILE names, as one 64-bit number. */
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

/* glibc's own, behind the names that are taken here. */
extern void *__libc_malloc(size_t size);
extern void *__libc_calloc(size_t count, size_t size);
extern void *__libc_realloc(void *old, size_t size);
extern void *__libc_memalign(size_t alignment, size_t size);

/* A sanitizer's runtime, which comes first, has a malloc of its own, and calls what is told it
 * here. */
extern int __sanitizer_install_malloc_and_free_hooks(void (*on_malloc)(const volatile void *at,
                                                                       size_t size),
                                                     void (*on_free)(const volatile void *at))
    __attribute__((weak));

static atomic_ullong early;
static atomic_ullong *counter = &early;

static void on_malloc(const volatile void *at, size_t size)
{
    (void)at, (void)size;
    atomic_fetch_add(counter, 1);
}

static void on_free(const volatile void *at)
{
    (void)at;
}

__attribute__((constructor)) static void open_counter(void)
{
    const char *path = getenv("ALLOC_COUNT_FILE");
    const int fd = path ? open(path, O_RDWR) : -1;
    if (fd < 0)
        return;
    void *shared = mmap(NULL, sizeof *counter, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (shared != MAP_FAILED)
        counter = shared;
    if (__sanitizer_install_malloc_and_free_hooks)
        __sanitizer_install_malloc_and_free_hooks(on_malloc, on_free);
}

void *malloc(size_t size)
{
    atomic_fetch_add(counter, 1);
    return __libc_malloc(size);
}

void *calloc(size_t count, size_t size)
{
    atomic_fetch_add(counter, 1);
    return __libc_calloc(count, size);
}

void *realloc(void *old, size_t size)
{
    atomic_fetch_add(counter, 1);
    return __libc_realloc(old, size);
}

void *aligned_alloc(size_t alignment, size_t size)
{
    atomic_fetch_add(counter, 1);
    return __libc_memalign(alignment, size);
}

int posix_memalign(void **out, size_t alignment, size_t size)
{
    atomic_fetch_add(counter, 1);
    *out = __libc_memalign(alignment, size);
    return *out ? 0 : 12; /* ENOMEM */
}
