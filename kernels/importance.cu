// Objectives of k draws per image, by the equations of ops/importance.py. Arrays with k rows an
// image have draw s, here counted from 0, of image i in row i k + s; and so has their noise.

const float LOWEST = -3.402823466e38f;  // of all finite float32

// The largest of a value over a warp, in every lane. A NaN may be lost.
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int offset = WARP / 2; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(WHOLE_WARP, value, offset));
  }
  return value;
}

// An image's bound, in every lane of the warp that works on it (importance.E2). weights (k,) has
// -log p(x|z) of each draw and gets its weight (E3).
__device__ __forceinline__ float bound_of_draws(
    float* weights, const float* log_ratio, int importance, int k) {
  int lane = threadIdx.x % WARP;
  float largest = LOWEST, mean = 0.0f, sum = 0.0f;
  for (int s = lane; s < k; s += WARP) {
    float log_weight = log_ratio[s] - weights[s];  // importance.E1
    weights[s] = log_weight;
    largest = fmaxf(largest, log_weight);
    mean += log_weight / (float)k;
  }
  largest = warp_max(largest);
  for (int s = lane; s < k; s += WARP) sum += expf(weights[s] - largest);  // a NaN stays in it
  mean = warp_sum(mean);
  sum = warp_sum(sum);
  for (int s = lane; s < k; s += WARP) {
    weights[s] = importance ? expf(weights[s] - largest) / sum : 1.0f / (float)k;
  }
  return importance ? largest + logf(sum / (float)k) : mean;
}

// head (n, 2 d), z (rows, d), log_ratio (rows,), state (5,), rows = n k. A warp for each row, whose
// lanes have four columns at a time.
extern "C" __global__ void importance_latent_forward(
    const float* __restrict__ head, float* __restrict__ z, float* __restrict__ log_ratio,
    float logvar_factor, unsigned long long seed, unsigned int stream,
    const long long* __restrict__ state, int n, int rows, int d) {
  int row = (blockIdx.x * blockDim.x + threadIdx.x) / WARP, lane = threadIdx.x % WARP;
  if (row >= rows) return;
  const float* mu = head + (size_t)(row / (rows / n)) * 2 * d;
  float sum = 0.0f;
  for (int block = lane; 4 * block < d; block += WARP) {
    float eps[4];
    normal4(random_words(block, row, state[STEP], seed, stream), eps);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int j = 4 * block + i;
      if (j < d) {
        float logvar = logvar_factor * mu[d + j];
        float drawn = mu[j] + expf(0.5f * logvar) * eps[i];  // latent.E1
        z[(size_t)row * d + j] = drawn;
        sum += eps[i] * eps[i] - drawn * drawn + logvar;
      }
    }
  }
  sum = warp_sum(sum);
  if (lane == 0) log_ratio[row] = 0.5f * sum;  // E1
}

// logits and dlogits (n k, m), x (n, m), log_ratio and weights (n k,), loss (n,). Grid: n blocks of
// any whole number of warps. The gradients of few draws stay in the cache between the pass that
// makes them and the one that weights them.
extern "C" __global__ void importance_loss(
    const float* __restrict__ logits, const float* __restrict__ x,
    const float* __restrict__ log_ratio, float* __restrict__ weights, float* __restrict__ loss,
    float* __restrict__ dlogits, float scale, int importance, int k, int m) {
  size_t image = blockIdx.x, first = image * k;
  for (int s = 0; s < k; ++s) {
    const float* a = logits + (first + s) * m;
    float* gradient = dlogits + (first + s) * m;
    float partial = 0.0f;
    for (int j = threadIdx.x; j < m; j += blockDim.x) {
      partial += bernoulli(a[j], x[image * m + j], 1.0f, gradient[j]);
    }
    float total = block_sum(partial);
    if (threadIdx.x == 0) weights[first + s] = total;
  }
  __syncthreads();
  if (threadIdx.x < WARP) {
    float bound = bound_of_draws(weights + first, log_ratio + first, importance, k);
    if (threadIdx.x == 0) loss[image] = -bound;
  }
  __syncthreads();
  for (int s = 0; s < k; ++s) {
    float* gradient = dlogits + (first + s) * m;
    for (int j = threadIdx.x; j < m; j += blockDim.x) {
      gradient[j] *= scale * weights[first + s];  // E4
    }
  }
}

