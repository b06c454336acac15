/* Decoding on a device that records its steps (ops.h: step_begin): whatever runs beside a sequence,
 * whatever the budgets, recorded or op by op, it computes the same bits; and the tokens that the
 * device finds and draws are the sampler's own. And a device that fails, at whatever launch or
 * allocation, ends the process with a clear word or refuses to open; it gives no token. Exits with
 * 77 where there is no GPU. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "engine/engine_private.h"
#include "proto/base/assert.h"
#include "tests/lib/chunk_ram.h"

#define SEQUENCES 5
#define SEQUENCES_MOST 128
#define SLICE 32
#define TOKENS 18  /* of each: chunks are completed on the way */
#define PROMPT 400 /* at most */

struct sequence {
    struct engine_session *session;
    struct sampler *sampler;
    int32_t token;
    uint32_t done;
};

struct kind { /* of engine */
    const char *model;
    enum engine_dtype dtype;
    bool fp8; /* landmarks */
    bool states_bf16;
    uint32_t prompt; /* tokens of the first sequence; the others have `step` more each */
    uint32_t step;
    bool pages_move; /* with small budgets: what is read does not stay in memory */
    uint64_t seed;   /* of random weights; 0: the model's own */
};

struct way { /* to run the same sequences */
    const char *name;
    bool plain, together;
    enum { AMPLE, SMALL, LEAST } budgets;
};

static const struct kind kinds[] = {
    {"tests/golden/encoder1-kv1-gqa-bf16", ENGINE_DTYPE_BF16, false, false, 31, 13, false, 0},
    {"tests/golden/noencoder-kv2-groups2-bias", ENGINE_DTYPE_FP32, false, false, 220, 13, true, 0},
    {"tests/golden/encoder1-kv1-gqa-bf16", ENGINE_DTYPE_BF16, true, false, 70, 20, false, 0},
    /* Mamba-2 blocks in one kernel (mamba_run.cu). */
    {"tests/golden/wide-stickbreaking-topk8", ENGINE_DTYPE_BF16, false, false, 70, 20, false, 0},
    {"tests/golden/wide-stickbreaking-topk8", ENGINE_DTYPE_BF16, false, true, 70, 20, false, 0},
};
static const struct kind large_kinds[] = {
    {"engine/models/ramba-20m", ENGINE_DTYPE_BF16, false, false, 70, 20, false, 0},
    {"engine/models/ramba-20m", ENGINE_DTYPE_BF16, false, true, 70, 20, false, 0},
    {"tests/bench/ramba-370m", ENGINE_DTYPE_BF16, false, false, 70, 20, false, 1},
    {"tests/bench/ramba-370m", ENGINE_DTYPE_BF16, false, true, 70, 20, false, 1},
};
/* Of many sequences, which complete a chunk with their second token. */
static const struct kind many_kinds[] = {
    {"tests/golden/wide-stickbreaking-topk8", ENGINE_DTYPE_BF16, false, false, 30, 0, false, 0},
    {"tests/golden/wide-stickbreaking-topk8", ENGINE_DTYPE_BF16, false, true, 30, 0, false, 0},
};
static const struct kind many_large_kinds[] = {
    {"tests/bench/ramba-370m", ENGINE_DTYPE_BF16, false, false, 62, 0, false, 1},
    {"tests/bench/ramba-370m", ENGINE_DTYPE_BF16, false, true, 62, 0, false, 1},
};

static uint32_t sequence_count = SEQUENCES, token_count = TOKENS;
static int failures;

/* Which sequences take part in step `i`. */
static bool takes_part(const struct way *way, uint32_t i, uint32_t j)
{
    return way->together ? (i * 7 + j) % 4 != 0 : i % sequence_count == j;
}

static bool is_greedy(uint32_t j)
{
    return j % 2 == 0;
}

static int32_t largest(const float *logits, uint32_t count)
{
    uint32_t best = 0;
    for (uint32_t i = 1; i < count; i++)
        if (logits[i] > logits[best])
            best = i;
    return (int32_t)best;
}

