// Convolutions by the equations of ops/conv.py, as matrix products whose operand is an image read
// through an index map (an implicit GEMM: no matrix of columns is ever in memory).
//
//   correlate         small (n p q, k)  = windows of large (n p q, i j c)  x  w (i j c, k)     E1'
//   scatter           large (n h w, c)  = taps of small (n h w, i j k)     x  w (i j k, c)     E2
//   correlate_weight  dw (i j c, k)     = windows^T (i j c, n p q)         x  small (n p q, k) E3
//
// Both layers are made of these three: a convolution goes forward by the first and backward by the
// second, a transposed convolution the other way round.

// A divisor used again and again: multiplying by its inverse, which gives a quotient at most 1 too
// small (Granlund and Montgomery 1994), replaces a division in the loop.
struct Divisor {
  unsigned int value, inverse;
  __device__ __forceinline__ Divisor(int d) : value(max(d, 1)), inverse(0xffffffffu / value) {}
};

struct Divided {
  int quotient, remainder;
  __device__ __forceinline__ Divided(unsigned int a, const Divisor& d) {
    unsigned int q = __umulhi(a, d.inverse), r = a - q * d.value;
    bool below = r >= d.value;
    quotient = below ? q + 1 : q;
    remainder = below ? r - d.value : r;
  }
};

// An operand that is an image (height, width, channels), or many, is read at a position, moved by a
// tap. A position may lie outside of its image, and `pixel` with it, if a tap leads back.
struct Position {
  const float* pixel;
  int row, column;
};
struct Tap {
  int row, column, offset;
  int height, width;  // of the image
};

// The row of a position or tap past the last: added to any row, it is outside every image.
const int OUTSIDE = -(1 << 30);

__device__ __forceinline__ Element element(const Position& position, const Tap& tap) {
  bool inside = (unsigned int)(position.row + tap.row) < (unsigned int)tap.height;
  inside = inside && (unsigned int)(position.column + tap.column) < (unsigned int)tap.width;
  return {position.pixel + tap.offset, inside};
}

__device__ __forceinline__ Element element(const Tap& tap, const Position& position) {
  return element(position, tap);
}

// large as operand of correlate: outer is a position (n, p, q), depth a tap and channel (i, j, c).
// As operand of correlate_weight the two change places. The channels are inner in both.
template <bool DEPTH_IS_TAP>
struct Windows {
  static const bool INNER_DEPTH = DEPTH_IS_TAP;
  const float* data;
  Shape s;
  Divisor rows = s.rows, columns = s.columns, channels = s.channels, taps_w = s.taps_w;

  __device__ __forceinline__ bool vectors() const {
    return s.channels % RUN == 0 && aligned(data);
  }

  __device__ __forceinline__ Position position(int index) const {
    Divided q(index, columns), p(q.quotient, rows);
    int image = p.quotient, column = q.remainder * s.stride_w - s.left;
    int row = p.remainder * s.stride_h - s.top;
    long long pixel = ((long long)image * s.height + row) * s.width + column;
    return {data + pixel * s.channels, image < s.images ? row : OUTSIDE, column};
  }

  __device__ __forceinline__ Tap tap(int index) const {
    Divided channel(index, channels), j(channel.quotient, taps_w);
    int row = j.quotient, column = j.remainder;
    int offset = (row * s.width + column) * s.channels + channel.remainder;
    return {row < s.taps_h ? row : OUTSIDE, column, offset, s.height, s.width};
  }

  __device__ __forceinline__ auto outer(int o) const {
    if constexpr (DEPTH_IS_TAP) return position(o); else return tap(o);
  }

  __device__ __forceinline__ auto depth(int d) const {
    if constexpr (DEPTH_IS_TAP) return tap(d); else return position(d);
  }
};

// small as operand of scatter: outer is a pixel (n, h, w) of a phase, depth a tap of the phase and
// a filter (i, j, k).
struct Taps {
  static const bool INNER_DEPTH = true;
  const float* data;
  Shape s;
  Phase phase;
  Divisor height = phase.height, width = phase.width;
  Divisor filters = s.filters, taps_w = phase.taps_w;

  __device__ __forceinline__ bool vectors() const {
    return s.filters % RUN == 0 && aligned(data);
  }

