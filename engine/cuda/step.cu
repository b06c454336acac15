/* step.cu - steps in which every sequence goes on by one token, recorded once as CUDA graphs, one
 * for each part and number of sequences, and replayed from then on. What differs from step to step
 * (tokens, where states lie, picks) is in tables at fixed addresses: each part begins by fetching
 * its own from pinned memory. */
#include <stdlib.h>
#include <string.h>

#include "engine/cuda/mamba_run.cuh"
#include "engine/cuda/retrieve.cuh"

#define FETCH_THREADS 256
#define FETCH_TABLES 4
#define ASIDE_ROWS 64 /* of a step at least, of which half go aside */
#define LOOKS 4096    /* for a part's end, after which the stream is asked whether it failed */

/* Twice: pinned, and on the device. */
struct tables {
    int32_t *tokens;               /* [rows] */
    struct cuda_segment *segments; /* [rows]; ssm, conv: where the sequence's state begins */
    float **kept, **logits;        /* [rows] */
    float *weights;                /* [rows, Hr, K] */
    const void **pages;            /* [rows, Hr, K] on the device */
};

/* A part of a step. */
struct graph {
    cudaGraphExec_t exec;
    bool tells; /* its end: see cuda_ending */
};

struct cuda_step {
    struct tables host, device;
    void *host_memory, *device_memory;
    struct cuda_candidate *candidates;
    struct cuda_kept_logits logits; /* `to` is of the tables */
    struct cuda_ending ending;
    uint32_t ended;       /* parts that will have told their end when all work is done */
    struct graph *graphs; /* [parts][OPS_STEP_ROWS] */
    uint32_t parts, part;
    bool renamed;   /* the segments are not those of the part before */
    struct run run; /* Mamba-2 blocks recorded, not launched yet */
    bool aside;     /* half of the rows are in another stream: a lane of encode_chunks.cu */
    struct ops_step step;
};

struct fetch {
    const uint32_t *from[FETCH_TABLES];
    uint32_t *to[FETCH_TABLES];
    uint32_t words[FETCH_TABLES];
};

/* Rows of embeddings, whose tokens are fetched with the tables. */
template <typename T> struct embedding {
    const T *table;
    const int32_t *tokens; /* pinned */
    uint32_t d;
    float *out;
};

/* Grid: blocks that share a table x `tables`, then rows, a block each. `early`: the kernel behind it
 * waits for its end before it reads any of that. */
template <typename T>
static __global__ void __launch_bounds__(FETCH_THREADS)
    fetch_tables(struct fetch f, uint32_t tables, struct embedding<T> e, bool early)
{
    if (early)
        cuda_depend_release();
    if (blockIdx.y >= tables) {
        const uint32_t row = blockIdx.y - tables;
        __shared__ int32_t token; /* a block looks once */
        if (blockIdx.x)
            return;
        if (threadIdx.x == 0)
            token = e.tokens[row];
        __syncthreads();
        const T *from = e.table + (size_t)token * e.d;
        for (uint32_t i = threadIdx.x; i < e.d; i += FETCH_THREADS)
            e.out[(size_t)row * e.d + i] = cuda_float(from[i]);
        return;
    }
    for (uint32_t i = blockIdx.x * FETCH_THREADS + threadIdx.x; i < f.words[blockIdx.y];
         i += gridDim.x * FETCH_THREADS)
        f.to[blockIdx.y][i] = f.from[blockIdx.y][i];
}

/* Hidden states go to each sequence's chunk under way. Grid: rows. */
static __global__ void __launch_bounds__(FETCH_THREADS)
    keep_rows(const float *x, uint32_t d, float *const *kept)
{
    cuda_depend_release();
    cuda_depend_wait();
    for (uint32_t i = threadIdx.x; i < d; i += FETCH_THREADS)
        kept[blockIdx.x][i] = x[(size_t)blockIdx.x * d + i];
}

/* ---- opening ---- */

static size_t whole(size_t bytes)
{
    return (bytes + 255) / 256 * 256;
}