static void start(struct engine *engine, struct chunk_ram *ram, const struct kind *kind,
                  struct sequence *s, uint32_t j)
{
    const struct chunk_range range = {.branch = 1 + j};
    struct sampler_params params;
    struct error err;
    int32_t prompt[PROMPT];
    const uint32_t length = kind->prompt + kind->step * (sequence_count - 1 - j);
    ASSERT(length <= PROMPT);
    for (uint32_t i = 0; i < length; i++)
        prompt[i] = (int32_t)((i * 37 + j * 101 + 11) % 251);
    sampler_params_default(&params);
    if (!is_greedy(j)) { /* drawn on the device, or, op by op, by the sampler */
        params.temperature = 0.7f + 0.1f * (float)j;
        params.top_p = j == 1 ? 0.9f : 1;
        params.top_k = j == 3 ? 40 : 0;
        params.seed = j;
    }
    *s = (struct sequence){0};
    ASSERT(!engine_session_create(engine, &range, 1, NULL, 0, &s->session, &err));
    ASSERT(!sampler_create(&params, (int32_t)engine_get_info(engine)->config->vocab_size,
                           &s->sampler));
    for (uint32_t at = 0, n; at < length; at += n) {
        n = length - at < SLICE ? length - at : SLICE;
        struct engine_step_item item = {.session = s->session,
                                        .tokens = prompt + at,
                                        .token_count = n,
                                        .sampler = at + n == length ? s->sampler : NULL};
        ASSERT(!engine_step(engine, &item, 1) && !item.status);
        chunk_ram_acknowledge(ram, engine);
        s->token = item.result.token;
    }
}

/* One step of those that take part; logits[sequence][token] [V]. */
static void step(struct engine *engine, struct chunk_ram *ram, struct sequence *sequences,
                 const struct way *way, uint32_t i, float *logits)
{
    const uint32_t v = engine_get_info(engine)->config->vocab_size;
    struct engine_step_item items[SEQUENCES_MOST];
    struct sequence *running[SEQUENCES_MOST];
    uint32_t n = 0;
    for (uint32_t j = 0; j < sequence_count; j++) {
        struct sequence *s = &sequences[j];
        if (s->done == token_count || !takes_part(way, i, j))
            continue;
        items[n] = (struct engine_step_item){
            .session = s->session, .tokens = &s->token, .token_count = 1, .sampler = s->sampler};
        running[n++] = s;
    }
    ASSERT(!engine_step(engine, items, n));
    chunk_ram_acknowledge(ram, engine);
    for (uint32_t j = 0; j < n; j++) {
        struct sequence *s = running[j];
        ASSERT(!items[j].status);
        float *to = logits + ((size_t)(s - sequences) * token_count + s->done++) * v;
        memcpy(to, session_logits(s->session), v * sizeof *to);
        s->token = items[j].result.token;
        if (is_greedy((uint32_t)(s - sequences)) && s->token != largest(to, v) && !failures++)
            printf("FAIL %s: token %d, the largest logit is that of %d\n", way->name, s->token,
                   largest(to, v));
    }
}

/* With small budgets everything that can happen to pages did happen. */
static void check_moves(const struct engine_stats *s)
{
    const struct {
        const char *what;
        uint64_t count;
    } all[] = {{"pages read from the disk", s->page_misses},
               {"read before they were asked for", s->pages_expected},
               {"and then were", s->pages_expected_hits},
               {"copied to the device before they were asked for", s->device_pages_expected},
               {"and then were", s->device_pages_expected_hits},
               {"picks like those of the token before", s->picks_repeated},
               {"steps divided", s->steps_divided}};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        printf("    %s: %llu\n", all[i].what, (unsigned long long)all[i].count);
        failures += !all[i].count;
    }
}

