/* main.c - wiring: settings, engine, storage, the engine's thread, the listener, signals. */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "proto/base/log.h"
#include "server/bench.h"
#include "server/config.h"
#include "server/server.h"
#include "server/unreadable.h"
#include "storage/storage.h"

struct process {
    uv_loop_t loop;
    struct config config;
    struct server server;
    uv_signal_t terminate, interrupt, hangup;
    int signals;
};

static int fail(const char *what, const struct error *err)
{
    fprintf(stderr, "rambad: %s%s%s\n", what, *what ? ": " : "", err->message);
    return 1;
}

/* ---- check ---- */

static void print_problem(void *context, const char *message)
{
    (void)context;
    printf("%s\n", message);
}

static int check_main(int argc, char **argv)
{
    if (argc != 2 || argv[1][0] == '-') {
        fprintf(stderr, "usage: rambad check DIR\nVerifies every record of a data folder: "
                        "checksums, holes, references. Exit code 0: nothing wrong.\n");
        return argc == 2 && strcmp(argv[1], "--help") == 0 ? 0 : 2;
    }
    struct storage_check_report report;
    struct error err = {0};
    unreadable_watch(argv[1]);
    if (storage_check(argv[1], print_problem, NULL, &report, &err))
        return fail("check", &err);
    printf(
        "%llu memories, %llu branches, %llu chunks, %llu tokens, %llu turns, %llu snapshots, %llu "
        "bytes: "
        "%llu problems\n",
        (unsigned long long)report.memories, (unsigned long long)report.branches,
        (unsigned long long)report.chunks, (unsigned long long)report.tokens,
        (unsigned long long)report.turns, (unsigned long long)report.snapshots,
        (unsigned long long)report.bytes, (unsigned long long)report.problems);
    return report.problems ? 1 : 0;
}

/* ---- repair ---- */

static int repair_main(int argc, char **argv)
{
    const bool carry_out = argc == 3 && strcmp(argv[2], "--yes") == 0;
    if ((argc != 2 && !carry_out) || argv[1][0] == '-') {
        fprintf(stderr, "usage: rambad repair DIR [--yes]\nTells how a damaged data folder can be "
                        "made whole: memories go back to their last\nwhole place, what nothing "
                        "reaches is dropped. With --yes it is done; copy DIR before.\n");
        return argc == 2 && strcmp(argv[1], "--help") == 0 ? 0 : 2;
    }
    struct error err = {0};
    uint64_t changes;
    unreadable_watch(argv[1]);
    if (storage_repair(argv[1], carry_out, print_problem, NULL, &changes, &err))
        return fail("repair", &err);
    if (!changes)
        printf("nothing to repair\n");
    else if (carry_out)
        printf("%llu changes made\n", (unsigned long long)changes);
    else
        printf("%llu changes to make, none made yet: copy %s, then add --yes\n",
               (unsigned long long)changes, argv[1]);
    return changes && !carry_out ? 1 : 0;
}

/* ---- serve ---- */

static enum status open_engine(const struct config *config, struct engine **engine,
                               struct error *err)
{
    const struct engine_options options = {
        .model_path = config->model,
        .backend = strcmp(config->backend, "ref") == 0    ? ENGINE_BACKEND_REF
                   : strcmp(config->backend, "cpu") == 0  ? ENGINE_BACKEND_CPU
                   : strcmp(config->backend, "cuda") == 0 ? ENGINE_BACKEND_CUDA
                                                          : ENGINE_BACKEND_AUTO,
        .threads = (uint32_t)config->threads,
        .host_memory_bytes = config->host_memory,
        .device_memory_bytes = config->device_memory,
        .landmarks_fp8 = strcmp(config->landmarks, "fp8") == 0,
        .states_bf16 = strcmp(config->state, "bf16") == 0,
        .memory_dtype =
            strcmp(config->memory_dtype, "fp32") == 0 ? ENGINE_DTYPE_FP32 : ENGINE_DTYPE_BF16};
    return engine_open(&options, engine, err);
}

