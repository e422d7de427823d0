// Runs CUDA C++ kernels on the CPU, for tests. It stands before the text of a kernel file, which a C++ compiler then takes.
//
// The threads of a block are fibers of one thread of the system, and blocks come one after the other. A fiber runs until it
// waits for others, at a barrier of its block or in an exchange of its warp; the order of threads and blocks can be reversed,
// and results that then differ tell of a race. What cannot go on (a barrier that some threads leave out, a lane that an
// exchange names and that is not there) ends the launch with a message.
#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <ucontext.h>
#include <utility>
#include <vector>

#define EMULATOR
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// in a function, static besides; the array of unknown size that has the block's own bytes is `shared`
#define __shared__ thread_local
#define __restrict__ __restrict

using std::max;
using std::min;

constexpr unsigned SHARED_BYTES = 227 * 1024, GUARD = 1024;
thread_local __align__(16) char shared[SHARED_BYTES + GUARD];

namespace emulator {

struct Index {
    unsigned x, y, z;
};

// How a kernel is launched, as the host writes it.
struct Launch {
    Index grid, block;
    unsigned shared_bytes;
    unsigned reverse;
};

constexpr size_t STACK = 256 << 10;
constexpr size_t VALUE = 64;

struct Thread {
    Index index;
    unsigned number;
    ucontext_t start;
    jmp_buf at;
    std::unique_ptr<char[]> stack;
    bool started, finished;
    // What it waits in, or null; of an exchange the lanes of its warp that take part.
    const char *wait;
    uint32_t mask;
    char value[VALUE];
};

struct Warp {
    // What the lanes gave to the last exchange.
    char values[32][VALUE];
};

constexpr const char *BARRIER = "__syncthreads";

// A block, and how to get from its threads to what runs them.
struct Block {
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::function<void()> body;
    jmp_buf scheduler;
    std::string failure;
};

thread_local Block block;
thread_local Thread *current;
thread_local Index block_index, block_size, grid_size;

inline int lane() { return current->number % 32; }

inline void run() {
    block.body();
    current->finished = true;
    _longjmp(block.scheduler, 1);
}

inline void wait(const char *what, uint32_t mask) {
    current->wait = what;
    current->mask = mask;
    if (_setjmp(current->at) == 0) _longjmp(block.scheduler, 1);
}

// Runs a thread until it waits or ends.
inline void resume(Thread &thread) {
    current = &thread;
    if (_setjmp(block.scheduler) != 0) return;
    if (thread.started) _longjmp(thread.at, 1);
    thread.started = true;
    setcontext(&thread.start);
}

// Lets threads go on that have waited for each other; false where there are none.
inline bool release() {
    auto &threads = block.threads;
    auto in_barrier = [](const Thread &thread) { return thread.wait == BARRIER; };
    if (std::all_of(threads.begin(), threads.end(), in_barrier)) {
        for (Thread &thread : threads) thread.wait = nullptr;
        return true;
    }
    bool released = false;
    for (size_t first = 0; first < threads.size(); first += 32) {
        size_t lanes = std::min<size_t>(32, threads.size() - first);
        for (size_t i = 0; i < lanes; i++) {
            Thread &thread = threads[first + i];
            const char *what = thread.wait;
            uint32_t mask = thread.mask;
            if (what == nullptr || what == BARRIER) continue;
            bool complete = mask >> i & 1;
            for (size_t j = 0; j < 32 && complete; j++)
                if (mask >> j & 1) {
                    Thread *other = j < lanes ? &threads[first + j] : nullptr;
                    complete = other && other->wait && strcmp(other->wait, what) == 0 && other->mask == mask;
                }
            if (!complete) continue;
            released = true;
            for (size_t j = 0; j < lanes; j++)
                if (mask >> j & 1) {
                    memcpy(block.warps[first / 32].values[j], threads[first + j].value, VALUE);
                    threads[first + j].wait = nullptr;
                }
        }
    }
    return released;
}

inline void run_block(bool reverse) {
    auto &threads = block.threads;
    for (Thread &thread : threads) {
        thread.started = thread.finished = false;
        thread.wait = nullptr;
        getcontext(&thread.start);
        thread.start.uc_stack.ss_sp = thread.stack.get();
        thread.start.uc_stack.ss_size = STACK;
        thread.start.uc_link = nullptr;
        makecontext(&thread.start, run, 0);
    }
    do
        for (size_t i = 0; i < threads.size(); i++) {
            Thread &thread = threads[reverse ? threads.size() - 1 - i : i];
            if (!thread.finished && thread.wait == nullptr) resume(thread);
        }
    while (release());
    for (Thread &thread : threads)
        if (!thread.finished) {
            block.failure = "thread " + std::to_string(thread.number) + " waits in " + thread.wait + " for others that never come";
            return;
        }
}

// Runs a kernel; returns what went wrong, or null.
template <typename... Parameters, size_t... I>
const char *launch(void (*kernel)(Parameters...), const Launch &how, void *const *arguments, std::index_sequence<I...>) {
    block = Block();
    block.body = [=] { kernel(*(std::remove_const_t<Parameters> *)arguments[I]...); };
    unsigned count = how.block.x * how.block.y * how.block.z;
    if (count == 0 || count > 1024 || how.shared_bytes > SHARED_BYTES) return "the block is empty, or too large for a GPU";
    block.threads.resize(count);
    block.warps.resize((count + 31) / 32);
    for (unsigned i = 0; i < count; i++) {
        Thread &thread = block.threads[i];
        thread.number = i;
        thread.index = {i % how.block.x, i / how.block.x % how.block.y, i / how.block.x / how.block.y};
        thread.stack.reset(new char[STACK]);
    }
    block_size = how.block;
    grid_size = how.grid;
    size_t blocks = (size_t)how.grid.x * how.grid.y * how.grid.z;
    for (size_t i = 0; i < blocks && block.failure.empty(); i++) {
        size_t number = how.reverse ? blocks - 1 - i : i;
        block_index = {unsigned(number % how.grid.x), unsigned(number / how.grid.x % how.grid.y),
                       unsigned(number / how.grid.x / how.grid.y)};
        // a number that was never written is NaN
        memset(shared, 0xff, how.shared_bytes + GUARD);
        run_block(how.reverse);
        const char *end = shared + how.shared_bytes;
        if (std::any_of(end, end + GUARD, [](char byte) { return byte != '\xff'; }))
            block.failure = "a thread has written beyond the shared memory that the launch asks for";
    }
    return block.failure.empty() ? nullptr : block.failure.c_str();
}

template <typename... Parameters>
const char *launch(void (*kernel)(Parameters...), const Launch &how, void *const *arguments) {
    return launch(kernel, how, arguments, std::index_sequence_for<Parameters...>());
}

// What the lanes of a warp gave to an exchange; to be read before the next one.
struct Values {
    const char (*values)[VALUE];

