/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef CRDT_WORKER_H
#define CRDT_WORKER_H
/*
 * Inside crdt-worker: one process, one connection, one user at a time, with
 * that user's privileges.  Dovecot's memory dialect (pools, data stack), but
 * for what the journal and the codecs own.
 *
 *  crdt-worker.c        main: wiring
 *  worker-connection.c  messages in and out, requests to the functions below
 *  worker-user.c        user, settings, names of mailboxes, opening them
 *  worker-mail.c        reading mails: GUIDs, texts, digests
 *  worker-journal.c     read, trim
 *  worker-compare.c     finding changes that have no record
 *  worker-measure.c     how much mail there is
 *  apply-intent.c       what a killed applier leaves
 *  apply-txn.c          transactions: index header, UIDs, journal records, locks
 *  apply-mails.c        SAVE, MOVE, FLAGS, EXPUNGE
 *  apply-mailbox.c      create, remove, subscribe
 *  apply-rename.c       rename
 *  apply-revalidate.c   a new UIDVALIDITY; apply-dbox.c: on sdbox and mdbox
 *
 * Functions that return enum ms_result set *error_r (data stack, or static)
 * unless it is MS_OK.
 */
#include "lib.h"
#include "array.h"
#include "str.h"
#include "mail-storage-private.h"
#include "mail-facts.h"
#include "mailbox-list-iter.h"
#include "worker-proto.h"

#include <sys/stat.h>

struct worker_conn;
struct worker_body;

/* An open mailbox, and what the file system said of it then. */
struct worker_box {
	struct mailbox *box;		/* NULL: none */
	struct crdt_id guid;
	struct stat st;
};

struct worker_user {
	pool_t pool;
	struct mail_storage_service_user *service_user;
	struct mail_user *user;
	struct mail_namespace *ns;	/* INBOX's: the one that is replicated */
	struct event *event;

	struct crdt_journal_ident ident;
	const char *state_dir, *control_dir;
	bool observe;			/* crdt_mode */
	bool outdated;			/* the name has passed to another generation meanwhile */
	struct crdt_journal *journal;	/* NULL: not opened yet */
	crdt_origin alone;		/* while it is this one no journal that was set aside is beside it */
	int lock_fd;			/* locked file, -1: none */
	const char *lock_path;

	/* What a sync finds below this UID is known (apply-revalidate.c); 0: nothing. */
	uint32_t known_below;
	/* Also open mailboxes whose removal was begun (apply_remove()). */
	bool open_deleted;
	/* The mailbox of the last request, and the one that it copied from. */
	struct worker_box box, source;
	struct worker_body *body;	/* mail in `box` that was read last */
};

/* worker-user.c */

void worker_users_init(void);

/* Sends the NAMEs of all users. */
int worker_users(struct worker_conn *conn, const char **error_r);
/* MS_GONE: no such user, or not one of ours (crdt_mode = off).  MS_GENERATION: his
 * mail store is not of generation *gen, but of what is then there. */
int worker_user_init(const char *name, uint32_t *gen, struct worker_user **user_r, const char **error_r);
void worker_user_deinit(struct worker_user **user);
/* Whether its mailboxes are replicated. */
bool worker_ns_is_recorded(struct worker_user *user, const struct mail_namespace *ns);
/* The mailbox that has this path in records (plugin/crdt-path.c). */
int worker_box_alloc(struct worker_user *user, const struct crdt_str *path,
		     struct mailbox **box_r, const char **error_r);
/* Asks the mail store, not Dovecot's list index.  MS_OK: it exists; MS_GONE: no, or it is
 * an INBOX that opening would make. */
int worker_box_exists(struct mailbox *box, const char **error_r);
/* MS_OK: at least a part of it is there, as a kill may leave it; MS_GONE: nothing. */
int worker_box_begun(struct mailbox *box, const char **error_r);
/* Opens and syncs; the box belongs to wbox, which is user->box or user->source,
 * until another is opened there.  MS_RETRY: its UIDVALIDITY is another one (0 in
 * box: any). */
int worker_box_open(struct worker_user *user, struct worker_box *wbox, const struct ms_mailbox *box,
		    struct mailbox **box_r, const char **error_r);
