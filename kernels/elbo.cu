// The losses, by the equations of ops/elbo.py. A block has one image: its threads add up their
// pixels and the block its threads, always in the same order.

// logits, x and dlogits (n, m), loss (n,). Grid: n blocks of any whole number of warps.
extern "C" __global__ void bernoulli_loss(
    const float* __restrict__ logits, const float* __restrict__ x, float* __restrict__ loss,
    float* __restrict__ dlogits, float scale, int n, int m) {
  size_t first = (size_t)blockIdx.x * m;
  float partial = 0.0f;
  for (int j = threadIdx.x; j < m; j += blockDim.x) {
    float a = logits[first + j], pixel = x[first + j];
    float e = expf(-fabsf(a));
    float sigmoid = (a >= 0.0f ? 1.0f : e) / (1.0f + e);
    partial += fmaxf(a, 0.0f) - pixel * a + log1pf(e);  // elbo.E2
    dlogits[first + j] = (sigmoid - pixel) * scale;
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
    float output = y[first + j];
    float error = output - x[first + j];
    partial += error * error;
    dz[first + j] = activation_backward_from_output(
        kind, slope, output, 2.0f * weight * scale * error);  // elbo.E3
  }
  float total = block_sum(partial);
  if (threadIdx.x == 0) loss[blockIdx.x] = weight * total;
}

const int TOTALS_COLUMNS = 32;
const int TOTALS_ROWS = 16;

// reconstruction (n,), kl (n, d), schedule (steps, 4), state (5,), kl_weight (d,), totals (3,).
// One block of 512 threads: 16 warps share the rows of 32 neighbouring columns of kl at a time.
//
// `totals` are the running sums of a whole run, and float64 by their contract: what one thread
// adds to them here is the only float64 arithmetic of all kernels.
extern "C" __global__ void __launch_bounds__(TOTALS_COLUMNS * TOTALS_ROWS) elbo_totals(
    const float* __restrict__ reconstruction, const float* __restrict__ kl,
    const float* __restrict__ schedule, long long* __restrict__ state, float free_bits,
    float* __restrict__ kl_weight, double* __restrict__ totals, int n, int d) {
  __shared__ float partials[TOTALS_ROWS][TOTALS_COLUMNS];
  int column = threadIdx.x % TOTALS_COLUMNS, part = threadIdx.x / TOTALS_COLUMNS;
  float images = (float)n;
  float beta = schedule[SCHEDULE_COLUMNS * state[INDEX] + BETA];

  float reconstruction_sum = 0.0f;
  for (int row = threadIdx.x; row < n; row += blockDim.x) {
    reconstruction_sum += reconstruction[row];
  }
  float kl_sum = 0.0f, bounded_sum = 0.0f;
  for (int first = 0; first < d; first += TOTALS_COLUMNS) {
    int j = first + column;
    float partial = 0.0f;
    if (j < d) {
      for (int row = part; row < n; row += TOTALS_ROWS) partial += kl[(size_t)row * d + j];
    }
    partials[part][column] = partial;
    __syncthreads();
    if (part == 0 && j < d) {
      float sum = 0.0f;
      for (int other = 0; other < TOTALS_ROWS; ++other) sum += partials[other][column];
      float mean_kl = sum / images;
      kl_weight[j] = mean_kl > free_bits ? beta / images : 0.0f;  // elbo.E6
      kl_sum += mean_kl;
      bounded_sum += mean_kl < free_bits ? free_bits : mean_kl;  // a mean that is NaN stays NaN
    }
    __syncthreads();
  }
  reconstruction_sum = block_sum(reconstruction_sum);
  kl_sum = block_sum(kl_sum);
  bounded_sum = block_sum(bounded_sum);
  if (threadIdx.x == 0) {
    float loss = reconstruction_sum + images * beta * bounded_sum;  // elbo.E5
    if (!isfinite(loss)) state[FAILED] = 1;
    if (state[FAILED] == 0) {
      totals[LOSS] += loss;
      totals[RECONSTRUCTION] += reconstruction_sum;
      totals[KL] += images * kl_sum;
    }
  }
}
