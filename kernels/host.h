// Runs the .cu sources on a CPU: compiled by g++ in C++20 with this header before them, a kernel is
// a plain function, and `host::run(grid, block, kernel)` calls it once for each CUDA thread.
//
// A CUDA thread is a fiber: it runs until it reaches a barrier, and then the next one runs. Threads
// go in order, or with `shuffle_seed` in a random order that changes at each barrier, and so do
// blocks: an order that changes a result is a missing barrier. The first block that arrives at a
// counter waits there until all others are done, so that they miss what it has not yet written.
// What a kernel may not count on is poisoned with NaN: shared memory when a block begins, and the
// destination of an asynchronous copy until the thread has waited for it. Denormals are flushed to
// zero, as CuPy compiles kernels.
//
// The sources go into an unnamed namespace, so that their shared memory lies in one section.

#pragma once

#include <immintrin.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#ifdef __SANITIZE_ADDRESS__
#define __shared__ static  // AddressSanitizer guards no variable that is in a section
#else
#define __shared__ static __attribute__((section("shared_memory")))
#endif
#define __restrict__ __restrict
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

extern char __start_shared_memory[] __attribute__((weak));
extern char __stop_shared_memory[] __attribute__((weak));

struct dim3 {
  unsigned int x = 1, y = 1, z = 1;
};
struct alignas(8) float2 {
  float x, y;
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

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

// One translation unit, loaded on its own: everything below is its own too.
namespace host {
const unsigned int WARP_SIZE = 32;
const size_t STACK_BYTES = 1 << 17;
const int POISON = 0xff;  // in all bytes: a NaN

struct Copy {
  void* target;
  const void* source;
  size_t bytes, size;
};

enum Status { READY, AT_BLOCK_BARRIER, AT_WARP_BARRIER, DONE };

struct Fiber {
  dim3 thread;
  unsigned int number;
  Status status;
  bool started;
  long barriers;
  std::vector<std::vector<Copy>> copies;  // groups, the last of which is still open
  jmp_buf place;
  ucontext_t context;
  void* stack;
};

static unsigned int shuffle_seed = 0;
static std::minstd_rand shuffler;
static std::vector<Fiber> fibers;
static Fiber* current;
static jmp_buf scheduler;
static ucontext_t scheduler_context;
static std::function<void()> kernel;
__shared__ float exchanged[1024];

// The launch's first block to arrive at a counter, which waits there.
struct Waiting {
  enum { NONE_YET, STOPS, WAITS } status;
  dim3 block;
  std::vector<Fiber> fibers;
  std::vector<char> shared_memory;
};
static Waiting waiting;

static void shuffle(std::vector<unsigned int>& order) {
  if (shuffle_seed) std::shuffle(order.begin(), order.end(), shuffler);
}

static void start() {
  kernel();
  current->status = DONE;
  _longjmp(scheduler, 1);
}

// Leaves the running fiber, which is to go on once `status` is READY again.
static void leave(Status status) {
  current->status = status;
  if (!_setjmp(current->place)) _longjmp(scheduler, 1);
}

static void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.thread;
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = STACK_BYTES;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, start, 0);
  swapcontext(&scheduler_context, &fiber.context);
}

// Makes the fibers [first, end) READY if all that are not done have reached `status`.
static bool release(size_t first, size_t end, Status status) {
  bool any = false;
  for (size_t i = first; i < end; ++i) {
    if (fibers[i].status == DONE) continue;
    if (fibers[i].status != status) return false;
    any = true;
  }
  for (size_t i = first; i < end; ++i) {
    if (fibers[i].status == status) fibers[i].status = READY;
  }
  return any;
}

static void begin_block() {
  if (__start_shared_memory) {
    memset(__start_shared_memory, POISON, __stop_shared_memory - __start_shared_memory);
  }
  for (Fiber& fiber : fibers) {
    fiber.status = READY;
    fiber.started = false;
    fiber.barriers = 0;
    fiber.copies.assign(1, {});
  }
}

