/* sample.cu - tokens drawn from rows of logits, as sampler.c draws them: the same integers, so the
 * same token. One kernel weighs every token; in the second a block a row finds how little the last
 * token that the filters keep may weigh (digit by digit, from sums over the tokens with each
 * digit), then where the random point falls among those that are kept, in the order of the
 * vocabulary. */
#include "engine/cuda/cuda.h"
#include "engine/cuda/device.cuh"
#include "engine/sampler_weight.h"

#define WEIGH_THREADS 256
#define CHOOSE_THREADS 1024
#define DIGIT_BITS 8
#define DIGITS (1u << DIGIT_BITS)
#define ALL_TIES 0xffffffffu

typedef unsigned long long word;

/* Grid: tokens x draws. */
static __global__ void __launch_bounds__(WEIGH_THREADS)
    weigh_tokens(const float *logits, const struct ops_draw *draws, uint32_t vocabulary,
                 word *weights)
{
    const struct ops_draw draw = draws[blockIdx.y];
    const float *row = logits + (size_t)draw.row * vocabulary;
    const float top = sampler_clean(row[draw.largest]);
    const uint32_t i = blockIdx.x * WEIGH_THREADS + threadIdx.x;
    if (i < vocabulary)
        weights[(size_t)blockIdx.y * vocabulary + i] =
            top < -FLT_MAX ? 0 : sampler_weight(sampler_clean(row[i]), top, draw.how.temperature);
}

/* Of the block, in its order: the sum before the thread, and of all. `shared`: a word each. */
static __device__ word sums_before(word own, word *shared, word *all)
{
    const uint32_t at = threadIdx.x;
    shared[at] = own;
    __syncthreads();
    for (uint32_t step = 1; step < CHOOSE_THREADS; step *= 2) {
        const word other = at >= step ? shared[at - step] : 0;
        __syncthreads();
        shared[at] += other;
        __syncthreads();
    }
    const word before = at ? shared[at - 1] : 0;
    *all = shared[CHOOSE_THREADS - 1];
    __syncthreads();
    return before;
}

/* The tokens that are kept: those that weigh more than `weight`, and the first `ties` of those that
 * weigh as much. */
struct cut {
    word weight;
    uint32_t ties;
};

/* The shortest beginning of the order whose measure reaches `wanted`, which is at most all of it;
 * the measure: how many tokens, or how much they weigh. `sums`: [DIGITS], shared. */
static __device__ struct cut find_cut(const word *weights, uint32_t vocabulary, bool by_count,
                                      word wanted, word *sums)
{
    __shared__ struct {
        word prefix, above;
    } found;
    word prefix = 0, above = 0; /* the cut's upper digits; the measure of what has larger ones */
    for (int shift = (SAMPLER_WEIGHT_BITS + DIGIT_BITS) / DIGIT_BITS * DIGIT_BITS - DIGIT_BITS;
         shift >= 0; shift -= DIGIT_BITS) {
        for (uint32_t i = threadIdx.x; i < DIGITS; i += CHOOSE_THREADS)
            sums[i] = 0;
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < vocabulary; i += CHOOSE_THREADS) {
            const word own = weights[i];
            const uint32_t digit = (uint32_t)(own >> shift) & (DIGITS - 1);
            /* Nobody asks for the sum of the lowest: it is what is left. */
            if (digit && own >> shift >> DIGIT_BITS == prefix)
                atomicAdd(&sums[digit], by_count ? 1 : own);
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            uint32_t digit = DIGITS - 1;
            for (; digit && above + sums[digit] < wanted; digit--)
                above += sums[digit];
            found.prefix = prefix << DIGIT_BITS | digit;
            found.above = above;
        }
        __syncthreads();
        prefix = found.prefix;
        above = found.above;
        __syncthreads();
    }
    struct cut cut;
    cut.weight = prefix;
    const word left = wanted - above, ties = by_count || !prefix ? left : (left - 1) / prefix + 1;
    cut.ties = ties < ALL_TIES ? (uint32_t)ties : ALL_TIES;
    return cut;
}

