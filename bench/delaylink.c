/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A long line between two network namespaces: every packet arrives a fixed time
 * after it was sent.  Not every kernel has netem; tun is nearly everywhere.
 *
 * usage: delaylink NETNS_A DEVICE_A NETNS_B DEVICE_B MILLISECONDS
 *
 * Makes a TAP device in each namespace, stays in NETNS_A and says "ready".
 * Addresses and bridges are others' work (scripts/lib/crdtcluster/netns.py).  Runs
 * until it is killed; the devices go with it.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

/* An Ethernet frame of a device with the usual MTU; no offloading, so no larger ones. */
#define FRAME_MAX 2048
/* 16 MB for each direction: more than 2 Gbit/s for 60 ms.  Beyond it packets are
 * lost, as at any router. */
#define QUEUE_MAX 8192
/* Read at once, before others' due time is looked at again. */
#define BURST 64

struct packet {
	uint64_t due;			/* CLOCK_MONOTONIC, nanoseconds */
	size_t n;
	uint8_t frame[FRAME_MAX];
};

struct direction {
	int in, out;
	uint64_t delay;
	unsigned int head, tail;	/* count up for ever; next to fill, next to send */
	struct packet *queue;
};

static void die(const char *what)
{
	fprintf(stderr, "delaylink: %s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static void netns_enter(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0 || setns(fd, CLONE_NEWNET) < 0)
		die(path);
	close(fd);
}

/* The process is in that namespace afterwards. */
static int device_open(const char *netns, const char *name)
{
	struct ifreq ifr = { .ifr_flags = IFF_TAP | IFF_NO_PI };
	char path[128];
	int fd;

	snprintf(path, sizeof(path), "/run/netns/%s", netns);
	netns_enter(path);
	fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
	if (fd < 0)
		die("/dev/net/tun");
	if (strlen(name) >= sizeof(ifr.ifr_name)) {
		errno = ENAMETOOLONG;
		die(name);
	}
	memcpy(ifr.ifr_name, name, strlen(name));
	if (ioctl(fd, TUNSETIFF, &ifr) < 0)
		die(name);
	return fd;
}

static void take_in(struct direction *d)
{
	uint8_t lost[FRAME_MAX];
	unsigned int i;

	for (i = 0; i < BURST; i++) {
		struct packet *p = &d->queue[d->head % QUEUE_MAX];
		bool full = d->head - d->tail == QUEUE_MAX;
		ssize_t n = read(d->in, full ? lost : p->frame, FRAME_MAX);

		if (n <= 0)
			return;
		if (full)
			continue;
		p->due = now() + d->delay;
		p->n = (size_t)n;
		d->head++;
	}
}

/* What cannot be written is lost: the device is down, or its other end is. */
static void send_due(struct direction *d)
{
	for (; d->tail != d->head; d->tail++) {
		const struct packet *p = &d->queue[d->tail % QUEUE_MAX];

		if (p->due > now())
			return;
		if (write(d->out, p->frame, p->n) < 0 && errno == EBADFD)
			die("a device is gone");
	}
}

static void timer_set(int timer, uint64_t when)
{
	struct itimerspec it = {
		.it_value = { (time_t)(when / 1000000000), (long)(when % 1000000000) },
	};

	if (timerfd_settime(timer, TFD_TIMER_ABSTIME, &it, NULL) < 0)
		die("timerfd_settime");
}

static void *direction_run(void *arg)
{
	struct direction *d = arg;
	struct pollfd fds[2] = {
		{ .fd = d->in, .events = POLLIN },
		{ .fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC), .events = POLLIN },
	};
	uint64_t expired;

	if (fds[1].fd < 0)
		die("timerfd_create");
	/* the default of 50 us would be seen in a delay of a few ms */
	prctl(PR_SET_TIMERSLACK, 1000);
	for (;;) {
		send_due(d);
		if (d->tail != d->head)
			timer_set(fds[1].fd, d->queue[d->tail % QUEUE_MAX].due);
		if (poll(fds, 2, -1) < 0 && errno != EINTR)
			die("poll");
		if ((fds[1].revents & POLLIN) != 0 && read(fds[1].fd, &expired, sizeof(expired)) < 0 &&
		    errno != EAGAIN)
			die("timer");
		if (fds[0].revents != 0)
			take_in(d);
	}
	return NULL;
}

static void direction_init(struct direction *d, int in, int out, double ms)
{
	d->in = in;
	d->out = out;
	d->delay = (uint64_t)(ms * 1e6);
	d->queue = calloc(QUEUE_MAX, sizeof(*d->queue));
	if (d->queue == NULL)
		die("memory");
}

int main(int argc, char **argv)
{
	struct direction there = { 0 }, back = { 0 };
	pthread_t thread;
	double ms;
	char *end;
	int a, b;

	if (argc != 6 || (ms = strtod(argv[5], &end)) < 0 || ms > 10000 || end == argv[5] || *end != '\0') {
		fprintf(stderr, "usage: delaylink NETNS_A DEVICE_A NETNS_B DEVICE_B MILLISECONDS\n");
		return 2;
	}
	/* A in the end: who kills the node in B does not mean the line */
	b = device_open(argv[3], argv[4]);
	a = device_open(argv[1], argv[2]);
	direction_init(&there, a, b, ms);
	direction_init(&back, b, a, ms);
	/* What waits for a packet must not make it late. */
	if (setpriority(PRIO_PROCESS, 0, -10) < 0)
		die("setpriority");
	printf("ready\n");
	fflush(stdout);
	errno = pthread_create(&thread, NULL, direction_run, &back);
	if (errno != 0)
		die("pthread_create");
	direction_run(&there);
	return 0;
}
