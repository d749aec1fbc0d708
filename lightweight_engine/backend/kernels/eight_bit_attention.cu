// Attention in 8 bits for Hopper's tensor cores: heads of 128 numbers, no mask.
// eight_bit_attention.py starts it, cuda.py compiles it.
//
// Scores are sums of products of 8-bit integers, which are exact; a query has a scale, and 128 keys have one. Weights
// and values are 8-bit floats (e4m3). A weight's bits are its score's, scaled and rounded: between two powers of two it
// is a line where the exponential is a curve, at most 3 % from the middle of both, and weights are divided by their own
// sum. `find_peaks` and `prepare` norm, rotate and round what a projection made, and lay it out as tensor cores read
// it; `attend` does the rest.
//
// Sources: FlashAttention-3 (Shah et al. 2024) for the order of the work, SageAttention 2 (Zhang et al. 2024) for
// integers in scores and floats in sums, Schraudolph (1999) for the exponential, PTX ISA for fragments and descriptors.

#include "hopper.cuh"

constexpr int TILE = 128;          // tokens
constexpr int IMAGE = TILE * DIM;  // bytes of a tile
constexpr float EPS = 1e-6f;
constexpr float MAGIC = 12582912;  // 1.5 * 2 ** 23: what is added to it is rounded to an integer, in the lowest bits
constexpr u32 MAGIC_BITS = 0x4b400000;
constexpr u32 TINY_BITS = 0x0da24260;  // 1e-30

struct Stream {  // tokens, the projection of which [B, S, 3, N, 128] lies by itself, in bfloat16
    const u8* fused;
    const u8* gains[2];    // of queries and keys, [128] in bfloat16
    long long batch, row;  // bytes from one to the next
};

struct Work {
    Stream streams[2];  // the second's tokens come behind the first's
    int first_tokens, tokens;
    Plan plan;            // jobs of a tile of queries each
    float score_scale;    // of scores as powers of two
    const float* rotary;  // [S, 64, 2], cosines and sines
    u8* images[3];        // queries, keys, values: [B, N, T] tiles
    float* query_scales;  // [B, N, T * 128]
    float* key_scales;    // [B, N, T, 4], of which the first is one; 16 bytes are the least that is fetched
    u32* value_peaks;     // [B, N, T]: bits of the largest number of a tile
    Result result;
    float4* records;
};

// ---- numbers ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float low(u32 two) { return __uint_as_float(two << 16); }
__device__ __forceinline__ float high(u32 two) { return __uint_as_float(two & 0xffff0000u); }

// What is too large becomes the largest; what is no number stays none.
__device__ __forceinline__ u32 four_e4m3(const float (&x)[4]) {
    u32 four;
    asm("{ .reg .b16 lo, hi; cvt.rn.satfinite.e4m3x2.f32 lo, %2, %1; cvt.rn.satfinite.e4m3x2.f32 hi, %4, %3; mov.b32 "
        "%0, {lo, hi}; }"
        : "=r"(four)
        : "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]));
    return four;
}

// 0 to 1 as the integers 0 to 128.
__device__ __forceinline__ u32 four_parts(float a, float b, float c, float d) {
    const u32 times_128 = 0x58005800, plus_1024 = 0x64006400;  // halves: above 1024 their lowest bits count ones
    u32 first, second;
    asm("{ .reg .b32 x; cvt.rn.f16x2.f32 x, %2, %1; fma.rn.f16x2 %0, x, %3, %4; }"
        : "=r"(first)
        : "f"(a), "f"(b), "r"(times_128), "r"(plus_1024));
    asm("{ .reg .b32 x; cvt.rn.f16x2.f32 x, %2, %1; fma.rn.f16x2 %0, x, %3, %4; }"
        : "=r"(second)
        : "f"(c), "f"(d), "r"(times_128), "r"(plus_1024));
    return __byte_perm(first, second, 0x6420);
}

__device__ __forceinline__ u32 four_integers(const float* x, float factor) {
    u32 bits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) bits[i] = __float_as_uint(fmaf(x[i], factor, MAGIC));
    return __byte_perm(__byte_perm(bits[0], bits[1], 0x40), __byte_perm(bits[2], bits[3], 0x40), 0x5410);
}

// Sizes are compared by their bits: what is no number, or infinite, has larger ones than any number.
__device__ __forceinline__ u32 size_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }

