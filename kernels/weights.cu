// The weight gradients of dense layers, by the equations of ops/dense.py: x^T dz for several layers
// in one launch, since each alone is too small to fill a GPU. They run after all input gradients,
// and may update a weight as soon as its gradient is known.

// A layer of a group: x (rows, inputs), dz (rows, outputs), and where its weight and bias begin in a
// flat buffer. Where an image has several draws, a decoder has more rows than an encoder.
struct Job : Division {
  const float* x;
  const float* dz;
  long long weight, bias, rows, inputs, outputs;
};

// A tile of dw = x^T dz (dense.E2) and, in the first row of tiles, of db (dense.E3). The block is
// counted at `end` before the epilogue, which `finish(first, columns)` makes for a tensor that begins
// there.
template <class Finish, class End>
__device__ __forceinline__ void weight_gradient_tile(
    float* memory, const Job* job, const Share& share, const Finish& finish, End& end) {
  using A = Matrix<false>;
  using B = Matrix<false>;
  int n = (int)job->rows, i = (int)job->inputs, o = (int)job->outputs;
  Place place(share.tile, o);
  bool with_bias = place.row == 0;
  multiply(
      memory, A{job->x, i, n}, B{job->dz, o, n}, place.row, place.column, share.first(n),
      share.end(n), with_bias);
  end.count();
  if (!share.gather(memory, i - place.row)) return;
  Epilogue(finish(job->weight, o), place, i, o).apply(memory);
  if (with_bias) for_sums(memory, place.column, o, finish(job->bias, o));
}

// The weight gradients of a group of layers, jobs (count,), into the flat buffer g. Grid: the blocks
// of all layers.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) dense_weight_gradient(
    const long long* __restrict__ jobs, float* __restrict__ g, float fraction, int accumulate,
    float* __restrict__ partials, int* __restrict__ arrivals, int count) {
  const Job* job = this_job<Job>(jobs, count);
  auto finish = [&](long long first, int columns) {
    return Store{g + first, fraction, accumulate, columns};
  };
  NoEnd end;
  weight_gradient_tile(memory, job, job->share(partials, arrivals), finish, end);
}

// The same, with Adam on each parameter as soon as its gradient is known: p, m and v are the flat
// buffers, schedule (steps, 5), state (5,), `all` a counter. Goes on to the next step.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) dense_weight_update(
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
  weight_gradient_tile(memory, job, job->share(partials, arrivals), finish, end);
  end.finish();
}
