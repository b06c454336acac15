/* generate.c - see generate.h. */
#include "server/generate.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "proto/base/assert.h"

static void fill_sampling(const struct completion_request *r, struct sampler_params *params)
{
    sampler_params_default(params);
    params->temperature = (float)r->temperature;
    params->top_k = (int32_t)r->top_k;
    params->top_p = (float)r->top_p;
    params->min_p = (float)r->min_p;
    params->repetition_penalty = (float)r->repetition_penalty;
    params->presence_penalty = (float)r->presence_penalty;
    params->frequency_penalty = (float)r->frequency_penalty;
    params->seed = r->seed;
    params->want_logprobs = r->logprobs >= 0;
    params->top_logprobs = r->logprobs > 0 ? (uint32_t)r->logprobs : 0;
    params->bias_count = r->bias_count;
    if (r->bias_count) {
        struct sampler_bias *bias = malloc(r->bias_count * sizeof *bias);
        ASSERT(bias);
        for (size_t i = 0; i < r->bias_count; i++)
            bias[i] = (struct sampler_bias){r->bias[i].token, r->bias[i].bias};
        params->bias = bias;
    }
}

enum status generate_check(const struct request *request, const struct completion_request *asked,
                           struct error *err)
{
    const struct server *server = request->server;
    const struct engine_info *info = engine_get_info(server->engine);
    if (asked->model[0] && strcmp(asked->model, info->model_name) != 0)
        return error_set_param(err, STATUS_NOT_FOUND, "model",
                               "no model named %s; this server has %s", asked->model,
                               info->model_name);
    if (asked->messages) {
        const enum status can =
            chat_check(&server->chat, asked->messages, asked->message_count, err);
        if (can)
            return can;
    }
    enum status status =
        asked->memory[0] ? request_find_memory(request, asked->memory, err) : STATUS_OK;
    if (status)
        return status;
    struct sampler_params params;
    fill_sampling(asked, &params);
    status = sampler_params_check(&params, (int32_t)info->config->vocab_size, err);
    free((void *)(uintptr_t)params.bias);
    return status;
}

void generate_fill(struct job_generate *generate, const struct completion_request *asked)
{
    fill_sampling(asked, &generate->sampling);
    generate->terms.priority = asked->priority;
    generate->terms.timeout = asked->timeout;
    if (!asked->has_seed)
        ASSERT(getrandom(&generate->sampling.seed, sizeof generate->sampling.seed, 0) ==
               sizeof generate->sampling.seed);
    generate->stop_count = (uint32_t)asked->stop_count;
    for (size_t i = 0; i < asked->stop_count; i++) {
        generate->stop[i] = strdup(asked->stop[i]);
        ASSERT(generate->stop[i]);
        generate->stop_sizes[i] = strlen(generate->stop[i]);
    }
}

void generate_unfill(struct job_generate *generate)
{
    for (size_t i = 0; i < generate->stop_count; i++)
        free(generate->stop[i]);
    free((void *)(uintptr_t)generate->sampling.bias);
}

enum status generate_submit(struct server *server, const struct job_generate *generate,
                            job_event_cb event_cb, void *context, struct job **job,
                            struct error *err)
{
    struct job_generate weighed = *generate;
    weighed.terms.weight = auth_weight(server->auth, generate->terms.tenant);
    const enum status status =
        job_submit_generate(server->engine_thread, &weighed, event_cb, context, job);
    if (status == STATUS_BUSY)
        error_set(err, status,
                  "too much is waiting before this; come again after the time in retry-after");
    else if (status == STATUS_UNAVAILABLE)
        error_set(err, status, "the server is shutting down");
    return status;
}

void generate_add_logprob(const struct tokenizer *tokenizer, struct answer_logprobs *logprobs,
                          bool chat, int32_t token, double logprob, const struct sampler_top *tops,
                          size_t top_count, size_t offset)
{
    struct answer_top named[LIMITS_LOGPROBS];
    size_t size;
    for (size_t i = 0; i < top_count; i++) {
        named[i].text = tokenizer_bytes(tokenizer, tops[i].token, &size);
        named[i].size = size;
        named[i].logprob = (double)tops[i].logprob;
    }
    const char *text = tokenizer_bytes(tokenizer, token, &size);
    if (chat)
        answer_logprobs_add_chat(logprobs, text, size, logprob, named, top_count);
    else
        answer_logprobs_add(logprobs, text, size, logprob, isnan(logprob) ? NULL : named, top_count,
                            offset);
}

size_t generate_characters(const char *text, size_t size)
{
    size_t count = 0;
    for (size_t i = 0; i < size; i++)
        count += ((unsigned char)text[i] & 0xc0) != 0x80;
    return count;
}
