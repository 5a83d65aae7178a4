// Philox4x32-10 and its normals, by the equations of ops/philox.py.

__device__ __forceinline__ unsigned int high_word(unsigned long long product) {
  return (unsigned int)(product >> 32);
}

// The four words of a counter (philox.E1).
__device__ __forceinline__ uint4 philox4x32(uint4 counter, uint2 key) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    unsigned long long product0 = 0xD2511F53ull * counter.x;
    unsigned long long product1 = 0xCD9E8D57ull * counter.z;
    counter = make_uint4(
        high_word(product1) ^ counter.y ^ key.x, (unsigned int)product1,
        high_word(product0) ^ counter.w ^ key.y, (unsigned int)product0);
    key.x += 0x9E3779B9u;
    key.y += 0xBB67AE85u;
  }
  return counter;
}

// The words of elements (row, 4 block) to (row, 4 block + 3) of a step's noise.
__device__ __forceinline__ uint4 random_words(
    unsigned int block, long long row, long long step, unsigned long long seed,
    unsigned int stream) {
  uint4 counter = make_uint4(block, (unsigned int)row, (unsigned int)step, stream);
  return philox4x32(counter, make_uint2((unsigned int)seed, high_word(seed)));
}

// A word as a number in (0, 1] (philox.E2).
__device__ __forceinline__ float uniform(unsigned int word) {
  return __fmaf_rn((float)word, 0x1p-32f, 0x1p-33f);
}

// Four standard normals from four words (philox.E3). sincospif instead of sinf and cosf: these
// carry a reduction of large angles, in local memory, which never runs here.
__device__ __forceinline__ void normal4(uint4 words, float (&eps)[4]) {
  float radius0 = sqrtf(-2.0f * logf(uniform(words.x)));
  float radius1 = sqrtf(-2.0f * logf(uniform(words.z)));
  float sine, cosine;
  sincospif(2.0f * uniform(words.y), &sine, &cosine);
  eps[0] = radius0 * cosine;
  eps[1] = radius0 * sine;
  sincospif(2.0f * uniform(words.w), &sine, &cosine);
  eps[2] = radius1 * cosine;
  eps[3] = radius1 * sine;
}
