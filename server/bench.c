/* bench.c - see bench.h. Prefill and decode against context length, each with its floor, which is
 * measured in turn with it: a decode step must read the weights, the recurrent states, the
 * landmarks and the picked pages, so its floor is reading as many bytes with as many threads; a
 * prefilled slice is matrix products, so its floor is OpenBLAS's sgemm on the same shapes. */
#include "server/bench.h"

#include <cblas.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "engine/bf16.h"
#include "engine/engine.h"
#include "proto/base/assert.h"
#include "proto/base/hash.h"
#include "server/load.h"

#define MANY 8          /* sequences decoded together */
#define DECODE_STEPS 64 /* of one measurement: a chunk's worth, so that its encoding is in it */
#define THREADS_MAX 64
#define ROUNDS_MAX 64
#define PROBE_BYTES ((size_t)1 << 30) /* far more than any cache: above it, read again */

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void *take(size_t bytes)
{
    void *memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
    ASSERT(memory);
    memset(memory, 0, bytes);
    return memory;
}

/* ---- a memory in RAM, for what storage would hold ---- */

/* The past of a measured length is random: chunk i's bytes begin somewhere in a table of random
 * numbers. Its length is what is measured, not its words. */
struct ram {
    struct engine *engine;
    size_t kv_bytes, landmark_bytes;
    uint16_t *table; /* bf16 */
    struct chunk_key *waiting;
    size_t waiting_count, waiting_capacity;
};

#define TABLE_BYTES ((size_t)4 << 20)

static void ram_open(struct ram *ram, struct engine *engine)
{
    ram->engine = engine;
    ram->kv_bytes = engine_get_info(engine)->kv_bytes;
    ram->landmark_bytes = engine_get_info(engine)->landmark_bytes;
    ram->table = take(TABLE_BYTES);
    ASSERT(ram->kv_bytes < TABLE_BYTES && ram->landmark_bytes < TABLE_BYTES);
    uint64_t state = 1;
    for (size_t i = 0; i < TABLE_BYTES / 2; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        ram->table[i] = bf16_from_float((float)((double)(state >> 11) / 4503599627370496.0 - 1));
    }
}

static void ram_close(struct ram *ram)
{
    free(ram->table);
    free(ram->waiting);
}

static const void *ram_chunk(const struct ram *ram, uint64_t index, size_t bytes)
{
    const size_t at = hash64(&index, sizeof index, bytes) % (TABLE_BYTES - bytes);
    return ram->table + at / 2;
}

static size_t append_room(void *context)
{
    (void)context;
    return 1u << 20;
}

static enum status append(void *context, struct chunk_key key, const void *kv, const void *landmark)
{
    struct ram *ram = context;
    (void)kv;
    (void)landmark;
    if (ram->waiting_count == ram->waiting_capacity) {
        ram->waiting_capacity = ram->waiting_capacity ? 2 * ram->waiting_capacity : 64;
        ram->waiting = realloc(ram->waiting, ram->waiting_capacity * sizeof *ram->waiting);
        ASSERT(ram->waiting);
    }
    ram->waiting[ram->waiting_count++] = key;
    return STATUS_OK;
}

static enum status read_chunks(void *context, const struct chunk_read *reads, size_t count)
{
    const struct ram *ram = context;
    for (size_t i = 0; i < count; i++)
        memcpy(reads[i].kv, ram_chunk(ram, reads[i].key.index, ram->kv_bytes), ram->kv_bytes);
    return STATUS_OK;
}

static enum status read_landmarks(void *context, uint64_t branch, uint64_t first, uint64_t count,
                                  void *out)
{
    const struct ram *ram = context;
    (void)branch;
    for (uint64_t i = 0; i < count; i++)
        memcpy((char *)out + i * ram->landmark_bytes,
               ram_chunk(ram, first + i, ram->landmark_bytes), ram->landmark_bytes);
    return STATUS_OK;
}

static void acknowledge(struct ram *ram)
{
    for (size_t i = 0; i < ram->waiting_count; i++)
        engine_chunk_durable(ram->engine, ram->waiting[i], STATUS_OK);
    ram->waiting_count = 0;
}

/* ---- what the machine can do ---- */

struct shape { /* y [rows, n] = x [rows, k] W^T, `count` times a slice */
    uint32_t n, k;
    double count;
};

