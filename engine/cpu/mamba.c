/* mamba.c - one Mamba-2 block. A segment of few rows goes token by token; longer ones in blocks of
 * the chunked (SSD) form, where all but a scan over the blocks is matrix products (Dao and Gu,
 * "Transformers are SSMs", section 6). Both carry the state forward in fp32, from what it is kept
 * in and back. */
#include <math.h>
#include <string.h>

#include "engine/bf16.h"
#include "engine/cpu/cpu.h"
#include "proto/limits.h"

_Static_assert(LIMITS_CUT_TOKENS % CPU_BLOCK == 0 && LIMITS_CUT_REST >= CPU_FEW_ROWS,
               "slices are cut where blocks end");

struct mamba {
    struct ops_context *context;
    const struct ops_rows *rows;
    const struct ops_mamba_state *states;
    /* Small weights as floats; conv is [taps, conv_size]. */
    const float *conv, *conv_bias, *dt_bias, *a_log, *skip, *gate_norm;
    const struct ops_segment *segment; /* of the blocked form under way */
    void *ssm;                         /* its state */
};

/* Where head `h` of a state lies. */
static void *head_of(const struct ops_context *x, void *ssm, uint32_t h)
{
    const struct model_config *c = &x->config;
    return (char *)ssm + (size_t)h * c->mamba_head_dim * c->state_size * (x->states_bf16 ? 2 : 4);
}

/* A head's state goes back to where it is kept in bf16. */
static void narrow_head(const struct ops_context *x, const float *from, void *head)
{
    const size_t count = (size_t)x->config.mamba_head_dim * x->config.state_size;
    uint16_t *to = head;
    for (size_t i = 0; i < count; i++)
        to[i] = bf16_from_float(from[i]);
}

#define CONV_ROWS 16

/* Rows [16 i, 16 i + 16) of the step through the convolution, and their time steps. */
static void convolve_task(void *argument, uint32_t index, uint32_t worker)
{
    (void)worker;
    const struct mamba *t = argument;
    struct ops_context *x = t->context;
    const struct model_config *c = &x->config;
    const uint32_t taps = c->conv_kernel, n = c->conv_size, heads = c->mamba_heads;
    uint32_t row = index * CONV_ROWS, s = 0;
    const uint32_t end =
        row + CONV_ROWS < t->rows->row_count ? row + CONV_ROWS : t->rows->row_count;
    for (; row < end; row++) {
        while (row >= t->rows->segments[s].row + t->rows->segments[s].count)
            s++;
        const float *in[16];
        for (uint32_t i = 0; i < taps; i++) {
            /* Column `row - taps + 1 + i`, from the tail where it lies before the segment. */
            const uint32_t back = taps - 1 - i, at = row - t->rows->segments[s].row;
            in[i] = back <= at ? x->projected + (size_t)(row - back) * c->proj_size + c->inner_size
                               : t->states[s].conv + (size_t)(taps - 1 + at - back) * n;
        }
        x->kernels->convolve(in, t->conv, t->conv_bias, taps, n, x->conv + (size_t)row * n);
        const float *raw = x->projected + (size_t)row * c->proj_size + c->inner_size + n;
        for (uint32_t h = 0; h < heads; h++) {
            const float dt = cpu_softplus(raw[h] + t->dt_bias[h]);
            x->dt[(size_t)row * heads + h] = fminf(fmaxf(dt, c->dt_min), c->dt_max);
        }
    }
}

/* The last columns of xBC become the tail. */
static void keep_tails(const struct mamba *t)
{
    const struct model_config *c = &t->context->config;
    const uint32_t keep = c->conv_kernel - 1;
    const size_t n = c->conv_size;
    for (uint32_t s = 0; s < t->rows->segment_count; s++) {
        const struct ops_segment *segment = &t->rows->segments[s];
        float *tail = t->states[s].conv;
        const uint32_t fresh = segment->count < keep ? segment->count : keep;
        memmove(tail, tail + fresh * n, (keep - fresh) * n * sizeof *tail);
        for (uint32_t i = 0; i < fresh; i++)
            memcpy(tail + (keep - fresh + i) * n,
                   t->context->projected +
                       (size_t)(segment->row + segment->count - fresh + i) * c->proj_size +
                       c->inner_size,
                   n * sizeof *tail);
    }
}

