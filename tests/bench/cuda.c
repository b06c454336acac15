/* Times of the CUDA backend at the 370M shape with random weights: decode steps
 * and prefill through the engine, beside the bytes or operations that they cannot do without.
 * Prints a table; with a path as argument, writes the same as CSV. Exits with 77 without a GPU.
 * Runs from the repository's root. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "engine/engine.h"
#include "proto/base/assert.h"

static FILE *csv;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void report(const char *what, uint32_t rows, uint64_t context, double seconds, double bytes,
                   double operations)
{
    printf("%-10s %6u rows, context %9llu: %10.3f ms  %7.0f GB/s  %7.1f TFLOP/s  %9.0f tok/s\n",
           what, rows, (unsigned long long)context, seconds * 1e3, bytes / seconds * 1e-9,
           operations / seconds * 1e-12, rows / seconds);
    fflush(stdout);
    if (csv)
        fprintf(csv, "%s,%u,%llu,%.6f,%.0f,%.0f\n", what, rows, (unsigned long long)context,
                seconds * 1e3, bytes, operations);
}

/* Chunks that nobody keeps: landmarks and pages of any chunk are the same random bytes. */
struct fake {
    size_t kv_bytes, landmark_bytes;
    uint16_t *noise;
    size_t noise_count;
};

static size_t append_room(void *context)
{
    (void)context;
    return SIZE_MAX / 2;
}

static enum status append(void *context, struct chunk_key key, const void *kv, const void *landmark)
{
    (void)context, (void)key, (void)kv, (void)landmark;
    return STATUS_OK;
}

static void fill(const struct fake *f, uint64_t index, void *out, size_t bytes)
{
    const size_t from = (size_t)(index * 977) % (f->noise_count - bytes / 2);
    memcpy(out, f->noise + from, bytes);
}

static enum status read_chunks(void *context, const struct chunk_read *reads, size_t count)
{
    const struct fake *f = context;
    for (size_t i = 0; i < count; i++)
        fill(f, reads[i].key.index, reads[i].kv, f->kv_bytes);
    return STATUS_OK;
}

static enum status read_landmarks(void *context, uint64_t branch, uint64_t first, uint64_t count,
                                  void *out)
{
    const struct fake *f = context;
    (void)branch;
    for (uint64_t i = 0; i < count; i++)
        fill(f, first + i, (char *)out + i * f->landmark_bytes, f->landmark_bytes);
    return STATUS_OK;
}

static void make_noise(struct fake *f, const struct engine_info *info)
{
    f->kv_bytes = info->kv_bytes;
    f->landmark_bytes = info->landmark_bytes;
    f->noise_count = (size_t)1 << 20;
    f->noise = malloc(f->noise_count * sizeof *f->noise);
    ASSERT(f->noise);
    uint64_t state = 1;
    for (size_t i = 0; i < f->noise_count; i++) { /* bf16 between 1/8 and 2, either sign */
        state = state * 6364136223846793005u + 1442695040888963407u;
        f->noise[i] = (uint16_t)((state >> 48 & 0x8000) | 0x3e00 | (state >> 40 & 0x1ff));
    }
}

/* A session at `position`, with landmarks of everything before it. */
static struct engine_session *session_at(struct engine *engine, uint64_t position)
{
    const struct chunk_range range = {.branch = 1};
    struct engine_session *s;
    struct error err = {0};
    ASSERT(!engine_session_create(engine, &range, 1, NULL, 0, &s, &err));
    if (!position)
        return s;
    const size_t bytes = engine_session_snapshot_bytes(s);
    char *snapshot = malloc(bytes);
    ASSERT(snapshot);
    engine_session_snapshot(s, snapshot);
    engine_session_destroy(s);
    memcpy(snapshot + 16, &position, sizeof position); /* after magic, version, fingerprint */
    if (engine_session_create(engine, &range, 1, snapshot, bytes, &s, &err)) {
        printf("no session at %llu: %s\n", (unsigned long long)position, err.message);
        free(snapshot);
        return NULL;
    }
    ASSERT(engine_session_position(s) == position);
    free(snapshot);
    return s;
}

/* Bytes that a step of `batch` sequences cannot do without: weights but for the encoder, states
 * read and written, landmarks, pages. */
static double decode_bytes(const struct engine_info *info, uint32_t batch, uint64_t context)
{
    const struct model_config *c = info->config;
    const double encoder =
        2.0 * (4.0 * c->hidden_size * c->hidden_size + 3.0 * c->hidden_size * c->encoder_mlp_size);
    const double state = 8.0 * c->mamba_count * c->inner_size * c->state_size;
    const double landmarks =
        (double)context / c->chunk_tokens * (double)info->landmark_bytes * info->group_count;
    const double pages = 3.0 * c->topk * (double)info->kv_bytes; /* three HSA layers */
    return (double)info->weight_bytes - encoder + batch * (state + landmarks + pages);
}

