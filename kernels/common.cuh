// What all kernels share: the state's layout, reductions in a fixed order, activations, and one
// element of Adam. Every reduction adds in the same order each time, so that two runs have the
// same bits.

// ops/state.py and ops/elbo.py
enum State { STEP, INDEX, FIRST, EPOCH, FAILED };
enum Schedule { STEP_SIZE, ROOT, DECAY, BETA, CAPACITY, SCHEDULE_COLUMNS };
enum Totals { LOSS, RECONSTRUCTION, KL };

// activations.KINDS, in order
enum Kind { IDENTITY, RELU, LEAKY_RELU, TANH, SIGMOID, SOFTPLUS, ELU, GELU, SILU };

// state.py: on to the next batch, by one thread.
__device__ __forceinline__ void next_step(long long* state, int batch_size) {
  state[STEP] += 1;
  state[INDEX] += 1;
  state[FIRST] += batch_size;
}

const int WARP = 32;
const unsigned int WHOLE_WARP = 0xffffffffu;

__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

// A run is four neighbours in memory, loaded and stored as one vector where it is aligned.
const int RUN = 4;

// Of a run's four, the first `count` are within its array: none where count is not above zero.
// With VECTORS, which a kernel finds out once, a run with one element within has all four there, and
// is aligned.
struct __align__(16) Run {
  float lane[RUN];
};

template <class... Places>
__device__ __forceinline__ bool aligned(const Places*... places) {
  return ((size_t)places | ...) % 16 == 0;
}

template <bool VECTORS = false>
__device__ __forceinline__ Run load_run(const float* source, int count) {
  Run run = {};
  if (VECTORS ? count > 0 : count >= RUN && aligned(source)) {
    run = *(const Run*)source;
  } else if (!VECTORS) {
#pragma unroll
    for (int i = 0; i < RUN; ++i) {
      if (i < count) run.lane[i] = source[i];
    }
  }
  return run;
}

template <bool VECTORS = false>
__device__ __forceinline__ void store_run(float* target, const Run& run, int count) {
  if (VECTORS ? count > 0 : count >= RUN && aligned(target)) {
    *(Run*)target = run;
  } else if (!VECTORS) {
#pragma unroll
    for (int i = 0; i < RUN; ++i) {
      if (i < count) target[i] = run.lane[i];
    }
  }
}

__device__ __forceinline__ void operator+=(Run& sum, const Run& term) {
#pragma unroll
  for (int i = 0; i < RUN; ++i) sum.lane[i] += term.lane[i];
}

// The sum of a value over a warp, in every lane.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = WARP / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(WHOLE_WARP, value, offset);
  }
  return value;
}

// The sum of a value over a block of whole warps, in every thread.
__device__ __forceinline__ float block_sum(float value) {
  __shared__ float sums[WARP];
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  value = warp_sum(value);
  __syncthreads();  // a sum before this one may still be read
  if (lane == 0) sums[warp] = value;
  __syncthreads();
  return warp_sum(lane < warps ? sums[lane] : 0.0f);
}

// The sum of term(i), numbers or runs, for i from `first` to `end`, `step` apart. 16 loads are in
// flight before the first addition: a loop of unknown length waits for each.
template <class Term>
__device__ __forceinline__ auto sum_of(int first, int end, int step, const Term& term) {
  const int at_once = 16;
  decltype(term(first)) sum = {};
#pragma unroll 1
  for (; first < end; first += at_once * step) {
    decltype(term(first)) terms[at_once] = {};
#pragma unroll
    for (int t = 0; t < at_once; ++t) {
      if (first + t * step < end) terms[t] = term(first + t * step);
    }
#pragma unroll
    for (int t = 0; t < at_once; ++t) sum += terms[t];
  }
  return sum;
}

// The square root and the quotient to 2 ulp, in a few instructions, where the rounded ones have a
// branch for each element (PTX ISA, "sqrt" and "div"). b is below 2^126.
#ifdef __CUDA_ARCH__
__device__ __forceinline__ float approximate_sqrt(float a) {
  float root;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(a));
  return root;
}

__device__ __forceinline__ float approximate_quotient(float a, float b) {
  return __fdividef(a, b);
}
#endif

__device__ __forceinline__ float sigmoid(float z) {
  float e = expf(-fabsf(z));
  return approximate_quotient(z >= 0.0f ? 1.0f : e, 1.0f + e);
}

__device__ __forceinline__ float normal_cdf(float z) {
  return 0.5f * (1.0f + erff(z * 0.70710678f));
}

