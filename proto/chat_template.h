/* chat_template.h - which chat template a model folder has.
 * Thread: any (pure functions). Owns nothing.
 *
 * Templates are programs in Jinja, which is not run here: a known one is recognised by its text and
 * rendered natively (server/chat.h). */
#ifndef PROTO_CHAT_TEMPLATE_H
#define PROTO_CHAT_TEMPLATE_H

#include <stddef.h>

enum chat_template {
    CHAT_TEMPLATE_NONE,  /* the model has none: it was not taught to chat */
    CHAT_TEMPLATE_OTHER, /* one that is not known here */
    CHAT_TEMPLATE_CHATML,
    CHAT_TEMPLATE_LLAMA_2,
    CHAT_TEMPLATE_LLAMA_3,
    CHAT_TEMPLATE_MISTRAL,
    CHAT_TEMPLATE_MISTRAL_V1,
    CHAT_TEMPLATE_GEMMA,
    CHAT_TEMPLATE_PHI_3,
    CHAT_TEMPLATE_ZEPHYR,
    CHAT_TEMPLATE_COUNT
};

/* "chatml"; "none" and "other" too. */
const char *chat_template_name(enum chat_template chat_template);
/* The one of that name, "none" among them; CHAT_TEMPLATE_OTHER: there is none. */
enum chat_template chat_template_named(const char *name);

/* `source` is the template itself. */
enum chat_template chat_template_recognize(const char *source, size_t size);

struct chat_template_config {
    enum chat_template chat_template;
    char bos[64], eos[64]; /* the tokens' texts, "" where the file names none */
};
/* `json` is the text of a tokenizer_config.json. One that is damaged has CHAT_TEMPLATE_OTHER. */
void chat_template_read_config(const char *json, size_t size, struct chat_template_config *out);

#endif
