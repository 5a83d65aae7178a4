// The batch, by the equations of ops/batch.py, and the state's step to the next.

enum Binarization { NONE, THRESHOLD, STOCHASTIC };

// batch.E1 to E3 for a pixel of 0 to 255. Each comparison is one of integers.
__device__ __forceinline__ float pixel_value(
    unsigned char pixel, int binarization, unsigned int word) {
  if (binarization == THRESHOLD) return 2 * pixel >= 255 ? 1.0f : 0.0f;
  if (binarization == STOCHASTIC) {
    return 255ull * word < (unsigned long long)pixel << 32 ? 1.0f : 0.0f;
  }
  return (float)pixel / 255.0f;
}

// The same for a pixel in [0, 1]: word < pixel 2^32 if and only if word < ceil(pixel 2^32), and the
// product, with a power of two, is exact.
__device__ __forceinline__ float pixel_value(float pixel, int binarization, unsigned int word) {
  if (binarization == THRESHOLD) return 2.0f * pixel >= 1.0f ? 1.0f : 0.0f;
  if (binarization == STOCHASTIC) {
    return word < (unsigned long long)ceilf(pixel * 0x1p32f) ? 1.0f : 0.0f;
  }
  return pixel;
}

// A thread has four pixels of one image, as many as a counter of Philox makes words.
template <typename Pixel>
__device__ __forceinline__ void gather(
    const Pixel* __restrict__ data, const long long* __restrict__ permutation,
    const long long* __restrict__ state, float* __restrict__ x, int binarization,
    unsigned long long seed, unsigned int stream, int n, int m) {
  int blocks = ceil_div(m, 4);
  int thread = blockIdx.x * blockDim.x + threadIdx.x;
  if (thread >= n * blocks) return;
  int row = thread / blocks, block = thread % blocks;
  long long image = permutation[state[FIRST] + row];
  Pixel pixel[4] = {};
#pragma unroll
  for (int lane = 0; lane < 4; ++lane) {  // all are on their way before one is needed
    int j = 4 * block + lane;
    if (j < m) pixel[lane] = data[image * m + j];
  }
  uint4 words = make_uint4(0, 0, 0, 0);
  if (binarization == STOCHASTIC) words = random_words(block, image, state[EPOCH], seed, stream);
  unsigned int word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int lane = 0; lane < 4; ++lane) {
    int j = 4 * block + lane;
    if (j < m) x[(size_t)row * m + j] = pixel_value(pixel[lane], binarization, word[lane]);
  }
}

// data (images, m) in uint8, permutation (images,), state (5,), x (n, m). One thread for each of
// n ceil(m / 4).
extern "C" __global__ void gather_batch_uint8(
    const unsigned char* __restrict__ data, const long long* __restrict__ permutation,
    const long long* __restrict__ state, float* __restrict__ x, int binarization,
    unsigned long long seed, unsigned int stream, int n, int m) {
  gather(data, permutation, state, x, binarization, seed, stream, n, m);
}

// data (images, m) in [0, 1], the rest as in gather_batch_uint8.
extern "C" __global__ void gather_batch_float32(
    const float* __restrict__ data, const long long* __restrict__ permutation,
    const long long* __restrict__ state, float* __restrict__ x, int binarization,
    unsigned long long seed, unsigned int stream, int n, int m) {
  gather(data, permutation, state, x, binarization, seed, stream, n, m);
}

// state (5,). One thread.
extern "C" __global__ void advance_state(long long* __restrict__ state, int batch_size) {
  if (blockIdx.x * blockDim.x + threadIdx.x > 0 || state[FAILED]) return;
  next_step(state, batch_size);
}
