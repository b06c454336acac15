/* The server's pure parts: the HTTP parser's limits and queries, routes, the text of /metrics. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "proto/limits.h"
#include "server/citation.h"
#include "server/http.h"
#include "server/metrics.h"
#include "server/route.h"

/* ---- parser ---- */

struct seen {
    int heads, ends;
    size_t body;
    enum status refuse;
};

static enum status head_cb(void *context, const struct http_head *head)
{
    struct seen *seen = context;
    (void)head;
    seen->heads++;
    return seen->refuse;
}

static enum status body_cb(void *context, const char *data, size_t size)
{
    struct seen *seen = context;
    (void)data;
    seen->body += size;
    return STATUS_OK;
}

static void end_cb(void *context)
{
    struct seen *seen = context;
    seen->ends++;
}

/* Feeds all of it, in one piece; what the parser said at last. */
static enum status feed(const char *data, size_t size, struct seen *seen, enum status refuse)
{
    static const struct http_callbacks callbacks = {head_cb, body_cb, end_cb};
    struct http_parser *parser;
    struct error err;
    enum status status = STATUS_OK;
    *seen = (struct seen){.refuse = refuse};
    assert_int_equal(http_parser_create(&callbacks, seen, &parser), STATUS_OK);
    for (size_t at = 0, consumed; at < size && !status; at += consumed) {
        status = http_parser_feed(parser, data + at, size - at, &consumed, &err);
        if (!status && !http_parser_inside(parser))
            http_parser_next(parser);
    }
    http_parser_destroy(parser);
    return status;
}

static enum status feed_head(size_t url, size_t field, struct seen *seen)
{
    struct buf text;
    buf_init(&text);
    buf_append_text(&text, "GET /");
    for (size_t i = 1; i < url; i++)
        buf_append_text(&text, "u");
    buf_append_text(&text, " HTTP/1.1\r\nA: ");
    for (size_t i = 0; i < field; i++)
        buf_append_text(&text, "v");
    buf_append_text(&text, "\r\n\r\n");
    const enum status status = feed(text.data, text.size, seen, STATUS_OK);
    buf_close(&text);
    return status;
}

static void test_limits(void **state)
{
    (void)state;
    struct seen seen;
    /* A field costs its name, its value, and four bytes. */
    const size_t most = LIMITS_HEADER_BYTES - 2 - 1 - 4;
    assert_int_equal(feed_head(LIMITS_URL_BYTES, 1, &seen), STATUS_OK);
    assert_int_equal(feed_head(LIMITS_URL_BYTES + 1, 1, &seen), STATUS_HEADERS_TOO_LARGE);
    assert_int_equal(feed_head(2, most, &seen), STATUS_OK);
    assert_int_equal(seen.ends, 1);
    assert_int_equal(feed_head(2, most + 1, &seen), STATUS_HEADERS_TOO_LARGE);
    assert_int_equal(seen.heads, 0);
}

static void test_refusal_stops(void **state)
{
    (void)state;
    const char text[] = "POST / HTTP/1.1\r\nContent-Length: 4\r\n\r\nbodyGET / HTTP/1.1\r\n\r\n";
    struct seen seen;
    assert_int_equal(feed(text, strlen(text), &seen, STATUS_TOO_LARGE), STATUS_TOO_LARGE);
    assert_int_equal(seen.heads, 1);
    assert_int_equal(seen.body, 0);
    assert_int_equal(seen.ends, 0);
    assert_int_equal(feed(text, strlen(text), &seen, STATUS_OK), STATUS_OK);
    assert_int_equal(seen.ends, 2);
    assert_int_equal(seen.body, 4);
}

static void test_query(void **state)
{
    (void)state;
    static const char *const names[] = {"limit", "after", NULL};
    char value[8];
    assert_true(http_query("a=1&limit=%32%30&b", "limit", value, sizeof value));
    assert_string_equal(value, "20");
    assert_false(http_query("xlimit=5", "limit", value, sizeof value));
    assert_false(http_query("limit", "limit", value, sizeof value));
    assert_true(http_query("limit=", "limit", value, sizeof value));
    assert_string_equal(value, "");
    assert_false(http_query("limit=%zz", "limit", value, sizeof value));
    assert_false(http_query("limit=%00", "limit", value, sizeof value));
    assert_false(http_query("limit=12345678", "limit", value, sizeof value)); /* no room */
    assert_null(http_query_unknown("", NULL));
    assert_null(http_query_unknown("limit=1&after=x&&", names));
    assert_string_equal(http_query_unknown("limit=1&order=asc", names), "order=asc");
    assert_string_equal(http_query_unknown("limits=1", names), "limits=1");
    assert_string_equal(http_query_unknown("lim", names), "lim");
    assert_string_equal(http_query_unknown("limit=1", NULL), "limit=1");
}

/* ---- routes ---- */

static char item[LIMITS_ID_BYTES]; /* of the last route */

static enum status route(const char *method, const char *path,
                         const struct request_handler **handler, char argument[LIMITS_ID_BYTES])
{
    struct http_head head = {.path = (char *)(uintptr_t)path};
    strcpy(head.method, method);
    return route_find(&head, handler, argument, item);
}