  __device__ __forceinline__ Position outer(int index) const {
    Divided w(index, width), h(w.quotient, height);
    int image = h.quotient, q = w.remainder + phase.column_shift;
    int p = h.remainder + phase.row_shift;
    long long pixel = ((long long)image * s.rows + p) * s.columns + q;
    return {data + pixel * s.filters, image < s.images ? p : OUTSIDE, q};
  }

  __device__ __forceinline__ Tap depth(int index) const {
    Divided filter(index, filters), j(filter.quotient, taps_w);
    int row = j.quotient, column = j.remainder;
    int offset = filter.remainder - (row * s.columns + column) * s.filters;
    return {row < phase.taps_h ? -row : OUTSIDE, -column, offset, s.rows, s.columns};
  }
};

// w as operand of scatter: outer is a channel, depth a tap of the phase and a filter.
struct PhaseWeight {
  static const bool INNER_DEPTH = true;
  const float* data;
  Shape s;
  Phase phase;
  Divisor filters = s.filters, taps_w = phase.taps_w;

  __device__ __forceinline__ bool vectors() const {
    return s.filters % RUN == 0 && aligned(data);
  }

  __device__ __forceinline__ Line outer(int channel) const {
    return {data + (size_t)channel * s.filters, channel < s.channels};
  }

  __device__ __forceinline__ Step depth(int index) const {
    Divided filter(index, filters), j(filter.quotient, taps_w);
    int row = phase.first_tap_h + j.quotient * s.stride_h;
    int column = phase.first_tap_w + j.remainder * s.stride_w;
    size_t tap = row * s.taps_w + column;
    return {tap * s.channels * s.filters + filter.remainder, j.quotient < phase.taps_h};
  }
};

// An epilogue for the pixels of a phase, which lie apart in large.
template <class Finish>
struct OfPhase {
  static const int TOGETHER = Finish::TOGETHER;
  struct Fetched {
    int row;
    typename Finish::Fetched inner;
  };
  Shape s;
  Phase phase;
  Finish inner;
  Divisor height = phase.height, width = phase.width;
  __device__ __forceinline__ bool is_aligned() const { return inner.is_aligned(); }
  template <bool VECTORS>
  __device__ __forceinline__ Fetched fetch(int pixel, int channel, int count) const {
    Divided w(pixel, width), h(w.quotient, height);
    int row = h.remainder * s.stride_h + phase.first_row;
    int column = w.remainder * s.stride_w + phase.first_column;
    row = (h.quotient * s.height + row) * s.width + column;
    return {row, inner.template fetch<VECTORS>(row, channel, count)};
  }
  template <bool VECTORS>
  __device__ __forceinline__ void apply(
      int pixel, int channel, int count, const Run& run, const Fetched& at) const {
    inner.template apply<VECTORS>(at.row, channel, count, run, at.inner);
  }
};

// E1' and an epilogue. Grid: tiles of small, by splits.
template <class Finish>
__device__ __forceinline__ void correlate(
    float* memory, const float* large, const float* w, float* partials, int* arrivals,
    const Shape& s, const Finish& finish, int before = 0) {
  using A = Windows<true>;
  using B = Matrix<false>;
  int positions = s.images * s.rows * s.columns, depth = s.taps_h * s.taps_w * s.channels;
  Place place(blockIdx.x - before, s.filters);
  Share share = this_share(partials, arrivals, before);
  multiply(
      memory, A{large, s}, B{w, s.filters, depth}, place.row, place.column, share.first(depth),
      share.end(depth), false);
  if (!share.gather(memory, positions - place.row)) return;
  Epilogue(finish, place, positions, s.filters).apply(memory);
}

// E2 and an epilogue. Grid: tiles of the largest phase, by splits, by phases.
template <class Finish>
__device__ __forceinline__ void scatter(
    float* memory, const float* small, const float* w, float* partials, int* arrivals,
    const Shape& s, const Finish& finish) {
  using A = Taps;
  using B = PhaseWeight;
  Phase phase(s, blockIdx.z);
  int pixels = s.images * phase.height * phase.width;
  int depth = phase.taps_h * phase.taps_w * s.filters;
  Place place(blockIdx.x, s.channels);
  if (place.row >= pixels) return;
  Share share = this_share(partials, arrivals);
  multiply(
      memory, A{small, s, phase}, B{w, s, phase}, place.row, place.column, share.first(depth),
      share.end(depth), false);
  if (!share.gather(memory, pixels - place.row)) return;
  Epilogue(OfPhase<Finish>{s, phase, finish}, place, pixels, s.channels).apply(memory);
}

