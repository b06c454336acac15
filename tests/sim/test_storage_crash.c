/* What a power cut or a failing disk leaves of a store.
 *
 * Crash images: a run is recorded, every write and sync of the data file (tests/lib/preload). Then
 * the file is rebuilt as it could be after a cut at any point: what was synced is there, of the
 * rest any part may be lost or torn at a sector's border. Each image must open, check without a
 * fault, and hold exactly what was acknowledged by then, or one operation more.
 *
 * Faults: the same run again and again, in each another call fails: ENOSPC, EIO, a short write,
 * once or from there on. Whatever the run says, what it acknowledged is there afterwards. The same
 * for a store that is brought to our format, and for one that is repaired.
 *
 * RAMBAD_LONG=1 takes every cut point several times and every fault; RAMBAD_SEED repeats a run. */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>
#include <lmdb.h>

#include "proto/base/hash.h"
#include "tests/lib/preload/io_shim.h"
#include "tests/lib/store_past.h"

#define MEMORIES 4
#define OPERATIONS 120
#define FAULT_OPERATIONS 24
#define SECTOR 512
#define IMAGE_MAX (64u << 20)
#define UNSURE UINT64_MAX
#define LOST 7 /* exit code of a run that lost something */

static const struct io_shim *shim;
static uint64_t seed;
static bool is_long;

static uint64_t draw(uint64_t *random, uint64_t below)
{
    *random = hash64(random, sizeof *random, 17);
    return *random % below;
}

/* ---- a store as it should be after so many operations ---- */

struct world {
    struct store_past pasts[MEMORIES]; /* id "" for none */
    uint64_t before[MEMORIES]; /* the turn before the last, whose snapshot is kept; 0: not known */
    bool has_ephemeral;
    struct store_past ephemeral; /* a fork on its way to settle in `settles` */
    unsigned settles;
};

static enum status go_on(struct storage *storage, struct store_past *past, uint64_t count,
                         uint64_t stream, bool goes_on)
{
    for (uint64_t i = 0; i < count; i++)
        past->tokens[past->count + i] = store_token(stream, past->count + i);
    past->count += count;
    past->is_turn[past->count] = true;
    return storage ? store_past_try_commit(storage, past, past->id, past->count, goes_on)
                   : STATUS_OK;
}

/* One operation is one write of storage, so a crash leaves it done or not done. Applies it to the
 * world, and to the store unless that is NULL. */
static enum status operate(struct world *world, struct storage *storage, unsigned number)
{
    uint64_t random = seed + number;
    unsigned m = (unsigned)draw(&random, MEMORIES);
    uint64_t what = draw(&random, 100), count = 1 + draw(&random, 90);
    struct store_past *past = &world->pasts[m];
    enum status status = STATUS_OK;
    if (world->has_ephemeral && what < 60) {
        struct store_past *to = &world->pasts[world->settles];
        status = storage ? store_replace(storage, "e", to->id) : STATUS_OK;
        char id[LIMITS_ID_BYTES];
        memcpy(id, to->id, sizeof id);
        *to = world->ephemeral;
        memcpy(to->id, id, sizeof id);
        to->is_turn[to->count] = true;
        /* Its last turn may have lost its snapshot to later ones, before it was gone back to. */
        world->before[world->settles] = UNSURE;
        world->has_ephemeral = false;
    } else if (!past->id[0]) {
        *past = (struct store_past){0};
        snprintf(past->id, sizeof past->id, "m%u", m);
        world->before[m] = 0;
        status = storage ? store_create(storage, past->id, NULL) : STATUS_OK;
    } else if (what < 70 || world->has_ephemeral || past->count == 0) {
        if (past->count + count > STORE_PAST_TOKENS)
            count = STORE_PAST_TOKENS - past->count;
        if (what >= 15)
            world->before[m] = world->before[m] == UNSURE ? 0 : past->count;
        status = go_on(storage, past, count, draw(&random, UINT64_MAX), what < 15);
    } else if (what < 90) {
        uint64_t before = world->before[m], at = before && before != UNSURE ? before : past->count;
        world->ephemeral = *past;
        strcpy(world->ephemeral.id, "e");
        world->ephemeral.count = at;
        world->has_ephemeral = true;
        world->settles = m;
        status = storage ? store_fork_at(storage, "e", past->id, at, true) : STATUS_OK;
    } else {
        status = storage ? store_remove(storage, past->id) : STATUS_OK;
        past->id[0] = 0;
    }
    return status;
}

