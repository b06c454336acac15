/* sampler.h - from a row of logits to one token: penalties, bias, temperature, filters, a seed.
 * Thread: one at a time per sampler (the engine's). Owns its token counts and generator.
 * The same seed, parameters, history and logits give the same token on every machine. */
#ifndef ENGINE_SAMPLER_H
#define ENGINE_SAMPLER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/limits.h"
#include "proto/status.h"

struct sampler_bias {
    int32_t token;
    float bias; /* added to the logit; -100 or lower bans the token, as in OpenAI's API */
};

/* Applied in this order: logit bias, repetition penalty (history and generated tokens, the form of
 * CTRL: positive logits divided, negative multiplied), frequency and presence penalties (generated
 * tokens only, as OpenAI defines them), temperature, top_k, top_p, min_p. A token under 2^-44 of
 * the most probable one is never drawn. */
struct sampler_params {
    float temperature;        /* 0: greedy; ties go to the lowest token id */
    int32_t top_k;            /* 0: off */
    float top_p;              /* 1: off; keeps the smallest set whose probability reaches it */
    float min_p;              /* 0: off; relative to the most probable token */
    float repetition_penalty; /* 1: off */
    float presence_penalty, frequency_penalty; /* 0: off */
    uint64_t seed;
    const struct sampler_bias *bias; /* copied at create */
    size_t bias_count;
    uint32_t top_logprobs; /* how many alternatives to report, at most LIMITS_LOGPROBS */
    bool want_logprobs;
};

struct sampler_top {
    int32_t token;
    float logprob;
};

struct sampler_result {
    int32_t token;
    float logprob; /* under the model's own distribution: log softmax of the raw logits */
    uint32_t top_count;
    struct sampler_top top[LIMITS_LOGPROBS]; /* most probable first */
};

struct sampler;

/* Greedy, nothing else switched on, seed 0. */
void sampler_params_default(struct sampler_params *params);
/* STATUS_INVALID names the parameter out of range in err->param. */
STATUS_CHECKED enum status sampler_params_check(const struct sampler_params *params,
                                                int32_t vocab_size, struct error *err);
/* `params` is copied. STATUS_NO_MEMORY. */
STATUS_CHECKED enum status sampler_create(const struct sampler_params *params, int32_t vocab_size,
                                          struct sampler **out);
void sampler_destroy(struct sampler *sampler);
/* Tells the sampler of a prompt token (repetition penalty). */
void sampler_observe(struct sampler *sampler, int32_t token);
/* Whether the next token is that of the largest logit as the model gave it, the lowest of equal
 * ones, and nothing else is asked: who knows it need not have the logits, only tell it. */
bool sampler_takes_largest(const struct sampler *sampler);
/* Whether the next token is drawn from the logits as the model gave them, and nothing else is
 * asked: who has them can draw it by sampler_weight.h from sampler_next_draw, which takes the
 * random number that sampler_sample would, and tell the sampler. */
bool sampler_draws_plainly(const struct sampler *sampler);
struct sampler_draw {
    uint64_t random; /* 53 bits */
    float temperature, top_p, min_p;
    uint32_t top_k; /* 0: off */
};
struct sampler_draw sampler_next_draw(struct sampler *sampler);
void sampler_accept(struct sampler *sampler, int32_t token, struct sampler_result *result);
/* Picks from `logits` [vocab_size] (borrowed, unchanged) and counts the token as generated. */
void sampler_sample(struct sampler *sampler, const float *logits, struct sampler_result *result);
/* Log probability of `target` and the `top_count` best tokens of one row (echoed prompts). */
float sampler_score(const float *logits, int32_t vocab_size, int32_t target,
                    struct sampler_top *top, uint32_t top_count);

/* Stop strings found across token borders. Text goes in as it is decoded; what can no longer be
 * part of a stop string comes out. */
struct sampler_stop;
/* `strings` (count of them, sizes in bytes, none empty) are copied. */
STATUS_CHECKED enum status sampler_stop_create(const char *const *strings, const size_t *sizes,
                                               size_t count, struct sampler_stop **out);
void sampler_stop_destroy(struct sampler_stop *stop);
struct buf;
/* Appends the text that is safe to send to `out`. Returns true when a stop string is complete: the
 * text before it has been appended, the string itself and all after it is dropped. */
bool sampler_stop_feed(struct sampler_stop *stop, const char *text, size_t size, struct buf *out);
/* At the end without a stop: appends what was held back. */
void sampler_stop_flush(struct sampler_stop *stop, struct buf *out);

#endif
