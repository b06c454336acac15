/* chat.h - messages as the tokens that the model was taught to read them in.
 * Thread: chat_open at the start, chat_encode on any. Owns nothing. */
#ifndef SERVER_CHAT_H
#define SERVER_CHAT_H

#include <stdbool.h>

#include "engine/tokenizer.h"
#include "proto/chat_template.h"
#include "proto/completion_request.h"

/* The template of a model folder: its chat_template.jinja, else that of its tokenizer_config.json.
 * One without the template's tokens in its vocabulary has CHAT_TEMPLATE_OTHER. */
enum chat_template chat_open(const char *model, const struct tokenizer *tokenizer);

/* Appends the messages, and the beginning of the assistant's. `goes_on`: behind the end of another
 * message. What a message says never becomes one of the template's own tokens. Adds to
 * `*text_bytes` the bytes of it all. STATUS_NO_MEMORY. */
STATUS_CHECKED enum status chat_encode(const struct tokenizer *tokenizer,
                                       const struct chat_message *messages, size_t count,
                                       bool goes_on, struct tokenizer_tokens *tokens,
                                       size_t *text_bytes);

#endif
