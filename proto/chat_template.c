/* chat_template.c - see chat_template.h. */
#include "proto/chat_template.h"

#include <cjson/cJSON.h>
#include <stdbool.h>
#include <string.h>

#include "proto/json.h"

/* Ways to write ChatML that are in use; a newline stands for "\n" in a Jinja string, too. */
static const char *const chatml[] = {
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' "
    "}}{% endif %}",
};

static bool same(const char *source, size_t size, const char *known)
{
    size_t i = 0;
    for (; i < size && *known; known++) {
        if (*known == '\n' && size - i >= 2 && source[i] == '\\' && source[i + 1] == 'n')
            i += 2;
        else if (source[i++] != *known)
            return false;
    }
    return i == size && !*known;
}

enum chat_template chat_template_recognize(const char *source, size_t size)
{
    for (size_t i = 0; i < sizeof chatml / sizeof *chatml; i++)
        if (same(source, size, chatml[i]))
            return CHAT_TEMPLATE_CHATML;
    return CHAT_TEMPLATE_OTHER;
}

enum chat_template chat_template_of_config(const char *json, size_t size)
{
    cJSON *root;
    struct error err;
    enum chat_template found = CHAT_TEMPLATE_OTHER;
    if (json_parse_object(json, size, &root, &err))
        return found;
    const cJSON *source = cJSON_GetObjectItemCaseSensitive(root, "chat_template");
    if (!source || cJSON_IsNull(source))
        found = CHAT_TEMPLATE_NONE;
    else if (cJSON_IsString(source))
        found = chat_template_recognize(source->valuestring, strlen(source->valuestring));
    cJSON_Delete(root);
    return found;
}