struct probe {
    pthread_barrier_t *start;
    const float *memory;
    size_t bytes, repeats;      /* to read */
    const struct shape *shapes; /* to multiply */
    size_t shape_count;
    uint32_t rows, part, parts; /* this thread's share of the outputs */
    float *a, *b, *c;
    double seconds, sum;
};

static void *read_memory(void *context)
{
    struct probe *p = context;
    float sums[64] = {0};
    pthread_barrier_wait(p->start);
    for (size_t r = 0; r < p->repeats; r++)
        for (size_t i = 0; i + 64 <= p->bytes / sizeof(float); i += 64)
            for (size_t j = 0; j < 64; j++)
                sums[j] += p->memory[i + j];
    for (size_t j = 0; j < 64; j++)
        p->sum += (double)sums[j];
    return NULL;
}

/* Each shape once, weighed by how often a slice has it. */
static void *multiply(void *context)
{
    struct probe *p = context;
    pthread_barrier_wait(p->start);
    for (size_t i = 0; i < p->shape_count; i++) {
        const struct shape *s = &p->shapes[i];
        const uint32_t from = (uint32_t)((uint64_t)s->n * p->part / p->parts);
        const uint32_t to = (uint32_t)((uint64_t)s->n * (p->part + 1) / p->parts);
        const double begin = now();
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (blasint)p->rows, (blasint)(to - from),
                    (blasint)s->k, 1, p->a, (blasint)s->k, p->b + (size_t)from * s->k,
                    (blasint)s->k, 0, p->c + from, (blasint)s->n);
        p->seconds += s->count * (now() - begin);
    }
    return NULL;
}

/* Runs `probes` at the same time; returns the seconds from start to end. */
static double run_probes(struct probe *probes, uint32_t count, void *(*body)(void *))
{
    pthread_t ids[THREADS_MAX];
    pthread_barrier_t start;
    ASSERT(!pthread_barrier_init(&start, NULL, count + 1));
    for (uint32_t i = 0; i < count; i++) {
        probes[i].start = &start;
        ASSERT(!pthread_create(&ids[i], NULL, body, &probes[i]));
    }
    pthread_barrier_wait(&start);
    const double begin = now();
    for (uint32_t i = 0; i < count; i++)
        pthread_join(ids[i], NULL);
    const double seconds = now() - begin;
    pthread_barrier_destroy(&start);
    return seconds;
}

/* ---- the model ---- */

struct bench {
    struct ram ram;
    struct engine *engine;
    const struct engine_info *info;
    uint32_t threads, rounds;
    FILE *csv;
    uint64_t branch;
    char *probe_memory;
    float *a, *b, *c; /* of the sgemm probe */
    struct shape shapes[16];
    size_t shape_count;
};

static uint32_t hsa_layers(const struct model_config *c)
{
    uint32_t count = 0;
    for (uint32_t i = 0; i < c->layer_count; i++)
        count += c->layers[i] == MODEL_LAYER_HSA;
    return count;
}

static void add_shape(struct bench *b, uint32_t n, uint32_t k, double count)
{
    if (n && count > 0)
        b->shapes[b->shape_count++] = (struct shape){n, k, count};
}

/* Every weight matrix that a slice goes through. The encoder has S + 1 rows for S tokens. */
static void list_shapes(struct bench *b)
{
    const struct model_config *c = b->info->config;
    const uint32_t d = c->hidden_size;
    const double encoded = (double)(c->chunk_tokens + 1) / c->chunk_tokens;
    const double layers = c->encoder_layers * encoded;
    add_shape(b, c->proj_size, d, c->mamba_count);
    add_shape(b, d, c->inner_size, c->mamba_count);
    add_shape(b, d, d, 2.0 * hsa_layers(c) + 2 * layers);
    add_shape(b, c->encoder_kv_heads * c->head_dim, d, 2 * layers);
    add_shape(b, c->encoder_mlp_size, d, 2 * layers);
    add_shape(b, d, c->encoder_mlp_size, layers);
    add_shape(b, c->kv_heads * c->head_dim, d, 2 * encoded);
    add_shape(b, c->retrieval_dim, d, c->group_count);
    size_t widest = 0, weights = 0, outputs = 0;
    for (size_t i = 0; i < b->shape_count; i++) {
        const size_t n = b->shapes[i].n, k = b->shapes[i].k;
        widest = k > widest ? k : widest;
        weights = n * k > weights ? n * k : weights;
        outputs = n > outputs ? n : outputs;
    }
    b->a = take(b->info->slice_tokens * widest * sizeof(float));
    b->b = take(weights * sizeof(float));
    b->c = take(b->info->slice_tokens * outputs * sizeof(float));
    for (size_t i = 0; i < weights; i++)
        b->b[i] = (float)(i % 17) * 0.1f;
}

