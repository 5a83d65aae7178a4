// The label that joins a network, by the equations of ops/labels.py.

// labels and permutation (images,), state (5,), onehot (n, classes). One thread an
// element of onehot.
extern "C" __global__ void gather_labels(
    const long long* __restrict__ labels, const long long* __restrict__ permutation,
    const long long* __restrict__ state, float* __restrict__ onehot, int n, int classes) {
  int thread = blockIdx.x * blockDim.x + threadIdx.x;
  if (thread >= n * classes) return;
  long long label = labels[permutation[state[FIRST] + thread / classes]];
  onehot[thread] = thread % classes == label ? 1.0f : 0.0f;  // labels.E2
}

// v (rows, m), onehot (rows / draws, classes), u (rows, m + classes). One thread an element of u.
extern "C" __global__ void join_forward(
    const float* __restrict__ v, const float* __restrict__ onehot, float* __restrict__ u, int rows,
    int draws, int m, int classes) {
  int thread = blockIdx.x * blockDim.x + threadIdx.x, columns = m + classes;
  if (thread >= rows * columns) return;
  int row = thread / columns, j = thread % columns;
  u[thread] = j < m ? v[row * m + j] : onehot[row / draws * classes + j - m];  // labels.E3
}

// du (rows, m + classes), v and da (rows, m). One thread an element of da.
extern "C" __global__ void join_input_gradient(
    const float* __restrict__ du, const float* __restrict__ v, float* __restrict__ da, int kind,
    float slope, int rows, int m, int classes) {
  int thread = blockIdx.x * blockDim.x + threadIdx.x;
  if (thread >= rows * m) return;
  float upstream = du[thread / m * (m + classes) + thread % m];
  da[thread] = activation_backward_from_output(kind, slope, v[thread], upstream);  // labels.E4
}
