// The losses, by the equations of ops/elbo.py. A block has one image: its threads add up their
// pixels and the block its threads, always in the same order.

// logits, x and dlogits (n, m), loss (n,). Grid: n blocks of any whole number of warps.
extern "C" __global__ void bernoulli_loss(
    const float* __restrict__ logits, const float* __restrict__ x, float* __restrict__ loss,
    float* __restrict__ dlogits, float scale, int n, int m) {
  size_t first = (size_t)blockIdx.x * m;
  float partial = 0.0f;
  for (int j = threadIdx.x; j < m; j += blockDim.x) {
    partial += bernoulli(logits[first + j], x[first + j], scale, dlogits[first + j]);
  }
  float total = block_sum(partial);
  if (threadIdx.x == 0) loss[blockIdx.x] = total;
}

// y, x and da (n, m), loss (n,). Grid: n blocks of any whole number of warps.
extern "C" __global__ void squared_error_loss(
    const float* __restrict__ y, const float* __restrict__ x, float* __restrict__ loss,
    float* __restrict__ da, float scale, float weight, int kind, float slope, int n, int m) {
  size_t first = (size_t)blockIdx.x * m;
  float partial = 0.0f;
  for (int j = threadIdx.x; j < m; j += blockDim.x) {
    partial += squared_error(y[first + j], x[first + j], scale, weight, kind, slope, da[first + j]);
  }
  float total = block_sum(partial);
  if (threadIdx.x == 0) loss[blockIdx.x] = total;
}

// reconstruction (n,), kl (n, d), schedule (steps, 5), state (5,), kl_weight (d,), totals (3,). One
// block of TOTALS_THREADS.
extern "C" __global__ void __launch_bounds__(TOTALS_THREADS) elbo_totals(
    const float* __restrict__ reconstruction, const float* __restrict__ kl,
    const float* __restrict__ schedule, long long* __restrict__ state, float free_bits,
    float* __restrict__ kl_weight, double* __restrict__ totals, int n, int d) {
  __shared__ __align__(16) float partials[TOTALS_THREADS * RUN];
  elbo_totals_of_block(
      partials, reconstruction, kl, schedule, state, free_bits, kl_weight, totals, n, d);
}

// The same, but loss (n,) is first summed from the row_sums (columns_of_tiles, n) that a matrix
// product's tiles left.
extern "C" __global__ void __launch_bounds__(TOTALS_THREADS) elbo_totals_of_tiles(
    const float* __restrict__ row_sums, float* __restrict__ loss, const float* __restrict__ kl,
    const float* __restrict__ schedule, long long* __restrict__ state, float free_bits,
    float* __restrict__ kl_weight, double* __restrict__ totals, int columns_of_tiles, int n,
    int d) {
  __shared__ __align__(16) float partials[TOTALS_THREADS * RUN];
  add_up_tiles(row_sums, loss, columns_of_tiles, n);
  elbo_totals_of_block(partials, loss, kl, schedule, state, free_bits, kl_weight, totals, n, d);
}
