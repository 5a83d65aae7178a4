// The optimizer on flat buffers, by the equations of ops/adam.py.

// p, g, m and v (size,), schedule (steps, 5), state (5,). A grid of any size strides over the
// buffers, four elements at a time.
extern "C" __global__ void adam_update(
    float* __restrict__ p, const float* __restrict__ g, float* __restrict__ m,
    float* __restrict__ v, const float* __restrict__ schedule,
    const long long* __restrict__ state, float new1, float new2, float epsilon, int size) {
  if (state[FAILED]) return;
  AdamStep step = adam_step(schedule, state, new1, new2, epsilon);
  int thread = blockIdx.x * blockDim.x + threadIdx.x, threads = gridDim.x * blockDim.x;
  int fours = aligned(p, g, m, v) ? size / 4 : 0;
  for (int i = thread; i < fours; i += threads) {
    float4 p4 = ((float4*)p)[i], m4 = ((float4*)m)[i], v4 = ((float4*)v)[i];
    float4 g4 = ((const float4*)g)[i];
    adam_element(p4.x, g4.x, m4.x, v4.x, step);
    adam_element(p4.y, g4.y, m4.y, v4.y, step);
    adam_element(p4.z, g4.z, m4.z, v4.z, step);
    adam_element(p4.w, g4.w, m4.w, v4.w, step);
    ((float4*)p)[i] = p4;
    ((float4*)m)[i] = m4;
    ((float4*)v)[i] = v4;
  }
  for (int i = 4 * fours + thread; i < size; i += threads) {
    adam_element(p[i], g[i], m[i], v[i], step);
  }
}

const int CLIP_PARTIALS = 256;

// g (size,), partials (CLIP_PARTIALS,): one sum of squares for each of CLIP_PARTIALS blocks. Their
// number is fixed, so that the norm has the same bits on every GPU.
extern "C" __global__ void clip_gradient_partials(
    const float* __restrict__ g, float* __restrict__ partials, int size) {
  float partial = 0.0f;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < size; i += CLIP_PARTIALS * blockDim.x) {
    partial += g[i] * g[i];
  }
  float total = block_sum(partial);
  if (threadIdx.x == 0) partials[blockIdx.x] = total;
}

// g (size,), norm (1,), partials (CLIP_PARTIALS,), which every block adds up again by itself. A
// grid of any size strides over g.
extern "C" __global__ void clip_gradient(
    float* __restrict__ g, float max_norm, float* __restrict__ norm,
    const float* __restrict__ partials, int size) {
  float partial = 0.0f;
  for (int i = threadIdx.x; i < CLIP_PARTIALS; i += blockDim.x) partial += partials[i];
  float total = sqrtf(block_sum(partial));
  int thread = blockIdx.x * blockDim.x + threadIdx.x;
  if (thread == 0) norm[0] = total;
  if (!(total > max_norm)) return;
  float scale = max_norm / total;
  for (int i = thread; i < size; i += gridDim.x * blockDim.x) g[i] *= scale;  // adam.E5
}
