// Causal attention over packed spans, with grouped key and value heads; see ops/attention.rs for what it computes.
//
// Rows of qkv hold queries, keys and values of all heads, [n, (query_heads + 2·kv_heads)·D]. A span's keys are, in this order, those
// of the two parts of its prefix and its own: key j of a span has position j, and its row i sees the keys up to `before + i`,
// `before` being the length of its prefix. Keys are taken in blocks of KEYS from position 0 on, so that the bits of a row depend on
// its queries, keys and values alone, and not on how they are packed or cut into tiles.
//
// In bf16 products are the tensor cores': a warp has sixteen rows of the left factor. In f32 a warp has one row, at any width of
// a head: for tests and for comparison, not for speed.
#include "common.cuh"
#include "lanes.cuh"

// The shared memory that a launch asks for.
extern __shared__ __align__(16) char shared[];

// A span: first row and number of rows, of itself and of the two parts of its prefix. Six numbers as the host writes them.
struct Span {
    int row, rows;
    int prefix[2], prefix_rows[2];

    __device__ int before() const { return prefix_rows[0] + prefix_rows[1]; }
    // The row of the batch that holds the key at a position.
    __device__ int key_row(int position) const {
        if (position < prefix_rows[0]) return prefix[0] + position;
        position -= prefix_rows[0];
        if (position < prefix_rows[1]) return prefix[1] + position;
        return row + position - prefix_rows[1];
    }
};

// Some rows of a span that a block computes.
struct Tile {
    int span, first;
};

// Keys that lie next to each other, at most KEYS of one span, and the queries that see them: `jobs` from `first_query` on. With
// `slot` ≥ 0 the sums go to that place of a workspace, since several jobs share the keys.
struct KeyJob {
    int row, keys;
    int first_query, queries;
    int slot;
};

// Queries of a key job: rows of the batch, the position of the first one's own key, and that of the job's first key in their span.
struct Queries {
    int row, rows;
    int position, key_position;
};

// Numbers and widths of heads.
struct Shape {
    int query_heads, kv_heads;

    __device__ int key_head(int head) const { return head / (query_heads / kv_heads); }
};

constexpr int WARPS = 4;
constexpr int ROWS = 16 * WARPS;
constexpr int KEYS = 64;
// Queries that a key job takes at a time: fewer, since a warp holds two sums of the width of a head.
constexpr int QUERIES = 32;
// Numbers between rows in shared memory beyond their width: eight threads that read a word of as many rows, and four words of
// each, read 32 banks.
constexpr int PAD = 8;

// Copies rows to shared memory, [count, D + PAD], eight numbers at a time; zeros in place of rows from `valid` on.
template <int D, typename RowOf>
__device__ void load_rows(bf16 *to, const bf16 *from, int stride, int count, int valid, RowOf row_of) {
    for (int i = threadIdx.x; i < count * (D / 8); i += blockDim.x) {
        int row = i / (D / 8), column = i % (D / 8) * 8;
        uint4 value = make_uint4(0, 0, 0, 0);
        if (row < valid) value = *(const uint4 *)(from + (size_t)row_of(row) * stride + column);
        *(uint4 *)(to + row * (D + PAD) + column) = value;
    }
}

// The fragment of the left factor of a product: sixteen rows, columns k to k + 15 of rows in shared memory.
template <int D> __device__ void left_fragment(uint32_t a[4], const bf16 *rows, int k) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const bf16 *at = rows + g * (D + PAD) + k + 2 * t;
    a[0] = *(const uint32_t *)at;
    a[1] = *(const uint32_t *)(at + 8 * (D + PAD));
    a[2] = *(const uint32_t *)(at + 8);
    a[3] = *(const uint32_t *)(at + 8 * (D + PAD) + 8);
}

