/* Where the pages are that tokens read, on text, with room for few of them: on the device already,
 * there because what the token before read was brought ahead, in the host's memory, or on the disk.
 * And that none of this changes a bit of the output.
 *
 *   bench_pages BOOK... [--model DIR] [--backend cpu|cuda] [--tokens N] [--read N] [--steps N]
 *               [--turns N] [--room N,N,...]
 *
 * The books, one after another, are one memory: its first --tokens are read with room for all,
 * once. Then, from there and for each room, forks of it, --turns of them, read --read tokens more
 * in slices and --steps one by one, each of other text and by turns: one alone (the default) finds
 * what its last token read where it was, so that nothing need come ahead; of several each has lost
 * its pages to the others where room is short. A room is so many times the pages that a token reads
 * (or the least that the engine takes), on the device, with all pages in the host's memory, and
 * again in both. Prints a line for each and for either way to read, and whether all logits were the
 * same; exits with 1 when they were not, with 77 without the backend. The disk is RAM here
 * (tests/lib/chunk_ram.h): what misses there cost is not told. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "engine/engine_private.h"
#include "proto/base/assert.h"
#include "proto/base/buf.h"
#include "proto/base/hash.h"
#include "tests/lib/chunk_ram.h"

#define SLICE 512
#define ROOMS_MAX 16
#define TURNS_MAX 64
#define AMPLE ((size_t)32 << 30) /* of host memory, taken as it is needed */

static const char *model = "engine/models/ramba-20m";
static enum engine_backend backend = ENGINE_BACKEND_CPU;
static size_t tokens = 65536, reads = 4096, steps = 512, turns = 1;
static size_t rooms[ROOMS_MAX] = {2, 4, 16, 64}, room_count = 4;

/* The memory, and where it stands when its first tokens are read. */
struct past {
    struct chunk_ram ram;
    struct tokenizer_tokens ids;
    void *snapshot;
    size_t snapshot_bytes, chunks;
};

/* What an engine has room for, in pages; 0: for all. */
struct room {
    size_t device, host;
};

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void append_file(struct buf *text, const char *path)
{
    char piece[65536];
    FILE *file = fopen(path, "rbe");
    if (!file) {
        printf("FAIL: no book %s\n", path);
        exit(2);
    }
    for (size_t n; (n = fread(piece, 1, sizeof piece, file)) > 0;)
        buf_append(text, piece, n);
    fclose(file);
}

static struct engine *open_engine(struct past *past, const struct room *room)
{
    static size_t page_bytes; /* known from the first one, with room for all */
    struct engine *engine;
    struct error err = {0};
    const struct engine_options options = {.model_path = model,
                                           .backend = backend,
                                           .host_memory_bytes =
                                               room->host ? room->host * page_bytes : AMPLE,
                                           .device_memory_bytes = room->device * page_bytes,
                                           .slice_tokens = SLICE,
                                           .running_max = 1,
                                           .io = chunk_ram_io(&past->ram)};
    const enum status status = engine_open(&options, &engine, &err);
    if (status) {
        printf("%s: %s\n", status == STATUS_UNSUPPORTED ? "SKIPPED" : "FAIL", err.message);
        exit(status == STATUS_UNSUPPORTED ? 77 : 1);
    }
    chunk_ram_attach(&past->ram, engine);
    page_bytes = engine_get_info(engine)->kv_bytes;
    return engine;
}

/* The session goes on by the next `count` of `ids`; `*hash` (may be NULL) over its logits. */
static void step(struct engine *engine, struct past *past, struct engine_session *session,
                 const int32_t *ids, size_t count, uint64_t *hash)
{
    const size_t v = engine_get_info(engine)->config->vocab_size;
    struct engine_step_item item = {.session = session,
                                    .tokens = ids,
                                    .token_count = (uint32_t)count,
                                    .want_logits = hash != NULL};
    ASSERT(!engine_step(engine, &item, 1) && !item.status);
    chunk_ram_acknowledge(&past->ram, engine);
    if (hash)
        *hash = hash64(session_logits(session), v * sizeof(float), *hash);
}

