/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What ops need to know of a mail. */
#include "lib.h"
#include "buffer.h"
#include "mail-facts.h"
#include "istream.h"
#include "istream-crlf.h"
#include "hex-binary.h"
#include "sha2.h"
#include "mail-storage-private.h"
#include "maildir-storage.h"
#include "maildir-uidlist.h"
#include "maildir-sync.h"
#include "mailbox-recent-flags.h"

#include <unistd.h>

#include <openssl/evp.h>

/* GUIDs */

bool worker_guid_is_portable(const void *guid, size_t n)
{
	const unsigned char *p = guid;

	if (n == 0 || n > CRDT_GUID_MAX || p[0] == '.')
		return FALSE;
	for (size_t i = 0; i < n; i++) {
		if (p[i] <= ' ' || p[i] == 0x7f || p[i] == '/')
			return FALSE;
	}
	return TRUE;
}

const char *worker_guid(const char *guid)
{
	unsigned char digest[SHA256_RESULTLEN];

	if (worker_guid_is_portable(guid, strlen(guid)))
		return guid;
	/* e.g. a file name with a space in it */
	sha256_get_digest(guid, strlen(guid), digest);
	return t_strconcat("crdt-", binary_to_hex(digest, 16), NULL);
}

int worker_mail_guid(struct mail *mail, const char **guid_r)
{
	if (mail_get_special(mail, MAIL_FETCH_GUID, guid_r) < 0)
		return -1;
	*guid_r = worker_guid(*guid_r);
	return 0;
}

uint8_t worker_mail_flags(struct mail *mail)
{
	return mail_get_flags(mail) & CRDT_FLAGS_ALL;
}

/* Texts */

static bool maildir_file_exists(struct mailbox *box, const char *dir, const char *fname)
{
	return access(t_strdup_printf("%s/%s/%s", mailbox_get_path(box), dir, fname), F_OK) == 0;
}

/* As if the mail were recent: Dovecot looks for it in new/ first. */
static void recent_set(struct mailbox *box, uint32_t uid)
{
	uint32_t prev = box->recent_flags_prev_uid;

	mailbox_recent_flags_set_uid_forced(box, uid);
	/* a sync in between may add lower ones */
	box->recent_flags_prev_uid = prev;
}

/*
 * Maildir: tells Dovecot where the file may be that a session has renamed since this
 * process looked.  Otherwise it looks at all files of the mailbox, with the uidlist
 * locked: each change of a session would make its next one wait for that.  A wrong
 * hint costs that look, and no more.  TRUE: recent_set().
 */
static bool file_hint(struct mailbox *box, uint32_t uid)
{
	struct maildir_mailbox *mbox = MAILDIR_MAILBOX(box);
	enum maildir_uidlist_rec_flag flags, add = MAILDIR_UIDLIST_REC_FLAG_NONSYNCED;
	const char *fname;
	bool in_new;

	if (maildir_sync_lookup(mbox, uid, &flags, &fname) <= 0 ||
	    maildir_file_exists(box, "cur", fname) ||
	    ((flags & MAILDIR_UIDLIST_REC_FLAG_NEW_DIR) != 0 && maildir_file_exists(box, "new", fname)))
		return FALSE;
	/* its name is made of the flags that the index has now */
	(void)maildir_sync_refresh_flags_view(mbox);
	in_new = maildir_file_exists(box, "new", t_strcut(fname, MAILDIR_INFO_SEP));
	if (!in_new && (flags & MAILDIR_UIDLIST_REC_FLAG_NEW_DIR) != 0)
		add |= MAILDIR_UIDLIST_REC_FLAG_MOVED;
	maildir_uidlist_add_flags(mbox->uidlist, fname, add);
	if (!in_new || mailbox_recent_flags_have_uid(box, uid))
		return FALSE;
	recent_set(box, uid);
	return TRUE;
}

int worker_mail_stream(struct mail *mail, struct istream **input_r)
{
	struct mailbox *box = mail->box;
	struct istream *input;
	bool recent = FALSE;
	int ret;

	if (strcmp(box->storage->name, MAILDIR_STORAGE_NAME) == 0) T_BEGIN {
		recent = file_hint(box, mail->uid);
	} T_END;
	ret = mail_get_stream_because(mail, NULL, NULL, "crdt", &input);
	if (recent)
		mailbox_recent_flags_expunge_uid(box, mail->uid);
	if (ret < 0)
		return -1;
	*input_r = i_stream_create_crlf(input);
	return 0;
}

int worker_mail_text(struct mail *mail, struct crdt_content *content_r, uint64_t *size_r,
		     buffer_t *keep, size_t keep_max)
{
	struct istream *input;
	const unsigned char *data;
	EVP_MD_CTX *md;
	size_t n;
	int ret = 0;

	if (worker_mail_stream(mail, &input) < 0)
		return -1;
	md = EVP_MD_CTX_new();
	if (md == NULL || EVP_DigestInit_ex(md, EVP_sha256(), NULL) != 1)
		i_fatal("EVP_DigestInit_ex(sha256) failed");
	while (i_stream_read_more(input, &data, &n) > 0) {
		if (EVP_DigestUpdate(md, data, n) != 1)
			i_fatal("EVP_DigestUpdate() failed");
		if (keep != NULL && keep->used + n <= keep_max)
			buffer_append(keep, data, n);
		else
			keep = NULL;	/* too large: what is in it does not count */
		i_stream_skip(input, n);
	}
	if (EVP_DigestFinal_ex(md, content_r->b, NULL) != 1)
		i_fatal("EVP_DigestFinal_ex() failed");
	EVP_MD_CTX_free(md);
	*size_r = input->v_offset;
	if (input->stream_errno != 0) {
		mail_set_critical(mail, "read(%s) failed: %s", i_stream_get_name(input),
				  i_stream_get_error(input));
		ret = -1;
	}
	i_stream_unref(&input);
	return ret;
}
