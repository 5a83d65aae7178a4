// The weight gradients of dense layers, by the equations of ops/dense.py: x^T dz for several layers
// in one launch, since each alone is too small to fill a GPU. They run after all input gradients,
// and may update a weight as soon as its gradient is known.

// A tile of dw = x^T dz (dense.E2) and, in the first row of tiles, of db (dense.E3). The block is
// counted at `end` before the epilogue.
template <class Finish, class End>
__device__ __forceinline__ void weight_gradient_tile(
    float* memory, const float* x, const float* dz, int tile, const Share& share,
    const Finish& weight, const Finish& bias, End& end, int n, int i, int o) {
  using A = Matrix<false>;
  using B = Matrix<false>;
  Place place(tile, o);
  bool with_bias = place.row == 0;
  multiply(
      memory, A{x, i, n}, B{dz, o, n}, place.row, place.column, share.first(n), share.end(n),
      with_bias);
  end.count();
  if (!share.gather(memory, i - place.row)) return;
  for_each_run(memory, place.row, place.column, i, o, weight);
  if (with_bias) for_sums(memory, place.column, o, bias);
}

// A layer of a group: where its operands are, where its weight and bias begin in a flat buffer, and
// which of the launch's tiles is its first.
struct Job {
  const float* x;
  const float* dz;
  long long weight, bias, inputs, outputs, first_block;
};

// The weight gradients of a group of layers, jobs (count,), into the flat buffer g. Grid: the tiles
// of all layers, by splits.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) dense_weight_gradient(
    const long long* __restrict__ jobs, float* __restrict__ g, float fraction, int accumulate,
    float* __restrict__ partials, int* __restrict__ arrivals, int count, int n) {
  __shared__ __align__(16) float memory[MEMORY];
  const Job* job = this_job<Job>(jobs, count);
  int i = (int)job->inputs, o = (int)job->outputs;
  NoEnd end;
  weight_gradient_tile(
      memory, job->x, job->dz, blockIdx.x - (int)job->first_block, this_share(partials, arrivals),
      Store{g + job->weight, fraction, accumulate, o},
      Store{g + job->bias, fraction, accumulate, o}, end, n, i, o);
}

// The same, with Adam on each parameter as soon as its gradient is known: p, m and v are the flat
// buffers, schedule (steps, 5), state (5,), `all` a counter. Goes on to the next step.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) dense_weight_update(
    const long long* __restrict__ jobs, float* __restrict__ p, float* __restrict__ m,
    float* __restrict__ v, const float* __restrict__ schedule, long long* __restrict__ state,
    float new1, float new2, float epsilon, int* __restrict__ all, float* __restrict__ partials,
    int* __restrict__ arrivals, int batch_size, int count, int n) {
  __shared__ __align__(16) float memory[MEMORY];
  const Job* job = this_job<Job>(jobs, count);
  AdamStep step = adam_step(schedule, state, new1, new2, epsilon);
  if (state[FAILED]) return;  // not before: the loads above need not wait for this one
  int i = (int)job->inputs, o = (int)job->outputs;
  StepEnd end = {all, state, batch_size, (int)(gridDim.x * gridDim.y), 0};
  weight_gradient_tile(
      memory, job->x, job->dz, blockIdx.x - (int)job->first_block, this_share(partials, arrivals),
      Update{p + job->weight, m + job->weight, v + job->weight, step, o},
      Update{p + job->bias, m + job->bias, v + job->bias, step, o}, end, n, i, o);
  end.finish();
}
