// Two of the dense layer's three matrix products, by the equations of ops/dense.py: x w and dz w^T.
// The third, x^T dz, is in weights.cu. All are one loop over tiles, told apart by the axis along
// which each operand is read.

// x (n, i), w (i, o), b (o,), y (n, o); partials and arrivals as tile.cuh has them. Grid: tiles of
// y, by splits.
extern "C" __global__ void __launch_bounds__(THREADS) dense_forward(
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
extern "C" __global__ void __launch_bounds__(THREADS) dense_input_gradient(
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