// out += rows · othersᵀ: sixteen rows with N others, both in shared memory, [16, N] in fragments of eight columns.
template <int D, int N> __device__ void product_of_rows(float (*out)[4], const bf16 *rows, const bf16 *others) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    for (int k = 0; k < D; k += 16) {
        uint32_t a[4];
        left_fragment<D>(a, rows, k);
#pragma unroll
        for (int n = 0; n < N / 8; n++) {
            const bf16 *at = others + (8 * n + g) * (D + PAD) + k + 2 * t;
            uint32_t b[2] = {*(const uint32_t *)at, *(const uint32_t *)(at + 8)};
            mma_m16n8k16_bf16(out[n], a, b);
        }
    }
}

// out += weights · rows: weights [16, K] in fragments as `product_of_rows` makes them, K rows in shared memory, out [16, D].
template <int D, int K> __device__ void product_with_rows(float (*out)[4], float (*weights)[4], const bf16 *rows) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < K / 16; k++) {
        const float *low = weights[2 * k], *high = weights[2 * k + 1];
        uint32_t a[4] = {pack_bf16(low[0], low[1]), pack_bf16(low[2], low[3]), pack_bf16(high[0], high[1]),
                         pack_bf16(high[2], high[3])};
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            uint32_t b[2];
            ldmatrix_x2_trans(b, rows + (16 * k + lane % 16) * (D + PAD) + 8 * n);
            mma_m16n8k16_bf16(out[n], a, b);
        }
    }
}

// The maximum, or the sum, of a value over the four threads that hold a row of a fragment.
__device__ inline float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(WARP, x, 1));
    return fmaxf(x, __shfl_xor_sync(WARP, x, 2));
}
__device__ inline float row_sum(float x) {
    x += __shfl_xor_sync(WARP, x, 1);
    return x + __shfl_xor_sync(WARP, x, 2);
}

// Writes sixteen rows in fragments, each times its factor; rows from `valid` on are left alone.
template <int D>
__device__ void store_rows(bf16 *to, int stride, int valid, float (*rows)[4], float factor_low, float factor_high) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
        if (g < valid)
            *(uint32_t *)(to + (size_t)g * stride + 8 * n + 2 * t) =
                pack_bf16(rows[n][0] * factor_low, rows[n][1] * factor_low);
        if (g + 8 < valid)
            *(uint32_t *)(to + (size_t)(g + 8) * stride + 8 * n + 2 * t) =
                pack_bf16(rows[n][2] * factor_high, rows[n][3] * factor_high);
    }
}

// out [n, query_heads·D], lse [n, query_heads]: log-sum-exp of the scaled scores. Grid: tiles × query heads; ROWS·2 threads.
template <int D>
__device__ void forward_tile(const bf16 *qkv, const Span *spans, const Tile *tiles, Shape shape, float scale, bf16 *out,
                             float *lse) {
    bf16 *q = (bf16 *)shared, *k = q + ROWS * (D + PAD), *v = k + KEYS * (D + PAD);
    const Tile tile = tiles[blockIdx.x];
    const Span span = spans[tile.span];
    const int head = blockIdx.y, key_head = shape.key_head(head);
    const int stride = (shape.query_heads + 2 * shape.kv_heads) * D;
    const int rows = min(ROWS, span.rows - tile.first), first_row = span.row + tile.first;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    load_rows<D>(q, qkv + head * D, stride, ROWS, rows, [&](int i) { return first_row + i; });
    const bf16 *key_columns = qkv + (shape.query_heads + key_head) * D;
    const bf16 *value_columns = key_columns + shape.kv_heads * D;

    float sums[D / 8][4] = {};
    float highest[2] = {-INFINITE, -INFINITE}, total[2] = {0, 0};
    // positions of the keys that the two rows of this thread see last
    const int last[2] = {span.before() + tile.first + 16 * warp + g, span.before() + tile.first + 16 * warp + g + 8};
    const int keys = span.before() + tile.first + rows;
    for (int first = 0; first < keys; first += KEYS) {
        const int valid = min(KEYS, keys - first);
        auto key_row = [&](int i) { return span.key_row(first + i); };
        __syncthreads();
        load_rows<D>(k, key_columns, stride, KEYS, valid, key_row);
        load_rows<D>(v, value_columns, stride, KEYS, valid, key_row);
        __syncthreads();
        float p[KEYS / 8][4] = {};
        product_of_rows<D, KEYS>(p, q + 16 * warp * (D + PAD), k);
        float block_highest[2] = {-INFINITE, -INFINITE};
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                bool seen = first + 8 * n + 2 * t + i % 2 <= last[i / 2];
                p[n][i] = seen ? p[n][i] * scale : -INFINITE;
                block_highest[i / 2] = fmaxf(block_highest[i / 2], p[n][i]);
            }
        float factor[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            // every row sees the key at position 0, so that the maximum is a number from the first block on
            float now = fmaxf(highest[half], row_max(block_highest[half]));
            factor[half] = expf(highest[half] - now);
            highest[half] = now;
        }
        float block_total[2] = {0, 0};
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                p[n][i] = expf(p[n][i] - highest[i / 2]);
                block_total[i / 2] += p[n][i];
            }