/* What the kept tokens of [first, end) weigh, `ties` of which may weigh as much as the cut. */
static __device__ word weight_of(const word *weights, uint32_t first, uint32_t end,
                                 const struct cut &cut, uint32_t ties)
{
    word sum = 0;
    for (uint32_t i = first; i < end; i++) {
        const bool tie = weights[i] == cut.weight;
        sum += weights[i] > cut.weight || (tie && ties) ? weights[i] : 0;
        ties -= tie && ties;
    }
    return sum;
}

/* Grid: draws. */
static __global__ void __launch_bounds__(CHOOSE_THREADS)
    choose_tokens(const struct ops_draw *draws, uint32_t vocabulary, const word *all_weights,
                  int32_t *tokens)
{
    __shared__ word shared[CHOOSE_THREADS], sums[DIGITS];
    const struct ops_draw draw = draws[blockIdx.x];
    const struct sampler_draw how = draw.how;
    const word *weights = all_weights + (size_t)blockIdx.x * vocabulary;
    const uint32_t each = (vocabulary + CHOOSE_THREADS - 1) / CHOOSE_THREADS;
    const uint32_t first = min(threadIdx.x * each, vocabulary), end = min(first + each, vocabulary);
    word total, own = 0, count;
    for (uint32_t i = first; i < end; i++)
        own += weights[i] != 0;
    sums_before(own, shared, &count);
    own = 0;
    for (uint32_t i = first; i < end; i++)
        own += weights[i];
    sums_before(own, shared, &total);
    if (!total) { /* no logit is a number */
        if (threadIdx.x == 0)
            tokens[blockIdx.x] = draw.largest;
        return;
    }
    struct cut cut;
    cut.weight = 1;
    cut.ties = ALL_TIES;
    if (how.top_k && how.top_k < count)
        cut = find_cut(weights, vocabulary, true, how.top_k, sums);
    for (int filter = 0; filter < 2; filter++) {
        /* First what top_k has left, then what there is to draw from. */
        const word least = sampler_least(how.min_p);
        if (filter && least > cut.weight) {
            cut.weight = least;
            cut.ties = ALL_TIES;
        }
        word ties = 0;
        for (uint32_t i = first; i < end; i++)
            ties += weights[i] == cut.weight;
        word unused;
        const word before = sums_before(ties, shared, &unused);
        const uint32_t left = before < cut.ties ? cut.ties - (uint32_t)before : 0;
        own = weight_of(weights, first, end, cut, left);
        word start = sums_before(own, shared, &total);
        if (!filter) {
            if (how.top_p < 1)
                cut = find_cut(weights, vocabulary, false, sampler_share(how.top_p, total), sums);
            continue;
        }
        const word point = sampler_point(how.random, total);
        if (point < start || point - start >= own)
            return;
        uint32_t ties_left = left;
        for (uint32_t i = first; i < end; i++) {
            const bool tie = weights[i] == cut.weight;
            start += weights[i] > cut.weight || (tie && ties_left) ? weights[i] : 0;
            ties_left -= tie && ties_left;
            if (point < start) {
                tokens[blockIdx.x] = (int32_t)i;
                return;
            }
        }
    }
}

extern "C" void cuda_draw(struct ops_context *x, const struct ops_draw *draws, uint32_t count,
                          const float *logits, int32_t *tokens)
{
    const uint32_t vocabulary = x->config.vocab_size;
    cuda_begin(x);
    for (uint32_t first = 0; first < count; first += CUDA_DRAWS) {
        const uint32_t n = count - first < CUDA_DRAWS ? count - first : CUDA_DRAWS;
        const struct ops_draw *staged =
            (const struct ops_draw *)cuda_stage(x, draws + first, n * sizeof *draws);
        CUDA_LAUNCH(x, weigh_tokens, dim3(cuda_ceil(vocabulary, WEIGH_THREADS), n),
                    dim3(WEIGH_THREADS), 0, logits, staged, vocabulary, (word *)x->draw_weights);
        CUDA_LAUNCH(x, choose_tokens, dim3(n), dim3(CHOOSE_THREADS), 0, staged, vocabulary,
                    (const word *)x->draw_weights, x->drawn);
        cuda_copy_out(x, tokens + first, x->drawn, n * sizeof *tokens);
    }
    cuda_wait(x);
    if (x->failed)
        memset(tokens, 0, count * sizeof *tokens); /* nobody reads tokens that do not exist */
}
