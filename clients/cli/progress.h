/* progress.h - how far an append is: a bar on a terminal, a line now and then elsewhere.
 * Thread: one. Owns nothing; writes to standard error. */
#ifndef CLIENTS_CLI_PROGRESS_H
#define CLIENTS_CLI_PROGRESS_H

#include <stdbool.h>
#include <stdint.h>

struct progress {
    bool terminal;
    bool drawn;           /* a bar stands on the current line */
    uint64_t total_bytes; /* 0: not known */
    double started, shown;
    uint64_t bytes, tokens; /* committed by this command */
    double rate_time;       /* when the rates below were last brought up to date */
    uint64_t rate_bytes, rate_tokens;
    double bytes_per_second, tokens_per_second; /* smoothed */
};

/* `total_bytes`: what there is to append, 0 when not known. */
void progress_init(struct progress *progress, uint64_t total_bytes);
void progress_update(struct progress *progress, uint64_t bytes, uint64_t tokens);
/* Takes the bar off the line, so that a message can be written. */
void progress_clear(struct progress *progress);
/* The last line: what was added, how fast. */
void progress_finish(struct progress *progress);

/* Seconds of a clock that only goes forward. */
double progress_now(void);

#endif
