/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_WORKER_SERVICE_H
#define CRDT_WORKER_SERVICE_H
/* The storage service of this process; see crdt-worker.c. */
extern struct mail_storage_service_ctx *worker_storage_service;
#endif