__device__ __forceinline__ void add(float& sum, float term) { sum += term; }

__device__ __forceinline__ void add_product(Run& sum, float a, const Run& b) {
#pragma unroll
  for (int i = 0; i < RUN; ++i) sum.lane[i] = __fmaf_rn(a, b.lane[i], sum.lane[i]);
}

// The sums over the rows from `first` to `end` of z (rows, columns), of `width` columns from
// `first_column`, left in `sums` (THREADS * RUN,). A thread has neighbouring columns, as many as
// Lanes has floats, of some rows, eight of which it asks for before adding the first. Then the
// threads' sums are folded in half until one row is left. Ends with a barrier.
template <class Lanes>
__device__ __forceinline__ void add_rows(
    float* sums, const float* z, int first, int end, int first_column, int width, int columns) {
  const int lanes = sizeof(Lanes) / sizeof(float), at_once = 8;
  int across = width / lanes, together = THREADS / across;
  int row = threadIdx.x / across, column = threadIdx.x % across * lanes;
  const float* source = z + first_column + column;
  Lanes sum = {};
#pragma unroll 1
  for (int r = first + row; row < together && r < end; r += at_once * together) {
    Lanes terms[at_once] = {};
#pragma unroll
    for (int t = 0; t < at_once; ++t) {
      int other = r + t * together;
      if (other < end) terms[t] = __ldcg((const Lanes*)(source + (size_t)other * columns));
    }
#pragma unroll
    for (int t = 0; t < at_once; ++t) add(sum, terms[t]);
  }
  if (row < together) *(Lanes*)(sums + row * width + column) = sum;
  __syncthreads();
  for (int left = together; left > 1; left = ceil_div(left, 2)) {
    int half = ceil_div(left, 2);
#pragma unroll 1
    for (int i = threadIdx.x; i < (left - half) * width; i += THREADS) {
      sums[i] += sums[half * width + i];
    }
    __syncthreads();
  }
}

// The sums of the columns of z (rows, columns), for the bias of a transposed convolution (E4), by
// one block of a share whose tiles are groups of THREADS columns, and whose splits runs of rows.
// The block that arrives last adds up the runs' sums. `sums` (THREADS * RUN,).
template <class Finish, class End>
__device__ __forceinline__ void column_sums(
    float* sums, const float* z, const Share& share, int rows, int columns, const Finish& finish,
    End& end) {
  int first_column = share.tile * THREADS, width = min(columns - first_column, THREADS);
  int column = first_column + threadIdx.x, run = ceil_div(rows, share.splits);
  bool vectors = Matrix<false>{z, columns, rows}.vectors();
  auto add_up = [&](const float* matrix, int first, int end) {
    if (vectors) {
      add_rows<float4>(sums, matrix, first, end, first_column, width, columns);
    } else {
      add_rows<float>(sums, matrix, first, end, first_column, width, columns);
    }
  };
  add_up(z, share.split * run, min(rows, (share.split + 1) * run));
  end.count();
  float* mine = share.partials + (size_t)share.split * columns;
  if (threadIdx.x < width) mine[column] = sums[threadIdx.x];
  if (!last_to_arrive(share.arrivals + share.tile, share.splits)) return;
  add_up(share.partials, 0, share.splits);
  if (threadIdx.x >= width) return;
  finish_run(0, column, 1, Run{{sums[threadIdx.x]}}, finish);
}

// One of a group of gradients: a weight's, perhaps with its bias's; or, without `small`, a bias's,
// the sums of `large`'s columns. `weight` and `bias` are offsets in a flat buffer.
struct Job : Division {
  const float* large;
  const float* small;
  long long weight, bias, with_bias;
  long long images, height, width, channels, rows, columns, filters;
  long long taps_h, taps_w, stride_h, stride_w, top, left;

  __device__ __forceinline__ Shape shape() const {
    return {(int)images, (int)height, (int)width, (int)channels, (int)rows, (int)columns,
            (int)filters, (int)taps_h, (int)taps_w, (int)stride_h, (int)stride_w, (int)top,
            (int)left};
  }
};

