#include "tests/lib/daemon.h"

#include <arpa/inet.h>
#include <curl/curl.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "tests/lib/document.h"
#include "tests/lib/store_helper.h"

#define READY_SECONDS 120 /* a large memory is found again within this, on a slow machine */

double daemon_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static const char *program(const char *name, const char *otherwise)
{
    const char *path = getenv(name);
    return path && path[0] ? path : otherwise;
}

/* A port for a daemon to listen at. It stays bound, with SO_REUSEADDR and no listener, for as long
 * as the test runs: the daemon may have it, as often as it is started, and nobody else is given it.
 */
static int free_port(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    const int yes = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_true(fd >= 0);
    assert_int_equal(setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes), 0);
    assert_int_equal(bind(fd, (struct sockaddr *)&address, size), 0);
    assert_int_equal(getsockname(fd, (struct sockaddr *)&address, &size), 0);
    return ntohs(address.sin_port);
}

void daemon_init(struct daemon *daemon, const char *model, const char *folder, const char *name)
{
    *daemon = (struct daemon){.port = free_port()};
    curl_global_init(CURL_GLOBAL_DEFAULT);
    snprintf(daemon->url, sizeof daemon->url, "http://127.0.0.1:%d", daemon->port);
    snprintf(daemon->model, sizeof daemon->model, "%s", model);
    snprintf(daemon->data, sizeof daemon->data, "%s/%s", folder, name);
    snprintf(daemon->log, sizeof daemon->log, "%.1000s.log", daemon->data);
    assert_true(mkdir(daemon->data, 0700) == 0 || errno == EEXIST);
}

void daemon_print_log(const struct daemon *daemon)
{
    char line[1024];
    FILE *file = fopen(daemon->log, "r");
    if (!file)
        return;
    if (fseek(file, -8192, SEEK_END) == 0)
        (void)!fgets(line, sizeof line, file); /* the rest of a line */
    else
        rewind(file);
    print_message("--- end of the daemon's log ---\n");
    while (fgets(line, sizeof line, file))
        print_message("%s", line);
    fclose(file);
}

void daemon_spawn(struct daemon *daemon)
{
    char port[16];
    const char *argv[32] = {program("RAMBAD_BIN", "build/rambad"),
                            "serve",
                            "--host",
                            "127.0.0.1",
                            "--port",
                            port,
                            "--data",
                            daemon->data,
                            "--model",
                            daemon->model};
    size_t count = 10;
    snprintf(port, sizeof port, "%d", daemon->port);
    for (size_t i = 0; daemon->flags && daemon->flags[i] && count < 31; i++)
        argv[count++] = daemon->flags[i];
    assert_int_equal(daemon->pid, 0);
    fflush(NULL);
    pid_t parent = getpid(), pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        int log = open(daemon->log, O_WRONLY | O_CREAT | O_APPEND, 0600);
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (log < 0 || getppid() != parent)
            _exit(126);
        dup2(log, STDOUT_FILENO);
        dup2(log, STDERR_FILENO);
        execv(argv[0], (char *const *)argv);
        _exit(127);
    }
    daemon->pid = pid;
}

double daemon_start(struct daemon *daemon)
{
    double start = daemon_now();
    daemon_spawn(daemon);
    for (;;) {
        struct buf body;
        int how;
        buf_init(&body);
        int code = daemon_call(daemon, "GET", "/health/ready", NULL, NULL, 0, &body);
        buf_close(&body);
        if (code == 200)
            return daemon_now() - start;
        if (waitpid(daemon->pid, &how, WNOHANG) == daemon->pid) {
            daemon->pid = 0;
            daemon_print_log(daemon);
            fail_msg("the daemon ended at its start, %s %d",
                     WIFEXITED(how) ? "exit code" : "signal",
                     WIFEXITED(how) ? WEXITSTATUS(how) : WTERMSIG(how));
        }
        if (daemon_now() - start > READY_SECONDS) {
            daemon_print_log(daemon);
            daemon_kill(daemon);
            fail_msg("the daemon was not ready after %d s", READY_SECONDS);
        }
        usleep(2000);
    }
}

