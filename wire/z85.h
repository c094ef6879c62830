/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_Z85_H
#define CRDT_Z85_H
/* Z85 (ZeroMQ RFC 32) of a 32-byte key: 40 printable characters. */
#include <stdbool.h>
#include <stdint.h>

void z85_encode_key(const uint8_t key[32], char out[41]);
/* false: not exactly 40 characters of the alphabet, or a group above 2^32. */
bool z85_decode_key(const char *s, uint8_t key_r[32]);
#endif
