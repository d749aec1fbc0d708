// What attention's programs share: numbers, barriers, fetching and tensor cores of Hopper.
//
// Source: PTX ISA.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned char u8;

constexpr int DIM = 128;            // of a head
constexpr int GROUPS = 2;           // of 128 threads that compute, each 64 queries
constexpr int BLOCK = 64 * GROUPS;  // queries
constexpr float LOWEST = -1e30f;

// ---- numbers ------------------------------------------------------------------------------------------------------

// The first of several is in the lowest bits.
__device__ __forceinline__ u32 two_bf16(float a, float b) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(both) : "f"(a), "f"(b));
    return both;
}

__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// ---- barriers in shared memory --------------------------------------------------------------------------------------

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void barrier_init(u64* barrier, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count));
}

__device__ __forceinline__ void barrier_arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and makes the barrier wait for so many bytes as well.
__device__ __forceinline__ void barrier_expect(u64* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// Until the phase is over: 0, then 1, then 0. One that has begun nothing has ended phase 1.
__device__ __forceinline__ void barrier_wait(u64* barrier, int phase) {
    asm volatile(
        "{ .reg .pred done; again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1; @!done bra again; }" ::"r"(
            shared_address(barrier)),
        "r"(phase)
        : "memory");
}

// Of queries, and of tiles of keys and of values: what is there, and what has been read by all warps that read it.
template <int STAGES>
struct Barriers {
    u64 queries_full, queries_free, keys_full[STAGES], keys_free[STAGES], values_full[STAGES], values_free[STAGES];

    __device__ __forceinline__ void init(int readers) {
        barrier_init(&queries_full, 1);
        barrier_init(&queries_free, readers);
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(&keys_full[stage], 1);
            barrier_init(&keys_free[stage], readers);
            barrier_init(&values_full[stage], 1);
            barrier_init(&values_free[stage], readers);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
};

// Where the next of a row of tiles lies, STAGES of which are in shared memory at a time, and its barriers' phase.
template <int STAGES>
struct Turn {
    int stage = 0, phase = 0;
    __device__ __forceinline__ void next() {
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
};

// ---- fetching -------------------------------------------------------------------------------------------------------

// Bytes to shared memory, which a barrier expects.
__device__ __forceinline__ void fetch(void* to, const void* from, int bytes, u64* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

struct __align__(64) TensorMap {  // made by cuda.py
    u64 opaque[16];
};

// A box of [B, N, S, K] to shared memory, from `dim` and `token` on; zeros behind the last token.
__device__ __forceinline__ void fetch_box(void* to, const TensorMap& map, int dim, int token, int head, int batch,
                                          u64* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
        "[%6];" ::"r"(shared_address(to)),
        "l"(&map), "r"(dim), "r"(token), "r"(head), "r"(batch), "r"(shared_address(barrier))
        : "memory");
}

// ---- tensor cores ---------------------------------------------------------------------------------------------------

// Rows of 128 bytes in shared memory, swizzled, 8 of them every 1024 bytes. Where a product sums over rows and not
// along them, `next` is how many bytes behind a row's 128 its next ones lie.
__device__ __forceinline__ u64 descriptor(const void* tile, int next = 16) {
    return (u64)((shared_address(tile) & 0x3ffff) >> 4) | ((u64)(next >> 4) << 16) | (64ull << 32) | (1ull << 62);
}

// What products in flight make or read stays as it is until whatever stands behind this.
__device__ __forceinline__ void hold(float& x) { asm volatile("" : "+f"(x)::"memory"); }
__device__ __forceinline__ void hold(u32& x) { asm volatile("" : "+r"(x)::"memory"); }
template <typename T, int COUNT>
__device__ __forceinline__ void hold(T (&x)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) hold(x[i]);
}

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_queue() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until all groups of products but the LEFT last ones are there, which made `made`.
template <int LEFT, typename T, int COUNT>
__device__ __forceinline__ void products_wait(T (&made)[COUNT]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
    hold(made);
}

// Operands of a product, and their names in its text.
#define FOUR(c, x, i) c(x[i]), c(x[i + 1]), c(x[i + 2]), c(x[i + 3])
#define SIXTEEN(c, x, i) FOUR(c, x, i), FOUR(c, x, i + 4), FOUR(c, x, i + 8), FOUR(c, x, i + 12)
#define SIXTY_FOUR(c, x) SIXTEEN(c, x, 0), SIXTEEN(c, x, 16), SIXTEEN(c, x, 32), SIXTEEN(c, x, 48)
#define NAMES                                                                                                   \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
    "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, " \
    "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// ---- who computes what ----------------------------------------------------------------------------------------------
// A job is all keys for BLOCK queries of a head. There are as many blocks of threads as multiprocessors, each of which
// takes one job after another, so that what the next one needs is fetched while the last one ends. Jobs that are left
// when each has had as many are cut: every block has the same number of their tiles, and `merge` sums up what comes of
// them.

struct Plan {                 // made by hopper.py
    int jobs, places, heads;  // all; of a head; of a picture
    int tiles;                // of a job
    int whole;                // jobs, the first of all, that are not cut
    int share;                // of a block: tiles of those that are
};

struct Job {
    int place, head, batch;
};

__device__ __forceinline__ Job job_at(const Plan& plan, int index) {
    return {index % plan.places, index / plan.places % plan.heads, index / plan.places / plan.heads};
}

struct Part {  // of a job: some of its tiles
    int job, begin, end;
};

// Calls what fetches with the parts of this block, one after another, and at last with one that has no tiles.
template <typename Fetch>
__device__ __forceinline__ void for_each_part(const Plan& plan, Fetch fetch) {
    for (int job = blockIdx.x; job < plan.whole; job += gridDim.x) fetch(Part{job, 0, plan.tiles});
    int unit = blockIdx.x * plan.share;
    const int last = min(unit + plan.share, (plan.jobs - plan.whole) * plan.tiles);
    while (unit < last) {
        const int begin = unit % plan.tiles, end = min(plan.tiles, begin + last - unit);
        fetch(Part{plan.whole + unit / plan.tiles, begin, end});
        unit += end - begin;
    }
    fetch(Part{0, 0, 0});
}

// Raises `most`, a row's largest score as a power of two, to `peak` once that is larger by more than the slack; what
// the row's sums have to be multiplied by. Four threads share a row.
__device__ __forceinline__ float raise(float& most, float peak, float slack) {
    peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 1));
    peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 2));
    const float before = most;
    most = peak <= before + slack ? before : peak;
    return power_of_two(before - most);
}