// Runs one block until it is done or stops. False if its threads did not pass the same number of
// barriers.
static bool run_block(std::vector<unsigned int>& order) {
  bool progress = true;
  while (progress) {
    progress = false;
    shuffle(order);
    for (unsigned int number : order) {
      if (fibers[number].status != READY) continue;
      resume(fibers[number]);
      if (waiting.status == Waiting::STOPS) return true;
      progress = true;
    }
    for (size_t first = 0; first < fibers.size(); first += WARP_SIZE) {
      size_t end = std::min(first + WARP_SIZE, fibers.size());
      progress = release(first, end, AT_WARP_BARRIER) || progress;
    }
    progress = release(0, fibers.size(), AT_BLOCK_BARRIER) || progress;
  }
  for (Fiber& fiber : fibers) {
    if (fiber.status != DONE || fiber.barriers != fibers[0].barriers) return false;
  }
  return true;
}

// Stops the first block to arrive at a counter, if its shared memory can be put aside.
static void stop_block() {
  if (waiting.status != Waiting::NONE_YET || !__start_shared_memory) return;
  waiting.status = Waiting::STOPS;
  leave(READY);
}

// Puts the running block aside, or takes it back.
static void change_places() {
  waiting.shared_memory.resize(__stop_shared_memory - __start_shared_memory);
  std::swap_ranges(__start_shared_memory, __stop_shared_memory, waiting.shared_memory.begin());
  waiting.fibers.swap(fibers);
  std::swap(waiting.block, blockIdx);
}

static void make_fibers(dim3 block) {
  size_t count = (size_t)block.x * block.y * block.z;
  for (size_t i = count; i < fibers.size(); ++i) free(fibers[i].stack);
  size_t before = fibers.size();
  fibers.resize(count);
  for (size_t i = 0; i < count; ++i) {
    unsigned int number = i;
    fibers[i].number = number;
    fibers[i].thread = {number % block.x, number / block.x % block.y, number / block.x / block.y};
    if (i >= before) fibers[i].stack = aligned_alloc(64, STACK_BYTES);
  }
}

// Calls `kernel` for each thread of the grid. False if the threads of a block did not all reach the
// same barriers.
static bool run(dim3 grid, dim3 block, const std::function<void()>& body) {
  unsigned int mode = _mm_getcsr();
  _mm_setcsr(mode | 0x8040);  // flush denormal results and operands to zero
  kernel = body;
  blockDim = block;
  gridDim = grid;
  shuffler.seed(shuffle_seed);
  waiting.status = Waiting::NONE_YET;
  make_fibers(block);
  std::vector<unsigned int> threads(fibers.size()), blocks((size_t)grid.x * grid.y * grid.z);
  std::iota(threads.begin(), threads.end(), 0);
  std::iota(blocks.begin(), blocks.end(), 0);
  shuffle(blocks);
  bool agreed = true;
  for (unsigned int number : blocks) {
    blockIdx = {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
    begin_block();
    agreed = run_block(threads) && agreed;
    if (waiting.status == Waiting::STOPS) {
      waiting.status = Waiting::WAITS;
      change_places();
      make_fibers(block);
    }
  }
  if (waiting.status == Waiting::WAITS) {
    change_places();
    agreed = run_block(threads) && agreed;
  }
  _mm_setcsr(mode);
  return agreed;
}
}  // namespace host

inline void __syncthreads() {
  ++host::current->barriers;
  host::leave(host::AT_BLOCK_BARRIER);
}

inline void __syncwarp(unsigned int = 0xffffffffu) { host::leave(host::AT_WARP_BARRIER); }

inline float __shfl_xor_sync(unsigned int, float value, int mask) {
  unsigned int number = host::current->number;
  host::exchanged[number] = value;
  __syncwarp();
  float received = host::exchanged[number ^ (unsigned int)mask];
  __syncwarp();
  return received;
}

// No thread runs beside another, so that an atomic operation is a plain one.
inline int arrive(int* counter) {
  int before = (*counter)++;
  host::stop_block();
  return before;
}
inline int arrive_before(int* counter) { return arrive(counter); }
template <class T>
inline T __ldcg(const T* address) {
  return *address;
}

