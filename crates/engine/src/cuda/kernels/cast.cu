// Numbers in another type.
#include "common.cuh"

template <typename From, typename To> __device__ void cast(const From *from, To *to, size_t count) {
    size_t i = thread_of_grid();
    if (i < count) to[i] = from_float<To>(to_float(from[i]));
}

extern "C" __global__ void cast_f32_bf16(const float *from, bf16 *to, size_t count) { cast(from, to, count); }
extern "C" __global__ void cast_bf16_f32(const bf16 *from, float *to, size_t count) { cast(from, to, count); }