template <int LANES>
__device__ __forceinline__ u32 largest_of(u32 x) {
    for (int step = LANES / 2; step; step >>= 1) x = max(x, __shfl_xor_sync(~0u, x, step));
    return x;
}

// ---- prepare ------------------------------------------------------------------------------------------------------
// A block does a tile of a head, 32 tokens at a time: 16 threads have a token, 8 numbers each. Grids are (N, T, B).

constexpr int THREADS = 512;
constexpr int AT_ONCE = THREADS / 16;  // tokens
constexpr int PASSES = TILE / AT_ONCE;

__device__ __forceinline__ u32 largest_of_block(u32 x) {
    constexpr int WARPS = THREADS / 32;
    __shared__ u32 warps[WARPS];
    x = largest_of<32>(x);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
    __syncthreads();
    return largest_of<WARPS>(warps[threadIdx.x % WARPS]);
}

// A tile lies as it will in shared memory, 128 rows of 128 bytes: in row r the 16 bytes that belong to place c are at
// place c ^ (r % 8), so that tensor cores read without conflicts. Rows of queries and keys are tokens, of values dims.
__device__ __forceinline__ int swizzled(int row, int byte) {
    return row * 128 + (((byte >> 4) ^ (row & 7)) << 4) + (byte & 15);
}

// The token at a place in a row of values: a thread of `attend` has 0, 1, 8, 9, 16, 17, 24, 25 of 32, the next 2, 3 ...
__device__ __forceinline__ int token_at(int place) {
    return (place & ~15) + ((place & 2) << 2) + ((place & 12) >> 1) + (place & 1);
}

enum Kind { QUERIES, KEYS, VALUES };

// 8 numbers of a token; zeros behind the last token.
__device__ __forceinline__ uint4 load(const Work& work, Kind kind, int token) {
    if (token >= work.tokens) return make_uint4(0, 0, 0, 0);
    const bool early = token < work.first_tokens;
    const u8* fused = early ? work.streams[0].fused : work.streams[1].fused;
    const long long batch = early ? work.streams[0].batch : work.streams[1].batch;
    const long long row = early ? work.streams[0].row : work.streams[1].row;
    const int place = (kind * gridDim.x + blockIdx.x) * 16 + threadIdx.x % 16;
    return *(const uint4*)(fused + blockIdx.z * batch + (early ? token : token - work.first_tokens) * row + place * 16);
}

__device__ __forceinline__ void unpack(const uint4 bits, float (&x)[8]) {
    x[0] = low(bits.x), x[1] = high(bits.x), x[2] = low(bits.y), x[3] = high(bits.y);
    x[4] = low(bits.z), x[5] = high(bits.z), x[6] = low(bits.w), x[7] = high(bits.w);
}

__device__ __forceinline__ u32 peak_of(const float (&x)[8]) {
    u32 peak = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) peak = max(peak, size_bits(x[i]));
    return peak;
}

// RMS norm of a head and its rotation.
__device__ __forceinline__ void turn(float (&x)[8], const uint4 gains, const float4 (&angles)[2]) {
    float squares = 0, gain[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) squares = fmaf(x[i], x[i], squares);
    for (int step = 8; step; step >>= 1) squares += __shfl_xor_sync(~0u, squares, step);
    const float spread = rsqrtf(squares / DIM + EPS);
    unpack(gains, gain);
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
        const float4 pair = angles[i / 4];  // cosine, sine, cosine, sine
        const float cosine = i & 2 ? pair.z : pair.x, sine = i & 2 ? pair.w : pair.y;
        const float even = x[i] * spread * gain[i], odd = x[i + 1] * spread * gain[i + 1];
        x[i] = even * cosine - odd * sine;
        x[i + 1] = even * sine + odd * cosine;
    }
}

__device__ __forceinline__ void put_integers(u8* image, int row, const float (&x)[8], float unit) {
    const float factor = __fdividef(1, unit);
    *(uint2*)(image + swizzled(row, threadIdx.x % 16 * 8)) =
        make_uint2(four_integers(x, factor), four_integers(x + 4, factor));
}

// What the largest integer, 127, stands for.
__device__ __forceinline__ float unit_of(u32 peak) { return __uint_as_float(max(peak, TINY_BITS)) / 127; }

__device__ __forceinline__ long long head_place(const Work& work) {
    return (long long)blockIdx.z * gridDim.x + blockIdx.x;
}

