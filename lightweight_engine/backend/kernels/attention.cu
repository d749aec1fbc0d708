// Attention in bfloat16 for Hopper's tensor cores: heads of 128 numbers, no mask. attention.py starts it, cuda.py
// compiles it.
//
// Scores and sums are float32; weights are rounded to bfloat16 where they are multiplied, as in every such program.
// What is done once for many keys costs most here, so tiles are as large as registers and shared memory allow, and sums
// are scaled anew only where a score is larger than those before by 2 ** SLACK.
//
// Source: FlashAttention-3 (Shah et al. 2024) for the order of the work, FlashAttention-4 (2025) for the slack.

#include "hopper.cuh"

constexpr int STAGES = 2;         // tiles of keys, and of values, that are there or on their way
constexpr int TILE = 176;         // keys
constexpr int SCORES = TILE / 2;  // of a thread: two rows of those of a tile
constexpr int HALF = 64;          // dims that lie together: 128 bytes
constexpr int QUERIES = BLOCK * HALF * 2, KEYS = TILE * HALF * 2;  // bytes of such a half
constexpr float SLACK = 8;  // powers of two that scores may grow by before sums are scaled anew

struct Work {
    TensorMap queries, keys, values;  // [B, N, S, 128], in boxes of BLOCK or TILE tokens and HALF dims
    Plan plan;
    float score_scale;  // of scores as powers of two
    Result result;
    float4* records;
};

struct Shared {
    u8 queries[2][QUERIES], keys[STAGES][2][KEYS], values[STAGES][2][KEYS];
    Barriers<STAGES> barriers;
    Part parts[2];  // in turn, as those who compute end one while the next is fetched
};
static_assert(sizeof(Shared) == 213096, "as attention.py has it");

// scores = queries . keys over 16 dims, or so much more.
__device__ __forceinline__ void add_scores(float (&scores)[SCORES], u64 queries, u64 keys, int more) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %90, 0; wgmma.mma_async.sync.aligned.m64n176k16.f32.bf16.bf16 {" NAMES
                 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, "
                 "%83, %84, %85, %86, %87}, %88, %89, p, 1, 1, 0, 0; }"
                 : SIXTY_FOUR("+f", scores), SIXTEEN("+f", scores, 64), FOUR("+f", scores, 80), FOUR("+f", scores, 84)
                 : "l"(queries), "l"(keys), "r"(more));
}

// sums += weights . values over 16 tokens.
__device__ __forceinline__ void add_values(float (&sums)[64], const u32* weights, u64 values) {
    asm volatile("{ .reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NAMES
                 "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1; }"
                 : SIXTY_FOUR("+f", sums)
                 : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "l"(values));
}

// What a thread t has of its group's 64 queries: rows t / 32 * 16 + t % 32 / 4 and the one 8 below; of each 8 columns
// t % 4 * 2 and the next. Of four numbers the first two are the first row's.
struct Rows {
    float scores[SCORES];     // of a tile, then their weights
    u32 weights[SCORES / 2];  // in bfloat16
    float sums[64];           // of values
    float total[2];           // of a row's weights, but those that other threads have
    float most[2];            // largest score so far but for SLACK, as a power of two
};

__device__ __forceinline__ void begin(Rows& my) {
#pragma unroll
    for (int i = 0; i < 64; ++i) my.sums[i] = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) my.total[i] = 0, my.most[i] = LOWEST;
}

__device__ __forceinline__ void queue_scores(Rows& my, u64 queries, u64 keys) {
    hold(my.scores);
    products_begin();
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int step = 0; step < 4; ++step)
            add_scores(my.scores, queries + half * (QUERIES >> 4) + 2 * step, keys + half * (KEYS >> 4) + 2 * step,
                       half + step);
    products_queue();
}

__device__ __forceinline__ void queue_values(Rows& my, u64 values) {
    hold(my.sums);
    products_begin();
#pragma unroll
    for (int step = 0; step < TILE / 16; ++step) add_values(my.sums, my.weights + 4 * step, values + 128 * step);
    products_queue();
}

