/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "scheduler.h"
#include "xalloc.h"

#include <assert.h>

#define LOW_TURN 8	/* every so many visits something not urgent goes first */

struct scheduler {
	struct { struct sched_item *head, *tail; } queue[SCHED_URGENCIES];
	size_t queued;
	unsigned turn;
	/* binary heap by due; heap[i].timer == i + 1 */
	struct sched_item **heap;
	size_t heap_n, heap_cap;
};

struct scheduler *sched_new(void)
{
	return xcalloc(1, sizeof(struct scheduler));
}

void sched_free(struct scheduler **s)
{
	if (*s == NULL)
		return;
	free((*s)->heap);
	free(*s);
	*s = NULL;
}

/* ---- timers ---- */

static void heap_set(struct scheduler *s, size_t i, struct sched_item *it)
{
	s->heap[i] = it;
	it->timer = i + 1;
}

static void heap_up(struct scheduler *s, size_t i)
{
	struct sched_item *it = s->heap[i];

	for (; i > 0 && s->heap[(i - 1) / 2]->due > it->due; i = (i - 1) / 2)
		heap_set(s, i, s->heap[(i - 1) / 2]);
	heap_set(s, i, it);
}

static void heap_down(struct scheduler *s, size_t i)
{
	struct sched_item *it = s->heap[i];

	for (;;) {
		size_t child = 2 * i + 1;

		if (child + 1 < s->heap_n && s->heap[child + 1]->due < s->heap[child]->due)
			child++;
		if (child >= s->heap_n || s->heap[child]->due >= it->due)
			break;
		heap_set(s, i, s->heap[child]);
		i = child;
	}
	heap_set(s, i, it);
}

static void heap_remove(struct scheduler *s, struct sched_item *it)
{
	size_t i = it->timer;
	struct sched_item *last;

	if (i == 0)
		return;
	i--;
	it->timer = 0;
	last = s->heap[--s->heap_n];
	if (last == it)
		return;
	heap_set(s, i, last);
	heap_up(s, i);
	heap_down(s, last->timer - 1);
}

void sched_wake_at(struct scheduler *s, struct sched_item *it, int64_t due)
{
	if (it->timer != 0) {
		if (due < it->due) {
			it->due = due;
			heap_up(s, it->timer - 1);
		}
		return;
	}
	if (s->heap_n == s->heap_cap) {
		s->heap_cap = s->heap_cap == 0 ? 64 : s->heap_cap * 2;
		s->heap = xrealloc(s->heap, s->heap_cap * sizeof(*s->heap));
	}
	it->due = due;
	heap_set(s, s->heap_n++, it);
	heap_up(s, s->heap_n - 1);
}

int64_t sched_due(const struct scheduler *s)
{
	return s->heap_n == 0 ? INT64_MAX : s->heap[0]->due;
}

/* ---- queues ---- */

static void dequeue(struct scheduler *s, struct sched_item *it)
{
	if (it->prev != NULL)
		it->prev->next = it->next;
	else
		s->queue[it->urgency].head = it->next;
	if (it->next != NULL)
		it->next->prev = it->prev;
	else
		s->queue[it->urgency].tail = it->prev;
	it->prev = it->next = NULL;
	s->queued--;
}

static void enqueue(struct scheduler *s, struct sched_item *it, enum sched_urgency urgency)
{
	it->state = SCHED_QUEUED;
	it->urgency = urgency;
	it->prev = s->queue[urgency].tail;
	it->next = NULL;
	if (it->prev != NULL)
		it->prev->next = it;
	else
		s->queue[urgency].head = it;
	s->queue[urgency].tail = it;
	s->queued++;
}

void sched_wake(struct scheduler *s, struct sched_item *it, enum sched_urgency urgency)
{
	switch (it->state) {
	case SCHED_IDLE:
		enqueue(s, it, urgency);
		break;
	case SCHED_QUEUED:
		if (urgency < it->urgency) {
			dequeue(s, it);
			enqueue(s, it, urgency);
		}
		break;
	case SCHED_RUNNING:
		if (!it->again || urgency < it->again_urgency)
			it->again_urgency = urgency;
		it->again = true;
		break;
	}
}

static void fire_timers(struct scheduler *s, int64_t now)
{
	while (s->heap_n > 0 && s->heap[0]->due <= now) {
		struct sched_item *it = s->heap[0];

		heap_remove(s, it);
		sched_wake(s, it, SCHED_NOW);
	}
}

struct sched_item *sched_next(struct scheduler *s, int64_t now)
{
	enum sched_urgency first = SCHED_NOW;
	struct sched_item *it;

	fire_timers(s, now);
	if (++s->turn % LOW_TURN == 0)
		first = SCHED_LOW;
	it = s->queue[first].head;
	if (it == NULL)
		it = s->queue[first == SCHED_NOW ? SCHED_LOW : SCHED_NOW].head;
	if (it == NULL)
		return NULL;
	dequeue(s, it);
	it->state = SCHED_RUNNING;
	return it;
}

void sched_done(struct scheduler *s, struct sched_item *it)
{
	assert(it->state == SCHED_RUNNING);
	it->state = SCHED_IDLE;
	if (it->again) {
		it->again = false;
		enqueue(s, it, it->again_urgency);
	}
}

void sched_remove(struct scheduler *s, struct sched_item *it)
{
	assert(it->state != SCHED_RUNNING);
	heap_remove(s, it);
	if (it->state == SCHED_QUEUED)
		dequeue(s, it);
	it->state = SCHED_IDLE;
}

size_t sched_queued(const struct scheduler *s)
{
	return s->queued;
}

int64_t sched_backoff(unsigned failures)
{
	int64_t delay = SCHED_BACKOFF_MIN_MSECS;

	while (failures-- > 1 && delay < SCHED_BACKOFF_MAX_MSECS)
		delay *= 2;
	return delay < SCHED_BACKOFF_MAX_MSECS ? delay : SCHED_BACKOFF_MAX_MSECS;
}