/* Whether the store is this world, as far as its list says. */
static bool is_world(struct storage *storage, const struct world *world)
{
    for (unsigned m = 0; m < MEMORIES; m++) {
        char id[LIMITS_ID_BYTES];
        struct storage_memory memory;
        snprintf(id, sizeof id, "m%u", m);
        enum status status = storage_memory_get(storage, id, &memory);
        bool exists = world->pasts[m].id[0] != 0;
        if ((status == STATUS_OK) != exists)
            return false;
        if (exists)
            storage_memory_close(&memory);
        if (exists && memory.token_count != world->pasts[m].count)
            return false;
    }
    return true;
}

/* The store at `path` must be the world after `acknowledged` operations, or after one more. */
static bool verify(const char *path, unsigned acknowledged)
{
    struct world *world = calloc(1, sizeof *world);
    struct storage *storage = store_past_open(path);
    bool found = false;
    for (unsigned i = 0; i < acknowledged; i++)
        (void)!operate(world, NULL, i);
    for (unsigned more = 0; more < 2 && !found; more++) {
        if (more)
            (void)!operate(world, NULL, acknowledged);
        found = is_world(storage, world);
    }
    if (found)
        for (unsigned m = 0; m < MEMORIES; m++)
            if (world->pasts[m].id[0])
                store_past_assert(storage, &world->pasts[m]);
    storage_close(storage);
    free(world);
    store_past_check(path);
    return found;
}

/* ---- crash images ---- */

struct trace {
    unsigned char *bytes;
    size_t size;
};

static struct trace record_run(const char *path)
{
    char name[1100];
    struct stat stat_;
    struct world *world = calloc(1, sizeof *world);
    snprintf(name, sizeof name, "%s.trace", path);
    int fd = open(name, O_RDWR | O_CREAT | O_TRUNC, 0600);
    assert_true(fd >= 0);
    shim->record(fd);
    struct storage *storage = store_past_open(path);
    shim->mark(0);
    for (unsigned i = 0; i < OPERATIONS; i++) {
        assert_int_equal(operate(world, storage, i), STATUS_OK);
        shim->mark(i + 1);
    }
    storage_close(storage);
    shim->record(-1);
    assert_int_equal(fstat(fd, &stat_), 0);
    struct trace trace = {malloc((size_t)stat_.st_size), (size_t)stat_.st_size};
    assert_int_equal(pread(fd, trace.bytes, trace.size, 0), trace.size);
    close(fd);
    unlink(name);
    free(world);
    return trace;
}

struct image {
    unsigned char *bytes;
    size_t size;
};

static void apply(struct image *image, const struct io_shim_entry *entry,
                  const unsigned char *bytes, uint64_t *random)
{
    uint64_t how = random ? draw(random, 10) : 9;
    assert_true(entry->offset + entry->size <= IMAGE_MAX);
    if (how < 4)
        return; /* lost */
    for (uint64_t at = 0; at < entry->size;) {
        uint64_t n = SECTOR - (entry->offset + at) % SECTOR;
        n = n < entry->size - at ? n : entry->size - at;
        if (how >= 7 || draw(random, 2) == 0) {
            memcpy(image->bytes + entry->offset + at, bytes + at, n);
            if (entry->offset + at + n > image->size)
                image->size = (size_t)(entry->offset + at + n);
        }
        at += n;
    }
}

static void write_image(const char *path, const struct image *image)
{
    char name[1100];
    mkdir(path, 0700);
    snprintf(name, sizeof name, "%s/data.mdb", path);
    int fd = open(name, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, image->bytes, image->size), image->size);
    close(fd);
}

