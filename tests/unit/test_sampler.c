/* The sampler: each step of the order in sampler.h by numbers worked out by hand, the distribution
 * it draws from, determinism, log probabilities, and stop strings cut in every possible way. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/sampler.h"
#include "proto/base/buf.h"

#define VOCAB 8
#define DRAWS 40000

static struct sampler *make(const struct sampler_params *params, int32_t vocab_size)
{
    struct sampler *sampler = NULL;
    struct error err = {0};
    assert_int_equal(sampler_params_check(params, vocab_size, &err), STATUS_OK);
    assert_int_equal(sampler_create(params, vocab_size, &sampler), STATUS_OK);
    return sampler;
}

static int32_t sample(struct sampler *sampler, const float *logits)
{
    struct sampler_result result;
    sampler_sample(sampler, logits, &result);
    return result.token;
}

/* Shares of DRAWS tokens, each drawn from logits without any history. */
static void shares(const struct sampler_params *params, const float *logits, double *out)
{
    struct sampler *sampler = make(params, VOCAB);
    memset(out, 0, VOCAB * sizeof *out);
    for (int i = 0; i < DRAWS; i++)
        out[sample(sampler, logits)] += 1.0 / DRAWS;
    sampler_destroy(sampler);
}

static void near(double got, double want, double tolerance)
{
    if (!(fabs(got - want) <= tolerance))
        fail_msg("got %.9g, want %.9g", got, want);
}

/* Logits of the probabilities 0.4, 0.3, 0.15, 0.1, 0.05 and three of 0; ids in disorder. */
static void known_logits(float *logits)
{
    const double p[VOCAB] = {0.1, 0, 0.4, 0.05, 0, 0.3, 0.15, 0};
    for (int i = 0; i < VOCAB; i++)
        logits[i] = p[i] > 0 ? (float)log(p[i]) + 3 : -INFINITY;
}

static void greedy_takes_the_lowest_of_equals(void **state)
{
    (void)state;
    struct sampler_params params;
    sampler_params_default(&params);
    struct sampler *sampler = make(&params, 4);
    const float logits[] = {1, 5, 5, 2};
    const float broken[] = {NAN, -INFINITY, -3, NAN}, infinite[] = {1, INFINITY, 2, INFINITY};
    assert_int_equal(sample(sampler, logits), 1);
    assert_int_equal(sample(sampler, logits), 1);
    assert_int_equal(sample(sampler, broken), 2);
    assert_int_equal(sample(sampler, infinite), 1);
    sampler_destroy(sampler);
}

static void bias_comes_first_and_bans(void **state)
{
    (void)state;
    struct sampler_params params;
    sampler_params_default(&params);
    const struct sampler_bias bias[] = {{1, -100}, {2, 2.5f}, {3, -1000}};
    params.bias = bias;
    params.bias_count = 3;
    struct sampler *sampler = make(&params, 4);
    const float logits[] = {3, 3000, 1, 2000}, closer[] = {4, 3000, 1, 2000};
    assert_int_equal(sample(sampler, logits), 2); /* 3.5 against 3 */
    assert_int_equal(sample(sampler, closer), 0);
    sampler_destroy(sampler);
    /* The repetition penalty divides what the bias has made: (1 + 2.5) / 2 = 1.75. */
    params.repetition_penalty = 2;
    sampler = make(&params, 4);
    sampler_observe(sampler, 2);
    const float over[] = {1.8f, 0, 1, 0}, under[] = {1.7f, 0, 1, 0};
    assert_int_equal(sample(sampler, over), 0);
    sampler_destroy(sampler);
    sampler = make(&params, 4);
    sampler_observe(sampler, 2);
    assert_int_equal(sample(sampler, under), 2);
    sampler_destroy(sampler);
}

static void repetition_counts_history_once(void **state)
{
    (void)state;
    struct sampler_params params;
    sampler_params_default(&params);
    params.repetition_penalty = 2;
    const float positive[] = {4, 2.1f}, negative[] = {-2, -3.9f}, low[] = {-2, -4.1f};
    struct sampler *sampler = make(&params, 2);
    for (int i = 0; i < 3; i++)
        sampler_observe(sampler, 0);
    sampler_observe(sampler, -1);
    sampler_observe(sampler, 2);                    /* beyond the vocabulary: nothing to count */
    assert_int_equal(sample(sampler, positive), 1); /* 2 < 2.1; were it counted thrice, 0.5 */
    sampler_destroy(sampler);
    sampler = make(&params, 2);
    sampler_observe(sampler, 0);
    assert_int_equal(sample(sampler, low), 0); /* -2 * 2 = -4 > -4.1 */
    sampler_destroy(sampler);
    sampler = make(&params, 2);
    sampler_observe(sampler, 0);
    assert_int_equal(sample(sampler, negative), 1);
    /* 1 was generated, so it is penalised now as well: -4 > -7.8. */
    assert_int_equal(sample(sampler, negative), 0);
    sampler_destroy(sampler);
}

