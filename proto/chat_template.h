/* chat_template.h - which chat template a model folder has.
 * Thread: any (pure functions). Owns nothing.
 *
 * Templates are programs in Jinja, which is not run here: a known one is recognised by its text and
 * rendered natively. */
#ifndef PROTO_CHAT_TEMPLATE_H
#define PROTO_CHAT_TEMPLATE_H

#include <stddef.h>

enum chat_template {
    CHAT_TEMPLATE_NONE,   /* the model has none: it was not taught to chat */
    CHAT_TEMPLATE_OTHER,  /* one that is not known here */
    CHAT_TEMPLATE_CHATML, /* <|im_start|>ROLE\nTEXT<|im_end|>\n for each message */
};

/* `source` is the template itself. */
enum chat_template chat_template_recognize(const char *source, size_t size);
/* `json` is the text of a tokenizer_config.json. One that is damaged is CHAT_TEMPLATE_OTHER. */
enum chat_template chat_template_of_config(const char *json, size_t size);

#endif
