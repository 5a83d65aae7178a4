// Two of the dense layer's three matrix products, by the equations of ops/dense.py: x w and dz w^T.
// The third, x^T dz, is in weights.cu. All are one loop over tiles, told apart by the axis along
// which each operand is read.

// x (n, i), w (i, o), b (o,), y (n, o); partials and arrivals as tile.cuh has them. Grid: tiles of
// y, by splits.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) dense_forward(
    const float* __restrict__ x, const float* __restrict__ w, const float* __restrict__ b,
    float* __restrict__ y, int kind, float slope, float* __restrict__ partials,
    int* __restrict__ arrivals, int n, int i, int o) {
  using A = Matrix<true>;
  using B = Matrix<false>;
  __shared__ __align__(16) float memory[MEMORY];
  Place place(blockIdx.x, o);
  Share share = this_share(partials, arrivals);
  multiply(
      memory, A{x, n, i}, B{w, o, i}, place.row, place.column, share.first(i), share.end(i), false);
  if (!share.gather(memory, n - place.row)) return;
  for_each_run(
      memory, place.row, place.column, n, o, BiasAndActivation{b, y, kind, slope, o});
}

// dz (n, o), w (i, o), x and dz_below (n, i). Grid: tiles of dz_below, by splits.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) dense_input_gradient(
    const float* __restrict__ dz, const float* __restrict__ w, const float* __restrict__ x,
    float* __restrict__ dz_below, int kind, float slope, float* __restrict__ partials,
    int* __restrict__ arrivals, int n, int i, int o) {
  using A = Matrix<true>;
  using B = Matrix<true>;
  __shared__ __align__(16) float memory[MEMORY];
  Place place(blockIdx.x, i);
  Share share = this_share(partials, arrivals);
  multiply(
      memory, A{dz, n, o}, B{w, i, o}, place.row, place.column, share.first(o), share.end(o),
      false);
  if (!share.gather(memory, n - place.row)) return;
  for_each_run(
      memory, place.row, place.column, n, i, ActivationDerivative{x, dz_below, kind, slope, i});
}

// The epilogue that ends in the encoder's head: dz of a latent dimension gives dhead at two places
// (latent.E3, E4), with the noise that latent_forward made. head, dhead (n, 2 d), kl_weight (d,).
struct LatentBackward {
  static const int TOGETHER = 2;
  struct Fetched {
    Run mu, logvar, kl_weight;
  };
  const float* head;
  const float* kl_weight;
  float* dhead;
  unsigned long long seed;
  unsigned int stream;
  long long step;
  int d;
  __device__ __forceinline__ Fetched fetch(int row, int j, int count) const {
    const float* mu = head + (size_t)row * 2 * d + j;
    return {load_run(mu, count), load_run(mu + d, count), load_run(kl_weight + j, count)};
  }
  __device__ __forceinline__ void operator()(
      int row, int j, int count, const Run& upstream, const Fetched& at) const {
    if (count <= 0) return;
    float eps[RUN];
    normal4(random_words(j / 4, row, step, seed, stream), eps);
    Run dmu, dlogvar;
#pragma unroll
    for (int i = 0; i < RUN; ++i) {
      latent_gradient(
          at.mu.lane[i], at.logvar.lane[i], eps[i], upstream.lane[i], at.kl_weight.lane[i],
          dmu.lane[i], dlogvar.lane[i]);
    }
    float* target = dhead + (size_t)row * 2 * d + j;
    store_run(target, dmu, count);
    store_run(target + d, dlogvar, count);
  }
};

// dense_input_gradient of the decoder's first layer and latent_backward. dz (n, o), w (d, o), head
// and dhead (n, 2 d), kl_weight (d,), state (5,). Grid: tiles of (n, d), by splits.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) dense_latent_backward(
    const float* __restrict__ dz, const float* __restrict__ w, const float* __restrict__ head,
    const float* __restrict__ kl_weight, float* __restrict__ dhead, unsigned long long seed,
    unsigned int stream, const long long* __restrict__ state, float* __restrict__ partials,
    int* __restrict__ arrivals, int n, int d, int o) {
  using A = Matrix<true>;
  using B = Matrix<true>;
  __shared__ __align__(16) float memory[MEMORY];
  long long step = state[STEP];  // here, so that it is there when the epilogue needs it
  Place place(blockIdx.x, d);
  Share share = this_share(partials, arrivals);
  multiply(
      memory, A{dz, n, o}, B{w, d, o}, place.row, place.column, share.first(o), share.end(o),
      false);
  if (!share.gather(memory, n - place.row)) return;
  for_each_run(
      memory, place.row, place.column, n, d,
      LatentBackward{head, kl_weight, dhead, seed, stream, step, d});
}