// f(z), by the table of activations.
__device__ __forceinline__ float activate(int kind, float slope, float z) {
  switch (kind) {
    case RELU: return z < 0.0f ? 0.0f : z;  // NaN stays NaN
    case LEAKY_RELU: return z > 0.0f ? z : slope * z;
    case TANH: return tanhf(z);
    case SIGMOID: return sigmoid(z);
    case SOFTPLUS: return fmaxf(z, 0.0f) + log1pf(expf(-fabsf(z)));
    case ELU: return z > 0.0f ? z : expm1f(z);
    case GELU: return z * normal_cdf(z);
    case SILU: return z * sigmoid(z);
    default: return z;
  }
}

// f'(z), from the output y where the table of activations has it there, else from z.
__device__ __forceinline__ float activation_derivative(int kind, float slope, float z, float y) {
  switch (kind) {
    case RELU: return y > 0.0f ? 1.0f : 0.0f;
    case LEAKY_RELU: return y > 0.0f ? 1.0f : slope;
    case TANH: return 1.0f - y * y;
    case SIGMOID: return y * (1.0f - y);
    case SOFTPLUS: return -expm1f(-y);
    case ELU: return y > 0.0f ? 1.0f : y + 1.0f;
    case GELU: return normal_cdf(z) + z * 0.39894228f * expf(-0.5f * z * z);
    case SILU: {
      float s = sigmoid(z);
      return s + z * s * (1.0f - s);
    }
    default: return 1.0f;
  }
}

template <int KIND>
struct Known {
  static const int value = KIND;
};

// Calls body(Known<kind>()): told apart once, where there are many elements.
template <class Body>
__device__ __forceinline__ void with_kind(int kind, const Body& body) {
  switch (kind) {
    case RELU: return body(Known<RELU>());
    case LEAKY_RELU: return body(Known<LEAKY_RELU>());
    case TANH: return body(Known<TANH>());
    case SIGMOID: return body(Known<SIGMOID>());
    case SOFTPLUS: return body(Known<SOFTPLUS>());
    case ELU: return body(Known<ELU>());
    case GELU: return body(Known<GELU>());
    case SILU: return body(Known<SILU>());
    default: return body(Known<IDENTITY>());
  }
}

// dy f'(z) for the kinds whose derivative follows from y (activations.E1).
__device__ __forceinline__ float activation_backward_from_output(
    int kind, float slope, float y, float dy) {
  return dy * activation_derivative(kind, slope, 0.0f, y);
}

// One latent dimension's draw from its noise, and its KL.
__device__ __forceinline__ void latent_draw(
    float mu, float logvar, float eps, float& z, float& kl) {
  z = mu + expf(0.5f * logvar) * eps;                // latent.E1
  kl = 0.5f * (mu * mu + expm1f(logvar) - logvar);  // latent.E2
}

// One latent dimension's gradients from dz, the gradient of its draw, and the weight c of its KL.
__device__ __forceinline__ void latent_gradient(
    float mu, float logvar, float eps, float dz, float c, float& dmu, float& dlogvar) {
  float through_z = dz * eps * expf(0.5f * logvar);
  dmu = dz + c * mu;                                  // latent.E3
  dlogvar = 0.5f * (through_z + c * expm1f(logvar));  // latent.E4
}

// What a step of Adam has the same for all elements. new1 is 1 - beta1 and new2 is 1 - beta2, from
// the host: the difference to a float32 beta has but five digits. `rate` and `floor` are the step
// size and epsilon times the root of the second moment's correction, which leaves adam.E3 one
// quotient.
struct AdamStep {
  float rate, floor, decay, new1, new2;
};

__device__ __forceinline__ AdamStep adam_step(
    const float* __restrict__ schedule, const long long* __restrict__ state, float new1,
    float new2, float epsilon) {
  const float* row = schedule + SCHEDULE_COLUMNS * state[INDEX];
  // Rounded: else a compiler may fuse it with adam.E3's sum, in one kernel and not in another.
  float floor = __fmul_rn(epsilon, row[ROOT]);
  return {row[STEP_SIZE] * row[ROOT], floor, row[DECAY], new1, new2};
}

// One element of adam.E1 to E4. The contractions are written out, so that every kernel that updates
// a parameter gives the same bits.
__device__ __forceinline__ void adam_element(
    float& p, float g, float& m, float& v, const AdamStep& step) {
  m = __fmaf_rn(step.new1, g - m, m);
  v = __fmaf_rn(step.new2, __fmaf_rn(g, g, -v), v);
  float change = approximate_quotient(step.rate * m, approximate_sqrt(v) + step.floor);
  p = __fmaf_rn(p, step.decay, -change);
}
