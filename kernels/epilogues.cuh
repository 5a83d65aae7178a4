// What becomes of a product's runs, each of four columns of a row. `fetch` loads what a run needs,
// `apply` finishes it; TOGETHER runs are fetched before the first is finished, since a store between
// two loads would have the second wait for the first. All are VECTORS (common.cuh) if the epilogue
// is_aligned, as are all rows that it reads and writes, and the tile's columns come in fours.

// y = f(z + b): dense.E0, conv.E1 and E5. y (rows, columns), b (columns,).
struct BiasAndActivation {
  static const int TOGETHER = 2;
  using Fetched = Run;
  const float* b;
  float* y;
  int kind;
  float slope;
  int columns;
  __device__ __forceinline__ bool is_aligned() const {
    return columns % RUN == 0 && aligned(b, y);
  }
  template <bool VECTORS>
  __device__ __forceinline__ Run fetch(int row, int column, int count) const {
    return load_run<VECTORS>(b + column, count);
  }
  template <bool VECTORS>
  __device__ __forceinline__ void apply(
      int row, int column, int count, Run z, const Run& bias) const {
    with_kind(kind, [&](auto known) {
#pragma unroll
      for (int i = 0; i < RUN; ++i) {
        z.lane[i] = activate(known.value, slope, z.lane[i] + bias.lane[i]);
      }
    });
    store_run<VECTORS>(y + (size_t)row * columns + column, z, count);
  }
};

// A gradient times the derivative of the activation below, which made x (dense.E4). x and dz_below
// (rows, columns).
struct ActivationDerivative {
  static const int TOGETHER = 4;
  using Fetched = Run;
  const float* x;
  float* dz_below;
  int kind;
  float slope;
  int columns;
  __device__ __forceinline__ bool is_aligned() const {
    return columns % RUN == 0 && aligned(x, dz_below);
  }
  template <bool VECTORS>
  __device__ __forceinline__ Run fetch(int row, int column, int count) const {
    return load_run<VECTORS>(x + (size_t)row * columns + column, count);
  }
  template <bool VECTORS>
  __device__ __forceinline__ void apply(
      int row, int column, int count, Run dy, const Run& output) const {
    with_kind(kind, [&](auto known) {
#pragma unroll
      for (int i = 0; i < RUN; ++i) {
        dy.lane[i] =
            activation_backward_from_output(known.value, slope, output.lane[i], dy.lane[i]);
      }
    });
    store_run<VECTORS>(dz_below + (size_t)row * columns + column, dy, count);
  }
};

// Stores a gradient (rows, columns) times its part's share of the batch, added to what is there if
// `accumulate` (dense.E5).
struct Store {
  static const int TOGETHER = 4;
  using Fetched = Run;
  float* gradient;
  float fraction;
  int accumulate;
  int columns;
  __device__ __forceinline__ bool is_aligned() const {
    return columns % RUN == 0 && aligned(gradient);
  }
  template <bool VECTORS>
  __device__ __forceinline__ Run fetch(int row, int column, int count) const {
    return load_run<VECTORS>(gradient + (size_t)row * columns + column, accumulate ? count : 0);
  }
  template <bool VECTORS>
  __device__ __forceinline__ void apply(
      int row, int column, int count, Run g, const Run& before) const {
#pragma unroll
    for (int i = 0; i < RUN; ++i) {
      float mine = g.lane[i];
      g.lane[i] = accumulate ? __fmaf_rn(fraction, mine, before.lane[i]) : fraction * mine;
    }
    store_run<VECTORS>(gradient + (size_t)row * columns + column, g, count);
  }
};

// A gradient (rows, columns) to Adam, which changes parameter and moments at once. It is never
// written to memory.
struct Update {
  static const int TOGETHER = 4;
  struct Fetched {
    Run p, m, v;
  };
  float* p;
  float* m;
  float* v;
  AdamStep step;
  int columns;
  __device__ __forceinline__ bool is_aligned() const {
    return columns % RUN == 0 && aligned(p, m, v);
  }
  template <bool VECTORS>
  __device__ __forceinline__ Fetched fetch(int row, int column, int count) const {
    size_t i = (size_t)row * columns + column;
    return {
        load_run<VECTORS>(p + i, count), load_run<VECTORS>(m + i, count),
        load_run<VECTORS>(v + i, count)};
  }
  template <bool VECTORS>
  __device__ __forceinline__ void apply(
      int row, int column, int count, const Run& g, Fetched old) const {
#pragma unroll
    for (int i = 0; i < RUN; ++i) {
      adam_element(old.p.lane[i], g.lane[i], old.m.lane[i], old.v.lane[i], step);
    }
    size_t i = (size_t)row * columns + column;
    store_run<VECTORS>(p + i, old.p, count);
    store_run<VECTORS>(m + i, old.m, count);
    store_run<VECTORS>(v + i, old.v, count);
  }
};

// Fetches and applies an epilogue for one run, whatever its alignment.
template <class Finish>
__device__ __forceinline__ void finish_run(
    int row, int column, int count, const Run& run, const Finish& finish) {
  finish.template apply<false>(
      row, column, count, run, finish.template fetch<false>(row, column, count));
}
