// What becomes of a product's runs, each of four columns of a row. `fetch` loads what a run needs,
// operator() finishes the run; TOGETHER runs are fetched before the first is finished, since a
// store between two loads would have the second wait for the first.

// y = f(z + b): dense.E0, conv.E1 and E5. y (rows, columns), b (columns,).
struct BiasAndActivation {
  static const int TOGETHER = 2;
  using Fetched = Run;
  const float* b;
  float* y;
  int kind;
  float slope;
  int columns;
  __device__ __forceinline__ Run fetch(int row, int column, int count) const {
    return load_run(b + column, count);
  }
  __device__ __forceinline__ void operator()(
      int row, int column, int count, Run z, const Run& bias) const {
    with_kind(kind, [&](auto known) {
#pragma unroll
      for (int i = 0; i < RUN; ++i) {
        z.lane[i] = activate(known.value, slope, z.lane[i] + bias.lane[i]);
      }
    });
    store_run(y + (size_t)row * columns + column, z, count);
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
  __device__ __forceinline__ Run fetch(int row, int column, int count) const {
    return load_run(x + (size_t)row * columns + column, count);
  }
  __device__ __forceinline__ void operator()(
      int row, int column, int count, Run dy, const Run& output) const {
    with_kind(kind, [&](auto known) {
#pragma unroll
      for (int i = 0; i < RUN; ++i) {
        dy.lane[i] =
            activation_backward_from_output(known.value, slope, output.lane[i], dy.lane[i]);
      }
    });
    store_run(dz_below + (size_t)row * columns + column, dy, count);
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
  __device__ __forceinline__ Run fetch(int row, int column, int count) const {
    return load_run(gradient + (size_t)row * columns + column, accumulate ? count : 0);
  }
  __device__ __forceinline__ void operator()(
      int row, int column, int count, Run g, const Run& before) const {
#pragma unroll
    for (int i = 0; i < RUN; ++i) {
      float mine = g.lane[i];
      g.lane[i] = accumulate ? __fmaf_rn(fraction, mine, before.lane[i]) : fraction * mine;
    }
    store_run(gradient + (size_t)row * columns + column, g, count);
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
  __device__ __forceinline__ Fetched fetch(int row, int column, int count) const {
    size_t i = (size_t)row * columns + column;
    return {load_run(p + i, count), load_run(m + i, count), load_run(v + i, count)};
  }
  __device__ __forceinline__ void operator()(
      int row, int column, int count, const Run& g, Fetched old) const {
#pragma unroll
    for (int i = 0; i < RUN; ++i) {
      adam_element(old.p.lane[i], g.lane[i], old.m.lane[i], old.v.lane[i], step);
    }
    size_t i = (size_t)row * columns + column;
    store_run(p + i, old.p, count);
    store_run(m + i, old.m, count);
    store_run(v + i, old.v, count);
  }
};