/* Operations of a slice's products, and of the rest a token: the landmark scan, the attention to
 * the picks, the attention in the encoder, the recurrence in blocks of 64 tokens. */
static double product_operations(const struct bench *b)
{
    double sum = 0;
    for (size_t i = 0; i < b->shape_count; i++)
        sum += 2.0 * b->shapes[i].count * b->shapes[i].n * b->shapes[i].k * b->info->slice_tokens;
    return sum;
}

static double other_operations(const struct bench *b, uint64_t context)
{
    const struct model_config *c = b->info->config;
    const double scan =
        2.0 * (double)(context / c->chunk_tokens) * c->retrieval_dim * c->group_count;
    const double attend = 4.0 * c->topk * c->chunk_tokens * c->hidden_size * hsa_layers(c);
    const double encoder = 4.0 * c->encoder_layers * (c->chunk_tokens + 1) * c->hidden_size;
    const double ssd =
        c->mamba_count * (2.0 * 64 * c->state_groups * c->state_size + 2.0 * 64 * c->inner_size +
                          4.0 * c->inner_size * c->state_size);
    return scan + attend + encoder + ssd;
}

/* Seconds that the products of one slice take with sgemm, and the rest at the same rate. */
static double prefill_floor(const struct bench *b, uint64_t context, double *rate)
{
    struct probe probes[THREADS_MAX];
    for (uint32_t i = 0; i < b->threads; i++)
        probes[i] = (struct probe){.shapes = b->shapes,
                                   .shape_count = b->shape_count,
                                   .rows = b->info->slice_tokens,
                                   .part = i,
                                   .parts = b->threads,
                                   .a = b->a,
                                   .b = b->b,
                                   .c = b->c};
    run_probes(probes, b->threads, multiply);
    double seconds = 0; /* of the slowest: a product ends with its last part */
    for (uint32_t i = 0; i < b->threads; i++)
        seconds = probes[i].seconds > seconds ? probes[i].seconds : seconds;
    *rate = product_operations(b) / seconds;
    return seconds + other_operations(b, context) * b->info->slice_tokens / *rate;
}

/* Bytes that a decode step of `sequences` must move. */
static double decode_bytes(const struct bench *b, uint64_t context, uint32_t sequences)
{
    const struct model_config *c = b->info->config;
    /* A state is read and written. The encoder runs once in S tokens, the embedding gives a row. */
    const double state = 2.0 * 4 * c->mamba_count * (double)c->inner_size * c->state_size;
    const double landmarks =
        (double)(context / c->chunk_tokens) * (double)b->info->landmark_bytes * c->group_count;
    const double pages =
        (double)b->info->kv_bytes * c->topk * c->retrieval_heads / c->kv_heads * c->group_count;
    const double d = c->hidden_size, weights = (double)model_config_parameters(c);
    const double encoder =
        c->encoder_layers *
        (2.0 * d * d + 2.0 * d * c->encoder_kv_heads * c->head_dim + 3.0 * d * c->encoder_mlp_size);
    const double idle =
        encoder * (1 - 1.0 / c->chunk_tokens) + (c->tie_word_embeddings ? 0 : d * c->vocab_size);
    return (double)b->info->weight_bytes * (weights - idle) / weights +
           sequences * (state + landmarks + pages);
}

/* Seconds to read `bytes` with all threads, from as large a memory. */
static double decode_floor(const struct bench *b, double bytes)
{
    struct probe probes[THREADS_MAX];
    const size_t whole = (size_t)bytes < PROBE_BYTES ? (size_t)bytes : PROBE_BYTES;
    const size_t part = whole / b->threads / 64 * 64;
    const size_t repeats = (size_t)(2e8 / bytes) + 1; /* small ones often enough to be timed */
    for (uint32_t i = 0; i < b->threads; i++)
        probes[i] = (struct probe){.memory = (const float *)(b->probe_memory + i * part),
                                   .bytes = part,
                                   .repeats = repeats};
    const double seconds = run_probes(probes, b->threads, read_memory);
    return seconds / (double)(repeats * part * b->threads) * bytes;
}

