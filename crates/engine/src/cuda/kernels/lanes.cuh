// Attention by warps in which each lane has a key (or a query) of 32, and then some columns of the sum.

#define INFINITE __uint_as_float(0x7f800000)

template <typename T> __device__ float dot(const T *a, const T *b, int dim) {
    float sum = 0;
    for (int i = 0; i < dim; i++) sum = fmaf(to_float(a[i]), to_float(b[i]), sum);
    return sum;
}

// sums += Σ weight·row over the 32 rows that the lanes have, whose numbers start at `row`; a lane without one has weight 0. Column
// `lane + 32·i` of the sum is in sums[i].
template <int WIDEST, typename T> __device__ void add_weighted(float sums[WIDEST], float weight, const T *row, int dim) {
    int lane = threadIdx.x % 32;
    for (int other = 0; other < 32; other++) {
        float w = __shfl_sync(WARP, weight, other);
        uint64_t at = __shfl_sync(WARP, (uint64_t)row, other);
        if (w == 0) continue;
        for (int i = 0; i < WIDEST; i++)
            if (lane + 32 * i < dim) sums[i] = fmaf(w, to_float(((const T *)at)[lane + 32 * i]), sums[i]);
    }
}
