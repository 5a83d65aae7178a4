// A convolution's sizes, and the pixels that take the same taps (ops/conv.py).

// large (images, height, width, channels), small (images, rows, columns, filters),
// w (taps_h, taps_w, channels, filters).
struct Shape {
  int images, height, width, channels, rows, columns, filters;
  int taps_h, taps_w, stride_h, stride_w, top, left;
};

// The pixels of large whose rows and columns are each equal modulo the stride. All are reached by
// the same taps, which are equal modulo the stride as well.
struct Phase {
  int first_row, first_column, height, width;  // its pixels: every stride-th from the first
  int first_tap_h, first_tap_w, taps_h, taps_w;
  int row_shift, column_shift;  // its pixel (0, 0) is reached by tap 0 from this small pixel

  __device__ __forceinline__ Phase(const Shape& s, int index) {
    first_row = index / s.stride_w, first_column = index % s.stride_w;
    height = ceil_div(max(0, s.height - first_row), s.stride_h);
    width = ceil_div(max(0, s.width - first_column), s.stride_w);
    first_tap_h = (first_row + s.top) % s.stride_h;
    first_tap_w = (first_column + s.left) % s.stride_w;
    taps_h = ceil_div(max(0, s.taps_h - first_tap_h), s.stride_h);
    taps_w = ceil_div(max(0, s.taps_w - first_tap_w), s.stride_w);
    row_shift = (first_row + s.top) / s.stride_h;
    column_shift = (first_column + s.left) / s.stride_w;
  }
};
