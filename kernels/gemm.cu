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
  __shared__ __align__(16) float memory[Memory<A, B>::SIZE];
  Place place(blockIdx.x, o);
  Share share = this_share(partials, arrivals);
  multiply<false>(
      memory, A{x, n, i}, B{w, o, i}, place.row, place.column, share.first(i), share.end(i));
  if (!share.gather(memory)) return;
  for_each_element(
      memory, place.row, place.column, n, o, BiasAndActivation{b, y, kind, slope, o});
}

// dz (n, o), w (i, o), x and dx (n, i). Grid: tiles of dx, by splits.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) dense_input_gradient(
    const float* __restrict__ dz, const float* __restrict__ w, const float* __restrict__ x,
    float* __restrict__ dx, int kind, float slope, float* __restrict__ partials,
    int* __restrict__ arrivals, int n, int i, int o) {
  using A = Matrix<true>;
  using B = Matrix<true>;
  __shared__ __align__(16) float memory[Memory<A, B>::SIZE];
  Place place(blockIdx.x, i);
  Share share = this_share(partials, arrivals);
  multiply<false>(
      memory, A{dz, n, o}, B{w, i, o}, place.row, place.column, share.first(o), share.end(o));
  if (!share.gather(memory)) return;
  for_each_element(
      memory, place.row, place.column, n, i, ActivationDerivative{x, dx, kind, slope, i});
}

// The epilogue that ends in the encoder's head: dz of a latent dimension gives dhead at two places
// (latent.E3, E4), with the noise that latent_forward made. head, dhead (n, 2 d), kl_weight (d,).
struct LatentBackward {
  const float* head;
  const float* kl_weight;
  float* dhead;
  unsigned long long seed;
  unsigned int stream;
  long long step;
  int d;
  __device__ __forceinline__ void operator()(int row, int j, float upstream) const {
    float eps[4];
    normal4(random_words(j / 4, row, step, seed, stream), eps);
    int lane = j % 4;
    float noise = lane == 0 ? eps[0] : lane == 1 ? eps[1] : lane == 2 ? eps[2] : eps[3];
    size_t i = (size_t)row * 2 * d + j;
    latent_gradient(head[i], head[i + d], noise, upstream, kl_weight[j], dhead[i], dhead[i + d]);
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
  __shared__ __align__(16) float memory[Memory<A, B>::SIZE];
  Place place(blockIdx.x, d);
  Share share = this_share(partials, arrivals);
  multiply<false>(
      memory, A{dz, n, o}, B{w, d, o}, place.row, place.column, share.first(o), share.end(o));
  if (!share.gather(memory)) return;
  for_each_element(
      memory, place.row, place.column, n, d,
      LatentBackward{head, kl_weight, dhead, seed, stream, state[STEP], d});
}

// Where the fused losses leave their sums: a row's loss for each column of tiles,
// (tiles across, n), and counters: one for all rows of tiles, then one for each.
struct RowSums {
  float* parts;
  int* arrivals;
  float* loss;

