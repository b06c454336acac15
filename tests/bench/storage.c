/* What storage costs at the shape of the 370M model: ingest against a plain synced write of the
 * same size, bytes on disk a token, what is written for a byte that is kept, a turn's commit, a
 * fork, and taking up a long memory again, cold and warm.
 *
 *   bench_storage FOLDER [TOKENS]
 *
 * FOLDER is made and must not exist. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "proto/base/assert.h"
#include "tests/lib/store_helper.h"

#define S 64u
#define KV (16u << 10)
#define LANDMARK (2u << 10)
#define RAW_PER_TOKEN ((double)(KV + LANDMARK) / S + 4)
#define BLOCK_CHUNKS 64u            /* of one commit: 4,096 tokens, 16 KiB of English text */
#define SNAPSHOT ((size_t)49 << 20) /* fp32 state, conv tails, logits */
#define PICKS 8u
#define TURNS 8u
#define FORKS 1000u

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* Bytes this process has written to files. What the kernel says of the disk itself counts the
 * file system's own pages as well, as it pleases. */
static double written(void)
{
    char line[128];
    double bytes = 0;
    FILE *file = fopen("/proc/self/io", "re");
    while (file && fgets(line, sizeof line, file))
        if (strncmp(line, "wchar:", 6) == 0)
            bytes = strtod(line + 6, NULL);
    if (file)
        fclose(file);
    return bytes;
}

static struct storage *open_at(const char *path)
{
    const struct storage_options options = {.path = path,
                                            .kv_bytes = KV,
                                            .landmark_bytes = LANDMARK,
                                            .chunk_tokens = S,
                                            .model_fingerprint = 1,
                                            .model_name = "bench"};
    struct storage *storage;
    struct error err = {0};
    if (storage_open(&options, &storage, &err)) {
        fprintf(stderr, "%s\n", err.message);
        exit(1);
    }
    return storage;
}

/* Bytes a second of writes of `block` bytes, each on the disk before the next. */
static double plain_rate(const char *folder, const unsigned char *bytes, size_t block, double total)
{
    char path[1024];
    snprintf(path, sizeof path, "%s.plain", folder);
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_DSYNC, 0600);
    ASSERT(fd >= 0);
    double began = now(), done = 0;
    for (; done < total; done += (double)block)
        ASSERT(write(fd, bytes, block) == (ssize_t)block);
    double seconds = now() - began;
    close(fd);
    unlink(path);
    return done / seconds;
}

static void queue_commit(struct storage *storage, uint64_t position, uint64_t count,
                         const int32_t *tokens, const void *snapshot, size_t size,
                         struct store_wait *wait)
{
    const struct storage_commit turn = {.id = "m",
                                        .position = position,
                                        .tokens = tokens,
                                        .token_count = (size_t)count,
                                        .text_bytes = position * 4,
                                        .snapshot = snapshot,
                                        .snapshot_bytes = size,
                                        .goes_on = true};
    store_wait_init(wait);
    ASSERT(storage_commit(storage, &turn, store_wait_cb, wait) == STATUS_OK);
}

static void finish(struct store_wait *wait)
{
    ASSERT(store_wait_finish(wait, STATUS_OK) == STATUS_OK);
}

static void append(struct storage *storage, uint64_t branch, uint64_t first, uint64_t count,
                   const unsigned char *bytes)
{
    for (uint64_t i = 0; i < count; i++)
        ASSERT(storage_append(storage, branch, first + i, bytes + i * 8, bytes + i * 16, NULL,
                              NULL) == STATUS_OK);
}

static void drop_cache(const char *folder)
{
    char path[1024];
    snprintf(path, sizeof path, "%s/data.mdb", folder);
    int fd = open(path, O_RDONLY);
    ASSERT(fd >= 0 && fdatasync(fd) == 0);
    ASSERT(posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED) == 0);
    close(fd);
}

static void resume(const char *folder, const char *how, uint64_t tokens)
{
    double t0 = now();
    struct storage *storage = open_at(folder);
    struct storage_range *ranges;
    size_t count, size;
    void *snapshot;
    uint64_t position, chunks = tokens / S;
    double t1 = now();
    ASSERT(storage_lineage(storage, "m", &ranges, &count) == STATUS_OK);
    ASSERT(storage_snapshot(storage, "m", &snapshot, &size, &position) == STATUS_OK);
    double t2 = now();
    char *landmarks = malloc(chunks * LANDMARK), *kv = malloc((size_t)PICKS * KV);
    ASSERT(landmarks && kv);
    ASSERT(storage_read_landmarks(storage, ranges[0].branch, 0, chunks, landmarks) == STATUS_OK);
    double t3 = now();
    struct storage_read reads[PICKS];
    for (unsigned i = 0; i < PICKS; i++)
        reads[i] = (struct storage_read){ranges[0].branch, (i * 7919u + 13u) % chunks,
                                         kv + (size_t)i * KV};
    ASSERT(storage_read_chunks(storage, reads, PICKS) == STATUS_OK);
    double t4 = now();
    printf("resume, %s: %.1f ms: open %.1f, snapshot of %.0f MiB %.1f, landmarks of %.0f MiB %.1f, "
           "%u picks %.2f\n",
           how, (t4 - t0) * 1e3, (t1 - t0) * 1e3, (double)size / 1048576, (t2 - t1) * 1e3,
           (double)(chunks * LANDMARK) / 1048576, (t3 - t2) * 1e3, PICKS, (t4 - t3) * 1e3);
    free(ranges);
    free(snapshot);
    free(landmarks);
    free(kv);
    storage_close(storage);
}