// A window of few rows, each of few neighbours (taps times channels), as one of a grey image is,
// would leave most rows of a tile empty. Instead a thread has all of it in registers, for four
// filters, and a team of threads for FEW_FILTERS. It asks for POSITIONS at once.
const int FEW_TAPS = 3;
const int FEW_FILTERS = COLUMNS < 32 ? COLUMNS : 32;
const int TEAM = FEW_FILTERS / RUN;
const int TEAMS = THREADS / TEAM;
const int POSITIONS = 4;

__device__ __forceinline__ bool has_few_taps(const Shape& s) {
  return s.taps_h <= FEW_TAPS && s.taps_w * s.channels <= FEW_TAPS;
}

// What large has of a window at a position, with zeros outside of it and of the image.
struct FewTaps {
  float of[FEW_TAPS][FEW_TAPS];
};

__device__ __forceinline__ FewTaps few_taps(
    const float* large, const Shape& s, const Divided& p, const Divided& q, bool exists) {
  int width = s.width * s.channels, across = s.taps_w * s.channels;
  int row = p.remainder * s.stride_h - s.top;
  int column = (q.remainder * s.stride_w - s.left) * s.channels;
  const float* source = large + ((long long)p.quotient * s.height + row) * width + column;
  FewTaps taps;
#pragma unroll
  for (int i = 0; i < FEW_TAPS; ++i, source += width) {
    bool inside = exists && i < s.taps_h && (unsigned int)(row + i) < (unsigned int)s.height;
#pragma unroll
    for (int j = 0; j < FEW_TAPS; ++j) {
      bool here = inside && j < across && (unsigned int)(column + j) < (unsigned int)width;
      taps.of[i][j] = here ? source[j] : 0.0f;
    }
  }
  return taps;
}

// The sums of a thread: of each tap's products with its four filters, and of the filters alone.
struct FewSums {
  Run taps[FEW_TAPS][FEW_TAPS] = {}, filters = {};

  __device__ __forceinline__ void add(const FewTaps& x, const Run& z) {
    filters += z;
#pragma unroll
    for (int i = 0; i < FEW_TAPS; ++i) {
#pragma unroll
      for (int j = 0; j < FEW_TAPS; ++j) add_product(taps[i][j], x.of[i][j], z);
    }
  }

  // Adds up the sums of all teams, and leaves them in `memory` as a result. Ends with a barrier.
  __device__ __forceinline__ void leave(float* memory, const Shape& s) const {
    const int most = 1 + FEW_TAPS * FEW_TAPS;
    static_assert(most * (COLUMNS + RUN * THREADS) <= MEMORY, "result and sums have to fit");
    int across = s.taps_w * s.channels, rows = 1 + s.taps_h * across;
    Run* teams = (Run*)(memory + most * COLUMNS);
    Run* mine = teams + threadIdx.x / TEAM * rows * TEAM + threadIdx.x % TEAM;
    mine[0] = filters;
#pragma unroll
    for (int i = 0; i < FEW_TAPS; ++i) {
#pragma unroll
      for (int j = 0; j < FEW_TAPS; ++j) {
        if (i < s.taps_h && j < across) mine[(1 + i * across + j) * TEAM] = taps[i][j];
      }
    }
    __syncthreads();
    if (threadIdx.x < rows * TEAM) {
      Run sum = {};
      for (int team = 0; team < TEAMS; ++team) sum += teams[team * rows * TEAM + threadIdx.x];
      int row = threadIdx.x / TEAM, column = threadIdx.x % TEAM * RUN;
      *(Run*)(memory + (row ? COLUMNS + in_result(row - 1, column) : column)) = sum;
    }
    __syncthreads();
  }
};

// E3 and E4 of small for the filters from `first_filter`, over the positions from `first` to `end`,
// of which a team has every TEAMS-th; left in `memory` as a result, whose columns from FEW_FILTERS
// on are undefined. Ends with a barrier.
__device__ __forceinline__ void multiply_few(
    float* memory, const float* large, const float* small, const Shape& s, int first_filter,
    unsigned int first, unsigned int end) {
  Divisor columns = s.columns, rows = s.rows;
  int filter = first_filter + threadIdx.x % TEAM * RUN;
  FewSums sums;
#pragma unroll 1
  for (first += threadIdx.x / TEAM; first < end; first += POSITIONS * TEAMS) {
    Run z[POSITIONS];
    FewTaps x[POSITIONS];
#pragma unroll
    for (int k = 0; k < POSITIONS; ++k) {
      unsigned int index = first + k * TEAMS;
      bool exists = index < end;
      z[k] = load_run(small + product(index, s.filters) + filter, exists ? s.filters - filter : 0);
      Divided q(index, columns), p(q.quotient, rows);
      x[k] = few_taps(large, s, p, q, exists);
    }
#pragma unroll
    for (int k = 0; k < POSITIONS; ++k) sums.add(x[k], z[k]);
  }
  sums.leave(memory, s);
}

