// Log-probabilities of given tokens from rows of logits, in f32, and what the gradient needs of their softmax. Rows are in
// blocks of one row each.
#include "common.cuh"

// The maximum of a row, and the sum of exp(logit − maximum).
__device__ inline float2 log_sum_exp(const float *row, int vocab) {
    float highest = Max::neutral<float>(), sum = 0;
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) highest = fmaxf(highest, row[i]);
    highest = block_reduce<Max>(highest);
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) sum += expf(row[i] - highest);
    return make_float2(highest, block_reduce<Sum>(sum));
}

extern "C" __global__ void logprob_forward(const float *logits, const uint32_t *targets, float *logps, int vocab) {
    const float *row = logits + (size_t)blockIdx.x * vocab;
    float2 softmax = log_sum_exp(row, vocab);
    if (threadIdx.x == 0) logps[blockIdx.x] = row[targets[blockIdx.x]] - softmax.x - logf(softmax.y);
}

// Besides, excess[v] = exp(logit − maximum), less the sum of these at the target, and one over that sum. The excess may take the
// place of the logits.
template <typename T>
__device__ void with_excess(const float *logits, const uint32_t *targets, T *excess, float *logps, float *inverse_sums, int vocab) {
    const float *row = logits + (size_t)blockIdx.x * vocab;
    excess += (size_t)blockIdx.x * vocab;
    float2 softmax = log_sum_exp(row, vocab);
    int target = targets[blockIdx.x];
    if (threadIdx.x == 0) {
        logps[blockIdx.x] = row[target] - softmax.x - logf(softmax.y);
        inverse_sums[blockIdx.x] = 1 / softmax.y;
    }
    // the target's logit is read until here
    __syncthreads();
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
        float e = expf(row[i] - softmax.x);
        excess[i] = from_float<T>(i == target ? e - softmax.y : e);
    }
}

// scaled = rows · −d · inverse_sum, which may be in place.
template <typename T>
__device__ void scale(const T *rows, const float *d_logps, const float *inverse_sums, T *scaled, int width) {
    size_t start = (size_t)blockIdx.x * width;
    float factor = -d_logps[blockIdx.x] * inverse_sums[blockIdx.x];
    for (int i = threadIdx.x; i < width; i += blockDim.x)
        scaled[start + i] = from_float<T>(to_float(rows[start + i]) * factor);
}

#define OF_TYPE(T, NAME)                                                                                                   \
    extern "C" __global__ void logprob_excess_##NAME(const float *logits, const uint32_t *targets, T *excess, float *logps, \
                                                     float *inverse_sums, int vocab) {                                     \
        with_excess(logits, targets, excess, logps, inverse_sums, vocab);                                                  \
    }                                                                                                                      \
    extern "C" __global__ void logprob_scale_##NAME(const T *rows, const float *d_logps, const float *inverse_sums,        \
                                                    T *scaled, int width) {                                                \
        scale(rows, d_logps, inverse_sums, scaled, width);                                                                 \
    }

OF_TYPE(float, f32)
OF_TYPE(bf16, bf16)