/* The image after the first `end` bytes of the trace; returns the operations acknowledged. -1: no
 * store was there yet. */
static long rebuild(const struct trace *trace, size_t end, uint64_t *random, struct image *image)
{
    long acknowledged = -1;
    size_t pending = 0; /* where the first write since the last sync stands */
    memset(image->bytes, 0, image->size);
    image->size = 0;
    for (size_t at = 0; at < end;) {
        struct io_shim_entry entry;
        memcpy(&entry, trace->bytes + at, sizeof entry);
        const unsigned char *bytes = trace->bytes + at + sizeof entry;
        at += sizeof entry + entry.size;
        if (entry.kind == IO_SHIM_MARK)
            acknowledged = (long)entry.offset;
        else if (entry.kind == IO_SHIM_WRITE_SYNCED)
            apply(image, &entry, bytes, at >= end ? random : NULL); /* the cut is inside it */
        if (entry.kind != IO_SHIM_SYNC)
            continue;
        for (size_t back = pending; back < at;) {
            memcpy(&entry, trace->bytes + back, sizeof entry);
            if (entry.kind == IO_SHIM_WRITE)
                apply(image, &entry, trace->bytes + back + sizeof entry, NULL);
            back += sizeof entry + entry.size;
        }
        pending = at;
    }
    for (size_t back = pending; back < end;) {
        struct io_shim_entry entry;
        memcpy(&entry, trace->bytes + back, sizeof entry);
        if (entry.kind == IO_SHIM_WRITE)
            apply(image, &entry, trace->bytes + back + sizeof entry, random);
        back += sizeof entry + entry.size;
    }
    return acknowledged;
}

static void test_images(void **state)
{
    char path[1024];
    size_t *ends = malloc((1u << 20) * sizeof *ends), count = 0, tried = 0, skipped = 0;
    struct image image = {calloc(1, IMAGE_MAX), 0};
    uint64_t random = seed ^ 0x5555;
    snprintf(path, sizeof path, "%s/run", (const char *)*state);
    struct trace trace = record_run(path);
    for (size_t at = 0; at < trace.size && count < (1u << 20);) {
        struct io_shim_entry entry;
        memcpy(&entry, trace.bytes + at, sizeof entry);
        at += sizeof entry + entry.size;
        ends[count++] = at;
    }
    const size_t wanted = is_long ? 4 * count : 1500;
    snprintf(path, sizeof path, "%s/image", (const char *)*state);
    for (size_t i = 0; i < wanted; i++) {
        size_t cut = is_long ? i % count : draw(&random, count);
        long acknowledged = rebuild(&trace, ends[cut], &random, &image);
        if (acknowledged < 0) {
            skipped++; /* the store was being made: there is nothing to lose yet */
            continue;
        }
        write_image(path, &image);
        if (!verify(path, (unsigned)acknowledged))
            fail_msg("cut %zu of %zu: %ld operations were acknowledged, and are not there", cut,
                     count, acknowledged);
        tried++;
    }
    print_message("%zu images of %zu cut points (%zu before the store was there), %u operations, "
                  "%zu bytes of trace\n",
                  tried, count, skipped, OPERATIONS, trace.size);
    assert_true(tried > wanted / 2);
    free(trace.bytes);
    free(image.bytes);
    free(ends);
}

/* ---- faults ---- */

/* In a process of its own: an operation that fails is tried once more, for the fault may be over;
 * when it fails again that is the end. Writes down how many are acknowledged. */
static void faulty_run(const char *path, int report)
{
    struct world *world = calloc(1, sizeof *world), *before = calloc(1, sizeof *before);
    struct storage_options options = store_past_options(path);
    struct storage *storage;
    struct error err = {0};
    if (storage_open(&options, &storage, &err) != STATUS_OK)
        _exit(err.message[0] ? 0 : LOST);
    for (uint32_t i = 0, done; i < FAULT_OPERATIONS; i++) {
        *before = *world;
        enum status status = operate(world, storage, i);
        if (status == STATUS_DISK_FULL || status == STATUS_IO) {
            *world = *before;
            for (unsigned m = 0; m < MEMORIES; m++)
                if (world->pasts[m].id[0])
                    (void)!store_truncate(storage, world->pasts[m].id);
            status = operate(world, storage, i);
        }
        if (status == STATUS_DISK_FULL || status == STATUS_IO)
            break;
        done = i + 1;
        /* Past the shim, whose faults are for the store alone. */
        if (status != STATUS_OK || syscall(SYS_pwrite64, report, &done, sizeof done, 0L) < 0)
            _exit(LOST);
    }
    storage_close(storage);
    _exit(0);
}

