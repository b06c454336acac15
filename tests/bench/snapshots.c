/* What a turn's snapshot takes, and what that costs.
 *
 *   bench_snapshots MODEL_FOLDER [BOOK [PROMPTS]]
 *
 * Without a BOOK the tokens are random ones. First exact forms, which nothing uses: by itself, or
 * against the snapshot before it; bytes are the snapshot's words in planes (all first bytes, then
 * all second ones...), since the high bytes of numbers are alike and the low ones are noise. Prints
 * a share of the raw size for turns of several lengths behind 4,096 tokens, and the time that
 * packing takes. Then the form that turns end with: its size, the time to round, to write and to
 * read it. Then, with a BOOK, what the rounding changes: for each of PROMPTS pieces of it 512
 * greedy tokens behind one rounding, and behind one every 32 tokens, and the loss of 512 of the
 * book's own tokens with such roundings. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <zstd.h>

#include "engine/engine_private.h"
#include "proto/base/assert.h"
#include "proto/base/hash.h"
#include "tests/lib/chunk_ram.h"

#define BEFORE 4096
#define TURNS 4
#define GREEDY 512
#define EVERY 32 /* tokens between roundings */

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

/* ---- the rounded form ---- */

static void rounded_form(struct run *run)
{
    struct engine_session *session = run->session, *again;
    struct error err = {0};
    char *snapshot = calloc(1, engine_session_snapshot_bytes(session));
    const size_t full = engine_session_snapshot_bytes(session);
    const double t0 = now();
    engine_session_round(session);
    const double t1 = now();
    const size_t size = engine_session_snapshot_bytes(session);
    ASSERT(snapshot);
    const double t2 = now();
    engine_session_snapshot(session, snapshot);
    const double t3 = now();
    const struct chunk_range range = {.branch = 1};
    ASSERT(!engine_session_create(run->engine, &range, 1, snapshot, size, &again, &err));
    const double t4 = now();
    printf(
        "rounded: %.2f of %.2f MiB (%.3f); %.1f ms to round, %.1f to write, %.1f to read with %llu "
        "landmarks\n",
        (double)size / 1048576, (double)full / 1048576, (double)size / (double)full,
        (t1 - t0) * 1e3, (t3 - t2) * 1e3, (t4 - t3) * 1e3, (unsigned long long)again->chunk_count);
    engine_session_destroy(again);
    free(snapshot);
}

static size_t largest_of(const float *logits, size_t count)
{
    size_t best = 0;
    for (size_t i = 1; i < count; i++)
        best = logits[i] > logits[best] ? i : best;
    return best;
}

static double loss_of(const float *logits, size_t count, int32_t token)
{
    const float top = logits[largest_of(logits, count)];
    double sum = 0;
    for (size_t i = 0; i < count; i++)
        sum += exp((double)(logits[i] - top));
    return log(sum) + (double)(top - logits[token]);
}

/* One way to go on: with its own tokens or with the book's, rounded never, once or ever again. */
struct way {
    const char *name;
    bool forced;
    size_t every;   /* 0: never again */
    size_t changed; /* prompts whose greedy tokens are others; places whose largest logit is */
    double gap;     /* the largest, between the two tokens, where they part */
    double loss, error;
    struct engine_session *session;
    bool parted;
    int32_t token;
};

static void start(struct run *run, struct way *way, uint64_t *branch)
{
    ASSERT(!engine_session_fork(run->session, ++*branch, &way->session));
    const size_t vocab = run->engine->config.vocab_size;
    way->token = (int32_t)largest_of(session_logits(way->session), vocab);
    way->parted = false;
}

/* After a step: against the exact session of its kind. */
static void judge(struct way *way, struct way *exact, size_t vocab)
{
    const float *a = session_logits(way->session), *b = session_logits(exact->session);
    const size_t want = largest_of(b, vocab), got = largest_of(a, vocab);
    for (size_t i = 0; i < vocab && !way->parted; i++)
        way->error = fmax(way->error, fabs((double)(a[i] - b[i])));
    if (got != want && !way->parted) {
        way->changed++;
        way->gap = fmax(way->gap, (double)(b[want] - b[got]));
        way->parted = !way->forced;
    }
}

