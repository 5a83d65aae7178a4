// A block's part of a matrix product: a tile of C = A B, A (rows, depth) and B (depth, columns)
// read through a map from (row, depth) to memory. gemm.cu has matrices there, conv.cu the windows
// of an image.
//
// The operands come to shared memory a slice of DEPTH at a time, two slices ahead of the one that
// is multiplied. Where several blocks share a tile's contraction (split-K), each leaves its sum in
// `partials`, and the block that arrives last adds them up in the order of the splits: the same
// bits each time, whichever block that was. The only atomics are the integers that count arrivals.
//
// Compiled with TENSOR_CORES 1 (products of TF32 numbers, sums in float32; sm_80 and later) or 0
// (float32 throughout), and with TILE_COLUMNS 64, or 16 for products with few columns.

const int COLUMNS = TILE_COLUMNS;
const int ROWS = COLUMNS == 64 ? 64 : 128;
const int DEPTH = 16;
const int STAGES = 3;
const int THREADS = 128;
const int BLOCKS = 4;  // that a multiprocessor must have room for: at most 128 registers a thread

// A warp has 32 rows of the tile's product, and all or half of its columns.
const int WARP_ROWS = 32;
const int WARP_COLUMNS = COLUMNS == 64 ? 32 : 16;

// An operand's slice in shared memory, as [row or column][depth] or [depth][row or column],
// whichever runs along memory in the same direction. The padding puts the elements that a warp
// reads at once into different banks.
template <bool DEPTH_IS_INNER, int LENGTH>
struct Slice {
  static const int PITCH = DEPTH_IS_INNER ? DEPTH + 4 : LENGTH + 8;
  static const int SIZE = PITCH * (DEPTH_IS_INNER ? LENGTH : DEPTH);
  static __device__ __forceinline__ int at(int outer, int depth) {
    return DEPTH_IS_INNER ? outer * PITCH + depth : depth * PITCH + outer;
  }
};

// A matrix (outers, depths) as operand, or (depths, outers) if its depth is not inner. Outside of
// it are zeros.
template <bool DEPTH_IS_INNER>
struct Matrix {
  static const bool INNER_DEPTH = DEPTH_IS_INNER;
  const float* data;
  int outers, depths;

  // Whether four inner neighbours, counted from a multiple of four, are one aligned vector.
  __device__ __forceinline__ bool vectors() const {
    return (DEPTH_IS_INNER ? depths : outers) % 4 == 0 && (size_t)data % 16 == 0;
  }

  // Where an element is; null for a zero.
  __device__ __forceinline__ const float* at(int outer, int depth) const {
    if (outer >= outers || depth >= depths) return nullptr;
    size_t i = DEPTH_IS_INNER ? (size_t)outer * depths + depth : (size_t)depth * outers + outer;
    return data + i;
  }
};

// Copies the slice of an operand that begins at (outer, depth), by all threads of the block.
template <int LENGTH, class Operand>
__device__ __forceinline__ void copy_slice(
    float* slice, const Operand& operand, bool vectors, int outer, int depth) {
  const bool inner_depth = Operand::INNER_DEPTH;
  using Layout = Slice<inner_depth, LENGTH>;
  const int inner = inner_depth ? DEPTH : LENGTH;
#pragma unroll
  for (int first = 0; first < LENGTH * DEPTH; first += 4 * THREADS) {
    int element = first + 4 * threadIdx.x;
    if (LENGTH * DEPTH % (4 * THREADS) != 0 && element >= LENGTH * DEPTH) break;
    int along = element % inner, across = element / inner;
    int o = inner_depth ? across : along, d = inner_depth ? along : across;
    float* target = slice + Layout::at(o, d);
    if (vectors) {
      const float* source = operand.at(outer + o, depth + d);
      copy_async_16(target, source ? source : operand.data, source ? 16 : 0);
      continue;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* source =
          operand.at(outer + o + (inner_depth ? 0 : i), depth + d + (inner_depth ? i : 0));
      copy_async_4(target + i, source ? source : operand.data, source ? 4 : 0);
    }
  }
}