extern "C" __global__ void __launch_bounds__(THREADS) find_peaks(const Work work) {
    u32 peak = 0;
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
        float x[8];
        unpack(load(work, VALUES, blockIdx.y * TILE + pass * AT_ONCE + threadIdx.x / 16), x);
        peak = max(peak, peak_of(x));
    }
    peak = largest_of_block(peak);
    if (threadIdx.x == 0) work.value_peaks[head_place(work) * work.plan.tiles + blockIdx.y] = peak;
}

// All values of a head are rounded by one power of two, which costs no accuracy: this is its exponent.
__device__ __forceinline__ float value_exponent(const u32* peaks, int tiles) {
    u32 bits = 0;
    for (int i = threadIdx.x % 32; i < tiles; i += 32) bits = max(bits, peaks[i]);
    const float peak = __uint_as_float(largest_of<32>(bits));
    return peak == 0 ? 0.0f : ceilf(fmaxf(__log2f(peak / 448), -100.0f)) + 0 * peak;  // none where that is none
}

__device__ __forceinline__ void put_values(u8* image, const u8* raw, float factor) {
    const int dim = threadIdx.x % 64 * 2, first = threadIdx.x / 64 * 16;  // 2 dims of 16 tokens
    u32 packed[2][4];
#pragma unroll
    for (int word = 0; word < 4; ++word) {
        float x[2][4];
#pragma unroll
        for (int byte = 0; byte < 4; ++byte) {
            const u32 two = *(const u32*)(raw + token_at(first + word * 4 + byte) * 256 + dim * 2);
            x[0][byte] = low(two) * factor;
            x[1][byte] = high(two) * factor;
        }
        packed[0][word] = four_e4m3(x[0]);
        packed[1][word] = four_e4m3(x[1]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
        *(uint4*)(image + swizzled(dim + i, first)) =
            make_uint4(packed[i][0], packed[i][1], packed[i][2], packed[i][3]);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) prepare(const Work work) {
    __shared__ __align__(16) u8 raw[TILE * DIM * 2];
    const int lane = threadIdx.x % 16;
    const long long head = head_place(work), tile = head * work.plan.tiles + blockIdx.y;
    float keys[PASSES][8];
    u32 peak = 0;
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
        const int row = pass * AT_ONCE + threadIdx.x / 16, token = blockIdx.y * TILE + row;
        const bool early = token < work.first_tokens;
        const float4* turns = (const float4*)(work.rotary + (long long)min(token, work.tokens - 1) * DIM + lane * 8);
        const float4 angles[2] = {turns[0], turns[1]};
        float query[8];
        unpack(load(work, QUERIES, token), query);
        unpack(load(work, KEYS, token), keys[pass]);
        *(uint4*)(raw + row * 256 + lane * 16) = load(work, VALUES, token);
        const u8* query_gain = early ? work.streams[0].gains[0] : work.streams[1].gains[0];
        const u8* key_gain = early ? work.streams[0].gains[1] : work.streams[1].gains[1];
        turn(query, *(const uint4*)(query_gain + lane * 16), angles);
        turn(keys[pass], *(const uint4*)(key_gain + lane * 16), angles);
        peak = max(peak, peak_of(keys[pass]));
        const float unit = unit_of(largest_of<16>(peak_of(query)));
        if (lane == 0) work.query_scales[tile * TILE + row] = unit * work.score_scale;
        put_integers(work.images[QUERIES] + tile * IMAGE, row, query, unit);
    }
    const float unit = unit_of(largest_of_block(peak));
    if (threadIdx.x == 0) work.key_scales[4 * tile] = unit;
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass)
        put_integers(work.images[KEYS] + tile * IMAGE, pass * AT_ONCE + threadIdx.x / 16, keys[pass], unit);
    const float exponent = value_exponent(work.value_peaks + head * work.plan.tiles, work.plan.tiles);
    put_values(work.images[VALUES] + tile * IMAGE, raw, power_of_two(-exponent));
}

// ---- attend -------------------------------------------------------------------------------------------------------

constexpr int STAGES = 4;               // tiles of keys, and of values, that are there or on their way
constexpr int PERIOD = 8;               // tiles, after which sums go to float32
constexpr int STAGE = IMAGE + 8 * 128;  // a tile of values, and 8 dims that are 1: their sums are those of the weights
constexpr int SUMS = 68;                // of a thread: two rows of those 136 dims
constexpr float LIFT = 6;               // a weight of 1 is 2 ** 6 of the 448 that 8 bits hold
constexpr float SLACK = 2.5f;           // powers of two that scores may grow by before sums are scaled anew
constexpr u32 ONES = 0x38383838;        // four times 1

