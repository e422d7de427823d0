// Inverted dropout with masks that a hash gives: an element's fate depends on the seed, the key of its row and its column.
#include "common.cuh"

__device__ inline float kept(float x, uint64_t key, int column, uint64_t seed, uint64_t threshold, float scale) {
    return mix(mix(seed ^ mix(key)) + column) >> 32 >= threshold ? x * scale : 0;
}

// y = x · mask / (1 − rate).
template <typename T>
__device__ void forward(const T *x, const uint64_t *keys, T *y, uint64_t seed, uint64_t threshold, float scale, int width) {
    int column = column_of_row();
    if (column >= width) return;
    size_t i = (size_t)blockIdx.x * width + column;
    y[i] = from_float<T>(kept(to_float(x[i]), keys[blockIdx.x], column, seed, threshold, scale));
}

// dx += dy · mask / (1 − rate).
template <typename T>
__device__ void backward(const T *dy, const uint64_t *keys, T *dx, uint64_t seed, uint64_t threshold, float scale,
                         int width) {
    int column = column_of_row();
    if (column >= width) return;
    size_t i = (size_t)blockIdx.x * width + column;
    float added = kept(to_float(dy[i]), keys[blockIdx.x], column, seed, threshold, scale);
    dx[i] = from_float<T>(to_float(dx[i]) + added);
}

#define OF_TYPE(T, NAME)                                                                                               \
    extern "C" __global__ void dropout_forward_##NAME(const T *x, const uint64_t *keys, T *y, uint64_t seed,           \
                                                      uint64_t threshold, float scale, int width) {                    \
        forward(x, keys, y, seed, threshold, scale, width);                                                            \
    }                                                                                                                  \
    extern "C" __global__ void dropout_backward_##NAME(const T *dy, const uint64_t *keys, T *dx, uint64_t seed,        \
                                                       uint64_t threshold, float scale, int width) {                   \
        backward(dy, keys, dx, seed, threshold, scale, width);                                                         \
    }

OF_TYPE(float, f32)
OF_TYPE(bf16, bf16)