__device__ __forceinline__ int first_row_of_warp() {
  return threadIdx.x / WARP / (COLUMNS / WARP_COLUMNS) * WARP_ROWS;
}

__device__ __forceinline__ int first_column_of_warp() {
  return threadIdx.x / WARP % (COLUMNS / WARP_COLUMNS) * WARP_COLUMNS;
}

#if TENSOR_CORES
// A thread's part of the product: of each 16 x 8 elements what mma.sync spreads over a warp.
template <class A, class B>
struct Product {
  static const int DOWN = WARP_ROWS / 16, ACROSS = WARP_COLUMNS / 8;
  float sums[DOWN][ACROSS][4] = {};

  __device__ __forceinline__ void add(const float* a, const float* b) {
    int group = threadIdx.x % WARP / 4, member = threadIdx.x % 4;
#pragma unroll
    for (int k = 0; k < DEPTH; k += 8) {
      unsigned int a_fragment[DOWN][4], b_fragment[ACROSS][2];
#pragma unroll
      for (int i = 0; i < DOWN; ++i) {
        int row = first_row_of_warp() + 16 * i + group;
        a_fragment[i][0] = to_tf32(a[A::at(row, k + member)]);
        a_fragment[i][1] = to_tf32(a[A::at(row + 8, k + member)]);
        a_fragment[i][2] = to_tf32(a[A::at(row, k + member + 4)]);
        a_fragment[i][3] = to_tf32(a[A::at(row + 8, k + member + 4)]);
      }
#pragma unroll
      for (int j = 0; j < ACROSS; ++j) {
        int column = first_column_of_warp() + 8 * j + group;
        b_fragment[j][0] = to_tf32(b[B::at(column, k + member)]);
        b_fragment[j][1] = to_tf32(b[B::at(column, k + member + 4)]);
      }
#pragma unroll
      for (int i = 0; i < DOWN; ++i) {
#pragma unroll
        for (int j = 0; j < ACROSS; ++j) {
          mma_m16n8k8_tf32(sums[i][j], a_fragment[i], b_fragment[j]);
        }
      }
    }
  }

  // Writes the sums to result[row][column].
  __device__ __forceinline__ void store(float* result) const {
    int group = threadIdx.x % WARP / 4, member = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < DOWN; ++i) {
#pragma unroll
      for (int j = 0; j < ACROSS; ++j) {
        int row = first_row_of_warp() + 16 * i + group;
        int column = first_column_of_warp() + 8 * j + 2 * member;
        result[row * COLUMNS + column] = sums[i][j][0];
        result[row * COLUMNS + column + 1] = sums[i][j][1];
        result[(row + 8) * COLUMNS + column] = sums[i][j][2];
        result[(row + 8) * COLUMNS + column + 1] = sums[i][j][3];
      }
    }
  }
};
#else
// A thread's part of the product: 8 rows by an eighth of its warp's columns. Along an axis that is
// inner in shared memory they are neighbours, so that they are read as vectors, else interleaved
// with those of the other threads, whose reads then fall into different banks.
template <class A, class B>
struct Product {
  static const int DOWN = 8, ACROSS = WARP_COLUMNS / 8;
  float sums[DOWN][ACROSS] = {};

  static __device__ __forceinline__ int row(int i) {
    int group = threadIdx.x % WARP / 8;
    return first_row_of_warp() + (A::at(1, 0) == 1 ? DOWN * group + i : group + 4 * i);
  }

  static __device__ __forceinline__ int column(int j) {
    int member = threadIdx.x % 8;
    return first_column_of_warp() + (B::at(1, 0) == 1 ? ACROSS * member + j : member + 8 * j);
  }