int main(int argc, char **argv)
{
    const uint64_t tokens = (argc > 2 ? strtoull(argv[2], NULL, 10) : 1u << 20) /
                            (BLOCK_CHUNKS * S) * (BLOCK_CHUNKS * S);
    const size_t block = BLOCK_CHUNKS * (KV + LANDMARK + S * 4);
    if (argc < 2 || !tokens || mkdir(argv[1], 0700)) {
        fprintf(stderr, "bench_storage FOLDER [TOKENS]: FOLDER is made and must not exist\n");
        return 2;
    }
    unsigned char *bytes = malloc(SNAPSHOT);
    int32_t *ids = calloc(BLOCK_CHUNKS * S, sizeof *ids);
    ASSERT(bytes && ids);
    store_fill(bytes, SNAPSHOT, 1, 1);

    /* Ingest: a small snapshot, so that it is the chunks that are measured. The plain writes come
     * before and after, for a disk's pace changes. */
    const double total = (double)tokens * RAW_PER_TOKEN;
    double plain = plain_rate(argv[1], bytes, block, total / 2);
    struct storage *storage = open_at(argv[1]);
    ASSERT(store_create(storage, "m", NULL) == STATUS_OK);
    struct storage_memory memory;
    ASSERT(storage_memory_get(storage, "m", &memory) == STATUS_OK);
    storage_memory_close(&memory);
    struct store_wait waits[LIMITS_APPEND_BLOCKS_WAITING]; /* in flight, as of an append */
    double io = written(), began = now();
    for (uint64_t p = 0; p < tokens; p += BLOCK_CHUNKS * S) {
        struct store_wait *wait = &waits[p / (BLOCK_CHUNKS * S) % LIMITS_APPEND_BLOCKS_WAITING];
        if (p >= LIMITS_APPEND_BLOCKS_WAITING * BLOCK_CHUNKS * S)
            finish(wait);
        append(storage, memory.branch, p / S, BLOCK_CHUNKS, bytes);
        queue_commit(storage, p + BLOCK_CHUNKS * S, BLOCK_CHUNKS * S, ids, bytes, 4096, wait);
    }
    for (unsigned i = 0; i < LIMITS_APPEND_BLOCKS_WAITING; i++)
        finish(&waits[i]);
    double rate = total / (now() - began);
    io = written() - io;
    plain = (plain + plain_rate(argv[1], bytes, block, total / 2)) / 2;
    struct storage_stats stats;
    storage_get_stats(storage, &stats);
    printf("%llu tokens, commits of %zu KiB, %u in flight\n", (unsigned long long)tokens,
           block >> 10, LIMITS_APPEND_BLOCKS_WAITING);
    printf("ingest: %.0f MB/s, %.0f%% of %.0f MB/s that plain synced writes make; %.2f bytes "
           "written for each kept\n",
           rate * 1e-6, rate / plain * 100, plain * 1e-6, io / total);
    printf("on disk: %.1f bytes a token, %.1f%% above the %.1f of K, V, landmark and id\n",
           (double)stats.map_used_bytes / (double)tokens,
           ((double)stats.map_used_bytes / (double)tokens / RAW_PER_TOKEN - 1) * 100,
           RAW_PER_TOKEN);

    /* Turns: a chunk of text each, and the whole snapshot. */
    uint64_t position = tokens;
    io = written();
    began = now();
    for (unsigned i = 0; i < TURNS; i++, position += S) {
        append(storage, memory.branch, position / S, 1, bytes);
        queue_commit(storage, position + S, S, ids, bytes, SNAPSHOT, &waits[0]);
        finish(&waits[0]);
    }
    printf("a turn: %.1f ms to commit, %.1f MiB written for a snapshot of %.0f MiB\n",
           (now() - began) / TURNS * 1e3, (written() - io) / TURNS / 1048576,
           (double)SNAPSHOT / 1048576);
    /* Forks share all but their own few records. */
    storage_get_stats(storage, &stats);
    const uint64_t used = stats.map_used_bytes;
    began = now();
    for (unsigned i = 0; i < FORKS; i++) {
        char id[16];
        snprintf(id, sizeof id, "f%u", i);
        ASSERT(store_create(storage, id, "m") == STATUS_OK);
    }
    double seconds = now() - began;
    storage_get_stats(storage, &stats);
    printf("a fork: %.2f ms, %.0f bytes, of %u\n", seconds / FORKS * 1e3,
           (double)(stats.map_used_bytes - used) / FORKS, FORKS);
    storage_close(storage);

    drop_cache(argv[1]);
    resume(argv[1], "cold", tokens);
    resume(argv[1], "warm", tokens);
    char *path = strdup(argv[1]);
    ASSERT(path);
    store_helper_remove(path);
    free(bytes);
    free(ids);
    return 0;
}