/* Each of the forks goes on by `count` tokens of its own text, `slice` at a time, by turns. */
static void feed(struct engine *engine, struct past *past, struct engine_session **forks,
                 size_t count, size_t slice, uint64_t *hash)
{
    for (size_t done = 0, n; done < count; done += n) {
        n = count - done < slice ? count - done : slice;
        for (size_t j = 0; j < turns; j++) {
            const uint64_t at = engine_session_position(forks[j]) + j * (reads + steps);
            step(engine, past, forks[j], past->ids.ids + at, n, hash);
        }
    }
}

static void read_past(struct past *past, const struct buf *text)
{
    const struct room all = {0};
    const struct chunk_range range = {.branch = 1};
    struct engine *engine = open_engine(past, &all);
    struct engine_session *session;
    struct error err = {0};
    ASSERT(!tokenizer_encode(engine_tokenizer(engine), text->data, text->size, false, &past->ids));
    const size_t wanted = tokens + turns * (reads + steps);
    if (past->ids.count < wanted) {
        printf("FAIL: the books have %zu tokens, %zu are wanted\n", past->ids.count, wanted);
        exit(2);
    }
    ASSERT(!engine_session_create(engine, &range, 1, NULL, 0, &session, &err));
    const double begin = now();
    for (size_t at = 0; at < tokens; at += SLICE)
        step(engine, past, session, past->ids.ids + at, SLICE, NULL);
    printf("%s, %s: %zu tokens of text read in %.1f s, %u pages for each token, %zu by turns\n",
           model, engine_get_info(engine)->backend, tokens, now() - begin,
           engine->config.group_count * engine->config.retrieval_heads * engine->config.topk,
           turns);
    past->snapshot_bytes = engine_session_snapshot_bytes(session);
    past->snapshot = malloc(past->snapshot_bytes);
    past->chunks = past->ram.count;
    ASSERT(past->snapshot);
    engine_session_snapshot(session, past->snapshot);
    engine_session_destroy(session);
    engine_close(engine);
}

static double percent(uint64_t part, uint64_t all)
{
    return all ? 100 * (double)part / (double)all : 0;
}

/* Of what was read since `from`: where it was. */
static void print_line(const char *how, size_t count, double seconds, const struct engine *engine,
                       const struct engine_stats *from)
{
    struct engine_stats to;
    engine_get_stats(engine, &to);
    const uint64_t device = to.device_page_hits - from->device_page_hits,
                   missed = to.device_page_misses - from->device_page_misses,
                   ahead = to.device_pages_expected - from->device_pages_expected,
                   ahead_hits = to.device_pages_expected_hits - from->device_pages_expected_hits,
                   host = to.page_hits - from->page_hits, disk = to.page_misses - from->page_misses,
                   disk_ahead = to.pages_expected - from->pages_expected,
                   disk_hits = to.pages_expected_hits - from->pages_expected_hits;
    printf("  %-10s %8.3f ms a token", how, 1e3 * seconds / (double)count);
    if (to.device_page_capacity)
        printf("; of %llu uses %.2f%% on the device, %.2f%% by what came ahead (%llu came, %.1f%% "
               "were read)",
               (unsigned long long)(device + missed), percent(device, device + missed),
               percent(ahead_hits, device + missed), (unsigned long long)ahead,
               percent(ahead_hits, ahead));
    printf("; of %llu pages %.2f%% in the host's memory, %llu from the disk",
           (unsigned long long)(host + disk), percent(host, host + disk), (unsigned long long)disk);
    if (to.device_page_capacity)
        printf(", ahead %llu (%.1f%% were read)", (unsigned long long)disk_ahead,
               percent(disk_hits, disk_ahead));
    if (to.picks > from->picks)
        printf("; %.1f%% of picks are those of the token before",
               percent(to.picks_repeated - from->picks_repeated, to.picks - from->picks));
    printf("\n");
    fflush(stdout);
}