#pragma unroll
        for (int half = 0; half < 2; half++) total[half] = total[half] * factor[half] + row_sum(block_total[half]);
#pragma unroll
        for (int n = 0; n < D / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) sums[n][i] *= factor[i / 2];
        product_with_rows<D, KEYS>(sums, p, v);
    }
    const int row = first_row + 16 * warp, valid = rows - 16 * warp;
    store_rows<D>(out + (size_t)row * shape.query_heads * D + head * D, shape.query_heads * D, valid, sums, 1 / total[0],
                  1 / total[1]);
    if (t == 0)
        for (int half = 0; half < 2; half++)
            if (g + 8 * half < valid)
                lse[(size_t)(row + g + 8 * half) * shape.query_heads + head] = highest[half] + logf(total[half]);
}

// delta [n, query_heads]: Σ out·d_out of each head. One warp for each row and head.
template <typename T>
__device__ void delta_of_rows(const T *out, const T *d_out, float *delta, uint64_t count, int dim) {
    size_t item = thread_of_grid() / 32;
    int lane = threadIdx.x % 32;
    if (item >= count) return;
    float sum = 0;
    for (int i = lane; i < dim; i += 32)
        sum += to_float(out[item * dim + i]) * to_float(d_out[item * dim + i]);
    sum = warp_reduce<Sum>(sum);
    if (lane == 0) delta[item] = sum;
}

// The queries' part of d_qkv. Grid and threads as the forward pass has them.
template <int D>
__device__ void query_gradient_tile(const bf16 *qkv, const Span *spans, const Tile *tiles, Shape shape, float scale,
                                    const float *lse, const float *delta, const bf16 *d_out, bf16 *d_qkv) {
    bf16 *q = (bf16 *)shared, *d_o = q + ROWS * (D + PAD);
    bf16 *k = d_o + ROWS * (D + PAD), *v = k + QUERIES * (D + PAD);
    const Tile tile = tiles[blockIdx.x];
    const Span span = spans[tile.span];
    const int head = blockIdx.y, key_head = shape.key_head(head);
    const int stride = (shape.query_heads + 2 * shape.kv_heads) * D, out_stride = shape.query_heads * D;
    const int rows = min(ROWS, span.rows - tile.first), first_row = span.row + tile.first;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    auto own_row = [&](int i) { return first_row + i; };
    load_rows<D>(q, qkv + head * D, stride, ROWS, rows, own_row);
    load_rows<D>(d_o, d_out + head * D, out_stride, ROWS, rows, own_row);
    const bf16 *key_columns = qkv + (shape.query_heads + key_head) * D;
    const bf16 *value_columns = key_columns + shape.kv_heads * D;

    float d_q[D / 8][4] = {};
    float row_lse[2], row_delta[2];
    int last[2];
    for (int half = 0; half < 2; half++) {
        int row = 16 * warp + g + 8 * half;
        size_t at = (size_t)(first_row + row) * shape.query_heads + head;
        row_lse[half] = row < rows ? lse[at] : 0;
        row_delta[half] = row < rows ? delta[at] : 0;
        // rows beyond the last see nothing
        last[half] = row < rows ? span.before() + tile.first + row : -1;
    }
    const int keys = span.before() + tile.first + rows;
    for (int first = 0; first < keys; first += QUERIES) {
        const int valid = min(QUERIES, keys - first);
        auto key_row = [&](int i) { return span.key_row(first + i); };
        __syncthreads();
        load_rows<D>(k, key_columns, stride, QUERIES, valid, key_row);
        load_rows<D>(v, value_columns, stride, QUERIES, valid, key_row);
        __syncthreads();
        float p[QUERIES / 8][4] = {}, ds[QUERIES / 8][4] = {};
        product_of_rows<D, QUERIES>(p, q + 16 * warp * (D + PAD), k);
        product_of_rows<D, QUERIES>(ds, d_o + 16 * warp * (D + PAD), v);
#pragma unroll
        for (int n = 0; n < QUERIES / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                bool seen = first + 8 * n + 2 * t + i % 2 <= last[i / 2];
                float weight = seen ? expf(p[n][i] * scale - row_lse[i / 2]) : 0;
                ds[n][i] = weight * (ds[n][i] - row_delta[i / 2]) * scale;
            }
        product_with_rows<D, QUERIES>(d_q, ds, k);
    }
    store_rows<D>(d_qkv + (size_t)(first_row + 16 * warp) * stride + head * D, stride, rows - 16 * warp, d_q, 1, 1);
}

