// What the kernels share. It stands before the text of every kernel file, in place of the line that includes it.
//
// Kernels are compiled without any header of CUDA, since a machine that runs them may have none, and without contraction of
// products and sums (--fmad=false): an fmaf is where it is written, so that results do not depend on the compiler.
//
// In the tests a C++ compiler takes the same text, with EMULATOR defined; see emulator.h, which stands before it then.

#ifndef EMULATOR
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
#endif

// All lanes of a warp.
constexpr uint32_t WARP = 0xffffffff;

// The upper half of a float.
struct bf16 {
    uint16_t bits;
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __uint_as_float((uint32_t)x.bits << 16); }

// The nearest number of type T, of two equally near ones the even one; NaN stays NaN.
template <typename T> __device__ inline T from_float(float x);
template <> __device__ inline float from_float<float>(float x) { return x; }
template <> __device__ inline bf16 from_float<bf16>(float x) {
    uint32_t bits = __float_as_uint(x);
    bits = x != x ? bits | 0x00400000 : bits + 0x7fff + (bits >> 16 & 1);
    return bf16{(uint16_t)(bits >> 16)};
}

// Two numbers in a word, the first in its lower half, as fragments of matrices hold neighbours.
__device__ inline uint32_t pack_bf16(float low, float high) {
    return from_float<bf16>(low).bits | (uint32_t)from_float<bf16>(high).bits << 16;
}

// This thread among all threads of a grid in one dimension.
__device__ inline size_t thread_of_grid() { return (size_t)blockIdx.x * blockDim.x + threadIdx.x; }

// The column of this thread where blocks are of one row each in x and go through its columns in y.
__device__ inline int column_of_row() { return blockIdx.y * blockDim.x + threadIdx.x; }

// What reductions combine numbers with, and what changes no number then.
struct Sum {
    template <typename T> __device__ static T of(T a, T b) { return a + b; }
    template <typename T> __device__ static T neutral() { return T(0); }
};
// Of a number and NaN it is the number.
struct Max {
    __device__ static float of(float a, float b) { return fmaxf(a, b); }
    template <typename T> __device__ static T neutral() { return __uint_as_float(0xff800000); }
};

// The reduction over the lanes of a warp, in all of them.
template <typename Op, typename T> __device__ inline T warp_reduce(T x) {
    for (int distance = 16; distance > 0; distance /= 2) x = Op::of(x, __shfl_xor_sync(WARP, x, distance));
    return x;
}

// The reduction over the threads of a block of whole warps, in all of them, in an order that its size alone decides.
template <typename Op, typename T> __device__ inline T block_reduce(T x) {
    __shared__ T of_warps[32];
    int lane = threadIdx.x % 32;
    x = warp_reduce<Op>(x);
    // what an earlier reduction has left may be read until here
    __syncthreads();
    if (lane == 0) of_warps[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_reduce<Op>(lane < (int)blockDim.x / 32 ? of_warps[lane] : Op::template neutral<T>());
}

// A hash of 64 bits whose every output bit depends on every input bit: the step of the generator SplitMix64.
__device__ inline uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
}

// d += a · b on the tensor cores: a [16, 16] and b [16, 8] in bf16, d [16, 8] in f32, spread over the lanes of a warp as PTX
// defines for mma.m16n8k16. With g = lane / 4 and t = lane % 4, a lane holds of a the columns 2t, 2t + 1 of rows g and g + 8, then
// the columns 2t + 8, 2t + 9 of both; of b the rows 2t, 2t + 1, then 2t + 8, 2t + 9 of column g; of d the columns 2t, 2t + 1 of
// row g, then of row g + 8.
#ifndef EMULATOR
__device__ inline void mma_m16n8k16_bf16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline uint32_t shared_address(const void *at) { return (uint32_t)__cvta_generic_to_shared(at); }

// Matrices [8, 8] in bf16 from shared memory: lanes 8i to 8i + 7 give the addresses of the rows of matrix i, and lane l gets
// of each matrix the columns 2t, 2t + 1 of row g (with `trans`, the rows 2t, 2t + 1 of column g) with g = l / 4 and t = l % 4.
__device__ inline void ldmatrix_x2(uint32_t r[2], const bf16 *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}
__device__ inline void ldmatrix_x2_trans(uint32_t r[2], const bf16 *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}
__device__ inline void ldmatrix_x4(uint32_t r[4], const bf16 *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ inline void ldmatrix_x4_trans(uint32_t r[4], const bf16 *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
#else
inline void mma_m16n8k16_bf16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    struct Fragments {
        uint32_t a[4], b[2];
    } mine;
    memcpy(mine.a, a, sizeof mine.a);
    memcpy(mine.b, b, sizeof mine.b);
    const emulator::Values values = emulator::exchange("mma", WARP, mine);
    auto half = [](uint32_t word, int k) { return to_float(bf16{(uint16_t)(word >> 16 * (k % 2))}); };
    int lane = emulator::lane(), g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++) {
        int row = g + i / 2 * 8, column = 2 * t + i % 2;
        for (int k = 0; k < 16; k++) {
            uint32_t left = values.of<Fragments>(row % 8 * 4 + k % 8 / 2).a[row / 8 + k / 8 * 2];
            uint32_t right = values.of<Fragments>(column * 4 + k % 8 / 2).b[k / 8];
            d[i] = fmaf(half(left, k), half(right, k), d[i]);
        }
    }
}

inline void ldmatrix(uint32_t *r, const bf16 *row, int matrices, bool trans) {
    const emulator::Values values = emulator::exchange("ldmatrix", WARP, row);
    int lane = emulator::lane(), g = lane / 4, t = lane % 4;
    for (int i = 0; i < matrices; i++) {
        auto at = [&](int row, int column) { return (uint32_t)values.of<const bf16 *>(8 * i + row)[column].bits; };
        r[i] = trans ? at(2 * t, g) | at(2 * t + 1, g) << 16 : at(g, 2 * t) | at(g, 2 * t + 1) << 16;
    }
}
inline void ldmatrix_x2(uint32_t r[2], const bf16 *row) { ldmatrix(r, row, 2, false); }
inline void ldmatrix_x2_trans(uint32_t r[2], const bf16 *row) { ldmatrix(r, row, 2, true); }
inline void ldmatrix_x4(uint32_t r[4], const bf16 *row) { ldmatrix(r, row, 4, false); }
inline void ldmatrix_x4_trans(uint32_t r[4], const bf16 *row) { ldmatrix(r, row, 4, true); }
#endif
