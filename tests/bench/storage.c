/* What storage costs at the shape of the 370M model: ingest against plain synced writes of the same
 * size, bytes on disk a token, what is written for a byte that is kept, a turn's commit, a fork,
 * and taking up a memory again, cold and warm, when it is a quarter as long and when it is whole.
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
#include <unistd.h>

#include "proto/base/assert.h"
#include "tests/lib/daemon.h"
#include "tests/lib/store_helper.h"

#define S 64u
#define KV (16u << 10)
#define LANDMARK (2u << 10)
#define RAW_PER_TOKEN ((double)(KV + LANDMARK) / S + 4)
#define BLOCK_CHUNKS 64u /* of one commit: 4,096 tokens, 16 KiB of English text */
#define SNAPSHOT \
    ((size_t)24 << 20) /* of a turn's end: state in 15 bits a number, half a chunk, logits */
#define ROUND 16u      /* commits between two looks at what the disk gives */
#define PICKS 8u
#define TURNS 8u
#define FORKS 1000u
#define RESUMES 7u

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
    return store_open(&options);
}

/* Seconds that so many writes of `block` bytes take, each on the disk before the next. */
static double plain_writes(const char *folder, const unsigned char *bytes, size_t block,
                           unsigned count)
{
    char path[1024];
    snprintf(path, sizeof path, "%s.plain", folder);
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_DSYNC, 0600);
    ASSERT(fd >= 0);
    const double began = daemon_now();
    for (unsigned i = 0; i < count; i++)
        ASSERT(write(fd, bytes, block) == (ssize_t)block);
    const double seconds = daemon_now() - began;
    close(fd);
    unlink(path);
    return seconds;
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

struct ingest {
    struct storage *storage;
    uint64_t branch, position;
    const unsigned char *bytes;
    const int32_t *ids;
};

/* Seconds for so many commits of a block each, `in_flight` of them at a time. The snapshot is
 * small, so that it is the chunks that are measured. */
static double ingest(struct ingest *run, unsigned count, unsigned in_flight)
{
    struct store_wait waits[LIMITS_APPEND_BLOCKS_WAITING];
    const double began = daemon_now();
    for (unsigned i = 0; i < count + in_flight; i++) {
        struct store_wait *wait = &waits[i % in_flight];
        if (i >= in_flight)
            finish(wait);
        if (i >= count)
            continue;
        append(run->storage, run->branch, run->position / S, BLOCK_CHUNKS, run->bytes);
        run->position += BLOCK_CHUNKS * S;
        queue_commit(run->storage, run->position, BLOCK_CHUNKS * S, run->ids, run->bytes, 4096,
                     wait);
    }
    return daemon_now() - began;
}

/* Rounds of plain writes and of commits by turns, for a disk's pace changes. */
static void compare(struct ingest *run, const char *folder, uint64_t tokens)
{
    static const unsigned in_flight[] = {1, LIMITS_APPEND_BLOCKS_WAITING};
    const size_t block = BLOCK_CHUNKS * (KV + LANDMARK + S * 4);
    double plain[2] = {0}, ours[2] = {0}, wrote = 0;
    unsigned rounds = 0;
    for (; rounds % 2 || run->position < tokens; rounds++) {
        const unsigned way = rounds % 2;
        plain[way] += plain_writes(folder, run->bytes, block, ROUND / 2);
        const double io = written();
        ours[way] += ingest(run, ROUND, in_flight[way]);
        wrote += written() - io;
        plain[way] += plain_writes(folder, run->bytes, block, ROUND / 2);
    }
    const double kept = (double)rounds * ROUND * (double)block;
    for (unsigned way = 0; way < 2; way++)
        printf("ingest, %u commits of %zu KiB in flight: %.0f MB/s, %.0f%% of the %.0f that plain "
               "synced writes make\n",
               in_flight[way], block >> 10, kept / 2 / ours[way] * 1e-6,
               plain[way] / ours[way] * 100, kept / 2 / plain[way] * 1e-6);
    printf("written for each byte kept: %.2f\n", wrote / kept);
}

/* Seconds of taking a memory up: opening, snapshot, landmarks, what the first token reads. */
struct resumed {
    double open, snapshot, landmarks, picks, all;
};

static struct resumed resume(const char *folder, uint64_t chunks)
{
    const double t0 = daemon_now();
    struct storage *storage = open_at(folder);
    struct storage_range *ranges;
    size_t count, size;
    void *snapshot;
    uint64_t position;
    const double t1 = daemon_now();
    ASSERT(storage_lineage(storage, "m", &ranges, &count) == STATUS_OK);
    ASSERT(storage_snapshot(storage, "m", &snapshot, &size, &position) == STATUS_OK);
    const double t2 = daemon_now();
    char *landmarks = malloc(chunks * LANDMARK), *kv = malloc((size_t)PICKS * KV);
    ASSERT(landmarks && kv);
    ASSERT(storage_read_landmarks(storage, ranges[0].branch, 0, chunks, landmarks) == STATUS_OK);
    const double t3 = daemon_now();
    struct storage_read reads[PICKS];
    for (unsigned i = 0; i < PICKS; i++)
        reads[i] = (struct storage_read){ranges[0].branch, (i * 7919u + 13u) % chunks,
                                         kv + (size_t)i * KV};
    ASSERT(storage_read_chunks(storage, reads, PICKS) == STATUS_OK);
    const double t4 = daemon_now();
    free(ranges);
    free(snapshot);
    free(landmarks);
    free(kv);
    storage_close(storage);
    return (struct resumed){t1 - t0, t2 - t1, t3 - t2, t4 - t3, t4 - t0};
}

