/* chat.c - see chat.h. */
#include "server/chat.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/base/buf.h"
#include "proto/limits.h"

/* What stands around what is said. {NAME} is the token NAME, {bos} and {eos} are the model's. */
struct around {
    const char *before, *after; /* NULL: nobody has this role */
};

struct form {
    const char *begin; /* of the whole */
    struct around system, user, assistant;
    const char *prompt;     /* where the assistant is to go on */
    const char *rest;       /* of the end of its turn, behind the token that it ends with */
    bool trim;              /* space around what is said is not part of it */
    bool alternate;         /* user and assistant take turns */
    bool system_is_in_user; /* what the system says begins the user's first message */
    const char *bos, *eos;  /* where the model's files name none */
};

static const struct form forms[CHAT_TEMPLATE_COUNT] = {
    [CHAT_TEMPLATE_CHATML] = {.begin = "",
                              .system = {"{<|im_start|>}system\n", "{<|im_end|>}\n"},
                              .user = {"{<|im_start|>}user\n", "{<|im_end|>}\n"},
                              .assistant = {"{<|im_start|>}assistant\n", "{<|im_end|>}\n"},
                              .prompt = "{<|im_start|>}assistant\n",
                              .rest = "\n"},
    [CHAT_TEMPLATE_LLAMA_2] = {.begin = "",
                               .system = {"<<SYS>>\n", "\n<</SYS>>\n\n"},
                               .user = {"{bos}[INST] ", " [/INST]"},
                               .assistant = {" ", " {eos}"},
                               .prompt = "",
                               .rest = "",
                               .trim = true,
                               .alternate = true,
                               .system_is_in_user = true,
                               .bos = "<s>",
                               .eos = "</s>"},
    [CHAT_TEMPLATE_LLAMA_3] =
        {.begin = "{bos}",
         .system = {"{<|start_header_id|>}system{<|end_header_id|>}\n\n", "{<|eot_id|>}"},
         .user = {"{<|start_header_id|>}user{<|end_header_id|>}\n\n", "{<|eot_id|>}"},
         .assistant = {"{<|start_header_id|>}assistant{<|end_header_id|>}\n\n", "{<|eot_id|>}"},
         .prompt = "{<|start_header_id|>}assistant{<|end_header_id|>}\n\n",
         .rest = "",
         .trim = true,
         .bos = "<|begin_of_text|>"},
    [CHAT_TEMPLATE_MISTRAL] = {.begin = "{bos}",
                               .user = {"[INST] ", " [/INST]"},
                               .assistant = {"", "{eos}"},
                               .prompt = "",
                               .rest = "",
                               .alternate = true,
                               .bos = "<s>",
                               .eos = "</s>"},
    [CHAT_TEMPLATE_MISTRAL_V1] = {.begin = "{bos}",
                                  .user = {"[INST] ", " [/INST]"},
                                  .assistant = {"", "{eos} "},
                                  .prompt = "",
                                  .rest = " ",
                                  .alternate = true,
                                  .bos = "<s>",
                                  .eos = "</s>"},
    [CHAT_TEMPLATE_GEMMA] = {.begin = "{bos}",
                             .user = {"{<start_of_turn>}user\n", "{<end_of_turn>}\n"},
                             .assistant = {"{<start_of_turn>}model\n", "{<end_of_turn>}\n"},
                             .prompt = "{<start_of_turn>}model\n",
                             .rest = "\n",
                             .trim = true,
                             .alternate = true,
                             .bos = "<bos>"},
    [CHAT_TEMPLATE_PHI_3] = {.begin = "{bos}",
                             .system = {"{<|system|>}\n", "{<|end|>}\n"},
                             .user = {"{<|user|>}\n", "{<|end|>}\n{<|assistant|>}\n"},
                             .assistant = {"", "{<|end|>}\n"},
                             .prompt = "",
                             .rest = "\n",
                             .bos = "<s>"},
    [CHAT_TEMPLATE_ZEPHYR] = {.begin = "",
                              .system = {"<|system|>\n", "{eos}\n"},
                              .user = {"<|user|>\n", "{eos}\n"},
                              .assistant = {"<|assistant|>\n", "{eos}\n"},
                              .prompt = "<|assistant|>\n",
                              .rest = "\n",
                              .eos = "</s>"},
};

/* ---- opening ---- */

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