// Where the fused losses leave their sums: a row's loss for each column of tiles,
// (tiles across, n), and counters: one for all rows of tiles, then one for each.
struct RowSums {
  float* parts;
  int* arrivals;
  float* loss;

  // Adds up the losses of the rows over the columns of tiles: neighbouring threads share a row.
  // True in the block that is the last of the launch.
  __device__ __forceinline__ bool gather(const Place& place, int n, int o) const {
    const int sharing = THREADS / ROWS;
    int tiles = ceil_div(o, COLUMNS), row = place.row + threadIdx.x / sharing;
    if (!last_to_arrive(arrivals + 1 + place.row / ROWS, tiles)) return false;
    float sum = sum_of(threadIdx.x % sharing, row < n ? tiles : 0, sharing, [&](int tile) {
      return __ldcg(parts + (size_t)tile * n + row);
    });
#pragma unroll
    for (int offset = sharing / 2; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(WHOLE_WARP, sum, offset);
    }
    if (threadIdx.x % sharing == 0 && row < n) loss[row] = sum;
    return last_to_arrive(arrivals, ceil_div(n, ROWS));
  }
};

// y = f(z + b) and its loss: loss.pixel(output, target, d) says a pixel's, and the gradient d that
// goes to dz. y and dz (n, o), target (n / draws, o).
template <class Loss>
struct LossOfOutput {
  static const int TOGETHER = 2;
  struct Fetched {
    Run bias, target;
  };
  const float* b;
  float* y;
  const float* target;
  float* dz;
  int kind;
  float slope;
  Loss loss;
  RowSums sums;
  int draws, n, o;
  __device__ __forceinline__ Fetched fetch(int row, int column, int count) const {
    return {
        load_run(b + column, count), load_run(target + (size_t)(row / draws) * o + column, count)};
  }
  __device__ __forceinline__ void operator()(
      int row, int column, int count, const Run& z, const Fetched& at) const {
    Run output, gradient;
    float sum = 0.0f;
    with_kind(kind, [&](auto known) {
#pragma unroll
      for (int i = 0; i < RUN; ++i) {
        output.lane[i] = activate(known.value, slope, z.lane[i] + at.bias.lane[i]);
      }
    });
#pragma unroll
    for (int i = 0; i < RUN; ++i) {
      float pixel = loss.pixel(output.lane[i], at.target.lane[i], gradient.lane[i]);
      if (i < count) sum += pixel;
    }
    store_run(y + (size_t)row * o + column, output, count);
    store_run(dz + (size_t)row * o + column, gradient, count);
    // Neighbouring threads have a row of the tile together.
#pragma unroll
    for (int offset = COLUMNS / RUN / 2; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(WHOLE_WARP, sum, offset);
    }
    if (column % COLUMNS == 0 && row < n) sums.parts[(size_t)(column / COLUMNS) * n + row] = sum;
  }
};

struct BernoulliLoss {
  float scale;
  __device__ __forceinline__ float pixel(float logit, float target, float& d) const {
    return bernoulli(logit, target, scale, d);
  }
};

struct SquaredErrorLoss {
  float scale, weight;
  int kind;
  float slope;
  __device__ __forceinline__ float pixel(float output, float target, float& d) const {
    return squared_error(output, target, scale, weight, kind, slope, d);
  }
};

// The decoder's last layer with its loss, summed over each row. True in the block that is the last
// of the launch.
template <class Loss>
__device__ __forceinline__ bool dense_loss(
    float* memory, const float* x, const float* w, float* partials, int* arrivals,
    const LossOfOutput<Loss>& finish, int i) {
  using A = Matrix<true>;
  using B = Matrix<false>;
  int n = finish.n, o = finish.o;
  Place place(blockIdx.x, o);
  Share share = this_share(partials, arrivals);
  multiply(
      memory, A{x, n, i}, B{w, o, i}, place.row, place.column, share.first(i), share.end(i), false);
  if (!share.gather(memory, n - place.row)) return false;
  for_each_run(memory, place.row, place.column, n, o, finish);
  return finish.sums.gather(place, n, o);
}