    template <typename T> T of(int lane) const {
        T value;
        memcpy(&value, values[lane], sizeof value);
        return value;
    }
};

// Gives a value to the lanes in `mask`, and waits for theirs.
template <typename T> Values exchange(const char *what, uint32_t mask, const T &value) {
    static_assert(sizeof value <= VALUE, "a value fits");
    memcpy(current->value, &value, sizeof value);
    wait(what, mask);
    return Values{block.warps[current->number / 32].values};
}

} // namespace emulator

#define threadIdx (emulator::current->index)
#define blockIdx (emulator::block_index)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)

inline void __syncthreads() { emulator::wait(emulator::BARRIER, 0); }
inline void __syncwarp(uint32_t mask = 0xffffffff) { emulator::exchange("__syncwarp", mask, 0); }
template <typename T> T __shfl_sync(uint32_t mask, T value, int lane) {
    return emulator::exchange("__shfl_sync", mask, value).template of<T>(lane % 32);
}
template <typename T> T __shfl_xor_sync(uint32_t mask, T value, int lanes) {
    return emulator::exchange("__shfl_xor_sync", mask, value).template of<T>(emulator::lane() ^ lanes);
}
inline uint32_t __ballot_sync(uint32_t mask, bool value) {
    const emulator::Values values = emulator::exchange("__ballot_sync", mask, value);
    uint32_t all = 0;
    for (int i = 0; i < 32; i++) all |= (mask >> i & 1 && values.of<bool>(i)) ? 1u << i : 0;
    return all;
}

inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline float __uint_as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

struct float2 {
    float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
struct __align__(16) uint4 {
    unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
