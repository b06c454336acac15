/* generate.h - what every request for text shares on its way from its body to a job.
 * Thread: the loop or the pool, one owner at a time. Owns nothing beyond what it says. */
#ifndef SERVER_GENERATE_H
#define SERVER_GENERATE_H

#include "proto/answer_json.h"
#include "proto/completion_request.h"
#include "server/request.h"
#include "server/job.h"

/* Whether this server can do it: the model's name, its chat template, a memory that is the key's,
 * sampling. STATUS_NOT_FOUND, STATUS_UNSUPPORTED, STATUS_INVALID. */
STATUS_CHECKED enum status generate_check(const struct request *request,
                                          const struct completion_request *asked,
                                          struct error *err);
/* Sampling, stop strings, priority and timeout as the job takes them; a seed of chance where none
 * was asked for. */
void generate_fill(struct job_generate *generate, const struct completion_request *asked);
/* Frees what generate_fill made, of a job that was not submitted. */
void generate_unfill(struct job_generate *generate);
/* Submits; a refusal is said in `err`. */
STATUS_CHECKED enum status generate_submit(struct server *server,
                                           const struct job_generate *generate,
                                           job_event_cb event_cb, void *context, struct job **job,
                                           struct error *err);
/* One token's log probability; `chat`: in the chat's form, else with its `offset` in the text. */
void generate_add_logprob(const struct tokenizer *tokenizer, struct answer_logprobs *logprobs,
                          bool chat, int32_t token, double logprob, const struct sampler_top *tops,
                          size_t top_count, size_t offset);
/* Characters of UTF-8 text. */
size_t generate_characters(const char *text, size_t size);

#endif
