/* Many streams at once of a server with the fake engine (tests/bench/fake): every event of every
 * stream is there once, in its place, and each says when it was made, which tells what the server
 * adds to a token. Prints a line and appends it to a CSV; fails when one event is missing.
 *
 *   bench_streams URL PID CLIENTS MAX_TOKENS NAME [CSV]
 *
 * PID is the server's, for its memory at the end. Each client asks once. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "server/load.h"

struct check {
    uint64_t *next; /* [clients] the token that comes next */
    uint64_t max_tokens, wrong, whole, ended;
    struct histogram added;
};

static void text_cb(void *context, uint32_t client, const char *text, size_t size, uint64_t now_ns)
{
    struct check *check = context;
    char copy[64], *end;
    if (size >= sizeof copy) {
        check->wrong++;
        return;
    }
    memcpy(copy, text, size);
    copy[size] = 0;
    const unsigned long long index = strtoull(copy, &end, 10);
    const unsigned long long made_ns = strtoull(end, &end, 10);
    if (index != check->next[client]++ || !made_ns || made_ns > now_ns || strcmp(end, " ") != 0)
        check->wrong++;
    else
        histogram_add(&check->added, now_ns - made_ns);
}

static void done_cb(void *context, uint32_t client)
{
    struct check *check = context;
    check->ended++;
    check->whole += check->next[client] == check->max_tokens;
}

/* Seconds of processor time that a process has had. */
static double cpu_seconds(const char *pid)
{
    char path[64], line[1024] = "";
    unsigned long user = 0, system = 0;
    snprintf(path, sizeof path, "/proc/%.20s/stat", pid);
    FILE *file = fopen(path, "re");
    if (file && fgets(line, sizeof line, file) && strrchr(line, ')'))
        sscanf(strrchr(line, ')'), ") %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", &user,
               &system);
    if (file)
        fclose(file);
    return (double)(user + system) / (double)sysconf(_SC_CLK_TCK);
}

/* "VmHWM" of a process, in MB. */
static double peak_mb(const char *pid)
{
    char path[64], line[256];
    double kib = 0;
    snprintf(path, sizeof path, "/proc/%.20s/status", pid);
    FILE *file = fopen(path, "re");
    while (file && fgets(line, sizeof line, file))
        if (strncmp(line, "VmHWM:", 6) == 0)
            kib = strtod(line + 6, NULL);
    if (file)
        fclose(file);
    return kib * 1024 / 1e6;
}

static void write_csv(const char *path, const char *name, const struct load_options *o,
                      const struct load_report *r, const struct check *check, double mb,
                      double cpu_us)
{
    FILE *file = fopen(path, "ae");
    if (!file) {
        fprintf(stderr, "%s cannot be written\n", path);
        exit(1);
    }
    fprintf(file, "%s streams at once,%llu\n", name, (unsigned long long)r->streams_most);
    fprintf(file, "%s events,%llu\n", name, (unsigned long long)r->events);
    fprintf(file, "%s events missing or out of order,%llu\n", name,
            (unsigned long long)(o->clients * check->max_tokens - r->events + check->wrong));
    fprintf(file, "%s events/s,%.6g\n", name, (double)r->events / r->seconds);
    fprintf(file, "%s added us mean,%.6g\n", name,
            check->added.sum / (double)check->added.count * 1e-3);
    fprintf(file, "%s added us p50,%.6g\n", name, (double)histogram_at(&check->added, 0.5) * 1e-3);
    fprintf(file, "%s added us p99,%.6g\n", name, (double)histogram_at(&check->added, 0.99) * 1e-3);
    fprintf(file, "%s server CPU us an event,%.6g\n", name, cpu_us);
    fprintf(file, "%s peak resident MB,%.6g\n", name, mb);
    fclose(file);
}

int main(int argc, char **argv)
{
    static struct load_report report;
    static struct check check;
    struct load_options o = {.text_cb = text_cb, .done_cb = done_cb, .context = &check};
    struct error err = {0};
    if (argc < 6 || !load_parse_url(argv[1], &o)) {
        fprintf(stderr, "bench_streams URL PID CLIENTS MAX_TOKENS NAME [CSV]\n");
        return 2;
    }
    o.clients = (uint32_t)strtoul(argv[3], NULL, 10);
    o.max_tokens = (uint32_t)strtoul(argv[4], NULL, 10);
    o.prompt_tokens = 8;
    o.seconds = 3600;
    o.requests = o.clients;
    o.rate = o.clients; /* within a second, so that they do not all want their tokens at once */
    check.max_tokens = o.max_tokens;
    check.next = calloc(o.clients, sizeof *check.next);
    const double cpu = cpu_seconds(argv[2]);
    if (!check.next || load_run(&o, &report, &err)) {
        fprintf(stderr, "%s\n", check.next ? err.message : "out of memory");
        return 1;
    }
    char p50[16], p99[16], mean[16];
    const double mb = peak_mb(argv[2]);
    const double cpu_us = (cpu_seconds(argv[2]) - cpu) / (double)(report.events + 1) * 1e6;
    histogram_time(histogram_at(&check.added, 0.5), p50);
    histogram_time(histogram_at(&check.added, 0.99), p99);
    histogram_time(check.added.count ? (uint64_t)(check.added.sum / (double)check.added.count) : 0,
                   mean);
    printf(
        "%-24s %6llu at once, %9llu events, %7.0f/s, added: mean %s, p50 %s, p99 %s; CPU %.1f us "
        "an event; peak %.0f MB\n",
        argv[5], (unsigned long long)report.streams_most, (unsigned long long)report.events,
        (double)report.events / report.seconds, mean, p50, p99, cpu_us, mb);
    if (argc > 6)
        write_csv(argv[6], argv[5], &o, &report, &check, mb, cpu_us);
    const bool good = !check.wrong && check.whole == o.clients && check.ended == o.clients &&
                      report.streams_most == o.clients && !report.refused && !report.failed;
    if (!good)
        printf("  not every event came in its place: %llu wrong ones; %llu of %u streams whole, "
               "%llu ended, %llu refused, %llu broke off %s\n",
               (unsigned long long)check.wrong, (unsigned long long)check.whole, o.clients,
               (unsigned long long)check.ended, (unsigned long long)report.refused,
               (unsigned long long)report.failed, report.error);
    free(check.next);
    return good ? 0 : 1;
}