// The keys' and values' parts of d_qkv, or of the workspace [slots, kv_heads, 2, KEYS, D] in f32. Grid: jobs × key heads; ROWS·2
// threads. The heads that share a key head are taken one after the other, so that sums have one order.
template <int D>
__device__ void key_gradient_job(const bf16 *qkv, const KeyJob *jobs, const Queries *queries, Shape shape, float scale,
                                 const float *lse, const float *delta, const bf16 *d_out, bf16 *d_qkv,
                                 float *workspace) {
    static_assert(ROWS == KEYS, "a warp has sixteen keys");
    bf16 *k = (bf16 *)shared, *v = k + KEYS * (D + PAD);
    bf16 *q = v + KEYS * (D + PAD), *d_o = q + QUERIES * (D + PAD);
    float *q_lse = (float *)(d_o + QUERIES * (D + PAD)), *q_delta = q_lse + QUERIES;
    const KeyJob job = jobs[blockIdx.x];
    const int key_head = blockIdx.y, group = shape.query_heads / shape.kv_heads;
    const int stride = (shape.query_heads + 2 * shape.kv_heads) * D, out_stride = shape.query_heads * D;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    auto key_row = [&](int i) { return job.row + i; };
    load_rows<D>(k, qkv + (shape.query_heads + key_head) * D, stride, KEYS, job.keys, key_row);
    load_rows<D>(v, qkv + (shape.query_heads + shape.kv_heads + key_head) * D, stride, KEYS, job.keys, key_row);

    float d_k[D / 8][4] = {}, d_v[D / 8][4] = {};
    for (int item = job.first_query; item < job.first_query + job.queries; item++)
        for (int head = key_head * group; head < (key_head + 1) * group; head++) {
            const Queries from = queries[item];
            for (int first = 0; first < from.rows; first += QUERIES) {
                // queries before the first key see none of them
                if (from.position + min(first + QUERIES, from.rows) <= from.key_position) continue;
                const int valid = min(QUERIES, from.rows - first), first_row = from.row + first;
                auto own_row = [&](int i) { return first_row + i; };
                __syncthreads();
                load_rows<D>(q, qkv + head * D, stride, QUERIES, valid, own_row);
                load_rows<D>(d_o, d_out + head * D, out_stride, QUERIES, valid, own_row);
                if (threadIdx.x < QUERIES) {
                    size_t at = (size_t)(first_row + threadIdx.x) * shape.query_heads + head;
                    q_lse[threadIdx.x] = threadIdx.x < valid ? lse[at] : 0;
                    q_delta[threadIdx.x] = threadIdx.x < valid ? delta[at] : 0;
                }
                __syncthreads();
                float p[QUERIES / 8][4] = {}, ds[QUERIES / 8][4] = {};
                product_of_rows<D, QUERIES>(p, k + 16 * warp * (D + PAD), q);
                product_of_rows<D, QUERIES>(ds, v + 16 * warp * (D + PAD), d_o);
#pragma unroll
                for (int n = 0; n < QUERIES / 8; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        int query = 8 * n + 2 * t + i % 2, key = 16 * warp + g + 8 * (i / 2);
                        bool seen = query < valid && from.key_position + key <= from.position + first + query;
                        p[n][i] = seen ? expf(p[n][i] * scale - q_lse[query]) : 0;
                        ds[n][i] = p[n][i] * (ds[n][i] - q_delta[query]) * scale;
                    }
                product_with_rows<D, QUERIES>(d_v, p, d_o);
                product_with_rows<D, QUERIES>(d_k, ds, q);
            }
        }
    if (job.slot < 0) {
        bf16 *to = d_qkv + (size_t)(job.row + 16 * warp) * stride + (shape.query_heads + key_head) * D;
        store_rows<D>(to, stride, job.keys - 16 * warp, d_k, 1, 1);
        store_rows<D>(to + shape.kv_heads * D, stride, job.keys - 16 * warp, d_v, 1, 1);
        return;
    }
    float *to = workspace + ((size_t)job.slot * shape.kv_heads + key_head) * 2 * KEYS * D;
    for (int n = 0; n < D / 8; n++)
        for (int i = 0; i < 4; i++) {
            int at = (16 * warp + g + 8 * (i / 2)) * D + 8 * n + 2 * t + i % 2;
            to[at] = d_k[n][i];
            to[KEYS * D + at] = d_v[n][i];
        }
}

