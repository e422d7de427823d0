// Rows of a table by their numbers: the token embedding, and the rows that go to the head.
#include "common.cuh"

// to[i] = table[rows[i]], in blocks of one row each.
template <typename T> __device__ void gather(const T *table, const uint32_t *rows, float *to, int width) {
    const T *from = table + (size_t)rows[blockIdx.x] * width;
    to += (size_t)blockIdx.x * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) to[i] = to_float(from[i]);
}

extern "C" __global__ void gather_f32(const float *table, const uint32_t *rows, float *to, int width) {
    gather(table, rows, to, width);
}
extern "C" __global__ void gather_bf16(const bf16 *table, const uint32_t *rows, float *to, int width) {
    gather(table, rows, to, width);
}

// table[rows[g]] += from[order[i]] for i from starts[g] to starts[g + 1] - 1, one after the other; in blocks of one row of
// the table.
extern "C" __global__ void scatter_add(const float *from, const uint32_t *order, const uint32_t *starts,
                                       const uint32_t *rows, float *table, int width) {
    uint32_t first = starts[blockIdx.x], end = starts[blockIdx.x + 1];
    table += (size_t)rows[blockIdx.x] * width;
    for (int column = threadIdx.x; column < width; column += blockDim.x) {
        float sum = table[column];
        for (uint32_t i = first; i < end; i++) sum += from[(size_t)order[i] * width + column];
        table[column] = sum;
    }
}