/* One head of one short segment, token by token. */
static void step_task(void *argument, uint32_t index, uint32_t worker)
{
    const struct mamba *t = argument;
    struct ops_context *x = t->context;
    const struct model_config *c = &x->config;
    const struct ops_segment *segment = &t->rows->segments[index / c->mamba_heads];
    if (segment->count > CPU_FEW_ROWS)
        return;
    const uint32_t h = index % c->mamba_heads, width = c->mamba_head_dim, n = c->state_size;
    const uint32_t group = h / (c->mamba_heads / c->state_groups);
    void *head = head_of(x, t->states[index / c->mamba_heads].ssm, h);
    float *dtx = cpu_scratch(x, worker), *state = x->states_bf16 ? dtx + width : head;
    if (x->states_bf16)
        x->kernels->widen(head, state, (size_t)width * n);
    for (uint32_t row = segment->row; row < segment->row + segment->count; row++) {
        const float *u = x->conv + (size_t)row * c->conv_size + (size_t)h * width;
        const float *b = x->conv + (size_t)row * c->conv_size + c->inner_size + (size_t)group * n;
        const float *cc = b + (size_t)c->state_groups * n;
        const float dt = x->dt[(size_t)row * c->mamba_heads + h];
        float *y = x->mixed + (size_t)row * c->inner_size + (size_t)h * width;
        for (uint32_t p = 0; p < width; p++)
            dtx[p] = dt * u[p];
        x->kernels->recur(state, width, n, expf(-dt * expf(t->a_log[h])), dtx, b, cc, y);
        x->kernels->add_scaled(y, u, t->skip[h], width);
    }
    if (x->states_bf16)
        narrow_head(x, state, head);
}

/* ---- the blocked form ---- */

static uint32_t block_rows(const struct ops_segment *segment, uint32_t block)
{
    const uint32_t left = segment->count - block * CPU_BLOCK;
    return left < CPU_BLOCK ? left : CPU_BLOCK;
}

/* scores[block, group] = C B^T of one block: every head of the group shares it. */
static void scores_task(void *argument, uint32_t index, uint32_t worker)
{
    const struct mamba *t = argument;
    struct ops_context *x = t->context;
    const struct model_config *c = &x->config;
    const uint32_t block = index / c->state_groups, group = index % c->state_groups;
    const uint32_t q = block_rows(t->segment, block), n = c->state_size;
    const size_t row = t->segment->row + block * CPU_BLOCK;
    const float *b = x->conv + row * c->conv_size + c->inner_size + (size_t)group * n;
    const float *cc = b + (size_t)c->state_groups * n;
    float *panels = cpu_scratch(x, worker);
    x->kernels->pack_transposed(b, OPS_FP32, c->conv_size, q, n, panels);
    x->kernels->product(cc, c->conv_size, 1, panels, q, q, n, 0,
                        x->scores + (size_t)index * CPU_BLOCK * CPU_BLOCK, CPU_BLOCK);
}

/* One head's part of a block. */
struct block {
    const float *u, *b, *c; /* [q, P], [q, N], [q, N], rows conv_size apart */
    const float *scores;    /* C B^T, [q, CPU_BLOCK] */
    float *y;               /* [q, P], rows inner_size apart */
    float *state;           /* transposed, in panels of P's columns: [P / panel][N][panel] */
    float *scratch;
    float dt[CPU_BLOCK], decay[CPU_BLOCK]; /* time steps; log decay from the block's start */
    uint32_t rows;                         /* q */
    float rate, skip;                      /* A, D */
};

#define TRIANGLE_ROWS 16

/* y = decay * C state^T + D u, from before the block; then, within it,
 * y += (C B^T * decay * dt, lower triangle) u, rows of the triangle by groups of like length. */