static void effects(struct run *run, size_t book, unsigned prompts)
{
    struct way ways[] = {{"greedy, exact", false, 0, .changed = 0},
                         {"greedy, rounded once", false, 0, .changed = 0},
                         {"greedy, rounded ever again", false, EVERY, .changed = 0},
                         {"book, exact", true, 0, .changed = 0},
                         {"book, rounded ever again", true, EVERY, .changed = 0}};
    const size_t count = sizeof ways / sizeof *ways, vocab = run->engine->config.vocab_size;
    uint64_t branch = 1;
    for (unsigned p = 0; p < prompts; p++) {
        const struct chunk_range range = {.branch = ++branch};
        const size_t length = 300 + (size_t)p * 977 % 3500;
        struct error err = {0};
        engine_session_destroy(run->session);
        ASSERT(!engine_session_create(run->engine, &range, 1, NULL, 0, &run->session, &err));
        run->at = (book - length - GREEDY) / prompts * p;
        read_on(run, length);
        for (size_t i = 0; i < count; i++)
            start(run, &ways[i], &branch);
        for (size_t step = 0; step < GREEDY; step++) {
            struct engine_step_item items[sizeof ways / sizeof *ways] = {{0}};
            for (size_t i = 0; i < count; i++) {
                struct way *way = &ways[i];
                const bool exact = !i || (way->forced && !way->every);
                if (!exact && (step ? way->every && step % way->every == 0 : true))
                    engine_session_round(way->session);
                if (way->forced)
                    way->loss += loss_of(session_logits(way->session), vocab,
                                         way->token = run->tokens[run->at + step]);
                items[i] = (struct engine_step_item){.session = way->session,
                                                     .tokens = &way->token,
                                                     .token_count = 1,
                                                     .want_logits = true};
            }
            ASSERT(!engine_step(run->engine, items, count));
            chunk_ram_acknowledge(&run->ram, run->engine);
            for (size_t i = 0; i < count; i++) {
                ASSERT(!items[i].status);
                judge(&ways[i], &ways[ways[i].forced ? 3 : 0], vocab);
                ways[i].token = (int32_t)largest_of(session_logits(ways[i].session), vocab);
            }
        }
        for (size_t i = 0; i < count; i++)
            engine_session_destroy(ways[i].session);
    }
    for (size_t i = 0; i < count; i++) {
        printf("%s: %zu of %u %s part, by at most %.2g of a logit; other logits differ by at most "
               "%.2g",
               ways[i].name, ways[i].changed, ways[i].forced ? prompts * GREEDY : prompts,
               ways[i].forced ? "tokens" : "prompts", ways[i].gap, ways[i].error);
        if (ways[i].forced)
            printf("; loss %.6f", ways[i].loss / prompts / GREEDY);
        printf("\n");
    }
}

int main(int argc, char **argv)
{
    static const size_t lengths[] = {16, 64, 128, 256, 512};
    struct run run = {0};
    struct error err = {0};
    if (argc < 2) {
        fprintf(stderr, "bench_snapshots MODEL_FOLDER [BOOK [PROMPTS]]\n");
        return 2;
    }
    chunk_ram_init(&run.ram);
    const struct engine_options options = {.model_path = argv[1],
                                           .backend = ENGINE_BACKEND_AUTO,
                                           .threads = 2,
                                           .host_memory_bytes = (size_t)1 << 30,
                                           .random_weights_seed = 1,
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
    printf("%s, %s: %.0f tokens/s\n", info->model_name, info->backend, BEFORE / seconds);
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++)
        turns_of(&run, lengths[i]);
    rounded_form(&run);
    if (argc > 2)
        effects(&run, book.count, argc > 3 ? (unsigned)atoi(argv[3]) : 8);
    engine_session_destroy(run.session);
    if (argc > 2)
        tokenizer_tokens_close(&book);
    else
        free(run.tokens);
    engine_close(run.engine);
    chunk_ram_close(&run.ram);
    return 0;
}