// Keys whose sums are in `slots` places of the workspace from `first_slot` on.
struct SharedKeys {
    int row, keys;
    int first_slot, slots;
};

// Adds up what the jobs of shared keys left. Grid: shared keys × key heads.
template <typename T>
__device__ void add_key_gradients(const SharedKeys *shared, const float *workspace, Shape shape, int dim, T *d_qkv) {
    const SharedKeys of = shared[blockIdx.x];
    const int key_head = blockIdx.y, stride = (shape.query_heads + 2 * shape.kv_heads) * dim;
    for (int i = threadIdx.x; i < 2 * of.keys * dim; i += blockDim.x) {
        int which = i / (of.keys * dim), key = i / dim % of.keys, column = i % dim;
        float sum = 0;
        for (int slot = of.first_slot; slot < of.first_slot + of.slots; slot++) {
            size_t place = ((size_t)slot * shape.kv_heads + key_head) * 2 + which;
            sum += workspace[(place * KEYS + key) * dim + column];
        }
        int head = shape.query_heads + which * shape.kv_heads + key_head;
        d_qkv[(size_t)(of.row + key) * stride + head * dim + column] = from_float<T>(sum);
    }
}

// Heads of any width up to 32·WIDEST, a warp for a row.
constexpr int WIDEST = 8;

// As `forward_tile`.
template <typename T>
__device__ void forward_rows(const T *qkv, const Span *spans, const Tile *tiles, Shape shape, int dim, float scale, T *out,
                             float *lse) {
    const Tile tile = tiles[blockIdx.x];
    const Span span = spans[tile.span];
    const int head = blockIdx.y, lane = threadIdx.x % 32;
    const int stride = (shape.query_heads + 2 * shape.kv_heads) * dim;
    const T *keys = qkv + (shape.query_heads + shape.key_head(head)) * dim, *values = keys + shape.kv_heads * dim;
    for (int i = threadIdx.x / 32; i < min(ROWS, span.rows - tile.first); i += WARPS) {
        const size_t row = span.row + tile.first + i;
        const T *q = qkv + row * stride + head * dim;
        const int last = span.before() + tile.first + i;
        float sums[WIDEST] = {}, highest = -INFINITE, total = 0;
        for (int first = 0; first <= last; first += 32) {
            const int position = first + lane;
            const size_t from = (size_t)span.key_row(min(position, last)) * stride;
            float score = position <= last ? dot(q, keys + from, dim) * scale : -INFINITE;
            float now = fmaxf(highest, warp_reduce<Max>(score)), factor = expf(highest - now);
            highest = now;
            float weight = expf(score - now);
            total = total * factor + warp_reduce<Sum>(weight);
            for (float &sum : sums) sum *= factor;
            add_weighted<WIDEST>(sums, weight, values + from, dim);
        }
        for (int j = 0; j < WIDEST; j++)
            if (lane + 32 * j < dim)
                out[(row * shape.query_heads + head) * dim + lane + 32 * j] = from_float<T>(sums[j] / total);
        if (lane == 0) lse[row * shape.query_heads + head] = highest + logf(total);
    }
}

