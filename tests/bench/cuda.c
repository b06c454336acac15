/* Times of the CUDA backend at the 370M shape with random weights, through the engine: decode steps
 * and prefill, each over its floor, and the share of each op.
 *
 * The floor of a row is what its bytes take at the bandwidth of a copy on the device, or its
 * operations at the rate of a large bf16 product, whichever is more; both are measured first, in
 * the same run, through the same table of ops. The share of an op comes from steps of their own,
 * op by op and not in recorded parts, in which the device is waited for after each: `host` is how
 * long the calls took in steps without these waits, so where the sum of `host` is close to the
 * step's time, launches bound it. Decoding is greedy, each token the one before it gave; it is
 * timed with the pages that it reads on the device, as the floor has them, and, told apart, while
 * they come.
 * Prefill goes on behind a past that nobody wrote, whose pages are nowhere when its session begins.
 * Random weights pick at random, so the first slice reads most of the past, as no slice of a text
 * does: it is told apart, with the pages that it read, and a slice's time is that of slices that
 * find their pages here, as those of a prompt do that was read just now.
 *
 *   bench_cuda [--csv FILE] [--only WHAT-ROWS-CONTEXT] [--plain] [--fp8] [--bf16]
 * Prints a table, and writes the same as CSV; `--only decode-1-4096` for one row, or a part of its
 * name for some; --plain for decoding without recorded parts; --fp8 with landmarks in fp8, --bf16
 * with states in bf16. Each row says how much of the device's memory is in use with its sequences
 * open, and how much of that their landmarks are. Exits with 77 without a GPU. Runs from the
 * repository's root. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "engine/engine_private.h"
#include "proto/base/assert.h"
#include "proto/limits.h"
#include "tests/lib/noise_io.h"

#define SECONDS_MAX 100 /* rows after that are left out, and said to be */
#define WARM_SLICES 8   /* of prefill, at most, until no page is missing */

static FILE *csv;
static double began, bandwidth, rate; /* bytes/s, operations/s */

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* ---- what the device can do ---- */

static void wait_for(const struct ops *ops, struct ops_context *context)
{
    struct error err = {0};
    if (ops->check(context, &err)) {
        printf("FAIL: %s\n", err.message);
        exit(1);
    }
}

/* Bytes read and written in a second by copies of 1 GiB on the device. */
static double measure_bandwidth(const struct ops *ops, struct ops_context *context)
{
    const size_t bytes = (size_t)1 << 30;
    const int times = 20;
    void *from = ops->alloc(context, bytes), *to = ops->alloc(context, bytes);
    ASSERT(from && to);
    ops->copy(context, to, from, bytes);
    wait_for(ops, context);
    const double begin = now();
    for (int i = 0; i < times; i++)
        ops->copy(context, to, from, bytes);
    wait_for(ops, context);
    const double seconds = now() - begin;
    ops->release(context, from);
    ops->release(context, to);
    return 2.0 * (double)bytes * times / seconds;
}

#define PRODUCT_ROWS 4096
#define PRODUCT_DEPTH 4096
#define PRODUCT_COLUMNS 32768

/* Operations in a second of a product as the engine's long ones are: bf16 in, fp32 out; with the
 * norm before it, some two percent of the time. */
static double measure_rate(const struct ops *ops, struct ops_context *context,
                           const uint16_t *noise, size_t noise_count)
{
    const int times = 20;
    const size_t inputs = (size_t)PRODUCT_ROWS * PRODUCT_DEPTH,
                 weights = (size_t)PRODUCT_COLUMNS * PRODUCT_DEPTH;
    uint16_t *matrix = malloc(weights * sizeof *matrix);
    float *host = malloc(inputs * sizeof *host);
    float *x = ops->alloc(context, inputs * sizeof *x);
    float *out = ops->alloc(context, (size_t)PRODUCT_ROWS * PRODUCT_COLUMNS * sizeof *out);
    ASSERT(matrix && host && x && out);
    for (size_t i = 0; i < weights; i += noise_count)
        memcpy(matrix + i, noise, noise_count * sizeof *noise); /* a whole number of times */
    for (size_t i = 0; i < inputs; i++)
        host[i] = (float)(i * 7919 % 2001) / 1000 - 1;
    ops->copy(context, x, host, inputs * sizeof *x);
    struct ops_tensor head = {matrix, OPS_BF16, PRODUCT_COLUMNS, PRODUCT_DEPTH};
    float ones[PRODUCT_DEPTH];
    for (size_t i = 0; i < PRODUCT_DEPTH; i++)
        ones[i] = 1;
    struct ops_tensor norm = {ones, OPS_FP32, 1, PRODUCT_DEPTH};
    struct error err;
    ASSERT(!ops->place(context, &head, &err) && !ops->place(context, &norm, &err));
    const struct ops_segment segment = {.count = PRODUCT_ROWS};
    const struct ops_rows rows = {&segment, 1, PRODUCT_ROWS};
    double begin = 0;
    for (int i = -3; i < times; i++) {
        if (i == 0) {
            wait_for(ops, context);
            begin = now();
        }
        ops->logits(context, &norm, &head, &rows, x, out);
    }
    wait_for(ops, context);
    const double seconds = now() - begin;
    ops->release(context, x);
    ops->release(context, out);
    free(matrix);
    free(host);
    return 2.0 * PRODUCT_ROWS * PRODUCT_DEPTH * (double)PRODUCT_COLUMNS * times / seconds;
}

