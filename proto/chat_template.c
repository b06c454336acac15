/* chat_template.c - see chat_template.h. */
#include "proto/chat_template.h"

#include <cjson/cJSON.h>
#include <stdbool.h>
#include <string.h>

#include "proto/json.h"

static const char *const names[] = {
    [CHAT_TEMPLATE_NONE] = "none",       [CHAT_TEMPLATE_OTHER] = "other",
    [CHAT_TEMPLATE_CHATML] = "chatml",   [CHAT_TEMPLATE_LLAMA_2] = "llama-2",
    [CHAT_TEMPLATE_LLAMA_3] = "llama-3", [CHAT_TEMPLATE_MISTRAL] = "mistral",
    [CHAT_TEMPLATE_GEMMA] = "gemma",     [CHAT_TEMPLATE_MISTRAL_V1] = "mistral-v1",
    [CHAT_TEMPLATE_PHI_3] = "phi-3",     [CHAT_TEMPLATE_ZEPHYR] = "zephyr"};

#define ALTERNATE                                                                               \
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"                            \
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...')" \
    " }}{% endif %}"

#define LLAMA_2(system_branch)                                                                 \
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"           \
    "{% set system_message = messages[0]['content'] %}{% else %}"                              \
    "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"            \
    "{% for message in loop_messages %}" ALTERNATE                                             \
    "{% if loop.index0 == 0 and system_message != false %}"                                    \
    "{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}" \
    "{% else %}{% set content = message['content'] %}{% endif %}"                              \
    "{% if message['role'] == 'user' %}"                                                       \
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}" system_branch                 \
    "{% elif message['role'] == 'assistant' %}"                                                \
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"

#define LLAMA_3                                                                                \
    "{% set loop_messages = messages %}{% for message in loop_messages %}"                     \
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"       \
    "+ message['content'] | trim + '<|eot_id|>' %}"                                            \
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}" \
    "{% endfor %}"

#define MISTRAL(end)                                                                      \
    "{{ bos_token }}{% for message in messages %}" ALTERNATE                              \
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}" \
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token" end      \
    "}}{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}"   \
    "{% endif %}{% endfor %}"

/* Ways to write each that are in use; a newline stands for "\n" in a Jinja string, too. */
static const struct {
    enum chat_template chat_template;
    const char *source;
} known[] = {
    {CHAT_TEMPLATE_CHATML,
     "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
     "{{ message['content'] }}<|im_end|>\n"
     "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"},
    {CHAT_TEMPLATE_CHATML,
     "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
     "+ '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
     "{{ '<|im_start|>assistant\n' }}{% endif %}"},
    {CHAT_TEMPLATE_CHATML,
     "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}"
     "{% endif %}{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + "
     "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
     "{{ '<|im_start|>assistant\n' }}{% endif %}"},
    {CHAT_TEMPLATE_CHATML,
     "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
     " + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
     "{{ '<|im_start|>assistant\n' }}{% endif %}"},
    {CHAT_TEMPLATE_LLAMA_2, LLAMA_2("")},
    {CHAT_TEMPLATE_LLAMA_2, LLAMA_2("{% elif message['role'] == 'system' %}"
                                    "{{ '<<SYS>>\n' + content.strip() + '\n<</SYS>>\n\n' }}")},
    {CHAT_TEMPLATE_LLAMA_3, LLAMA_3 "{% if add_generation_prompt %}"
                                    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
                                    "{% endif %}"},
    {CHAT_TEMPLATE_LLAMA_3, LLAMA_3 "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"},
    {CHAT_TEMPLATE_MISTRAL, MISTRAL("")},
    {CHAT_TEMPLATE_MISTRAL_V1, MISTRAL(" + ' ' ")},
    {CHAT_TEMPLATE_GEMMA,
     "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
     "{{ raise_exception('System role not supported') }}{% endif %}"
     "{% for message in messages %}" ALTERNATE "{% if (message['role'] == 'assistant') %}"
     "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
     "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
     "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"},
    {CHAT_TEMPLATE_PHI_3,
     "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'system') %}"
     "{{'<|system|>' + '\n' + message['content'] + '<|end|>' + '\n'}}"
     "{% elif (message['role'] == 'user') %}{{'<|user|>' + '\n' + message['content'] + '<|end|>' + "
     "'\n' + '<|assistant|>' + '\n'}}{% elif message['role'] == 'assistant' %}"
     "{{message['content'] + '<|end|>' + '\n'}}{% endif %}{% endfor %}"},
    {CHAT_TEMPLATE_ZEPHYR, "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
                           "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
                           "{% elif message['role'] == 'system' %}\n"
                           "{{ '<|system|>\n' + message['content'] + eos_token }}\n"
                           "{% elif message['role'] == 'assistant' %}\n"
                           "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
                           "{% endif %}\n{% if loop.last and add_generation_prompt %}\n"
                           "{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"},
};

