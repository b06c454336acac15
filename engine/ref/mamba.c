/* mamba.c - one Mamba-2 block, token by token: the recurrence as the paper states it. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/ref/ref.h"

struct scratch {
    float *normed, *projected, *conv, *y, *ssm;
};

/* conv[j] = SiLU(sum_i w[j][i] xBC[t - k + 1 + i][j] + bias); the tail moves on by one column. */
static void convolve(const struct model_config *c, const struct ops_mamba_weights *w, float *tail,
                     const float *xbc, float *conv)
{
    const uint32_t n = c->conv_size, k = c->conv_kernel;
    for (uint32_t j = 0; j < n; j++) {
        float sum = w->conv_bias.data ? ref_at(&w->conv_bias, j) : 0;
        for (uint32_t i = 0; i + 1 < k; i++)
            sum += ref_at(&w->conv_weight, (size_t)j * k + i) * tail[(size_t)i * n + j];
        sum += ref_at(&w->conv_weight, (size_t)j * k + k - 1) * xbc[j];
        conv[j] = ref_silu(sum);
    }
    memmove(tail, tail + n, (size_t)(k - 2) * n * sizeof *tail);
    memcpy(tail + (size_t)(k - 2) * n, xbc, n * sizeof *tail);
}

/* h = exp(dt A) h + dt x outer B; y = h C + D x, for every head. */
static void recur(const struct model_config *c, const struct ops_mamba_weights *w, float *state,
                  const float *conv, const float *dt_in, float *y)
{
    const uint32_t width = c->mamba_head_dim, n = c->state_size;
    const float *bs = conv + c->inner_size, *cs = bs + (size_t)c->state_groups * n;
    for (uint32_t h = 0; h < c->mamba_heads; h++) {
        const uint32_t group = h / (c->mamba_heads / c->state_groups);
        const float *b = bs + (size_t)group * n, *cc = cs + (size_t)group * n;
        float dt = ref_softplus(dt_in[h] + ref_at(&w->dt_bias, h));
        dt = fminf(fmaxf(dt, c->dt_min), c->dt_max);
        const float decay = expf(-dt * expf(ref_at(&w->a_log, h))), skip = ref_at(&w->d, h);
        for (uint32_t p = 0; p < width; p++) {
            const float x = conv[h * width + p];
            float *s = state + ((size_t)h * width + p) * n, sum = 0;
            for (uint32_t i = 0; i < n; i++) {
                s[i] = decay * s[i] + dt * x * b[i];
                sum += s[i] * cc[i];
            }
            y[h * width + p] = sum + skip * x;
        }
    }
}

static void step(const struct model_config *c, const struct ops_mamba_weights *w, float *tail,
                 struct scratch *s, float *x)
{
    ref_rms_norm(x, &w->norm, c->hidden_size, c->norm_epsilon, s->normed);
    ref_linear(&w->in_proj, &w->in_proj_bias, s->normed, s->projected);
    const float *gate = s->projected, *xbc = gate + c->inner_size, *dt = xbc + c->conv_size;
    convolve(c, w, tail, xbc, s->conv);
    recur(c, w, s->ssm, s->conv, dt, s->y);
    for (uint32_t i = 0; i < c->inner_size; i++)
        s->y[i] *= ref_silu(gate[i]);
    ref_rms_norm(s->y, &w->gate_norm, c->inner_size, c->norm_epsilon, s->y);
    ref_linear(&w->out_proj, &w->out_proj_bias, s->y, s->normed);
    for (uint32_t i = 0; i < c->hidden_size; i++)
        x[i] += s->normed[i];
}

void ref_mamba(struct ops_context *context, const struct ops_mamba_weights *weights,
               const struct ops_rows *rows, const struct ops_mamba_state *states, float *x)
{
    const struct model_config *c = &context->config;
    const enum ops_dtype dtype = context->states_bf16 ? OPS_BF16 : OPS_FP32;
    const size_t numbers = (size_t)c->inner_size * c->state_size;
    struct scratch s = {ref_scratch(c->hidden_size), ref_scratch(c->proj_size),
                        ref_scratch(c->conv_size), ref_scratch(c->inner_size),
                        ref_scratch(numbers)};
    for (uint32_t i = 0; i < rows->segment_count; i++) {
        const struct ops_segment *segment = &rows->segments[i];
        for (size_t j = 0; j < numbers; j++)
            s.ssm[j] = ref_load(states[i].ssm, dtype, j);
        for (uint32_t row = segment->row; row < segment->row + segment->count; row++)
            step(c, weights, states[i].conv, &s, x + (size_t)row * c->hidden_size);
        for (size_t j = 0; j < numbers; j++)
            ref_store(states[i].ssm, dtype, j, s.ssm[j]);
    }
    free(s.normed);
    free(s.projected);
    free(s.conv);
    free(s.y);
    free(s.ssm);
}