/* Both, in a context of their own. False: the backend does not open, `*status` and `err` say why.
 */
static enum status measure_device(const uint16_t *noise, size_t noise_count, struct error *err)
{
    static const struct model_config config = {.hidden_size = PRODUCT_DEPTH,
                                               .vocab_size = PRODUCT_COLUMNS,
                                               .inner_size = 64,
                                               .mamba_heads = 1,
                                               .mamba_head_dim = 64,
                                               .state_size = 16,
                                               .state_groups = 1,
                                               .conv_kernel = 4,
                                               .conv_size = 96,
                                               .proj_size = 161,
                                               .norm_epsilon = 1e-5f,
                                               .chunk_tokens = 16,
                                               .topk = 1,
                                               .heads = 1,
                                               .kv_heads = 1,
                                               .head_dim = 64,
                                               .retrieval_dim = 64,
                                               .retrieval_heads = 1};
    const struct ops_options options = {.config = &config,
                                        .threads = 1,
                                        .max_rows = PRODUCT_ROWS,
                                        .memory_dtype = OPS_BF16,
                                        .device_memory_bytes = (size_t)1 << 20};
    const struct ops *ops = ops_cuda();
    struct ops_context *context;
    const enum status status = ops->open(&options, &context, err);
    if (status)
        return status;
    bandwidth = measure_bandwidth(ops, context);
    rate = measure_rate(ops, context, noise, noise_count);
    ops->close(context);
    printf("copies on the device: %.0f GB/s read and written; bf16 products: %.0f TFLOP/s\n",
           bandwidth * 1e-9, rate * 1e-12);
    return STATUS_OK;
}

/* ---- where the time goes: the engine's table with a clock around each op ---- */

enum op {
    OP_EMBED,
    OP_MAMBA,
    OP_ENCODE,
    OP_RETRIEVE,
    OP_QUERY,
    OP_ATTEND,
    OP_OUT,
    OP_LOGITS,
    OP_COPY,
    OP_PARTS, /* recorded ones: their beginning, and their run */
    OP_COUNT
};

static const char *const op_names[OP_COUNT] = {
    "embed",      "mamba",   "encode_chunks", "retrieve", "hsa_query",
    "hsa_attend", "hsa_out", "logits",        "copy",     "parts"};

static struct ops clocked; /* `real` with the clocks around it */
static const char *only = "";
static bool plain;

static struct clock {
    double seconds;
    unsigned calls;
} clocks[OP_COUNT];
static const struct ops *real;
static const struct engine *measured;
static bool waiting; /* for the device, after each op */

static void end(struct ops_context *context, enum op op, double begin)
{
    if (waiting)
        wait_for(real, context);
    clocks[op].seconds += now() - begin;
    clocks[op].calls++;
}

static void timed_embed(struct ops_context *x, const struct ops_tensor *table,
                        const int32_t *tokens, uint32_t row_count, float *out)
{
    const double begin = now();
    real->embed(x, table, tokens, row_count, out);
    end(x, OP_EMBED, begin);
}

static void timed_mamba(struct ops_context *x, const struct ops_mamba_weights *weights,
                        const struct ops_rows *rows, const struct ops_mamba_state *states,
                        float *hidden)
{
    const double begin = now();
    real->mamba(x, weights, rows, states, hidden);
    end(x, OP_MAMBA, begin);
}