struct Shared {
    u8 queries[BLOCK * DIM], keys[STAGES][IMAGE], values[STAGES][STAGE];
    float4 totals[GROUPS][SUMS / 4][128];
    float4 key_scales[STAGES];
    Barriers<STAGES> barriers;
    Part parts[2];  // in turn, as those who compute end one while the next is fetched
};
static_assert(sizeof(Shared) == 221424 && BLOCK == TILE, "as eight_bit_attention.py has them");

// scores += queries . keys over 32 dims, in integers.
__device__ __forceinline__ void add_scores(u32 (&scores)[64], u64 queries, u64 keys) {
    asm volatile("{ .reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {" NAMES
                 "}, %64, %65, p; }"
                 : SIXTY_FOUR("+r", scores)
                 : "l"(queries), "l"(keys));
}

// sums += weights . values over 32 tokens, in 8-bit floats.
__device__ __forceinline__ void add_values(float (&sums)[SUMS], const u32* weights, u64 values) {
    asm volatile("{ .reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n136k32.f32.e4m3.e4m3 {" NAMES
                 ", %64, %65, %66, %67}, {%68, %69, %70, %71}, %72, p, 1, 1; }"
                 : SIXTY_FOUR("+f", sums), FOUR("+f", sums, 64)
                 : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "l"(values));
}

// What a thread t has of its group's 64 queries: rows t / 32 * 16 + t % 32 / 4 and the one 8 below; of each 8 columns
// t % 4 * 2 and the next. Of four numbers the first two are the first row's.
struct Rows {
    u32 scores[64];    // of a tile: MAGIC plus an integer, then 0 to 1
    u32 weights[16];   // in 8 bits
    float sums[SUMS];  // of values, and of weights
    float owed[2];     // what the totals have to be multiplied by
    float unit[2];     // of a row's scores, but for that of the keys
    float most[2];     // largest score so far but for SLACK, as a power of two
};

__device__ __forceinline__ void queue_scores(Rows& my, u64 queries, u64 keys) {
#pragma unroll
    for (int i = 0; i < 64; ++i) my.scores[i] = MAGIC_BITS;
    products_begin();
#pragma unroll
    for (int step = 0; step < 4; ++step) add_scores(my.scores, queries + 2 * step, keys + 2 * step);
    products_queue();
}

__device__ __forceinline__ void queue_values(Rows& my, u64 values) {
    products_begin();
#pragma unroll
    for (int step = 0; step < 4; ++step) add_values(my.sums, my.weights + 4 * step, values + 2 * step);
    products_queue();
}

// Tensor cores keep few bits of a sum: what has come together is added to totals in float32, this thread's own.
__device__ __forceinline__ void with_totals(Rows& my, const float4* totals) {
#pragma unroll
    for (int i = 0; i < SUMS / 4; ++i) {
        const float4 total = totals[i * 128];
        my.sums[4 * i] = fmaf(total.x, my.owed[0], my.sums[4 * i]);
        my.sums[4 * i + 1] = fmaf(total.y, my.owed[0], my.sums[4 * i + 1]);
        my.sums[4 * i + 2] = fmaf(total.z, my.owed[1], my.sums[4 * i + 2]);
        my.sums[4 * i + 3] = fmaf(total.w, my.owed[1], my.sums[4 * i + 3]);
    }
}

__device__ __forceinline__ void put_by(Rows& my, float4* totals) {
    with_totals(my, totals);
#pragma unroll
    for (int i = 0; i < SUMS / 4; ++i) {
        totals[i * 128] = make_float4(my.sums[4 * i], my.sums[4 * i + 1], my.sums[4 * i + 2], my.sums[4 * i + 3]);
        my.sums[4 * i] = my.sums[4 * i + 1] = my.sums[4 * i + 2] = my.sums[4 * i + 3] = 0;
    }
    my.owed[0] = my.owed[1] = 1;
}

// The largest of a row's scores that this thread has; positive floats are in the order of their bits.
__device__ __forceinline__ float largest_score(const Rows& my, int row) {
    int tops[4];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        const int pair = max((int)my.scores[4 * i + 2 * row], (int)my.scores[4 * i + 2 * row + 1]);
        tops[i % 4] = i < 4 ? pair : max(tops[i % 4], pair);
    }
    return __int_as_float(max(max(tops[0], tops[1]), max(tops[2], tops[3])));
}