// E3 and, if the job has a bias of small, E4, by one block of a share, which is counted at `end`
// before the epilogue.
template <class Finish, class End>
__device__ __forceinline__ void correlate_weight(
    float* memory, const Job* job, const Share& share, const Shape& s, const Finish& finish,
    End& end) {
  using A = Windows<false>;
  using B = Matrix<false>;
  int taps = s.taps_h * s.taps_w * s.channels, depth = s.images * s.rows * s.columns;
  Place place(share.tile, s.filters);
  int columns = s.filters;
  if (has_few_taps(s)) {
    place.row = 0, place.column = share.tile * FEW_FILTERS;
    columns = min(s.filters, place.column + FEW_FILTERS);
    multiply_few(
        memory, job->large, job->small, s, place.column, share.first(depth), share.end(depth));
  } else {
    multiply(
        memory, A{job->large, s}, B{job->small, s.filters, depth}, place.row, place.column,
        share.first(depth), share.end(depth), job->with_bias && place.row == 0);
  }
  end.count();
  if (!share.gather(memory, taps - place.row)) return;
  Epilogue(finish(job->weight, s.filters), place, taps, columns).apply(memory);
  if (job->with_bias && place.row == 0) {
    for_sums(memory, place.column, columns, finish(job->bias, s.filters));
  }
}

// A block's part of a group of gradients. `finish(first, columns)` makes the epilogue of a tensor
// that begins there.
template <class Finish, class End>
__device__ __forceinline__ void conv_gradients(
    float* memory, const Job* job, float* partials, int* arrivals, const Finish& finish, End& end) {
  Share share = job->share(partials, arrivals);
  Shape s = job->shape();
  if (job->small) {
    correlate_weight(memory, job, share, s, finish, end);
  } else {
    int rows = s.images * s.height * s.width;
    column_sums(
        memory, job->large, share, rows, s.channels, finish(job->bias, s.channels), end);
  }
}

// The kernels. large (images, height, width, channels), small (images, rows, columns, filters),
// w (taps_h, taps_w, channels, filters); partials and arrivals as tile.cuh has them.

// x large, y small, b (filters,). E1.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) conv2d_forward(
    const float* __restrict__ x, const float* __restrict__ w, const float* __restrict__ b,
    float* __restrict__ y, int kind, float slope, float* __restrict__ partials,
    int* __restrict__ arrivals, int images, int height, int width, int channels, int rows,
    int columns, int filters, int taps_h, int taps_w, int stride_h, int stride_w, int top,
    int left) {
  Shape s = {images, height, width, channels, rows, columns, filters,
             taps_h, taps_w, stride_h, stride_w, top, left};
  correlate(memory, x, w, partials, arrivals, s, BiasAndActivation{b, y, kind, slope, filters});
}

// dz small, x and dz_below large. E2.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) conv2d_input_gradient(
    const float* __restrict__ dz, const float* __restrict__ w, const float* __restrict__ x,
    float* __restrict__ dz_below, int kind, float slope, float* __restrict__ partials,
    int* __restrict__ arrivals, int images, int height, int width, int channels, int rows,
    int columns, int filters, int taps_h, int taps_w, int stride_h, int stride_w, int top,
    int left) {
  Shape s = {images, height, width, channels, rows, columns, filters,
             taps_h, taps_w, stride_h, stride_w, top, left};
  scatter(
      memory, dz, w, partials, arrivals, s,
      ActivationDerivative{x, dz_below, kind, slope, channels});
}