static enum status open_storage(const struct config *config, const struct engine *engine,
                                struct storage **storage, struct error *err)
{
    const struct engine_info *info = engine_get_info(engine);
    const struct storage_options options = {.path = config->data,
                                            .kv_bytes = info->kv_bytes,
                                            .landmark_bytes = info->landmark_bytes,
                                            .chunk_tokens = info->config->chunk_tokens,
                                            .model_fingerprint = info->fingerprint,
                                            .model_name = info->model_name,
                                            .map_bytes = config->map_size,
                                            .queue_bytes = config->write_queue,
                                            .memory_quota = config->memory_quota,
                                            .keep_snapshots = (uint32_t)config->keep_snapshots};
    return storage_open(&options, storage, err);
}

static void closed_cb(void *context)
{
    struct process *process = context;
    server_close(&process->server);
    uv_close((uv_handle_t *)&process->terminate, NULL);
    uv_close((uv_handle_t *)&process->interrupt, NULL);
    uv_close((uv_handle_t *)&process->hangup, NULL);
}

static void drained_cb(void *context)
{
    struct process *process = context;
    engine_thread_close(process->server.engine_thread, closed_cb, process);
}

static void signal_cb(uv_signal_t *handle, int number)
{
    struct process *process = handle->data;
    if (process->signals++) {
        log_event(LOG_WARN, "forced to end", NULL);
        _Exit(1);
    }
    log_event(LOG_INFO, "draining", "signal", LOG_INT, (int64_t)number, NULL);
    server_drain(&process->server, process->config.drain_timeout * 1000, drained_cb, process);
}

/* What the keys' names may take on disk, as the file of keys says. */
static void set_quotas(const struct server *server)
{
    struct storage_quota *quotas = calloc(LIMITS_KEYS, sizeof *quotas);
    size_t count = 0;
    uint64_t bytes;
    enum status status = quotas ? STATUS_OK : STATUS_NO_MEMORY;
    for (size_t i = 0; !status && auth_key_at(server->auth, i, &quotas[count].tenant, &bytes);
         i++) {
        quotas[count].bytes = bytes;
        count += bytes != 0;
    }
    if (!status)
        status = storage_set_quotas(server->storage, quotas, count);
    if (status)
        log_event(LOG_ERROR, "quotas are not as the file of keys says", "error", LOG_STR,
                  status_text(status), NULL);
    free(quotas);
}

static void hangup_cb(uv_signal_t *handle, int number)
{
    struct process *process = handle->data;
    struct error err = {0};
    (void)number;
    if (auth_reload(process->server.auth, &err))
        log_event(LOG_ERROR, "keys stay as they were", "error", LOG_STR, err.message, NULL);
    else
        log_event(LOG_INFO, "keys read", "file", LOG_STR, process->config.keys, NULL);
    set_quotas(&process->server);
}

/* Connections and the store's files count against one limit, which is often set low. */
static void raise_file_limit(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit))
        return;
    limit.rlim_cur = limit.rlim_max;
    if (setrlimit(RLIMIT_NOFILE, &limit))
        log_event(LOG_WARN, "the limit of open files stays low", NULL);
}

static void watch_signals(struct process *process)
{
    signal(SIGPIPE, SIG_IGN);
    uv_signal_init(&process->loop, &process->terminate);
    uv_signal_init(&process->loop, &process->interrupt);
    uv_signal_init(&process->loop, &process->hangup);
    process->terminate.data = process->interrupt.data = process->hangup.data = process;
    uv_signal_start(&process->terminate, signal_cb, SIGTERM);
    uv_signal_start(&process->interrupt, signal_cb, SIGINT);
    uv_signal_start(&process->hangup, hangup_cb, SIGHUP);
}

/* Whether others can reach this address. What is none is left to the listener's own refusal. */
static bool is_open(const char *host)
{
    struct sockaddr_in v4;
    struct sockaddr_in6 v6;
    if (!uv_ip4_addr(host, 0, &v4))
        return ntohl(v4.sin_addr.s_addr) >> 24 != IN_LOOPBACKNET;
    return !uv_ip6_addr(host, 0, &v6) && !IN6_IS_ADDR_LOOPBACK(&v6.sin6_addr);
}

