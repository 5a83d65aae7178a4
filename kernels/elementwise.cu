// Activations that no layer below has fused, by the table of ops/activations.py.

// z and y (size,), which may be the same array. One thread an element.
extern "C" __global__ void activation_forward(
    const float* z, float* y, int kind, float slope, int size) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < size) y[i] = activate(kind, slope, z[i]);
}

// z, y, dy and dz (size,); dy and dz may be the same array, and z null unless the kind's derivative
// needs it. One thread an element.
extern "C" __global__ void activation_backward(
    const float* __restrict__ z, const float* __restrict__ y, const float* dy, float* dz, int kind,
    float slope, int size) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= size) return;
  float input = z ? z[i] : 0.0f;
  dz[i] = dy[i] * activation_derivative(kind, slope, input, y[i]);  // activations.E1
}
