/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Key files: the subset of ZPL that czmq writes.  A file is read once, checked
 * through the descriptor that was opened, into locked memory.
 */
#include "zcert.h"
#include "z85.h"

#include <sodium.h>

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define ZCERT_FILE_MAX 4096

static int fail(char **error_r, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static int fail(char **error_r, const char *fmt, ...)
{
	va_list args;

	va_start(args, fmt);
	if (vasprintf(error_r, fmt, args) < 0)
		*error_r = NULL;
	va_end(args);
	if (*error_r == NULL)
		*error_r = calloc(1, 1);
	return -1;
}

/* ---- parser ---- */

/* One `key = "value"` line, cut up in place. */
static bool split_pair(char *line, char **key_r, char **value_r)
{
	char *eq = strchr(line, '='), *end;

	if (eq == NULL)
		return false;
	while (isspace((unsigned char)*line))
		line++;
	for (end = eq; end > line && isspace((unsigned char)end[-1]); end--) ;
	*end = '\0';
	for (eq++; isspace((unsigned char)*eq); eq++) ;
	for (end = eq + strlen(eq); end > eq && isspace((unsigned char)end[-1]); end--) ;
	if (end - eq < 2 || *eq != '"' || end[-1] != '"' || memchr(eq + 1, '"', end - eq - 2) != NULL)
		return false;
	end[-1] = '\0';
	*key_r = line;
	*value_r = eq + 1;
	return **key_r != '\0';
}

struct parse {
	struct zcert *c;
	enum { SECTION_NONE, SECTION_METADATA, SECTION_CURVE } section;
	bool want_secret, have_public, have_secret;
};

static const char *parse_pair(struct parse *p, const char *key, const char *value)
{
	if (p->section == SECTION_NONE)
		return "a value before a section";
	if (p->section == SECTION_METADATA) {
		if (strcmp(key, "name") == 0 && strlen(value) >= sizeof(p->c->name))
			return "the name is too long";
		if (strcmp(key, "name") == 0)
			strcpy(p->c->name, value);
		return NULL;
	}
	if (strcmp(key, "public-key") == 0) {
		if (p->have_public)
			return "a second public-key";
		p->have_public = true;
		return z85_decode_key(value, p->c->public_key) ? NULL : "public-key is not 40 characters of Z85";
	}
	if (strcmp(key, "secret-key") == 0) {
		if (p->have_secret)
			return "a second secret-key";
		p->have_secret = true;
		if (!p->want_secret)
			return NULL;
		return z85_decode_key(value, p->c->secret_key) ? NULL : "secret-key is not 40 characters of Z85";
	}
	return "unknown key in section curve";
}

static const char *parse_line(struct parse *p, char *line)
{
	char *key, *value, *end = line + strlen(line);

	while (end > line && isspace((unsigned char)end[-1]))
		*--end = '\0';
	if (line[strspn(line, " \t")] == '\0' || line[strspn(line, " \t")] == '#')
		return NULL;
	if (isspace((unsigned char)*line)) {
		if (!split_pair(line, &key, &value))
			return "expected: key = \"value\"";
		return parse_pair(p, key, value);
	}
	if (strcmp(line, "metadata") == 0)
		p->section = SECTION_METADATA;
	else if (strcmp(line, "curve") == 0)
		p->section = SECTION_CURVE;
	else
		return "expected the section metadata or curve";
	return NULL;
}

int zcert_parse(char *data, size_t n, const char *path, bool secret, struct zcert *c_r, char **error_r)
{
	struct parse p = { .c = c_r, .want_secret = secret };
	uint8_t derived[32];
	const char *error;
	unsigned int line_no = 0;
	char *line, *next;

	if (memchr(data, '\0', n) != NULL)
		return fail(error_r, "%s: is not a text file", path);
	for (line = data; line != NULL; line = next) {
		next = strchr(line, '\n');
		if (next != NULL)
			*next++ = '\0';
		line_no++;
		error = parse_line(&p, line);
		if (error != NULL)
			return fail(error_r, "%s:%u: %s", path, line_no, error);
	}
	if (!p.have_public)
		return fail(error_r, "%s: has no public-key in a section curve", path);
	if (!secret)
		return 0;
	if (!p.have_secret)
		return fail(error_r, "%s: has no secret-key: this is the public file, use the one named .key_secret", path);
	crypto_scalarmult_base(derived, c_r->secret_key);
	if (memcmp(derived, c_r->public_key, sizeof(derived)) != 0)
		return fail(error_r, "%s: public-key does not belong to secret-key", path);
	return 0;
}

/* ---- files ---- */

static int check_secret_file(int fd, const char *path, char **error_r)
{
	struct stat st;

	if (fstat(fd, &st) < 0)
		return fail(error_r, "%s: %s", path, strerror(errno));
	if (!S_ISREG(st.st_mode))
		return fail(error_r, "%s: is not a regular file", path);
	if ((st.st_mode & 07177) != 0)
		return fail(error_r, "%s: mode is %04o, but a secret key must be readable by its owner only. "
			    "If nobody else has read it: chmod 600 %s; otherwise make a new key",
			    path, st.st_mode & 07777, path);
	if (st.st_uid != geteuid() && st.st_uid != 0)
		return fail(error_r, "%s: belongs to user id %ld, but must belong to user id %ld, which reads it",
			    path, (long)st.st_uid, (long)geteuid());
	return 0;
}

static int zcert_read(const char *path, bool secret, struct zcert *c_r, char **error_r)
{
	char *data;
	ssize_t n;
	size_t len = 0;
	int fd, ret = -1;

	memset(c_r, 0, sizeof(*c_r));
	if (sodium_init() < 0)
		return fail(error_r, "libsodium cannot start");
	fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	if (fd < 0)
		return fail(error_r, "%s: cannot read the key: %s", path, strerror(errno));
	data = sodium_malloc(ZCERT_FILE_MAX + 1);
	if (secret)
		c_r->secret_key = sodium_malloc(32);
	if (data == NULL || (secret && c_r->secret_key == NULL)) {
		fail(error_r, "%s: no locked memory for a key: raise the limit (ulimit -l)", path);
	} else if (!secret || check_secret_file(fd, path, error_r) == 0) {
		while ((n = read(fd, data + len, ZCERT_FILE_MAX + 1 - len)) > 0)
			len += (size_t)n;
		if (n < 0) {
			fail(error_r, "%s: cannot read the key: %s", path, strerror(errno));
		} else if (len > ZCERT_FILE_MAX) {
			fail(error_r, "%s: is too large for a key file", path);
		} else {
			data[len] = '\0';
			ret = zcert_parse(data, len, path, secret, c_r, error_r);
		}
	}
	close(fd);
	sodium_free(data);	/* wipes */
	if (ret < 0)
		zcert_free(c_r);
	return ret;
}

int zcert_read_public(const char *path, struct zcert *c_r, char **error_r)
{
	return zcert_read(path, false, c_r, error_r);
}

int zcert_read_secret(const char *path, struct zcert *c_r, char **error_r)
{
	return zcert_read(path, true, c_r, error_r);
}

static bool name_valid(const char *name)
{
	return name[0] != '\0' && name[0] != '.' && name[0] != '-' && strlen(name) < 64 &&
		name[strspn(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")] == '\0';
}

int zcert_generate(struct zcert *c_r, const char *name, char **error_r)
{
	memset(c_r, 0, sizeof(*c_r));
	if (!name_valid(name))
		return fail(error_r, "'%s' is no name for a node: letters, digits, '.', '-' and '_', at most 63, "
			    "and a letter or digit first", name);
	if (sodium_init() < 0)
		return fail(error_r, "libsodium cannot start");
	c_r->secret_key = sodium_malloc(32);
	if (c_r->secret_key == NULL)
		return fail(error_r, "no locked memory for a key: raise the limit (ulimit -l)");
	crypto_box_keypair(c_r->public_key, c_r->secret_key);
	strcpy(c_r->name, name);
	return 0;
}

/* Creates path, which must not exist, with all of data or not at all. */
static int write_new(const char *path, mode_t mode, const char *data, size_t len, char **error_r)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode);
	ssize_t n = -1;

	if (fd < 0 && errno == EEXIST)
		return fail(error_r, "%s: exists already. It was left as it is", path);
	if (fd < 0)
		return fail(error_r, "%s: cannot create the file: %s", path, strerror(errno));
	/* whatever the umask is */
	if (fchmod(fd, mode) == 0 && (n = write(fd, data, len)) == (ssize_t)len && fsync(fd) == 0) {
		close(fd);
		return 0;
	}
	fail(error_r, "%s: cannot write: %s", path, strerror(n >= 0 && n < (ssize_t)len ? ENOSPC : errno));
	close(fd);
	(void)unlink(path);
	return -1;
}

static int sync_dir(const char *dir, char **error_r)
{
	int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	if (fd < 0 || fsync(fd) < 0) {
		fail(error_r, "%s: cannot sync the directory: %s", dir, strerror(errno));
		if (fd >= 0)
			close(fd);
		return -1;
	}
	close(fd);
	return 0;
}

int zcert_write(const struct zcert *c, const char *dir, char **error_r)
{
	char public_z85[41], path[4096], secret_path[4096], text[512];
	char *secret_text;
	int n, ret;

	if ((size_t)snprintf(path, sizeof(path), "%s/%s.key", dir, c->name) >= sizeof(path) ||
	    (size_t)snprintf(secret_path, sizeof(secret_path), "%s/%s.key_secret", dir, c->name) >= sizeof(secret_path))
		return fail(error_r, "%s: path is too long", dir);
	z85_encode_key(c->public_key, public_z85);
	n = snprintf(text, sizeof(text),
		     "# Public key of a dovecot-crdt node, in czmq's certificate format. Give this\n"
		     "# file to the nodes that it talks to.\n"
		     "metadata\n    name = \"%s\"\ncurve\n    public-key = \"%s\"\n", c->name, public_z85);
	secret_text = sodium_malloc(512);
	if (secret_text == NULL)
		return fail(error_r, "no locked memory for a key: raise the limit (ulimit -l)");
	ret = snprintf(secret_text, 512,
		       "# SECRET key of a dovecot-crdt node, in czmq's certificate format. It stays on\n"
		       "# the node, mode 0600.\n"
		       "metadata\n    name = \"%s\"\ncurve\n    public-key = \"%s\"\n    secret-key = \"", c->name, public_z85);
	z85_encode_key(c->secret_key, secret_text + ret);
	strcat(secret_text, "\"\n");
	/* the secret first: a public file alone would look like a finished pair */
	ret = write_new(secret_path, 0600, secret_text, strlen(secret_text), error_r);
	sodium_free(secret_text);
	if (ret == 0 && (ret = write_new(path, 0644, text, (size_t)n, error_r)) < 0)
		(void)unlink(secret_path);	/* made above, and of no use to anyone yet */
	return ret < 0 ? -1 : sync_dir(dir, error_r);
}

void zcert_free(struct zcert *c)
{
	sodium_free(c->secret_key);	/* wipes; NULL is fine */
	sodium_memzero(c, sizeof(*c));
}