/* A session at `position` with a random past. */
static struct engine_session *session_at(struct bench *b, uint64_t position)
{
    const struct chunk_range range = {.branch = ++b->branch};
    struct engine_session *session, *placed;
    struct error err = {0};
    ASSERT(!engine_session_create(b->engine, &range, 1, NULL, 0, &session, &err));
    const size_t size = engine_session_snapshot_bytes(session);
    char *snapshot = take(size);
    engine_session_snapshot(session, snapshot);
    memcpy(snapshot + 16, &position, sizeof position); /* the header's position: see session.c */
    ASSERT(!engine_session_create(b->engine, &range, 1, snapshot, size, &placed, &err));
    free(snapshot);
    engine_session_destroy(session);
    return placed;
}

/* Seconds of one slice. */
static double prefill(struct bench *b, struct engine_session *session)
{
    const uint32_t n = b->info->slice_tokens;
    int32_t *tokens = take(n * sizeof *tokens);
    for (uint32_t i = 0; i < n; i++)
        tokens[i] = (int32_t)(i * 7919u % b->info->config->vocab_size);
    struct engine_step_item item = {.session = session, .tokens = tokens, .token_count = n};
    const double begin = now();
    ASSERT(!engine_step(b->engine, &item, 1) && !item.status);
    acknowledge(&b->ram);
    const double seconds = now() - begin;
    free(tokens);
    return seconds;
}

/* Seconds a step of `count` sequences. */
static double decode(struct bench *b, struct engine_session **sessions, uint32_t count)
{
    struct engine_step_item items[MANY];
    int32_t tokens[MANY];
    const double begin = now();
    for (uint32_t step = 0; step < DECODE_STEPS; step++) {
        for (uint32_t i = 0; i < count; i++) {
            tokens[i] = (int32_t)((step * MANY + i) * 104729u % b->info->config->vocab_size);
            items[i] = (struct engine_step_item){.session = sessions[i],
                                                 .tokens = &tokens[i],
                                                 .token_count = 1,
                                                 .want_logits = true};
        }
        ASSERT(!engine_step(b->engine, items, count));
        for (uint32_t i = 0; i < count; i++)
            ASSERT(!items[i].status);
        acknowledge(&b->ram);
    }
    return (now() - begin) / DECODE_STEPS;
}

/* ---- rounds and what they say ---- */

static int ascending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(const double *values, uint32_t count)
{
    double sorted[ROUNDS_MAX];
    memcpy(sorted, values, count * sizeof *values);
    qsort(sorted, count, sizeof *sorted, ascending);
    return (sorted[(count - 1) / 2] + sorted[count / 2]) / 2;
}

/* One figure: seconds, its floor's seconds, their ratio round by round. */
struct figure {
    double seconds[ROUNDS_MAX], floor[ROUNDS_MAX], over[ROUNDS_MAX];
    uint32_t count;
};

static void note(struct figure *f, double seconds, double floor)
{
    f->seconds[f->count] = seconds;
    f->floor[f->count] = floor;
    f->over[f->count++] = seconds / floor;
}

struct measured {
    struct figure prefill, one, many;
    double sgemm[ROUNDS_MAX], gain[ROUNDS_MAX];
};

static void measure_round(struct bench *b, uint64_t context, struct engine_session **sessions,
                          struct measured *m)
{
    const double one_bytes = decode_bytes(b, context, 1);
    const double many_bytes = decode_bytes(b, context, MANY);
    const uint32_t round = m->prefill.count;
    /* The floor before and after: what else the machine does hits both alike. */
    double before = prefill_floor(b, context, &m->sgemm[round]);
    const double slice = prefill(b, sessions[0]);
    note(&m->prefill, slice, (before + prefill_floor(b, context, &m->sgemm[round])) / 2);
    before = decode_floor(b, one_bytes);
    const double one = decode(b, sessions, 1);
    note(&m->one, one, (before + decode_floor(b, one_bytes)) / 2);
    before = decode_floor(b, many_bytes);
    const double many = decode(b, sessions, MANY);
    note(&m->many, many, (before + decode_floor(b, many_bytes)) / 2);
    m->gain[round] = MANY * one / many;
}