/* Lays the tables out from `memory` on; returns their size. */
static size_t lay_out(struct tables *t, char *memory, size_t picks)
{
    size_t at = 0;
    const auto next = [&](size_t element, size_t count) {
        char *table = memory + at;
        at += whole(element * count);
        return (void *)table;
    };
    t->tokens = (int32_t *)next(sizeof *t->tokens, OPS_STEP_ROWS);
    t->segments = (struct cuda_segment *)next(sizeof *t->segments, OPS_STEP_ROWS);
    t->kept = (float **)next(sizeof *t->kept, OPS_STEP_ROWS);
    t->logits = (float **)next(sizeof *t->logits, OPS_STEP_ROWS);
    t->weights = (float *)next(sizeof *t->weights, picks);
    t->pages = (const void **)next(sizeof *t->pages, picks);
    return at;
}

enum status cuda_step_open(struct ops_context *x, struct error *err)
{
    const struct model_config *c = &x->config;
    const size_t picks = (size_t)OPS_STEP_ROWS * c->retrieval_heads * c->topk;
    struct cuda_step *s = (struct cuda_step *)calloc(1, sizeof *s);
    x->step = s;
    if (!s)
        return error_set(err, STATUS_NO_MEMORY, "out of memory");
    struct tables sizes;
    const size_t bytes = lay_out(&sizes, NULL, picks);
    size_t room = 0;
    for (uint32_t rows = 1; rows <= OPS_STEP_ROWS; rows++)
        room = cuda_retrieve_room(x, rows) > room ? cuda_retrieve_room(x, rows) : room;
    s->parts = c->group_count + 1;
    s->graphs = (struct graph *)calloc((size_t)s->parts * OPS_STEP_ROWS, sizeof *s->graphs);
    s->host_memory = cuda_alloc_host(x, bytes);
    s->device_memory = cuda_take(x, bytes);
    s->candidates = (struct cuda_candidate *)cuda_take(x, room * sizeof *s->candidates);
    struct cuda_kept_logits *kept = &s->logits;
    kept->best = (unsigned long long *)cuda_take(x, OPS_STEP_ROWS * sizeof *kept->best);
    kept->arrived = (uint32_t *)cuda_take(x, OPS_STEP_ROWS * sizeof *kept->arrived);
    kept->largest = (int32_t *)cuda_alloc_host(x, OPS_STEP_ROWS * sizeof *kept->largest);
    s->ending.count = (uint32_t *)cuda_take(x, sizeof *s->ending.count);
    s->ending.told = (uint32_t *)cuda_alloc_host(x, sizeof *s->ending.told);
    struct run *r = &s->run;
    cuda_run_open(x, r);
    x->spares = r->covers;
    const size_t lines = RUN_LINE * (size_t)cuda_ceil(c->inner_size, RUN_WIDTH);
    r->hidden_sent = (uint4 *)cuda_take(x, lines);
    r->gated_sent = (uint4 *)cuda_take(x, lines);
    r->columns_sent = (uint2 *)cuda_take(x, lines);
    r->serial = (uint32_t *)cuda_take(x, sizeof *r->serial);
    if (!s->graphs || !s->host_memory || !s->device_memory || !s->candidates || !kept->best ||
        !kept->arrived || !kept->largest || !s->ending.count || !s->ending.told ||
        !r->hidden_sent || !r->gated_sent || !r->columns_sent || !r->serial)
        return error_set(err, STATUS_NO_MEMORY, "out of memory for the tables of a step");
    *s->ending.told = 0;
    lay_out(&s->host, (char *)s->host_memory, picks);
    lay_out(&s->device, (char *)s->device_memory, picks);
    kept->to = s->device.logits;
    return STATUS_OK;
}

