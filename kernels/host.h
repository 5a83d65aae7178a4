// Runs the .cu sources on a CPU: compiled by g++ in C++20 with this header before them, a kernel is
// a plain function, a block is one thread of the operating system for each CUDA thread, and blocks
// run one after another. `run(grid, block, kernel)` returns false if the threads of a block did not
// all reach the same barriers.
//
// A thread is held back for a moment at each barrier, by a random number from `shuffle_seed`, so
// that a missing barrier shows as different bits.

#pragma once

#include <barrier>
#include <cmath>
#include <cstddef>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __restrict__ __restrict
#define __launch_bounds__(...)

struct dim3 {
  unsigned int x = 1, y = 1, z = 1;
};
struct uint2 {
  unsigned int x, y;
};
struct uint4 {
  unsigned int x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned int x, unsigned int y) { return {x, y}; }
inline uint4 make_uint4(unsigned int x, unsigned int y, unsigned int z, unsigned int w) {
  return {x, y, z, w};
}

inline thread_local dim3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace host {
const int WARP_SIZE = 32;
inline unsigned int shuffle_seed = 0;
inline std::unique_ptr<std::barrier<>> block_barrier;
inline std::vector<std::unique_ptr<std::barrier<>>> warp_barriers;
inline std::vector<float> exchanged;
inline std::vector<long> barriers_passed;
inline thread_local std::minstd_rand random_delay;

inline void hold_back() {
  if (shuffle_seed == 0) return;
  for (unsigned int turns = random_delay() % 4; turns > 0; --turns) std::this_thread::yield();
}
}  // namespace host

inline void __syncthreads() {
  host::hold_back();
  ++host::barriers_passed[threadIdx.x];
  host::block_barrier->arrive_and_wait();
  host::hold_back();
}

inline float __shfl_xor_sync(unsigned int, float value, int mask) {
  auto& barrier = *host::warp_barriers[threadIdx.x / host::WARP_SIZE];
  host::exchanged[threadIdx.x] = value;
  barrier.arrive_and_wait();
  float received = host::exchanged[threadIdx.x ^ (unsigned int)mask];
  barrier.arrive_and_wait();
  return received;
}

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline void sincospif(float x, float* sine, float* cosine) {
  const double pi = 3.14159265358979323846;
  *sine = (float)std::sin(pi * (double)x);
  *cosine = (float)std::cos(pi * (double)x);
}
using std::isfinite;

namespace host {
inline bool run(unsigned int grid, unsigned int block, const std::function<void()>& kernel) {
  bool agreed = true;
  blockDim = {block, 1, 1};
  gridDim = {grid, 1, 1};
  exchanged.assign(block, 0.0f);
  for (unsigned int index = 0; index < grid; ++index) {
    barriers_passed.assign(block, 0);
    block_barrier = std::make_unique<std::barrier<>>(block);
    warp_barriers.clear();
    for (unsigned int first = 0; first < block; first += WARP_SIZE) {
      warp_barriers.push_back(std::make_unique<std::barrier<>>(std::min(block - first, 32u)));
    }
    std::vector<std::thread> threads;
    for (unsigned int thread = 0; thread < block; ++thread) {
      threads.emplace_back([=, &kernel] {
        threadIdx = {thread, 0, 0};
        blockIdx = {index, 0, 0};
        random_delay.seed(shuffle_seed + 7919 * thread + 1);
        kernel();
        // A thread that is done holds up no barrier of the others.
        block_barrier->arrive_and_drop();
        warp_barriers[thread / WARP_SIZE]->arrive_and_drop();
      });
    }
    for (auto& thread : threads) thread.join();
    for (long passed : barriers_passed) agreed = agreed && passed == barriers_passed[0];
  }
  return agreed;
}
}  // namespace host