  __device__ __forceinline__ void add(const float* a, const float* b) {
#pragma unroll 4
    for (int k = 0; k < DEPTH; ++k) {
      float a_column[DOWN], b_row[ACROSS];
#pragma unroll
      for (int i = 0; i < DOWN; ++i) a_column[i] = a[A::at(row(i), k)];
#pragma unroll
      for (int j = 0; j < ACROSS; ++j) b_row[j] = b[B::at(column(j), k)];
#pragma unroll
      for (int i = 0; i < DOWN; ++i) {
#pragma unroll
        for (int j = 0; j < ACROSS; ++j) {
          sums[i][j] = __fmaf_rn(a_column[i], b_row[j], sums[i][j]);
        }
      }
    }
  }

  // Writes the sums to result[row][column].
  __device__ __forceinline__ void store(float* result) const {
#pragma unroll
    for (int i = 0; i < DOWN; ++i) {
#pragma unroll
      for (int j = 0; j < ACROSS; ++j) result[row(i) * COLUMNS + column(j)] = sums[i][j];
    }
  }
};
#endif

// A tile's result: ROWS of the product, and below them, where it was asked for, one row with the
// sums over depth of B's columns.
const int RESULT = (ROWS + 1) * COLUMNS;

template <class A, class B>
struct Memory {
  static const int SLICES =
      Slice<A::INNER_DEPTH, ROWS>::SIZE + Slice<B::INNER_DEPTH, COLUMNS>::SIZE;
  static const int SIZE = STAGES * SLICES > RESULT ? STAGES * SLICES : RESULT;
};

// The product of rows from `row`, columns from `column` and depths from `first` to `end`, left in
// `memory` as a result. Ends with a barrier.
template <bool WITH_SUMS, class A, class B>
__device__ __forceinline__ void multiply(
    float* memory, const A& a, const B& b, int row, int column, int first, int end) {
  using LayoutA = Slice<A::INNER_DEPTH, ROWS>;
  using LayoutB = Slice<B::INNER_DEPTH, COLUMNS>;
  const int slices = Memory<A, B>::SLICES;
  int count = ceil_div(end - first, DEPTH);
  bool a_vectors = a.vectors(), b_vectors = b.vectors();
  auto copy = [&](int slice) {
    if (slice < count) {
      float* stage = memory + slice % STAGES * slices;
      copy_slice<ROWS>(stage, a, a_vectors, row, first + slice * DEPTH);
      copy_slice<COLUMNS>(
          stage + LayoutA::SIZE, b, b_vectors, column, first + slice * DEPTH);
    }
    commit_copies();
  };
  Product<LayoutA, LayoutB> product;
  float column_sum = 0.0f;
  for (int slice = 0; slice < STAGES - 1; ++slice) copy(slice);
  for (int slice = 0; slice < count; ++slice) {
    wait_copies<STAGES - 2>();
    __syncthreads();  // all copies of this slice have landed, and all reads of the last are over
    copy(slice + STAGES - 1);
    const float* stage = memory + slice % STAGES * slices;
    product.add(stage, stage + LayoutA::SIZE);
    if (WITH_SUMS && threadIdx.x < COLUMNS) {
      for (int k = 0; k < DEPTH; ++k) {
        column_sum += stage[LayoutA::SIZE + LayoutB::at(threadIdx.x, k)];
      }
    }
  }
  wait_copies<0>();
  __syncthreads();
  product.store(memory);
  if (WITH_SUMS && threadIdx.x < COLUMNS) memory[ROWS * COLUMNS + threadIdx.x] = column_sum;
  __syncthreads();
}

// Whether this block is the last of `expected` to arrive at `counter`, which is then zero again.
// What the others wrote before is visible to it, if it reads past the first-level cache.
__device__ __forceinline__ bool last_to_arrive(int* counter, int expected) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(counter, 1) == expected - 1;
    if (last) *counter = 0;
  }
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// Where a tile of a matrix begins.
struct Place {
  int row, column;
  __device__ __forceinline__ Place(int tile, int columns)
      : row(tile / ceil_div(columns, COLUMNS) * ROWS),
        column(tile % ceil_div(columns, COLUMNS) * COLUMNS) {}
};

