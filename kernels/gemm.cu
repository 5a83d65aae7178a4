// Two of the dense layer's three matrix products, by the equations of ops/dense.py: x w and dz w^T,
// with what may come before, after or beside them: the latent, the loss, the totals. The third,
// x^T dz, is in weights.cu. All are one loop over tiles, told apart by the axis along which each
// operand is read.

// x (n, i), w (i, o), b (o,), y (n, o); partials and arrivals as tile.cuh has them. Grid: tiles of
// y, by splits.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) dense_forward(
    const float* __restrict__ x, const float* __restrict__ w, const float* __restrict__ b,
    float* __restrict__ y, int kind, float slope, float* __restrict__ partials,
    int* __restrict__ arrivals, int n, int i, int o) {
  using A = Matrix<true>;
  using B = Matrix<false>;
  Place place(blockIdx.x, o);
  Share share = this_share(partials, arrivals);
  multiply(
      memory, A{x, n, i}, B{w, o, i}, place.row, place.column, share.first(i), share.end(i), false);
  if (!share.gather(memory, n - place.row)) return;
  Epilogue(BiasAndActivation{b, y, kind, slope, o}, place, n, o).apply(memory);
}

// The latent as an operand: z (n, d) is drawn where it is read, a run with one counter of Philox.
// Each column of tiles draws it; one `leaves` it in memory, with its KL. Beyond column d a run is
// multiplied by zeros. head (n, 2 d), z and kl (n, d).
struct Draw {
  static const bool INNER_DEPTH = true;
  const float* head;
  float* z;
  float* kl;
  unsigned long long seed;
  unsigned int stream;
  long long step;
  bool leaves;
  int n, d;
  __device__ __forceinline__ Run run(int row, int j) const {
    Run drawn = {}, divergence;
    int count = row < n ? d - j : 0;
    if (count <= 0) return drawn;
    const float* mean = head + (size_t)row * 2 * d + j;
    Run mu = load_run(mean, count), logvar = load_run(mean + d, count);
    float eps[RUN];
    normal4(random_words(j / RUN, row, step, seed, stream), eps);
#pragma unroll
    for (int i = 0; i < RUN; ++i) {
      latent_draw(mu.lane[i], logvar.lane[i], eps[i], drawn.lane[i], divergence.lane[i]);
    }
    if (leaves) {
      store_run(z + (size_t)row * d + j, drawn, count);
      store_run(kl + (size_t)row * d + j, divergence, count);
    }
    return drawn;
  }
};

// A thread's share in drawing slices, in place of copying them.
template <int LENGTH>
struct Copier<LENGTH, Draw> {
  static const bool vectors = true;
  const Draw& draw;
  int first_row;
  __device__ __forceinline__ Copier(const Draw& draw, int first_row)
      : draw(draw), first_row(first_row) {}
  __device__ __forceinline__ void copy(float* slice, int first_depth) const {
    copy_vectors(slice, first_depth);
  }
  __device__ __forceinline__ void copy_vectors(float* slice, int first_depth) const {
#pragma unroll 1
    for (int run = threadIdx.x; run < LENGTH * DEPTH / RUN; run += THREADS) {
      int row = run / (DEPTH / RUN), depth = run % (DEPTH / RUN) * RUN;
      float* target = slice + Slice<true, LENGTH>::at(row, depth);
      *(Run*)target = draw.run(first_row + row, first_depth + depth);
    }
  }
};

// latent_forward and dense_forward of the decoder's first layer. head (n, 2 d), z and kl (n, d), w
// (d, o), b (o,), y (n, o), state (5,). Grid: tiles of y, by splits.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) dense_latent_forward(
    const float* __restrict__ head, float* __restrict__ z, float* __restrict__ kl,
    unsigned long long seed, unsigned int stream, const long long* __restrict__ state,
    const float* __restrict__ w, const float* __restrict__ b, float* __restrict__ y, int kind,
    float slope, float* __restrict__ partials, int* __restrict__ arrivals, int n, int d, int o) {
  using B = Matrix<false>;
  Place place(blockIdx.x, o);
  Share share = this_share(partials, arrivals);
  Draw draw = {head, z, kl, seed, stream, state[STEP], place.column == 0, n, d};
  multiply(
      memory, draw, B{w, o, d}, place.row, place.column, share.first(d), share.end(d), false);
  if (!share.gather(memory, n - place.row)) return;
  Epilogue(BiasAndActivation{b, y, kind, slope, o}, place, n, o).apply(memory);
}

