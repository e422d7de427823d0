// Rotary position embedding, in Hugging Face's half-split layout.
#include "common.cuh"

// y = x [rows, stride] with the first `heads` heads of each row rotated; backwards with sign −1. A row of the table holds the
// cosines of a position, then its sines. A thread has a plane of a head, or a number behind the heads.
template <typename T>
__device__ void rotate(const T *x, T *y, const float *table, const uint32_t *positions, int stride, int heads, int dim,
                       float sign) {
    int half = dim / 2, column = column_of_row(), head = column / half, plane = column % half;
    size_t row = (size_t)blockIdx.x * stride;
    if (head >= heads) {
        int behind = column - heads * half + heads * dim;
        if (behind < stride) y[row + behind] = x[row + behind];
        return;
    }
    const float *cosines = table + (size_t)positions[blockIdx.x] * dim;
    float c = cosines[plane], s = sign * cosines[half + plane];
    size_t a = row + head * dim + plane, b = a + half;
    float p = to_float(x[a]), q = to_float(x[b]);
    y[a] = from_float<T>(p * c - q * s);
    y[b] = from_float<T>(q * c + p * s);
}

extern "C" __global__ void rope_f32(const float *x, float *y, const float *table, const uint32_t *positions, int stride,
                                    int heads, int dim, float sign) {
    rotate(x, y, table, positions, stride, heads, dim, sign);
}
extern "C" __global__ void rope_bf16(const bf16 *x, bf16 *y, const float *table, const uint32_t *positions, int stride,
                                     int heads, int dim, float sign) {
    rotate(x, y, table, positions, stride, heads, dim, sign);
}
