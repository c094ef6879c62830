/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "crdt-modseq.h"
#include "array.h"
#include "fdatasync-path.h"
#include "mail-index-private.h"
#include "mail-index-modseq.h"
#include "mail-transaction-log-private.h"

#include <fcntl.h>
#include <unistd.h>

/* Of the two new files of the log, and what raise_all() writes into it for each mail. */
#define LOG_ROOM (64 * 1024)

/* A view of the log gives expunges without their protection bits. */
static bool is_expunge(const struct mail_transaction_header *hdr)
{
	uint32_t type = hdr->type & MAIL_TRANSACTION_TYPE_MASK;

	return type == MAIL_TRANSACTION_EXPUNGE || type == MAIL_TRANSACTION_EXPUNGE_GUID;
}

static bool is_pending(const struct mail_transaction_header *hdr)
{
	if ((hdr->type & MAIL_TRANSACTION_EXTERNAL) != 0)
		return FALSE;
	switch (hdr->type & MAIL_TRANSACTION_TYPE_MASK) {
	case MAIL_TRANSACTION_FLAG_UPDATE:
	case MAIL_TRANSACTION_KEYWORD_UPDATE:
	case MAIL_TRANSACTION_KEYWORD_RESET:
		return TRUE;
	}
	return is_expunge(hdr);
}

int crdt_modseq_pending(struct mail_index *index)
{
	const struct mail_transaction_header *hdr;
	struct mail_transaction_log_view *view;
	const void *data;
	const char *reason;
	uint32_t seq;
	uoff_t offset;
	bool reset;
	int ret;

	mail_transaction_log_get_head(index->log, &seq, &offset);
	view = mail_transaction_log_view_open(index->log);
	ret = mail_transaction_log_view_set(view, index->map->hdr.log_file_seq,
					    index->map->hdr.log_file_tail_offset,
					    seq, offset, &reset, &reason);
	if (ret <= 0) {
		/* cannot be told: as if there were something */
		ret = 1;
	} else {
		while ((ret = mail_transaction_log_view_next(view, &hdr, &data)) > 0) {
			if (is_pending(hdr))
				break;
		}
	}
	mail_transaction_log_view_close(&view);
	return ret;
}

static void add_uids(const struct mail_transaction_header *hdr, const void *data, ARRAY_TYPE(seq_range) *uids)
{
	const struct mail_transaction_expunge *range = data;
	const struct mail_transaction_expunge_guid *one = data;

	if ((hdr->type & MAIL_TRANSACTION_TYPE_MASK) == MAIL_TRANSACTION_EXPUNGE) {
		for (size_t left = hdr->size; left >= sizeof(*range); left -= sizeof(*range), range++) {
			if (range->uid1 > 0 && range->uid1 <= range->uid2)
				seq_range_array_add_range(uids, range->uid1, range->uid2);
		}
	} else {
		for (size_t left = hdr->size; left >= sizeof(*one); left -= sizeof(*one), one++) {
			if (one->uid > 0)
				seq_range_array_add(uids, one->uid);
		}
	}
}

/* UIDs from before mean other mails. */
static bool sets_uidvalidity(const struct mail_transaction_header *hdr, const void *data)
{
	const size_t at = offsetof(struct mail_index_header, uid_validity);
	const struct mail_transaction_header_update *u = data;

	if ((hdr->type & MAIL_TRANSACTION_TYPE_MASK) != MAIL_TRANSACTION_HEADER_UPDATE)
		return FALSE;
	for (size_t left = hdr->size; left >= sizeof(*u); ) {
		size_t size = (sizeof(*u) + u->size + 3) & ~(size_t)3;

		if (u->offset <= at && at < (size_t)u->offset + u->size)
			return TRUE;
		if (size >= left)
			break;
		left -= size;
		u = CONST_PTR_OFFSET(u, size);
	}
	return FALSE;
}

void crdt_modseq_expunged(struct mail_index *index, ARRAY_TYPE(seq_range) *uids)
{
	struct mail_transaction_log_view *view = mail_transaction_log_view_open(index->log);
	const struct mail_transaction_header *hdr;
	const void *data;

	if (mail_transaction_log_view_set_all(view) >= 0) {
		while (mail_transaction_log_view_next(view, &hdr, &data) > 0) {
			if (sets_uidvalidity(hdr, data))
				array_clear(uids);
			/* external: it was done, or somebody took the file away */
			if ((hdr->type & MAIL_TRANSACTION_EXTERNAL) == 0 && is_expunge(hdr))
				add_uids(hdr, data, uids);
		}
	}
	mail_transaction_log_view_close(&view);
}

