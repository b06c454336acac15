#include "clients/cli/progress.h"

#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include "clients/cli/cli.h"

#define BAR_EVERY_S 0.1
#define LINE_EVERY_S 5.0
#define SMOOTH_S 5.0 /* a change of rate shows after about so long */

double progress_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

void progress_init(struct progress *progress, uint64_t total_bytes)
{
    double now = progress_now();
    *progress = (struct progress){.terminal = isatty(STDERR_FILENO) == 1,
                                  .total_bytes = total_bytes,
                                  .started = now,
                                  .shown = now,
                                  .rate_time = now};
}

static void measure(struct progress *progress, double now)
{
    double elapsed = now - progress->rate_time;
    if (elapsed < 0.2)
        return;
    double keep = progress->bytes_per_second > 0 ? SMOOTH_S / (SMOOTH_S + elapsed) : 0;
    double bytes = (double)(progress->bytes - progress->rate_bytes) / elapsed;
    double tokens = (double)(progress->tokens - progress->rate_tokens) / elapsed;
    progress->bytes_per_second = keep * progress->bytes_per_second + (1 - keep) * bytes;
    progress->tokens_per_second = keep * progress->tokens_per_second + (1 - keep) * tokens;
    progress->rate_time = now;
    progress->rate_bytes = progress->bytes;
    progress->rate_tokens = progress->tokens;
}

static int columns(void)
{
    struct winsize size;
    if (ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 20)
        return size.ws_col;
    return 80;
}

/* "43%  12.3 MiB of 28.0 MiB, 3,100,000 tokens, 2,345 tokens/s, 1:23 left" */
static void describe(const struct progress *progress, char *out, size_t room)
{
    char done[24], total[24], tokens[32], rate[32], left[24];
    cli_bytes(done, progress->bytes);
    cli_count(tokens, progress->tokens);
    cli_count(rate, (uint64_t)(progress->tokens_per_second + 0.5));
    if (progress->total_bytes == 0) {
        snprintf(out, room, "%s, %s tokens, %s tokens/s", done, tokens, rate);
        return;
    }
    uint64_t missing =
        progress->bytes < progress->total_bytes ? progress->total_bytes - progress->bytes : 0;
    if (progress->bytes_per_second > 0)
        cli_duration(left, (double)missing / progress->bytes_per_second);
    else
        snprintf(left, sizeof left, "-:--");
    snprintf(out, room, "%3.0f%%  %s of %s, %s tokens, %s tokens/s, %s left",
             100.0 * (double)progress->bytes / (double)progress->total_bytes, done,
             cli_bytes(total, progress->total_bytes), tokens, rate, left);
}

static void draw(struct progress *progress)
{
    char text[200], bar[41] = "";
    describe(progress, text, sizeof text);
    int room = columns() - 1, width = room - (int)strlen(text) - 3;
    if (width > 40)
        width = 40;
    if (progress->total_bytes && width >= 8) {
        int full = (int)((double)width * (double)progress->bytes / (double)progress->total_bytes);
        for (int i = 0; i < width; i++)
            bar[i] = i < full ? '#' : '-';
        bar[width] = 0;
        fprintf(stderr, "\r\033[K[%s] %.*s", bar, room, text);
    } else {
        fprintf(stderr, "\r\033[K%.*s", room, text);
    }
    fflush(stderr);
    progress->drawn = true;
}

void progress_update(struct progress *progress, uint64_t bytes, uint64_t tokens)
{
    double now = progress_now();
    progress->bytes = bytes;
    progress->tokens = tokens;
    measure(progress, now);
    if (now - progress->shown < (progress->terminal ? BAR_EVERY_S : LINE_EVERY_S))
        return;
    progress->shown = now;
    if (progress->terminal) {
        draw(progress);
    } else {
        char text[200];
        describe(progress, text, sizeof text);
        fprintf(stderr, "%s\n", text);
    }
}

void progress_clear(struct progress *progress)
{
    if (progress->drawn)
        fputs("\r\033[K", stderr);
    progress->drawn = false;
}

void progress_finish(struct progress *progress)
{
    char bytes[24], tokens[32], rate[32], took[24];
    double seconds = progress_now() - progress->started;
    progress_clear(progress);
    fprintf(stderr, "added %s, %s tokens in %s (%s tokens/s)\n", cli_bytes(bytes, progress->bytes),
            cli_count(tokens, progress->tokens), cli_duration(took, seconds),
            cli_count(rate,
                      (uint64_t)((double)progress->tokens / (seconds > 0.001 ? seconds : 0.001))));
}
