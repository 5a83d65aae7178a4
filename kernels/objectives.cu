// The objectives beside the plain ELBO, by the equations of ops/calibration.py and ops/capacity.py.

// loss (n,), sums of squares; variance (1,). One block of TOTALS_THREADS.
extern "C" __global__ void __launch_bounds__(TOTALS_THREADS) calibrate_gaussian_variance(
    const float* __restrict__ loss, float* __restrict__ variance, int n, int m) {
  float squares = block_sum(sum_of(threadIdx.x, n, blockDim.x, [&](int row) { return loss[row]; }));
  if (threadIdx.x == 0) variance[0] = squares / ((float)n * (float)m);  // calibration.E2
}

// loss (n,) and da (n, m), both in place; variance (1,). Grid: a block for each of the n images.
extern "C" __global__ void calibrate_gaussian(
    float* __restrict__ loss, float* __restrict__ da, const float* __restrict__ variance, int n,
    int m) {
  size_t first = (size_t)blockIdx.x * m;
  float weight = 0.5f / variance[0];
  for (int j = threadIdx.x; j < m; j += blockDim.x) da[first + j] *= weight;  // calibration.E4
  if (threadIdx.x == 0) {
    float constant = 0.5f * (float)m * logf(6.2831853f * variance[0]);
    loss[blockIdx.x] = weight * loss[blockIdx.x] + constant;  // calibration.E3
  }
}

// reconstruction (n,), kl (n, d), schedule (steps, 5), state (5,), kl_weight (d,), totals (3,). One
// block of TOTALS_THREADS.
extern "C" __global__ void __launch_bounds__(TOTALS_THREADS) capacity_totals(
    const float* __restrict__ reconstruction, const float* __restrict__ kl,
    const float* __restrict__ schedule, long long* __restrict__ state,
    float* __restrict__ kl_weight, double* __restrict__ totals, int n, int d) {
  float images = (float)n;
  const float* row = schedule + SCHEDULE_COLUMNS * state[INDEX];
  float beta = row[BETA], capacity = row[CAPACITY];
  float reconstruction_sum = block_sum(
      sum_of(threadIdx.x, n, blockDim.x, [&](int image) { return reconstruction[image]; }));
  float kl_sum = block_sum(sum_of(threadIdx.x, n * d, blockDim.x, [&](int i) { return kl[i]; }));
  float distance = kl_sum / images - capacity;
  float weight = distance == 0.0f ? 0.0f : copysignf(beta / images, distance);  // capacity.E4
  for (int j = threadIdx.x; j < d; j += blockDim.x) kl_weight[j] = weight;
  if (threadIdx.x == 0) {
    float loss = reconstruction_sum + images * beta * fabsf(distance);  // capacity.E3
    add_to_totals(totals, state, loss, reconstruction_sum, kl_sum);
  }
}
