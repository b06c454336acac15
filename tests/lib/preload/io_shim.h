/* io_shim.h - a library to preload (LD_PRELOAD) that records what a store writes and syncs, and
 * lets its calls fail.
 * Thread: any; calls on files of a store are taken one at a time.
 * Owns nothing. Only files below a folder whose path holds IO_SHIM_FOLDER are looked at.
 *
 * A process that is not the test's own is told through the file that IO_SHIM_CONTROL names: while its
 * first letter is f (full) writes and syncs fail with ENOSPC, b (broken) with EIO, s (stalled) they
 * wait. */
#ifndef TESTS_LIB_PRELOAD_IO_SHIM_H
#define TESTS_LIB_PRELOAD_IO_SHIM_H

#include <stdint.h>

#define IO_SHIM_FOLDER "/rambad-store-"

enum io_shim_kind {
    IO_SHIM_WRITE = 1,
    IO_SHIM_WRITE_SYNCED, /* through a descriptor of O_DSYNC: durable when the call returns */
    IO_SHIM_SYNC,
    IO_SHIM_MARK /* `offset` is what was marked */
};

/* One entry of the trace, `size` bytes behind it. Of data.mdb alone. */
struct io_shim_entry {
    uint32_t kind, size;
    uint64_t offset;
};

enum io_shim_fault { IO_SHIM_ERROR, IO_SHIM_SHORT };

struct io_shim {
    /* From now on to this descriptor; -1: nowhere. */
    void (*record)(int fd);
    void (*mark)(uint64_t value);
    /* Call number `at` from here on fails with `error`, or writes half; every later one too when
     * `stays`. Under 0: none. */
    void (*break_at)(long at, int error, enum io_shim_fault fault, int stays);
    /* Calls since the last `break_at`, and the name of the last one. */
    long (*calls)(const char **name);
};

/* The symbol to look up with dlsym. */
#define IO_SHIM_SYMBOL "io_shim_table"

#endif
