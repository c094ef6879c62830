/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Preloaded: another time of day, by as many seconds as the file that CRDT_TEST_CLOCK
 * names says (an int64_t, which may change at any moment).  The monotonic clock and the
 * times of files are left alone, as they are when a clock is set.
 *
 * (libfaketime shifts files' times, too, by more than the clock for some calls.)
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const int64_t none;
static const volatile int64_t *offset = &none;

/* Before a login process changes its root directory. */
__attribute__((constructor)) static void init(void)
{
	const char *path = getenv("CRDT_TEST_CLOCK");
	int fd = path == NULL ? -1 : open(path, O_RDONLY | O_CLOEXEC);
	void *p;

	if (fd < 0)
		return;
	p = mmap(NULL, sizeof(*offset), PROT_READ, MAP_SHARED, fd, 0);
	if (p != MAP_FAILED)
		offset = p;
	close(fd);
}

int clock_gettime(clockid_t clock, struct timespec *ts)
{
	int ret = (int)syscall(SYS_clock_gettime, clock, ts);

	if (ret == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
		ts->tv_sec += *offset;
	return ret;
}

time_t time(time_t *t)
{
	struct timespec ts;

	(void)clock_gettime(CLOCK_REALTIME, &ts);
	if (t != NULL)
		*t = ts.tv_sec;
	return ts.tv_sec;
}

int gettimeofday(struct timeval *restrict tv, void *restrict tz)
{
	struct timespec ts;
	int ret = clock_gettime(CLOCK_REALTIME, &ts);

	(void)tz;
	tv->tv_sec = ts.tv_sec;
	tv->tv_usec = ts.tv_nsec / 1000;
	return ret;
}

/* A time that somebody made from these.  (A monotonic one is small.) */
static struct timespec real(const struct timespec *abstime)
{
	struct timespec ts = *abstime;

	if (ts.tv_sec > 1000000000)
		ts.tv_sec -= *offset;
	return ts;
}

int pthread_cond_timedwait(pthread_cond_t *restrict cond, pthread_mutex_t *restrict mutex,
			   const struct timespec *restrict abstime)
{
	static int (*next)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
	struct timespec ts = real(abstime);

	if (next == NULL)
		next = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
	if (next == NULL)
		next = dlsym(RTLD_NEXT, "pthread_cond_timedwait");
	return next(cond, mutex, &ts);
}

int pthread_timedjoin_np(pthread_t thread, void **result, const struct timespec *abstime)
{
	static int (*next)(pthread_t, void **, const struct timespec *);
	struct timespec ts = real(abstime);

	if (next == NULL)
		next = dlsym(RTLD_NEXT, "pthread_timedjoin_np");
	return next(thread, result, &ts);
}
