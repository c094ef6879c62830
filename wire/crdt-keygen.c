/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* crdt-keygen: makes the key pair of a node. */
#include "z85.h"
#include "zcert.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>

static const char usage_text[] =
	"usage: crdt-keygen NAME [--dir DIR]\n"
	"Writes DIR/NAME.key (public, give it to the nodes that NAME talks to) and\n"
	"DIR/NAME.key_secret (stays on the node, mode 0600), and prints the public key.\n"
	"  -d, --dir DIR  where to (default: the current directory)\n"
	"  -h, --help\n";

int main(int argc, char *argv[])
{
	static const struct option options[] = {
		{ "dir", required_argument, NULL, 'd' },
		{ "help", no_argument, NULL, 'h' },
		{ NULL, 0, NULL, 0 }
	};
	const char *dir = ".";
	struct zcert cert;
	char z85[41], *error;
	int c;

	while ((c = getopt_long(argc, argv, "d:h", options, NULL)) != -1) {
		if (c == 'h') {
			fputs(usage_text, stdout);
			return EXIT_SUCCESS;
		}
		if (c == '?') {
			fputs(usage_text, stderr);
			return 2;
		}
		dir = optarg;
	}
	if (optind != argc - 1) {
		fputs(usage_text, stderr);
		return 2;
	}
	if (zcert_generate(&cert, argv[optind], &error) < 0 || zcert_write(&cert, dir, &error) < 0) {
		fprintf(stderr, "crdt-keygen: %s\n", error);
		free(error);
		zcert_free(&cert);
		return EXIT_FAILURE;
	}
	z85_encode_key(cert.public_key, z85);
	zcert_free(&cert);
	printf("%s\n", z85);
	return EXIT_SUCCESS;
}