/* The logits of every sequence at every token, [sequence_count, token_count, *vocabulary]. */
static float *run(const struct kind *kind, const struct way *way, size_t *vocabulary)
{
    struct chunk_ram ram;
    struct engine *engine = NULL;
    struct error err = {0};
    struct ops table;
    chunk_ram_init(&ram);
    struct engine_options options = {.model_path = kind->model,
                                     .backend = ENGINE_BACKEND_CUDA,
                                     .threads = 1,
                                     .host_memory_bytes = (size_t)64 << 20,
                                     .memory_dtype = kind->dtype,
                                     .landmarks_fp8 = kind->fp8,
                                     .states_bf16 = kind->states_bf16,
                                     .slice_tokens = SLICE,
                                     .running_max = sequence_count,
                                     .random_weights_seed = kind->seed,
                                     .io = chunk_ram_io(&ram)};
    enum status status = engine_open(&options, &engine, &err);
    if (way->budgets != AMPLE &&
        !status) { /* again, with the least that it takes, or little more */
        const struct engine_info *info = engine_get_info(engine);
        const size_t picks = info->config->retrieval_heads * info->config->topk;
        const size_t page = (info->kv_bytes + 255) / 256 * 256;
        const size_t least =
            picks + 2 * ((options.slice_tokens + options.running_max) / info->config->chunk_tokens +
                         options.running_max + 1);
        const size_t rows = way->budgets == SMALL ? sequence_count * picks : picks;
        const size_t device = rows > 16 ? rows : 16;
        const size_t host =
            way->budgets == SMALL && least < device * 3 / 2 ? device * 3 / 2 : least;
        options.device_memory_bytes = device * page;
        options.host_memory_bytes = host * info->kv_bytes;
        engine_close(engine);
        status = engine_open(&options, &engine, &err);
    }
    if (status == STATUS_UNSUPPORTED) {
        printf("SKIPPED: %s\n", err.message);
        exit(77);
    }
    if (status) {
        printf("FAIL cannot open %s: %s\n", kind->model, err.message);
        exit(1);
    }
    chunk_ram_attach(&ram, engine);
    table = *engine->ops;
    if (way->plain)
        table.step_begin = NULL;
    engine->ops = &table;
    const size_t v = *vocabulary = engine_get_info(engine)->config->vocab_size;
    float *logits = calloc((size_t)sequence_count * token_count * v, sizeof *logits);
    struct sequence sequences[SEQUENCES_MOST];
    ASSERT(logits);
    for (uint32_t j = 0; j < sequence_count; j++)
        start(engine, &ram, kind, &sequences[j], j);
    for (uint32_t i = 0; i < sequence_count * token_count + 1; i++)
        step(engine, &ram, sequences, way, i, logits);
    for (uint32_t j = 0; j < sequence_count; j++) {
        ASSERT(sequences[j].done == token_count);
        engine_session_destroy(sequences[j].session);
        sampler_destroy(sequences[j].sampler);
    }
    struct engine_stats stats;
    engine_get_stats(engine, &stats);
    printf("%s, %s, %s: %llu device page hits, %llu misses\n", kind->model,
           engine_get_info(engine)->backend, way->name, (unsigned long long)stats.device_page_hits,
           (unsigned long long)stats.device_page_misses);
    const uint64_t bytes = (stats.device_page_misses + stats.device_pages_expected) *
                           engine_get_info(engine)->kv_bytes;
    if (stats.device_copy_bytes != bytes || !stats.device_copy_ns != !bytes) {
        failures++;
        printf("FAIL %s, %s: %llu bytes copied to the device in %llu ns\n", kind->model, way->name,
               (unsigned long long)stats.device_copy_bytes,
               (unsigned long long)stats.device_copy_ns);
    }
    if (way->budgets == SMALL && kind->pages_move)
        check_moves(&stats);
    engine_close(engine);
    chunk_ram_close(&ram);
    return logits;
}

/* The same logits, whether it goes the first way or any of the others. */
static void compare_ways(const struct kind *kind, const struct way *first, const struct way *ways,
                         size_t count)
{
    size_t v;
    float *want = run(kind, first, &v);
    for (size_t i = 0; i < count; i++) {
        float *got = run(kind, &ways[i], &v);
        size_t at = 0, all = (size_t)sequence_count * token_count * v;
        while (at < all && memcmp(&got[at], &want[at], sizeof *got) == 0)
            at++;
        if (at < all && ++failures)
            printf("FAIL %s, %s: logit %zu of sequence %zu, token %zu: %.9g, %s: %.9g\n",
                   kind->model, ways[i].name, at % v, at / v / token_count, at / v % token_count,
                   (double)got[at], first->name, (double)want[at]);
        free(got);
    }
    free(want);
}

