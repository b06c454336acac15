/* sampler.c - see sampler.h, and sampler_weight.h for the numbers that the choice of a token
 * depends on. */
#include "engine/sampler.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/sampler_weight.h"
#include "proto/base/assert.h"
#include "proto/base/buf.h"

#define BIAS_BAN (-100.0f)

struct candidate {
    uint64_t weight;
    int32_t token;
};

struct sampler {
    struct sampler_params params;
    struct sampler_bias *bias;
    int32_t vocab_size;
    uint64_t random[4];
    uint32_t *generated; /* [vocab_size] times each token was generated */
    bool *seen;          /* [vocab_size] in the history or generated */
    int32_t *touched;    /* the tokens seen, each once */
    size_t touched_count;
    float *logits;                /* [vocab_size] a copy to work on */
    uint64_t *weights;            /* [vocab_size] */
    struct candidate *candidates; /* [vocab_size] */
};

void sampler_params_default(struct sampler_params *params)
{
    *params = (struct sampler_params){.top_p = 1, .repetition_penalty = 1};
}

static enum status out_of_range(struct error *err, const char *param, const char *range)
{
    return error_set_param(err, STATUS_INVALID, param, "%s must be %s", param, range);
}

/* Written so that NaN is out of every range. */
static bool within(float value, float low, float high)
{
    return value >= low && value <= high;
}

enum status sampler_params_check(const struct sampler_params *params, int32_t vocab_size,
                                 struct error *err)
{
    if (!within(params->temperature, 0, 2))
        return out_of_range(err, "temperature", "from 0 to 2");
    if (params->top_k < 0)
        return out_of_range(err, "top_k", "0 or more");
    if (!within(params->top_p, 0, 1))
        return out_of_range(err, "top_p", "from 0 to 1");
    if (!within(params->min_p, 0, 1))
        return out_of_range(err, "min_p", "from 0 to 1");
    if (!(params->repetition_penalty > 0) || !within(params->repetition_penalty, 0, 100))
        return out_of_range(err, "repetition_penalty", "over 0 and at most 100");
    if (!within(params->presence_penalty, -2, 2))
        return out_of_range(err, "presence_penalty", "from -2 to 2");
    if (!within(params->frequency_penalty, -2, 2))
        return out_of_range(err, "frequency_penalty", "from -2 to 2");
    if (params->top_logprobs > LIMITS_LOGPROBS)
        return error_set_param(err, STATUS_INVALID, "top_logprobs",
                               "top_logprobs must be at most %d", LIMITS_LOGPROBS);
    if (params->bias_count > LIMITS_LOGIT_BIAS)
        return error_set_param(err, STATUS_INVALID, "logit_bias",
                               "logit_bias must hold at most %d tokens", LIMITS_LOGIT_BIAS);
    for (size_t i = 0; i < params->bias_count; i++) {
        const struct sampler_bias *bias = &params->bias[i];
        if (bias->token < 0 || bias->token >= vocab_size)
            return error_set_param(err, STATUS_INVALID, "logit_bias",
                                   "logit_bias: there is no token %d; the vocabulary has %d",
                                   (int)bias->token, (int)vocab_size);
        if (!within(bias->bias, -FLT_MAX, 100))
            return out_of_range(err, "logit_bias", "a number of at most 100");
    }
    return STATUS_OK;
}

/* splitmix64, which the authors of xoshiro256** give for seeding it. */
static void random_seed(uint64_t state[4], uint64_t seed)
{
    for (int i = 0; i < 4; i++) {
        uint64_t z = seed += 0x9e3779b97f4a7c15u;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        state[i] = z ^ (z >> 31);
    }
}

static uint64_t rotate(uint64_t value, int by)
{
    return (value << by) | (value >> (64 - by));
}

/* xoshiro256**; returns 53 random bits. */
static uint64_t random_next(uint64_t s[4])
{
    const uint64_t result = rotate(s[1] * 5, 7) * 9, shifted = s[1] << 17;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= shifted;
    s[3] = rotate(s[3], 45);
    return result >> 11;
}