inline unsigned int __umulhi(unsigned int a, unsigned int b) {
  return (unsigned int)((unsigned long long)a * b >> 32);
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float approximate_sqrt(float a) { return std::sqrt(a); }
inline float approximate_quotient(float a, float b) { return a / b; }
inline void sincospif(float x, float* sine, float* cosine) {
  const double pi = 3.14159265358979323846;
  *sine = (float)std::sin(pi * (double)x);
  *cosine = (float)std::cos(pi * (double)x);
}
using std::isfinite;
using std::max;
using std::min;

// Asynchronous copies, as async.cuh has them for a GPU: `bytes` of them are copied, the rest of the
// 16 or 4 become zero.
namespace host {
inline void issue_copy(void* target, const void* source, int bytes, size_t size) {
  bool aligned = (uintptr_t)target % size == 0 && (bytes == 0 || (uintptr_t)source % size == 0);
  if (!aligned) abort();
  memset(target, POISON, size);
  current->copies.back().push_back({target, source, (size_t)bytes, size});
}

inline void land_copies(size_t but) {
  auto& groups = current->copies;
  size_t closed = groups.size() - 1, landing = closed > but ? closed - but : 0;
  for (size_t group = 0; group < landing; ++group) {
    for (const Copy& copy : groups[group]) {
      memset(copy.target, 0, copy.size);
      memcpy(copy.target, copy.source, copy.bytes);
    }
  }
  groups.erase(groups.begin(), groups.begin() + landing);
}
}  // namespace host

inline void copy_async_16(float* target, const float* source, int bytes) {
  host::issue_copy(target, source, bytes, 16);
}
inline void copy_async_4(float* target, const float* source, int bytes) {
  host::issue_copy(target, source, bytes, 4);
}
inline void commit_copies() { host::current->copies.push_back({}); }
template <int GROUPS>
inline void wait_copies() {
  host::land_copies(GROUPS);
}

// The tensor cores' product of TF32 matrices, as mma.cuh has it for a GPU. Which element of A
// (16 x 8), B (8 x 8) and C (16 x 8) a lane's fragments hold is in the PTX ISA, "Matrix Fragments
// for mma.m16n8k8", for .tf32: `position` is that table, and tests/test_mma_fragments.py checks it.
namespace host {
struct Position {
  int row, column;
};
static Position position(char matrix, int lane, int index) {
  int group = lane >> 2, member = lane % 4;
  if (matrix == 'a') return {group + 8 * (index % 2), member + 4 * (index / 2)};
  if (matrix == 'b') return {member + 4 * index, group};
  return {group + 8 * (index / 2), 2 * member + index % 2};
}

// TF32 has 10 bits of mantissa; the hardware ignores the others.
inline float truncated(unsigned int bits) {
  bits &= 0xffffe000u;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

struct Matrices {
  float a[16][8], b[8][8];
  const float* rows[WARP_SIZE];
};
__shared__ Matrices matrices[32];
}  // namespace host

// To nearest, ties away from zero, as cvt.rna.tf32.f32; with TIES_TO_EVEN to even, as
// cvt.rn.tf32.f32 has it from sm_90 (mma.cuh).
#ifndef TIES_TO_EVEN
#define TIES_TO_EVEN 0
#endif
inline unsigned int to_tf32(float value) {
  unsigned int bits;
  memcpy(&bits, &value, 4);
  unsigned int half = TIES_TO_EVEN ? 0xfffu + (bits >> 13) % 2 : 0x1000u;
  return std::isfinite(value) ? (bits + half) & 0xffffe000u : bits;
}

inline void load_matrices(float (&values)[4], const float* row) {
  int lane = host::current->number % host::WARP_SIZE;
  if ((uintptr_t)row % 16 != 0) abort();
  auto& rows = host::matrices[host::current->number / host::WARP_SIZE].rows;
  rows[lane] = row;
  __syncwarp();
  for (int i = 0; i < 4; ++i) values[i] = rows[8 * i + lane / 4][lane % 4];
  __syncwarp();
}

inline void mma_m16n8k8_tf32(
    float (&c)[4], const unsigned int (&a)[4], const unsigned int (&b)[2]) {
  int lane = host::current->number % host::WARP_SIZE;
  host::Matrices& operands = host::matrices[host::current->number / host::WARP_SIZE];
  for (int i = 0; i < 4; ++i) {
    auto [row, column] = host::position('a', lane, i);
    operands.a[row][column] = host::truncated(a[i]);
  }
  for (int i = 0; i < 2; ++i) {
    auto [row, column] = host::position('b', lane, i);
    operands.b[row][column] = host::truncated(b[i]);
  }
  __syncwarp();
  for (int i = 0; i < 4; ++i) {
    auto [row, column] = host::position('c', lane, i);
    for (int k = 0; k < 8; ++k) c[i] += operands.a[row][k] * operands.b[k][column];
  }
  __syncwarp();
}
