/* cors.c - see cors.h. */
#include "server/cors.h"

#include <string.h>
#include <strings.h>

#include "server/config.h"
#include "server/route.h"

/* The authority of "https://example.com:8443"; NULL: this is no origin. */
static const char *authority(const char *origin, size_t size)
{
    static const char *const schemes[] = {"http://", "https://"};
    for (size_t i = 0; i < 2; i++) {
        const size_t skip = strlen(schemes[i]);
        if (size > skip && strncasecmp(origin, schemes[i], skip) == 0)
            return memchr(origin + skip, '/', size - skip) ? NULL : origin + skip;
    }
    return NULL;
}

/* The next of a list, and where it goes on. */
static size_t item(const char **at)
{
    *at += strspn(*at, " ,");
    return strcspn(*at, " ,");
}

bool cors_is_list(const char *list)
{
    if (strcmp(list, "*") == 0)
        return true;
    for (size_t size; (size = item(&list)); list += size)
        if (!authority(list, size))
            return false;
    return true;
}

/* Whether a page of `origin` may call; "" is none. */
static bool allows(const struct config *config, const char *origin)
{
    const char *list = config->cors_origin;
    if (!*origin || strcmp(list, "*") == 0)
        return *origin;
    for (size_t size; (size = item(&list)); list += size)
        if (strlen(origin) == size && strncasecmp(list, origin, size) == 0)
            return true;
    return false;
}

bool cors_is_stranger(const struct config *config, const struct http_head *head)
{
    const char *own = authority(head->origin, strlen(head->origin));
    return *head->origin && !allows(config, head->origin) &&
           !(own && strcasecmp(own, head->host) == 0);
}

bool cors_is_preflight(const struct config *config, const struct http_head *head)
{
    return strcmp(head->method, "OPTIONS") == 0 && *head->access_control_request_method &&
           allows(config, head->origin);
}

void cors_append(const struct config *config, const struct http_head *head, struct buf *out)
{
    const bool any = strcmp(config->cors_origin, "*") == 0;
    if (!*config->cors_origin)
        return;
    if (!any)
        buf_append_text(out, "vary: origin\r\n");
    if (!allows(config, head->origin))
        return;
    buf_append_format(out, "access-control-allow-origin: %s\r\n", any ? "*" : head->origin);
    if (!cors_is_preflight(config, head)) {
        buf_append_text(out, "access-control-expose-headers: x-request-id, retry-after, "
                             "retry-after-ms, x-should-retry\r\n");
        return;
    }
    /* A "*" stands for every field but authorization. */
    buf_append_text(out, "access-control-allow-headers: authorization, *\r\n"
                         "access-control-max-age: 7200\r\naccess-control-allow-methods: ");
    route_append_methods(head->path, out);
    buf_append_text(out, "\r\n");
}