static void frequency_and_presence_count_generated_alone(void **state)
{
    (void)state;
    struct sampler_params params;
    sampler_params_default(&params);
    params.frequency_penalty = 1;
    const float logits[] = {5, 2.5f};
    struct sampler *sampler = make(&params, 2);
    for (int i = 0; i < 9; i++)
        sampler_observe(sampler, 0);           /* the prompt has no part in it */
    const int32_t want[] = {0, 0, 0, 1, 0, 1}; /* 5, 4, 3, 2 < 2.5, 2 > 1.5, 1 < 1.5 */
    for (size_t i = 0; i < sizeof want / sizeof *want; i++)
        assert_int_equal(sample(sampler, logits), want[i]);
    sampler_destroy(sampler);
    sampler_params_default(&params);
    params.presence_penalty = 2;
    sampler = make(&params, 2);
    sampler_observe(sampler, 0);
    const float close[] = {5, 4};
    assert_int_equal(sample(sampler, close), 0);
    assert_int_equal(sample(sampler, close), 1); /* 3 against 4 */
    for (int i = 0; i < 5; i++)                  /* once and for all: 3 against 2 */
        assert_int_equal(sample(sampler, close), 0);
    sampler_destroy(sampler);
}

static void draws_follow_the_distribution(void **state)
{
    (void)state;
    struct sampler_params params;
    float logits[VOCAB];
    double share[VOCAB];
    known_logits(logits);
    sampler_params_default(&params);
    params.temperature = 1;
    params.seed = 7;
    shares(&params, logits, share);
    const double want[VOCAB] = {0.1, 0, 0.4, 0.05, 0, 0.3, 0.15, 0};
    for (int i = 0; i < VOCAB; i++)
        near(share[i], want[i], want[i] > 0 ? 0.012 : 0);
    /* Temperature 1/2 squares: 0.16, 0.09, 0.0225, 0.01, 0.0025 of 0.285. */
    params.temperature = 0.5f;
    shares(&params, logits, share);
    near(share[2], 0.16 / 0.285, 0.012);
    near(share[5], 0.09 / 0.285, 0.012);
    near(share[3], 0.0025 / 0.285, 0.005);
}

static void filters_keep_what_they_say(void **state)
{
    (void)state;
    struct sampler_params params;
    float logits[VOCAB];
    double share[VOCAB];
    known_logits(logits);
    sampler_params_default(&params);
    params.temperature = 1;
    params.top_k = 2;
    shares(&params, logits, share);
    near(share[2], 4.0 / 7, 0.012);
    near(share[2] + share[5], 1, 1e-9);
    params.top_k = 0;
    params.top_p = 0.75f; /* 0.4 + 0.3 do not reach it, with 0.15 it is reached */
    shares(&params, logits, share);
    near(share[6], 0.15 / 0.85, 0.012);
    near(share[2] + share[5] + share[6], 1, 1e-9);
    /* After top_k the rest is the whole: 4/7 reaches 0.5, where 0.4 alone would not. */
    params.top_k = 2;
    params.top_p = 0.5f;
    shares(&params, logits, share);
    near(share[2], 1, 1e-9);
    params.top_k = 0;
    params.top_p = 1;
    params.min_p = 0.3f; /* of 0.4: 0.12 and more stay */
    shares(&params, logits, share);
    near(share[2], 0.4 / 0.85, 0.012);
    near(share[2] + share[5] + share[6], 1, 1e-9);
    params.min_p = 0;
    params.top_p = 0;
    shares(&params, logits, share);
    near(share[2], 1, 1e-9);
    params.top_p = 1;
    params.min_p = 1;
    shares(&params, logits, share);
    near(share[2], 1, 1e-9);
}