/* From where the past ends; a hash of all logits. */
static uint64_t measure(struct past *past, const struct room *room)
{
    const struct chunk_range range = {.branch = 1};
    struct engine *engine = open_engine(past, room);
    struct engine_session *session, *forks[TURNS_MAX];
    struct engine_stats before;
    struct error err = {0};
    uint64_t hash = 0;
    engine_get_stats(engine, &before);
    printf("room for %zu pages in the host's memory", engine->memory.capacity);
    if (engine->ops->page_stats)
        printf(", for %llu on the device",
               (unsigned long long)engine->ops->page_stats(engine->context).capacity);
    printf("\n");
    ASSERT(!engine_session_create(engine, &range, 1, past->snapshot, past->snapshot_bytes, &session,
                                  &err));
    for (size_t j = 0; j < turns; j++)
        ASSERT(!engine_session_fork(session, 2 + j, &forks[j]));
    double begin = now();
    feed(engine, past, forks, reads, SLICE, &hash);
    print_line("in slices", turns * reads, now() - begin, engine, &before);
    engine_get_stats(engine, &before);
    begin = now();
    feed(engine, past, forks, steps, 1, &hash);
    print_line("one by one", turns * steps, now() - begin, engine, &before);
    for (size_t j = 0; j < turns; j++)
        engine_session_destroy(forks[j]);
    engine_session_destroy(session);
    engine_close(engine);
    chunk_ram_cut(&past->ram, past->chunks);
    return hash;
}

/* Pages for `times` of what a token reads, or the least that the engine takes. */
static size_t pages_of(const struct model_config *c, size_t times, size_t least)
{
    const size_t pages = times * c->group_count * c->retrieval_heads * c->topk;
    return pages > least ? pages : least;
}

static bool measure_all(struct past *past)
{
    const struct room all = {0};
    struct engine *engine = open_engine(past, &all);
    const struct model_config c = engine->config;
    const bool has_device = engine->ops->page_stats;
    engine_close(engine);
    /* As engine.c and cuda/pages.cu reckon them. */
    const size_t row = (size_t)c.retrieval_heads * c.topk,
                 host = row + 2 * ((SLICE + 1) / c.chunk_tokens + 2), device = row > 16 ? row : 16;
    const uint64_t want = measure(past, &all);
    size_t same = 1, measured = 1;
    for (size_t i = 0; i < room_count; i++) {
        const size_t pages = pages_of(&c, rooms[i], device);
        const struct room ways[] = {{pages, 0}, {pages, pages_of(&c, rooms[i], host)}};
        for (size_t j = has_device ? 0 : 1; j < 2; j++, measured++)
            same += measure(past, &ways[j]) == want;
    }
    printf("%s: the logits of %zu slices and %zu steps are the same bits in %zu of %zu rooms\n",
           same == measured ? "SAME" : "FAIL", turns * ((reads + SLICE - 1) / SLICE), turns * steps,
           same, measured);
    return same == measured;
}

static void parse_rooms(const char *list)
{
    for (room_count = 0; *list && room_count < ROOMS_MAX; list += *list == ',') {
        char *end;
        rooms[room_count++] = strtoull(list, &end, 10);
        ASSERT(end > list);
        list = end;
    }
}

int main(int argc, char **argv)
{
    struct past past = {0};
    struct buf text;
    buf_init(&text);
    for (int i = 1; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : "";
        if (strncmp(argv[i], "--", 2) != 0) {
            append_file(&text, argv[i]);
            continue;
        }
        if (strcmp(argv[i], "--model") == 0)
            model = value;
        else if (strcmp(argv[i], "--backend") == 0)
            backend = strcmp(value, "cuda") == 0 ? ENGINE_BACKEND_CUDA : ENGINE_BACKEND_CPU;
        else if (strcmp(argv[i], "--tokens") == 0)
            tokens = strtoull(value, NULL, 10) / SLICE * SLICE;
        else if (strcmp(argv[i], "--read") == 0)
            reads = strtoull(value, NULL, 10);
        else if (strcmp(argv[i], "--steps") == 0)
            steps = strtoull(value, NULL, 10);
        else if (strcmp(argv[i], "--turns") == 0)
            turns = strtoull(value, NULL, 10);
        else if (strcmp(argv[i], "--room") == 0)
            parse_rooms(value);
        i++;
    }
    if (!text.size || !turns || turns > TURNS_MAX) {
        printf("bench_pages wants a book, and at most %d turns\n", TURNS_MAX);
        return 2;
    }
    chunk_ram_init(&past.ram);
    read_past(&past, &text);
    buf_close(&text);
    const bool same = measure_all(&past);
    free(past.snapshot);
    tokenizer_tokens_close(&past.ids);
    chunk_ram_close(&past.ram);
    return !same;
}