static void timed_encode(struct ops_context *x, const struct ops_chunking_weights *weights,
                         uint32_t count, const float *const *chunks, void *const *kv,
                         void *const *landmarks)
{
    const double begin = now();
    real->encode_chunks(x, weights, count, chunks, kv, landmarks);
    end(x, OP_ENCODE, begin);
}

static void timed_retrieve(struct ops_context *x, const struct ops_retrieval_weights *weights,
                           const struct ops_rows *rows, const struct ops_landmarks *landmarks,
                           const float *hidden, struct ops_picks *picks)
{
    const double begin = now();
    real->retrieve(x, weights, rows, landmarks, hidden, picks);
    end(x, OP_RETRIEVE, begin);
}

static void timed_query(struct ops_context *x, const struct ops_hsa_weights *weights,
                        const struct ops_rows *rows, const float *hidden, float *q)
{
    const double begin = now();
    real->hsa_query(x, weights, rows, hidden, q);
    end(x, OP_QUERY, begin);
}

static void timed_attend(struct ops_context *x, uint32_t row_count, const float *q,
                         const float *weights, const void *const *pages, float *o)
{
    const double begin = now();
    real->hsa_attend(x, row_count, q, weights, pages, o);
    end(x, OP_ATTEND, begin);
}

static void timed_out(struct ops_context *x, const struct ops_hsa_weights *weights,
                      const struct ops_rows *rows, const float *o, float *hidden)
{
    const double begin = now();
    real->hsa_out(x, weights, rows, o, hidden);
    end(x, OP_OUT, begin);
}

static void timed_logits(struct ops_context *x, const struct ops_tensor *norm,
                         const struct ops_tensor *head, const struct ops_rows *rows,
                         const float *hidden, float *logits)
{
    const double begin = now();
    real->logits(x, norm, head, rows, hidden, logits);
    end(x, OP_LOGITS, begin);
}

static void timed_copy(struct ops_context *x, void *to, const void *from, size_t bytes)
{
    const double begin = now();
    real->copy(x, to, from, bytes);
    end(x, OP_COPY, begin);
}

static enum ops_part timed_begin(struct ops_context *x, uint32_t part, const float *weights,
                                 const void *const *pages)
{
    const double begin = now();
    const enum ops_part how = real->part_begin(x, part, weights, pages);
    end(x, OP_PARTS, begin);
    return how;
}

static void timed_end(struct ops_context *x, struct ops_picks *picks, int32_t *largest)
{
    const double begin = now();
    real->part_end(x, picks, largest);
    end(x, OP_PARTS, begin);
}

static void set_clocks(struct engine *engine)
{
    measured = engine;
    real = engine->ops;
    clocked = *real;
    if (plain)
        clocked.step_begin = NULL;
    clocked.embed = timed_embed;
    clocked.mamba = timed_mamba;
    clocked.encode_chunks = timed_encode;
    clocked.retrieve = timed_retrieve;
    clocked.hsa_query = timed_query;
    clocked.hsa_attend = timed_attend;
    clocked.hsa_out = timed_out;
    clocked.logits = timed_logits;
    clocked.copy = timed_copy;
    clocked.part_begin = timed_begin;
    clocked.part_end = timed_end;
    engine->ops = &clocked;
}

/* ---- rows of the table ---- */

struct row {
    const char *what;
    uint32_t rows;
    uint64_t context;
    double seconds; /* of a step */
    double bytes, operations;
    double first_seconds;        /* of a slice whose pages are not here; 0: none is told apart */
    uint64_t first_pages, pages; /* that it read, and that the others did, all together */
    struct clock host[OP_COUNT], device[OP_COUNT];
    int steps, waited;      /* behind these */
    double coming;          /* seconds of a step of those whose pages were not there yet; 0: none */
    double brought, missed; /* pages that came to the device in a step, then and in those timed */
};

/* Bytes of the device that hold landmarks. */
static double landmarks_on_device(const struct memory *memory)
{
    const double blocks = (double)memory->landmark_bytes / (double)memory->block_bytes;
    return blocks * (double)(memory->narrow_bytes ? memory->narrow_bytes : memory->block_bytes);
}

