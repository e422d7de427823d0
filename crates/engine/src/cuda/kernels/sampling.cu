// The next token of each sequence, chosen from a row of logits. Rows are in blocks of one row each.
//
// Logits become weights in [0, 1], the likeliest token's being 1; the bits of such floats are in the order of the floats.
// Nothing is sorted: a search by bits finds the weight at which the tokens down to it, the likeliest first, reach a number or
// a sum.
#include "common.cuh"

// How a row's token is chosen, as the host writes it. Temperature 0 takes the likeliest token, and the first of equals.
struct Choice {
    float temperature, top_p, min_p;
    // In [0, 1): where, in the sum of all eligible weights, the token is.
    float uniform;
};

constexpr uint32_t ONE = 0x3f800000;
// In place of a token where a logit is not a number.
constexpr uint32_t NONE = 0xffffffff;

// The tokens whose weights are above `lowest`, and the first `ties` of those whose weight that is.
struct Eligible {
    uint32_t lowest;
    int ties;
};

// The number of weights for which `is` holds; in all threads.
template <typename Is> __device__ int count(const float *weights, int vocab, Is is) {
    int number = 0;
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) number += is(__float_as_uint(weights[i])) ? 1 : 0;
    return block_reduce<Sum>(number);
}

// The sum of the eligible weights from `from` on; in all threads.
__device__ inline float sum(const float *weights, int vocab, Eligible eligible, uint32_t from) {
    float total = 0;
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
        uint32_t bits = __float_as_uint(weights[i]);
        if (bits >= from && bits > eligible.lowest) total += weights[i];
    }
    total = block_reduce<Sum>(total);
    return from <= eligible.lowest ? total + eligible.ties * __uint_as_float(eligible.lowest) : total;
}

// The largest weight from which on `reached` holds, or the smallest of all.
template <typename Reached> __device__ uint32_t search(Reached reached) {
    uint32_t found = 0;
    for (uint32_t bit = 1u << 29; bit > 0; bit /= 2)
        if ((found | bit) <= ONE && reached(found | bit)) found |= bit;
    return found;
}

// The place of the token that is number `rank` of those with a weight, in the order of their places; block-wide, to `token`.
__device__ inline void place_of(const float *weights, int vocab, uint32_t weight, int rank, uint32_t *token) {
    __shared__ int counts[1024];
    int segment = (vocab + blockDim.x - 1) / blockDim.x;
    int first = min((int)threadIdx.x * segment, vocab), end = min(first + segment, vocab), mine = 0;
    for (int i = first; i < end; i++) mine += __float_as_uint(weights[i]) == weight ? 1 : 0;
    counts[threadIdx.x] = mine;
    __syncthreads();
    for (int thread = 0; thread < (int)threadIdx.x; thread++) rank -= counts[thread];
    if (rank < 0 || rank >= mine) return;
    for (int i = first; i < end; i++)
        if (__float_as_uint(weights[i]) == weight && rank-- == 0) *token = i;
}

// tokens [rows]; the logits are used up. top_k[row] is the number of likeliest tokens that are eligible, 0 for all.
extern "C" __global__ void sampling_choose(float *logits, const Choice *choices, const uint32_t *top_k, uint32_t *tokens,
                                           int vocab) {
    float *weights = logits + (size_t)blockIdx.x * vocab;
    const Choice choice = choices[blockIdx.x];
    float highest = Max::neutral<float>();
    int faults = 0;
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
        highest = fmaxf(highest, weights[i]);
        faults += weights[i] != weights[i] ? 1 : 0;
    }
    highest = block_reduce<Max>(highest);
    if (block_reduce<Sum>(faults) > 0) {
        if (threadIdx.x == 0) tokens[blockIdx.x] = NONE;
        return;
    }
    bool greedy = choice.temperature == 0;
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
        float below = weights[i] - highest;
        weights[i] = greedy ? (below == 0 ? 1 : 0) : expf(below / choice.temperature);
    }
    // the weights of others are read from here on
    __syncthreads();
    if (greedy) return place_of(weights, vocab, ONE, 0, &tokens[blockIdx.x]);

    Eligible eligible = {0, 0};
    auto ties_at = [&](uint32_t weight) {
        return weight == eligible.lowest ? eligible.ties : count(weights, vocab, [=](uint32_t w) { return w == weight; });
    };
    int k = top_k[blockIdx.x];
    if (k > 0 && k < vocab) {
        auto from = [&](uint32_t weight) { return count(weights, vocab, [=](uint32_t w) { return w >= weight; }); };
        uint32_t lowest = search([&](uint32_t weight) { return from(weight) >= k; });
        eligible = {lowest, k - from(lowest + 1)};
    }
    if (choice.top_p < 1) {
        float share = choice.top_p * sum(weights, vocab, eligible, 0);
        uint32_t lowest = search([&](uint32_t weight) { return sum(weights, vocab, eligible, weight) >= share; });
        float above = sum(weights, vocab, eligible, lowest + 1);
        int needed = (int)ceilf((share - above) / __uint_as_float(lowest));
        eligible = {lowest, min(max(needed, 1), ties_at(lowest))};
    }
    uint32_t least = __float_as_uint(choice.min_p);
    if (eligible.lowest < least) eligible = {least, count(weights, vocab, [=](uint32_t w) { return w == least; })};

    float place = choice.uniform * sum(weights, vocab, eligible, 0);
    uint32_t weight = search([&](uint32_t weight) { return sum(weights, vocab, eligible, weight) >= place; });
    float above = sum(weights, vocab, eligible, weight + 1);
    int rank = (int)((place - above) / __uint_as_float(weight));
    place_of(weights, vocab, weight, min(max(rank, 0), ties_at(weight) - 1), &tokens[blockIdx.x]);
}
