/* A small persistent thread pool: workers spin for some microseconds between ops of one forward pass, then sleep.
 *
 * A job is open from its publication until the caller finds no task left. A worker joins an open job under the lock and
 * leaves under the lock; the caller closes the job and waits for those who joined, so one that the system has not
 * scheduled yet delays nobody. */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "robuq.h"

enum { MAX_WORKERS = 255, SPINS = 4000 };

static struct {
    pthread_mutex_t turn;  /* held by the caller of a job from start to end */
    pthread_mutex_t lock;  /* guards what follows */
    pthread_cond_t wake, left;
    int workers;           /* threads started */
    int wanted;            /* workers invited to the job */
    int open;
    task_function *function;
    const void *job;
    int64_t tasks;
    atomic_uint generation; /* one more for each job; read without the lock while spinning */
    atomic_int joined;
    atomic_llong next;      /* task to take */
    char *scratch[MAX_WORKERS + 1]; /* the caller's is the last */
    size_t scratch_bytes[MAX_WORKERS + 1];
} pool = {
    .turn = PTHREAD_MUTEX_INITIALIZER,
    .lock = PTHREAD_MUTEX_INITIALIZER,
    .wake = PTHREAD_COND_INITIALIZER,
    .left = PTHREAD_COND_INITIALIZER,
};

static void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void work(task_function *function, const void *job, int64_t tasks, char *scratch) {
    for (;;) {
        int64_t task = atomic_fetch_add_explicit(&pool.next, 1, memory_order_relaxed);
        if (task >= tasks) return;
        function(job, task, scratch);
    }
}

static void *worker(void *argument) {
    const int id = (int)(intptr_t)argument;
    unsigned seen = 0;
    for (;;) {
        for (int i = 0; i < SPINS && atomic_load(&pool.generation) == seen; i++) pause_briefly();
        pthread_mutex_lock(&pool.lock);
        while (atomic_load(&pool.generation) == seen) pthread_cond_wait(&pool.wake, &pool.lock);
        seen = atomic_load(&pool.generation);
        if (!pool.open || id >= pool.wanted) {
            pthread_mutex_unlock(&pool.lock);
            continue;
        }
        atomic_fetch_add(&pool.joined, 1);
        task_function *function = pool.function;
        const void *job = pool.job;
        const int64_t tasks = pool.tasks;
        pthread_mutex_unlock(&pool.lock);

        work(function, job, tasks, pool.scratch[id]);

        pthread_mutex_lock(&pool.lock);
        if (atomic_fetch_sub(&pool.joined, 1) == 1) pthread_cond_signal(&pool.left);
        pthread_mutex_unlock(&pool.lock);
    }
    return NULL;
}

/* Starts workers until there are `wanted`, as far as the system allows; signals stay with the program's own threads. */
static int start_workers(int wanted) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (pool.workers < wanted) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, worker, (void *)(intptr_t)pool.workers)) break;
        pthread_detach(thread);
        pool.workers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return (int)min64(wanted, pool.workers);
}

static int reserve(int slot, size_t bytes) {
    if (pool.scratch_bytes[slot] >= bytes) return 0;
    free(pool.scratch[slot]);
    pool.scratch_bytes[slot] = 0;
    pool.scratch[slot] = aligned_alloc(ALIGNMENT, (size_t)round_up((int64_t)bytes, ALIGNMENT));
    if (!pool.scratch[slot]) return -1;
    pool.scratch_bytes[slot] = bytes;
    return 0;
}

int pool_run(int threads, int64_t tasks, size_t scratch_bytes, task_function *function, const void *job) {
    if (tasks <= 0) return 0;
    pthread_mutex_lock(&pool.turn);
    int helpers = (int)max64(min64(min64(threads, tasks) - 1, MAX_WORKERS), 0);
    if (helpers > pool.workers) helpers = start_workers(helpers);
    int failed = reserve(MAX_WORKERS, scratch_bytes);
    for (int id = 0; id < helpers && !failed; id++) failed = reserve(id, scratch_bytes);
    if (!failed) {
        atomic_store(&pool.next, 0);
        if (helpers) {
            pthread_mutex_lock(&pool.lock);
            pool.function = function;
            pool.job = job;
            pool.tasks = tasks;
            pool.wanted = helpers;
            pool.open = 1;
            atomic_fetch_add(&pool.generation, 1);
            pthread_cond_broadcast(&pool.wake);
            pthread_mutex_unlock(&pool.lock);
        }
        work(function, job, tasks, pool.scratch[MAX_WORKERS]);
        if (helpers) {
            pthread_mutex_lock(&pool.lock);
            pool.open = 0;
            pthread_mutex_unlock(&pool.lock);
            for (int i = 0; i < SPINS && atomic_load(&pool.joined); i++) pause_briefly();
            pthread_mutex_lock(&pool.lock);
            while (atomic_load(&pool.joined)) pthread_cond_wait(&pool.left, &pool.lock);
            pthread_mutex_unlock(&pool.lock);
        }
    }
    pthread_mutex_unlock(&pool.turn);
    return failed;
}
