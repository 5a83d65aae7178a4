// The latent, by the equations of ops/latent.py. A thread has four columns of one row: one counter
// of Philox makes the noise of four.

// head (n, 2 d), z and kl (n, d), state (5,). One thread for each of n ceil(d / 4).
extern "C" __global__ void latent_forward(
    const float* __restrict__ head, float* __restrict__ z, float* __restrict__ kl,
    unsigned long long seed, unsigned int stream, const long long* __restrict__ state, int n,
    int d) {
  int blocks = ceil_div(d, 4);
  int thread = blockIdx.x * blockDim.x + threadIdx.x;
  if (thread >= n * blocks) return;
  int row = thread / blocks, block = thread % blocks;
  float mu[4] = {}, logvar[4] = {}, eps[4];
#pragma unroll
  for (int lane = 0; lane < 4; ++lane) {  // all are on their way while the noise is made
    int j = 4 * block + lane;
    if (j < d) mu[lane] = head[2 * row * d + j], logvar[lane] = head[2 * row * d + d + j];
  }
  normal4(random_words(block, row, state[STEP], seed, stream), eps);
#pragma unroll
  for (int lane = 0; lane < 4; ++lane) {
    int j = 4 * block + lane;
    if (j < d) latent_draw(mu[lane], logvar[lane], eps[lane], z[row * d + j], kl[row * d + j]);
  }
}

// head and dhead (n, 2 d), dz (n, d), kl_weight (d,), state (5,). Threads as in latent_forward.
extern "C" __global__ void latent_backward(
    const float* __restrict__ head, const float* __restrict__ dz,
    const float* __restrict__ kl_weight, float* __restrict__ dhead, unsigned long long seed,
    unsigned int stream, const long long* __restrict__ state, int n, int d) {
  int blocks = ceil_div(d, 4);
  int thread = blockIdx.x * blockDim.x + threadIdx.x;
  if (thread >= n * blocks) return;
  int row = thread / blocks, block = thread % blocks;
  float eps[4];
  normal4(random_words(block, row, state[STEP], seed, stream), eps);
#pragma unroll
  for (int lane = 0; lane < 4; ++lane) {
    int j = 4 * block + lane;
    if (j < d) {
      int i = 2 * row * d + j;
      latent_gradient(
          head[i], head[i + d], eps[lane], dz[row * d + j], kl_weight[j], dhead[i], dhead[i + d]);
    }
  }
}