void daemon_kill(struct daemon *daemon)
{
    if (daemon->pid == 0)
        return;
    kill(daemon->pid, SIGKILL);
    while (waitpid(daemon->pid, NULL, 0) < 0 && errno == EINTR)
        ;
    daemon->pid = 0;
}

void daemon_restart(struct daemon *daemon)
{
    daemon_kill(daemon);
    daemon_start(daemon);
}

void daemon_stop(struct daemon *daemon)
{
    assert_true(daemon->pid > 0);
    kill(daemon->pid, SIGTERM);
    daemon_await(daemon);
}

void daemon_await(struct daemon *daemon)
{
    int how = 0;
    double start = daemon_now();
    while (waitpid(daemon->pid, &how, WNOHANG) == 0) {
        if (daemon_now() - start > 30) {
            daemon_print_log(daemon);
            daemon_kill(daemon);
            fail_msg("the daemon did not end within 30 s of SIGTERM");
        }
        usleep(2000);
    }
    daemon->pid = 0;
    if (!WIFEXITED(how) || WEXITSTATUS(how))
        daemon_print_log(daemon);
    assert_true(WIFEXITED(how));
    assert_int_equal(WEXITSTATUS(how), 0);
}

static size_t on_body(char *data, size_t one, size_t size, void *out)
{
    buf_append(out, data, one * size);
    return one * size;
}

static int call(const struct daemon *daemon, const char *method, const char *path,
                const char *accept, const char *key, const char *type, const char *body,
                size_t size, struct buf *out)
{
    CURL *curl = curl_easy_init();
    char url[512], header[128];
    long code = 0;
    assert_non_null(curl);
    snprintf(url, sizeof url, "%s%s", daemon->url, path);
    struct curl_slist *headers = curl_slist_append(NULL, "Expect:");
    snprintf(header, sizeof header, "Accept: %s", accept);
    headers = curl_slist_append(headers, header);
    if (key) {
        snprintf(header, sizeof header, "Idempotency-Key: %s", key);
        headers = curl_slist_append(headers, header);
    }
    curl_easy_setopt(curl, CURLOPT_URL, url);
    curl_easy_setopt(curl, CURLOPT_NOSIGNAL, 1L);
    curl_easy_setopt(curl, CURLOPT_WRITEFUNCTION, on_body);
    curl_easy_setopt(curl, CURLOPT_WRITEDATA, out);
    if (body) {
        snprintf(header, sizeof header, "Content-Type: %s", type);
        headers = curl_slist_append(headers, header);
        curl_easy_setopt(curl, CURLOPT_POSTFIELDSIZE_LARGE, (curl_off_t)size);
        curl_easy_setopt(curl, CURLOPT_POSTFIELDS, body);
    }
    curl_easy_setopt(curl, CURLOPT_CUSTOMREQUEST, method);
    curl_easy_setopt(curl, CURLOPT_HTTPHEADER, headers);
    CURLcode result = curl_easy_perform(curl);
    curl_easy_getinfo(curl, CURLINFO_RESPONSE_CODE, &code);
    curl_slist_free_all(headers);
    curl_easy_cleanup(curl);
    if (result != CURLE_OK)
        return 0;
    document_check(method, path, (int)code);
    return (int)code;
}

int daemon_call(const struct daemon *daemon, const char *method, const char *path, const char *type,
                const char *body, size_t size, struct buf *out)
{
    return call(daemon, method, path, "application/json", NULL, type, body, size, out);
}

int daemon_call_once(const struct daemon *daemon, const char *key, const char *path,
                     const char *type, const char *body, size_t size, struct buf *out)
{
    return call(daemon, "POST", path, "application/json", key, type, body, size, out);
}

int daemon_append(const struct daemon *daemon, const char *path, const char *text, size_t size,
                  struct buf *out)
{
    return call(daemon, "POST", path, "text/event-stream", NULL, "text/plain", text, size, out);
}