static int raise_all(struct mail_index *index, uint64_t min)
{
	struct mail_index_view *view = mail_index_view_open(index);
	struct mail_index_transaction *trans;
	uint64_t highest = mail_index_modseq_get_highest(view);
	uint32_t mails = mail_index_view_get_messages_count(view);
	int ret;

	/* what a killed one may have shown was the minimum */
	min = I_MAX(min, highest + 1);
	trans = mail_index_transaction_begin(view, MAIL_INDEX_TRANSACTION_FLAG_EXTERNAL |
					     MAIL_INDEX_TRANSACTION_FLAG_FSYNC);
	for (uint32_t seq = 1; seq <= mails; seq++)
		mail_index_update_modseq(trans, seq, min);
	mail_index_update_highest_modseq(trans, min);
	ret = mail_index_transaction_commit(&trans);
	mail_index_view_close(&view);
	return ret;
}

/* Whether the index could be written now.  Where the log has a new file and the index is
 * not written, what the second of two such failures rotates away is lost. */
static int check_room(struct mail_index *index)
{
	const struct mail_index_header *hdr = &index->map->hdr;
	off_t size = hdr->header_size + (off_t)hdr->messages_count * hdr->record_size + LOG_ROOM;
	const char *path = t_strconcat(index->filepath, ".crdt-room", NULL);
	int fd, ret;

	fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	if (fd == -1) {
		mail_index_set_error(index, "open(%s) failed: %m", path);
		return -1;
	}
	ret = posix_fallocate(fd, 0, size);
	i_close_fd(&fd);
	i_unlink(path);
	if (ret != 0) {
		errno = ret;
		mail_index_set_error(index, "posix_fallocate(%s) failed: %m", path);
		return -1;
	}
	return 0;
}

static int write_index(struct mail_index *index, bool rotate)
{
	mail_index_write(index, rotate, "crdt: takeover");
	if (MAIL_INDEX_IS_IN_MEMORY(index)) {
		mail_index_set_error(index, "crdt: Index %s could not be written", index->filepath);
		return -1;
	}
	return 0;
}

/* Dovecot compares UIDs with those that a client knows only for modseqs that the log does
 * not reach back to; it keeps two files of it.  So: a new one, and one more.
 *
 * A process that reads without a lock needs the file of the log that the index names: where
 * it is rotated away it repairs the index as it knows it, without what came later, mails
 * included.  So the index is written after each rotation, and before the first if it is
 * behind. */
static int forget_log(struct mail_index *index)
{
	if (mail_index_map(index, MAIL_INDEX_SYNC_HANDLER_HEAD) <= 0)
		return -1;
	if (index->main_index_hdr_log_file_seq != index->log->head->hdr.file_seq &&
	    write_index(index, FALSE) < 0)
		return -1;
	if (write_index(index, TRUE) < 0)
		return -1;
	return write_index(index, TRUE);
}

static int sync_files(struct mail_index *index)
{
	const char *const paths[] = { index->filepath, index->dir };

	/* (To open and close the log by its path would take its fcntl lock away.) */
	if (fdatasync(index->log->head->fd) < 0) {
		mail_index_set_error(index, "fdatasync(%s) failed: %m", index->log->head->filepath);
		return -1;
	}
	for (unsigned int i = 0; i < N_ELEMENTS(paths); i++) {
		if (fdatasync_path(paths[i]) < 0) {
			mail_index_set_error(index, "fdatasync_path(%s) failed: %m", paths[i]);
			return -1;
		}
	}
	return 0;
}

int crdt_modseq_restart(struct mail_index *index, uint64_t min)
{
	i_assert(index->log_sync_locked);
	mail_index_modseq_enable(index);
	/* (that was a transaction of its own) */
	if (mail_index_map(index, MAIL_INDEX_SYNC_HANDLER_HEAD) <= 0)
		return -1;
	if (check_room(index) < 0 || raise_all(index, min) < 0 || forget_log(index) < 0)
		return -1;
	return sync_files(index);
}