enum status sampler_create(const struct sampler_params *params, int32_t vocab_size,
                           struct sampler **out)
{
    const size_t size = (size_t)vocab_size;
    ASSERT(vocab_size > 0);
    struct sampler *s = calloc(1, sizeof *s);
    if (!s)
        return STATUS_NO_MEMORY;
    s->params = *params;
    s->vocab_size = vocab_size;
    random_seed(s->random, params->seed);
    s->bias = calloc(params->bias_count + 1, sizeof *s->bias);
    s->generated = calloc(size, sizeof *s->generated);
    s->seen = calloc(size, sizeof *s->seen);
    s->touched = malloc(size * sizeof *s->touched);
    s->logits = malloc(size * sizeof *s->logits);
    s->weights = malloc(size * sizeof *s->weights);
    s->candidates = malloc(size * sizeof *s->candidates);
    if (!s->bias || !s->generated || !s->seen || !s->touched || !s->logits || !s->weights ||
        !s->candidates) {
        sampler_destroy(s);
        return STATUS_NO_MEMORY;
    }
    if (params->bias_count > 0)
        memcpy(s->bias, params->bias, params->bias_count * sizeof *s->bias);
    s->params.bias = s->bias;
    *out = s;
    return STATUS_OK;
}

void sampler_destroy(struct sampler *s)
{
    if (!s)
        return;
    free(s->bias);
    free(s->generated);
    free(s->seen);
    free(s->touched);
    free(s->logits);
    free(s->weights);
    free(s->candidates);
    free(s);
}

void sampler_observe(struct sampler *s, int32_t token)
{
    if (token < 0 || token >= s->vocab_size || s->seen[token])
        return;
    s->seen[token] = true;
    s->touched[s->touched_count++] = token;
}

/* Bias, then the three penalties, on s->logits. */
static void adjust(struct sampler *s, const float *logits)
{
    const struct sampler_params *p = &s->params;
    for (int32_t i = 0; i < s->vocab_size; i++)
        s->logits[i] = sampler_clean(logits[i]);
    for (size_t i = 0; i < p->bias_count; i++) {
        float *logit = &s->logits[s->bias[i].token];
        *logit = s->bias[i].bias <= BIAS_BAN ? -INFINITY : *logit + s->bias[i].bias;
    }
    for (size_t i = 0; i < s->touched_count; i++) {
        const int32_t token = s->touched[i];
        const float count = (float)s->generated[token];
        float logit = s->logits[token];
        if (p->repetition_penalty != 1)
            logit = logit > 0 ? logit / p->repetition_penalty : logit * p->repetition_penalty;
        logit -= p->frequency_penalty * count;
        if (count > 0)
            logit -= p->presence_penalty;
        s->logits[token] = sampler_clean(logit);
    }
}

static int32_t largest(const float *logits, int32_t count)
{
    int32_t best = 0;
    for (int32_t i = 1; i < count; i++)
        if (logits[i] > logits[best])
            best = i;
    return best;
}

/* Most probable first; ties by id, so that the order is total and the same everywhere. */
static bool comes_before(const struct candidate *a, const struct candidate *b)
{
    return a->weight != b->weight ? a->weight > b->weight : a->token < b->token;
}

/* Moves the candidate at `at` down the heap of `count`, whose root is the last in the order, to
 * where it is behind both of its children. */
static void sift(struct candidate *heap, size_t at, size_t count)
{
    const struct candidate moved = heap[at];
    for (size_t child; (child = 2 * at + 1) < count; at = child) {
        if (child + 1 < count && comes_before(&heap[child], &heap[child + 1]))
            child++;
        if (comes_before(&heap[child], &moved))
            break;
        heap[at] = heap[child];
    }
    heap[at] = moved;
}

/* In place: qsort takes memory for a copy of what it sorts, at every token. */
static void sort(struct candidate *candidates, size_t count)
{
    for (size_t i = count / 2; i--;)
        sift(candidates, i, count);
    for (size_t i = count; i > 1;) {
        const struct candidate last = candidates[--i];
        candidates[i] = candidates[0];
        candidates[0] = last;
        sift(candidates, 0, i);
    }
}

static uint64_t total_weight(const struct candidate *candidates, size_t count)
{
    uint64_t sum = 0;
    for (size_t i = 0; i < count; i++)
        sum += candidates[i].weight;
    return sum;
}

/* Drops tokens so improbable that top_p cannot reach them, which spares most of the sort: all the
 * tokens under (1 - top_p) / count of the total make up no more than 1 - top_p of it. */
static size_t drop_tail(struct candidate *candidates, size_t count, double top_p)
{
    const double total = (double)total_weight(candidates, count);
    const uint64_t least = (uint64_t)((1 - top_p) * total / (double)count * 0.999);
    size_t kept = 0;
    for (size_t i = 0; i < count; i++)
        if (candidates[i].weight >= least)
            candidates[kept++] = candidates[i];
    return kept;
}

/* top_k, top_p, min_p, each on what the one before has left, which is always the beginning of the
 * order. Returns the last that is left. */