const int MOST_WEIGHED = 256;  // draws

// dlogits (n k, m), row_sums (columns_of_tiles, n k), log_ratio and weights (n k,), loss (n,), k at
// most MOST_WEIGHED. Grid: images, by parts of m. What is left of importance_loss after
// dense_bernoulli_loss: every block works out its image's weights for itself.
extern "C" __global__ void importance_weigh(
    float* __restrict__ dlogits, const float* __restrict__ row_sums,
    const float* __restrict__ log_ratio, float* __restrict__ weights, float* __restrict__ loss,
    float scale, int importance, int columns_of_tiles, int n, int k, int m) {
  __shared__ float own[MOST_WEIGHED];
  size_t image = blockIdx.x, first = image * k, rows = (size_t)n * k;
  for (int s = threadIdx.x; s < k; s += blockDim.x) {
    own[s] = sum_of(0, columns_of_tiles, 1, [&](int column) {
      return row_sums[column * rows + first + s];
    });
  }
  __syncthreads();
  if (threadIdx.x < WARP) {
    float bound = bound_of_draws(own, log_ratio + first, importance, k);
    if (threadIdx.x == 0 && blockIdx.y == 0) loss[image] = -bound;
  }
  __syncthreads();
  if (blockIdx.y == 0) {
    for (int s = threadIdx.x; s < k; s += blockDim.x) weights[first + s] = own[s];
  }
  int j = blockIdx.y * blockDim.x + threadIdx.x;
  if (j >= m) return;
  const int at_once = 8;  // loads before the first store, which would have them wait
#pragma unroll 1
  for (int s = 0; s < k; s += at_once) {
    float gradients[at_once];
#pragma unroll
    for (int t = 0; t < at_once; ++t) {
      if (s + t < k) gradients[t] = dlogits[(first + s + t) * m + j];
    }
#pragma unroll
    for (int t = 0; t < at_once; ++t) {
      if (s + t < k) dlogits[(first + s + t) * m + j] = scale * own[s + t] * gradients[t];  // E4
    }
  }
}

// head and dhead (n, 2 d), dz (n k, d), weights (n k,), state (5,). One warp for each of
// n ceil(d / 4), whose lanes share the draws.
extern "C" __global__ void importance_latent_backward(
    const float* __restrict__ head, const float* __restrict__ dz,
    const float* __restrict__ weights, float* __restrict__ dhead, float scale, float logvar_factor,
    unsigned long long seed, unsigned int stream, const long long* __restrict__ state, int n, int k,
    int d) {
  int blocks = ceil_div(d, 4);
  int warp = (blockIdx.x * blockDim.x + threadIdx.x) / WARP, lane = threadIdx.x % WARP;
  if (warp >= n * blocks) return;
  int image = warp / blocks, block = warp % blocks;
  const float* mu = head + (size_t)image * 2 * d;
  float dmu[4] = {}, dlogvar[4] = {};
  for (int s = lane; s < k; s += WARP) {
    int row = image * k + s;
    float eps[4];
    normal4(random_words(block, row, state[STEP], seed, stream), eps);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int j = 4 * block + i;
      if (j < d) {
        float deviation = expf(0.5f * logvar_factor * mu[d + j]) * eps[i];
        float g = dz[(size_t)row * d + j] + scale * weights[row] * (mu[j] + deviation);  // E5
        dmu[i] += g;                  // E6
        dlogvar[i] += g * deviation;  // E7
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float mu_sum = warp_sum(dmu[i]), logvar_sum = warp_sum(dlogvar[i]);
    int j = 4 * block + i;
    if (lane == 0 && j < d) {
      dhead[(size_t)image * 2 * d + j] = mu_sum;
      dhead[(size_t)image * 2 * d + d + j] = 0.5f * logvar_factor * (logvar_sum - scale);
    }
  }
}
