#include "tests/lib/preload/io_shim.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int trace_fd = -1;
static long fail_at = -1, call_count;
static int fail_error, fail_stays;
static enum io_shim_fault fail_fault;
static const char *last_name = "none";

/* Whether the descriptor is of a store; `*data` when it is the one with the data. */
static bool is_store(int fd, bool *data)
{
    char link[64], path[1024];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size <= 0)
        return false;
    path[size] = 0;
    const char *slash = strrchr(path, '/');
    *data = slash && strcmp(slash, "/data.mdb") == 0;
    return strstr(path, IO_SHIM_FOLDER) != NULL;
}

/* What the file of IO_SHIM_CONTROL says now; a call that stalls waits here until it says something
 * else. Under the lock. */
static bool is_told_to_fail(void)
{
    const char *path = getenv("IO_SHIM_CONTROL");
    for (char word = 's'; path && word == 's';) {
        int fd = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || syscall(SYS_read, fd, &word, 1) != 1)
            word = 0;
        if (fd >= 0)
            syscall(SYS_close, fd); /* as it was opened: ThreadSanitizer sees both or none */
        if (word == 's')
            usleep(2000);
        if (word == 'f' || word == 'b') {
            fail_error = word == 'f' ? ENOSPC : EIO;
            fail_fault = IO_SHIM_ERROR;
            return true;
        }
    }
    return false;
}

/* Counts a call; whether it is to fail. Under the lock. */
static bool is_fault(const char *name)
{
    long number = call_count++;
    last_name = name;
    return fail_at >= 0 && (number == fail_at || (fail_stays && number > fail_at));
}

static void put(const void *bytes, size_t size)
{
    const char *from = bytes;
    while (size > 0) {
        ssize_t done = syscall(SYS_write, trace_fd, from, size);
        if (done <= 0)
            _exit(99); /* a trace with a hole is worth nothing */
        from += done;
        size -= (size_t)done;
    }
}

static void record(enum io_shim_kind kind, uint64_t offset, const struct iovec *parts, int count,
                   size_t size)
{
    struct io_shim_entry entry = {(uint32_t)kind, (uint32_t)size, offset};
    if (trace_fd < 0)
        return;
    put(&entry, sizeof entry);
    for (int i = 0; i < count && size > 0; i++) {
        size_t n = parts[i].iov_len < size ? parts[i].iov_len : size;
        put(parts[i].iov_base, n);
        size -= n;
    }
}

/* All ways of writing lead here. */
static ssize_t write_at(const char *name, int fd, const struct iovec *parts, int count,
                        off_t offset, bool moves)
{
    bool data = false;
    struct iovec half;
    if (!is_store(fd, &data))
        return moves ? syscall(SYS_writev, fd, parts, count)
                     : syscall(SYS_pwritev, fd, parts, count, offset, 0);
    pthread_mutex_lock(&lock);
    ssize_t done;
    if (moves)
        offset = lseek(fd, 0, SEEK_CUR);
    bool fault = is_told_to_fail() || is_fault(name);
    if (fault && fail_fault == IO_SHIM_SHORT) {
        half = (struct iovec){parts[0].iov_base, parts[0].iov_len / 2};
        parts = &half;
        count = 1;
    }
    if (fault && fail_fault == IO_SHIM_ERROR) {
        errno = fail_error;
        done = -1;
    } else if (moves) {
        done = syscall(SYS_writev, fd, parts, count);
    } else {
        done = syscall(SYS_pwritev, fd, parts, count, offset, 0);
    }
    int error = errno;
    if (done > 0 && data)
        record((fcntl(fd, F_GETFL) & O_DSYNC) ? IO_SHIM_WRITE_SYNCED : IO_SHIM_WRITE,
               (uint64_t)offset, parts, count, (size_t)done);
    pthread_mutex_unlock(&lock);
    errno = error;
    return done;
}

ssize_t pwrite(int fd, const void *bytes, size_t size, off_t offset)
{
    struct iovec part = {(void *)(uintptr_t)bytes, size};
    return write_at("pwrite", fd, &part, 1, offset, false);
}

ssize_t pwrite64(int fd, const void *bytes, size_t size, off_t offset)
{
    return pwrite(fd, bytes, size, offset);
}

ssize_t write(int fd, const void *bytes, size_t size)
{
    struct iovec part = {(void *)(uintptr_t)bytes, size};
    return write_at("write", fd, &part, 1, 0, true);
}

ssize_t writev(int fd, const struct iovec *parts, int count)
{
    return write_at("writev", fd, parts, count, 0, true);
}

ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t offset)
{
    return write_at("pwritev", fd, parts, count, offset, false);
}

/* A short read is one half of what was asked for. */
static ssize_t read_at(const char *name, int fd, void *bytes, size_t size, off_t offset, bool moves)
{
    bool data = false, fault = false;
    if (is_store(fd, &data)) {
        pthread_mutex_lock(&lock);
        fault = is_fault(name);
        pthread_mutex_unlock(&lock);
    }
    if (fault && fail_fault == IO_SHIM_ERROR) {
        errno = fail_error;
        return -1;
    }
    size = fault ? size / 2 : size;
    return moves ? syscall(SYS_read, fd, bytes, size)
                 : syscall(SYS_pread64, fd, bytes, size, offset);
}