static void compare(const struct kind *kind)
{
    static const struct way ways[] = {
        {"together, recorded", false, true, AMPLE},
        {"together, op by op", true, true, AMPLE},
        {"together, recorded, small budgets", false, true, SMALL},
        {"together, recorded, least budgets", false, true, LEAST},
        {"alone, recorded", false, false, AMPLE},
    };
    compare_ways(kind, &ways[0], ways + 1, sizeof ways / sizeof *ways - 1);
}

/* So many that half of those of a step, which are three quarters, go aside (step.cu); they complete
 * a chunk and read it. */
static void compare_many(const struct kind *kind)
{
    static const struct way plain = {"many, op by op", true, true, AMPLE},
                            recorded = {"many, recorded", false, true, AMPLE};
    const uint32_t few = sequence_count, tokens = token_count;
    sequence_count = SEQUENCES_MOST;
    token_count = 4;
    compare_ways(kind, &plain, &recorded, 1);
    sequence_count = few;
    token_count = tokens;
}

/* The logits behind one more token. */
static const float *after(struct engine *engine, struct engine_session *session)
{
    const int32_t token = 77;
    struct engine_step_item item = {
        .session = session, .tokens = &token, .token_count = 1, .want_logits = true};
    ASSERT(!engine_step(engine, &item, 1) && !item.status);
    return session_logits(session);
}

/* With landmarks in fp8, of whose chunks only a part is looked at again, or states in bf16: a fork
 * and a session taken up again from its snapshot go on as the session itself does. */
static void check_copies(bool fp8, bool states_bf16)
{
    const struct kind kind = {"tests/golden/wide-stickbreaking-topk8",
                              ENGINE_DTYPE_BF16,
                              fp8,
                              states_bf16,
                              PROMPT,
                              0,
                              false,
                              0};
    struct chunk_ram ram;
    struct engine *engine;
    struct error err = {0};
    struct sequence s;
    chunk_ram_init(&ram);
    const struct engine_options options = {.model_path = kind.model,
                                           .backend = ENGINE_BACKEND_CUDA,
                                           .threads = 1,
                                           .host_memory_bytes = (size_t)64 << 20,
                                           .landmarks_fp8 = fp8,
                                           .states_bf16 = states_bf16,
                                           .slice_tokens = SLICE,
                                           .io = chunk_ram_io(&ram)};
    ASSERT(!engine_open(&options, &engine, &err));
    chunk_ram_attach(&ram, engine);
    start(engine, &ram, &kind, &s, 0);
    const struct model_config *c = engine_get_info(engine)->config;
    ASSERT(PROMPT / c->chunk_tokens > 2 * c->topk);
    const struct chunk_range range = {.branch = 1};
    struct engine_session *copies[2];
    const size_t bytes = engine_session_snapshot_bytes(s.session), v = c->vocab_size;
    void *snapshot = malloc(bytes);
    ASSERT(snapshot);
    engine_session_snapshot(s.session, snapshot);
    ASSERT(!engine_session_fork(s.session, 2, &copies[0]));
    ASSERT(!engine_session_create(engine, &range, 1, snapshot, bytes, &copies[1], &err));
    const float *want = after(engine, s.session);
    for (size_t i = 0; i < 2; i++) {
        if (memcmp(after(engine, copies[i]), want, v * sizeof *want) != 0) {
            failures++;
            printf("FAIL %s: a %s goes on otherwise\n", fp8 ? "landmarks in fp8" : "states in bf16",
                   i ? "restored session" : "fork");
        }
        engine_session_destroy(copies[i]);
    }
    free(snapshot);
    engine_session_destroy(s.session);
    sampler_destroy(s.sampler);
    engine_close(engine);
    chunk_ram_close(&ram);
}