const char *chat_template_name(enum chat_template chat_template)
{
    return names[chat_template];
}

enum chat_template chat_template_named(const char *name)
{
    enum chat_template found = CHAT_TEMPLATE_NONE;
    while (found < CHAT_TEMPLATE_COUNT && strcmp(names[found], name) != 0)
        found++;
    return found == CHAT_TEMPLATE_COUNT ? CHAT_TEMPLATE_OTHER : found;
}

/* Spaces in a row count as one: published copies of a template differ in them. */
static bool same(const char *source, size_t size, const char *text)
{
    size_t i = 0;
    for (; i < size && *text; text++) {
        if (*text == '\n' && size - i >= 2 && source[i] == '\\' && source[i + 1] == 'n')
            i += 2;
        else if (source[i++] != *text)
            return false;
        while (*text == ' ' && text[1] == ' ')
            text++;
        while (i < size && source[i - 1] == ' ' && source[i] == ' ')
            i++;
    }
    return i == size && !*text;
}

enum chat_template chat_template_recognize(const char *source, size_t size)
{
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (same(source, size, known[i].source))
            return known[i].chat_template;
    return CHAT_TEMPLATE_OTHER;
}

/* A template, or the one named "default" of a list of them. */
static enum chat_template read_template(const cJSON *source)
{
    if (!source || cJSON_IsNull(source))
        return CHAT_TEMPLATE_NONE;
    if (cJSON_IsArray(source)) {
        const cJSON *item, *found = NULL;
        cJSON_ArrayForEach(item, source)
        {
            const char *name = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(item, "name"));
            if (name && strcmp(name, "default") == 0)
                found = cJSON_GetObjectItemCaseSensitive(item, "template");
        }
        source = found;
    }
    return cJSON_IsString(source)
               ? chat_template_recognize(source->valuestring, strlen(source->valuestring))
               : CHAT_TEMPLATE_OTHER;
}

/* "<s>", or {"content": "<s>", ...}. */
static void read_token(const cJSON *root, const char *name, char out[64])
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(root, name);
    if (cJSON_IsObject(item))
        item = cJSON_GetObjectItemCaseSensitive(item, "content");
    const char *text = cJSON_GetStringValue(item);
    const size_t size = text ? strlen(text) : 0;
    if (size < 64)
        memcpy(out, text ? text : "", size + 1);
}

void chat_template_read_config(const char *json, size_t size, struct chat_template_config *out)
{
    cJSON *root;
    struct error err;
    *out = (struct chat_template_config){.chat_template = CHAT_TEMPLATE_OTHER};
    if (json_parse_object(json, size, &root, &err))
        return;
    out->chat_template = read_template(cJSON_GetObjectItemCaseSensitive(root, "chat_template"));
    read_token(root, "bos_token", out->bos);
    read_token(root, "eos_token", out->eos);
    cJSON_Delete(root);
}
