// Numbers one by one.
#include "common.cuh"

template <typename From, typename To> __device__ void convert(const From *from, To *to, size_t count) {
    size_t i = thread_of_grid();
    if (i < count) to[i] = from_float<To>(to_float(from[i]));
}

template <typename T> __device__ void add(const T *from, float *to, size_t count) {
    size_t i = thread_of_grid();
    if (i < count) to[i] += to_float(from[i]);
}

extern "C" __global__ void clear_f32(float *x, size_t count) {
    size_t i = thread_of_grid();
    if (i < count) x[i] = 0;
}
extern "C" __global__ void convert_f32_f32(const float *from, float *to, size_t count) { convert(from, to, count); }
extern "C" __global__ void convert_f32_bf16(const float *from, bf16 *to, size_t count) { convert(from, to, count); }
extern "C" __global__ void convert_bf16_f32(const bf16 *from, float *to, size_t count) { convert(from, to, count); }
extern "C" __global__ void convert_bf16_bf16(const bf16 *from, bf16 *to, size_t count) { convert(from, to, count); }
extern "C" __global__ void add_f32(const float *from, float *to, size_t count) { add(from, to, count); }
extern "C" __global__ void add_bf16(const bf16 *from, float *to, size_t count) { add(from, to, count); }
