// Rotary position embedding, in Hugging Face's half-split layout.
#include "common.cuh"

// Rotates the first `heads` heads of rows [rows, stride], in place; backwards with sign −1. A row of the table holds the
// cosines of a position, then its sines. A thread has a plane of a head.
template <typename T>
__device__ void rotate(T *x, const float *table, const uint32_t *positions, int stride, int heads, int dim, float sign) {
    int half = dim / 2, column = column_of_row(), head = column / half, plane = column % half;
    if (head >= heads) return;
    const float *cosines = table + (size_t)positions[blockIdx.x] * dim;
    float c = cosines[plane], s = sign * cosines[half + plane];
    T *a = x + (size_t)blockIdx.x * stride + head * dim + plane, *b = a + half;
    float p = to_float(*a), q = to_float(*b);
    *a = from_float<T>(p * c - q * s);
    *b = from_float<T>(q * c + p * s);
}

extern "C" __global__ void rope_f32(float *x, const float *table, const uint32_t *positions, int stride, int heads, int dim,
                                    float sign) {
    rotate(x, table, positions, stride, heads, dim, sign);
}
extern "C" __global__ void rope_bf16(bf16 *x, const float *table, const uint32_t *positions, int stride, int heads, int dim,
                                     float sign) {
    rotate(x, table, positions, stride, heads, dim, sign);
}
