#include "tests/lib/document.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#define DOCUMENT "proto/openapi.yaml"

/* The next line, without its end; false behind the last. */
static bool next_line(const char **at, char line[256])
{
    const size_t size = strcspn(*at, "\n");
    if (!**at)
        return false;
    assert_true(size < 256);
    memcpy(line, *at, size);
    line[size] = 0;
    *at += size + ((*at)[size] == '\n');
    return true;
}

static size_t indent(const char *line)
{
    return strspn(line, " ");
}

/* {id} and {item_id} are {}. */
static void read_path(const char *line, char path[64])
{
    char *to = path;
    for (const char *p = line; *p != ':'; p++) {
        assert_true(to < path + 62);
        *to++ = *p;
        if (*p == '{')
            p += strcspn(p, "}") - 1;
    }
    *to = 0;
}

static void read_operations(struct document *d)
{
    char line[256], path[64] = "", status[64];
    const char *at = strstr(d->text.data, "\npaths:\n");
    struct operation *o = NULL;
    assert_non_null(at);
    at += 8;
    while (next_line(&at, line) && indent(line) > 0) {
        if (indent(line) == 2) {
            read_path(line + 2, path);
        } else if (indent(line) == 4) {
            assert_true(d->operation_count < DOCUMENT_OPERATIONS);
            o = &d->operations[d->operation_count++];
            snprintf(o->method, sizeof o->method, "%.*s", (int)strcspn(line + 4, ":"), line + 4);
            for (char *p = o->method; *p; p++)
                *p = (char)(*p & 0xdf);
            memcpy(o->path, path, sizeof o->path);
        } else if (o && sscanf(line, "        \"%63[0-9]\"", status) == 1) {
            assert_true(o->status_count < DOCUMENT_STATUSES);
            o->statuses[o->status_count++] = atoi(status);
        } else if (o && strcmp(line, "      security: []") == 0) {
            o->is_open = true;
        }
    }
}

void document_open(struct document *document)
{
    char block[4096];
    size_t size;
    FILE *file = fopen(DOCUMENT, "r");
    assert_non_null(file);
    *document = (struct document){.operation_count = 0};
    while ((size = fread(block, 1, sizeof block, file)) > 0)
        buf_append(&document->text, block, size);
    fclose(file);
    buf_text(&document->text);
    read_operations(document);
}

void document_close(struct document *document)
{
    buf_close(&document->text);
}

struct operation *document_find(struct document *document, const char *method, const char *path)
{
    for (int i = 0; i < document->operation_count; i++) {
        struct operation *o = &document->operations[i];
        if (strcmp(o->method, method) == 0 && strcmp(o->path, path) == 0)
            return o;
    }
    return NULL;
}

bool document_has(const struct operation *operation, int status)
{
    for (int i = 0; i < operation->status_count; i++)
        if (operation->statuses[i] == status)
            return true;
    return false;
}

void document_reach(struct operation *operation, int status)
{
    if (!document_has(operation, status))
        fail_msg("%s %s answers %d, which is not documented", operation->method, operation->path,
                 status);
    for (int i = 0; i < operation->status_count; i++)
        operation->reached[i] |= operation->statuses[i] == status;
}

void document_properties(const struct document *document, const char *schema, struct buf *out)
{
    char line[256], start[96];
    snprintf(start, sizeof start, "\n    %s:\n", schema);
    const char *at = strstr(document->text.data, start);
    bool inside = false;
    if (!at)
        fail_msg("there is no schema %s", schema);
    at += strlen(start);
    while (next_line(&at, line) && indent(line) > 4) {
        if (strstr(line, "allOf: [{$ref: \"#/components/schemas/Generation\"}]"))
            document_properties(document, "Generation", out);
        if (indent(line) == 6)
            inside = strcmp(line, "      properties:") == 0;
        else if (indent(line) == 8 && inside)
            buf_append_format(out, "%.*s ", (int)strcspn(line + 8, ":"), line + 8);
        if (strncmp(line, "      properties: {", 19) == 0)
            buf_append_format(out, "%.*s ", (int)strcspn(line + 19, ":"), line + 19);
    }
}

void document_path(const struct operation *operation, const char *id, const char *query,
                   char path[256])
{
    char *to = path;
    assert_true(strlen(operation->path) + strlen(id) + strlen(query) < 256);
    for (const char *p = operation->path; *p; p++) {
        if (*p != '{') {
            *to++ = *p;
            continue;
        }
        const size_t size = strcspn(id, "/");
        memcpy(to, id, size);
        to += size;
        id += id[size] ? size + 1 : 0;
        p++;
    }
    strcpy(to, query);
}

/* ---- every answer ---- */

static struct document known; /* for the life of the process */
static bool is_known;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void open_known(void)
{
    is_known = access(DOCUMENT, R_OK) == 0;
    if (is_known)
        document_open(&known);
}

/* Whether the path, up to its query, is of this form: {} is a part that is not empty. */
static bool is_like(const char *path, const char *pattern)
{
    for (; *pattern; pattern++) {
        if (*pattern != '{') {
            if (*path++ != *pattern)
                return false;
            continue;
        }
        const size_t size = strcspn(path, "/?");
        if (!size)
            return false;
        path += size;
        pattern++;
    }
    return !*path || *path == '?';
}

void document_check(const char *method, const char *path, int status)
{
    bool is_operation = false, documented = false;
    pthread_once(&once, open_known);
    if (!is_known || !status)
        return;
    if (strcmp(method, "HEAD") == 0)
        method = "GET";
    /* A name in a path may be an id, too: either of them may answer. */
    for (int i = 0; i < known.operation_count; i++) {
        const struct operation *o = &known.operations[i];
        if (strcmp(o->method, method) != 0 || !is_like(path, o->path))
            continue;
        is_operation = true;
        documented |= document_has(o, status);
    }
    if (is_operation && !documented)
        fail_msg("%s %s answers %d, which is not documented", method, path, status);
}
