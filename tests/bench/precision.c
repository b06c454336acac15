/* What numbers of fewer bits cost on text: the same book through the same model, with landmarks in
 * fp8 (a GPU's option), and with recurrent states in bf16.
 *
 *   bench_precision BOOK... [--model DIR] [--backend cpu|cuda] [--tokens N] [--steps N]
 *
 * Of each book the first N tokens are read in slices and the next ones go in one by one, the same
 * in every way; each step's picks, the loss of the token behind it and its most probable token are
 * held against those of the plain way (bf16 landmarks, fp32 states). Prints a line a book and way.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/engine_private.h"
#include "proto/base/assert.h"
#include "tests/lib/chunk_ram.h"

#define SLICE 512

enum way { WAY_PLAIN, WAY_FP8_LANDMARKS, WAY_BF16_STATES, WAY_COUNT };
static const char *const way_names[WAY_COUNT] = {"plain", "fp8 landmarks", "bf16 states"};

static const char *model = "engine/models/ramba-20m";
static enum engine_backend backend = ENGINE_BACKEND_CPU;
static size_t tokens = 65536, steps = 512;

struct trace { /* of each step */
    double *losses;
    int32_t *best;
    struct engine_pick *picks; /* [steps, most] */
    uint32_t *pick_counts, most;
};

static char *read_file(const char *path, size_t *size)
{
    FILE *file = fopen(path, "rbe");
    ASSERT(file && !fseek(file, 0, SEEK_END));
    const long end = ftell(file);
    ASSERT(end > 0 && !fseek(file, 0, SEEK_SET));
    char *text = malloc((size_t)end);
    ASSERT(text && fread(text, 1, (size_t)end, file) == (size_t)end);
    fclose(file);
    *size = (size_t)end;
    return text;
}

/* The loss of `next`, and the most probable token. */
static double loss_of(const float *logits, uint32_t v, int32_t next, int32_t *best)
{
    double sum = 0;
    *best = 0;
    for (uint32_t i = 1; i < v; i++)
        if (logits[i] > logits[*best])
            *best = (int32_t)i;
    for (uint32_t i = 0; i < v; i++)
        sum += exp((double)logits[i] - (double)logits[*best]);
    return (double)logits[*best] + log(sum) - (double)logits[next];
}

static struct engine *open_engine(struct chunk_ram *ram, enum way way)
{
    struct engine *engine;
    struct error err = {0};
    const struct engine_options options = {.model_path = model,
                                           .backend = backend,
                                           .host_memory_bytes = (size_t)1 << 30,
                                           .landmarks_fp8 = way == WAY_FP8_LANDMARKS,
                                           .states_bf16 = way == WAY_BF16_STATES,
                                           .slice_tokens = SLICE,
                                           .io = chunk_ram_io(ram)};
    const enum status status = engine_open(&options, &engine, &err);
    if (status) {
        printf("%s: %s\n", status == STATUS_UNSUPPORTED ? "SKIPPED" : "FAIL", err.message);
        exit(status == STATUS_UNSUPPORTED ? 77 : 1);
    }
    chunk_ram_attach(ram, engine);
    return engine;
}

static void take_step(struct engine *engine, struct chunk_ram *ram, struct engine_step_item *item)
{
    ASSERT(!engine_step(engine, item, 1) && !item->status);
    chunk_ram_acknowledge(ram, engine);
}

static void run(const char *text, size_t size, enum way way, struct trace *t)
{
    struct chunk_ram ram;
    chunk_ram_init(&ram);
    struct engine *engine = open_engine(&ram, way);
    const struct engine_info *info = engine_get_info(engine);
    const struct chunk_range range = {.branch = 1};
    struct tokenizer_tokens ids = {0};
    struct error err;
    struct engine_session *session;
    ASSERT(!tokenizer_encode(engine_tokenizer(engine), text, size, false, &ids));
    ASSERT(ids.count > tokens + steps);
    ASSERT(!engine_session_create(engine, &range, 1, NULL, 0, &session, &err));
    const uint32_t most = info->group_count * info->head_count * info->config->topk;
    *t = (struct trace){.losses = calloc(steps, sizeof *t->losses),
                        .best = calloc(steps, sizeof *t->best),
                        .picks = calloc(steps * most, sizeof *t->picks),
                        .pick_counts = calloc(steps, sizeof *t->pick_counts),
                        .most = most};
    ASSERT(t->losses && t->best && t->picks && t->pick_counts);
    struct engine_stats stats;
    for (size_t at = 0; at < tokens + steps;) {
        const bool single = at >= tokens;
        const size_t left = tokens - at, n = single ? 1 : left < SLICE ? left : SLICE;
        struct engine_step_item item = {.session = session,
                                        .tokens = ids.ids + at,
                                        .token_count = (uint32_t)n,
                                        .want_logits = single,
                                        .want_picks = single};
        take_step(engine, &ram, &item);
        if (single) {
            const size_t i = at - tokens;
            t->losses[i] = loss_of(session_logits(session), info->config->vocab_size,
                                   ids.ids[at + 1], &t->best[i]);
            ASSERT(item.pick_count <= most);
            memcpy(t->picks + i * most, item.picks, item.pick_count * sizeof *item.picks);
            t->pick_counts[i] = item.pick_count;
        }
        at += n;
    }
    engine_get_stats(engine, &stats);
    if (way == WAY_PLAIN && stats.picks)
        printf("%.1f%% of %llu picks are those of the token before\n",
               100 * (double)stats.picks_repeated / (double)stats.picks,
               (unsigned long long)stats.picks);
    tokenizer_tokens_close(&ids);
    engine_session_destroy(session);
    engine_close(engine);
    chunk_ram_close(&ram);
}