static void block_output(const struct ops_context *x, const struct block *k)
{
    const struct model_config *c = &x->config;
    const uint32_t width = c->mamba_head_dim, q = k->rows;
    float *mask = k->scratch, *panels = mask + CPU_BLOCK * CPU_BLOCK;
    x->kernels->product(k->c, c->conv_size, 1, k->state, q, width, c->state_size, 0, k->y,
                        c->inner_size);
    for (uint32_t i = 0; i < q; i++)
        x->kernels->blend(k->y + (size_t)i * c->inner_size, expf(k->decay[i]),
                          k->u + (size_t)i * c->conv_size, k->skip, width);
    x->kernels->pack(k->u, c->conv_size, NULL, q, width, panels);
    for (uint32_t first = 0; first < q; first += TRIANGLE_ROWS) {
        const uint32_t end = first + TRIANGLE_ROWS < q ? first + TRIANGLE_ROWS : q;
        for (uint32_t i = first; i < end; i++) {
            float *row = mask + i * CPU_BLOCK;
            x->kernels->decay_row(k->scores + i * CPU_BLOCK, k->decay, k->decay[i], k->dt, i + 1,
                                  row);
            memset(row + i + 1, 0, (end - i - 1) * sizeof *row);
        }
        for (uint32_t p = 0; p < width; p += x->kernels->panel)
            x->kernels->product(mask + first * CPU_BLOCK, CPU_BLOCK, 1, panels + (size_t)p * q,
                                end - first,
                                width - p < x->kernels->panel ? width - p : x->kernels->panel, end,
                                1, k->y + (size_t)first * c->inner_size + p, c->inner_size);
    }
}

/* state = decay over the block * state + B^T (u * dt * decay to the block's end). */
static void block_state(const struct ops_context *x, struct block *k)
{
    const struct model_config *c = &x->config;
    const uint32_t width = c->mamba_head_dim, n = c->state_size, q = k->rows;
    const uint32_t panel = x->kernels->panel;
    float factors[CPU_BLOCK], *panels = k->scratch, behind = 0;
    /* Summed from the end: a difference of sums from the start would lose what is small in it. */
    for (uint32_t i = q; i--;) {
        factors[i] = k->dt[i] * expf(behind);
        behind += k->dt[i] * k->rate;
    }
    x->kernels->pack(k->u, c->conv_size, factors, q, width, panels);
    for (uint32_t p = 0; p < width; p += panel)
        x->kernels->product(k->b, 1, c->conv_size, panels + (size_t)p * q, n, panel, q,
                            expf(behind), k->state + (size_t)p * n, panel);
}

/* One head through every block of the segment, in order. */
static void blocks_task(void *argument, uint32_t h, uint32_t worker)
{
    const struct mamba *t = argument;
    struct ops_context *x = t->context;
    const struct model_config *c = &x->config;
    const uint32_t width = c->mamba_head_dim, n = c->state_size;
    const uint32_t group = h / (c->mamba_heads / c->state_groups);
    void *head = head_of(x, t->ssm, h);
    struct block k = {
        .state = cpu_scratch(x, worker), .rate = -expf(t->a_log[h]), .skip = t->skip[h]};
    k.scratch = k.state + cpu_panels(width) * n;
    x->kernels->pack_transposed(head, x->states_bf16 ? OPS_BF16 : OPS_FP32, n, width, n, k.state);
    for (uint32_t block = 0; block * CPU_BLOCK < t->segment->count; block++) {
        const size_t row = t->segment->row + block * CPU_BLOCK;
        float sum = 0;
        k.rows = block_rows(t->segment, block);
        k.u = x->conv + row * c->conv_size + (size_t)h * width;
        k.b = x->conv + row * c->conv_size + c->inner_size + (size_t)group * n;
        k.c = k.b + (size_t)c->state_groups * n;
        k.scores = x->scores + ((size_t)block * c->state_groups + group) * CPU_BLOCK * CPU_BLOCK;
        k.y = x->mixed + row * c->inner_size + (size_t)h * width;
        for (uint32_t i = 0; i < k.rows; i++) {
            k.dt[i] = x->dt[(row + i) * c->mamba_heads + h];
            k.decay[i] = sum += k.dt[i] * k.rate;
        }
        block_output(x, &k);
        block_state(x, &k);
    }
    float *state = x->states_bf16 ? k.scratch : head;
    x->kernels->unpack_transposed(k.state, width, n, state);
    if (x->states_bf16)
        narrow_head(x, state, head);
}

