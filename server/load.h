/* load.h - a load generator: streamed completions against a server, and how long they took.
 * Thread: the calling one, on a loop of its own. Owns its connections for the time of load_run. */
#ifndef SERVER_LOAD_H
#define SERVER_LOAD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto/status.h"
#include "server/histogram.h"

struct load_options {
    char host[64]; /* an IP address */
    int port;
    const char *path;        /* of the completions */
    const char *key, *model; /* NULL: none */
    uint32_t clients;        /* connections, each with one request at a time */
    double rate;             /* requests a second of all together; 0: each as soon as it can */
    double seconds;          /* requests begin in this time; those under way may end later */
    uint64_t requests;       /* and so many at most; 0: any number */
    uint32_t prompt_tokens, max_tokens;
    /* What a stream said, as it came: JSON text without its quotes, still escaped. May be NULL. */
    void (*text_cb)(void *context, uint32_t client, const char *text, size_t size, uint64_t now_ns);
    /* A stream has ended with [DONE]. May be NULL. */
    void (*done_cb)(void *context, uint32_t client);
    void *context;
};

/* Times are from when a request was due: one that had to wait for a free client has waited. */
struct load_report {
    struct histogram first_token, between, whole;
    uint64_t complete, events, tokens; /* events with text; tokens as the server counts them */
    uint64_t late;                     /* due while every client was busy */
    uint64_t refused, failed, cut;     /* an error status; broken off; under way at the end */
    uint64_t streams_most;             /* at once */
    int refused_status;                /* the last one */
    char error[256];                   /* what the last refusal or failure said */
    double seconds;                    /* from the first request to the last answer */
};

/* "http://127.0.0.1:8080" to host and port; a path behind it is taken too. False: not such. */
bool load_parse_url(const char *url, struct load_options *options);
/* STATUS_INVALID (the address), STATUS_NO_MEMORY. Refused requests are counted, not an error. */
STATUS_CHECKED enum status load_run(const struct load_options *options, struct load_report *report,
                                    struct error *err);
/* `rambad bench --url ...`: argv[0] is the command's name. Returns the exit code. */
int load_main(int argc, char **argv);

#endif
