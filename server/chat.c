/* chat.c - see chat.h. */
#include "server/chat.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/base/buf.h"
#include "proto/limits.h"

#define IM_START "<|im_start|>"
#define IM_END "<|im_end|>"

/* False: there is no such file, or it is no text of a sensible size. */
static bool read_file(const char *folder, const char *name, struct buf *out)
{
    char path[2048];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "re");
    if (!file)
        return false;
    size_t n = 1;
    while (n && out->size <= LIMITS_JSON_BODY_BYTES) {
        buf_reserve(out, 4096);
        n = fread(out->data + out->size, 1, 4096, file);
        out->size += n;
    }
    const bool good = !ferror(file) && out->size <= LIMITS_JSON_BODY_BYTES;
    fclose(file);
    return good;
}

enum chat_template chat_open(const char *model, const struct tokenizer *tokenizer)
{
    enum chat_template found = CHAT_TEMPLATE_NONE;
    struct buf text;
    buf_init(&text);
    if (read_file(model, "chat_template.jinja", &text)) {
        if (text.size && text.data[text.size - 1] == '\n') /* an editor's */
            text.size--;
        found = chat_template_recognize(text.data, text.size);
    } else {
        text.size = 0;
        if (read_file(model, "tokenizer_config.json", &text))
            found = chat_template_of_config(text.data, text.size);
    }
    buf_close(&text);
    if (found == CHAT_TEMPLATE_CHATML &&
        (tokenizer_added_id(tokenizer, IM_START) < 0 || tokenizer_added_id(tokenizer, IM_END) < 0))
        found = CHAT_TEMPLATE_OTHER;
    return found;
}

struct writer {
    const struct tokenizer *tokenizer;
    struct tokenizer_tokens *tokens;
    size_t bytes;
    enum status status;
};

static void write_text(struct writer *w, const char *text, size_t size, bool is_token)
{
    if (!w->status && size)
        w->status = tokenizer_encode(w->tokenizer, text, size, is_token, w->tokens);
    w->bytes += size;
}

/* One message up to where its end belongs. Role and text are encoded as one, as they would be in
 * the whole rendered text, which only the template's tokens divide. */
static void write_message(struct writer *w, const char *role, const char *text, size_t size)
{
    struct buf said;
    buf_init(&said);
    buf_append_format(&said, "%s\n", role);
    if (size)
        buf_append(&said, text, size);
    write_text(w, IM_START, strlen(IM_START), true);
    write_text(w, said.data, said.size, false);
    buf_close(&said);
}

enum status chat_encode(const struct tokenizer *tokenizer, const struct chat_message *messages,
                        size_t count, bool goes_on, struct tokenizer_tokens *tokens,
                        size_t *text_bytes)
{
    struct writer w = {.tokenizer = tokenizer, .tokens = tokens};
    if (goes_on)
        write_text(&w, "\n", 1, false);
    for (size_t i = 0; i < count; i++) {
        write_message(&w, messages[i].role, messages[i].text, messages[i].size);
        write_text(&w, IM_END, strlen(IM_END), true);
        write_text(&w, "\n", 1, false);
    }
    write_message(&w, "assistant", "", 0);
    *text_bytes += w.bytes;
    return w.status;
}