static void report_first(const struct row *r)
{
    printf("          the first slice %.3f ms, %llu pages read; %llu in the %d slices timed\n",
           r->first_seconds * 1e3, (unsigned long long)r->first_pages, (unsigned long long)r->pages,
           r->steps);
    if (csv)
        fprintf(csv, "%s,%u,%llu,first_slice,%llu,,%.6f,,,,\n", r->what, r->rows,
                (unsigned long long)r->context, (unsigned long long)r->first_pages,
                r->first_seconds * 1e3);
}

static void report(const struct row *r)
{
    const double used = (double)real->device_bytes(measured->context);
    const double floor = fmax(r->bytes / bandwidth, r->operations / rate);
    printf("%-8s %5u rows, context %9llu: %9.3f ms, floor %8.3f ms (%s), %7.1fx; %6.0f GB/s, "
           "%6.1f TFLOP/s, %8.0f tok/s\n",
           r->what, r->rows, (unsigned long long)r->context, r->seconds * 1e3, floor * 1e3,
           r->bytes / bandwidth > r->operations / rate ? "bytes" : "operations", r->seconds / floor,
           r->bytes / r->seconds * 1e-9, r->operations / r->seconds * 1e-12, r->rows / r->seconds);
    if (csv)
        fprintf(csv, "%s,%u,%llu,step,1,%.6f,,%.6f,%.3f,%.0f,%.0f\n", r->what, r->rows,
                (unsigned long long)r->context, r->seconds * 1e3, floor * 1e3, r->seconds / floor,
                r->bytes, r->operations);
    if (csv)
        fprintf(csv, "%s,%u,%llu,device_bytes,,,,,,%.0f,\n%s,%u,%llu,landmark_bytes,,,,,,%.0f,\n",
                r->what, r->rows, (unsigned long long)r->context, used, r->what, r->rows,
                (unsigned long long)r->context, landmarks_on_device(&measured->memory));
    double whole = 0, host = 0;
    for (int i = 0; i < OP_COUNT; i++) {
        whole += r->device[i].seconds / r->waited;
        host += r->host[i].seconds / r->steps;
    }
    printf("         ");
    for (int i = 0; i < OP_COUNT; i++) {
        const double ms = r->device[i].seconds / r->waited * 1e3,
                     calling = r->host[i].seconds / r->steps * 1e3;
        if (!r->device[i].calls)
            continue;
        printf(" %s %.0f%%", op_names[i], ms / whole / 10);
        if (csv)
            fprintf(csv, "%s,%u,%llu,%s,%u,%.6f,%.6f,,,,\n", r->what, r->rows,
                    (unsigned long long)r->context, op_names[i],
                    r->device[i].calls / (unsigned)r->waited, ms, calling);
    }
    printf("; each waited for %.3f ms, calls alone %.3f ms, of them recorded parts %.3f ms\n"
           "          %.0f MB of the device in use, %.1f MB of them landmarks",
           whole * 1e3, host * 1e3, r->host[OP_PARTS].seconds / r->steps * 1e3, used * 1e-6,
           landmarks_on_device(&measured->memory) * 1e-6);
    if (r->coming > 0)
        printf("; with %.2f pages to come a step %.3f ms, with %.2f the time above", r->brought,
               r->coming * 1e3, r->missed);
    printf("\n");
    if (r->first_seconds > 0)
        report_first(r);
    fflush(stdout);
}

/* Not asked for, or too late. */
static bool left_out(const char *what, uint32_t rows, uint64_t context)
{
    char name[64];
    snprintf(name, sizeof name, "%s-%u-%llu-", what, rows, (unsigned long long)context);
    if (!strstr(name, only))
        return true;
    if (now() - began < SECONDS_MAX)
        return false;
    printf("%-8s %5u rows, context %9llu: LEFT OUT, %d seconds are over\n", what, rows,
           (unsigned long long)context, SECONDS_MAX);
    return true;
}

/* ---- the past ---- */

/* A session of `branch` at `position`, with landmarks of everything before it; NULL: no room. */
static struct engine_session *session_at(struct engine *engine, uint64_t branch, uint64_t position)
{
    struct engine_session *s;
    struct error err = {0};
    if (!noise_io_session(engine, branch, position, &s, &err))
        return s;
    printf("no session at %llu: %s\n", (unsigned long long)position, err.message);
    return NULL;
}

/* The session goes, and with it the pages that its steps read or made: another may use its branch.
 */
