/* Chat templates: recognised by their text, chosen by name, refused otherwise; and what each makes
 * of some talks, held against what Jinja 3.1 made of the published templates (trim_blocks and
 * lstrip_blocks on, as they are written for). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "proto/base/buf.h"
#include "server/chat.h"
#include "tests/lib/store_helper.h"

#define BYTE_LEVEL "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"trim_offsets\":true}"
#define NO_FOLDER "/nowhere"

static const char *const added[] = {
    "<|im_start|>",        "<|im_end|>",        "<s>",        "</s>",          "<|begin_of_text|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<bos>",         "<start_of_turn>",
    "<end_of_turn>",       "<|system|>",        "<|user|>",   "<|assistant|>", "<|end|>"};
#define ADDED (sizeof added / sizeof *added)

static struct error err;

/* Bytes, and so many of the added tokens. */
static struct tokenizer *make_tokenizer(size_t added_count)
{
    struct buf json;
    struct tokenizer *tokenizer;
    int next = 256;
    buf_init(&json);
    buf_append_text(&json, "{\"added_tokens\":[");
    for (size_t i = 0; i < added_count; i++)
        buf_append_format(&json,
                          "%s{\"id\":%zu,\"content\":\"%s\",\"single_word\":false,"
                          "\"lstrip\":false,\"rstrip\":false,\"normalized\":false,"
                          "\"special\":true}",
                          i ? "," : "", 300 + i, added[i]);
    buf_append_text(&json, "],\"normalizer\":null,\"pre_tokenizer\":" BYTE_LEVEL
                           ",\"post_processor\":null,\"decoder\":" BYTE_LEVEL
                           ",\"model\":{\"type\":\"BPE\",\"vocab\":{");
    for (int byte = 0; byte < 256; byte++) {
        const bool printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte != 173);
        buf_append_format(&json, "%s\"\\u%04x\":%d", byte ? "," : "", printable ? byte : next,
                          byte);
        next += !printable;
    }
    buf_append_text(&json, "},\"merges\":[]}}");
    if (tokenizer_open_memory(json.data, json.size, &tokenizer, &err))
        fail_msg("%s", err.message);
    buf_close(&json);
    return tokenizer;
}

#define TALKS 4
#define SAY(role, text)                                \
    {                                                  \
        role, (char *)(uintptr_t)text, sizeof text - 1 \
    }
static const struct chat_message plain[] = {SAY("user", "Hello"), SAY("assistant", "Hi there"),
                                            SAY("user", "  Who are you?\n")},
                                 system_first[] = {SAY("system", " Be brief. "),
                                                   SAY("user", "\nHello "),
                                                   SAY("assistant", " Hi\n"), SAY("user", "Who?")},
                                 empty[] = {SAY("system", "Be brief."), SAY("user", "  ")},
                                 one[] = {SAY("user", "")};
static const struct {
    const struct chat_message *messages;
    size_t count;
} talks[TALKS] = {{plain, 3}, {system_first, 4}, {empty, 2}, {one, 1}};