/* The next {NAME} of a piece of a template: where it begins, its end behind the brace, its text. */
static const char *next_token(const struct chat *chat, const char *piece, const char **end,
                              char name[64])
{
    const char *begin = strchr(piece, '{');
    if (!begin)
        return NULL;
    *end = strchr(begin, '}') + 1;
    snprintf(name, 64, "%.*s", (int)(*end - begin - 2), begin + 1);
    if (strcmp(name, "bos") == 0)
        memcpy(name, chat->bos, 64);
    else if (strcmp(name, "eos") == 0)
        memcpy(name, chat->eos, 64);
    return begin;
}

static enum status check_tokens(const struct chat *chat, struct error *err)
{
    const struct form *f = &forms[chat->chat_template];
    const char *pieces[] = {f->begin,      f->system.before,    f->system.after,    f->user.before,
                            f->user.after, f->assistant.before, f->assistant.after, f->prompt};
    for (size_t i = 0; i < sizeof pieces / sizeof *pieces; i++) {
        char name[64];
        for (const char *at = pieces[i]; at && next_token(chat, at, &at, name);)
            if (name[0] && tokenizer_added_id(chat->tokenizer, name) < 0)
                return error_set_param(err, STATUS_UNSUPPORTED, "chat-template",
                                       "the chat template %s has a token %s, which is not in the "
                                       "model's vocabulary; --chat-template names another, or "
                                       "none: a model that only continues text",
                                       chat_template_name(chat->chat_template), name);
    }
    return STATUS_OK;
}

/* Of the model's files, where they say something. */
static void read_folder(const char *model, struct chat_template_config *config)
{
    struct buf text;
    buf_init(&text);
    *config = (struct chat_template_config){.chat_template = CHAT_TEMPLATE_NONE};
    if (read_file(model, "tokenizer_config.json", &text))
        chat_template_read_config(text.data, text.size, config);
    text.size = 0;
    if (read_file(model, "chat_template.jinja", &text)) {
        if (text.size && text.data[text.size - 1] == '\n') /* an editor's */
            text.size--;
        config->chat_template = chat_template_recognize(text.data, text.size);
    }
    buf_close(&text);
}

enum status chat_open(const char *model, const char *name, const struct tokenizer *tokenizer,
                      struct chat *chat, struct error *err)
{
    struct chat_template_config config;
    read_folder(model, &config);
    if (name[0]) {
        config.chat_template = chat_template_named(name);
        if (config.chat_template == CHAT_TEMPLATE_OTHER)
            return error_set_param(err, STATUS_UNSUPPORTED, "chat-template",
                                   "--chat-template %s: it is one of chatml, llama-2, llama-3, "
                                   "mistral, mistral-v1, gemma, phi-3, zephyr, none",
                                   name);
    }
    if (config.chat_template == CHAT_TEMPLATE_OTHER)
        return error_set_param(err, STATUS_UNSUPPORTED, "chat-template",
                               "the chat template of %s is not one that is known here; "
                               "--chat-template names one (chatml, llama-2, llama-3, mistral, "
                               "mistral-v1, gemma, phi-3, zephyr), or none: a model that only "
                               "continues text",
                               model);
    const struct form *form = &forms[config.chat_template];
    *chat = (struct chat){.chat_template = config.chat_template, .tokenizer = tokenizer};
    snprintf(chat->bos, sizeof chat->bos, "%s",
             config.bos[0] || !form->bos ? config.bos : form->bos);
    snprintf(chat->eos, sizeof chat->eos, "%s",
             config.eos[0] || !form->eos ? config.eos : form->eos);
    return check_tokens(chat, err);
}

/* ---- messages ---- */

static const struct around *around_of(const struct form *form, const char *role)
{
    return strcmp(role, "system") == 0 ? &form->system
           : strcmp(role, "user") == 0 ? &form->user
                                       : &form->assistant;
}

enum status chat_check(const struct chat *chat, const struct chat_message *messages, size_t count,
                       struct error *err)
{
    const struct form *form = &forms[chat->chat_template];
    const char *name = chat_template_name(chat->chat_template);
    if (!form->begin)
        return error_set_param(err, STATUS_UNSUPPORTED, "messages",
                               "the model has no chat template: it continues text, see "
                               "/v1/completions");
    bool users_turn = true;
    for (size_t i = 0; i < count; i++) {
        const struct around *around = around_of(form, messages[i].role);
        const bool is_system = around == &form->system;
        if (!around->before)
            return error_set_param(err, STATUS_INVALID, "messages",
                                   "the model's chat template, %s, has no %s messages", name,
                                   messages[i].role);
        if (!form->alternate || (is_system && i == 0))
            continue;
        if (is_system || (around == &form->user) != users_turn)
            return error_set_param(
                err, STATUS_INVALID, "messages",
                "in the model's chat template, %s, user and assistant take "
                "turns and the user begins%s; messages[%zu] does not",
                name, form->system.before ? ", after one system message at most" : "", i);
        users_turn = !users_turn;
    }
    if (form->alternate && users_turn)
        return error_set_param(err, STATUS_INVALID, "messages",
                               "in the model's chat template, %s, the last message is the user's",
                               name);
    return STATUS_OK;
}