static struct candidate filter(const struct sampler_params *p, struct candidate *candidates,
                               size_t count)
{
    const bool by_k = p->top_k > 0 && (size_t)p->top_k < count, by_p = p->top_p < 1;
    struct candidate last = {1, INT32_MAX}; /* all that weigh anything */
    uint64_t wanted = sampler_share(p->top_p, total_weight(candidates, count));
    if (by_p && !by_k)
        count = drop_tail(candidates, count, (double)p->top_p);
    if (by_p || by_k)
        sort(candidates, count);
    if (by_k) {
        last = candidates[p->top_k - 1];
        wanted = sampler_share(p->top_p, total_weight(candidates, (size_t)p->top_k));
    }
    if (by_p) {
        uint64_t sum = 0;
        size_t kept = 0;
        while (sum < wanted)
            sum += candidates[kept++].weight;
        last = candidates[kept - 1];
    }
    const struct candidate least = {sampler_least(p->min_p), INT32_MAX};
    return comes_before(&least, &last) ? least : last;
}

static int32_t draw(struct sampler *s)
{
    const int32_t best = largest(s->logits, s->vocab_size);
    const float top = s->logits[best];
    if (s->params.temperature == 0)
        return best;
    const uint64_t random = random_next(s->random);
    if (top < -FLT_MAX)
        return best;
    size_t count = 0;
    for (int32_t i = 0; i < s->vocab_size; i++) {
        s->weights[i] = sampler_weight(s->logits[i], top, s->params.temperature);
        if (s->weights[i])
            s->candidates[count++] = (struct candidate){s->weights[i], i};
    }
    const struct candidate last = filter(&s->params, s->candidates, count);
    count = 0;
    for (int32_t i = 0; i < s->vocab_size; i++) {
        const struct candidate own = {s->weights[i], i};
        if (!comes_before(&last, &own))
            s->candidates[count++] = own;
    }
    uint64_t left = sampler_point(random, total_weight(s->candidates, count));
    size_t at = 0;
    while (left >= s->candidates[at].weight)
        left -= s->candidates[at++].weight;
    return s->candidates[at].token;
}

float sampler_score(const float *logits, int32_t vocab_size, int32_t target,
                    struct sampler_top *top, uint32_t top_count)
{
    double largest_logit = -INFINITY, sum = 0;
    uint32_t count = 0;
    for (int32_t i = 0; i < vocab_size; i++) {
        const float logit = sampler_clean(logits[i]);
        largest_logit = (double)logit > largest_logit ? (double)logit : largest_logit;
        if (count == top_count && (count == 0 || logit <= top[count - 1].logprob))
            continue;
        uint32_t at = count < top_count ? count++ : count - 1;
        for (; at > 0 && top[at - 1].logprob < logit; at--)
            top[at] = top[at - 1];
        top[at] = (struct sampler_top){i, logit};
    }
    for (int32_t i = 0; i < vocab_size; i++)
        sum += sampler_exponential((double)sampler_clean(logits[i]) - largest_logit);
    /* A row without one number has no distribution: every log probability is then -infinity. */
    const double base = sum > 0 ? largest_logit + log(sum) : 0;
    for (uint32_t i = 0; i < count; i++)
        top[i].logprob = (float)((double)top[i].logprob - base);
    for (uint32_t i = count; i < top_count; i++)
        top[i] = (struct sampler_top){-1, -INFINITY};
    if (target < 0 || target >= vocab_size)
        return -INFINITY;
    return (float)((double)sampler_clean(logits[target]) - base);
}

/* Nothing but the logits themselves is looked at, and nothing but a token is asked for. */
static bool is_plain(const struct sampler *s)
{
    const struct sampler_params *p = &s->params;
    return !p->bias_count && p->repetition_penalty == 1 && p->frequency_penalty == 0 &&
           p->presence_penalty == 0 && !p->want_logprobs;
}

bool sampler_takes_largest(const struct sampler *s)
{
    return s->params.temperature == 0 && is_plain(s);
}

bool sampler_draws_plainly(const struct sampler *s)
{
    return s->params.temperature > 0 && is_plain(s);
}

struct sampler_draw sampler_next_draw(struct sampler *s)
{
    const struct sampler_params *p = &s->params;
    return (struct sampler_draw){.random = random_next(s->random),
                                 .temperature = p->temperature,
                                 .top_p = p->top_p,
                                 .min_p = p->min_p,
                                 .top_k = (uint32_t)p->top_k};
}