static const struct {
    const char *name, *rendered[TALKS]; /* NULL: the template raises an exception */
} expected[] = {
    {"chatml",
     {"<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi "
      "there<|im_end|>\n<|im_start|>user\n  Who are you?\n<|im_end|>\n<|im_start|>assistant\n",
      "<|im_start|>system\n Be brief. <|im_end|>\n<|im_start|>user\n\nHello "
      "<|im_end|>\n<|im_start|>assistant\n "
      "Hi\n<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n",
      "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n  "
      "<|im_end|>\n<|im_start|>assistant\n",
      "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"}},
    {"llama-2",
     {"<s>[INST] Hello [/INST] Hi there </s><s>[INST] Who are you? [/INST]",
      "<s>[INST] <<SYS>>\n Be brief. \n<</SYS>>\n\n\nHello [/INST] Hi </s><s>[INST] Who? [/INST]",
      "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>> [/INST]", "<s>[INST]  [/INST]"}},
    {"llama-3",
     {"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|><|start_header_"
      "id|>assistant<|end_header_id|>\n\nHi "
      "there<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWho are "
      "you?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
      "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe "
      "brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|><|start_header_"
      "id|>assistant<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>user<|end_header_id|>"
      "\n\nWho?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
      "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe "
      "brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n<|eot_id|><|start_header_id|>"
      "assistant<|end_header_id|>\n\n",
      "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<|eot_id|><|start_header_id|>"
      "assistant<|end_header_id|>\n\n"}},
    {"mistral",
     {"<s>[INST] Hello [/INST]Hi there</s>[INST]   Who are you?\n [/INST]", NULL, NULL,
      "<s>[INST]  [/INST]"}},
    {"mistral-v1",
     {"<s>[INST] Hello [/INST]Hi there</s> [INST]   Who are you?\n [/INST]", NULL, NULL,
      "<s>[INST]  [/INST]"}},
    {"gemma",
     {"<bos><start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\nHi "
      "there<end_of_turn>\n<start_of_turn>user\nWho are you?<end_of_turn>\n<start_of_turn>model\n",
      NULL, NULL, "<bos><start_of_turn>user\n<end_of_turn>\n<start_of_turn>model\n"}},
    {"phi-3",
     {"<s><|user|>\nHello<|end|>\n<|assistant|>\nHi there<|end|>\n<|user|>\n  Who are "
      "you?\n<|end|>\n<|assistant|>\n",
      "<s><|system|>\n Be brief. <|end|>\n<|user|>\n\nHello <|end|>\n<|assistant|>\n "
      "Hi\n<|end|>\n<|user|>\nWho?<|end|>\n<|assistant|>\n",
      "<s><|system|>\nBe brief.<|end|>\n<|user|>\n  <|end|>\n<|assistant|>\n",
      "<s><|user|>\n<|end|>\n<|assistant|>\n"}},
    {"zephyr",
     {"<|user|>\nHello</s>\n<|assistant|>\nHi there</s>\n<|user|>\n  Who are "
      "you?\n</s>\n<|assistant|>\n",
      "<|system|>\n Be brief. </s>\n<|user|>\n\nHello </s>\n<|assistant|>\n "
      "Hi\n</s>\n<|user|>\nWho?</s>\n<|assistant|>\n",
      "<|system|>\nBe brief.</s>\n<|user|>\n  </s>\n<|assistant|>\n",
      "<|user|>\n</s>\n<|assistant|>\n"}},
};

static void check(const struct chat *chat, const struct chat_message *messages, size_t count,
                  const char *rendered)
{
    struct tokenizer_tokens said = {0}, whole = {0};
    struct buf text;
    size_t bytes = 0;
    buf_init(&text);
    assert_int_equal(chat_encode(chat, messages, count, false, true, &said, &bytes), STATUS_OK);
    for (size_t i = 0; i < said.count; i++) {
        size_t size;
        const char *piece = tokenizer_bytes(chat->tokenizer, said.ids[i], &size);
        buf_append(&text, piece, size);
    }
    assert_string_equal(buf_text(&text), rendered);
    assert_int_equal(bytes, strlen(rendered));
    assert_int_equal(tokenizer_encode(chat->tokenizer, rendered, strlen(rendered), true, &whole),
                     STATUS_OK);
    /* The same tokens, the template's own among them; zephyr's roles are plain text. */
    if (chat->chat_template != CHAT_TEMPLATE_ZEPHYR) {
        assert_int_equal(said.count, whole.count);
        assert_memory_equal(said.ids, whole.ids, said.count * sizeof *said.ids);
    }
    tokenizer_tokens_close(&said);
    tokenizer_tokens_close(&whole);
    buf_close(&text);
}