// x small, y large, b (channels,). E5.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) conv_transpose2d_forward(
    const float* __restrict__ x, const float* __restrict__ w, const float* __restrict__ b,
    float* __restrict__ y, int kind, float slope, float* __restrict__ partials,
    int* __restrict__ arrivals, int images, int height, int width, int channels, int rows,
    int columns, int filters, int taps_h, int taps_w, int stride_h, int stride_w, int top,
    int left) {
  Shape s = {images, height, width, channels, rows, columns, filters,
             taps_h, taps_w, stride_h, stride_w, top, left};
  scatter(memory, x, w, partials, arrivals, s, BiasAndActivation{b, y, kind, slope, channels});
}

// dz large, x and dz_below small. E6.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) conv_transpose2d_input_gradient(
    const float* __restrict__ dz, const float* __restrict__ w, const float* __restrict__ x,
    float* __restrict__ dz_below, int kind, float slope, float* __restrict__ partials,
    int* __restrict__ arrivals, int images, int height, int width, int channels, int rows,
    int columns, int filters, int taps_h, int taps_w, int stride_h, int stride_w, int top,
    int left) {
  Shape s = {images, height, width, channels, rows, columns, filters,
             taps_h, taps_w, stride_h, stride_w, top, left};
  correlate(
      memory, dz, w, partials, arrivals, s,
      ActivationDerivative{x, dz_below, kind, slope, filters});
}

// The same, while block (0, 0) does elbo_totals of n images, with its arguments: loss (n,), kl
// (n, d), schedule, state, kl_weight (d,), totals. Grid: one more along x, where all splits but the
// first do nothing.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
conv_transpose2d_input_gradient_totals(
    const float* __restrict__ dz, const float* __restrict__ w, const float* __restrict__ x,
    float* __restrict__ dz_below, int kind, float slope, const float* __restrict__ loss,
    const float* __restrict__ kl, const float* __restrict__ schedule,
    long long* __restrict__ state, float free_bits, float* __restrict__ kl_weight,
    double* __restrict__ totals, float* __restrict__ partials, int* __restrict__ arrivals, int n,
    int d, int images, int height, int width, int channels, int rows, int columns, int filters,
    int taps_h, int taps_w, int stride_h, int stride_w, int top, int left) {
  if (blockIdx.x > 0) {
    Shape s = {images, height, width, channels, rows, columns, filters,
               taps_h, taps_w, stride_h, stride_w, top, left};
    correlate(
        memory, dz, w, partials, arrivals, s,
        ActivationDerivative{x, dz_below, kind, slope, filters}, 1);
  } else if (blockIdx.y == 0) {
    elbo_totals_of_block(memory, loss, kl, schedule, state, free_bits, kl_weight, totals, n, d);
  }
}

// More of these would not find registers on every GPU.
const int GRADIENT_BLOCKS = BLOCKS < 3 ? BLOCKS : 3;

// The gradients of a group of layers, jobs (count,), into the flat buffer g. E3, E4 and E7. Grid:
// the blocks of all jobs.
extern "C" __global__ void __launch_bounds__(THREADS, GRADIENT_BLOCKS) conv_weight_gradient(
    const long long* __restrict__ jobs, float* __restrict__ g, float fraction, int accumulate,
    float* __restrict__ partials, int* __restrict__ arrivals, int count) {
  const Job* job = this_job<Job>(jobs, count);
  auto finish = [&](long long first, int columns) {
    return Store{g + first, fraction, accumulate, columns};
  };
  NoEnd end;
  conv_gradients(memory, job, partials, arrivals, finish, end);
}

// The same, with Adam on each parameter as soon as its gradient is known: p, m and v are the flat
// buffers, schedule (steps, 5), state (5,). `all` a counter. Unless batch_size is 0, goes on
// to the next step.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) conv_weight_update(
    const long long* __restrict__ jobs, float* __restrict__ p, float* __restrict__ m,
    float* __restrict__ v, const float* __restrict__ schedule, long long* __restrict__ state,
    float new1, float new2, float epsilon, int* __restrict__ all, float* __restrict__ partials,
    int* __restrict__ arrivals, int batch_size, int count) {
  const Job* job = this_job<Job>(jobs, count);
  AdamStep step = adam_step(schedule, state, new1, new2, epsilon);
  if (state[FAILED]) return;  // not before: the loads above need not wait for this one
  auto finish = [&](long long first, int columns) {
    return Update{p + first, m + first, v + first, step, columns};
  };
  StepEnd end = {all, state, batch_size, (int)gridDim.x, 0};
  conv_gradients(memory, job, partials, arrivals, finish, end);
  end.finish();
}
