/* What a turn's snapshot would take on disk if it were packed: by itself, or against the one before
 * it. Every form is exact. Bytes are the snapshot's words in planes (all first bytes, then all
 * second ones...), since the high bytes of numbers are alike and the low ones are noise.
 *
 *   bench_snapshots MODEL_FOLDER [BOOK]
 *
 * Without a BOOK the tokens are random ones. Prints a share of the raw size for turns of several
 * lengths behind 4,096 tokens, and the time that packing takes. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <zstd.h>

#include "engine/engine.h"
#include "proto/base/assert.h"
#include "proto/base/hash.h"
#include "tests/lib/chunk_ram.h"

#define BEFORE 4096
#define TURNS 4

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* The bits of a float as a number that grows with it, so that differences of neighbours are small.
 */
static uint32_t in_order(uint32_t bits)
{
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

enum form { RAW, PLANES, XOR, DIFFERENCE, FORMS };
static const char *const form_names[FORMS] = {"zstd", "planes", "xor, planes",
                                              "difference, planes"};

/* `words` of `now_` (against `old`) as `form` lays them out. */
static void lay_out(enum form form, const uint32_t *old, const uint32_t *now_, size_t words,
                    unsigned char *out)
{
    for (size_t i = 0; i < words; i++) {
        uint32_t word = now_[i];
        if (form == XOR)
            word ^= old[i];
        else if (form == DIFFERENCE) {
            const uint32_t difference = in_order(word) - in_order(old[i]);
            word = difference << 1 ^ (difference & 0x80000000u ? 0xffffffffu : 0); /* zigzag */
        }
        if (form == RAW)
            memcpy(out + 4 * i, &word, 4);
        else
            for (size_t plane = 0; plane < 4; plane++)
                out[plane * words + i] = (unsigned char)(word >> (8 * plane));
    }
}

struct packed {
    double bytes[FORMS], seconds[FORMS];
};

static void pack(const void *old, const void *new_, size_t size, struct packed *sum)
{
    const size_t words = size / 4, bound = ZSTD_compressBound(size);
    unsigned char *flat = malloc(size), *out = malloc(bound);
    ASSERT(flat && out);
    for (enum form form = RAW; form < FORMS; form++) {
        const double began = now();
        lay_out(form, old, new_, words, flat);
        const size_t got = ZSTD_compress(out, bound, flat, words * 4, 1);
        ASSERT(!ZSTD_isError(got));
        sum->bytes[form] += (double)got;
        sum->seconds[form] += now() - began;
    }
    free(flat);
    free(out);
}

struct run {
    struct engine *engine;
    struct chunk_ram ram;
    struct engine_session *session;
    int32_t *tokens;
    size_t at;
};

static double read_on(struct run *run, size_t count)
{
    const uint32_t slice = engine_get_info(run->engine)->slice_tokens;
    const double began = now();
    while (count) {
        const uint32_t n = count < slice ? (uint32_t)count : slice;
        struct engine_step_item item = {.session = run->session,
                                        .tokens = run->tokens + run->at,
                                        .token_count = n,
                                        .want_logits = n == count};
        ASSERT(!engine_step(run->engine, &item, 1) && !item.status);
        chunk_ram_acknowledge(&run->ram, run->engine);
        run->at += n;
        count -= n;
    }
    return now() - began;
}

static void turns_of(struct run *run, size_t count)
{
    struct packed sum = {{0}, {0}};
    double read_s = 0;
    size_t size = engine_session_snapshot_bytes(run->session);
    char *old = calloc(1, size), *new_ = calloc(1, size);
    ASSERT(old && new_);
    engine_session_snapshot(run->session, old);
    for (unsigned i = 0; i < TURNS; i++) {
        read_s += read_on(run, count);
        /* The unfinished chunk grows and starts anew: what both have is compared. */
        const size_t has = engine_session_snapshot_bytes(run->session);
        char *bytes = calloc(1, has > size ? has : size);
        ASSERT(bytes);
        engine_session_snapshot(run->session, bytes);
        memcpy(new_, bytes, size);
        free(bytes);
        pack(old, new_, size / 4 * 4, &sum);
        memcpy(old, new_, size);
    }
    printf("turns of %3zu tokens, snapshot %6.2f MiB:", count, (double)size / 1048576);
    for (enum form form = RAW; form < FORMS; form++)
        printf("  %s %.3f (%.0f ms)", form_names[form], sum.bytes[form] / TURNS / (double)size,
               sum.seconds[form] / TURNS * 1e3);
    printf("; the turn again: %.0f ms\n", read_s / TURNS * 1e3);
    fflush(stdout);
    free(old);
    free(new_);
}

int main(int argc, char **argv)
{
    static const size_t lengths[] = {16, 64, 128, 256, 512};
    struct run run = {0};
    struct error err = {0};
    char path[1024];
    if (argc < 2) {
        fprintf(stderr, "bench_snapshots MODEL_FOLDER [BOOK]\n");
        return 2;
    }
    chunk_ram_init(&run.ram);
    snprintf(path, sizeof path, "%s/model.safetensors", argv[1]);
    const struct engine_options options = {.model_path = argv[1],
                                           .backend = ENGINE_BACKEND_CPU,
                                           .threads = 2,
                                           .host_memory_bytes = (size_t)1 << 30,
                                           .random_weights_seed = access(path, R_OK) ? 1 : 0,
                                           .io = chunk_ram_io(&run.ram)};
    if (engine_open(&options, &run.engine, &err)) {
        fprintf(stderr, "bench_snapshots: %s\n", err.message);
        return 1;
    }
    chunk_ram_attach(&run.ram, run.engine);
    const struct engine_info *info = engine_get_info(run.engine);
    struct tokenizer_tokens book = {0};
    if (argc > 2) {
        char *text = calloc(1, 1 << 20);
        FILE *file = fopen(argv[2], "re");
        ASSERT(text && file);
        const size_t size = fread(text, 1, 1 << 20, file);
        fclose(file);
        ASSERT(!tokenizer_encode(engine_tokenizer(run.engine), text, size, false, &book));
        ASSERT(book.count >= 3 * BEFORE);
        free(text);
        run.tokens = book.ids;
    } else {
        run.tokens = calloc(3 * BEFORE, sizeof *run.tokens);
        for (uint64_t i = 0; run.tokens && i < 3 * BEFORE; i++)
            run.tokens[i] = (int32_t)(hash64(&i, sizeof i, 3) % info->config->vocab_size);
    }
    const struct chunk_range range = {.branch = 1};
    ASSERT(run.tokens);
    ASSERT(!engine_session_create(run.engine, &range, 1, NULL, 0, &run.session, &err));
    const double seconds = read_on(&run, BEFORE);
    printf("%s: %.0f tokens/s\n", info->model_name, BEFORE / seconds);
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++)
        turns_of(&run, lengths[i]);
    engine_session_destroy(run.session);
    if (argc > 2)
        tokenizer_tokens_close(&book);
    else
        free(run.tokens);
    engine_close(run.engine);
    chunk_ram_close(&run.ram);
    return 0;
}