/* Keys, and whether it may listen without any. */
static enum status open_keys(const struct config *config, struct auth **auth, struct error *err)
{
    const enum status status = auth_open(config->keys, getenv(AUTH_ENVIRONMENT), auth, err);
    if (status || auth_is_required(*auth) || config->insecure || !is_open(config->host))
        return status;
    auth_close(*auth);
    return error_set(err, STATUS_INVALID,
                     "--host %s is open to others, who could read and change every memory: make a "
                     "key with \"rambad key NAME FILE\" and give --keys FILE, or say --insecure",
                     config->host);
}

static int serve(struct process *process)
{
    struct server *server = &process->server;
    const struct config *config = &process->config;
    struct error err = {0};
    struct engine *engine;
    enum log_level level = LOG_INFO;
    log_parse_level(config->log_level, &level);
    log_set_level(level);
    signal(SIGXFSZ, SIG_IGN); /* a limit on file sizes is a full disk, answered as such */
    raise_file_limit();
    unreadable_watch(config->data);
    if (open_keys(config, &server->auth, &err))
        return fail("", &err);
    if (open_engine(config, &engine, &err)) {
        auth_close(server->auth);
        return fail("", &err);
    }
    if (chat_open(config->model, config->chat_template, engine_tokenizer(engine), &server->chat,
                  &err) ||
        open_storage(config, engine, &server->storage, &err)) {
        auth_close(server->auth);
        engine_close(engine);
        return fail("", &err);
    }
    set_quotas(server);
    uv_loop_init(&process->loop);
    server->loop = &process->loop;
    server->config = config;
    server->engine = engine;
    const struct engine_thread_options options = {.engine = engine,
                                                  .storage = server->storage,
                                                  .running_max = (uint32_t)config->running,
                                                  .queue_max = (uint32_t)config->queue,
                                                  .queue_tokens = config->queue_tokens,
                                                  .session_bytes = config->session_memory,
                                                  .running_bytes = config->running_memory,
                                                  .max_stall = (double)config->max_stall * 1e-3,
                                                  .shared = auth_is_required(server->auth),
                                                  .prefix_bytes = config->prefix_cache};
    int port = (int)config->port;
    if (server_listen(server, &port, &err) ||
        engine_thread_open(&process->loop, &options, &server->engine_thread, &err)) {
        auth_close(server->auth);
        engine_close(engine);
        storage_close(server->storage);
        return fail("", &err);
    }
    watch_signals(process);
    log_event(LOG_INFO, "listening", "host", LOG_STR, config->host, "port", LOG_INT, (int64_t)port,
              "model", LOG_STR, engine_get_info(engine)->model_name, "backend", LOG_STR,
              engine_get_info(engine)->backend, "data", LOG_STR, config->data, "version", LOG_STR,
              RAMBAD_VERSION, NULL);
    uv_run(&process->loop, UV_RUN_DEFAULT);
    storage_close(server->storage);
    uv_loop_close(&process->loop);
    auth_close(server->auth);
    log_event(LOG_INFO, "ended", NULL);
    return 0;
}

int main(int argc, char **argv)
{
    static struct process process;
    if (argc > 1 && strcmp(argv[1], "check") == 0)
        return check_main(argc - 1, argv + 1);
    if (argc > 1 && strcmp(argv[1], "repair") == 0)
        return repair_main(argc - 1, argv + 1);
    if (argc > 1 && strcmp(argv[1], "key") == 0)
        return auth_key_main(argc - 1, argv + 1);
    if (argc == 2 && strcmp(argv[1], "config") == 0) {
        config_print_example(stdout);
        return fflush(stdout) != 0;
    }
    if (argc > 1 && strcmp(argv[1], "bench") == 0)
        return bench_main(argc - 1, argv + 1);
    if (argc > 1 && strcmp(argv[1], "serve") == 0) {
        argc--;
        argv++;
    }
    if (argc > 1 && strcmp(argv[1], "--version") == 0) {
        printf("rambad %s\n", RAMBAD_VERSION);
        return 0;
    }
    struct error err = {0};
    bool help;
    if (config_read(argc, argv, &process.config, &help, &err)) {
        fail("", &err);
        return 2;
    }
    if (help) {
        config_print_help();
        return 0;
    }
    return serve(&process);
}
