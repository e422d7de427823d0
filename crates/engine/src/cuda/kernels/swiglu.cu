// The gated feed-forward activation: y = silu(gate) · up, silu(g) = g · σ(g). A row of gate_up holds gate, then up; a thread
// has an element of y.
#include "common.cuh"

__device__ inline float sigmoid(float x) { return 1 / (1 + expf(-x)); }

template <typename T> __device__ void forward(const T *gate_up, T *y, int width, size_t count) {
    size_t i = thread_of_grid();
    if (i >= count) return;
    const T *row = gate_up + i / width * 2 * width + i % width;
    float gate = to_float(row[0]), up = to_float(row[width]);
    y[i] = from_float<T>(gate * sigmoid(gate) * up);
}

// Replaces gate_up by its gradient, and dy by y.
template <typename T> __device__ void backward(T *gate_up, T *dy, int width, size_t count) {
    size_t i = thread_of_grid();
    if (i >= count) return;
    T *row = gate_up + i / width * 2 * width + i % width;
    float gate = to_float(row[0]), up = to_float(row[width]), d = to_float(dy[i]);
    float s = sigmoid(gate), silu = gate * s;
    row[0] = from_float<T>(d * up * (s + silu * (1 - s)));
    row[width] = from_float<T>(d * silu);
    dy[i] = from_float<T>(silu * up);
}

extern "C" __global__ void swiglu_forward_f32(const float *gate_up, float *y, int width, size_t count) {
    forward(gate_up, y, width, count);
}
extern "C" __global__ void swiglu_forward_bf16(const bf16 *gate_up, bf16 *y, int width, size_t count) {
    forward(gate_up, y, width, count);
}
extern "C" __global__ void swiglu_backward_f32(float *gate_up, float *dy, int width, size_t count) {
    backward(gate_up, dy, width, count);
}
extern "C" __global__ void swiglu_backward_bf16(bf16 *gate_up, bf16 *dy, int width, size_t count) {
    backward(gate_up, dy, width, count);
}
