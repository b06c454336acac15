/* handle_move.c - a memory as a file: GET /v1/memories/{id}/export, POST /v1/memories/import.
 *
 * Both go piece by piece between the socket and storage, one piece on libuv's pool at a time; the
 * slower side sets the pace. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "server/route.h"
#include "server/wait.h"

/* Pieces of an upload given to the pool, and when the socket is no longer read meanwhile. */
#define UPLOAD_PIECE ((size_t)256 << 10)
#define UPLOAD_WAITING ((size_t)1 << 20)

struct move {
    struct request *request;
    struct server *server;
    char id[LIMITS_ID_BYTES];
    struct storage_export *out;
    struct storage_import *in;
    struct buf piece; /* the pool's while it works */
    struct buf text;  /* import: received, not with the pool yet */
    uv_work_t work;
    bool working, gone, done;
    bool ended; /* import: the whole body is here */
    enum status status;
    struct error err;
};

static void close_files(uv_work_t *work)
{
    struct move *move = work->data;
    if (move->out)
        storage_export_close(move->out);
    if (move->in)
        storage_import_close(move->in);
}

static void files_closed(uv_work_t *work, int cancelled)
{
    struct move *move = work->data;
    struct request *request = move->request;
    (void)cancelled;
    buf_close(&move->piece);
    buf_close(&move->text);
    free(move);
    request_done(request);
}

/* What was to be said has been said. */
static void end(struct move *move)
{
    move->request->gone_cb = NULL;
    move->request->state = NULL;
    uv_queue_work(move->server->loop, &move->work, close_files, files_closed);
}

static struct move *begin(struct request *request, void (*gone_cb)(struct request *request))
{
    struct move *move = calloc(1, sizeof *move);
    if (!move) {
        request_fail(request, STATUS_NO_MEMORY, NULL);
        return NULL;
    }
    move->request = request;
    move->server = request->server;
    move->work.data = move;
    buf_init(&move->piece);
    buf_init(&move->text);
    request->state = move;
    request->gone_cb = gone_cb;
    request_hold(request);
    return move;
}

/* ---- export ---- */

static void export_gone(struct request *request)
{
    struct move *move = request->state;
    move->gone = true;
    if (!move->working)
        end(move);
}

static void read_piece(uv_work_t *work)
{
    struct move *move = work->data;
    move->piece.size = 0;
    if (!move->out)
        move->status = storage_export_open(move->server->storage, move->id, &move->out);
    if (!move->status)
        move->status = storage_export_next(move->out, &move->piece, &move->done);
}

static void piece_read(uv_work_t *work, int cancelled)
{
    struct move *move = work->data;
    struct request *request = move->request;
    (void)cancelled;
    move->working = false;
    if (move->gone) {
        end(move);
    } else if (move->status && !request->answered) {
        wait_fail_memory(request, move->status, move->id);
        end(move);
    } else if (move->status) {
        request_download_cut(request); /* export_gone ends it */
    } else {
        char name[LIMITS_ID_BYTES + 16];
        snprintf(name, sizeof name, "%s.ramba", move->id);
        if (!request->answered)
            request_download_begin(request, name);
        request_stream_write(request, move->piece.data, move->piece.size);
        if (move->gone || !move->done)
            return;
        request_stream_end(request);
        end(move);
    }
}

static void next_piece(struct request *request)
{
    struct move *move = request->state;
    if (!move || move->working || move->done)
        return;
    move->working = true;
    uv_queue_work(move->server->loop, &move->work, read_piece, piece_read);
}

static void export_memory(struct request *request)
{
    if (strcmp(request->head->method, "HEAD") == 0) {
        struct storage_memory memory;
        const enum status status =
            storage_memory_get(request->server->storage, request->argument, &memory);
        if (status) {
            wait_fail_memory(request, status, request->argument);
            return;
        }
        storage_memory_close(&memory);
        request_answer(request, 200, "application/octet-stream", "", 0);
        return;
    }
    struct move *move = begin(request, export_gone);
    if (!move)
        return;
    memcpy(move->id, request->argument, sizeof move->id);
    request->drained_cb = next_piece;
    next_piece(request);
}

/* ---- import ---- */

static void import_next(struct move *move);

static void import_gone(struct request *request)
{
    struct move *move = request->state;
    move->gone = true;
    if (!move->working)
        end(move);
}

static void write_piece(uv_work_t *work)
{
    struct move *move = work->data;
    if (!move->in)
        move->status = storage_import_open(
            move->server->storage, engine_get_info(move->server->engine)->config->vocab_size,
            engine_snapshot_bytes_most(move->server->engine), move->request->key, &move->in);
    if (!move->status && move->piece.size)
        move->status =
            storage_import_feed(move->in, move->piece.data, move->piece.size, &move->err);
    if (!move->status && move->done)
        move->status = storage_import_finish(move->in, move->id, &move->err);
}

static void piece_written(uv_work_t *work, int cancelled)
{
    struct move *move = work->data;
    struct request *request = move->request;
    (void)cancelled;
    move->working = false;
    move->piece.size = 0;
    if (move->gone) {
        end(move);
    } else if (move->status) {
        move->done = true;
        /* It is the file that is damaged, not what we keep. */
        request_fail(request, move->status == STATUS_CORRUPT ? STATUS_INVALID : move->status,
                     &move->err);
        end(move);
    } else if (move->done) {
        wait_answer_memory(request, 201, move->id);
        end(move);
    } else {
        import_next(move);
    }
}

static void import_next(struct move *move)
{
    if (move->working || move->gone || move->done ||
        (move->text.size < UPLOAD_PIECE && !move->ended))
        return;
    struct buf taken = move->text;
    move->text = move->piece;
    move->piece = taken;
    move->done = move->ended;
    move->working = true;
    uv_queue_work(move->server->loop, &move->work, write_piece, piece_written);
    if (!move->ended)
        request_resume(move->request);
}

static void import_begin(struct request *request)
{
    struct move *move = begin(request, import_gone);
    if (move)
        server_new_id("mem_", move->id);
}

static void import_body(struct request *request, const char *data, size_t size)
{
    struct move *move = request->state;
    if (!move || move->done)
        return;
    buf_append(&move->text, data, size);
    if (move->text.size > UPLOAD_WAITING)
        request_pause(request);
    import_next(move);
}

static void import_end(struct request *request)
{
    struct move *move = request->state;
    if (!move || move->done)
        return;
    move->ended = true;
    import_next(move);
}

const struct request_handler handle_memories_export = {
    .name = "memories_export", .of_memory = true, .end_cb = export_memory};
const struct request_handler handle_memories_import = {.name = "memories_import",
                                                       .begin_cb = import_begin,
                                                       .body_cb = import_body,
                                                       .end_cb = import_end};