void cuda_step_close(struct ops_context *x)
{
    struct cuda_step *s = x->step;
    if (!s)
        return;
    for (size_t i = 0; s->graphs && i < (size_t)s->parts * OPS_STEP_ROWS; i++)
        if (s->graphs[i].exec)
            cudaGraphExecDestroy(s->graphs[i].exec);
    void *device[] = {s->device_memory,  s->candidates,       s->logits.best,
                      s->logits.arrived, s->ending.count,     s->run.hidden_sent,
                      s->run.gated_sent, s->run.columns_sent, s->run.serial};
    for (size_t i = 0; i < sizeof device / sizeof *device; i++)
        if (device[i])
            cudaFree(device[i]);
    cuda_free_host(s->host_memory);
    cuda_free_host(s->logits.largest);
    cuda_free_host(s->ending.told);
    free(s->graphs);
    free(s);
    x->step = NULL;
}

/* ---- a step ---- */

extern "C" void cuda_step_begin(struct ops_context *x, const struct ops_step *step)
{
    struct cuda_step *s = x->step;
    ASSERT(step->count && step->count <= OPS_STEP_ROWS);
    s->step = *step;
    s->renamed = true;
    memcpy(s->host.tokens, step->tokens, step->count * sizeof *step->tokens);
    for (uint32_t i = 0; i < step->count; i++) {
        s->host.kept[i] = step->kept[i];
        s->host.logits[i] = step->logits[i];
    }
}

static void add_table(struct fetch *f, uint32_t *n, void *to, const void *from, size_t bytes)
{
    f->from[*n] = (const uint32_t *)from;
    f->to[*n] = (uint32_t *)to;
    f->words[(*n)++] = (uint32_t)(bytes / sizeof(uint32_t));
}

/* What the part under way reads, and, in the first one, `rows` of embeddings. */
template <typename T>
static void launch_fetch(struct ops_context *x, uint32_t rows, const T *table, float *out)
{
    struct cuda_step *s = x->step;
    const struct tables *h = &s->host, *d = &s->device;
    const uint32_t count = s->step.count;
    const size_t picks = (size_t)count * x->config.retrieval_heads * x->config.topk;
    struct fetch f = {};
    uint32_t n = 0;
    /* All of it in every part: between two, the step may have become one of other sequences. */
    add_table(&f, &n, d->segments, h->segments, count * sizeof *h->segments);
    if (s->part + 1 == s->parts)
        add_table(&f, &n, d->logits, h->logits, count * sizeof *h->logits);
    if (s->part == 0) {
        add_table(&f, &n, d->kept, h->kept, count * sizeof *h->kept);
    } else {
        add_table(&f, &n, d->weights, h->weights, picks * sizeof *h->weights);
        add_table(&f, &n, d->pages, h->pages, picks * sizeof *h->pages);
    }
    uint32_t most = 0;
    for (uint32_t i = 0; i < n; i++)
        most = f.words[i] > most ? f.words[i] : most;
    const struct embedding<T> e = {
        table, h->tokens, x->config.hidden_size, out
    };
    CUDA_LAUNCH(x, fetch_tables<T>, dim3(cuda_ceil(most, FETCH_THREADS), n + rows),
                dim3(FETCH_THREADS), 0, f, n, e, rows == 1 && s->run.covers);
}

static void fill_segments(struct ops_context *x)
{
    struct cuda_step *s = x->step;
    for (uint32_t i = 0; i < s->step.count; i++) {
        struct cuda_segment *segment = &s->host.segments[i];
        segment->position = s->step.positions[i];
        segment->row = i;
        segment->count = 1;
        segment->ssm = segment->conv = s->step.states[i];
        segment->blocks = cuda_stage_blocks(x, &s->step.landmarks[i]);
        segment->narrow = cuda_stage_narrow(x, &s->step.landmarks[i]);
        segment->chunk_count = s->step.landmarks[i].count;
    }
}

/* The device's copies of the part's pages; false: they do not fit all at once. */
static bool fill_pages(struct ops_context *x, const float *weights, const void *const *pages)
{
    struct cuda_step *s = x->step;
    const size_t picks = (size_t)s->step.count * x->config.retrieval_heads * x->config.topk;
    cuda_pages_begin(x);
    const bool room = cuda_pages_take(x, pages, picks, s->host.pages) == picks;
    cuda_pages_end(x);
    memcpy(s->host.weights, weights, picks * sizeof *weights);
    return room;
}

