#include <stdlib.h>
#include <string.h>

#include "storage/store.h"

bool storage_is_prefix(const char *id)
{
    return strncmp(id, STORAGE_PREFIX, sizeof STORAGE_PREFIX - 1) == 0;
}

/* The ids from STORAGE_PREFIX on; `*ids` grows as they come. */
static enum status list_ids(MDB_cursor *cursor, char (**ids)[LIMITS_ID_BYTES], size_t *count)
{
    const size_t begin = sizeof STORAGE_PREFIX - 1;
    size_t room = 0;
    MDB_val key = {begin, (void *)(uintptr_t)STORAGE_PREFIX}, value;
    enum status status = STATUS_OK;
    int rc = mdb_cursor_get(cursor, &key, &value, MDB_SET_RANGE);
    for (; rc == 0; rc = mdb_cursor_get(cursor, &key, &value, MDB_NEXT)) {
        if (key.mv_size < begin || memcmp(key.mv_data, STORAGE_PREFIX, begin) != 0)
            break;
        if (key.mv_size >= LIMITS_ID_BYTES)
            continue; /* not written by us; `check` names it */
        if (*count == room) {
            room = room ? room * 2 : 64;
            void *grown = realloc(*ids, room * sizeof **ids);
            if (!grown) {
                status = STATUS_NO_MEMORY;
                break;
            }
            *ids = grown;
        }
        memcpy((*ids)[*count], key.mv_data, key.mv_size);
        (*ids)[(*count)++][key.mv_size] = 0;
    }
    return status || rc == 0 || rc == MDB_NOTFOUND ? status : store_status(rc);
}

enum status storage_prefix_list(struct storage *storage, char (**ids)[LIMITS_ID_BYTES],
                                size_t *count)
{
    MDB_cursor *cursor;
    MDB_txn *txn;
    *ids = NULL;
    *count = 0;
    enum status status = store_cursor_open(storage, STORE_MEMORY, &txn, &cursor);
    if (status)
        return status;
    status = list_ids(cursor, ids, count);
    store_cursor_close(storage, txn, cursor);
    if (status) {
        free(*ids);
        *ids = NULL;
        *count = 0;
    }
    return status;
}