// As `query_gradient_tile`.
template <typename T>
__device__ void query_gradient_rows(const T *qkv, const Span *spans, const Tile *tiles, Shape shape, int dim, float scale,
                                    const float *lse, const float *delta, const T *d_out, T *d_qkv) {
    const Tile tile = tiles[blockIdx.x];
    const Span span = spans[tile.span];
    const int head = blockIdx.y, lane = threadIdx.x % 32;
    const int stride = (shape.query_heads + 2 * shape.kv_heads) * dim;
    const T *keys = qkv + (shape.query_heads + shape.key_head(head)) * dim, *values = keys + shape.kv_heads * dim;
    for (int i = threadIdx.x / 32; i < min(ROWS, span.rows - tile.first); i += WARPS) {
        const size_t row = span.row + tile.first + i, of_head = row * shape.query_heads + head;
        const T *q = qkv + row * stride + head * dim, *d_o = d_out + of_head * dim;
        const int last = span.before() + tile.first + i;
        float sums[WIDEST] = {};
        for (int first = 0; first <= last; first += 32) {
            const int position = first + lane;
            const size_t from = (size_t)span.key_row(min(position, last)) * stride;
            float weight = position <= last ? expf(dot(q, keys + from, dim) * scale - lse[of_head]) : 0;
            float d_score = weight * (dot(d_o, values + from, dim) - delta[of_head]) * scale;
            add_weighted<WIDEST>(sums, d_score, keys + from, dim);
        }
        for (int j = 0; j < WIDEST; j++)
            if (lane + 32 * j < dim) d_qkv[row * stride + head * dim + lane + 32 * j] = from_float<T>(sums[j]);
    }
}

// As `key_gradient_job`.
template <typename T>
__device__ void key_gradient_rows(const T *qkv, const KeyJob *jobs, const Queries *queries, Shape shape, int dim, float scale,
                                  const float *lse, const float *delta, const T *d_out, T *d_qkv, float *workspace) {
    const KeyJob job = jobs[blockIdx.x];
    const int key_head = blockIdx.y, group = shape.query_heads / shape.kv_heads, lane = threadIdx.x % 32;
    const int stride = (shape.query_heads + 2 * shape.kv_heads) * dim, values = shape.kv_heads * dim;
    for (int key = threadIdx.x / 32; key < job.keys; key += WARPS) {
        const size_t columns = (size_t)(job.row + key) * stride + (shape.query_heads + key_head) * dim;
        const T *k = qkv + columns, *v = k + values;
        float d_k[WIDEST] = {}, d_v[WIDEST] = {};
        for (int item = job.first_query; item < job.first_query + job.queries; item++)
            for (int head = key_head * group; head < (key_head + 1) * group; head++) {
                const Queries from = queries[item];
                for (int first = 0; first < from.rows; first += 32) {
                    const int query = min(first + lane, from.rows - 1);
                    const size_t row = from.row + query, of_head = row * shape.query_heads + head;
                    const T *q = qkv + row * stride + head * dim, *d_o = d_out + of_head * dim;
                    bool seen = first + lane < from.rows && from.key_position + key <= from.position + query;
                    float weight = seen ? expf(dot(q, k, dim) * scale - lse[of_head]) : 0;
                    float d_score = weight * (dot(d_o, v, dim) - delta[of_head]) * scale;
                    add_weighted<WIDEST>(d_k, d_score, q, dim);
                    add_weighted<WIDEST>(d_v, weight, d_o, dim);
                }
            }
        float *to = workspace + ((size_t)job.slot * shape.kv_heads + key_head) * 2 * KEYS * dim + (size_t)key * dim;
        for (int j = 0; j < WIDEST; j++) {
            const int column = lane + 32 * j;
            if (column >= dim) continue;
            if (job.slot < 0) {
                d_qkv[columns + column] = from_float<T>(d_k[j]);
                d_qkv[columns + values + column] = from_float<T>(d_v[j]);
            } else {
                to[column] = d_k[j];
                to[(size_t)KEYS * dim + column] = d_v[j];
            }
        }
    }
}

