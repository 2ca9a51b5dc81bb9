/* Threads that stay: they wait for units of work, spinning for a moment, then asleep. Whoever is free takes the next unit, so
 * a thread that a neighbour holds up delays one unit and not half of the work. The caller works too, and waits only
 * for threads that have begun. */

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>

#define MOST_THREADS 64
#define SPIN_NS 100000 /* the dense parts of a layer lie between two calls: 20 to 200 us */

static struct {
    pthread_mutex_t caller, sleep;
    pthread_cond_t wake;
    _Atomic uint64_t gate; /* epoch << 16 | OPEN | threads that have begun */
    _Atomic long next, ended;
    _Atomic int asleep;
    int started, helpers;
    long units;
    void (*work)(void *, long);
    void *context;
} pool = {.caller = PTHREAD_MUTEX_INITIALIZER, .sleep = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

#define OPEN 0x8000u
#define BEGUN 0x7fffu

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

INLINE void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static uint64_t next_epoch(uint64_t seen)
{
    int64_t until = now_ns() + SPIN_NS;
    uint64_t gate;
    for (unsigned spins = 0;; spins++) {
        gate = atomic_load_explicit(&pool.gate, memory_order_acquire);
        if (gate >> 16 != seen) return gate;
        relax();
        if (spins % 64 == 63 && now_ns() > until) break;
    }
    pthread_mutex_lock(&pool.sleep);
    atomic_fetch_add(&pool.asleep, 1);
    while ((gate = atomic_load(&pool.gate)) >> 16 == seen) pthread_cond_wait(&pool.wake, &pool.sleep);
    atomic_fetch_sub(&pool.asleep, 1);
    pthread_mutex_unlock(&pool.sleep);
    return gate;
}

static void *help(void *unused)
{
    uint64_t seen = 0;
    for (;;) {
        uint64_t gate = next_epoch(seen);
        seen = gate >> 16;
        for (;;) {
            if (!(gate & OPEN) || gate >> 16 != seen || (int)(gate & BEGUN) >= pool.helpers) break;
            if (atomic_compare_exchange_weak(&pool.gate, &gate, gate + 1)) {
                long unit;
                while ((unit = atomic_fetch_add(&pool.next, 1)) < pool.units) pool.work(pool.context, unit);
                atomic_fetch_add_explicit(&pool.ended, 1, memory_order_release);
                break;
            }
        }
    }
    return unused;
}

static void forget_threads(void) /* in a forked child there are none */
{
    pthread_mutex_init(&pool.caller, 0);
    pthread_mutex_init(&pool.sleep, 0);
    pthread_cond_init(&pool.wake, 0);
    pool.started = 0;
    atomic_store(&pool.asleep, 0);
}

static void start_threads(int wanted)
{
    static int watched;
    if (!watched) watched = !pthread_atfork(0, 0, forget_threads);
    while (pool.started < wanted) {
        pthread_t thread;
        pthread_attr_t attributes;
        pthread_attr_init(&attributes);
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        int failed = pthread_create(&thread, &attributes, help, 0);
        pthread_attr_destroy(&attributes);
        if (failed) return; /* fewer threads do the same work */
        pool.started++;
    }
}

/* Do work(context, 0 .. units - 1) on up to `threads` threads. Of two callers at once the second works alone. */
static void spread(int threads, long units, void (*work)(void *, long), void *context)
{
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    if (threads > units) threads = (int)units;
    if (threads < 2 || pthread_mutex_trylock(&pool.caller)) {
        for (long unit = 0; unit < units; unit++) work(context, unit);
        return;
    }
    start_threads(threads - 1);
    pool.work = work;
    pool.context = context;
    pool.units = units;
    pool.helpers = threads - 1;
    atomic_store(&pool.next, 0);
    atomic_store(&pool.ended, 0);
    uint64_t epoch = (atomic_load(&pool.gate) >> 16) + 1;
    atomic_store(&pool.gate, epoch << 16 | OPEN);
    if (atomic_load(&pool.asleep)) {
        pthread_mutex_lock(&pool.sleep);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.sleep);
    }
    long unit;
    while ((unit = atomic_fetch_add(&pool.next, 1)) < units) work(context, unit);
    long begun = (long)(atomic_fetch_and(&pool.gate, ~(uint64_t)OPEN) & BEGUN);
    for (unsigned spins = 0; atomic_load_explicit(&pool.ended, memory_order_acquire) < begun; spins++) {
        relax();
        if (spins > 2000) sched_yield();
    }
    pthread_mutex_unlock(&pool.caller);
}