static struct graph *graph_of(const struct cuda_step *s)
{
    return &s->graphs[(size_t)s->part * OPS_STEP_ROWS + s->step.count - 1];
}

extern "C" enum ops_part cuda_part_begin(struct ops_context *x, uint32_t part, const float *weights,
                                         const void *const *pages)
{
    struct cuda_step *s = x->step;
    ASSERT(part < s->parts && !pages == !part);
    s->part = part;
    cuda_begin(x);
    if (pages && !fill_pages(x, weights, pages))
        return OPS_PART_PLAIN;
    if (part + 1 < s->parts || s->renamed)
        fill_segments(x);
    s->renamed = false;
    if (x->failed)
        return OPS_PART_PLAIN;
    if (graph_of(s)->exec)
        return OPS_PART_REPLAY;
    if (!cuda_check(x, cudaStreamBeginCapture(x->stream, cudaStreamCaptureModeRelaxed),
                    "the recording of a step"))
        return OPS_PART_PLAIN;
    x->recording = true;
    if (part) /* the first one begins with cuda_step_embed */
        launch_fetch<float>(x, 0, NULL, NULL);
    return OPS_PART_RECORD;
}

/* What was recorded becomes a graph that can be launched. */
static void end_recording(struct ops_context *x)
{
    cudaGraph_t graph = NULL;
    x->recording = false;
    const cudaError_t error = cudaStreamEndCapture(x->stream, &graph);
    if (cuda_check(x, error, "the recording of a step") && !x->failed)
        cuda_check(x, cudaGraphInstantiate(&graph_of(x->step)->exec, graph, 0),
                   "the making of a graph");
    if (graph)
        cudaGraphDestroy(graph);
}

/* Until the last kernel of the part under way says that it is done, which the host sees sooner than
 * that the stream is. */
static void wait_told(struct ops_context *x)
{
    const struct cuda_step *s = x->step;
    for (uint32_t looks = 1; __atomic_load_n(s->ending.told, __ATOMIC_ACQUIRE) != s->ended; looks++)
        if (looks % LOOKS == 0 && cudaStreamQuery(x->stream) != cudaErrorNotReady) {
            cuda_wait(x);
            return;
        }
    x->idle = true;
}

extern "C" void cuda_part_end(struct ops_context *x, struct ops_picks *picks, int32_t *largest)
{
    struct cuda_step *s = x->step;
    const size_t count = (size_t)s->step.count * x->config.retrieval_heads * x->config.topk;
    cuda_step_flush(x);
    if (x->recording)
        end_recording(x);
    if (!x->failed) {
        (void)cudaGraphLaunch(graph_of(s)->exec, x->stream); /* it stays the last error */
        cuda_launched(x, "a recorded part of a step");
        s->ended += graph_of(s)->tells;
    }
    if (!x->failed && graph_of(s)->tells)
        wait_told(x);
    else
        cuda_wait(x);
    if (picks && x->failed) { /* nothing is read for picks that do not exist */
        memset(picks->chunks, 0, count * sizeof *picks->chunks);
        memset(picks->weights, 0, count * sizeof *picks->weights);
    }
    if (largest)
        memcpy(largest, s->logits.largest, s->step.count * sizeof *largest);
}

/* ---- what the ops take from the step while they are recorded ---- */

void cuda_step_embed(struct ops_context *x, const struct ops_tensor *table, float *out)
{
    if (x->wide)
        launch_fetch(x, x->step->step.count, (const float *)table->data, out);
    else
        launch_fetch(x, x->step->step.count, (const bf16 *)table->data, out);
}

const struct cuda_segment *cuda_step_states(struct ops_context *x,
                                            const struct ops_mamba_state *states, size_t *ssm,
                                            size_t *conv)
{
    const struct ops_step *step = &x->step->step;
    *ssm = (size_t)((float *)states[0].ssm - step->states[0]);
    *conv = (size_t)(states[0].conv - step->states[0]);
    for (uint32_t i = 1; i < step->count; i++)
        ASSERT(states[i].ssm == step->states[i] + *ssm &&
               states[i].conv == step->states[i] + *conv);
    return x->step->device.segments;
}