// A block's share of a launch's work: one split of one tile. `partials` holds a result for each
// split of each tile, `arrivals` a counter for each tile.
struct Share {
  int tile, tiles, split, splits;
  float* partials;
  int* arrivals;

  // The depths of this split, a whole number of slices but for the last.
  __device__ __forceinline__ int first(int depth) const {
    return min(depth, split * ceil_div(ceil_div(depth, DEPTH), splits) * DEPTH);
  }
  __device__ __forceinline__ int end(int depth) const {
    return min(depth, (split + 1) * ceil_div(ceil_div(depth, DEPTH), splits) * DEPTH);
  }

  // Adds up the splits' results in `memory`. False for all blocks of a tile but the last to arrive.
  __device__ __forceinline__ bool gather(float* memory) const {
    if (splits == 1) return true;
    float* mine = partials + ((size_t)split * tiles + tile) * RESULT;
    for (int i = threadIdx.x; i < RESULT; i += THREADS) mine[i] = memory[i];
    if (!last_to_arrive(arrivals + tile, splits)) return false;
    for (int i = threadIdx.x; i < RESULT; i += THREADS) {
      float sum = 0.0f;
      for (int other = 0; other < splits; ++other) {
        sum += __ldcg(partials + ((size_t)other * tiles + tile) * RESULT + i);
      }
      memory[i] = sum;
    }
    __syncthreads();
    return true;
  }
};

// Tiles along x and, for the launches that have phases, z; splits along y.
__device__ __forceinline__ Share this_share(float* partials, int* arrivals) {
  int tile = blockIdx.z * gridDim.x + blockIdx.x, tiles = gridDim.z * gridDim.x;
  return {tile, tiles, (int)blockIdx.y, (int)gridDim.y, partials, arrivals};
}

// Calls finish(row, column, value) for each element of a result that lies within (rows, columns),
// neighbouring threads with neighbouring elements.
template <class Finish>
__device__ __forceinline__ void for_each_element(
    const float* result, int first_row, int first_column, int rows, int columns, Finish finish) {
#pragma unroll 2  // more would keep registers in local memory around Adam's divisions
  for (int i = threadIdx.x; i < ROWS * COLUMNS; i += THREADS) {
    int row = first_row + i / COLUMNS, column = first_column + i % COLUMNS;
    if (row < rows && column < columns) finish(row, column, result[i]);
  }
}

// What becomes of the finished sums: the epilogues.

// y = f(z + b): dense.E, conv.E1 and E5. y (rows, columns), b (columns,).
struct BiasAndActivation {
  const float* b;
  float* y;
  int kind;
  float slope;
  int columns;
  __device__ __forceinline__ void operator()(int row, int column, float z) const {
    y[(size_t)row * columns + column] = activate(kind, slope, z + b[column]);
  }
};

// dx times the derivative of the activation that made x (dense.E4). x and dx (rows, columns).
struct ActivationDerivative {
  const float* x;
  float* dx;
  int kind;
  float slope;
  int columns;
  __device__ __forceinline__ void operator()(int row, int column, float value) const {
    size_t i = (size_t)row * columns + column;
    dx[i] = activation_backward_from_output(kind, slope, x[i], value);
  }
};

// A gradient to memory, times the share of the batch that it is of, on top of what is there or not
// (dense.E5).
struct Store {
  float* gradient;
  float weight;
  int accumulate;
  __device__ __forceinline__ void operator()(size_t i, float g) const {
    gradient[i] = accumulate ? __fmaf_rn(weight, g, gradient[i]) : weight * g;
  }
};

// A gradient to Adam, which changes parameter and moments at once. It is never written to memory.
struct Update {
  float* p;
  float* m;
  float* v;
  AdamStep step;
  __device__ __forceinline__ void operator()(size_t i, float g) const {
    adam_element(p[i], g, m[i], v[i], step);
  }
};