// From a tile's scores to its weights, 2 ** (score - most + LIFT). What came before is waited for on the way, and
// scaled and put by where that is due.
__device__ __forceinline__ void weigh(Rows& my, float key_scale, float4* totals, bool due) {
    float factor[2], shift[2], peak[2], rest[2] = {1, 1};
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        factor[row] = my.unit[row] * key_scale;
        peak[row] = (largest_score(my, row) - MAGIC) * factor[row];
    }
    const bool grown = __any_sync(~0u, !(peak[0] <= my.most[0] + SLACK && peak[1] <= my.most[1] + SLACK));
    if (grown) {
        rest[0] = raise(my.most[0], peak[0], SLACK);
        rest[1] = raise(my.most[1], peak[1], SLACK);
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        // An e4m3 has 8 steps between powers of two, and is 1 at 7 times 8: sixteen powers are 0 to 1.
        factor[row] /= 16;
        shift[row] = fmaf(MAGIC, factor[row], (my.most[row] - LIFT - 7) / 16);
    }
#pragma unroll
    for (int i = 0; i < 64; ++i)
        my.scores[i] =
            __float_as_uint(__saturatef(fmaf(__uint_as_float(my.scores[i]), factor[i / 2 % 2], -shift[i / 2 % 2])));
    products_wait<0>(my.sums);
    hold(my.scores);
#pragma unroll
    for (int step = 0; step < 4; ++step)
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // the rows in turn; tokens 0 to 15, then 16 to 31
            const u32* x = my.scores + step * 16 + i / 2 * 8 + i % 2 * 2;
            my.weights[step * 4 + i] =
                four_parts(__uint_as_float(x[0]), __uint_as_float(x[1]), __uint_as_float(x[4]), __uint_as_float(x[5]));
        }
    hold(my.weights);
    if (due) put_by(my, totals);
    if (grown) {
#pragma unroll
        for (int i = 0; i < SUMS; ++i) my.sums[i] *= rest[i / 2 % 2];
        my.owed[0] *= rest[0];
        my.owed[1] *= rest[1];
    }
}

__device__ __forceinline__ void begin(Rows& my, const Work& work, long long first, float4* totals) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        my.unit[i] = work.query_scales[first + 8 * i];
        my.most[i] = LOWEST;
        my.owed[i] = 1;
    }
#pragma unroll
    for (int i = 0; i < SUMS; ++i) my.sums[i] = 0;
#pragma unroll
    for (int i = 0; i < SUMS / 4; ++i) totals[i * 128] = make_float4(0, 0, 0, 0);
}

__device__ __forceinline__ void fetch_all(const Work& work, Shared& shared) {
    Barriers<STAGES>& barriers = shared.barriers;
    Turn<STAGES> turn;
    int phase = 1;
    for_each_part(work.plan, [&](const Part& part) {
        barrier_wait(&barriers.queries_free, phase);
        phase ^= 1;
        shared.parts[phase] = part;
        const long long first = part.job / work.plan.tiles * work.plan.tiles;  // tile of the head
        const int bytes = part.end ? IMAGE : 0;
        barrier_expect(&barriers.queries_full, bytes);
        if (bytes)
            fetch(shared.queries, work.images[QUERIES] + (long long)part.job * IMAGE, IMAGE, &barriers.queries_full);
        for (int tile = part.begin; tile < part.end; ++tile, turn.next()) {
            const int stage = turn.stage;
            u64 *keys_full = &barriers.keys_full[stage], *values_full = &barriers.values_full[stage];
            barrier_wait(&barriers.keys_free[stage], turn.phase ^ 1);
            barrier_expect(keys_full, IMAGE + sizeof(float4));
            fetch(&shared.key_scales[stage], work.key_scales + 4 * (first + tile), sizeof(float4), keys_full);
            fetch(shared.keys[stage], work.images[KEYS] + (first + tile) * IMAGE, IMAGE, keys_full);
            barrier_wait(&barriers.values_free[stage], turn.phase ^ 1);
            barrier_expect(values_full, IMAGE);
            fetch(shared.values[stage], work.images[VALUES] + (first + tile) * IMAGE, IMAGE, values_full);
        }
    });
}

// Scores behind the last token weigh nothing.
__device__ __forceinline__ void mask(Rows& my, int tokens) {
    if (tokens % TILE == 0) return;
#pragma unroll
    for (int i = 0; i < 64; ++i)
        if (i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2 >= tokens % TILE) my.scores[i] = 0xff800000;  // minus infinity
}