/* Text gathers until one of the template's tokens ends it: it is encoded as a whole then, as it
 * would be in the whole rendered text. */
struct writer {
    const struct chat *chat;
    struct tokenizer_tokens *tokens;
    struct buf text;
    size_t bytes;
    enum status status;
};

static void write_text(struct writer *w, const char *text, size_t size)
{
    if (size)
        buf_append(&w->text, text, size);
}

static void encode(struct writer *w, const char *text, size_t size, bool is_token)
{
    if (!w->status && size)
        w->status = tokenizer_encode(w->chat->tokenizer, text, size, is_token, w->tokens);
    w->bytes += size;
}

static void write_gathered(struct writer *w)
{
    encode(w, w->text.data, w->text.size, false);
    w->text.size = 0;
}

static void write_piece(struct writer *w, const char *piece)
{
    char name[64];
    const char *end;
    for (const char *at; (at = next_token(w->chat, piece, &end, name)); piece = end) {
        write_text(w, piece, (size_t)(at - piece));
        if (!name[0])
            continue;
        write_gathered(w);
        encode(w, name, strlen(name), true);
    }
    write_text(w, piece, strlen(piece));
}

static bool is_blank(char c)
{
    return c && strchr(" \t\n\v\f\r", c);
}

/* Without the space around it; `begun`: there is something before it already. */
static void write_trimmed(struct writer *w, const char *text, size_t size, bool begun)
{
    while (size && !begun && is_blank(*text)) {
        text++;
        size--;
    }
    while (size && is_blank(text[size - 1]))
        size--;
    write_text(w, text, size);
}

static void write_message(struct writer *w, const struct form *form,
                          const struct chat_message *system, const struct chat_message *message)
{
    const struct around *around = around_of(form, message->role);
    write_piece(w, around->before);
    if (system) {
        write_piece(w, form->system.before);
        write_text(w, system->text, system->size);
        size_t blank = 0;
        while (blank < message->size && is_blank(message->text[blank]))
            blank++;
        /* Where the user says nothing, the space at this end is around the whole, too. */
        write_trimmed(w, form->system.after, strlen(form->system.after), true);
        if (blank < message->size)
            write_text(w, "\n\n", 2);
    }
    if (form->trim)
        write_trimmed(w, message->text, message->size, system != NULL);
    else
        write_text(w, message->text, message->size);
    write_piece(w, around->after);
}

enum status chat_encode(const struct chat *chat, const struct chat_message *messages, size_t count,
                        bool goes_on, bool answers, struct tokenizer_tokens *tokens,
                        size_t *text_bytes)
{
    const struct form *form = &forms[chat->chat_template];
    struct writer w = {.chat = chat, .tokens = tokens};
    buf_init(&w.text);
    write_piece(&w, goes_on ? form->rest : form->begin);
    const bool within =
        form->system_is_in_user && count > 1 && strcmp(messages[0].role, "system") == 0;
    for (size_t i = within; i < count; i++)
        write_message(&w, form, within && i == 1 ? &messages[0] : NULL, &messages[i]);
    const size_t rest = strlen(form->rest);
    if (answers)
        write_piece(&w, form->prompt);
    else if (rest && w.text.size >= rest &&
             memcmp(w.text.data + w.text.size - rest, form->rest, rest) == 0)
        w.text.size -= rest; /* what goes on writes it */
    write_gathered(&w);
    buf_close(&w.text);
    *text_bytes += w.bytes;
    return w.status;
}

enum status chat_encode_items(const struct chat *chat, const struct chat_message *messages,
                              size_t count, bool goes_on, struct tokenizer_tokens *tokens,
                              size_t *text_bytes, struct error *err)
{
    char nothing[] = "";
    struct chat_message *with_next = calloc(count + 1, sizeof *with_next);
    if (!with_next)
        return error_set(err, STATUS_NO_MEMORY, "out of memory");
    if (count)
        memcpy(with_next, messages, count * sizeof *messages);
    with_next[count] = (struct chat_message){"user", nothing, 0};
    const enum status status = chat_check(chat, with_next, count + 1, err);
    free(with_next);
    if (status) {
        snprintf(err->param, sizeof err->param, "items");
        return status;
    }
    return chat_encode(chat, messages, count, goes_on, false, tokens, text_bytes);
}