static const int crashes[] = {SIGSEGV, SIGBUS, SIGABRT, SIGFPE, SIGILL}; /* cmocka catches them */

struct fault {
    int error;
    enum io_shim_fault kind;
    int stays;
};
static const struct fault fault_kinds[] = {{ENOSPC, IO_SHIM_ERROR, 0},
                                           {EIO, IO_SHIM_ERROR, 0},
                                           {EIO, IO_SHIM_SHORT, 0},
                                           {ENOSPC, IO_SHIM_ERROR, 1},
                                           {EIO, IO_SHIM_ERROR, 1}};
#define FAULT_KINDS (sizeof fault_kinds / sizeof *fault_kinds)

/* Runs `run` on the store at `path` in a process of its own, in which call `at` fails. It ends by
 * itself, or (a commit half written) with a message; it does not crash. Returns what it wrote down
 * in its report, 0 for nothing. */
static uint32_t run_with_fault(const char *folder, const char *path, long at,
                               const struct fault *fault, void (*run)(const char *path, int report))
{
    char name[1024];
    uint32_t told = 0;
    int how;
    snprintf(name, sizeof name, "%s/report", folder);
    int report = open(name, O_RDWR | O_CREAT | O_TRUNC, 0600);
    assert_true(report >= 0);
    fflush(NULL);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        int null = open("/dev/null", O_WRONLY);
        dup2(null, STDERR_FILENO); /* a log line for every fault */
        /* A crash or a failed assertion is the end of this process, for the other one to tell. */
        for (size_t i = 0; i < sizeof crashes / sizeof *crashes; i++)
            signal(crashes[i], SIG_DFL);
        shim->break_at(at, fault->error, fault->kind, fault->stays);
        run(path, report);
        _exit(LOST);
    }
    assert_int_equal(waitpid(pid, &how, 0), pid);
    (void)!pread(report, &told, sizeof told, 0);
    close(report);
    if (!WIFEXITED(how) || (WEXITSTATUS(how) != 0 && WEXITSTATUS(how) != 1))
        fail_msg("fault at call %ld (%s, %s): the run ended with %s %d", at, strerror(fault->error),
                 fault->stays ? "stays" : "once", WIFEXITED(how) ? "code" : "signal",
                 WIFEXITED(how) ? WEXITSTATUS(how) : WTERMSIG(how));
    return told;
}

static bool one_fault(const char *folder, long at, const struct fault *fault)
{
    char path[1024], name[1024];
    snprintf(path, sizeof path, "%s/faults", folder);
    const uint32_t acknowledged = run_with_fault(folder, path, at, fault, faulty_run);
    if (!verify(path, acknowledged))
        fail_msg("fault at call %ld (%s, %s): %u operations were acknowledged, and are not there",
                 at, strerror(fault->error), fault->stays ? "stays" : "once", acknowledged);
    snprintf(name, sizeof name, "%.900s/data.mdb", path);
    unlink(name);
    return acknowledged == FAULT_OPERATIONS;
}

static void test_faults(void **state)
{
    unsigned count = 0;
    for (size_t k = 0; k < FAULT_KINDS; k++) {
        /* To the first call that the run no longer makes: then it goes through whole, several times
         * in a row, as a fault that is got over (a reserve that cannot be made) does too. */
        unsigned whole = 0;
        const long step = is_long ? 1 : 3;
        for (long at = (long)(seed % (uint64_t)step); whole < 12; at += step, count++)
            whole = one_fault(*state, at, &fault_kinds[k]) ? whole + 1 : 0;
    }
    print_message("%u runs with a fault\n", count);
}

