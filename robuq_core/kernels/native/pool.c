/* A small persistent thread pool, one for each backend object: workers spin for some microseconds between the ops of a
 * forward pass, then sleep.
 *
 * A job is open from its publication until the caller finds no task left. A worker joins an open job under the lock and
 * leaves under the lock; the caller closes the job and waits for those who joined, so one that the system has not
 * scheduled yet delays nobody. Workers start with the first job that wants them.
 *
 * fork() takes the workers away but not the memory. Every pool is therefore on a list, and the child forgets its
 * workers: its next job starts new ones. */
#define _GNU_SOURCE /* affinity of threads */
#include <pthread.h>
#if defined(__linux__)
#include <sched.h>
#endif
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "robuq.h"

enum { SPINS = 4000 };

struct scratch {
    char *memory;
    size_t bytes;
};

struct pool {
    struct pool *next_pool, *previous_pool;
    pthread_mutex_t turn;   /* from pool_begin() to pool_end() */
    pthread_mutex_t lock;   /* guards what follows */
    pthread_cond_t wake, left;
    int threads;            /* the most that work on a job, the caller among them */
    int workers;            /* threads started */
    int avoided;            /* the processor that workers keep off, the caller's; -1: none yet */
    int wanted;             /* workers invited to the job */
    int open, stopping;
    task_function *function;
    const void *job;
    int64_t tasks;
    atomic_uint generation; /* one more for each job; read without the lock while spinning */
    atomic_int joined;
    atomic_llong next;      /* task to take */
    pthread_t ids[MAX_THREADS];
    struct scratch scratch[MAX_THREADS]; /* of worker 0, 1, ..; the caller's is the last */
    struct scratch shared;  /* the caller's, between jobs */
};

struct worker {
    struct pool *pool;
    int id;
};

static struct pool *pools;
static pthread_mutex_t pools_lock = PTHREAD_MUTEX_INITIALIZER;

static void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void work(struct pool *pool, task_function *function, const void *job, int64_t tasks, char *scratch) {
    for (;;) {
        const int64_t task = atomic_fetch_add_explicit(&pool->next, 1, memory_order_relaxed);
        if (task >= tasks) return;
        function(job, task, scratch);
    }
}

