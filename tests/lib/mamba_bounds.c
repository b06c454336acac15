/* mamba_bounds.c - a running error analysis (Wilkinson) beside ref's recurrence: each number that
 * is computed goes with a bound of its error, from the roundings that any code in bf16 makes. What
 * is bounded is each rounding by itself, not its square, so that heads whose numbers are hundreds
 * of times a typical one, and sums whose terms cancel, are held to what they themselves are made
 * of.
 *
 * With u = 2^-8, which bf16 rounds by at most: in_proj takes rows rounded to bf16, whose errors are
 * independent of each other, so that they add up like noise: 3 u times the root of the sum of
 * squares of its terms is more than five standard deviations (one is at most u / sqrt(3)). What it
 * gives is rounded by u of itself, as are x and B behind the convolution, x times its time step and
 * decay, and what a block of rows adds to the state. A time step t that is off by e makes a decay
 * exp(-A t) off by A e of itself. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/ref/ref.h"
#include "tests/lib/mamba_bounds.h"

#define ROUNDING (1.0f / 256)
#define ROUNDING_WIDE 2e-5f /* what fp32's order of sums is allowed */
#define SILU_SLOPE 1.1f     /* at most */

/* A number and how far it may be off. */
struct near {
    float value, error;
};

struct walk {
    const struct model_config *config;
    const struct ops_mamba_weights *weights;
    float *normed;
    struct near *projected, *window, *conv, *ssm; /* window [taps, conv_size], the last row last */
};

static struct near *scratch(size_t count)
{
    return (struct near *)ref_scratch(2 * count);
}

static void project(struct walk *k, const float *x)
{
    const struct model_config *c = k->config;
    const struct ops_mamba_weights *w = k->weights;
    ref_rms_norm(x, &w->norm, c->hidden_size, c->norm_epsilon, k->normed);
    for (uint32_t j = c->inner_size; j < c->proj_size; j++) { /* the gate goes to no state */
        float sum = w->in_proj_bias.data ? ref_at(&w->in_proj_bias, j) : 0, squares = 0;
        for (uint32_t i = 0; i < c->hidden_size; i++) {
            const float term = ref_at(&w->in_proj, (size_t)j * c->hidden_size + i) * k->normed[i];
            sum += term;
            squares += term * term;
        }
        k->projected[j] =
            (struct near){sum, ROUNDING * (3 * sqrtf(squares) + fabsf(sum)) + ROUNDING_WIDE};
    }
}

static void convolve(struct walk *k)
{
    const struct model_config *c = k->config;
    const struct ops_mamba_weights *w = k->weights;
    const uint32_t n = c->conv_size, taps = c->conv_kernel;
    memmove(k->window, k->window + n, (size_t)(taps - 1) * n * sizeof *k->window);
    memcpy(k->window + (size_t)(taps - 1) * n, k->projected + c->inner_size, n * sizeof *k->window);
    for (uint32_t j = 0; j < n; j++) {
        struct near sum = {w->conv_bias.data ? ref_at(&w->conv_bias, j) : 0, 0};
        for (uint32_t i = 0; i < taps; i++) {
            const float weight = ref_at(&w->conv_weight, (size_t)j * taps + i);
            const struct near *row = &k->window[(size_t)i * n + j];
            sum.value += weight * row->value;
            sum.error += fabsf(weight) * row->error;
        }
        const float value = ref_silu(sum.value);
        k->conv[j] = (struct near){value, SILU_SLOPE * sum.error + ROUNDING * fabsf(value)};
    }
}

/* One head's state: h = exp(-A dt) h + dt x outer B. */
static void recur(struct walk *k, uint32_t h)
{
    const struct model_config *c = k->config;
    const struct ops_mamba_weights *w = k->weights;
    const uint32_t n = c->state_size, group = h / (c->mamba_heads / c->state_groups);
    const struct near *x = k->conv + (size_t)h * c->mamba_head_dim;
    const struct near *b = k->conv + c->inner_size + (size_t)group * n;
    const struct near in = k->projected[c->inner_size + c->conv_size + h];
    const float at = in.value + ref_at(&w->dt_bias, h), rate = expf(ref_at(&w->a_log, h));
    const float dt = fminf(fmaxf(ref_softplus(at), c->dt_min), c->dt_max);
    const float dt_error = in.error / (1 + expf(-at));
    const float decay = expf(-dt * rate), decay_error = decay * rate * dt_error;
    for (uint32_t p = 0; p < c->mamba_head_dim; p++) {
        struct near *s = k->ssm + ((size_t)h * c->mamba_head_dim + p) * n;
        const float size = fabsf(x[p].value);
        for (uint32_t i = 0; i < n; i++) {
            const float term = dt * x[p].value * b[i].value;
            const float error = (dt_error + 2 * ROUNDING * dt) * size * fabsf(b[i].value) +
                                dt * (x[p].error * fabsf(b[i].value) + size * b[i].error);
            s[i].error = decay * s[i].error + decay_error * fabsf(s[i].value) + error +
                         ROUNDING_WIDE * fabsf(s[i].value);
            s[i].value = decay * s[i].value + term;
        }
    }
}

void mamba_state_bounds(const struct model_config *c, const struct ops_mamba_weights *weights,
                        const float *x, uint32_t rows, const struct ops_mamba_state *state,
                        float *bounds)
{
    const size_t ssm = (size_t)c->inner_size * c->state_size,
                 tail = (size_t)(c->conv_kernel - 1) * c->conv_size;
    struct walk k = {c,
                     weights,
                     ref_scratch(c->hidden_size),
                     scratch(c->proj_size),
                     scratch(tail + c->conv_size),
                     scratch(c->conv_size),
                     scratch(ssm)};
    for (size_t i = 0; i < ssm; i++)
        k.ssm[i].value = ((const float *)state->ssm)[i];
    for (size_t i = 0; i < tail; i++)
        k.window[c->conv_size + i].value = state->conv[i];
    for (uint32_t row = 0; row < rows; row++) {
        project(&k, x + (size_t)row * c->hidden_size);
        convolve(&k);
        for (uint32_t h = 0; h < c->mamba_heads; h++)
            recur(&k, h);
    }
    for (size_t i = 0; i < ssm; i++)
        bounds[i] = k.ssm[i].error;
    for (size_t i = 0; i < tail; i++)
        bounds[ssm + i] = k.window[c->conv_size + i].error;
    free(k.normed);
    free(k.projected);
    free(k.window);
    free(k.conv);
    free(k.ssm);
}