static void print_resume(const char *how, const struct resumed *r, uint64_t chunks)
{
    printf("resume of %llu chunks, %s: %.1f ms: open %.1f, snapshot %.1f, landmarks of %.0f MiB "
           "%.1f, %u picks %.2f\n",
           (unsigned long long)chunks, how, r->all * 1e3, r->open * 1e3, r->snapshot * 1e3,
           (double)(chunks * LANDMARK) / 1048576, r->landmarks * 1e3, PICKS, r->picks * 1e3);
}

/* Cold once; warm the best of some, for others use the machine too. */
static void resumes(const char *folder, uint64_t tokens)
{
    const uint64_t chunks = tokens / S;
    store_drop_cache(folder);
    const struct resumed cold = resume(folder, chunks);
    struct resumed warm = resume(folder, chunks);
    for (unsigned i = 1; i < RESUMES; i++) {
        const struct resumed again = resume(folder, chunks);
        warm = again.all < warm.all ? again : warm;
    }
    print_resume("cold", &cold, chunks);
    print_resume("warm", &warm, chunks);
}

/* Turns of a chunk of text each, with a whole snapshot. */
static void turns(struct ingest *run)
{
    const double io = written(), began = daemon_now();
    for (unsigned i = 0; i < TURNS; i++) {
        struct store_wait wait;
        append(run->storage, run->branch, run->position / S, 1, run->bytes);
        run->position += S;
        queue_commit(run->storage, run->position, S, run->ids, run->bytes, SNAPSHOT, &wait);
        finish(&wait);
    }
    printf("a turn: %.1f ms to commit, %.1f MiB written for a snapshot of %.0f MiB\n",
           (daemon_now() - began) / TURNS * 1e3, (written() - io) / TURNS / 1048576,
           (double)SNAPSHOT / 1048576);
}

/* Forks share all but their own few records. */
static void forks(struct storage *storage)
{
    struct storage_stats stats;
    storage_get_stats(storage, &stats);
    const uint64_t used = stats.map_used_bytes;
    const double began = daemon_now();
    for (unsigned i = 0; i < FORKS; i++) {
        char id[16];
        snprintf(id, sizeof id, "f%u", i);
        ASSERT(store_create(storage, id, "m") == STATUS_OK);
    }
    const double seconds = daemon_now() - began;
    storage_get_stats(storage, &stats);
    printf("a fork: %.2f ms, %.0f bytes, of %u\n", seconds / FORKS * 1e3,
           (double)(stats.map_used_bytes - used) / FORKS, FORKS);
}

int main(int argc, char **argv)
{
    const uint64_t tokens = argc > 2 ? strtoull(argv[2], NULL, 10) : 1u << 20;
    if (argc < 2 || tokens < 8 * ROUND * BLOCK_CHUNKS * S || mkdir(argv[1], 0700)) {
        fprintf(stderr,
                "bench_storage FOLDER [TOKENS]: FOLDER is made and must not exist; at least %u "
                "tokens\n",
                8 * ROUND * BLOCK_CHUNKS * S);
        return 2;
    }
    unsigned char *bytes = malloc(SNAPSHOT);
    int32_t *ids = calloc(BLOCK_CHUNKS * S, sizeof *ids);
    ASSERT(bytes && ids);
    store_fill(bytes, SNAPSHOT, 1, 1);
    struct ingest run = {.storage = open_at(argv[1]), .bytes = bytes, .ids = ids};
    struct storage_memory memory;
    ASSERT(store_create(run.storage, "m", NULL) == STATUS_OK);
    ASSERT(storage_memory_get(run.storage, "m", &memory) == STATUS_OK);
    storage_memory_close(&memory);
    run.branch = memory.branch;
    compare(&run, argv[1], tokens / 4);
    struct storage_stats stats;
    storage_get_stats(run.storage, &stats);
    const double each = (double)stats.map_used_bytes / (double)run.position;
    printf("on disk: %.1f bytes a token, %.1f%% above the %.1f of K, V, landmark and id\n", each,
           (each / RAW_PER_TOKEN - 1) * 100, RAW_PER_TOKEN);
    turns(&run);
    storage_close(run.storage);
    resumes(argv[1], run.position);

    run.storage = open_at(argv[1]);
    compare(&run, argv[1], tokens);
    turns(&run);
    forks(run.storage);
    storage_close(run.storage);
    resumes(argv[1], run.position);
    char *path = strdup(argv[1]);
    ASSERT(path);
    store_helper_remove(path);
    free(bytes);
    free(ids);
    return 0;
}
