/* Wakes Triton's dynamic batcher in time; preloaded into tritonserver (serving/wakeup.py, docs/triton.md).
 *
 * With a bound on the queue or a time-out the batcher waits for a free instance on a condition variable with a time-out of
 * 500 ms (WaitForPayloadSlotAvailable in Triton's dynamic_batch_scheduler.cc). An instance that comes to its end notifies
 * it just before it counts as free: a batcher that is quicker to look than the instance is to say so sleeps on beside
 * a free instance, until the next request or for the 500 ms.
 *
 * Its mutex lies on the waiting thread's own stack, where no other thread could notify it in step. Waits with such a mutex
 * are cut to a millisecond here, after which the caller looks again, as after any spurious wake-up; all others are passed on.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <time.h>

enum { LOOK_AGAIN_NS = 1000000, SECOND_NS = 1000000000, FRAME_BYTES = 4096 };

typedef int (*clockwait)(pthread_cond_t *, pthread_mutex_t *, clockid_t, const struct timespec *);

static clockwait libc_clockwait;

__attribute__((constructor)) static void find_libc(void)
{
    libc_clockwait = (clockwait)(intptr_t)dlsym(RTLD_NEXT, "pthread_cond_clockwait");
}

int pthread_cond_clockwait(pthread_cond_t *condition, pthread_mutex_t *mutex, clockid_t clock, const struct timespec *end)
{
    uintptr_t above = (uintptr_t)mutex - (uintptr_t)__builtin_frame_address(0);
    struct timespec soon;
    if (above >= FRAME_BYTES || clock_gettime(clock, &soon) != 0)
        return libc_clockwait(condition, mutex, clock, end);
    soon.tv_nsec += LOOK_AGAIN_NS;
    if (soon.tv_nsec >= SECOND_NS) {
        soon.tv_nsec -= SECOND_NS;
        soon.tv_sec++;
    }
    if (soon.tv_sec > end->tv_sec || (soon.tv_sec == end->tv_sec && soon.tv_nsec >= end->tv_nsec))
        return libc_clockwait(condition, mutex, clock, end);
    int status = libc_clockwait(condition, mutex, clock, &soon);
    return status == ETIMEDOUT ? 0 : status;
}