static void end_session(struct engine_session *s)
{
    engine_session_forget(s, 0);
    engine_session_destroy(s);
}

/* ---- floors ---- */

static double hsa_layers(const struct model_config *c)
{
    double n = 0;
    for (uint32_t i = 0; i < c->layer_count; i++)
        n += c->layers[i] == MODEL_LAYER_HSA;
    return n;
}

static double encoder_weights(const struct model_config *c)
{
    const double d = c->hidden_size, kv = (double)c->encoder_kv_heads * c->head_dim;
    return c->encoder_layers * (2 * d * d + 2 * d * kv + 3 * d * c->encoder_mlp_size);
}

/* Bytes that a step of `batch` sequences cannot do without: weights but for the encoder, states
 * read and written, landmarks, pages. */
static double decode_bytes(const struct engine_info *info, uint32_t batch, uint64_t context)
{
    const struct model_config *c = info->config;
    const double state =
        2.0 * c->mamba_count * (double)engine_ssm_bytes(measured, measured->states_bf16);
    const struct memory *memory = &measured->memory;
    const size_t block = memory->narrow_bytes ? memory->narrow_bytes : memory->block_bytes;
    const double landmarks =
        (double)context / c->chunk_tokens * (double)block / OPS_LANDMARK_BLOCK * info->group_count;
    const double pages = hsa_layers(c) * c->topk * (double)info->kv_bytes;
    return (double)info->weight_bytes - 2 * encoder_weights(c) +
           batch * (state + landmarks + pages);
}

/* Operations for a token at `context`, but for the ends of the model: two for each weight, the
 * recurrence, the landmarks' scan, attention over the picks. */
static double token_operations(const struct engine_info *info, double context)
{
    const struct model_config *c = info->config;
    const double weights = (double)info->weight_bytes / 2 - (double)c->vocab_size * c->hidden_size;
    const double recurrence = 4.0 * c->mamba_count * c->inner_size * c->state_size;
    const double scan = 2.0 * context / c->chunk_tokens * c->retrieval_dim * info->group_count;
    const double attention =
        4.0 * hsa_layers(c) * c->topk * c->chunk_tokens * (double)c->hidden_size;
    const double encoder = 4.0 * c->encoder_layers * c->chunk_tokens * (double)c->hidden_size;
    return 2 * weights + recurrence + scan + attention + encoder;
}

static double decode_operations(const struct engine_info *info, uint32_t batch, uint64_t context)
{
    const struct model_config *c = info->config;
    return batch * (token_operations(info, (double)context) - 2 * encoder_weights(c) +
                    2.0 * c->vocab_size * c->hidden_size);
}

/* ---- decode ---- */

#define BATCH_MAX 128
#define WARM_UP 16 /* steps before those that are timed; together they end no chunk */

struct sequence {
    struct engine_session *session;
    struct sampler *sampler;
    int32_t token;
};

/* `steps` steps of every sequence. */
static void decode(struct engine *engine, struct sequence *sequences, uint32_t batch, int steps)
{
    struct engine_step_item items[BATCH_MAX];
    for (int i = 0; i < steps; i++) {
        for (uint32_t j = 0; j < batch; j++)
            items[j] = (struct engine_step_item){.session = sequences[j].session,
                                                 .tokens = &sequences[j].token,
                                                 .token_count = 1,
                                                 .sampler = sequences[j].sampler};
        ASSERT(!engine_step(engine, items, batch));
        for (uint32_t j = 0; j < batch; j++) {
            ASSERT(!items[j].status);
            sequences[j].token = items[j].result.token;
        }
    }
}

/* Those of `from` go on as copies; NULL: they begin. False: no room. */
static bool open_sequences(struct engine *engine, struct sequence *sequences, uint32_t batch,
                           uint64_t context, const struct sequence *from)
{
    const int32_t vocabulary = (int32_t)engine_get_info(engine)->config->vocab_size;
    struct sampler_params greedy;
    sampler_params_default(&greedy);
    memset(sequences, 0, batch * sizeof *sequences);
    for (uint32_t i = 0; i < batch; i++) {
        struct sequence *s = &sequences[i];
        s->token = (int32_t)(17 + 31 * i);
        if (from && engine_session_fork(from[i].session, 1 + BATCH_MAX + i, &s->session))
            return false;
        if (!from && !(s->session = session_at(engine, 1 + i, context)))
            return false;
        ASSERT(!sampler_create(&greedy, vocabulary, &s->sampler));
    }
    return true;
}