/* ---- faults of a migration and of a repair ---- */

static void copy_file(const char *from, const char *to)
{
    char command[2300];
    snprintf(command, sizeof command, "cp %s %s", from, to);
    assert_int_equal(system(command), 0);
}

/* So many calls there were: the fault came, unless it was to be at a later one. A run that ends
 * before it can say so has met it. */
static void tell_calls(int report)
{
    const char *name;
    const uint32_t calls = (uint32_t)shim->calls(&name);
    if (syscall(SYS_pwrite64, report, &calls, sizeof calls, 0L) < 0)
        _exit(LOST);
}

static void migrate(const char *path, int report)
{
    struct storage_options options = store_past_options(path);
    struct storage *storage;
    struct error err = {0};
    const enum status status = storage_open(&options, &storage, &err);
    tell_calls(report);
    if (!status)
        storage_close(storage);
    _exit(!status || err.message[0] ? 0 : LOST);
}

static void repair(const char *path, int report)
{
    struct error err = {0};
    uint64_t changes;
    const enum status status = storage_repair(path, true, NULL, NULL, &changes, &err);
    tell_calls(report);
    _exit(!status || err.message[0] ? 0 : LOST);
}

/* A store of the first format, with a memory of 100 tokens and a fork of it of 130. Whatever fails
 * on the way to our format, it is of one of the two afterwards, and whole. */
static void test_migration_faults(void **state)
{
    char path[1024], data[1100];
    struct store_past *past = calloc(1, sizeof *past);
    unsigned count = 0;
    for (uint64_t i = 0; i < 130; i++)
        past->tokens[i] = store_token(1, i);
    past->is_turn[100] = past->is_turn[130] = true;
    past->unmarked = 130;
    snprintf(path, sizeof path, "%s/old", (const char *)*state);
    snprintf(data, sizeof data, "%s/data.mdb", path);
    assert_int_equal(mkdir(path, 0700), 0);
    for (size_t k = 0; k < FAULT_KINDS; k++)
        for (long at = 0, calls = 0; !calls || calls > at - 1; at++, count++) {
            copy_file("tests/golden/store-format-1/data.mdb", data);
            calls = run_with_fault(*state, path, at, &fault_kinds[k], migrate);
            struct storage *storage = store_past_open(path);
            strcpy(past->id, "old");
            past->count = 100;
            store_past_assert(storage, past);
            strcpy(past->id, "old fork");
            past->count = 130;
            store_past_assert(storage, past);
            storage_close(storage);
            store_past_check(path);
        }
    print_message("%u migrations with a fault\n", count);
    assert_true(count > 50);
    free(past);
}

/* One byte of the newest turn's snapshot is wrong: the memory can go back to the turn before. */
static void damage(const char *path)
{
    MDB_env *env;
    MDB_txn *txn;
    MDB_dbi dbi;
    MDB_cursor *cursor;
    MDB_val key, value;
    assert_int_equal(mdb_env_create(&env), 0);
    assert_int_equal(mdb_env_set_maxdbs(env, 32), 0);
    assert_int_equal(mdb_env_open(env, path, 0, 0600), 0);
    assert_int_equal(mdb_txn_begin(env, NULL, 0, &txn), 0);
    assert_int_equal(mdb_dbi_open(txn, "snapshot", 0, &dbi), 0);
    assert_int_equal(mdb_cursor_open(txn, dbi, &cursor), 0);
    assert_int_equal(mdb_cursor_get(cursor, &key, &value, MDB_LAST), 0);
    unsigned char *bytes = malloc(value.mv_size);
    memcpy(bytes, value.mv_data, value.mv_size);
    bytes[value.mv_size / 2] ^= 4;
    value.mv_data = bytes;
    assert_int_equal(mdb_cursor_put(cursor, &key, &value, MDB_CURRENT), 0);
    mdb_cursor_close(cursor);
    assert_int_equal(mdb_txn_commit(txn), 0);
    mdb_env_close(env);
    free(bytes);
}

