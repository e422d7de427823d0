// Root-mean-square normalisation: y = x · r · w with r = 1/sqrt(mean(x²) + eps). Rows are in blocks of one row each.
#include "common.cuh"

template <typename T> __device__ void scale_row(const float *x, const float *w, float r, T *y, int width) {
    for (int i = threadIdx.x; i < width; i += blockDim.x) y[i] = from_float<T>(x[i] * r * w[i]);
}

template <typename T> __device__ void forward(const float *x, const float *w, float eps, T *y, float *r, int width) {
    x += (size_t)blockIdx.x * width;
    float squares = 0;
    for (int i = threadIdx.x; i < width; i += blockDim.x) squares = fmaf(x[i], x[i], squares);
    float inverse = 1 / sqrtf(block_reduce<Sum>(squares) / width + eps);
    if (threadIdx.x == 0) r[blockIdx.x] = inverse;
    scale_row(x, w, inverse, y + (size_t)blockIdx.x * width, width);
}

template <typename T> __device__ void recompute(const float *x, const float *w, const float *r, T *y, int width) {
    size_t start = (size_t)blockIdx.x * width;
    scale_row(x + start, w, r[blockIdx.x], y + start, width);
}

// dx += r · (dy · w − x · r² · mean(dy · w · x)).
template <typename T>
__device__ void backward(const float *x, const float *w, const float *r, const T *dy, float *dx, int width) {
    size_t start = (size_t)blockIdx.x * width;
    x += start, dy += start, dx += start;
    float sum = 0;
    for (int i = threadIdx.x; i < width; i += blockDim.x) sum = fmaf(to_float(dy[i]) * w[i], x[i], sum);
    float inverse = r[blockIdx.x], s = block_reduce<Sum>(sum) * inverse * inverse * inverse / width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) dx[i] += to_float(dy[i]) * w[i] * inverse - x[i] * s;
}

// partial[b] = Σ dy · x · r over the rows of block b in y, `rows_of_block` each; a thread has a column.
template <typename T>
__device__ void gain(const float *x, const float *r, const T *dy, float *partial, int rows, int rows_of_block, int width) {
    int column = thread_of_grid(), first = blockIdx.y * rows_of_block, end = min(first + rows_of_block, rows);
    if (column >= width) return;
    float sum = 0;
    for (int row = first; row < end; row++) {
        size_t i = (size_t)row * width + column;
        sum += to_float(dy[i]) * x[i] * r[row];
    }
    partial[(size_t)blockIdx.y * width + column] = sum;
}

// dw += Σ partial[b], in order; a thread has a column.
extern "C" __global__ void rmsnorm_add_gain(const float *partial, float *dw, int parts, int width) {
    int column = thread_of_grid();
    if (column >= width) return;
    float sum = dw[column];
    for (int part = 0; part < parts; part++) sum += partial[(size_t)part * width + column];
    dw[column] = sum;
}

#define OF_TYPE(T, NAME)                                                                                                       \
    extern "C" __global__ void rmsnorm_forward_##NAME(const float *x, const float *w, float eps, T *y, float *r, int width) {  \
        forward(x, w, eps, y, r, width);                                                                                       \
    }                                                                                                                          \
    extern "C" __global__ void rmsnorm_recompute_##NAME(const float *x, const float *w, const float *r, T *y, int width) {     \
        recompute(x, w, r, y, width);                                                                                          \
    }                                                                                                                          \
    extern "C" __global__ void rmsnorm_backward_##NAME(const float *x, const float *w, const float *r, const T *dy, float *dx, \
                                                       int width) {                                                            \
        backward(x, w, r, dy, dx, width);                                                                                      \
    }                                                                                                                          \
    extern "C" __global__ void rmsnorm_gain_##NAME(const float *x, const float *r, const T *dy, float *partial, int rows,      \
                                                   int rows_of_block, int width) {                                             \
        gain(x, r, dy, partial, rows, rows_of_block, width);                                                                   \
    }

OF_TYPE(float, f32)
OF_TYPE(bf16, bf16)