/* The same for whatever mailbox is at path.  MS_GONE: none. */
int worker_box_open_at(struct worker_user *user, struct worker_box *wbox, const struct crdt_str *path,
		       struct mailbox **box_r, const char **error_r);
/*
 * While its list is locked no session renames or removes the mailbox.  Whatever may
 * lock Maildir's uidlist needs that, reading a mail too (Dovecot syncs when a session
 * has just renamed its file): the dotlock would go along with the renamed directory,
 * for sessions to wait for until it is stale, and what we wrote would be lost.  Before
 * the uidlist in the order of locks; nests.  MS_TEMP: it has been renamed or removed.
 */
int worker_box_lock(struct worker_box *wbox, const char **error_r);
void worker_box_unlock(struct worker_box *wbox);
/* Its directory is still the one that was opened: it may have been renamed, and
 * another one have its name.  After a "not found": FALSE if that may be why. */
bool worker_box_in_place(struct worker_box *wbox);
/* mailbox_sync() with that lock. */
int worker_box_sync(struct worker_box *wbox, enum mailbox_sync_flags flags, const char **error_r);
void worker_box_close(struct worker_user *user, struct worker_box *wbox);
void worker_boxes_close(struct worker_user *user);
/* All mailboxes: iterate with these flags, and leave aliases out (symbolic links to others). */
enum mailbox_list_iter_flags worker_list_flags(struct mailbox_list *list);
bool worker_is_alias(struct mailbox_list *list, const char *vname);
int worker_list_lock(struct mailbox_list *list, const char **error_r);
/* crdt_path(), or NULL and an error. */
const char *worker_box_path(struct mailbox *box, const char **error_r);
/* What the last error of this mailbox means. */
int worker_box_error(struct mailbox *box, const char *what, const char **error_r);
/* Before a request: the mail store has not passed to another generation since HELLO. */
int worker_user_check(struct worker_user *user, const char **error_r);
/* The current journal.  MS_GONE: there is none and create is FALSE. */
int worker_journal_get(struct worker_user *user, bool create, const char **error_r);
/* crdt_journal_lock(), but not of another generation's: what is to be written would be
 * taken for the new user's.  MS_OK or MS_TEMP. */
int worker_journal_lock(struct worker_user *user, const char **error_r);
/* One process at a time changes a user's mailboxes; waits some time.  What a
 * killed one left is put in order then. */
int worker_user_lock(struct worker_user *user, const char **error_r);
/* The same if a killed one has left something. */
int worker_user_recover(struct worker_user *user, const char **error_r);
void worker_user_unlock(struct worker_user *user);

static inline struct crdt_str worker_str(const char *s)
{
	size_t n = strlen(s);

	i_assert(n <= UINT16_MAX);
	return (struct crdt_str){ (const uint8_t *)s, (uint16_t)n };
}
static inline const char *worker_cstr(const struct crdt_str *s)	/* data stack */
{
	return s->n == 0 ? "" : t_strndup(s->p, s->n);
}
static inline uint32_t worker_uidvalidity(struct mailbox *box)
{
	return mail_index_get_header(box->view)->uid_validity;
}

/* worker-mail.c (and mail-facts.h) */

/* mail_set_uid(), but a UID that is not there leaves no trace in `mail` (Dovecot's
 * would leave the next one that is there marked as expunged). */
bool worker_mail_find(struct mail *mail, uint32_t uid);
int worker_body(struct worker_conn *conn, struct worker_user *user, const struct worker_msg *req,
		const char **error_r);
void worker_body_free(struct worker_body **body);
int worker_list(struct worker_conn *conn, struct worker_user *user, const struct worker_msg *req,
		const char **error_r);

/* worker-journal.c */

int worker_read(struct worker_conn *conn, struct worker_user *user, const struct worker_msg *req,
		bool *more_r, const char **error_r);
int worker_trim(struct worker_user *user, const struct ms_position *pos, const char **error_r);
int worker_complete(struct worker_user *user, const char **error_r);
int worker_set_seen(struct worker_user *user, const struct worker_msg *req, const char **error_r);
/* Appends applier records, making the marker of the user first if need be. The
 * caller has the journal's lock. */