// x (n, i), w (i, o), b (o,), y, target and dz (n, o), loss (n,), and as in elbo_totals kl (n, d),
// schedule, state, kl_weight (d,), totals; workspaces as tile.cuh and RowSums have them. Grid:
// tiles of y, by splits.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) dense_bernoulli_elbo(
    const float* __restrict__ x, const float* __restrict__ w, const float* __restrict__ b,
    float* __restrict__ y, int kind, float slope, const float* __restrict__ target,
    float* __restrict__ loss, float* __restrict__ dz, float scale, const float* __restrict__ kl,
    const float* __restrict__ schedule, long long* __restrict__ state, float free_bits,
    float* __restrict__ kl_weight, double* __restrict__ totals, float* __restrict__ row_sums,
    int* __restrict__ row_arrivals, float* __restrict__ partials, int* __restrict__ arrivals, int n,
    int i, int o, int d) {
  __shared__ __align__(16) float memory[MEMORY];
  LossOfOutput<BernoulliLoss> finish = {
      b, y, target, dz, kind, slope, {scale}, {row_sums, row_arrivals, loss}, 1, n, o};
  bool last = dense_loss(memory, x, w, partials, arrivals, finish, i);
  if (last) {
    elbo_totals_of_block(memory, loss, kl, schedule, state, free_bits, kl_weight, totals, n, d);
  }
}

// The same for the squared error with its weight.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) dense_squared_error_elbo(
    const float* __restrict__ x, const float* __restrict__ w, const float* __restrict__ b,
    float* __restrict__ y, int kind, float slope, const float* __restrict__ target,
    float* __restrict__ loss, float* __restrict__ dz, float scale, float weight,
    const float* __restrict__ kl, const float* __restrict__ schedule, long long* __restrict__ state,
    float free_bits, float* __restrict__ kl_weight, double* __restrict__ totals,
    float* __restrict__ row_sums, int* __restrict__ row_arrivals, float* __restrict__ partials,
    int* __restrict__ arrivals, int n, int i, int o, int d) {
  __shared__ __align__(16) float memory[MEMORY];
  LossOfOutput<SquaredErrorLoss> finish = {
      b, y, target, dz, kind, slope, {scale, weight, kind, slope}, {row_sums, row_arrivals, loss},
      1, n, o};
  bool last = dense_loss(memory, x, w, partials, arrivals, finish, i);
  if (last) {
    elbo_totals_of_block(memory, loss, kl, schedule, state, free_bits, kl_weight, totals, n, d);
  }
}

// The Bernoulli loss of k draws per image: x, y, dz, log_ratio, weights have rows i k + s, target
// (n, o) and loss (n,) one per image. Makes weights, and dz as if each draw had weight 1 and the
// batch one image: importance_weigh scales it.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) dense_importance_elbo(
    const float* __restrict__ x, const float* __restrict__ w, const float* __restrict__ b,
    float* __restrict__ y, int kind, float slope, const float* __restrict__ target,
    const float* __restrict__ log_ratio, float* __restrict__ weights, float* __restrict__ loss,
    float* __restrict__ dz, int importance, const float* __restrict__ kl,
    const float* __restrict__ schedule, long long* __restrict__ state, float free_bits,
    float* __restrict__ kl_weight, double* __restrict__ totals, float* __restrict__ row_sums,
    int* __restrict__ row_arrivals, float* __restrict__ partials, int* __restrict__ arrivals, int n,
    int k, int i, int o, int d) {
  __shared__ __align__(16) float memory[MEMORY];
  LossOfOutput<BernoulliLoss> finish = {
      b, y, target, dz, kind, slope, {1.0f}, {row_sums, row_arrivals, weights}, k, n * k, o};
  if (!dense_loss(memory, x, w, partials, arrivals, finish, i)) return;
  for (int image = threadIdx.x / WARP; image < n; image += THREADS / WARP) {
    size_t first = (size_t)image * k;
    float bound = bound_of_draws(weights + first, log_ratio + first, importance, k);
    if (threadIdx.x % WARP == 0) loss[image] = -bound;
  }
  __syncthreads();
  elbo_totals_of_block(memory, loss, kl, schedule, state, free_bits, kl_weight, totals, n, d);
}