ssize_t read(int fd, void *bytes, size_t size)
{
    return read_at("read", fd, bytes, size, 0, true);
}

ssize_t pread(int fd, void *bytes, size_t size, off_t offset)
{
    return read_at("pread", fd, bytes, size, offset, false);
}

ssize_t pread64(int fd, void *bytes, size_t size, off_t offset)
{
    return pread(fd, bytes, size, offset);
}

static int sync_with(const char *name, long number, int fd)
{
    bool data = false;
    int result, error;
    if (!is_store(fd, &data))
        return (int)syscall(number, fd);
    pthread_mutex_lock(&lock);
    if (is_told_to_fail() || is_fault(name)) {
        errno = fail_fault == IO_SHIM_SHORT ? EIO : fail_error;
        result = -1;
    } else {
        result = (int)syscall(number, fd);
    }
    error = errno;
    if (result == 0 && data)
        record(IO_SHIM_SYNC, 0, NULL, 0, 0);
    pthread_mutex_unlock(&lock);
    errno = error;
    return result;
}

int fdatasync(int fd)
{
    return sync_with("fdatasync", SYS_fdatasync, fd);
}

int fsync(int fd)
{
    return sync_with("fsync", SYS_fsync, fd);
}

static int refuse(const char *name, int fd)
{
    bool data, fault = false;
    if (is_store(fd, &data)) {
        pthread_mutex_lock(&lock);
        fault = is_fault(name);
        pthread_mutex_unlock(&lock);
    }
    return fault ? (fail_fault == IO_SHIM_SHORT ? EIO : fail_error) : 0;
}

int flock(int fd, int operation)
{
    int error = refuse("flock", fd);
    if (!error)
        return (int)syscall(SYS_flock, fd, operation);
    errno = error;
    return -1;
}

void *mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset)
{
    int error = fd < 0 ? 0 : refuse("mmap", fd);
    if (!error)
        return (void *)syscall(SYS_mmap, at, size, protection, flags, fd, offset);
    errno = error;
    return MAP_FAILED;
}

void *mmap64(void *at, size_t size, int protection, int flags, int fd, off_t offset)
{
    return mmap(at, size, protection, flags, fd, offset);
}

int ftruncate(int fd, off_t size)
{
    int error = refuse("ftruncate", fd);
    if (!error)
        return (int)syscall(SYS_ftruncate, fd, size);
    errno = error;
    return -1;
}

int ftruncate64(int fd, off_t size)
{
    return ftruncate(fd, size);
}

int posix_fallocate(int fd, off_t offset, off_t size)
{
    int error = refuse("posix_fallocate", fd);
    if (error)
        return error;
    return syscall(SYS_fallocate, fd, 0, offset, size) ? errno : 0;
}

int posix_fallocate64(int fd, off_t offset, off_t size)
{
    return posix_fallocate(fd, offset, size);
}

/* The same for calls that take a path. */
static bool refuse_path(const char *name, const char *path)
{
    bool fault = false;
    if (strstr(path, IO_SHIM_FOLDER)) {
        pthread_mutex_lock(&lock);
        fault = is_fault(name);
        if (fault)
            errno = fail_fault == IO_SHIM_SHORT ? EIO : fail_error;
        pthread_mutex_unlock(&lock);
    }
    return fault;
}

int open(const char *path, int flags, ...)
{
    va_list rest;
    va_start(rest, flags);
    const mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    return refuse_path("open", path) ? -1 : (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}

int open64(const char *path, int flags, ...)
{
    va_list rest;
    va_start(rest, flags);
    const mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    return open(path, flags, mode);
}

int rename(const char *from, const char *to)
{
    return refuse_path("rename", to) ? -1 : (int)syscall(SYS_rename, from, to);
}

int mkdir(const char *path, mode_t mode)
{
    return refuse_path("mkdir", path) ? -1 : (int)syscall(SYS_mkdir, path, mode);
}

int unlink(const char *path)
{
    return refuse_path("unlink", path) ? -1 : (int)syscall(SYS_unlink, path);
}

/* ---- the table ---- */

static void set_record(int fd)
{
    pthread_mutex_lock(&lock);
    trace_fd = fd;
    pthread_mutex_unlock(&lock);
}

static void set_mark(uint64_t value)
{
    pthread_mutex_lock(&lock);
    record(IO_SHIM_MARK, value, NULL, 0, 0);
    pthread_mutex_unlock(&lock);
}

static void set_fail(long at, int error, enum io_shim_fault fault, int stays)
{
    pthread_mutex_lock(&lock);
    fail_at = at;
    fail_error = error;
    fail_fault = fault;
    fail_stays = stays;
    call_count = 0;
    pthread_mutex_unlock(&lock);
}

static long get_calls(const char **name)
{
    pthread_mutex_lock(&lock);
    long count = call_count;
    *name = last_name;
    pthread_mutex_unlock(&lock);
    return count;
}

extern const struct io_shim io_shim_table;
const struct io_shim io_shim_table = {set_record, set_mark, set_fail, get_calls};
