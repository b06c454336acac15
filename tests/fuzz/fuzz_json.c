/* fuzz_json.c - any bytes as the body of a request, through the parsers of all that is parsed.
 *
 * Input: a byte that chooses the parser, then the body. What is accepted must be within the
 * documented bounds; what is refused must be named. To reach deep quickly, a body that begins with
 * a comma is taken as the rest of an object that has what the parser demands. */
#include "tests/fuzz/bodies.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const struct {
        void (*parse)(const char *json, size_t size);
        const char *begin;
    } parsers[] = {{parse_completion, "{\"prompt\":\"x\""},
                   {parse_memory, "{\"from\":\"mem_0\""},
                   {parse_bookmark, "{\"position\":1"},
                   {parse_rewind, "{\"to\":1"},
                   {parse_chat, "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]"},
                   {parse_answers, "{\"object\":\"memory.append\",\"id\":\"mem_0\""},
                   {parse_response, "{\"input\":\"x\""},
                   {parse_conversation, "{\"metadata\":{}"},
                   {parse_items, "{\"items\":[{\"role\":\"user\",\"content\":\"x\"}]"}};
    if (!size)
        return 0;
    const size_t which = data[0] % (sizeof parsers / sizeof *parsers);
    struct buf body;
    buf_init(&body);
    if (size > 1 && data[1] == ',')
        buf_append_text(&body, parsers[which].begin);
    buf_append(&body, data + 1, size - 1);
    char *exact = malloc(body.size ? body.size : 1); /* reading past the end is seen */
    ASSERT(exact);
    if (body.size)
        memcpy(exact, body.data, body.size);
    parsers[which].parse(exact, body.size);
    free(exact);
    buf_close(&body);
    return 0;
}