// A tile of dense_input_gradient, in a launch whose first `before` blocks along x do other work.
__device__ __forceinline__ void input_gradient_tile(
    float* memory, const float* dz, const float* w, const float* x, float* dz_below, int kind,
    float slope, float* partials, int* arrivals, int before, int n, int i, int o) {
  using A = Matrix<true>;
  using B = Matrix<true>;
  Place place(blockIdx.x - before, i);
  Share share = this_share(partials, arrivals, before);
  multiply(
      memory, A{dz, n, o}, B{w, i, o}, place.row, place.column, share.first(o), share.end(o),
      false);
  if (!share.gather(memory, n - place.row)) return;
  Epilogue(ActivationDerivative{x, dz_below, kind, slope, i}, place, n, i).apply(memory);
}

// dz (n, o), w (i, o), x and dz_below (n, i). Grid: tiles of dz_below, by splits.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) dense_input_gradient(
    const float* __restrict__ dz, const float* __restrict__ w, const float* __restrict__ x,
    float* __restrict__ dz_below, int kind, float slope, float* __restrict__ partials,
    int* __restrict__ arrivals, int n, int i, int o) {
  input_gradient_tile(memory, dz, w, x, dz_below, kind, slope, partials, arrivals, 0, n, i, o);
}

// The same, while block (0, 0) does elbo_totals. That makes loss (images,) from row_sums
// (columns_of_tiles, images), or finds it made if columns_of_tiles is 0. The others are as in
// elbo_totals: kl (images, d), schedule, state, kl_weight (d,), totals. Grid: one more along x,
// where all splits but the first do nothing.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) dense_input_gradient_totals(
    const float* __restrict__ dz, const float* __restrict__ w, const float* __restrict__ x,
    float* __restrict__ dz_below, int kind, float slope, const float* __restrict__ row_sums,
    float* __restrict__ loss, const float* __restrict__ kl, const float* __restrict__ schedule,
    long long* __restrict__ state, float free_bits, float* __restrict__ kl_weight,
    double* __restrict__ totals, float* __restrict__ partials, int* __restrict__ arrivals,
    int columns_of_tiles, int images, int d, int n, int i, int o) {
  if (blockIdx.x > 0) {
    input_gradient_tile(memory, dz, w, x, dz_below, kind, slope, partials, arrivals, 1, n, i, o);
    return;
  }
  if (blockIdx.y > 0) return;
  if (columns_of_tiles) add_up_tiles(row_sums, loss, columns_of_tiles, images);
  elbo_totals_of_block(memory, loss, kl, schedule, state, free_bits, kl_weight, totals, images, d);
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
  __device__ __forceinline__ bool is_aligned() const {
    return d % RUN == 0 && aligned(head, kl_weight, dhead);
  }
  template <bool VECTORS>
  __device__ __forceinline__ Fetched fetch(int row, int j, int count) const {
    const float* mu = head + (size_t)row * 2 * d + j;
    return {
        load_run<VECTORS>(mu, count), load_run<VECTORS>(mu + d, count),
        load_run<VECTORS>(kl_weight + j, count)};
  }
  template <bool VECTORS>
  __device__ __forceinline__ void apply(
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
    store_run<VECTORS>(target, dmu, count);
    store_run<VECTORS>(target + d, dlogvar, count);
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
  long long step = state[STEP];  // here, so that it is there when the epilogue needs it
  Place place(blockIdx.x, d);
  Share share = this_share(partials, arrivals);
  LatentBackward finish = {head, kl_weight, dhead, seed, stream, step, d};
  multiply(
      memory, A{dz, n, o}, B{w, d, o}, place.row, place.column, share.first(o), share.end(o),
      false);
  if (!share.gather(memory, n - place.row)) return;
  Epilogue(finish, place, n, d).apply(memory);
}

// y = f(z + b) and its loss: loss.pixel(output, target, d) returns a pixel's, and in d the gradient
// for dz. y and dz (n, o), target (n / draws, o). row_sums (columns of tiles, n) gets each row's
// loss in each column of tiles: the next launch adds these up, where no other block waits for it.
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
  float* row_sums;
  int draws, n, o;
  __device__ __forceinline__ bool is_aligned() const {
    return o % RUN == 0 && aligned(b, y, target, dz);
  }
  template <bool VECTORS>
  __device__ __forceinline__ Fetched fetch(int row, int column, int count) const {
    int image = draws == 1 ? row : row / draws;
    return {
        load_run<VECTORS>(b + column, count),
        load_run<VECTORS>(target + (size_t)image * o + column, count)};
  }
  template <bool VECTORS>
  __device__ __forceinline__ void apply(
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
    store_run<VECTORS>(y + (size_t)row * o + column, output, count);
    store_run<VECTORS>(dz + (size_t)row * o + column, gradient, count);
    // Neighbouring threads have a row of the tile together.
#pragma unroll
    for (int offset = COLUMNS / RUN / 2; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(WHOLE_WARP, sum, offset);
    }
    if (column % COLUMNS == 0 && count > 0) row_sums[(size_t)(column / COLUMNS) * n + row] = sum;
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

// The decoder's last layer with its loss.
template <class Loss>
__device__ __forceinline__ void dense_loss(
    float* memory, const float* x, const float* w, float* partials, int* arrivals,
    const LossOfOutput<Loss>& finish, int i) {
  using A = Matrix<true>;
  using B = Matrix<false>;
  int n = finish.n, o = finish.o;
  Place place(blockIdx.x, o);
  Share share = this_share(partials, arrivals);
  multiply(
      memory, A{x, n, i}, B{w, o, i}, place.row, place.column, share.first(i), share.end(i), false);
  if (!share.gather(memory, n - place.row)) return;
  Epilogue(finish, place, n, o).apply(memory);
}

// dense_forward and bernoulli_loss, or importance_loss without its weights: with k = `draws`, x, y
// and dz have rows i k + s, target has one row per image. x (n, i), w (i, o), b (o,), y and dz
// (n, o), target (n / draws, o), row_sums (columns of tiles, n). Grid: tiles of y, by splits.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) dense_bernoulli_loss(
    const float* __restrict__ x, const float* __restrict__ w, const float* __restrict__ b,
    float* __restrict__ y, int kind, float slope, const float* __restrict__ target,
    float* __restrict__ dz, float scale, float* __restrict__ row_sums, float* __restrict__ partials,
    int* __restrict__ arrivals, int draws, int n, int i, int o) {
  LossOfOutput<BernoulliLoss> finish = {
      b, y, target, dz, kind, slope, {scale}, row_sums, draws, n, o};
  dense_loss(memory, x, w, partials, arrivals, finish, i);
}

// The same for the squared error with its weight.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) dense_squared_error_loss(
    const float* __restrict__ x, const float* __restrict__ w, const float* __restrict__ b,
    float* __restrict__ y, int kind, float slope, const float* __restrict__ target,
    float* __restrict__ dz, float scale, float weight, float* __restrict__ row_sums,
    float* __restrict__ partials, int* __restrict__ arrivals, int draws, int n, int i, int o) {
  LossOfOutput<SquaredErrorLoss> finish = {
      b, y, target, dz, kind, slope, {scale, weight, kind, slope}, row_sums, draws, n, o};
  dense_loss(memory, x, w, partials, arrivals, finish, i);
}
