/* Files to a GPU by way of page-locked buffers, one thread a call, which needs no lock of Python's. */
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <unistd.h>

struct piece {
    int64_t file;   /* its descriptor */
    int64_t start;  /* in the file */
    int64_t nbytes;
    uint64_t target; /* address on the GPU */
};

/* What all threads share. `next` is the piece that is read next, `there` says of each whether it has arrived. The
   functions are the driver's: cuCtxSetCurrent, cuMemcpyHtoDAsync, cuStreamSynchronize; they return 0 where all is well. */
struct job {
    const struct piece *pieces;
    int64_t count;
    int64_t next;
    int64_t stop;
    uint8_t *there;
    int (*enter)(void *context);
    void *context;
    int (*copy)(uint64_t target, const void *source, size_t nbytes, void *stream);
    int (*settle)(void *stream);
};

static int fill(char *buffer, const struct piece *piece)
{
    int64_t done = 0;
    while (done < piece->nbytes) {
        ssize_t count = pread((int)piece->file, buffer + done, (size_t)(piece->nbytes - done), piece->start + done);
        if (count < 0 && errno == EINTR)
            continue;
        if (count <= 0)
            return 0; /* whoever needs it says why */
        done += count;
    }
    return 1;
}

static void arrived(struct job *job, void *stream, int64_t piece)
{
    if (piece >= 0 && job->settle(stream) == 0)
        __atomic_store_n(&job->there[piece], 1, __ATOMIC_RELEASE);
}

/* Until no piece is left, one cannot be read, or `stop` is set. While a piece is read, the GPU fetches the one before. */
void lwe_read_pieces(struct job *job, void *stream, char *first, char *second)
{
    int64_t fetching = -1;
    if (job->enter(job->context) != 0)
        return;
    while (!__atomic_load_n(&job->stop, __ATOMIC_RELAXED)) {
        int64_t number = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
        const struct piece *piece;
        char *full = first;
        if (number >= job->count)
            break;
        piece = job->pieces + number;
        if (!fill(full, piece))
            break;
        arrived(job, stream, fetching);
        fetching = job->copy(piece->target, full, (size_t)piece->nbytes, stream) == 0 ? number : -1;
        first = second;
        second = full;
    }
    arrived(job, stream, fetching);
}
