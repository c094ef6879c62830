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

int worker_mail_stream(struct mail *mail, struct istream **input_r)
{
	struct istream *input;

	if (mail_get_stream_because(mail, NULL, NULL, "crdt", &input) < 0)
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