int worker_journal_append(struct worker_user *user, struct crdt_jrec *recs, size_t n,
			  const char **error_r);
/* The same for records that belong to no index transaction, with locking. */
int worker_journal_add(struct worker_user *user, struct crdt_jrec *recs, size_t n,
		       const char **error_r);
/* MS_RETRY: the journal has records of others about this mailbox beyond known. */
int worker_journal_unchanged(struct worker_user *user, const struct crdt_id *mailbox,
			     const struct ms_position *known, const char **error_r);

/* worker-compare.c: looking for what has no record (mailstore.h) */

int worker_survey(struct worker_conn *conn, struct worker_user *user, const char **error_r);
/* All mailboxes that are replicated, not opened, with their paths; or all subscriptions. */
typedef void worker_box_cb(void *ctx, struct mailbox *box, const char *path);
int worker_boxes_each(struct worker_conn *conn, struct worker_user *user, bool subscriptions,
		      worker_box_cb *cb, void *ctx, const char **error_r);
/* From times and sizes of its files: an equal one, and nothing was changed. */
uint64_t worker_box_print(struct mailbox *box);
int worker_check(struct worker_conn *conn, struct worker_user *user, const struct worker_msg *req,
		 const char **error_r);
int worker_look(struct worker_conn *conn, struct worker_user *user, const struct worker_msg *req,
		const char **error_r);
int worker_note(struct worker_conn *conn, struct worker_user *user, const struct worker_msg *req,
		const char **error_r);
int worker_note_subscription(struct worker_user *user, const struct worker_msg *req, const char **error_r);

/* worker-measure.c */

int worker_measure(struct worker_conn *conn, struct worker_user *user, const struct worker_msg *req,
		   const char **error_r);

/* worker-connection.c */

void worker_conn_create(int fd);
void worker_conns_destroy(void);
/* Sends with the next flush; errors are sticky and end the connection when the
 * request is done. */
void worker_send(struct worker_conn *conn, const struct worker_msg *msg);
bool worker_conn_failed(const struct worker_conn *conn);
/* To be called between the mails of long work. */
void worker_alive(struct worker_conn *conn);
/*
 * Asks the client for the text of command i.  MS_OK: *input_r has it, of this size
 * and content; *odd_r: it has CR CR LF somewhere.  MS_GONE: the client has not
 * got it, or it is damaged.  MS_TEMP.
 */
int worker_want_text(struct worker_conn *conn, struct worker_user *user, unsigned i,
		     const struct ms_cmd *cmd, struct istream **input_r, bool *odd_r,
		     const char **error_r);

/* apply-*.c: the one place that writes mailboxes */

int apply_cmds(struct worker_conn *conn, struct worker_user *user, struct ms_apply *a,
	       const char **error_r);
/* After a kill: what req has begun is finished and recorded. */
int apply_create_recover(struct worker_user *user, const struct worker_msg *req, const char **error_r);
int apply_create(struct worker_user *user, const struct worker_msg *req,
		 struct ms_mailbox *made_r, bool *existed_r, const char **error_r);
int apply_remove(struct worker_user *user, const struct worker_msg *req, const char **error_r);
int apply_rename(struct worker_user *user, const struct worker_msg *req, const char **error_r);
/* After a kill: the same. */
int apply_rename_recover(struct worker_user *user, const struct worker_msg *req, const char **error_r);
/* A mailbox has left path: what apply_rename() made for it to be in goes, if it is empty. */
void apply_part_clean(struct worker_user *user, const struct crdt_str *path);
int apply_subscribe(struct worker_user *user, const struct worker_msg *req, const char **error_r);
int apply_revalidate(struct worker_conn *conn, struct worker_user *user, const struct worker_msg *req,
		     const struct ms_reuid *map, size_t map_n, const char **error_r);
/* Tells the engine of a UIDVALIDITY that it does not expect. */
int apply_revalidate_tell(struct worker_conn *conn, struct worker_user *user, struct mailbox *box,
			  const char **error_r);
/* After a kill: mails below uidnext. */
int apply_revalidate_recover(struct worker_user *user, struct mailbox *box, uint32_t uidnext,
			     const char **error_r);
void apply_init(void);
void apply_deinit(void);
#endif
