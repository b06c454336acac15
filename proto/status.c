#include "proto/status.h"

#include <stdarg.h>
#include <stdio.h>

struct row {
    const char *code, *text;
    int http;
    const char *type;
};

static const struct row rows[] = {
#define X(name, code, text, http, type) {code, text, http, type},
    STATUS_LIST(X)
#undef X
};

const char *status_text(enum status status)
{
    return rows[status].text;
}

const char *status_code(enum status status)
{
    return rows[status].code;
}

int status_http(enum status status)
{
    return rows[status].http;
}

const char *status_type(enum status status)
{
    return rows[status].type;
}

static enum status fill(struct error *err, enum status status, const char *param,
                        const char *format, va_list args)
{
    if (err) {
        vsnprintf(err->message, sizeof err->message, format, args);
        snprintf(err->param, sizeof err->param, "%s", param);
    }
    return status;
}

enum status error_set(struct error *err, enum status status, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fill(err, status, "", format, args);
    va_end(args);
    return status;
}

enum status error_set_param(struct error *err, enum status status, const char *param,
                            const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fill(err, status, param, format, args);
    va_end(args);
    return status;
}