/* Whatever fails of a repair, another one makes the store whole, and no less of it is left. */
static void test_repair_faults(void **state)
{
    char path[1024], data[1100], kept[1100];
    struct store_past *past = calloc(1, sizeof *past);
    unsigned count = 0;
    snprintf(path, sizeof path, "%s/damaged", (const char *)*state);
    snprintf(data, sizeof data, "%s/data.mdb", path);
    snprintf(kept, sizeof kept, "%s/kept", (const char *)*state);
    struct storage *storage = store_past_open(path);
    strcpy(past->id, "a");
    assert_int_equal(store_create(storage, "a", NULL), STATUS_OK);
    store_past_write(storage, past, 50, 1, false);
    struct store_past *longer = malloc(sizeof *longer);
    *longer = *past;
    store_past_write(storage, longer, 30, 1, false);
    storage_close(storage);
    damage(path);
    copy_file(data, kept);
    for (size_t k = 0; k < FAULT_KINDS; k++)
        for (long at = 0, calls = 0; !calls || calls > at - 1; at++, count++) {
            struct error err = {0};
            uint64_t changes;
            copy_file(kept, data);
            calls = run_with_fault(*state, path, at, &fault_kinds[k], repair);
            if (storage_repair(path, true, NULL, NULL, &changes, &err))
                fail_msg("fault at call %ld, then repaired again: %s", at, err.message);
            store_past_check(path);
            storage = store_past_open(path);
            store_past_assert(storage, past);
            storage_close(storage);
        }
    print_message("%u repairs with a fault\n", count);
    assert_true(count > 20);
    free(past);
    free(longer);
}

/* ---- a folder that cannot be written ---- */

static void test_read_only_folder(void **state)
{
    char path[1024];
    snprintf(path, sizeof path, "%s/locked", (const char *)*state);
    struct storage *made = store_past_open(path);
    storage_close(made);
    assert_int_equal(chmod(*state, 0755), 0);
    assert_int_equal(chmod(path, 0555), 0);
    fflush(NULL);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        struct storage *storage;
        struct error err = {0};
        struct storage_options options = store_past_options(path);
        if (geteuid() == 0 && setuid(65534)) /* root may write everywhere */
            _exit(2);
        enum status status = storage_open(&options, &storage, &err);
        _exit(status == STATUS_IO && strstr(err.message, path) &&
                      strstr(err.message, "Permission denied")
                  ? 0
                  : 1);
    }
    int how;
    assert_int_equal(waitpid(pid, &how, 0), pid);
    assert_true(WIFEXITED(how));
    assert_int_equal(WEXITSTATUS(how), 0);
    assert_int_equal(chmod(path, 0755), 0);
}

int main(int argc, char **argv)
{
    const char *library = getenv("IO_SHIM"), *given = getenv("RAMBAD_SEED");
    (void)argc;
    shim = dlsym(RTLD_DEFAULT, IO_SHIM_SYMBOL);
    if (!shim) {
        if (!library || getenv("LD_PRELOAD") || access(library, R_OK)) {
            fprintf(stderr, "IO_SHIM must name the library to preload\n");
            return 1;
        }
        setenv("LD_PRELOAD", library, 1);
        execv(argv[0], argv);
        return 1;
    }
    unsetenv("LD_PRELOAD");
    /* No disk is needed for what does not lose its power. */
    if (!getenv("TMPDIR") && access("/dev/shm", W_OK) == 0)
        setenv("TMPDIR", "/dev/shm", 1);
    is_long = getenv("RAMBAD_LONG") != NULL;
    if (given)
        seed = strtoull(given, NULL, 10);
    else if (getrandom(&seed, sizeof seed, 0) != sizeof seed)
        return 1;
    print_message("RAMBAD_SEED=%llu\n", (unsigned long long)seed);
    const struct CMUnitTest tests[] = {
        STORE_TEST(test_images),           STORE_TEST(test_faults),
        STORE_TEST(test_migration_faults), STORE_TEST(test_repair_faults),
        STORE_TEST(test_read_only_folder),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