static void gate_task(void *argument, uint32_t index, uint32_t worker)
{
    (void)worker;
    const struct mamba *t = argument;
    struct ops_context *x = t->context;
    const struct model_config *c = &x->config;
    const uint32_t end = index * CONV_ROWS + CONV_ROWS;
    for (uint32_t row = index * CONV_ROWS; row < t->rows->row_count && row < end; row++) {
        float *y = x->mixed + (size_t)row * c->inner_size;
        x->kernels->silu_multiply(y, x->projected + (size_t)row * c->proj_size, c->inner_size);
        x->kernels->rms_norm(y, t->gate_norm, c->inner_size, c->norm_epsilon, y);
    }
}

/* [n, taps] as stored -> [taps, n], so that a row of taps is contiguous over the columns. */
static const float *transposed_conv(struct ops_context *x, const struct ops_tensor *weight)
{
    const struct model_config *c = &x->config;
    const float *from = cpu_vector(x, weight);
    float *to = x->vectors + x->vector_used;
    x->vector_used += (size_t)c->conv_size * c->conv_kernel;
    for (uint32_t j = 0; j < c->conv_size; j++)
        for (uint32_t i = 0; i < c->conv_kernel; i++)
            to[(size_t)i * c->conv_size + j] = from[(size_t)j * c->conv_kernel + i];
    return to;
}

void cpu_mamba(struct ops_context *x, const struct ops_mamba_weights *w,
               const struct ops_rows *rows, const struct ops_mamba_state *states, float *hidden)
{
    const struct model_config *c = &x->config;
    cpu_begin(x);
    struct mamba t = {.context = x,
                      .rows = rows,
                      .states = states,
                      .conv = transposed_conv(x, &w->conv_weight),
                      .conv_bias = cpu_vector(x, &w->conv_bias),
                      .dt_bias = cpu_vector(x, &w->dt_bias),
                      .a_log = cpu_vector(x, &w->a_log),
                      .skip = cpu_vector(x, &w->d),
                      .gate_norm = cpu_vector(x, &w->gate_norm)};
    const uint32_t row_tasks = (rows->row_count + CONV_ROWS - 1) / CONV_ROWS;
    cpu_norm_rows(x, hidden, cpu_vector(x, &w->norm), c->hidden_size, c->norm_epsilon,
                  rows->row_count, x->normed);
    cpu_linear(x, &w->in_proj, cpu_vector(x, &w->in_proj_bias), rows, x->normed, x->projected,
               false);
    pool_run(x->pool, row_tasks, convolve_task, &t);
    keep_tails(&t);
    bool few = false;
    for (uint32_t s = 0; s < rows->segment_count; s++) {
        t.segment = &rows->segments[s];
        t.ssm = states[s].ssm;
        if (t.segment->count <= CPU_FEW_ROWS) {
            few = true;
            continue;
        }
        const uint32_t blocks = (t.segment->count + CPU_BLOCK - 1) / CPU_BLOCK;
        pool_run(x->pool, blocks * c->state_groups, scores_task, &t);
        pool_run(x->pool, c->mamba_heads, blocks_task, &t);
    }
    if (few)
        pool_run(x->pool, rows->segment_count * c->mamba_heads, step_task, &t);
    pool_run(x->pool, row_tasks, gate_task, &t);
    cpu_linear(x, &w->out_proj, cpu_vector(x, &w->out_proj_bias), rows, x->mixed, hidden, true);
}