// ---- what comes of it -----------------------------------------------------------------------------------------------
// Of 64 queries a thread has two rows that are 8 apart, and of each 8 of their 128 sums two, as tensor cores give them.

struct Result {
    u8* start;             // [B, S, N * 128] in bfloat16
    long long batch, row;  // bytes from one to the next
    int tokens;
};

// The sum of what the four threads of a row have.
__device__ __forceinline__ float of_four(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// The first of a thread's rows among its job's queries.
__device__ __forceinline__ int row_of_thread(int group) {
    return group * 64 + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
}

template <int COUNT>
__device__ __forceinline__ void write(const Result& result, const Job& job, int row, const float (&sums)[COUNT],
                                      const float (&factors)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if (row + 8 * i >= result.tokens) continue;
        u8* out = result.start + job.batch * result.batch + (row + 8 * i) * result.row +
                  (job.head * DIM + threadIdx.x % 4 * 2) * 2;
#pragma unroll
        for (int j = 0; j < 16; ++j)
            *(u32*)(out + j * 16) = two_bf16(sums[4 * j + 2 * i] * factors[i], sums[4 * j + 2 * i + 1] * factors[i]);
    }
}

constexpr int RECORD = 17;  // times four floats, of a thread: its sums, their weights, and what both are multiples of

// Where a block puts the record of a part, of which it has two at most: one that begins its job, one that does not.
__device__ __forceinline__ float4* record_of(float4* records, int block, bool begins, int group) {
    return records + ((block * 2 + begins) * GROUPS + group) * RECORD * 128 + threadIdx.x % 128;
}

template <int COUNT>
__device__ __forceinline__ void put_record(float4* to, const float (&sums)[COUNT], const float (&total)[2],
                                           const float (&most)[2]) {
#pragma unroll
    for (int i = 0; i < 16; ++i)
        to[i * 128] = make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]);
    to[16 * 128] = make_float4(total[0], total[1], most[0], most[1]);
}

// Sums and weights of all parts of the job that this block merges; whether it has more than one.
__device__ __forceinline__ bool merged(const Plan& plan, float4* records, float (&sums)[64], float (&total)[2]) {
    const int first = blockIdx.x * plan.tiles, from = first / plan.share;
    const int to = (first + plan.tiles - 1) / plan.share, group = threadIdx.x / 128;
    if (from == to) return false;
    float most[2] = {LOWEST, LOWEST};
    for (int block = from; block <= to; ++block) {
        const float4 last = record_of(records, block, block == from, group)[16 * 128];
        most[0] = fmaxf(most[0], last.z), most[1] = fmaxf(most[1], last.w);
    }
#pragma unroll
    for (int i = 0; i < 64; ++i) sums[i] = 0;
    total[0] = total[1] = 0;
    for (int block = from; block <= to; ++block) {
        const float4* record = record_of(records, block, block == from, group);
        const float4 last = record[16 * 128];
        const float scale[2] = {power_of_two(last.z - most[0]), power_of_two(last.w - most[1])};
        total[0] = fmaf(last.x, scale[0], total[0]), total[1] = fmaf(last.y, scale[1], total[1]);
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const float4 four = record[i * 128];
            sums[4 * i] = fmaf(four.x, scale[0], sums[4 * i]);
            sums[4 * i + 1] = fmaf(four.y, scale[0], sums[4 * i + 1]);
            sums[4 * i + 2] = fmaf(four.z, scale[1], sums[4 * i + 2]);
            sums[4 * i + 3] = fmaf(four.w, scale[1], sums[4 * i + 3]);
        }
    }
    return true;
}