static void report(struct bench *b, uint64_t context, const struct measured *m, double memory)
{
    const uint32_t n = m->prefill.count, slice = b->info->slice_tokens;
    const double prefill_s = median(m->prefill.seconds, n) / slice;
    const double prefill_least = median(m->prefill.floor, n) / slice;
    const double one = median(m->one.seconds, n), one_least = median(m->one.floor, n);
    const double many = median(m->many.seconds, n), many_least = median(m->many.floor, n);
    const double values[] = {1 / prefill_s,
                             1 / prefill_least,
                             median(m->prefill.over, n),
                             1 / one,
                             1 / one_least,
                             median(m->one.over, n),
                             MANY / many,
                             MANY / many_least,
                             median(m->many.over, n),
                             median(m->gain, n),
                             median(m->sgemm, n) / 1e9,
                             decode_bytes(b, context, 1) / one_least / 1e9,
                             memory};
    printf("%9llu %8.0f %8.0f %5.2fx %8.1f %8.1f %5.2fx %8.1f %8.1f %5.2fx %5.2fx %7.0f %6.1f "
           "%6.1f\n",
           (unsigned long long)context, values[0], values[1], values[2], values[3], values[4],
           values[5], values[6], values[7], values[8], values[9], values[10], values[11],
           values[12]);
    fflush(stdout);
    if (!b->csv)
        return;
    fprintf(b->csv, "%s,%u,%llu", b->info->model_name, b->threads, (unsigned long long)context);
    for (size_t i = 0; i < sizeof values / sizeof *values; i++)
        fprintf(b->csv, ",%.6g", values[i]);
    fprintf(b->csv, "\n");
    fflush(b->csv);
}

static void measure(struct bench *b, uint64_t context)
{
    struct engine_session *sessions[MANY];
    struct measured *m = take(sizeof *m);
    const size_t empty = engine_session_bytes(sessions[0] = session_at(b, 0));
    engine_session_destroy(sessions[0]);
    for (uint32_t i = 0; i < MANY; i++)
        sessions[i] = session_at(b, context);
    /* A context's landmarks stay resident; its pages do while there is room for them. */
    const double memory = (double)(engine_session_bytes(sessions[0]) - empty) / (double)context +
                          (double)b->info->kv_bytes / b->info->config->chunk_tokens;
    prefill(b, sessions[0]);
    decode(b, sessions, MANY);
    for (uint32_t i = 0; i < b->rounds; i++)
        measure_round(b, context, sessions, m);
    report(b, context, m, memory);
    free(m);
    for (uint32_t i = 0; i < MANY; i++)
        engine_session_destroy(sessions[i]);
}

/* ---- the command ---- */

static int usage(void)
{
    printf(
        "rambad bench [--model DIR] [--threads N] [--lengths 4096,65536,...] [--rounds N]\n"
        "             [--csv FILE]\n\n"
        "Prefill and decode against context length. DIR may hold config.json alone: then the\n"
        "weights are random, for the speed of a shape. The past of each length is random numbers\n"
        "that come through the same door as stored chunks, not a prefilled text.\n\n"
        "  prefill   one slice of one sequence; floor: its products by OpenBLAS's sgemm\n"
        "  decode    64 steps of one sequence; floor: reading weights, state (twice: it is\n"
        "            written too), landmarks and picked pages once, with the same threads\n"
        "  8 at once the same of eight sequences with pasts of their own; gain: over one\n"
        "  over      time over the floor's time, measured before and after in each round\n"
        "  memory    bytes a token of the past: landmarks, and pages when all are resident\n\n"
        "Figures are medians over the rounds.\n\n"
        "rambad bench --url URL measures a running server; see rambad bench --url --help.\n");
    return 0;
}

static void print_load(const char *when)
{
    char line[64] = "";
    FILE *file = fopen("/proc/loadavg", "re");
    if (!file)
        return;
    if (fgets(line, sizeof line, file))
        printf("load %s: %.*s (this process included)\n", when, (int)strcspn(line, "/\n"), line);
    fclose(file);
}

