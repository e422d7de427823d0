// The gated feed-forward activation: y = silu(gate) · up, silu(g) = g · σ(g). A row of gate_up holds gate, then up. A
// thread has an element of y.
#include "common.cuh"

__device__ inline float sigmoid(float x) { return 1 / (1 + expf(-x)); }

template <typename T> __device__ void forward(const T *gate_up, T *y, int width) {
    int column = column_of_row();
    if (column >= width) return;
    size_t start = (size_t)blockIdx.x * width;
    const T *of_y = gate_up + 2 * start + column;
    float gate = to_float(of_y[0]), up = to_float(of_y[width]);
    y[start + column] = from_float<T>(gate * sigmoid(gate) * up);
}

// Replaces gate_up by its gradient, and writes y.
template <typename T> __device__ void backward(T *gate_up, const T *dy, T *y, int width) {
    int column = column_of_row();
    if (column >= width) return;
    size_t start = (size_t)blockIdx.x * width;
    T *of_y = gate_up + 2 * start + column;
    float gate = to_float(of_y[0]), up = to_float(of_y[width]), d = to_float(dy[start + column]);
    float s = sigmoid(gate), silu = gate * s;
    of_y[0] = from_float<T>(d * up * (s + silu * (1 - s)));
    of_y[width] = from_float<T>(d * silu);
    y[start + column] = from_float<T>(silu * up);
}

extern "C" __global__ void swiglu_forward_f32(const float *gate_up, float *y, int width) {
    forward(gate_up, y, width);
}
extern "C" __global__ void swiglu_forward_bf16(const bf16 *gate_up, bf16 *y, int width) {
    forward(gate_up, y, width);
}
extern "C" __global__ void swiglu_backward_f32(float *gate_up, const float *dy, float *y, int width) {
    backward(gate_up, dy, y, width);
}
extern "C" __global__ void swiglu_backward_bf16(bf16 *gate_up, const bf16 *dy, bf16 *y, int width) {
    backward(gate_up, dy, y, width);
}