  // Adds up the losses that `memory` has, one for each pixel of the tile. True in the block that is
  // the last of the launch.
  __device__ __forceinline__ bool gather(const float* memory, const Place& place, int n, int o) {
    int tiles = ceil_div(o, COLUMNS), row = place.row + threadIdx.x;
    bool mine = threadIdx.x < ROWS && row < n;
    if (mine) {
      float sum = 0.0f;
      // Each thread begins at a column of its own, so that a warp reads from different banks.
      for (int j = 0; j < COLUMNS; ++j) {
        sum += memory[threadIdx.x * COLUMNS + (j + threadIdx.x) % COLUMNS];
      }
      parts[(size_t)(place.column / COLUMNS) * n + row] = sum;
    }
    if (!last_to_arrive(arrivals + 1 + place.row / ROWS, tiles)) return false;
    if (mine) {
      float sum = 0.0f;
      for (int tile = 0; tile < tiles; ++tile) sum += __ldcg(parts + (size_t)tile * n + row);
      loss[row] = sum;
    }
    return last_to_arrive(arrivals, ceil_div(n, ROWS));
  }
};

// The decoder's last layer with its loss: y = f(x w + b), and what loss(row, column, output) says,
// added up over each row. True in the block that is the last of the launch.
template <class Loss>
__device__ __forceinline__ bool dense_loss(
    const float* x, const float* w, const float* b, float* y, int kind, float slope,
    float* partials, int* arrivals, RowSums sums, int n, int i, int o, const Loss& loss) {
  using A = Matrix<true>;
  using B = Matrix<false>;
  __shared__ __align__(16) float memory[Memory<A, B>::SIZE];
  Place place(blockIdx.x, o);
  Share share = this_share(partials, arrivals);
  multiply<false>(
      memory, A{x, n, i}, B{w, o, i}, place.row, place.column, share.first(i), share.end(i));
  if (!share.gather(memory)) return false;
#pragma unroll 2
  for (int e = threadIdx.x; e < ROWS * COLUMNS; e += THREADS) {
    int row = place.row + e / COLUMNS, column = place.column + e % COLUMNS;
    float pixel_loss = 0.0f;
    if (row < n && column < o) {
      float output = activate(kind, slope, memory[e] + b[column]);
      y[(size_t)row * o + column] = output;
      pixel_loss = loss(row, column, output);
    }
    memory[e] = pixel_loss;
  }
  __syncthreads();
  return sums.gather(memory, place, n, o);
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
  bool last = dense_loss(
      x, w, b, y, kind, slope, partials, arrivals, RowSums{row_sums, row_arrivals, loss}, n, i, o,
      [&](int row, int column, float logit) {
        size_t e = (size_t)row * o + column;
        return bernoulli(logit, target[e], scale, dz[e]);
      });
  if (last) add_totals<THREADS>(loss, kl, schedule, state, free_bits, kl_weight, totals, n, d);
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
  bool last = dense_loss(
      x, w, b, y, kind, slope, partials, arrivals, RowSums{row_sums, row_arrivals, loss}, n, i, o,
      [&](int row, int column, float output) {
        size_t e = (size_t)row * o + column;
        return squared_error(output, target[e], scale, weight, kind, slope, dz[e]);
      });
  if (last) add_totals<THREADS>(loss, kl, schedule, state, free_bits, kl_weight, totals, n, d);
}

// The Bernoulli loss of k draws an image, the rows i k + s of all but target (n, o) and loss (n,):
// weights (n k,) from log_ratio (n k,), and dz as if every draw had the weight 1 and the batch one
// image, for importance_weigh to go on with.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) dense_importance_elbo(
    const float* __restrict__ x, const float* __restrict__ w, const float* __restrict__ b,
    float* __restrict__ y, int kind, float slope, const float* __restrict__ target,
    const float* __restrict__ log_ratio, float* __restrict__ weights, float* __restrict__ loss,
    float* __restrict__ dz, int importance, const float* __restrict__ kl,
    const float* __restrict__ schedule, long long* __restrict__ state, float free_bits,
    float* __restrict__ kl_weight, double* __restrict__ totals, float* __restrict__ row_sums,
    int* __restrict__ row_arrivals, float* __restrict__ partials, int* __restrict__ arrivals, int n,
    int k, int i, int o, int d) {
  bool last = dense_loss(
      x, w, b, y, kind, slope, partials, arrivals, RowSums{row_sums, row_arrivals, weights}, n * k,
      i, o, [&](int row, int column, float logit) {
        float pixel = target[(size_t)(row / k) * o + column];
        return bernoulli(logit, pixel, 1.0f, dz[(size_t)row * o + column]);
      });
  if (!last) return;
  for (int image = threadIdx.x / WARP; image < n; image += THREADS / WARP) {
    size_t first = (size_t)image * k;
    float bound = bound_of_draws(weights + first, log_ratio + first, importance, k);
    if (threadIdx.x % WARP == 0) loss[image] = -bound;
  }
  __syncthreads();
  add_totals<THREADS>(loss, kl, schedule, state, free_bits, kl_weight, totals, n, d);
}