static void print_head(const struct bench *b)
{
    printf("model %s: %.1fM parameters, %.0f MB; %s; OpenBLAS for the floor: %s; %u rounds\n",
           b->info->model_name, (double)model_config_parameters(b->info->config) / 1e6,
           (double)b->info->weight_bytes / 1e6, b->info->backend, openblas_get_corename(),
           b->rounds);
    printf("the past is random landmarks and pages, not a prefilled text\n");
    print_load("before");
    printf("\n%9s %24s %24s %31s %7s %6s %6s\n", "context", "prefill tok/s", "decode tok/s",
           "8 at once tok/s", "sgemm", "read", "memory");
    printf("%9s %8s %8s %6s %8s %8s %6s %8s %8s %6s %6s %7s %6s %6s\n", "tokens", "", "floor",
           "over", "", "floor", "over", "", "floor", "over", "gain", "GFLOP/s", "GB/s", "B/tok");
}

static bool open_csv(struct bench *b, const char *path)
{
    b->csv = fopen(path, "ae");
    if (!b->csv) {
        fprintf(stderr, "rambad: %s cannot be written\n", path);
        return false;
    }
    if (ftell(b->csv) == 0)
        fprintf(b->csv, "model,threads,context,prefill,prefill_floor,prefill_over,decode,"
                        "decode_floor,decode_over,decode8,decode8_floor,decode8_over,decode8_gain,"
                        "sgemm_gflops,read_gbs,memory_bytes_per_token\n");
    return true;
}

static int run(struct bench *b, const char *lengths)
{
    list_shapes(b);
    b->probe_memory = take(PROBE_BYTES);
    print_head(b);
    for (const char *at = lengths; *at;) {
        char *end;
        const uint64_t context = strtoull(at, &end, 10), s = b->info->config->chunk_tokens;
        if (context < s || (*end && *end != ','))
            return usage(), 2;
        measure(b, context / s * s);
        at = *end ? end + 1 : end;
    }
    struct rusage use;
    getrusage(RUSAGE_SELF, &use);
    printf("\npeak resident memory %.0f MB, of it %.0f MB for measuring the floors\n",
           (double)use.ru_maxrss / 1024, (double)PROBE_BYTES / 1e6);
    print_load("after");
    return 0;
}

int bench_main(int argc, char **argv)
{
    const char *model = "engine/models/ramba-20m", *lengths = "4096,16384,65536,262144,1048576";
    const char *csv = NULL;
    for (int i = 1; i < argc; i++)
        if (strcmp(argv[i], "--url") == 0)
            return load_main(argc, argv);
    unsigned long threads = (unsigned long)sysconf(_SC_NPROCESSORS_ONLN), rounds = 5;
    for (int i = 1; i < argc; i += 2) {
        if (i + 1 == argc || strcmp(argv[i], "--help") == 0)
            return usage();
        if (strcmp(argv[i], "--model") == 0)
            model = argv[i + 1];
        else if (strcmp(argv[i], "--lengths") == 0)
            lengths = argv[i + 1];
        else if (strcmp(argv[i], "--csv") == 0)
            csv = argv[i + 1];
        else if (strcmp(argv[i], "--threads") == 0)
            threads = strtoul(argv[i + 1], NULL, 10);
        else if (strcmp(argv[i], "--rounds") == 0)
            rounds = strtoul(argv[i + 1], NULL, 10);
        else
            return usage(), 2;
    }
    if (threads < 1 || threads > THREADS_MAX || rounds < 1 || rounds > ROUNDS_MAX)
        return usage(), 2;
    struct bench b = {.threads = (uint32_t)threads, .rounds = (uint32_t)rounds};
    struct error err = {0};
    const struct engine_options options = {
        .model_path = model,
        .backend = ENGINE_BACKEND_CPU, /* the floors are this processor's */
        .threads = b.threads,
        .host_memory_bytes = (size_t)512 << 20,
        .random_weights_seed = 1,
        .io = {&b.ram, append_room, append, read_chunks, read_landmarks}};
    openblas_set_num_threads(1); /* the probes are threads of ours */
    if (csv && !open_csv(&b, csv))
        return 1;
    if (engine_open(&options, &b.engine, &err)) {
        fprintf(stderr, "rambad: %s\n", err.message);
        return 1;
    }
    b.info = engine_get_info(b.engine);
    ram_open(&b.ram, b.engine);
    const int code = run(&b, lengths);
    engine_close(b.engine);
    ram_close(&b.ram);
    if (b.csv)
        fclose(b.csv);
    free(b.probe_memory);
    free(b.a);
    free(b.b);
    free(b.c);
    return code;
}