__device__ __forceinline__ void finish(const Work& work, int index, int group, const float (&sums)[64],
                                       const float (&total)[2]) {
    const Job job = job_at(work.plan, index);
    const long long head = (long long)job.batch * work.plan.heads + job.head;
    const float unit = power_of_two(value_exponent(work.value_peaks + head * work.plan.tiles, work.plan.tiles));
    const float factors[2] = {unit / total[0], unit / total[1]};
    write(work.result, job, job.place * BLOCK + row_of_thread(group), sums, factors);
}

__device__ __forceinline__ void compute_all(const Work& work, Shared& shared, int group) {
    const bool first_lane = threadIdx.x % 32 == 0;
    float4* totals = &shared.totals[group][0][threadIdx.x % 128];
    const u64 queries = descriptor(shared.queries + group * 64 * DIM);
    const u64 first_keys = descriptor(shared.keys), first_values = descriptor(shared.values);
    Barriers<STAGES>& barriers = shared.barriers;
    Turn<STAGES> keys, values;
    Rows my;
    for (int phase = 0;; phase ^= 1) {
        barrier_wait(&barriers.queries_full, phase);
        const volatile Part& part = shared.parts[phase];
        const int count = part.end - part.begin;
        if (count == 0) return;
        begin(my, work, (long long)part.job * BLOCK + row_of_thread(group), totals);
        barrier_wait(&barriers.keys_full[keys.stage], keys.phase);
        float key_scale = shared.key_scales[keys.stage].x;
        queue_scores(my, queries, first_keys + keys.stage * (IMAGE >> 4));
        products_wait<0>(my.scores);
        if (first_lane) barrier_arrive(&barriers.keys_free[keys.stage]);
        keys.next();

        // Scores of the next tile are computed beside the values of this one.
        for (int tile = 0; tile < count - 1; ++tile) {
            weigh(my, key_scale, totals, tile && tile % PERIOD == 0);
            if (tile) {
                if (first_lane) barrier_arrive(&barriers.values_free[values.stage]);
                values.next();
            }
            barrier_wait(&barriers.keys_full[keys.stage], keys.phase);
            key_scale = shared.key_scales[keys.stage].x;
            queue_scores(my, queries, first_keys + keys.stage * (IMAGE >> 4));
            barrier_wait(&barriers.values_full[values.stage], values.phase);
            queue_values(my, first_values + values.stage * (STAGE >> 4));
            products_wait<1>(my.scores);
            if (first_lane) barrier_arrive(&barriers.keys_free[keys.stage]);
            keys.next();
        }
        if (first_lane) barrier_arrive(&barriers.queries_free);
        if (part.end == work.plan.tiles) mask(my, work.tokens);
        weigh(my, key_scale, totals, false);
        if (count > 1) {
            if (first_lane) barrier_arrive(&barriers.values_free[values.stage]);
            values.next();
        }
        barrier_wait(&barriers.values_full[values.stage], values.phase);
        queue_values(my, first_values + values.stage * (STAGE >> 4));
        products_wait<0>(my.sums);
        if (first_lane) barrier_arrive(&barriers.values_free[values.stage]);
        values.next();
        with_totals(my, totals);
        const float total[2] = {my.sums[64], my.sums[66]};
        float (&sums)[64] = *(float (*)[64]) & my.sums;
        if (count == work.plan.tiles)
            finish(work, part.job, group, sums, total);
        else
            put_record(record_of(work.records, blockIdx.x, part.begin == 0, group), sums, total, my.most);
    }
}

// (GROUPS + 1) * 128 threads: the first group fetches, the others compute.
extern "C" __global__ void __launch_bounds__((GROUPS + 1) * 128, 1) attend(const Work work) {
    extern __shared__ __align__(1024) u8 memory[];
    Shared& shared = *(Shared*)memory;
    if (threadIdx.x == 0) shared.barriers.init(GROUPS * 4);
    for (int i = threadIdx.x; i < STAGES * 256; i += blockDim.x)
        *(u32*)(shared.values[i / 256] + IMAGE + i % 256 * 4) = ONES;
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
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
extern "C" __global__ void __launch_bounds__(GROUPS * 128) merge(const Work work) {
    float sums[64], total[2];
    if (merged(work.plan, work.records, sums, total))
        finish(work, work.plan.whole + blockIdx.x, threadIdx.x / 128, sums, total);
}