static void time_decode(struct engine *engine, uint32_t batch, uint64_t context)
{
    struct engine_session *sessions[128];
    struct engine_step_item items[128];
    int32_t token = 17;
    uint32_t opened = 0;
    for (; opened < batch; opened++) {
        sessions[opened] = session_at(engine, context);
        if (!sessions[opened])
            break;
    }
    const int steps = 24, warm = 4;
    double begin = 0;
    for (int i = 0; opened == batch && i < warm + steps; i++) {
        if (i == warm)
            begin = now();
        for (uint32_t j = 0; j < batch; j++)
            items[j] = (struct engine_step_item){
                .session = sessions[j], .tokens = &token, .token_count = 1, .want_logits = true};
        ASSERT(!engine_step(engine, items, batch));
    }
    if (opened == batch)
        report("decode", batch, context, (now() - begin) / steps,
               decode_bytes(engine_get_info(engine), batch, context),
               2.0 * batch * (double)engine_get_info(engine)->weight_bytes / 2);
    while (opened)
        engine_session_destroy(sessions[--opened]);
}

static void time_prefill(struct engine *engine, uint32_t slice, uint64_t context, uint32_t slices)
{
    struct engine_session *s = session_at(engine, context);
    int32_t *tokens = calloc(slice, sizeof *tokens);
    ASSERT(tokens);
    for (uint32_t i = 0; i < slice; i++)
        tokens[i] = (int32_t)(i * 7919 % 50000);
    double begin = 0;
    for (uint32_t i = 0; s && i <= slices; i++) { /* the first one warms up */
        if (i == 1)
            begin = now();
        struct engine_step_item item = {.session = s, .tokens = tokens, .token_count = slice};
        ASSERT(!engine_step(engine, &item, 1) && !item.status);
        for (uint64_t c = (context + (uint64_t)i * slice) / 64;
             c < (context + (uint64_t)(i + 1) * slice) / 64; c++)
            engine_chunk_durable(engine, (struct chunk_key){1, c}, STATUS_OK);
    }
    if (s) {
        report("prefill", slice, context, (now() - begin) / slices, 0,
               2.0 * slice * (double)engine_get_info(engine)->weight_bytes / 2);
        engine_session_destroy(s);
    }
    engine_forget_chunks(engine, 1, 0);
    free(tokens);
}

int main(int argc, char **argv)
{
    struct fake fake = {0};
    struct engine *engine;
    struct error err = {0};
    const struct engine_options options = {.model_path = "tests/bench/ramba-370m",
                                           .backend = ENGINE_BACKEND_CUDA,
                                           .host_memory_bytes = (size_t)1 << 30,
                                           .slice_tokens = 4096,
                                           .io = {.context = &fake,
                                                  .append_room = append_room,
                                                  .append = append,
                                                  .read = read_chunks,
                                                  .read_landmarks = read_landmarks},
                                           .random_weights_seed = 1};
    const enum status status = engine_open(&options, &engine, &err);
    if (status) {
        printf("%s: %s\n", status == STATUS_UNSUPPORTED ? "SKIPPED" : "FAIL", err.message);
        return status == STATUS_UNSUPPORTED ? 77 : 1;
    }
    csv = argc > 1 ? fopen(argv[1], "we") : NULL;
    if (csv)
        fprintf(csv, "what,rows,context,ms,bytes,operations\n");
    make_noise(&fake, engine_get_info(engine));
    printf("%s, %.0f MB of weights\n", engine_get_info(engine)->backend,
           (double)engine_get_info(engine)->weight_bytes / 1e6);
    const uint32_t batches[] = {1, 8, 32, 128};
    for (size_t i = 0; i < sizeof batches / sizeof *batches; i++)
        time_decode(engine, batches[i], 4096);
    const uint64_t contexts[] = {65536, 1 << 20, 16 << 20, 64 << 20};
    for (size_t i = 0; i < sizeof contexts / sizeof *contexts; i++)
        time_decode(engine, 1, contexts[i]);
    time_prefill(engine, 256, 0, 8);
    time_prefill(engine, 1024, 0, 4);
    time_prefill(engine, 4096, 0, 2);
    time_prefill(engine, 4096, 1 << 20, 1);
    engine_close(engine);
    free(fake.noise);
    if (csv)
        fclose(csv);
    return 0;
}
