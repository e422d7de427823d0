// Attention of one new token of each of many sequences to its keys and values in a paged cache, and the cache itself.
//
// A page holds PAGE tokens of one sequence in one block of the decoder: keys and values of all heads, [2, kv_heads, PAGE, D]. The pages
// of sequence s are, in their order, `tables[s·table_width + 0, 1, …]`; no two sequences write to one page, but they may read it.
#include "common.cuh"
#include "lanes.cuh"

// The shared memory that a launch asks for.
extern __shared__ __align__(16) char shared[];

constexpr int PAGE = 64;
// Warps that share the keys of one query head.
constexpr int SPLITS = 4;
// Heads of at most 32·WIDEST numbers.
constexpr int WIDEST = 8;

// A new token: its row in the batch, its sequence, and its position there.
struct Token {
    int row, sequence, position;
};

struct Cache {
    const int *tables;
    int table_width, query_heads, kv_heads, dim;

    // Where the numbers of a token's key (or value, with `which` 1) start in the pages.
    __device__ size_t at(int sequence, int position, int which, int head) const {
        size_t page = tables[(size_t)sequence * table_width + position / PAGE];
        return (((page * 2 + which) * kv_heads + head) * PAGE + position % PAGE) * dim;
    }
};

// Writes keys and values of new tokens to their pages, from rows of qkv. Grid: tokens.
template <typename T> __device__ void write_tokens(const T *qkv, const Token *tokens, Cache cache, T *pages) {
    const Token token = tokens[blockIdx.x];
    const int width = cache.kv_heads * cache.dim;
    const T *from = qkv + (size_t)token.row * (cache.query_heads * cache.dim + 2 * width) + cache.query_heads * cache.dim;
    for (int i = threadIdx.x; i < 2 * width; i += blockDim.x) {
        int which = i / width, head = i % width / cache.dim;
        pages[cache.at(token.sequence, token.position, which, head) + i % cache.dim] = from[i];
    }
}

// out [rows, query_heads·D] of new tokens, whose keys and values are in the cache already. Grid: tokens × key heads; a warp for each
// query head of the key head and each of its splits. Shared memory: for each warp the width of a head and two numbers.
template <typename T>
__device__ void attend(const T *qkv, const Token *tokens, Cache cache, const T *pages, float scale, T *out) {
    const Token token = tokens[blockIdx.x];
    const int dim = cache.dim, group = cache.query_heads / cache.kv_heads, key_head = blockIdx.y;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = key_head * group + warp / SPLITS;
    const T *q = qkv + (size_t)token.row * (cache.query_heads + 2 * cache.kv_heads) * dim + head * dim;

    float sums[WIDEST] = {}, highest = -INFINITE, total = 0;
    for (int first = 32 * (warp % SPLITS); first <= token.position; first += 32 * SPLITS) {
        const int position = min(first + lane, token.position);
        const T *key = pages + cache.at(token.sequence, position, 0, key_head);
        float score = first + lane <= token.position ? dot(q, key, dim) * scale : -INFINITE;
        float now = fmaxf(highest, warp_reduce<Max>(score)), factor = expf(highest - now);
        highest = now;
        float weight = expf(score - now);
        total = total * factor + warp_reduce<Sum>(weight);
        for (float &sum : sums) sum *= factor;
        add_weighted<WIDEST>(sums, weight, pages + cache.at(token.sequence, position, 1, key_head), dim);
    }
    float *mine = (float *)shared + warp * (dim + 2);
    for (int i = 0; i < WIDEST; i++)
        if (lane + 32 * i < dim) mine[lane + 32 * i] = sums[i];
    if (lane == 0) {
        mine[dim] = highest;
        mine[dim + 1] = total;
    }
    __syncthreads();
    if (warp % SPLITS != 0) return;
    // the first split has the key at position 0
    for (int split = 1; split < SPLITS; split++) highest = fmaxf(highest, mine[split * (dim + 2) + dim]);
    float all = 0;
    for (float &sum : sums) sum = 0;
    for (int split = 0; split < SPLITS; split++) {
        const float *other = mine + split * (dim + 2);
        float factor = expf(other[dim] - highest);
        all += other[dim + 1] * factor;
        for (int i = 0; i < WIDEST; i++)
            if (lane + 32 * i < dim) sums[i] += other[lane + 32 * i] * factor;
    }
    T *to = out + ((size_t)token.row * cache.query_heads + head) * dim;
    for (int i = 0; i < WIDEST; i++)
        if (lane + 32 * i < dim) to[lane + 32 * i] = from_float<T>(sums[i] / all);
}

#define OF_TYPE(T, NAME)                                                                                                     \
    extern "C" __global__ void cached_write_##NAME(const T *qkv, const Token *tokens, const int *tables, int table_width,    \
                                                   int query_heads, int kv_heads, int dim, T *pages) {                       \
        write_tokens(qkv, tokens, Cache{tables, table_width, query_heads, kv_heads, dim}, pages);                            \
    }                                                                                                                        \
    extern "C" __global__ void cached_attention_##NAME(const T *qkv, const Token *tokens, const int *tables,                 \
                                                       int table_width, int query_heads, int kv_heads, int dim,              \
                                                       const T *pages, float scale, T *out) {                                \
        attend(qkv, tokens, Cache{tables, table_width, query_heads, kv_heads, dim}, pages, scale, out);                      \
    }

OF_TYPE(float, f32)
OF_TYPE(bf16, bf16)