#define OF_WIDTH(D)                                                                                                          \
    extern "C" __global__ void __launch_bounds__(32 * WARPS) attention_forward_##D(                                          \
        const bf16 *qkv, const Span *spans, const Tile *tiles, Shape shape, float scale, bf16 *out, float *lse) {            \
        forward_tile<D>(qkv, spans, tiles, shape, scale, out, lse);                                                          \
    }                                                                                                                        \
    extern "C" __global__ void __launch_bounds__(32 * WARPS)                                                                 \
        attention_query_gradient_##D(const bf16 *qkv, const Span *spans, const Tile *tiles, Shape shape, float scale,        \
                                     const float *lse, const float *delta, const bf16 *d_out, bf16 *d_qkv) {                 \
        query_gradient_tile<D>(qkv, spans, tiles, shape, scale, lse, delta, d_out, d_qkv);                                   \
    }                                                                                                                        \
    extern "C" __global__ void __launch_bounds__(32 * WARPS) attention_key_gradient_##D(                                     \
        const bf16 *qkv, const KeyJob *jobs, const Queries *queries, Shape shape, float scale, const float *lse,             \
        const float *delta, const bf16 *d_out, bf16 *d_qkv, float *workspace) {                                              \
        key_gradient_job<D>(qkv, jobs, queries, shape, scale, lse, delta, d_out, d_qkv, workspace);                          \
    }

OF_WIDTH(64)
OF_WIDTH(96)
OF_WIDTH(128)

#define OF_TYPE(T, NAME)                                                                                                     \
    extern "C" __global__ void attention_delta_##NAME(const T *out, const T *d_out, float *delta, uint64_t count, int dim) { \
        delta_of_rows(out, d_out, delta, count, dim);                                                                        \
    }                                                                                                                        \
    extern "C" __global__ void attention_add_key_gradients_##NAME(const SharedKeys *shared, const float *workspace,          \
                                                                  Shape shape, int dim, T *d_qkv) {                          \
        add_key_gradients(shared, workspace, shape, dim, d_qkv);                                                             \
    }                                                                                                                        \
    extern "C" __global__ void attention_forward_##NAME(const T *qkv, const Span *spans, const Tile *tiles, Shape shape,     \
                                                        int dim, float scale, T *out, float *lse) {                          \
        forward_rows(qkv, spans, tiles, shape, dim, scale, out, lse);                                                        \
    }                                                                                                                        \
    extern "C" __global__ void attention_query_gradient_##NAME(                                                              \
        const T *qkv, const Span *spans, const Tile *tiles, Shape shape, int dim, float scale, const float *lse,             \
        const float *delta, const T *d_out, T *d_qkv) {                                                                      \
        query_gradient_rows(qkv, spans, tiles, shape, dim, scale, lse, delta, d_out, d_qkv);                                 \
    }                                                                                                                        \
    extern "C" __global__ void attention_key_gradient_##NAME(                                                                \
        const T *qkv, const KeyJob *jobs, const Queries *queries, Shape shape, int dim, float scale, const float *lse,       \
        const float *delta, const T *d_out, T *d_qkv, float *workspace) {                                                    \
        key_gradient_rows(qkv, jobs, queries, shape, dim, scale, lse, delta, d_out, d_qkv, workspace);                       \
    }

OF_TYPE(float, f32)
OF_TYPE(bf16, bf16)
