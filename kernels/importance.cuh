// The bound of k draws, by the equations of ops/importance.py, for importance.cu and for the
// decoder's last matrix product, whose epilogue it ends.

const float LOWEST = -3.402823466e38f;  // of all finite float32

// The largest of a value over a warp, in every lane. A NaN may be lost.
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int offset = WARP / 2; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(WHOLE_WARP, value, offset));
  }
  return value;
}

// An image's bound, in every lane of the warp that works on it (importance.E2). weights (k,) has
// -log p(x|z) of each draw, perhaps just written by another block, and gets its weight (E3).
__device__ __forceinline__ float bound_of_draws(
    float* weights, const float* log_ratio, int importance, int k) {
  int lane = threadIdx.x % WARP;
  float largest = LOWEST, mean = 0.0f, sum = 0.0f;
  for (int s = lane; s < k; s += WARP) {
    float log_weight = log_ratio[s] - __ldcg(weights + s);  // importance.E1
    weights[s] = log_weight;
    largest = fmaxf(largest, log_weight);
    mean += log_weight / (float)k;
  }
  largest = warp_max(largest);
  for (int s = lane; s < k; s += WARP) sum += expf(weights[s] - largest);  // a NaN stays in it
  mean = warp_sum(mean);
  sum = warp_sum(sum);
  for (int s = lane; s < k; s += WARP) {
    weights[s] = importance ? expf(weights[s] - largest) / sum : 1.0f / (float)k;
  }
  return importance ? largest + logf(sum / (float)k) : mean;
}