static void test_renderings(void **state)
{
    (void)state;
    struct tokenizer *tokenizer = make_tokenizer(ADDED);
    assert_int_equal(sizeof expected / sizeof *expected,
                     CHAT_TEMPLATE_COUNT - CHAT_TEMPLATE_CHATML);
    for (size_t i = 0; i < sizeof expected / sizeof *expected; i++) {
        struct chat chat;
        if (chat_open(NO_FOLDER, expected[i].name, tokenizer, &chat, &err))
            fail_msg("%s: %s", expected[i].name, err.message);
        assert_string_equal(chat_template_name(chat.chat_template), expected[i].name);
        for (size_t k = 0; k < TALKS; k++) {
            const enum status status = chat_check(&chat, talks[k].messages, talks[k].count, &err);
            assert_true((status == STATUS_OK) == (expected[i].rendered[k] != NULL));
            if (!status)
                check(&chat, talks[k].messages, talks[k].count, expected[i].rendered[k]);
        }
    }
    tokenizer_close(tokenizer);
}

/* A talk that is continued turn by turn reads as it does in one piece. */
static void test_going_on(void **state)
{
    (void)state;
    struct tokenizer *tokenizer = make_tokenizer(ADDED);
    for (size_t i = 0; i < sizeof expected / sizeof *expected; i++) {
        struct chat chat;
        struct tokenizer_tokens whole = {0}, parts = {0};
        static const struct chat_message talk[] = {SAY("user", "Hello"), SAY("assistant", "Hi"),
                                                   SAY("user", "Who?")};
        size_t bytes = 0;
        assert_int_equal(chat_open(NO_FOLDER, expected[i].name, tokenizer, &chat, &err), STATUS_OK);
        assert_int_equal(chat_encode(&chat, talk, 3, false, true, &whole, &bytes), STATUS_OK);
        assert_int_equal(chat_encode(&chat, talk, 1, false, true, &parts, &bytes), STATUS_OK);
        const size_t begun = parts.count;
        assert_memory_equal(parts.ids, whole.ids, begun * sizeof *whole.ids);
        parts.count = 0;
        assert_int_equal(chat_encode(&chat, talk + 2, 1, true, true, &parts, &bytes), STATUS_OK);
        const size_t last = whole.count - parts.count;
        assert_memory_equal(parts.ids, whole.ids + last, parts.count * sizeof *parts.ids);
        /* Between the two, what the model says: the words, and the token that ends its turn. */
        struct buf between;
        buf_init(&between);
        for (size_t k = begun; k < last; k++) {
            size_t size;
            const char *piece = tokenizer_bytes(tokenizer, whole.ids[k], &size);
            buf_append(&between, piece, size);
        }
        const char *said = buf_text(&between);
        said += *said == ' ';
        assert_memory_equal(said, "Hi", 2);
        assert_true(whole.ids[last - 1] >= 300);
        buf_close(&between);
        tokenizer_tokens_close(&whole);
        tokenizer_tokens_close(&parts);
    }
    tokenizer_close(tokenizer);
}

static void test_orders(void **state)
{
    (void)state;
    struct tokenizer *tokenizer = make_tokenizer(ADDED);
    static const struct chat_message user_twice[] = {SAY("user", "a"), SAY("user", "b")},
                                     assistant_first[] = {SAY("assistant", "a"), SAY("user", "b")},
                                     system_later[] = {SAY("user", "a"), SAY("system", "b"),
                                                       SAY("user", "c")},
                                     assistant_last[] = {SAY("user", "a"), SAY("assistant", "b")};
    static const struct {
        const struct chat_message *messages;
        size_t count;
    } orders[] = {{user_twice, 2}, {assistant_first, 2}, {system_later, 3}, {assistant_last, 2}};
    for (enum chat_template t = CHAT_TEMPLATE_CHATML; t < CHAT_TEMPLATE_COUNT; t++) {
        struct chat chat;
        const bool strict = t == CHAT_TEMPLATE_LLAMA_2 || t == CHAT_TEMPLATE_MISTRAL ||
                            t == CHAT_TEMPLATE_MISTRAL_V1 || t == CHAT_TEMPLATE_GEMMA;
        assert_int_equal(chat_open(NO_FOLDER, chat_template_name(t), tokenizer, &chat, &err),
                         STATUS_OK);
        for (size_t i = 0; i < sizeof orders / sizeof *orders; i++) {
            err = (struct error){0};
            const enum status status = chat_check(&chat, orders[i].messages, orders[i].count, &err);
            assert_int_equal(status, strict ? STATUS_INVALID : STATUS_OK);
            assert_string_equal(err.param, strict ? "messages" : "");
        }
    }
    tokenizer_close(tokenizer);
}

