// The terms of the ELBO, by the equations of ops/elbo.py: for elbo.cu, and fused into the launches
// of the decoder's last layer and its input gradient.

// A pixel's loss from its logit a, and d, the gradient of the loss by a (elbo.E2).
__device__ __forceinline__ float bernoulli(float a, float pixel, float scale, float& d) {
  float e = expf(-fabsf(a));
  float sigmoid = approximate_quotient(a >= 0.0f ? 1.0f : e, 1.0f + e);
  d = (sigmoid - pixel) * scale;
  return fmaxf(a, 0.0f) - pixel * a + log1pf(e);
}

// A pixel's loss from the output y, and d, the gradient of the loss before the activation that made
// y (elbo.E3).
__device__ __forceinline__ float squared_error(
    float y, float pixel, float scale, float weight, int kind, float slope, float& d) {
  float error = y - pixel;
  d = activation_backward_from_output(kind, slope, y, 2.0f * weight * scale * error);
  return weight * error * error;
}

const int TOTALS_COLUMNS = 32, TOTALS_THREADS = 512;

// A batch's sums, added to those of the run unless a loss was not finite (elbo.add_to_totals). By
// one thread.
//
// `totals` are the running sums of a whole run, and float64 by their contract: this is the only
// float64 arithmetic of all kernels.
__device__ __forceinline__ void add_to_totals(
    double* totals, long long* state, float loss, float reconstruction, float kl) {
  if (!isfinite(loss)) state[FAILED] = 1;
  if (state[FAILED] == 0) {
    totals[LOSS] += loss;
    totals[RECONSTRUCTION] += reconstruction;
    totals[KL] += kl;
  }
}

// loss (n,) from the row_sums (columns_of_tiles, n) that a matrix product's tiles left, by one
// block: each thread has runs of images.
__device__ __forceinline__ void add_up_tiles(
    const float* row_sums, float* loss, int columns_of_tiles, int n) {
  for (int image = RUN * threadIdx.x; image < n; image += RUN * blockDim.x) {
    Run sum = sum_of(0, columns_of_tiles, 1, [&](int column) {
      return load_run(row_sums + (size_t)column * n + image, n - image);
    });
    store_run(loss + image, sum, n - image);
  }
  __syncthreads();
}

// The sums of a batch, added to those of the run, and the KL's weights, by one block: its threads
// share the rows of 32 neighbouring columns of kl at a time, in runs. partials (threads * RUN,) in
// shared memory.
__device__ __forceinline__ void elbo_totals_of_block(
    float* partials, const float* reconstruction, const float* kl, const float* schedule,
    long long* state, float free_bits, float* kl_weight, double* totals, int n, int d) {
  const int across = TOTALS_COLUMNS / RUN;
  int parts = blockDim.x / across, part = threadIdx.x / across;
  float images = (float)n;
  float beta = schedule[SCHEDULE_COLUMNS * state[INDEX] + BETA];

  float reconstruction_sum = sum_of(threadIdx.x, n, blockDim.x, [&](int row) {
    return reconstruction[row];
  });
  float kl_sum = 0.0f, bounded_sum = 0.0f;
  for (int first = 0; first < d; first += TOTALS_COLUMNS) {
    int column = first + threadIdx.x % across * RUN;
    *(Run*)(partials + RUN * threadIdx.x) = sum_of(part, column < d ? n : 0, parts, [&](int row) {
      return load_run(kl + (size_t)row * d + column, d - column);
    });
    __syncthreads();
    int j = first + threadIdx.x;
    if (threadIdx.x < TOTALS_COLUMNS && j < d) {
      float sum = sum_of(0, parts, 1, [&](int other) {
        return partials[other * TOTALS_COLUMNS + threadIdx.x];
      });
      float mean_kl = sum / images;
      kl_weight[j] = mean_kl > free_bits ? beta / images : 0.0f;  // elbo.E6
      kl_sum += mean_kl;
      bounded_sum += mean_kl < free_bits ? free_bits : mean_kl;  // a mean that is NaN stays NaN
    }
    __syncthreads();
  }
  reconstruction_sum = block_sum(reconstruction_sum);
  kl_sum = warp_sum(kl_sum);  // the first warp has all of it
  bounded_sum = warp_sum(bounded_sum);
  if (threadIdx.x == 0) {
    float loss = reconstruction_sum + images * beta * bounded_sum;  // elbo.E5
    add_to_totals(totals, state, loss, reconstruction_sum, images * kl_sum);
  }
}
