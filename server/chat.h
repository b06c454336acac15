/* chat.h - messages as the tokens that the model was taught to read them in.
 * Thread: chat_open at the start, the others on any. Owns nothing. */
#ifndef SERVER_CHAT_H
#define SERVER_CHAT_H

#include <stdbool.h>

#include "engine/tokenizer.h"
#include "proto/chat_template.h"
#include "proto/completion_request.h"

struct chat {
    enum chat_template chat_template; /* never CHAT_TEMPLATE_OTHER once it is open */
    const struct tokenizer *tokenizer;
    char bos[64], eos[64]; /* texts of the tokens that begin and end; "": nothing begins */
};

/* The template named `name`; "": that of the model folder, its chat_template.jinja or else the one
 * of its tokenizer_config.json. `tokenizer` is borrowed for as long as the chat is used.
 * STATUS_UNSUPPORTED: it is not known, or its tokens are not in the vocabulary. */
STATUS_CHECKED enum status chat_open(const char *model, const char *name,
                                     const struct tokenizer *tokenizer, struct chat *chat,
                                     struct error *err);

/* Whether the template can say these messages. STATUS_UNSUPPORTED: the model has none;
 * STATUS_INVALID: not in this order, or nobody of that role. */
STATUS_CHECKED enum status chat_check(const struct chat *chat, const struct chat_message *messages,
                                      size_t count, struct error *err);
/* Appends the messages, which chat_check has passed, and, with `answers`, the beginning of the
 * assistant's; without, they end as an answer does. `goes_on`: behind the end of an answer. What a
 * message says never becomes one of the template's own tokens. Adds to `*text_bytes` the bytes of
 * it all. STATUS_NO_MEMORY. */
STATUS_CHECKED enum status chat_encode(const struct chat *chat, const struct chat_message *messages,
                                       size_t count, bool goes_on, bool answers,
                                       struct tokenizer_tokens *tokens, size_t *text_bytes);

/* Appends messages that end as an answer does, if the user may speak after them: where the template
 * has them take turns, the last is the assistant's. STATUS_INVALID, STATUS_UNSUPPORTED name
 * "items". */
STATUS_CHECKED enum status chat_encode_items(const struct chat *chat,
                                             const struct chat_message *messages, size_t count,
                                             bool goes_on, struct tokenizer_tokens *tokens,
                                             size_t *text_bytes, struct error *err);

#endif