// The largest of a row's scores that this thread has.
__device__ __forceinline__ float largest_score(const Rows& my, int row) {
    float tops[4];
#pragma unroll
    for (int i = 0; i < SCORES / 4; ++i) {
        const float pair = fmaxf(my.scores[4 * i + 2 * row], my.scores[4 * i + 2 * row + 1]);
        tops[i % 4] = i < 4 ? pair : fmaxf(tops[i % 4], pair);
    }
    return fmaxf(fmaxf(tops[0], tops[1]), fmaxf(tops[2], tops[3]));
}

// From a tile's scores to its weights, 2 ** (score - most). What came before is waited for on the way.
__device__ __forceinline__ void weigh(Rows& my, float scale) {
    const float peak[2] = {largest_score(my, 0) * scale, largest_score(my, 1) * scale};
    float rest[2] = {1, 1};
    const bool grown = __any_sync(~0u, !(peak[0] <= my.most[0] + SLACK && peak[1] <= my.most[1] + SLACK));
    if (grown) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            rest[row] = raise(my.most[row], peak[row], SLACK);
            my.total[row] *= rest[row];
        }
    }
#pragma unroll
    for (int i = 0; i < SCORES; ++i) my.scores[i] = power_of_two(fmaf(my.scores[i], scale, -my.most[i / 2 % 2]));
    float parts[2][2] = {};
#pragma unroll
    for (int i = 0; i < SCORES; ++i) parts[i / 2 % 2][i / 4 % 2] += my.scores[i];
#pragma unroll
    for (int row = 0; row < 2; ++row) my.total[row] += parts[row][0] + parts[row][1];
    products_wait<0>(my.sums);
    hold(my.scores);
#pragma unroll
    for (int i = 0; i < SCORES / 2; ++i) my.weights[i] = two_bf16(my.scores[2 * i], my.scores[2 * i + 1]);
    hold(my.weights);
    if (grown) {
#pragma unroll
        for (int i = 0; i < 64; ++i) my.sums[i] *= rest[i / 2 % 2];
    }
}

// Scores behind the last token weigh nothing.
__device__ __forceinline__ void mask(Rows& my, int tokens) {
    if (tokens % TILE == 0) return;
#pragma unroll
    for (int i = 0; i < SCORES; ++i)
        if (i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2 >= tokens % TILE) my.scores[i] = __uint_as_float(0xff800000);
}

__device__ __forceinline__ void finish(const Work& work, int index, int group, const float (&sums)[64],
                                       const float (&total)[2]) {
    const Job job = job_at(work.plan, index);
    const float factors[2] = {1 / of_four(total[0]), 1 / of_four(total[1])};
    write(work.result, job, job.place * BLOCK + row_of_thread(group), sums, factors);
}

__device__ __forceinline__ void fetch_tile(u8 (&to)[2][KEYS], const TensorMap& map, int tile, const Job& job, u64* full,
                                           u64* free, int phase) {
    barrier_wait(free, phase ^ 1);
    barrier_expect(full, 2 * KEYS);
    for (int half = 0; half < 2; ++half) fetch_box(to[half], map, half * HALF, tile * TILE, job.head, job.batch, full);
}

__device__ __forceinline__ void fetch_all(const Work& work, Shared& shared) {
    Barriers<STAGES>& barriers = shared.barriers;
    Turn<STAGES> turn;
    int phase = 1;
    for_each_part(work.plan, [&](const Part& part) {
        barrier_wait(&barriers.queries_free, phase);
        phase ^= 1;
        shared.parts[phase] = part;
        const Job job = job_at(work.plan, part.job);
        const int bytes = part.end ? 2 * QUERIES : 0;
        barrier_expect(&barriers.queries_full, bytes);
        for (int half = 0; half < 2 && bytes; ++half)
            fetch_box(shared.queries[half], work.queries, half * HALF, job.place * BLOCK, job.head, job.batch,
                      &barriers.queries_full);
        for (int tile = part.begin; tile < part.end; ++tile, turn.next()) {
            const int stage = turn.stage;
            fetch_tile(shared.keys[stage], work.keys, tile, job, &barriers.keys_full[stage], &barriers.keys_free[stage],
                       turn.phase);
            fetch_tile(shared.values[stage], work.values, tile, job, &barriers.values_full[stage],
                       &barriers.values_free[stage], turn.phase);
        }
    });
}