static void close_sequences(struct sequence *sequences, uint32_t batch,
                            void (*close_session)(struct engine_session *))
{
    for (uint32_t i = 0; i < batch && sequences[i].session; i++) {
        close_session(sequences[i].session);
        sampler_destroy(sequences[i].sampler);
    }
}

static double pages_brought(void)
{
    const struct ops_page_stats pages = real->page_stats(measured->context);
    return (double)(pages.misses + pages.predicted);
}

/* Seconds of a step behind those that warm up; `*pages`: that came to the device in it. */
static double time_steps(struct engine *engine, struct sequence *sequences, uint32_t batch,
                         int steps, double *pages)
{
    decode(engine, sequences, batch, WARM_UP);
    memset(clocks, 0, sizeof clocks);
    const double before = pages_brought(), begin = now();
    decode(engine, sequences, batch, steps);
    const double seconds = now() - begin;
    *pages = (pages_brought() - before) / steps;
    return seconds / steps;
}

/* The same steps twice: by copies of the sequences while their pages come, then with the pages on
 * the device, as the floor has it. */
static void time_decode(struct engine *engine, uint32_t batch, uint64_t context)
{
    const struct engine_info *info = engine_get_info(engine);
    struct sequence sequences[BATCH_MAX], copies[BATCH_MAX] = {0};
    struct row r = {.what = "decode",
                    .rows = batch,
                    .context = context,
                    .bytes = decode_bytes(info, batch, context),
                    .operations = decode_operations(info, batch, context),
                    .steps = 24,
                    .waited = 4};
    if (left_out("decode", batch, context))
        return;
    const bool open = open_sequences(engine, sequences, batch, context, NULL) &&
                      open_sequences(engine, copies, batch, context, sequences);
    if (open)
        r.coming = time_steps(engine, copies, batch, r.steps, &r.brought);
    close_sequences(copies, batch, engine_session_destroy);
    if (open) {
        r.seconds = time_steps(engine, sequences, batch, r.steps, &r.missed);
        memcpy(r.host, clocks, sizeof clocks);
        memset(clocks, 0, sizeof clocks);
        waiting = true;
        clocked.step_begin = NULL;
        decode(engine, sequences, batch, r.waited);
        clocked.step_begin = plain ? NULL : real->step_begin;
        waiting = false;
        memcpy(r.device, clocks, sizeof clocks);
        report(&r);
    }
    close_sequences(sequences, batch, end_session);
}

/* ---- prefill ---- */

/* The next `slice` tokens, and what they wrote is durable. */
static void prefill(struct engine *engine, struct engine_session *s, const int32_t *tokens,
                    uint32_t slice)
{
    const uint32_t chunk = engine_get_info(engine)->config->chunk_tokens;
    const uint64_t first = engine_session_position(s) / chunk;
    struct engine_step_item item = {.session = s, .tokens = tokens, .token_count = slice};
    ASSERT(!engine_step(engine, &item, 1) && !item.status);
    for (uint64_t c = first; c < engine_session_position(s) / chunk; c++)
        engine_chunk_durable(engine, (struct chunk_key){1, c}, STATUS_OK);
}

static uint64_t pages_read(const struct engine *engine)
{
    struct engine_stats stats;
    engine_get_stats(engine, &stats);
    return stats.page_misses;
}

/* Slices until all pages of the past are here; how many. */
static int warm_up(struct engine *engine, struct engine_session *s, const int32_t *tokens,
                   uint32_t slice, struct row *r)
{
    const double begin = now();
    uint64_t before = pages_read(engine);
    prefill(engine, s, tokens, slice);
    r->first_seconds = now() - begin;
    r->first_pages = pages_read(engine) - before;
    int count = 1;
    for (bool missing = r->first_pages > 0; missing && count < WARM_SLICES; count++) {
        before = pages_read(engine);
        prefill(engine, s, tokens, slice);
        missing = pages_read(engine) > before;
    }
    return count;
}