static void write_file(const char *folder, const char *name, const char *text)
{
    char path[1200];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    fputs(text, file);
    assert_int_equal(fclose(file), 0);
}

#define CHATML_JSON                                                                            \
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + "               \
    "message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ " \
    "'<|im_start|>assistant\\n' }}{% endif %}"

static void test_folders(void **state)
{
    (void)state;
    static const struct {
        const char *json;
        enum chat_template found; /* OTHER: refused */
    } cases[] = {
        {"{}", CHAT_TEMPLATE_NONE},
        {"{\"chat_template\":null}", CHAT_TEMPLATE_NONE},
        {"{\"chat_template\":", CHAT_TEMPLATE_OTHER},
        {"{\"chat_template\":[]}", CHAT_TEMPLATE_OTHER},
        {"{\"chat_template\":\"\"}", CHAT_TEMPLATE_OTHER},
        {"{\"chat_template\":\"{{ messages }}\"}", CHAT_TEMPLATE_OTHER},
        {"{\"chat_template\":\"" CHATML_JSON "\"}", CHAT_TEMPLATE_CHATML},
        {"{\"chat_template\":[{\"name\":\"tool_use\",\"template\":\"x\"},{\"name\":\"default\","
         "\"template\":\"" CHATML_JSON "\"}]}",
         CHAT_TEMPLATE_CHATML},
        {"{\"chat_template\":\"" CHATML_JSON " \"}", CHAT_TEMPLATE_OTHER},
    };
    struct tokenizer *tokenizer = make_tokenizer(ADDED), *bare = make_tokenizer(0);
    char *folder = store_helper_folder();
    struct chat chat;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        write_file(folder, "tokenizer_config.json", cases[i].json);
        err = (struct error){0};
        const enum status status = chat_open(folder, "", tokenizer, &chat, &err);
        if (status != (cases[i].found == CHAT_TEMPLATE_OTHER ? STATUS_UNSUPPORTED : STATUS_OK) ||
            (!status && chat.chat_template != cases[i].found))
            fail_msg("%s: %s", cases[i].json, err.message);
        if (status)
            assert_non_null(strstr(err.message, "--chat-template"));
    }
    /* A flag has the last word, whatever the folder holds. */
    assert_int_equal(chat_open(folder, "none", tokenizer, &chat, &err), STATUS_OK);
    assert_int_equal(chat_check(&chat, plain, 3, &err), STATUS_UNSUPPORTED);
    assert_int_equal(chat_open(folder, "gemma", tokenizer, &chat, &err), STATUS_OK);
    assert_string_equal(chat.bos, "<bos>");
    assert_int_equal(chat_open(folder, "other", tokenizer, &chat, &err), STATUS_UNSUPPORTED);
    assert_int_equal(chat_open(folder, "ChatML", tokenizer, &chat, &err), STATUS_UNSUPPORTED);
    /* The model's own tokens; and those that it has not. */
    write_file(folder, "tokenizer_config.json",
               "{\"bos_token\":{\"content\":\"<|begin_of_text|>\"},\"eos_token\":\"<|eot_id|>\"}");
    assert_int_equal(chat_open(folder, "llama-2", tokenizer, &chat, &err), STATUS_OK);
    assert_string_equal(chat.bos, "<|begin_of_text|>");
    assert_string_equal(chat.eos, "<|eot_id|>");
    err = (struct error){0};
    assert_int_equal(chat_open(folder, "chatml", bare, &chat, &err), STATUS_UNSUPPORTED);
    assert_non_null(strstr(err.message, "<|im_start|>"));
    /* A file of its own comes before the other's, with or without a newline at its end. */
    write_file(folder, "chat_template.jinja",
               "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
               "{{ message['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}"
               "<|im_start|>assistant\n{% endif %}\n");
    assert_int_equal(chat_open(folder, "", tokenizer, &chat, &err), STATUS_OK);
    assert_int_equal(chat.chat_template, CHAT_TEMPLATE_CHATML);
    store_helper_remove(folder);
    tokenizer_close(tokenizer);
    tokenizer_close(bare);
}

