// E2 of ops/conv.py where large is an image of few channels, grey or RGB: a transposed convolution
// to it, forward, or a convolution of it, backward. As a matrix product (conv.cu) it would leave
// most columns of a tile empty.
//
// A team of eight neighbouring threads makes four neighbouring pixels of a phase. A thread has four
// of every 32 filters, so that a team loads a line of memory at once, and a weight serves four
// pixels. At the end the team adds up its sums, in a fixed order.

const int FEW_CHANNELS = RUN;  // at most: a pixel is one run
const int TEAM = 8;
const int PIXELS = 4;

__device__ __forceinline__ float dot(const Run& a, const Run& b, float sum) {
#pragma unroll
  for (int i = 0; i < RUN; ++i) sum = __fmaf_rn(a.lane[i], b.lane[i], sum);
  return sum;
}

// The sum of a value over a team, in every thread.
__device__ __forceinline__ float team_sum(float value) {
#pragma unroll
  for (int offset = TEAM / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(WHOLE_WARP, value, offset);
  }
  return value;
}

// Tap 0 of the phase reaches a team's first pixel from small pixel (p, q), and its others from that
// one's neighbours in the row.
struct Reached {
  Phase phase;
  const float* pixel;
  int p, q;
  bool exists;
};

// Adds up what a thread's filters give to its team's pixels: sums[t].lane[c] of pixel t, channel c.
// VECTORS where filters come in aligned fours.
template <bool VECTORS>
__device__ __forceinline__ void add_filters(
    Run (&sums)[PIXELS], const Reached& at, const float* w, const Shape& s, int filter) {
  const Phase& phase = at.phase;
  int count = s.filters - filter;
  size_t next_weights = (size_t)s.stride_w * s.channels * s.filters;
  for (int i = 0; i < phase.taps_h; ++i) {
    bool inside = at.exists && (unsigned int)(at.p - i) < (unsigned int)s.rows;
    const float* source = at.pixel - i * s.columns * s.filters + filter;
    int tap = (phase.first_tap_h + i * s.stride_h) * s.taps_w + phase.first_tap_w;
    const float* weights = w + (size_t)tap * s.channels * s.filters + filter;
    for (int j = 0; j < phase.taps_w; ++j, source -= s.filters, weights += next_weights) {
      Run x[PIXELS];
#pragma unroll
      for (int t = 0; t < PIXELS; ++t) {
        bool here = inside && (unsigned int)(at.q + t - j) < (unsigned int)s.columns;
        x[t] = load_run<VECTORS>(source + t * s.filters, here ? count : 0);
      }
#pragma unroll
      for (int c = 0; c < FEW_CHANNELS; ++c) {
        if (c >= s.channels) break;
        Run weight = load_run<VECTORS>(weights + c * s.filters, count);
#pragma unroll
        for (int t = 0; t < PIXELS; ++t) sums[t].lane[c] = dot(weight, x[t], sums[t].lane[c]);
      }
    }
  }
}

// E2 and an epilogue. Grid: blocks of teams of the largest phase, by 1, by phases.
template <class Finish>
__device__ __forceinline__ void scatter_to_few(
    const float* small, const float* w, const Shape& s, const Finish& finish) {
  Phase phase(s, blockIdx.z);
  if (phase.height == 0 || phase.width == 0) return;
  int team = blockIdx.x * (blockDim.x / TEAM) + threadIdx.x / TEAM, member = threadIdx.x % TEAM;
  int teams_across = ceil_div(phase.width, PIXELS);
  int line = team / teams_across, first = team % teams_across * PIXELS;
  int image = line / phase.height, row = line % phase.height;
  int p = row + phase.row_shift, q = first + phase.column_shift;
  size_t pixel = ((size_t)image * s.rows + p) * s.columns + q;
  Reached at = {phase, small + pixel * s.filters, p, q, image < s.images};
  bool vectors = s.filters % RUN == 0 && aligned(small, w);
  Run sums[PIXELS] = {};
  for (int filter = RUN * member; filter < s.filters; filter += RUN * TEAM) {
    if (vectors) {
      add_filters<true>(sums, at, w, s, filter);
    } else {
      add_filters<false>(sums, at, w, s, filter);
    }
  }
  Run mine = {};
#pragma unroll
  for (int t = 0; t < PIXELS; ++t) {
#pragma unroll
    for (int c = 0; c < FEW_CHANNELS; ++c) {
      float sum = c < s.channels ? team_sum(sums[t].lane[c]) : 0.0f;
      if (member == t) mine.lane[c] = sum;
    }
  }
  if (member >= PIXELS || !at.exists || first + member >= phase.width) return;
  int down = row * s.stride_h + phase.first_row;
  int across = (first + member) * s.stride_w + phase.first_column;
  int index = (image * s.height + down) * s.width + across;
  finish_run(index, 0, s.channels, mine, finish);
}

// As in conv.cu: x small, y large, b (channels,). E5.
extern "C" __global__ void conv_transpose2d_forward_few(
    const float* __restrict__ x, const float* __restrict__ w, const float* __restrict__ b,
    float* __restrict__ y, int kind, float slope, int images, int height, int width, int channels,
    int rows, int columns, int filters, int taps_h, int taps_w, int stride_h, int stride_w,
    int top, int left) {
  Shape s = {images, height, width, channels, rows, columns, filters,
             taps_h, taps_w, stride_h, stride_w, top, left};
  scatter_to_few(x, w, s, BiasAndActivation{b, y, kind, slope, channels});
}

// As in conv.cu: dz small, x and dz_below large. E2.
extern "C" __global__ void conv2d_input_gradient_few(
    const float* __restrict__ dz, const float* __restrict__ w, const float* __restrict__ x,
    float* __restrict__ dz_below, int kind, float slope, int images, int height, int width,
    int channels, int rows, int columns, int filters, int taps_h, int taps_w, int stride_h,
    int stride_w, int top, int left) {
  Shape s = {images, height, width, channels, rows, columns, filters,
             taps_h, taps_w, stride_h, stride_w, top, left};
  scatter_to_few(dz, w, s, ActivationDerivative{x, dz_below, kind, slope, channels});
}