/* The tail that top_p skips without sorting must not change what it keeps. */
static void top_p_of_many_equals_a_full_sort(void **state)
{
    (void)state;
    enum { MANY = 3000 };
    static float logits[MANY];
    struct sampler_params params;
    sampler_params_default(&params);
    params.temperature = 1;
    params.top_p = 0.9f;
    for (int i = 0; i < MANY; i++)
        logits[i] = -(float)((i * 1237) % MANY) / 100; /* 3000 different values */
    /* Weights e^(-n/100): the first n reach 0.9 where e^(-n/100) <= 0.1: n = 231. */
    struct sampler *sampler = make(&params, MANY);
    int last = 0;
    for (int i = 0; i < 20000; i++) {
        const int place = (sample(sampler, logits) * 1237) % MANY;
        assert_true(place < 231);
        last = place > last ? place : last;
    }
    assert_true(last > 220);
    sampler_destroy(sampler);
}

static void the_same_seed_gives_the_same_tokens(void **state)
{
    (void)state;
    static float logits[1000];
    struct sampler_params params;
    sampler_params_default(&params);
    params.temperature = 0.9f;
    params.top_p = 0.95f;
    params.frequency_penalty = 0.2f;
    params.seed = 42;
    for (int i = 0; i < 1000; i++)
        logits[i] = (float)((i * 7919) % 1000) / 250;
    struct sampler *a = make(&params, 1000), *b = make(&params, 1000);
    params.seed = 43;
    struct sampler *c = make(&params, 1000);
    int different = 0;
    uint64_t sum = 0;
    for (int i = 0; i < 200; i++) {
        const int32_t token = sample(a, logits);
        assert_int_equal(token, sample(b, logits));
        different += token != sample(c, logits);
        sum = sum * 31 + (uint64_t)token;
    }
    assert_true(different > 150);
    assert_int_equal(sum, 0x938222e3d262c462u); /* kept: every machine and compiler must give it */
    sampler_destroy(a);
    sampler_destroy(b);
    sampler_destroy(c);
}

static void log_probabilities_are_the_models_own(void **state)
{
    (void)state;
    struct sampler_params params;
    struct sampler_result result;
    struct sampler_top top[3];
    float logits[VOCAB];
    known_logits(logits);
    sampler_params_default(&params);
    const struct sampler_bias bias = {3, 50};
    params.bias = &bias;
    params.bias_count = 1;
    params.want_logprobs = true;
    params.top_logprobs = 3;
    struct sampler *sampler = make(&params, VOCAB);
    sampler_sample(sampler, logits, &result);
    assert_int_equal(result.token, 3); /* by the bias, which the log probability knows nothing of */
    near((double)result.logprob, log(0.05), 1e-5);
    assert_int_equal(result.top_count, 3);
    const int32_t tokens[] = {2, 5, 6};
    const double probabilities[] = {0.4, 0.3, 0.15};
    near((double)sampler_score(logits, VOCAB, 0, top, 3), log(0.1), 1e-5);
    for (int i = 0; i < 3; i++) {
        assert_int_equal(result.top[i].token, tokens[i]);
        near((double)result.top[i].logprob, log(probabilities[i]), 1e-5);
        assert_int_equal(top[i].token, tokens[i]);
        assert_true(top[i].logprob == result.top[i].logprob);
    }
    assert_true(sampler_score(logits, VOCAB, 1, NULL, 0) == -INFINITY);
    const float equals[] = {1, 2, 2, 2}, none[] = {-INFINITY, NAN};
    sampler_score(equals, 4, 0, top, 2);
    assert_true(top[0].token == 1 && top[1].token == 2);
    assert_true(sampler_score(none, 2, 0, top, 1) == -INFINITY);
    sampler_destroy(sampler);
}

static void refuse(const struct sampler_params *params, const char *param)
{
    struct error err = {0};
    assert_int_equal(sampler_params_check(params, VOCAB, &err), STATUS_INVALID);
    assert_string_equal(err.param, param);
}

