// The norm of a gradient, and steps of AdamW.
#include "common.cuh"

// partial[b] = Σ x² over the numbers of block b, `numbers_of_block` each, in f64.
extern "C" __global__ void sum_of_squares(const float *x, double *partial, size_t count, size_t numbers_of_block) {
    size_t first = blockIdx.x * numbers_of_block, end = min(first + numbers_of_block, count);
    double sum = 0;
    for (size_t i = first + threadIdx.x; i < end; i += blockDim.x) sum = fma((double)x[i], (double)x[i], sum);
    sum = block_reduce<Sum>(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// out = Σ partial, in one block.
extern "C" __global__ void sum_of_parts(const double *partial, double *out, size_t count) {
    double sum = 0;
    for (size_t i = threadIdx.x; i < count; i += blockDim.x) sum += partial[i];
    sum = block_reduce<Sum>(sum);
    if (threadIdx.x == 0) *out = sum;
}

// The factors of one step, as the host writes them.
struct Constants {
    float beta1, beta2, rest1, rest2, rate, eps, keep, scale;
};

// The weight after a step, in f32; updates the moments.
__device__ inline float step(float w, float gradient, float &m, float &v, const Constants &c) {
    float g = gradient * c.scale;
    m = fmaf(c.beta1, m, c.rest1 * g);
    v = fmaf(c.beta2, v, c.rest2 * g * g);
    return fmaf(c.keep, w, -c.rate * m / (sqrtf(v) + c.eps));
}

__device__ inline void store(float *to, float w, size_t, uint64_t) { *to = w; }
// Rounds up or down with the probability that makes the mean right. What decides is a hash of the seed and the weight's number.
__device__ inline void store(bf16 *to, float w, size_t number, uint64_t seed) {
    uint32_t bits = __float_as_uint(w);
    bool finite = (bits & 0x7f800000) != 0x7f800000;
    if (finite) bits += mix(seed ^ mix(number)) & 0xffff;
    *to = finite ? bf16{(uint16_t)(bits >> 16)} : from_float<bf16>(w);
}

// A step of AdamW with moments in f32. Sets the gradient to zero. A thread has a weight.
template <typename W>
__device__ void adamw(W *weights, float *gradient, float *first, float *second, const Constants &constants, uint64_t seed,
                      size_t count) {
    size_t i = thread_of_grid();
    if (i >= count) return;
    store(&weights[i], step(to_float(weights[i]), gradient[i], first[i], second[i], constants), i, seed);
    gradient[i] = 0;
}

constexpr int BLOCK = 256;

// A code of 256 numbers in [−1, 1] or [0, 1], as the host writes it.
struct Code {
    // The numbers, ascending.
    float values[256];
    // Where magnitudes change from so many codes from that of 0 to one more.
    float thresholds[256];
};

// The code of the nearest number; a magnitude of a block is the largest of its values.
__device__ inline uint8_t encode(float value, float largest, const Code &code, int zero) {
    float share = fabsf(value) / (largest > 0 ? largest : 1);
    int steps = 0;
    for (int bit = 128; bit > 0; bit /= 2)
        if (share > code.thresholds[steps + bit - 1]) steps += bit;
    return (uint8_t)min(max(zero + (value < 0 ? -steps : steps), 0), 255);
}

// A step of AdamW with moments in 8 bits. Sets the gradient to zero. A block has blocks_of_block blocks of 256 weights, one
// after the other, and a thread a weight of each.
template <typename W>
__device__ void adamw8bit(W *weights, float *gradient, uint8_t *m_codes, float *m_largest, uint8_t *v_codes, float *v_largest,
                          const Code *codes, const Constants &constants, uint64_t seed, int zero, int blocks_of_block,
                          size_t count) {
    __shared__ Code of_m, of_v;
    of_m.values[threadIdx.x] = codes[0].values[threadIdx.x];
    of_m.thresholds[threadIdx.x] = codes[0].thresholds[threadIdx.x];
    of_v.values[threadIdx.x] = codes[1].values[threadIdx.x];
    of_v.thresholds[threadIdx.x] = codes[1].thresholds[threadIdx.x];
    __syncthreads();
    for (int j = 0; j < blocks_of_block; j++) {
        size_t block = (size_t)blockIdx.x * blocks_of_block + j, i = block * BLOCK + threadIdx.x;
        if (block * BLOCK >= count) return;
        float m = 0, v = 0;
        if (i < count) {
            m = of_m.values[m_codes[i]] * m_largest[block];
            v = of_v.values[v_codes[i]] * v_largest[block];
            store(&weights[i], step(to_float(weights[i]), gradient[i], m, v, constants), i, seed);
            gradient[i] = 0;
        }
        // all have read the largest magnitudes when the first of these is known
        float largest_m = block_reduce<Max>(fabsf(m)), largest_v = block_reduce<Max>(fabsf(v));
        if (i < count) {
            m_codes[i] = encode(m, largest_m, of_m, zero);
            // a second moment that becomes 0 beside a first one that does not would make a step of m/eps
            v_codes[i] = max((int)encode(v, largest_v, of_v, 0), v > 0 ? 1 : 0);
        }
        if (threadIdx.x == 0) m_largest[block] = largest_m, v_largest[block] = largest_v;
    }
}

#define OF_TYPE(W, NAME)                                                                                                    \
    extern "C" __global__ void adamw_##NAME(W *weights, float *gradient, float *first, float *second, Constants constants,  \
                                            uint64_t seed, size_t count) {                                                  \
        adamw(weights, gradient, first, second, constants, seed, count);                                                    \
    }                                                                                                                       \
    extern "C" __global__ void adamw8bit_##NAME(W *weights, float *gradient, uint8_t *m_codes, float *m_largest,            \
                                                uint8_t *v_codes, float *v_largest, const Code *codes,                      \
                                                Constants constants, uint64_t seed, int zero, int blocks_of_block,          \
                                                size_t count) {                                                             \
        adamw8bit(weights, gradient, m_codes, m_largest, v_codes, v_largest, codes, constants, seed, zero,                  \
                  blocks_of_block, count);                                                                                  \
    }

OF_TYPE(float, f32)
OF_TYPE(bf16, bf16)
