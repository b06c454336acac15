/* bench.c - see bench.h. Prefill and decode against context length, with the floor of each figure:
 * decode moves the weights, the recurrent state and the landmarks once a token, at the memory
 * bandwidth measured here; prefill multiplies matrices, at the sgemm rate measured here. */
#include "server/bench.h"

#include <cblas.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "engine/engine.h"
#include "proto/base/assert.h"

#define SAMPLE_TOKENS 512 /* prefilled for a measurement at each length */
#define DECODE_STEPS 16

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- a memory in RAM, for what storage would hold ---- */

/* The chunks of a bench are made of one run of text copied again and again: the past's length is
 * what is measured, not its words. Chunk i of any branch is the stored chunk i % kept. */
struct ram {
    struct engine *engine;
    size_t kv_bytes, landmark_bytes;
    char *kv, *landmarks;
    struct chunk_key *waiting;
    size_t waiting_count, waiting_capacity;
};

#define KEPT 256

static size_t append_room(void *context)
{
    (void)context;
    return 1u << 20;
}

static enum status append(void *context, struct chunk_key key, const void *kv, const void *landmark)
{
    struct ram *ram = context;
    const size_t slot = key.index % KEPT;
    memcpy(ram->kv + slot * ram->kv_bytes, kv, ram->kv_bytes);
    memcpy(ram->landmarks + slot * ram->landmark_bytes, landmark, ram->landmark_bytes);
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
        memcpy(reads[i].kv, ram->kv + reads[i].key.index % KEPT * ram->kv_bytes, ram->kv_bytes);
    return STATUS_OK;
}

static enum status read_landmarks(void *context, uint64_t branch, uint64_t first, uint64_t count,
                                  void *out)
{
    const struct ram *ram = context;
    (void)branch;
    for (uint64_t i = 0; i < count; i++)
        memcpy((char *)out + i * ram->landmark_bytes,
               ram->landmarks + (first + i) % KEPT * ram->landmark_bytes, ram->landmark_bytes);
    return STATUS_OK;
}

static void acknowledge(struct ram *ram)
{
    for (size_t i = 0; i < ram->waiting_count; i++)
        engine_chunk_durable(ram->engine, ram->waiting[i], STATUS_OK);
    ram->waiting_count = 0;
}

/* ---- what the machine can do ---- */

struct probe {
    float *memory;
    size_t count;
    double sum;
};

static void *read_memory(void *context)
{
    struct probe *p = context;
    float sums[64] = {0};
    for (size_t i = 0; i + 64 <= p->count; i += 64)
        for (size_t j = 0; j < 64; j++)
            sums[j] += p->memory[i + j];
    for (size_t j = 0; j < 64; j++)
        p->sum += (double)sums[j];
    return NULL;
}

/* Bytes a second that `threads` threads read together, the best of five. */
static double measure_bandwidth(uint32_t threads)
{
    const size_t bytes = (size_t)256 << 20;
    struct probe probes[64];
    pthread_t ids[64];
    double best = 0;
    ASSERT(threads <= 64);
    for (uint32_t i = 0; i < threads; i++) {
        probes[i] = (struct probe){.memory = malloc(bytes), .count = bytes / sizeof(float)};
        ASSERT(probes[i].memory);
        memset(probes[i].memory, 1, bytes);
    }
    for (int round = 0; round < 5; round++) {
        const double begin = now();
        for (uint32_t i = 0; i < threads; i++)
            ASSERT(!pthread_create(&ids[i], NULL, read_memory, &probes[i]));
        for (uint32_t i = 0; i < threads; i++)
            pthread_join(ids[i], NULL);
        const double rate = (double)bytes * threads / (now() - begin);
        best = rate > best ? rate : best;
    }
    for (uint32_t i = 0; i < threads; i++)
        free(probes[i].memory);
    return best;
}

static void *multiply(void *context)
{
    struct probe *p = context;
    enum { N = 512 };
    for (int i = 0; i < 40; i++)
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, N, N, N, 1, p->memory, N,
                    p->memory + N * N, N, 0, p->memory + 2 * N * N, N);
    return NULL;
}

/* Operations a second of `threads` single-threaded sgemm together, the best of five. */
static double measure_sgemm(uint32_t threads)
{
    const size_t n = 512;
    struct probe probes[64];
    pthread_t ids[64];
    double best = 0;
    openblas_set_num_threads(1);
    for (uint32_t i = 0; i < threads; i++) {
        probes[i] = (struct probe){.memory = calloc(3 * n * n, sizeof(float))};
        ASSERT(probes[i].memory);
        for (size_t j = 0; j < 2 * n * n; j++)
            probes[i].memory[j] = (float)(j % 17) * 0.1f;
    }
    for (int round = 0; round < 5; round++) {
        const double begin = now();
        for (uint32_t i = 0; i < threads; i++)
            ASSERT(!pthread_create(&ids[i], NULL, multiply, &probes[i]));
        for (uint32_t i = 0; i < threads; i++)
            pthread_join(ids[i], NULL);
        const double rate = 40 * 2.0 * (double)(n * n * n) * threads / (now() - begin);
        best = rate > best ? rate : best;
    }
    for (uint32_t i = 0; i < threads; i++)
        free(probes[i].memory);
    return best;
}

