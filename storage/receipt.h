/* receipt.h - what was answered to a write, kept with it for whoever asks again.
 * Thread: receipt_put on the writer thread, inside its transaction.
 * Owns nothing. Private to storage/. */
#ifndef STORAGE_RECEIPT_H
#define STORAGE_RECEIPT_H

#include "storage/store.h"

/* Writes it, in place of an older one of its name, and sweeps out some that are too old. */
STATUS_CHECKED enum status receipt_put(struct store_write *write,
                                       const struct storage_receipt *receipt);

#endif