void daemon_create_memory(const struct daemon *daemon, const char *from, char id[LIMITS_ID_BYTES])
{
    struct buf request, answer;
    struct client_memory memory;
    buf_init(&request);
    buf_init(&answer);
    client_json_write_create(&request, from, 0, NULL);
    int code = daemon_call(daemon, "POST", "/v1/memories", "application/json", request.data,
                           request.size, &answer);
    if (code != 201)
        print_message("creating a memory: HTTP %d %s\n", code, buf_text(&answer));
    assert_int_equal(code, 201);
    assert_int_equal(client_json_memory(answer.data, answer.size, &memory), STATUS_OK);
    memcpy(id, memory.id, LIMITS_ID_BYTES);
    buf_close(&request);
    buf_close(&answer);
}

struct client_memory daemon_get_memory(const struct daemon *daemon, const char *id)
{
    char path[128];
    struct buf answer;
    struct client_memory memory;
    buf_init(&answer);
    snprintf(path, sizeof path, "/v1/memories/%s", id);
    int code = daemon_call(daemon, "GET", path, NULL, NULL, 0, &answer);
    if (code != 200) {
        print_message("memory %s: HTTP %d %s\n", id, code, buf_text(&answer));
        daemon_print_log(daemon);
    }
    assert_int_equal(code, 200);
    assert_int_equal(client_json_memory(answer.data, answer.size, &memory), STATUS_OK);
    buf_close(&answer);
    return memory;
}

void daemon_write_book(struct buf *out, unsigned words)
{
    for (unsigned i = 0; i < words; i++)
        buf_append_format(out, "%u. ", i * i % 977);
}

void daemon_append_text(const struct daemon *daemon, const char *id, const char *text, size_t size)
{
    char path[160];
    struct buf answer;
    buf_init(&answer);
    snprintf(path, sizeof path, "/v1/memories/%s/append", id);
    const int code = daemon_call(daemon, "POST", path, "text/plain", text, size, &answer);
    if (code != 200)
        fail_msg("%s: HTTP %d %s", path, code, buf_text(&answer));
    buf_close(&answer);
}

struct client_completion daemon_complete(const struct daemon *daemon, const char *id,
                                         const char *prompt, uint32_t max_tokens, bool write)
{
    struct client_completion completion;
    struct buf body, answer;
    buf_init(&body);
    buf_init(&answer);
    client_json_write_completion(&body,
                                 &(struct client_completion_request){.memory = id,
                                                                     .memory_write = write,
                                                                     .prompt = prompt,
                                                                     .prompt_size = strlen(prompt),
                                                                     .max_tokens = max_tokens,
                                                                     .seed = -1});
    const int code = daemon_call(daemon, "POST", "/v1/completions", "application/json", body.data,
                                 body.size, &answer);
    if (code != 200)
        fail_msg("a completion of %s: HTTP %d %s", id, code, buf_text(&answer));
    assert_int_equal(client_json_completion(answer.data, answer.size, &completion), STATUS_OK);
    buf_close(&body);
    buf_close(&answer);
    return completion;
}

uint64_t daemon_read_chunks(const struct daemon *daemon, const char *id, struct buf *answers)
{
    uint64_t next = 0;
    for (bool more = true; more;) {
        char path[160];
        struct buf answer;
        struct client_chunk_list list;
        buf_init(&answer);
        snprintf(path, sizeof path, "/v1/memories/%s/chunks?from=%llu&limit=100", id,
                 (unsigned long long)next);
        int code = daemon_call(daemon, "GET", path, NULL, NULL, 0, &answer);
        if (code != 200)
            print_message("%s: HTTP %d %s\n", path, code, buf_text(&answer));
        assert_int_equal(code, 200);
        assert_int_equal(client_json_chunk_list(answer.data, answer.size, &list), STATUS_OK);
        for (size_t i = 0; i < list.count; i++)
            assert_int_equal(list.items[i].index, next++);
        buf_append(answers, answer.data, answer.size);
        more = list.has_more && list.count > 0;
        client_json_chunk_list_close(&list);
        buf_close(&answer);
    }
    return next;
}