/* ---- the model ---- */

struct bench {
    struct ram ram;
    struct engine *engine;
    const struct engine_info *info;
    double bandwidth, sgemm;
    FILE *csv;
    uint64_t branch;
};

/* Operations a token of prefill: every weight matrix of the layers once, the landmark scan, the
 * attention to the picks. */
static double prefill_operations(const struct model_config *c, uint64_t context)
{
    const double weights =
        (double)model_config_parameters(c) -
        (double)c->vocab_size * c->hidden_size * (c->tie_word_embeddings ? 1 : 2);
    double hsa = 0;
    for (uint32_t i = 0; i < c->layer_count; i++)
        hsa += c->layers[i] == MODEL_LAYER_HSA;
    const double scan =
        2.0 * (double)(context / c->chunk_tokens) * c->retrieval_dim * c->group_count;
    const double attend = 4.0 * c->topk * c->chunk_tokens * c->heads * c->head_dim * hsa;
    /* B, C and the state of every head, in blocks of 64 tokens. */
    const double ssd =
        c->mamba_count * (2.0 * 64 * c->state_groups * c->state_size + 2.0 * 64 * c->inner_size +
                          4.0 * c->inner_size * c->state_size);
    return 2 * weights + scan + attend + ssd;
}

/* Bytes a decode step of `sequences` must move. */
static double decode_bytes(const struct bench *b, uint64_t context, uint32_t sequences)
{
    const struct model_config *c = b->info->config;
    double hsa = 0;
    for (uint32_t i = 0; i < c->layer_count; i++)
        hsa += c->layers[i] == MODEL_LAYER_HSA;
    const double state = 2.0 * 4 * c->mamba_count * (double)c->inner_size * c->state_size;
    const double landmarks =
        (double)(context / c->chunk_tokens) * (double)b->info->landmark_bytes * c->group_count;
    const double pages =
        (double)b->info->kv_bytes * c->topk * c->retrieval_heads / c->kv_heads * hsa;
    /* The chunk encoder runs once in S tokens; its weights are left out of the floor. */
    return (double)b->info->weight_bytes + sequences * (state + landmarks + pages);
}

/* A session at `position` whose past is copies of the first chunks. */
static struct engine_session *session_at(struct bench *b, uint64_t position)
{
    const struct chunk_range range = {.branch = ++b->branch};
    struct engine_session *session, *placed;
    struct error err = {0};
    ASSERT(!engine_session_create(b->engine, &range, 1, NULL, 0, &session, &err));
    if (!position)
        return session;
    const size_t size = engine_session_snapshot_bytes(session);
    char *snapshot = malloc(size);
    ASSERT(snapshot);
    engine_session_snapshot(session, snapshot);
    memcpy(snapshot + 16, &position, sizeof position); /* the header's position: see session.c */
    ASSERT(!engine_session_create(b->engine, &range, 1, snapshot, size, &placed, &err));
    free(snapshot);
    engine_session_destroy(session);
    return placed;
}

static double prefill(struct bench *b, struct engine_session *session, uint32_t count)
{
    int32_t tokens[LIMITS_SLICE_TOKENS];
    const double begin = now();
    for (uint32_t done = 0; done < count;) {
        uint32_t n = b->info->slice_tokens;
        n = n < count - done ? n : count - done;
        for (uint32_t i = 0; i < n; i++)
            tokens[i] = (int32_t)((done + i * 7919u) % b->info->config->vocab_size);
        struct engine_step_item item = {.session = session, .tokens = tokens, .token_count = n};
        ASSERT(!engine_step(b->engine, &item, 1) && !item.status);
        acknowledge(&b->ram);
        done += n;
    }
    return now() - begin;
}

/* Seconds a step of `count` sequences. */
static double decode(struct bench *b, struct engine_session **sessions, uint32_t count)
{
    struct engine_step_item items[8];
    int32_t tokens[8];
    double begin = 0;
    for (int step = -2; step < DECODE_STEPS; step++) {
        if (step == 0)
            begin = now();
        for (uint32_t i = 0; i < count; i++) {
            tokens[i] = (int32_t)((unsigned)(step + 3) * 104729u % b->info->config->vocab_size);
            items[i] = (struct engine_step_item){.session = sessions[i],
                                                 .tokens = &tokens[i],
                                                 .token_count = 1,
                                                 .want_logits = true};
        }
        ASSERT(!engine_step(b->engine, items, count));
        acknowledge(&b->ram);
    }
    return (now() - begin) / DECODE_STEPS;
}