struct fault {
    const char *what;
    size_t kind;
    struct way way;
};

/* What a process says in which a launch or an allocation fails, and how it ends. */
static void check_fault(const struct fault *f)
{
    int ends[2], status;
    char said[8192];
    size_t size = 0;
    fflush(stdout);
    ASSERT(!pipe(ends));
    const pid_t child = fork();
    ASSERT(child >= 0);
    if (!child) {
        ASSERT(dup2(ends[1], STDERR_FILENO) >= 0 && dup2(ends[1], STDOUT_FILENO) >= 0);
        close(ends[0]);
        setenv("RAMBAD_CUDA_FAULT", f->what, 1);
        size_t vocabulary;
        run(&kinds[f->kind], &f->way, &vocabulary);
        exit(0);
    }
    close(ends[1]);
    for (ssize_t n; (n = read(ends[0], said + size, sizeof said - 1 - size)) > 0;)
        size += (size_t)n;
    said[size] = '\0';
    close(ends[0]);
    ASSERT(waitpid(child, &status, 0) == child);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 77) {
        printf("%s", said);
        exit(77);
    }
    const bool broken = strstr(said, "\"engine_broken\"") && strstr(said, "the GPU failed in");
    const bool refused = strstr(said, "cannot open") && strstr(said, "memory");
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 1 || (!broken && !refused)) {
        failures++;
        printf("FAIL %s: status %d, said: %s\n", f->what, status, said);
    } else {
        printf("%s: %s\n", f->what, broken ? "broken, and said so" : "refused to open");
    }
}

/* With --paging: small budgets alone, and few steps, for tools that look at every access; with
 * --large: models of the sizes that are in use alone. */
int main(int argc, char **argv)
{
    static const struct way way = {"faulty", false, true, AMPLE},
                            ample = {"ample budgets", false, true, AMPLE},
                            small = {"small budgets", false, true, SMALL};
    /* Launches of the prompts, of a part as it is recorded, of a replay; of pages on their way, of
     * tokens drawn, of what landmarks in fp8 take; allocations of all. */
    const struct fault faults[] = {
        {"launch:1", 0, way},
        {"launch:30", 0, way},
        {"launch:120", 0, way},
        {"launch:220", 0, way},
        {"launch:240", 0, way},
        {"launch:1:copy_pages", 1, small},
        {"launch:25:copy_pages", 1, small},
        {"launch:1:weigh_tokens", 0, way},
        {"launch:5:choose_tokens", 0, way},
        {"launch:2:narrow_landmarks", 2, way},
        {"launch:1:expand_landmarks", 2, way},
        {"launch:1:keep_best", 2, way},
        {"launch:1:scan_rows", 2, way},
        {"launch:2:rescore_rows", 2, way},
        {"copy:3", 0, way},
        {"copy:150", 1, small},
        {"alloc:2", 0, way},
        {"alloc:20", 0, way},
        {"alloc:60", 0, way},
        {"alloc:10", 2, way},
    };
    if (argc > 1 && strcmp(argv[1], "--paging") == 0) {
        sequence_count = 3;
        token_count = 6;
        compare_ways(&kinds[1], &ample, &small, 1);
        printf("%d failed\n", failures);
        return failures != 0;
    }
    if (argc > 1 && strcmp(argv[1], "--large") == 0) {
        for (size_t i = 0; i < sizeof many_large_kinds / sizeof *many_large_kinds; i++)
            compare_many(&many_large_kinds[i]);
        for (size_t i = 0; i < sizeof large_kinds / sizeof *large_kinds; i++)
            compare(&large_kinds[i]);
        printf("%d failed\n", failures);
        return failures != 0;
    }
    /* First: a process that has used the device cannot be forked. */
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++)
        check_fault(&faults[i]);
    for (size_t i = 0; i < sizeof many_kinds / sizeof *many_kinds; i++)
        compare_many(&many_kinds[i]);
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        compare(&kinds[i]);
    check_copies(true, false);
    check_copies(false, true);
    printf("%d failed\n", failures);
    return failures != 0;
}