static void time_prefill(struct engine *engine, uint32_t slice, uint64_t context, int slices)
{
    const struct engine_info *info = engine_get_info(engine);
    struct row r = {.what = "prefill",
                    .rows = slice,
                    .context = context,
                    .bytes = (double)info->weight_bytes, /* once, for all rows */
                    .steps = slices,
                    .waited = 1};
    if (left_out("prefill", slice, context))
        return;
    struct engine_session *s = session_at(engine, 1, context);
    int32_t *tokens = calloc(slice, sizeof *tokens);
    ASSERT(tokens);
    if (s) {
        for (uint32_t i = 0; i < slice; i++)
            tokens[i] = (int32_t)(i * 7919 % 50000);
        const int warm = warm_up(engine, s, tokens, slice, &r);
        const double middle = (double)context + slice * (warm + slices / 2.0);
        r.operations = slice * token_operations(info, middle);
        const uint64_t before = pages_read(engine);
        memset(clocks, 0, sizeof clocks);
        const double begin = now();
        for (int i = 0; i < slices; i++)
            prefill(engine, s, tokens, slice);
        r.seconds = (now() - begin) / slices;
        r.pages = pages_read(engine) - before;
        memcpy(r.host, clocks, sizeof clocks);
        memset(clocks, 0, sizeof clocks);
        waiting = true;
        prefill(engine, s, tokens, slice);
        waiting = false;
        memcpy(r.device, clocks, sizeof clocks);
        report(&r);
        end_session(s);
    }
    free(tokens);
}

static void time_all(struct engine *engine)
{
    const uint32_t batches[] = {1, 8, 32, BATCH_MAX};
    for (size_t i = 0; i < sizeof batches / sizeof *batches; i++)
        time_decode(engine, batches[i], 4096);
    time_prefill(engine, 256, 0, 8);
    time_prefill(engine, 1024, 0, 4);
    time_prefill(engine, 4096, 0, 4);
    const uint64_t contexts[] = {65536, 1 << 20, 16 << 20, 64 << 20};
    for (size_t i = 0; i < sizeof contexts / sizeof *contexts; i++)
        time_decode(engine, 1, contexts[i]);
    for (uint64_t context = 16384; context <= 1 << 20; context *= 4)
        time_prefill(engine, 4096, context, 4);
    for (uint64_t context = 0; context <= 1 << 20; context = context ? context * 16 : 65536)
        time_prefill(engine, LIMITS_SLICE_TOKENS_GPU, context, 4);
}

int main(int argc, char **argv)
{
    struct noise_io past;
    struct engine *engine;
    struct error err = {0};
    struct engine_options options = {.model_path = "tests/bench/ramba-370m",
                                     .backend = ENGINE_BACKEND_CUDA,
                                     .host_memory_bytes = (size_t)1 << 30,
                                     .slice_tokens = LIMITS_SLICE_TOKENS_GPU,
                                     .running_max = BATCH_MAX,
                                     .io = noise_io(&past),
                                     .random_weights_seed = 1};
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--plain") == 0)
            plain = true;
        else if (strcmp(argv[i], "--fp8") == 0)
            options.landmarks_fp8 = true;
        else if (strcmp(argv[i], "--bf16") == 0)
            options.states_bf16 = true;
        else if (strcmp(argv[i], "--only") == 0 && i + 1 < argc)
            only = argv[++i];
        else if (strcmp(argv[i], "--csv") == 0 && i + 1 < argc)
            csv = fopen(argv[++i], "we");
    }
    began = now();
    noise_io_init(&past);
    enum status status = measure_device(past.noise, past.count, &err);
    if (!status)
        status = engine_open(&options, &engine, &err);
    if (status) {
        printf("%s: %s\n", status == STATUS_UNSUPPORTED ? "SKIPPED" : "FAIL", err.message);
        noise_io_close(&past);
        return status == STATUS_UNSUPPORTED ? 77 : 1;
    }
    if (csv) {
        fprintf(csv, "# copies %.0f bytes/s, products %.0f operations/s\n", bandwidth, rate);
        fprintf(csv,
                "what,rows,context,op,calls,ms,call_ms,floor_ms,over_floor,bytes,operations\n");
    }
    noise_io_attach(&past, engine);
    printf("%s, %.0f MB of weights, open after %.0f s\n", engine_get_info(engine)->backend,
           (double)engine_get_info(engine)->weight_bytes / 1e6, now() - began);
    set_clocks(engine);
    time_all(engine);
    printf("%.0f seconds in all\n", now() - began);
    engine->ops = real;
    engine_close(engine);
    noise_io_close(&past);
    if (csv)
        fclose(csv);
    return 0;
}