void sampler_accept(struct sampler *s, int32_t token, struct sampler_result *result)
{
    result->token = token;
    result->logprob = 0;
    result->top_count = 0;
    sampler_observe(s, token);
    s->generated[token]++;
}

void sampler_sample(struct sampler *s, const float *logits, struct sampler_result *result)
{
    adjust(s, logits);
    sampler_accept(s, draw(s), result);
    if (s->params.want_logprobs) {
        result->top_count = s->params.top_logprobs;
        if (result->top_count > (uint32_t)s->vocab_size)
            result->top_count = (uint32_t)s->vocab_size;
        result->logprob =
            sampler_score(logits, s->vocab_size, result->token, result->top, result->top_count);
    }
}

/* One string of Knuth, Morris and Pratt's automaton. */
struct stop_string {
    char *text;
    size_t size;
    size_t *fall; /* [size] longest proper prefix of text[0..i] that is also its suffix */
    size_t matched;
};

struct sampler_stop {
    struct stop_string *strings;
    size_t count;
    struct buf held; /* text that may be the beginning of a stop string */
    bool stopped;
};

static void stop_string_prepare(struct stop_string *string)
{
    string->fall[0] = 0;
    for (size_t i = 1, length = 0; i < string->size; i++) {
        while (length > 0 && string->text[i] != string->text[length])
            length = string->fall[length - 1];
        length += string->text[i] == string->text[length];
        string->fall[i] = length;
    }
}

enum status sampler_stop_create(const char *const *strings, const size_t *sizes, size_t count,
                                struct sampler_stop **out)
{
    struct sampler_stop *stop = calloc(1, sizeof *stop);
    if (!stop)
        return STATUS_NO_MEMORY;
    buf_init(&stop->held);
    stop->strings = calloc(count + 1, sizeof *stop->strings);
    for (size_t i = 0; stop->strings && i < count; i++) {
        struct stop_string *string = &stop->strings[stop->count++];
        ASSERT(sizes[i] > 0);
        string->size = sizes[i];
        string->text = malloc(sizes[i]);
        string->fall = malloc(sizes[i] * sizeof *string->fall);
        if (!string->text || !string->fall) {
            sampler_stop_destroy(stop);
            return STATUS_NO_MEMORY;
        }
        memcpy(string->text, strings[i], sizes[i]);
        stop_string_prepare(string);
    }
    if (!stop->strings) {
        sampler_stop_destroy(stop);
        return STATUS_NO_MEMORY;
    }
    *out = stop;
    return STATUS_OK;
}

void sampler_stop_destroy(struct sampler_stop *stop)
{
    if (!stop)
        return;
    for (size_t i = 0; i < stop->count; i++) {
        free(stop->strings[i].text);
        free(stop->strings[i].fall);
    }
    free(stop->strings);
    buf_close(&stop->held);
    free(stop);
}

/* Returns the size of the longest stop string that `byte` completes, or 0. */
static size_t stop_step(struct sampler_stop *stop, char byte)
{
    size_t complete = 0;
    for (size_t i = 0; i < stop->count; i++) {
        struct stop_string *string = &stop->strings[i];
        while (string->matched > 0 && string->text[string->matched] != byte)
            string->matched = string->fall[string->matched - 1];
        string->matched += string->text[string->matched] == byte;
        if (string->matched == string->size) {
            complete = string->size > complete ? string->size : complete;
            string->matched = string->fall[string->size - 1];
        }
    }
    return complete;
}

bool sampler_stop_feed(struct sampler_stop *stop, const char *text, size_t size, struct buf *out)
{
    const size_t before = stop->held.size;
    if (stop->stopped)
        return true;
    buf_append(&stop->held, text, size);
    for (size_t i = 0; i < size; i++) {
        const size_t complete = stop_step(stop, text[i]);
        if (complete > 0) {
            buf_append(out, stop->held.data, before + i + 1 - complete);
            stop->held.size = 0;
            stop->stopped = true;
            return true;
        }
    }
    size_t keep = 0;
    for (size_t i = 0; i < stop->count; i++)
        keep = stop->strings[i].matched > keep ? stop->strings[i].matched : keep;
    const size_t safe = stop->held.size - keep;
    buf_append(out, stop->held.data, safe);
    buf_consume(&stop->held, safe);
    return false;
}

void sampler_stop_flush(struct sampler_stop *stop, struct buf *out)
{
    if (!stop->stopped)
        buf_append(out, stop->held.data, stop->held.size);
    stop->held.size = 0;
    for (size_t i = 0; i < stop->count; i++)
        stop->strings[i].matched = 0;
}