bool cuda_step_mamba(struct ops_context *x, const struct ops_mamba_weights *w,
                     const struct ops_mamba_state *states, float *hidden)
{
    struct run *r = &x->step->run;
    size_t ssm, conv;
    if (!r->covers || x->step->step.count > 1)
        return false;
    if (r->layer_count == RUN_LAYERS || (r->layer_count && r->hidden != hidden))
        cuda_step_flush(x);
    r->segment = cuda_step_states(x, states, &ssm, &conv);
    r->hidden = hidden;
    struct run_layer *layer = &r->layers[r->layer_count++];
    layer->weights = cuda_step_weights<bf16>(w);
    layer->in_proj = (const bf16 *)w->in_proj.data;
    layer->out_proj = (const bf16 *)w->out_proj.data;
    layer->norm = (const float *)w->norm.data;
    layer->gate_norm = (const float *)w->gate_norm.data;
    layer->in_bias = (const float *)w->in_proj_bias.data;
    layer->out_bias = (const float *)w->out_proj_bias.data;
    layer->ssm = ssm;
    layer->conv = conv;
    return true;
}

cudaStream_t cuda_step_aside(struct ops_context *x)
{
    const struct cuda_encoder *lane = &x->encoders[1];
    struct cuda_step *s = x->step;
    if (s->step.count < ASIDE_ROWS)
        return NULL;
    if (!s->aside) {
        cuda_check(x, cudaEventRecord(lane->reached, x->stream), "an event");
        cuda_check(x, cudaStreamWaitEvent(lane->stream, lane->reached, 0), "a wait");
        x->apart = s->aside = true;
    }
    return lane->stream;
}

static void join_aside(struct ops_context *x)
{
    const struct cuda_encoder *lane = &x->encoders[1];
    if (!x->step->aside)
        return;
    cuda_check(x, cudaEventRecord(lane->reached, lane->stream), "an event");
    cuda_check(x, cudaStreamWaitEvent(x->stream, lane->reached, 0), "a wait");
    x->step->aside = false;
    x->apart = true;
}

void cuda_step_flush(struct ops_context *x)
{
    struct run *r = &x->step->run;
    x->left = NULL;
    join_aside(x);
    if (r->layer_count)
        cuda_run_launch(x, *r);
    r->layer_count = 0;
    r->kept = NULL;
}

void cuda_step_retrieve(struct ops_context *x, const struct ops_retrieval_weights *w,
                        struct ops_picks *picks)
{
    struct cuda_step *s = x->step;
    cuda_retrieve_rows(x, w, s->device.segments, NULL, s->step.count, s->candidates, picks->chunks,
                       picks->weights);
}

void cuda_step_pages(const struct ops_context *x, const float **weights, const void *const **pages)
{
    *weights = x->step->device.weights;
    *pages = x->step->device.pages;
}

struct cuda_kept_logits cuda_step_kept(const struct ops_context *x)
{
    struct cuda_kept_logits kept = x->step->logits;
    kept.rows = x->step->step.count;
    return kept;
}

struct cuda_ending cuda_step_ending(struct ops_context *x)
{
    graph_of(x->step)->tells = true;
    return x->step->ending;
}

extern "C" void cuda_keep_rows(struct ops_context *x, const float *hidden)
{
    struct cuda_step *s = x->step;
    struct run *r = &s->run;
    if (r->layer_count && r->hidden == hidden) { /* the blocks in front keep it themselves */
        r->kept = s->device.kept;
        cuda_step_flush(x);
        return;
    }
    cuda_step_flush(x);
    CUDA_LAUNCH_EARLY(x, keep_rows, dim3(s->step.count), dim3(FETCH_THREADS), 0, hidden,
                      x->config.hidden_size, (float *const *)s->device.kept);
}