static const struct engine_pick *find_pick(const struct trace *t, size_t step,
                                           const struct engine_pick *like)
{
    for (uint32_t i = 0; i < t->pick_counts[step]; i++) {
        const struct engine_pick *pick = &t->picks[step * t->most + i];
        if (pick->chunk == like->chunk && pick->group == like->group && pick->head == like->head)
            return pick;
    }
    return NULL;
}

static void compare(const char *book, enum way way, const struct trace *plain,
                    const struct trace *t)
{
    size_t picks = 0, missed = 0, whole = 0, same = 0;
    double weight = 0, lost = 0, base = 0, loss = 0, worst = 0;
    for (size_t i = 0; i < steps; i++) {
        const size_t before = missed;
        for (uint32_t j = 0; j < plain->pick_counts[i]; j++) {
            const struct engine_pick *want = &plain->picks[i * plain->most + j];
            const bool there = find_pick(t, i, want);
            picks++;
            missed += !there;
            weight += (double)want->weight;
            lost += there ? 0 : (double)want->weight;
        }
        whole += missed == before;
        same += t->best[i] == plain->best[i];
        base += plain->losses[i];
        loss += t->losses[i];
        worst = fmax(worst, fabs(t->losses[i] - plain->losses[i]));
    }
    const char *name = strrchr(book, '/');
    printf("%-36s %-14s %zu of %zu picks differ (%.4f%%), of weight %.4f%%; all picks the same in "
           "%zu of %zu steps; most probable token the same in %zu; loss %.5f against %.5f, one "
           "token's at most %.4f apart\n",
           name ? name + 1 : book, way_names[way], missed, picks,
           100.0 * (double)missed / (double)(picks ? picks : 1),
           weight > 0 ? 100 * lost / weight : 0, whole, steps, same, loss / (double)steps,
           base / (double)steps, worst);
    fflush(stdout);
}

static void drop(struct trace *t)
{
    free(t->losses);
    free(t->best);
    free(t->picks);
    free(t->pick_counts);
}

static void measure(const char *book)
{
    size_t size;
    char *text = read_file(book, &size);
    struct trace plain, other;
    run(text, size, WAY_PLAIN, &plain);
    for (enum way way = WAY_FP8_LANDMARKS; way < WAY_COUNT; way++) {
        if (way == WAY_FP8_LANDMARKS && backend != ENGINE_BACKEND_CUDA)
            continue;
        run(text, size, way, &other);
        compare(book, way, &plain, &other);
        drop(&other);
    }
    drop(&plain);
    free(text);
}

int main(int argc, char **argv)
{
    const char *books[64];
    size_t book_count = 0;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--model") == 0 && i + 1 < argc)
            model = argv[++i];
        else if (strcmp(argv[i], "--backend") == 0 && i + 1 < argc)
            backend = strcmp(argv[++i], "cuda") == 0 ? ENGINE_BACKEND_CUDA : ENGINE_BACKEND_CPU;
        else if (strcmp(argv[i], "--tokens") == 0 && i + 1 < argc)
            tokens = strtoull(argv[++i], NULL, 10);
        else if (strcmp(argv[i], "--steps") == 0 && i + 1 < argc)
            steps = strtoull(argv[++i], NULL, 10);
        else if (book_count < 64)
            books[book_count++] = argv[i];
    }
    printf("%s, %zu tokens read, then %zu steps\n", model, tokens, steps);
    for (size_t i = 0; i < book_count; i++)
        measure(books[i]);
    return book_count ? 0 : 2;
}