static void test_routes(void **state)
{
    (void)state;
    const struct request_handler *handler;
    char argument[LIMITS_ID_BYTES];
    struct buf allow;
    assert_int_equal(route("POST", "/v1/memories/mem_7/append", &handler, argument), STATUS_OK);
    assert_ptr_equal(handler, &handle_append);
    assert_string_equal(argument, "mem_7");
    assert_string_equal(item, "");
    assert_int_equal(route("GET", "/v1/conversations/conv_1/items/msg_2", &handler, argument),
                     STATUS_OK);
    assert_string_equal(argument, "conv_1");
    assert_string_equal(item, "msg_2");
    assert_int_equal(route("GET", "/v1/conversations/conv_1/items/", &handler, argument),
                     STATUS_NOT_FOUND);
    assert_int_equal(route("HEAD", "/v1/memories/mem_7", &handler, argument), STATUS_OK);
    assert_ptr_equal(handler, &handle_memories_get);
    assert_int_equal(route("PUT", "/v1/memories/mem_7", &handler, argument), STATUS_METHOD);
    assert_int_equal(route("GET", "/v1/memories/", &handler, argument), STATUS_NOT_FOUND);
    assert_int_equal(route("GET", "/v1/memories/a/b", &handler, argument), STATUS_NOT_FOUND);
    assert_int_equal(route("GET", "/v1/memories//chunks", &handler, argument), STATUS_NOT_FOUND);
    assert_int_equal(
        route("GET", "/v1/memories/1234567890123456789012345678901234567890", &handler, argument),
        STATUS_NOT_FOUND);
    buf_init(&allow);
    route_append_methods("/v1/memories/mem_7", &allow);
    assert_string_equal(buf_text(&allow), "GET, HEAD, PATCH, DELETE");
    buf_close(&allow);
}

/* ---- metrics ---- */

static void test_histogram(void **state)
{
    (void)state;
    struct metrics m;
    struct engine_thread_stats engine = {.running = 3, .states = {[2] = 4}, .timeouts_queued = 6};
    const struct storage_stats storage = {.memories = 5};
    struct buf out;
    metrics_init(&m);
    metrics_observe(&engine.queue, 0);
    metrics_observe(&engine.queue, 0.001); /* its limit belongs to a bucket */
    metrics_observe(&engine.queue, 0.0011);
    metrics_observe(&engine.queue, 1e9);
    metrics_request(&m, "append", 200);
    metrics_request(&m, "append", 409);
    metrics_request(&m, "append", 200);
    buf_init(&out);
    metrics_write(&m, &engine, &storage, 2, &out);
    static const char *const lines[] = {
        "\nrambad_queue_seconds_bucket{le=\"0.001\"} 2\n",
        "\nrambad_queue_seconds_bucket{le=\"0.002\"} 3\n",
        "\nrambad_queue_seconds_bucket{le=\"16.384\"} 3\n",
        "\nrambad_queue_seconds_bucket{le=\"+Inf\"} 4\n",
        "\nrambad_queue_seconds_count 4\n",
        "\nrambad_queue_seconds_sum 1e+09\n",
        "\nrambad_requests_total{handler=\"append\",status=\"200\"} 2\n",
        "\nrambad_requests_total{handler=\"append\",status=\"409\"} 1\n",
        "\nrambad_jobs_running 3\n",
        "\nrambad_jobs{state=\"prefill\"} 4\n",
        "\nrambad_timeouts_total{where=\"queue\"} 6\n",
        "\nrambad_memories 5\n",
        "\nrambad_connections 2\n",
        "\n# TYPE rambad_queue_seconds histogram\n"};
    for (size_t i = 0; i < sizeof lines / sizeof *lines; i++)
        if (!strstr(buf_text(&out), lines[i]))
            fail_msg("missing: %s", lines[i]);
    buf_close(&out);
}

static void test_many_kinds(void **state)
{
    (void)state;
    struct metrics m;
    metrics_init(&m);
    for (int status = 0; status < 2 * METRICS_ROUTES; status++) /* more than are kept apart */
        metrics_request(&m, "models", status);
    assert_int_equal(m.request_kinds, METRICS_ROUTES);
    for (size_t i = 0; i < m.request_kinds; i++)
        assert_int_equal(m.requests[i].count, 1);
}

/* ---- citations ---- */

/* Neighbouring tokens with the same most-read chunk are one span; a token that read nothing, or
 * another chunk, ends it. */
static void test_citations(void **state)
{
    (void)state;
    struct citations citations = {0};
    /* Two heads: together they read chunk 7 most, though one reads 5 more than anything. */
    const struct engine_pick both[] = {{0, 0, 5, 0.6F}, {0, 0, 7, 0.4F}, {0, 1, 7, 0.5F}};
    const struct engine_pick alone[] = {{0, 0, 7, 0.5F}, {0, 1, 7, 0.5F}};
    const struct engine_pick other[] = {{0, 0, 5, 1.0F}, {0, 1, 7, 0.1F}};
    const struct engine_pick nothing[] = {{0, 0, 7, 0.0F}, {0, 1, 5, 0.0F}};
    citations_add(&citations, both, 3, 0, 3);
    citations_add(&citations, alone, 2, 3, 5);
    citations_add(&citations, other, 2, 5, 6);
    citations_add(&citations, nothing, 2, 6, 7);
    citations_add(&citations, other, 2, 7, 9);
    citations_add(&citations, NULL, 0, 9, 9);
    assert_int_equal(citations.count, 3);
    const struct citation *spans = citations.spans;
    assert_int_equal(spans[0].chunk, 7);
    assert_int_equal(spans[0].begin, 0);
    assert_int_equal(spans[0].end, 5);
    assert_int_equal(spans[0].tokens, 2);
    assert_float_equal(spans[0].weight, 0.45 + 0.5, 1e-6);
    assert_int_equal(spans[1].chunk, 5);
    assert_int_equal(spans[1].end, 6);
    assert_float_equal(spans[1].weight, 0.5, 1e-6);
    assert_int_equal(spans[2].begin, 7);
    citations_close(&citations);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_citations),     cmocka_unit_test(test_limits),
        cmocka_unit_test(test_refusal_stops), cmocka_unit_test(test_query),
        cmocka_unit_test(test_routes),        cmocka_unit_test(test_histogram),
        cmocka_unit_test(test_many_kinds),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