#define REFUSE(field, value)          \
    do {                              \
        struct sampler_params bad;    \
        sampler_params_default(&bad); \
        bad.field = (value);          \
        refuse(&bad, #field);         \
    } while (0)

static void parameters_out_of_range_are_named(void **state)
{
    (void)state;
    REFUSE(temperature, -0.1f);
    REFUSE(temperature, 2.1f);
    REFUSE(temperature, NAN);
    REFUSE(top_k, -1);
    REFUSE(top_p, 1.5f);
    REFUSE(top_p, NAN);
    REFUSE(min_p, -0.5f);
    REFUSE(repetition_penalty, 0);
    REFUSE(repetition_penalty, INFINITY);
    REFUSE(presence_penalty, 2.5f);
    REFUSE(frequency_penalty, -2.5f);
    REFUSE(top_logprobs, LIMITS_LOGPROBS + 1);
    struct sampler_params params;
    const struct sampler_bias outside = {VOCAB, 1}, large = {0, 101}, nan = {0, NAN};
    const struct sampler_bias *const all[] = {&outside, &large, &nan};
    for (size_t i = 0; i < 3; i++) {
        sampler_params_default(&params);
        params.bias = all[i];
        params.bias_count = 1;
        refuse(&params, "logit_bias");
    }
    params.bias_count = LIMITS_LOGIT_BIAS + 1;
    refuse(&params, "logit_bias");
}

static struct sampler_stop *make_stop(const char *const *strings, size_t count)
{
    size_t sizes[8];
    struct sampler_stop *stop = NULL;
    for (size_t i = 0; i < count; i++)
        sizes[i] = strlen(strings[i]);
    assert_int_equal(sampler_stop_create(strings, sizes, count, &stop), STATUS_OK);
    return stop;
}

/* Feeds `text` in the pieces that the bits of `cuts` mark; every way must give `want`. */
static void try_stop(const char *const *strings, size_t count, const char *text, const char *want,
                     bool stops)
{
    const size_t size = strlen(text);
    for (uint32_t cuts = 0; cuts < 1u << (size - 1); cuts++) {
        struct sampler_stop *stop = make_stop(strings, count);
        struct buf out;
        bool stopped = false;
        buf_init(&out);
        for (size_t from = 0, at = 1; at <= size; at++)
            if (at == size || (cuts >> (at - 1) & 1)) {
                stopped = sampler_stop_feed(stop, text + from, at - from, &out);
                from = at;
            }
        sampler_stop_flush(stop, &out);
        assert_int_equal(stopped, stops);
        assert_string_equal(buf_text(&out), want);
        buf_close(&out);
        sampler_stop_destroy(stop);
    }
}

static void stop_strings_are_found_across_borders(void **state)
{
    (void)state;
    const char *const one[] = {"STOP"}, *const self[] = {"aab"}, *const two[] = {"abcd", "bc"};
    const char *const same_end[] = {"b", "ab"}, *const deep[] = {"abab!"}, *const line[] = {"\n\n"};
    try_stop(one, 1, "go STOP now", "go ", true);
    try_stop(one, 1, "STSTOSTO", "STSTOSTO", false);
    try_stop(one, 1, "STSTOP", "ST", true);
    try_stop(self, 1, "aaaab", "aa", true);
    try_stop(two, 2, "xabcd", "xa", true);   /* "bc" is complete first */
    try_stop(same_end, 2, "xab", "x", true); /* the longer of those that end together */
    try_stop(deep, 1, "abababab!", "abab", true);
    try_stop(line, 1, "a\nb\n\nc", "a\nb", true);
    try_stop(one, 0, "anything", "anything", false);
}

static void only_what_may_match_is_held_back(void **state)
{
    (void)state;
    const char *const strings[] = {"END.", "ENDLESS"};
    struct sampler_stop *stop = make_stop(strings, 2);
    struct buf out;
    buf_init(&out);
    assert_false(sampler_stop_feed(stop, "the EN", 6, &out));
    assert_string_equal(buf_text(&out), "the ");
    assert_false(sampler_stop_feed(stop, "DL", 2, &out));
    assert_string_equal(buf_text(&out), "the ");
    assert_false(sampler_stop_feed(stop, "Y", 1, &out));
    assert_string_equal(buf_text(&out), "the ENDLY");
    assert_true(sampler_stop_feed(stop, "END.more", 8, &out));
    assert_string_equal(buf_text(&out), "the ENDLY");
    assert_true(sampler_stop_feed(stop, "after", 5, &out)); /* and stays so */
    sampler_stop_flush(stop, &out);
    assert_string_equal(buf_text(&out), "the ENDLY");
    sampler_stop_destroy(stop);
    buf_close(&out);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(greedy_takes_the_lowest_of_equals),
        cmocka_unit_test(bias_comes_first_and_bans),
        cmocka_unit_test(repetition_counts_history_once),
        cmocka_unit_test(frequency_and_presence_count_generated_alone),
        cmocka_unit_test(draws_follow_the_distribution),
        cmocka_unit_test(filters_keep_what_they_say),
        cmocka_unit_test(top_p_of_many_equals_a_full_sort),
        cmocka_unit_test(the_same_seed_gives_the_same_tokens),
        cmocka_unit_test(log_probabilities_are_the_models_own),
        cmocka_unit_test(parameters_out_of_range_are_named),
        cmocka_unit_test(stop_strings_are_found_across_borders),
        cmocka_unit_test(only_what_may_match_is_held_back),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