/* The published sources, as they stand in the files of models people have. */
static void test_sources(void **state)
{
    (void)state;
    static const struct {
        const char *source;
        enum chat_template found;
    } cases[] = {
        {"{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
         "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | "
         "trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% "
         "endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ "
         "'<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
         CHAT_TEMPLATE_LLAMA_3},
        {"{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != "
         "(loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate "
         "user/assistant/user/assistant/...') }}{% endif %}{% if message['role'] == 'user' %}{{ "
         "'[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' "
         "%}{{ message['content'] + eos_token}}{% else %}{{ raise_exception('Only user and "
         "assistant roles are supported!') }}{% endif %}{% endfor %}",
         CHAT_TEMPLATE_MISTRAL},
        {"{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != "
         "(loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate "
         "user/assistant/user/assistant/...') }}{% endif %}{% if message['role'] == 'user' %}{{ "
         "'[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' "
         "%}{{ message['content'] + eos_token + ' ' }}{% else %}{{ raise_exception('Only user and "
         "assistant roles are supported!') }}{% endif %}{% endfor %}",
         CHAT_TEMPLATE_MISTRAL_V1},
        {"{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set "
         "system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% "
         "set system_message = false %}{% endif %}{% for message in loop_messages %}{% if "
         "(message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation "
         "roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if loop.index0 "
         "== 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + "
         "'\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = "
         "message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] "
         "' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' '  + "
         "content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
         CHAT_TEMPLATE_LLAMA_2},
        {"{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role "
         "not supported') }}{% endif %}{% for message in messages %}{% if (message['role'] == "
         "'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must "
         "alternate "
         "user/assistant/user/assistant/...') }}{% endif %}{% if (message['role'] == 'assistant') "
         "%}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ "
         "'<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% "
         "endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
         CHAT_TEMPLATE_GEMMA},
        {"{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'system') "
         "%}{{'<|system|>' + '\n' + message['content'] + '<|end|>' + '\n'}}{% elif "
         "(message['role'] == 'user') %}{{'<|user|>' + '\n' + message['content'] + '<|end|>' + "
         "'\n' + '<|assistant|>' + '\n'}}{% elif message['role'] == 'assistant' "
         "%}{{message['content'] + '<|end|>' + '\n'}}{% endif %}{% endfor %}",
         CHAT_TEMPLATE_PHI_3},
        {"{% for message in messages %}{{ message['content'] }}{% endfor %}", CHAT_TEMPLATE_OTHER},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *source = cases[i].source;
        assert_int_equal(chat_template_recognize(source, strlen(source)), cases[i].found);
        assert_int_equal(chat_template_recognize(source, strlen(source) - 1), CHAT_TEMPLATE_OTHER);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_renderings), cmocka_unit_test(test_going_on),
        cmocka_unit_test(test_orders), cmocka_unit_test(test_folders),
        cmocka_unit_test(test_sources)};
    return cmocka_run_group_tests_name("chat_template", tests, NULL, NULL);
}