__device__ __forceinline__ void compute_all(const Work& work, Shared& shared, int group) {
    const bool first_lane = threadIdx.x % 32 == 0;
    const u64 queries = descriptor(shared.queries[0] + group * 64 * 128);
    const u64 first_keys = descriptor(shared.keys), first_values = descriptor(shared.values, KEYS);
    Barriers<STAGES>& barriers = shared.barriers;
    Turn<STAGES> keys, values;
    Rows my;
    for (int phase = 0;; phase ^= 1) {
        barrier_wait(&barriers.queries_full, phase);
        const volatile Part& part = shared.parts[phase];
        const int count = part.end - part.begin;
        if (count == 0) return;
        begin(my);
        barrier_wait(&barriers.keys_full[keys.stage], keys.phase);
        queue_scores(my, queries, first_keys + keys.stage * (2 * KEYS >> 4));
        products_wait<0>(my.scores);
        if (first_lane) barrier_arrive(&barriers.keys_free[keys.stage]);
        keys.next();

        // Scores of the next tile are computed beside the values of this one.
        for (int tile = 0; tile < count - 1; ++tile) {
            weigh(my, work.score_scale);
            if (tile) {
                if (first_lane) barrier_arrive(&barriers.values_free[values.stage]);
                values.next();
            }
            barrier_wait(&barriers.keys_full[keys.stage], keys.phase);
            barrier_wait(&barriers.values_full[values.stage], values.phase);
            queue_scores(my, queries, first_keys + keys.stage * (2 * KEYS >> 4));
            queue_values(my, first_values + values.stage * (2 * KEYS >> 4));
            products_wait<1>(my.scores);
            if (first_lane) barrier_arrive(&barriers.keys_free[keys.stage]);
            keys.next();
        }
        if (first_lane) barrier_arrive(&barriers.queries_free);
        if (part.end == work.plan.tiles) mask(my, work.result.tokens);
        weigh(my, work.score_scale);
        if (count > 1) {
            if (first_lane) barrier_arrive(&barriers.values_free[values.stage]);
            values.next();
        }
        barrier_wait(&barriers.values_full[values.stage], values.phase);
        queue_values(my, first_values + values.stage * (2 * KEYS >> 4));
        products_wait<0>(my.sums);
        if (first_lane) barrier_arrive(&barriers.values_free[values.stage]);
        values.next();
        if (count == work.plan.tiles)
            finish(work, part.job, group, my.sums, my.total);
        else
            put_record(record_of(work.records, blockIdx.x, part.begin == 0, group), my.sums, my.total, my.most);
    }
}

// (GROUPS + 1) * 128 threads: the first group fetches, the others compute.
extern "C" __global__ void __launch_bounds__((GROUPS + 1) * 128, 1) attend(const __grid_constant__ Work work) {
    extern __shared__ __align__(1024) u8 memory[];
    Shared& shared = *(Shared*)memory;
    if (threadIdx.x == 0) shared.barriers.init(GROUPS * 4);
    __syncthreads();
    const int group = (int)threadIdx.x / 128 - 1;
    if (group < 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == 0) fetch_all(work, shared);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        compute_all(work, shared, group);
    }
}

// A block for each job that was cut, GROUPS * 128 threads.
extern "C" __global__ void __launch_bounds__(GROUPS * 128) merge(const __grid_constant__ Work work) {
    float sums[64], total[2];
    if (merged(work.plan, work.records, sums, total))
        finish(work, work.plan.whole + blockIdx.x, threadIdx.x / 128, sums, total);
}