int daemon_run(const struct daemon *daemon, const char *const *argv, struct buf *out)
{
    int ends[2], how;
    char block[4096];
    ssize_t got;
    assert_int_equal(pipe2(ends, O_CLOEXEC), 0);
    fflush(NULL);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        setenv("RAMBA_URL", daemon->url, 1);
        dup2(ends[1], STDOUT_FILENO);
        execv(argv[0], (char *const *)argv);
        _exit(127);
    }
    close(ends[1]);
    while ((got = read(ends[0], block, sizeof block)) > 0 || (got < 0 && errno == EINTR))
        buf_append(out, block, got > 0 ? (size_t)got : 0);
    close(ends[0]);
    assert_int_equal(waitpid(pid, &how, 0), pid);
    return WIFEXITED(how) ? WEXITSTATUS(how) : 128 + WTERMSIG(how);
}

int daemon_ramba(const struct daemon *daemon, const char *const *arguments, struct buf *out)
{
    const char *argv[16] = {program("RAMBA_BIN", "build/ramba")};
    for (size_t i = 0; arguments[i] && i < 14; i++)
        argv[i + 1] = arguments[i];
    return daemon_run(daemon, argv, out);
}

void daemon_new_key(const struct daemon *daemon, const char *name, const char *file, char out[64])
{
    const char *argv[] = {program("RAMBAD_BIN", "build/rambad"), "key", name, file, NULL};
    struct buf text;
    buf_init(&text);
    assert_int_equal(daemon_run(daemon, argv, &text), 0);
    assert_int_equal(text.size, 3 + 48 + 1); /* "sk-", digits, the line's end */
    snprintf(out, 64, "%.51s", buf_text(&text));
    buf_close(&text);
}

void daemon_choose_tests(void)
{
    const char *name = getenv("RAMBAD_TEST");
    cmocka_set_test_filter(name && name[0] ? name : NULL);
}

void daemon_read_file(const char *path, struct buf *out)
{
    char block[65536];
    size_t got;
    FILE *file = fopen(path, "r");
    assert_non_null(file);
    while ((got = fread(block, 1, sizeof block, file)) > 0)
        buf_append(out, block, got);
    fclose(file);
}

/* How often the log tells of the file of keys. */
static int count_readings(const struct daemon *daemon)
{
    struct buf log;
    int count = 0;
    buf_init(&log);
    daemon_read_file(daemon->log, &log);
    for (const char *at = buf_text(&log); (at = strstr(at, "\"event\":\"keys ")); at++)
        count++;
    buf_close(&log);
    return count;
}

void daemon_reread_keys(const struct daemon *daemon)
{
    const int before = count_readings(daemon);
    assert_int_equal(kill(daemon->pid, SIGHUP), 0);
    for (const double start = daemon_now(); count_readings(daemon) == before; usleep(5000))
        if (daemon_now() - start > READY_SECONDS)
            fail_msg("the log says nothing of keys after SIGHUP");
}

void daemon_check(const struct daemon *daemon)
{
    const char *argv[] = {program("RAMBAD_BIN", "build/rambad"), "check", daemon->data, NULL};
    struct buf out;
    assert_int_equal(daemon->pid, 0);
    buf_init(&out);
    int code = daemon_run(daemon, argv, &out);
    if (code)
        print_message("rambad check: exit code %d\n%s\n", code, buf_text(&out));
    assert_int_equal(code, 0);
    buf_close(&out);
}

char *daemon_begin(struct daemon *daemon, const char *model, const char *const *flags)
{
    char *folder = store_helper_folder();
    daemon_init(daemon, model, folder, "data");
    daemon->flags = flags;
    daemon_start(daemon);
    return folder;
}

void daemon_end(struct daemon *daemon, char *folder)
{
    if (daemon->pid)
        daemon_stop(daemon);
    daemon_check(daemon);
    store_helper_remove(folder);
}