static void *worker_main(void *argument) {
    const struct worker self = *(struct worker *)argument;
    struct pool *pool = self.pool;
    free(argument);
    unsigned seen = 0;
    for (;;) {
        for (int i = 0; i < SPINS && atomic_load(&pool->generation) == seen; i++) pause_briefly();
        pthread_mutex_lock(&pool->lock);
        while (atomic_load(&pool->generation) == seen) pthread_cond_wait(&pool->wake, &pool->lock);
        seen = atomic_load(&pool->generation);
        if (pool->stopping) break;
        if (!pool->open || self.id >= pool->wanted) {
            pthread_mutex_unlock(&pool->lock);
            continue;
        }
        atomic_fetch_add(&pool->joined, 1);
        task_function *function = pool->function;
        const void *job = pool->job;
        const int64_t tasks = pool->tasks;
        pthread_mutex_unlock(&pool->lock);

        work(pool, function, job, tasks, pool->scratch[self.id].memory);

        pthread_mutex_lock(&pool->lock);
        if (atomic_fetch_sub(&pool->joined, 1) == 1) pthread_cond_signal(&pool->left);
        pthread_mutex_unlock(&pool->lock);
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

/* Starts workers until there are `wanted`, as far as the system allows; signals stay with the program's own threads. */
static int start_workers(struct pool *pool, int wanted) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (pool->workers < wanted) {
        struct worker *worker = malloc(sizeof *worker);
        if (!worker) break;
        *worker = (struct worker){pool, pool->workers};
        if (pthread_create(&pool->ids[pool->workers], NULL, worker_main, worker)) {
            free(worker);
            break;
        }
        pool->workers++;
        pool->avoided = -1;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return (int)min64(wanted, pool->workers);
}

/* Workers keep off the processor of the caller. Linux likes to wake a thread where its waker runs, even if others are
 * idle; the caller then does all tasks before the worker has its turn, job after job. */
static void keep_off_caller(struct pool *pool) {
#if defined(__linux__) && defined(CPU_SET)
    const int caller = sched_getcpu();
    cpu_set_t allowed;
    if (caller < 0 || caller == pool->avoided || sched_getaffinity(0, sizeof allowed, &allowed)) return;
    pool->avoided = caller;
    CPU_CLR(caller, &allowed);
    if (CPU_COUNT(&allowed) == 0) return;
    for (int id = 0; id < pool->workers; id++) pthread_setaffinity_np(pool->ids[id], sizeof allowed, &allowed);
#else
    (void)pool;
#endif
}

static int reserve(struct scratch *scratch, size_t bytes) {
    if (scratch->bytes >= bytes) return 0;
    free(scratch->memory);
    scratch->bytes = 0;
    scratch->memory = aligned_alloc(ALIGNMENT, (size_t)round_up((int64_t)bytes, ALIGNMENT));
    if (!scratch->memory) return -1;
    scratch->bytes = bytes;
    return 0;
}

static void publish(struct pool *pool, task_function *function, const void *job, int64_t tasks, int helpers) {
    pthread_mutex_lock(&pool->lock);
    pool->function = function;
    pool->job = job;
    pool->tasks = tasks;
    pool->wanted = helpers;
    pool->open = 1;
    atomic_fetch_add(&pool->generation, 1);
    pthread_mutex_unlock(&pool->lock);
    pthread_cond_broadcast(&pool->wake); /* unlocked, so that who wakes up does not wait for the lock next */
}

static void close_and_wait(struct pool *pool) {
    pthread_mutex_lock(&pool->lock);
    pool->open = 0;
    pthread_mutex_unlock(&pool->lock);
    for (int i = 0; i < SPINS && atomic_load(&pool->joined); i++) pause_briefly();
    pthread_mutex_lock(&pool->lock);
    while (atomic_load(&pool->joined)) pthread_cond_wait(&pool->left, &pool->lock);
    pthread_mutex_unlock(&pool->lock);
}

void pool_begin(struct pool *pool) { pthread_mutex_lock(&pool->turn); }
void pool_end(struct pool *pool) { pthread_mutex_unlock(&pool->turn); }

void *pool_shared(struct pool *pool, size_t bytes) {
    return reserve(&pool->shared, bytes) ? NULL : pool->shared.memory;
}

int pool_run(struct pool *pool, int64_t tasks, size_t scratch_bytes, task_function *function, const void *job) {
    if (tasks <= 0) return 0;
    int helpers = (int)min64(pool->threads, tasks) - 1;
    if (helpers > pool->workers) helpers = start_workers(pool, helpers);
    struct scratch *own = &pool->scratch[MAX_THREADS - 1];
    int failed = reserve(own, scratch_bytes);
    for (int id = 0; id < helpers && !failed; id++) failed = reserve(&pool->scratch[id], scratch_bytes);
    if (failed) return failed;
    atomic_store(&pool->next, 0);
    if (helpers) {
        keep_off_caller(pool);
        publish(pool, function, job, tasks, helpers);
    }
    work(pool, function, job, tasks, own->memory);
    if (helpers) close_and_wait(pool);
    return 0;
}

static void init_locks(struct pool *pool) {
    pthread_mutex_init(&pool->turn, NULL);
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pthread_cond_init(&pool->left, NULL);
}

static void before_fork(void) { pthread_mutex_lock(&pools_lock); }
static void after_fork(void) { pthread_mutex_unlock(&pools_lock); }

/* The child has one thread. Scratch of a job that was running may be half replaced: it is left where it lies. */
static void after_fork_in_child(void) {
    for (struct pool *pool = pools; pool; pool = pool->next_pool) {
        init_locks(pool);
        pool->workers = pool->open = 0;
        atomic_store(&pool->joined, 0);
        atomic_store(&pool->generation, 0);
        memset(pool->scratch, 0, sizeof pool->scratch);
        pool->shared = (struct scratch){NULL, 0};
    }
    pthread_mutex_init(&pools_lock, NULL);
}

static void watch_forks(void) { pthread_atfork(before_fork, after_fork, after_fork_in_child); }

struct pool *pool_create(int threads) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    struct pool *pool = calloc(1, sizeof *pool);
    if (!pool) return NULL;
    init_locks(pool);
    pool->threads = (int)max64(min64(threads, MAX_THREADS), 1);
    pool->avoided = -1;
    pthread_once(&once, watch_forks);
    pthread_mutex_lock(&pools_lock);
    pool->next_pool = pools;
    if (pools) pools->previous_pool = pool;
    pools = pool;
    pthread_mutex_unlock(&pools_lock);
    return pool;
}

void pool_destroy(struct pool *pool) {
    pthread_mutex_lock(&pools_lock);
    if (pool->previous_pool) pool->previous_pool->next_pool = pool->next_pool;
    else pools = pool->next_pool;
    if (pool->next_pool) pool->next_pool->previous_pool = pool->previous_pool;
    pthread_mutex_unlock(&pools_lock);
    pthread_mutex_lock(&pool->lock);
    pool->stopping = 1;
    atomic_fetch_add(&pool->generation, 1);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
    for (int id = 0; id < pool->workers; id++) pthread_join(pool->ids[id], NULL);
    for (int id = 0; id < MAX_THREADS; id++) free(pool->scratch[id].memory);
    free(pool->shared.memory);
    pthread_mutex_destroy(&pool->turn);
    pthread_mutex_destroy(&pool->lock);
    pthread_cond_destroy(&pool->wake);
    pthread_cond_destroy(&pool->left);
    free(pool);
}