static void measure(struct bench *b, uint64_t context)
{
    struct engine_session *sessions[8];
    const struct model_config *c = b->info->config;
    sessions[0] = session_at(b, context);
    const double prefill_s = prefill(b, sessions[0], SAMPLE_TOKENS) / SAMPLE_TOKENS;
    const double one = decode(b, sessions, 1);
    for (uint32_t i = 1; i < 8; i++)
        ASSERT(!engine_session_fork(sessions[0], ++b->branch, &sessions[i]));
    const double eight = decode(b, sessions, 8);
    const double past = (double)context / c->chunk_tokens *
                        (double)(b->info->kv_bytes + b->info->landmark_bytes) /
                        (double)(context ? context : 1);
    const double prefill_floor = prefill_operations(c, context) / b->sgemm;
    const double decode_floor = decode_bytes(b, context, 1) / b->bandwidth;
    printf("%10llu %10.0f %9.0f%% %10.1f %9.2fx %10.1f %8.2fx %12.0f\n",
           (unsigned long long)context, 1 / prefill_s, 100 * prefill_floor / prefill_s, 1 / one,
           one / decode_floor, 8 / eight, 8 * one / eight, past);
    fflush(stdout);
    if (b->csv)
        fprintf(b->csv, "%s,%llu,%.6g,%.6g,%.6g,%.6g,%.6g,%.6g\n", b->info->model_name,
                (unsigned long long)context, 1 / prefill_s, 1 / prefill_floor, 1 / one,
                1 / decode_floor, 8 / eight, past);
    for (uint32_t i = 0; i < 8; i++)
        engine_session_destroy(sessions[i]);
}

static int usage(void)
{
    printf("rambad bench [--model DIR] [--threads N] [--lengths 4096,65536,...] [--csv FILE]\n\n"
           "Prefill and decode against context length. DIR may hold config.json alone: then the\n"
           "weights are random, for the speed of a shape. The past of each length is synthetic;\n"
           "landmarks and pages are read as a real one's would be, from RAM.\n\n"
           "  prefill of floor   100%% is every product at this machine's sgemm rate\n"
           "  decode of floor    1.00x is every byte read once at this machine's bandwidth\n");
    return 0;
}

static void print_head(const struct bench *b, uint32_t threads)
{
    printf("model %s (%.1fM parameters, %.0f MB), %s\n", b->info->model_name,
           (double)model_config_parameters(b->info->config) / 1e6,
           (double)b->info->weight_bytes / 1e6, b->info->backend);
    printf("memory bandwidth %.1f GB/s, sgemm %.0f GFLOP/s (%s), %u threads\n\n",
           b->bandwidth / 1e9, b->sgemm / 1e9, openblas_get_corename(), threads);
    printf("%10s %10s %10s %10s %10s %10s %9s %12s\n", "context", "prefill", "of sgemm", "decode",
           "of floor", "8 at once", "over one", "bytes/token");
    printf("%10s %10s %10s %10s %10s %10s %9s %12s\n", "tokens", "tok/s", "", "tok/s", "", "tok/s",
           "", "of the past");
}

int bench_main(int argc, char **argv)
{
    const char *model = "engine/models/ramba-6m", *lengths = "4096,16384,65536,262144,1048576";
    const char *csv = NULL;
    uint32_t threads = (uint32_t)sysconf(_SC_NPROCESSORS_ONLN);
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
            threads = (uint32_t)strtoul(argv[i + 1], NULL, 10);
        else
            return usage(), 2;
    }
    if (threads < 1 || threads > 64)
        return usage(), 2;
    struct bench b = {0};
    struct error err = {0};
    const struct engine_options options = {
        .model_path = model,
        .threads = threads,
        .host_memory_bytes = (size_t)256 << 20,
        .random_weights_seed = 1,
        .io = {&b.ram, append_room, append, read_chunks, read_landmarks}};
    if (engine_open(&options, &b.engine, &err)) {
        fprintf(stderr, "rambad: %s\n", err.message);
        return 1;
    }
    b.info = engine_get_info(b.engine);
    b.ram = (struct ram){.engine = b.engine,
                         .kv_bytes = b.info->kv_bytes,
                         .landmark_bytes = b.info->landmark_bytes,
                         .kv = calloc(KEPT, b.info->kv_bytes),
                         .landmarks = calloc(KEPT, b.info->landmark_bytes)};
    ASSERT(b.ram.kv && b.ram.landmarks);
    b.bandwidth = measure_bandwidth(threads);
    b.sgemm = measure_sgemm(threads);
    if (csv && !(b.csv = fopen(csv, "ae")))
        fprintf(stderr, "rambad: %s cannot be written\n", csv);
    print_head(&b, threads);
    struct engine_session *first = session_at(&b, 0); /* fills the kept chunks with real ones */
    prefill(&b, first,
            KEPT * b.info->config->chunk_tokens < 8192 ? KEPT * b.info->config->chunk_tokens
                                                       : 8192);
    engine_session_destroy(first);
    for (const char *at = lengths; *at;) {
        char *end;
        const uint64_t context = strtoull(at, &end, 10);
        measure(&b, context / b.info->config->chunk_tokens * b.info->config->chunk_tokens);
        at = *end ? end + 1 : end;
        if (end == at)
            break;
    }
    struct rusage use;
    getrusage(RUSAGE_SELF, &use);
    printf("\npeak resident memory %.0f MB\n", (double)use.ru_maxrss / 1024);
    if (b.csv)
        fclose(b.csv);
    engine_close(b.engine);
    free(b.ram.kv);
    free(b.ram.landmarks);
    free(b.ram.waiting);
    return 0;
}
