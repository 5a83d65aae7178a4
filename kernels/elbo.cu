// The losses, by the equations of ops/elbo.py. A block has one image: its threads add up their
// pixels and the block its threads, always in the same order.

const int TOTALS_THREADS = 512;

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

// y, x and dz (n, m), loss (n,). Grid: n blocks of any whole number of warps.
extern "C" __global__ void squared_error_loss(
    const float* __restrict__ y, const float* __restrict__ x, float* __restrict__ loss,
    float* __restrict__ dz, float scale, float weight, int kind, float slope, int n, int m) {
  size_t first = (size_t)blockIdx.x * m;
  float partial = 0.0f;
  for (int j = threadIdx.x; j < m; j += blockDim.x) {
    partial += squared_error(y[first + j], x[first + j], scale, weight, kind, slope, dz[first + j]);
  }
  float total = block_sum(partial);
  if (threadIdx.x == 0) loss[blockIdx.x] = total;
}

// reconstruction (n,), kl (n, d), schedule (steps, 4), state (5,), kl_weight (d,), totals (3,). One
// block of TOTALS_THREADS.
extern "C" __global__ void __launch_bounds__(TOTALS_THREADS) elbo_totals(
    const float* __restrict__ reconstruction, const float* __restrict__ kl,
    const float* __restrict__ schedule, long long* __restrict__ state, float free_bits,
    float* __restrict__ kl_weight, double* __restrict__ totals, int n, int d) {
  add_totals<TOTALS_THREADS>(
      reconstruction, kl, schedule, state, free_bits, kl_weight, totals, n, d);
}

// As elbo_totals, with the KL bound to a capacity that grows (ops/capacity.py). One block of
// TOTALS_THREADS.
extern "C" __global__ void __launch_bounds__(TOTALS_THREADS) capacity_totals(
    const float* __restrict__ reconstruction, const float* __restrict__ kl,
    const float* __restrict__ schedule, long long* __restrict__ state, float capacity,
    int capacity_steps, float* __restrict__ kl_weight, double* __restrict__ totals, int n, int d) {
  float images = (float)n, beta = schedule[SCHEDULE_COLUMNS * state[INDEX] + BETA];
  float reached = (float)(state[STEP] + 1);
  if (reached < (float)capacity_steps) capacity *= reached / (float)capacity_steps;  // capacity.E2
  float reconstruction_sum = 0.0f, kl_sum = 0.0f;
  for (int i = threadIdx.x; i < n; i += TOTALS_THREADS) reconstruction_sum += reconstruction[i];
  for (int i = threadIdx.x; i < n * d; i += TOTALS_THREADS) kl_sum += kl[i];
  reconstruction_sum = block_sum(reconstruction_sum);
  float distance = block_sum(kl_sum) / images - capacity;
  float sign = distance > 0.0f ? 1.0f : distance < 0.0f ? -1.0f : distance;  // NaN stays NaN
  for (int j = threadIdx.x; j < d; j += TOTALS_THREADS) kl_weight[j] = beta / images * sign;  // E4
  if (threadIdx.x == 0) {
    float loss = reconstruction_sum + images * beta * fabsf(distance);  // E3
    add_to_totals(loss, reconstruction_sum, images * (distance + capacity), state, totals);
  }
}

// loss (n,), variance (1,). One block of any whole number of warps.
extern "C" __global__ void calibrate_variance(
    const float* __restrict__ loss, float* __restrict__ variance, int n, int m) {
  float sum = 0.0f;
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += loss[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) variance[0] = sum / ((float)n * (float)m);  // calibration.E2
}

// loss (n,), dz (n, m), variance (1,). Grid: n blocks.
extern "C" __global__ void calibrate_gaussian(
    float* __restrict__ loss, float* __restrict__ dz, const float* __restrict__ variance, int m) {
  float weight = 0.5f / variance[0];
  size_t first = (size_t)blockIdx.x * m;
  for (int j = threadIdx.x; j < m; j += blockDim.x) dz[first + j] *= weight;  // calibration.E4
  if (threadIdx.x == 0) {
    float constant = 0.5f * (float)m * logf(6.2831853f * variance[0]);
    loss[blockIdx.x] = weight * loss[blockIdx.x] + constant;  // calibration.E3
  }
}
