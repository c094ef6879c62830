/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Journal bytes that nobody wrote: records, the index extension, whole files.
 * The first byte chooses what the rest is.
 *
 *  clang -fsanitize=fuzzer,address,undefined ... : libFuzzer
 *  -DSTANDALONE: each argument is a file with one input (to repeat a finding)
 */
#define _GNU_SOURCE
#include "../../journal/journal-private.h"
#include "../../journal/mailbox-ext.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* What decodes, encodes to something that decodes to the same. */
static void one_record(const uint8_t *data, size_t size)
{
	struct crdt_buf b = CRDT_BUF_INIT, again = CRDT_BUF_INIT;
	struct crdt_jrec rec, rec2;
	const char *error;

	if (crdt_jrec_decode(data, size, &rec, &error) == 0 && crdt_jrec_kind_known(rec.kind)) {
		crdt_jrec_encode(&b, &rec);
		assert(!b.failed && b.len <= size);
		if (crdt_jrec_decode(b.data, b.len, &rec2, &error) < 0)
			abort();
		crdt_jrec_encode(&again, &rec2);
		assert(again.len == b.len && memcmp(again.data, b.data, b.len) == 0);
		crdt_jrec_free(&rec2);
	}
	crdt_jrec_free(&rec);
	crdt_buf_free(&b);
	crdt_buf_free(&again);
}

static void one_ext(const uint8_t *data, size_t size)
{
	struct crdt_mailbox_ext ext;
	uint8_t bytes[CRDT_MAILBOX_EXT_SIZE];
	size_t used;

	crdt_mailbox_ext_decode(data, size, &ext);
	if (!crdt_mailbox_ext_encode(bytes, &used, &ext))
		abort();
}

static bool read_cb(void *ctx, const struct crdt_jrec *rec)
{
	uint64_t *last = ctx;

	assert(*last == 0 || rec->seq == *last + 1);
	*last = rec->seq;
	return true;
}

/* The file is read from its start and with a hint, locked, trimmed. */
static void one_file(int fd)
{
	struct crdt_journal *j;
	const char *error;
	char path[64];
	uint64_t last = 0;

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	/* journal.c opens it without following links: by its real name */
	char name[256];
	ssize_t n = readlink(path, name, sizeof(name) - 1);
	assert(n > 0);
	name[n] = '\0';
	if ((j = crdt_journal_open_file(name, &error)) == NULL)
		return;
	(void)crdt_journal_read(j, 0, read_cb, &last, &error);
	last = 0;
	(void)crdt_journal_read(j, crdt_journal_info(j)->base_seq + 1, read_cb, &last, &error);
	(void)crdt_journal_trim(j, crdt_journal_info(j)->base_seq, &error);
	(void)crdt_journal_trim(j, UINT64_MAX, &error);
	crdt_journal_close(&j);
}

static int temp_file(void)
{
	char path[] = "/dev/shm/fuzz-journal.XXXXXX";
	int fd = mkstemp(path);

	assert(fd != -1);
	return fd;
}

static void end_file(int fd)
{
	char path[64], name[256];
	ssize_t n;

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	n = readlink(path, name, sizeof(name) - 1);
	if (n > 0) {
		name[n] = '\0';
		(void)unlink(name);
	}
	close(fd);
}

/* A good header, then the input: mutated frames without valid checksums. */
static void put_header(int fd)
{
	uint8_t header[CRDT_JOURNAL_HEADER_SIZE] = { 0 };
	struct ident id = {
		.origin = CRDT_ORIGIN(1, 1),
		.replica = { (const uint8_t *)"r", 1 },
		.user = { (const uint8_t *)"u", 1 },
	};
	struct copy c = { .generation = 1, .base_seq = 1 };

	assert(journal_ident_encode(header, &id) &&
	       journal_copy_encode(header + COPY_OFFSET(1), &c));
	assert(journal_pwrite(fd, header, sizeof(header), 0) == 0);
}

/* Frames with right checksums around records from the input; one byte after each
 * frame says how much of it is there. */
static void put_frames(int fd, const uint8_t *data, size_t size)
{
	off_t offset = CRDT_JOURNAL_HEADER_SIZE;

	for (uint64_t seq = 1; size >= 4; seq++) {
		size_t n = data[0] % 64, cut = data[1];
		struct crdt_jrec rec;
		struct crdt_buf b = CRDT_BUF_INIT;
		const char *error;
		bool last = data[2] & 1;

		data += 3;
		size -= 3;
		if (n > size)
			n = size;
		if (crdt_jrec_decode(data, n, &rec, &error) == 0 && crdt_jrec_kind_known(rec.kind)) {
			rec.seq = seq;
			if (journal_frame_encode(&b, &rec, last)) {
				size_t len = cut == 0 && b.len > 1 ? b.len - 1 : b.len;

				assert(journal_pwrite(fd, b.data, len, offset) == 0);
				offset += (off_t)len;
			}
		}
		crdt_jrec_free(&rec);
		crdt_buf_free(&b);
		data += n;
		size -= n;
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	uint8_t what;
	int fd;

	if (size < 1)
		return 0;
	what = data[0] % 5;
	data++;
	size--;
	if (what == 0) {
		one_record(data, size);
		return 0;
	}
	if (what == 1) {
		one_ext(data, size);
		return 0;
	}
	fd = temp_file();
	if (what == 2) {
		assert(journal_pwrite(fd, data, size, 0) == 0);
	} else {
		put_header(fd);
		if (what == 3)
			assert(journal_pwrite(fd, data, size, CRDT_JOURNAL_HEADER_SIZE) == 0);
		else
			put_frames(fd, data, size);
	}
	one_file(fd);
	end_file(fd);
	return 0;
}

#ifdef STANDALONE
int main(int argc, char *argv[])
{
	static uint8_t data[1 << 20];

	for (int i = 1; i < argc; i++) {
		FILE *f = fopen(argv[i], "rb");
		size_t n;

		if (f == NULL) {
			perror(argv[i]);
			return 1;
		}
		n = fread(data, 1, sizeof(data), f);
		fclose(f);
		LLVMFuzzerTestOneInput(data, n);
	}
	return 0;
}
#endif
