// A block's part of a matrix product: a tile of C = A B, A (rows, depth) and B (depth, columns)
// read through a map from (row, depth) to memory. gemm.cu has matrices there, and once draws of a
// latent, conv.cu the windows of an image.
//
// Operands go through a pipeline of STAGES stages in shared memory, each a slice of DEPTH or two,
// copied STAGES - 1 ahead. Where several blocks share a tile's contraction (split-K), each leaves
// its sum in `partials`, and the block that arrives last adds them up in the order of the splits:
// the same bits each time, whichever block that was. The only atomics are the integers that count
// arrivals.
//
// Compiled with TENSOR_CORES 1 (products of TF32 numbers, sums in float32; sm_80 and later) or 0
// (float32 throughout), and for each of the tiles in kernels/__init__.py.

const int ROWS = TILE_ROWS;
const int COLUMNS = TILE_COLUMNS;
const int DEPTH = 16;
const int STAGES = ROWS + COLUMNS > 128 ? 3 : 4;
const int THREADS = 128;
const int WARPS = THREADS / WARP;

// The warp tile: all columns of the tile or 32, and as many rows as make it a quarter of the tile.
// In a tile of 32 x 32 every warp has the whole tile, at a quarter of the depth: with a quarter of
// the tile, it would read at least twice as much from shared memory per multiplication.
const int WARP_COLUMNS = COLUMNS < 32 ? COLUMNS : 32;
const int QUARTER_ROWS = ROWS * COLUMNS / (WARPS * WARP_COLUMNS);
const int WARP_ROWS = QUARTER_ROWS < 32 ? 32 : QUARTER_ROWS;
const int SHARERS = WARPS * WARP_ROWS * WARP_COLUMNS / (ROWS * COLUMNS);  // warps per warp tile
// Blocks that a multiprocessor must have room for.
const int BLOCKS = SHARERS > 1 ? 4 : ROWS * COLUMNS <= 64 * 64 ? 3 : 2;

// Tensor cores take depths by eight, of which each sharer has at least one.
const int WARP_DEPTH = SHARERS > 1 ? 8 : DEPTH;
const int STAGE_SLICES = SHARERS * WARP_DEPTH / DEPTH;
const int STAGE_DEPTH = STAGE_SLICES * DEPTH;

// An operand's slice in shared memory, as [row or column][depth] or [depth][row or column],
// whichever is the order in global memory. An XOR swizzle of its runs puts those that a warp reads
// or writes at once in different banks.
template <bool DEPTH_IS_INNER, int LENGTH>
struct Slice {
  static const bool INNER_DEPTH = DEPTH_IS_INNER;
  static const int SIZE = LENGTH * DEPTH;
  static const int PITCH = DEPTH_IS_INNER ? DEPTH : LENGTH;
  static __device__ __forceinline__ int at(int outer, int depth) {
    if (DEPTH_IS_INNER) return outer * PITCH + (depth ^ outer / 2 % 4 * RUN);
    return depth * PITCH + (outer ^ (LENGTH < 32 ? depth / 2 % 2 : depth % 4) * 8);
  }
};

// Where an element of an operand is in memory; outside of the operand are zeros.
struct Element {
  const float* source;
  bool inside;
};

// What an operand knows of an element from its row or column alone, and from its depth alone.
struct Line {
  const float* start;
  bool inside;
};
struct Step {
  size_t offset;
  bool inside;
};

__device__ __forceinline__ Element element(const Line& line, const Step& step) {
  return {line.start + step.offset, line.inside && step.inside};
}

// Of numbers that are not negative: one instruction, where signed ones take three.
__device__ __forceinline__ size_t product(unsigned int a, unsigned int b) { return (size_t)a * b; }

// A matrix (outers, depths) as operand, or (depths, outers) if its depth is not inner.
template <bool DEPTH_IS_INNER>
struct Matrix {
  static const bool INNER_DEPTH = DEPTH_IS_INNER;
  const float* data;
  int outers, depths;

  // Whether each run of inner neighbours, counted from a multiple of four, is one aligned vector.
  __device__ __forceinline__ bool vectors() const {
    return (DEPTH_IS_INNER ? depths : outers) % RUN == 0 && aligned(data);
  }

  __device__ __forceinline__ Line outer(int o) const {
    return {data + (DEPTH_IS_INNER ? product(o, depths) : o), o < outers};
  }

  __device__ __forceinline__ Step depth(int d) const {
    return {DEPTH_IS_INNER ? d : product(d, outers), d < depths};
  }
};

// A thread's share in copying an operand's slices: RUNS runs of each. What depends on the row or
// column alone is the same in all slices, and found out once.
template <int LENGTH, class Operand>
struct Copier {
  static const bool INNER_DEPTH = Operand::INNER_DEPTH;
  static const int INNER = INNER_DEPTH ? DEPTH : LENGTH;
  static const int RUNS = (LENGTH * DEPTH + RUN * THREADS - 1) / (RUN * THREADS);
  static const int OUTERS = INNER_DEPTH ? RUNS : RUN;  // that a thread's elements have
  using Layout = Slice<INNER_DEPTH, LENGTH>;
  using Outer = decltype(((const Operand*)nullptr)->outer(0));

  const Operand& operand;
  bool vectors;
  Outer outers[OUTERS];

  // Where in a slice the thread's run r begins.
  static __device__ __forceinline__ int run_outer(int r) {
    int run = threadIdx.x + r * THREADS;
    return INNER_DEPTH ? run / (INNER / RUN) : run % (INNER / RUN) * RUN;
  }
  static __device__ __forceinline__ int run_depth(int r) {
    int run = threadIdx.x + r * THREADS;
    return INNER_DEPTH ? run % (INNER / RUN) * RUN : run / (INNER / RUN);
  }

  __device__ __forceinline__ Copier(const Operand& operand, int first_outer)
      : operand(operand), vectors(operand.vectors()) {
#pragma unroll
    for (int i = 0; i < OUTERS; ++i) {
      outers[i] = operand.outer(first_outer + (INNER_DEPTH ? run_outer(i) : run_outer(0) + i));
    }
  }

  // Copies the slice that begins at `first_depth`, as vectors or not.
  __device__ __forceinline__ void copy(float* slice, int first_depth) const {
    if (vectors) {
      copy_vectors(slice, first_depth);
    } else {
      copy_elements(slice, first_depth);
    }
  }

  static __device__ __forceinline__ bool has_work() {
    return LENGTH * DEPTH >= RUN * THREADS || threadIdx.x < LENGTH * DEPTH / RUN;
  }

  __device__ __forceinline__ void copy_vectors(float* slice, int first_depth) const {
    if (!has_work()) return;
#pragma unroll
    for (int r = 0; r < RUNS; ++r) {
      Element run = element(outers[INNER_DEPTH ? r : 0], operand.depth(first_depth + run_depth(r)));
      float* target = slice + Layout::at(run_outer(r), run_depth(r));
      copy_async_16(target, run.source, run.inside ? 16 : 0);
    }
  }

  __device__ __forceinline__ void copy_elements(float* slice, int first_depth) const {
    if (!has_work()) return;
#pragma unroll
    for (int i = 0; i < RUN; ++i) {
#pragma unroll
      for (int r = 0; r < RUNS; ++r) {
        float* target = slice + Layout::at(run_outer(r), run_depth(r));
        int depth = first_depth + run_depth(r) + (INNER_DEPTH ? i : 0);
        Element one = element(outers[INNER_DEPTH ? r : i], operand.depth(depth));
        copy_async_4(target + i, one.source, one.inside ? 4 : 0);
      }
    }
  }
};

__device__ __forceinline__ int first_row_of_warp() {
  return threadIdx.x / WARP / SHARERS / (COLUMNS / WARP_COLUMNS) * WARP_ROWS;
}

__device__ __forceinline__ int first_column_of_warp() {
  return threadIdx.x / WARP / SHARERS % (COLUMNS / WARP_COLUMNS) * WARP_COLUMNS;
}

// Which of the warps with one part this is.
__device__ __forceinline__ int sharer() { return threadIdx.x / WARP % SHARERS; }

// Where an element is in a tile's result. An XOR swizzle of the columns spreads over the banks what
// a warp stores at once, which would otherwise lie in four or eight of the 32.
__device__ __forceinline__ int in_result(int row, int column) {
  return row * COLUMNS + (column ^ ((row ^ row / 4) % 4 * 8 & (COLUMNS - 1)));
}

#if TENSOR_CORES
// A thread's part of the product: its elements of each 16 x 8 accumulator of mma.sync.
//
// Loads from shared memory are as wide as possible and in a fragment's register order: otherwise
// moving values takes more instructions than multiplying them. Where depth is inner, ldmatrix does
// that. Where it is not, one load brings two rows of the first operand, used as a fragment's rows
// g and g + 8, but only one column of the second. Hence TURNED: B^T A^T instead of A B.
template <class A, class B>
struct Product {
  static const bool TURNED = A::INNER_DEPTH && !B::INNER_DEPTH;
  static const int DOWN = (TURNED ? WARP_COLUMNS : WARP_ROWS) / 16;
  static const int ACROSS = (TURNED ? WARP_ROWS : WARP_COLUMNS) / 8;
  float sums[DOWN][ACROSS][4] = {};

  static __device__ __forceinline__ int lane() { return threadIdx.x % WARP; }
  static __device__ __forceinline__ int group() { return lane() / 4; }
  static __device__ __forceinline__ int member() { return lane() % 4; }

  // Adds the product of the WARP_DEPTH depths from `depth`. `copy` asks for a later stage while the
  // first fragments are on their way.
  template <class Copy>
  __device__ __forceinline__ void add(
      const float* a, const float* b, int depth, const Copy& copy) {
    if constexpr (TURNED) {
      add_in_order<B, A>(b, first_column_of_warp(), a, first_row_of_warp(), depth, copy);
    } else {
      add_in_order<A, B>(a, first_row_of_warp(), b, first_column_of_warp(), depth, copy);
    }
  }

  template <class First, class Second, class Copy>
  __device__ __forceinline__ void add_in_order(
      const float* a, int first_row, const float* b, int first_column, int depth,
      const Copy& copy) {
#pragma unroll
    for (int k = depth; k < depth + WARP_DEPTH; k += 8) {
      float rows[DOWN][4], columns[ACROSS / 2][4];
#pragma unroll
      for (int i = 0; i < DOWN; ++i) read_rows<First>(rows[i], a, first_row + 16 * i, k);
#pragma unroll
      for (int j = 0; j < ACROSS / 2; ++j) {
        read_columns<Second>(columns[j], b, first_column + 16 * j, k);
      }
      if (k == depth) copy();
      unsigned int row_fragment[DOWN][4], column_fragment[ACROSS][2];
#pragma unroll
      for (int i = 0; i < DOWN; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) row_fragment[i][e] = to_tf32(rows[i][e]);
      }
#pragma unroll
      for (int j = 0; j < ACROSS; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          column_fragment[j][e] = to_tf32(columns[j / 2][j % 2 * 2 + e]);
        }
      }
#pragma unroll
      for (int i = 0; i < DOWN; ++i) {
#pragma unroll
        for (int j = 0; j < ACROSS; ++j) {
          mma_m16n8k8_tf32(sums[i][j], row_fragment[i], column_fragment[j]);
        }
      }
    }
  }

  // A fragment of the first operand: 16 rows from `first`, 8 depths from k.
  template <class Layout>
  static __device__ __forceinline__ void read_rows(
      float (&values)[4], const float* slice, int first, int k) {
    if (Layout::INNER_DEPTH) {
      load_matrices(values, slice + Layout::at(first + lane() % 16, k + lane() / 16 * 4));
      return;
    }
    const float* source = slice + Layout::at(first + 2 * group(), k + member());
    float2 low = *(const float2*)source, high = *(const float2*)(source + 4 * Layout::PITCH);
    values[0] = low.x, values[1] = low.y, values[2] = high.x, values[3] = high.y;
  }

  // Two fragments of the second operand: 16 columns from `first`, 8 depths from k.
  template <class Layout>
  static __device__ __forceinline__ void read_columns(
      float (&values)[4], const float* slice, int first, int k) {
    if (Layout::INNER_DEPTH) {
      int column = lane() / 16 * 8 + lane() % 8;
      load_matrices(values, slice + Layout::at(first + column, k + lane() / 8 % 2 * 4));
      return;
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float* source = slice + Layout::at(first + 8 * j + group(), k + member());
      values[2 * j] = source[0], values[2 * j + 1] = source[4 * Layout::PITCH];
    }
  }

  // Writes the sums to a result, two neighbours of a row at a time.
  __device__ __forceinline__ void store(float* result) const {
    const bool inner_depth = !TURNED && A::INNER_DEPTH;
#pragma unroll
    for (int i = 0; i < DOWN; ++i) {
#pragma unroll
      for (int j = 0; j < ACROSS; ++j) {
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          const int e = TURNED ? pair : 2 * pair, neighbour = TURNED ? e + 2 : e + 1;
          int down = 16 * i + (inner_depth ? group() + e / 2 * 8 : 2 * group() + e / 2);
          int across = 8 * j + 2 * member() + e % 2;
          int row = first_row_of_warp() + (TURNED ? across : down);
          int column = first_column_of_warp() + (TURNED ? down : across);
          float2 both = {sums[i][j][e], sums[i][j][neighbour]};
          *(float2*)(result + in_result(row, column)) = both;
        }
      }
    }
  }
};
#else
__device__ __forceinline__ void read_run(float (&values)[RUN], const float* source) {
  float4 run = *(const float4*)source;
  values[0] = run.x, values[1] = run.y, values[2] = run.z, values[3] = run.w;
}

// The COUNT rows or columns of a warp tile that each of GROUPS groups of threads has. Where these
// are inner in shared memory they are adjacent, so that they are read as runs; otherwise they are
// those with the same swizzle.
template <class Layout, int GROUPS, int COUNT>
struct Part {
  static __device__ __forceinline__ int outer(int group, int i) {
    if (!Layout::INNER_DEPTH) return COUNT * group + i;
    return GROUPS == 8 ? group + 8 * i : 2 * group + i % 2 + i / 2 * 8;
  }

  // Reads values[i][k] at the depths `depth` + k.
  static __device__ __forceinline__ void read(
      const float* slice, int first, int group, int depth, float (&values)[COUNT][RUN]) {
    first += outer(group, 0);
    if (Layout::INNER_DEPTH) {
      const float* source = slice + Layout::at(first, depth);
#pragma unroll
      for (int i = 0; i < COUNT; ++i) read_run(values[i], source + outer(0, i) * Layout::PITCH);
      return;
    }
#pragma unroll
    for (int k = 0; k < RUN; ++k) {
      const float* source = slice + Layout::at(first, depth + k);
#pragma unroll
      for (int i = 0; i < COUNT; i += RUN) {
        float run[RUN];
        read_run(run, source + i);
#pragma unroll
        for (int e = 0; e < RUN; ++e) values[i + e][k] = run[e];
      }
    }
  }
};

// A thread's part of the product: as near to a square as runs allow, so that it reads least for its
// multiplications.
template <class A, class B>
struct Product {
  static const int ACROSS = WARP_ROWS < 64 ? RUN : 2 * RUN, MEMBERS = WARP_COLUMNS / ACROSS;
  static const int GROUPS = WARP / MEMBERS, DOWN = WARP_ROWS / GROUPS;
  using PartA = Part<A, GROUPS, DOWN>;
  using PartB = Part<B, MEMBERS, ACROSS>;
  float sums[DOWN][ACROSS] = {};

  static __device__ __forceinline__ int group() { return threadIdx.x % WARP / MEMBERS; }
  static __device__ __forceinline__ int member() { return threadIdx.x % MEMBERS; }

  // Adds the product of the WARP_DEPTH depths from `first`, after `copy` has asked for a later
  // stage.
  template <class Copy>
  __device__ __forceinline__ void add(
      const float* a, const float* b, int first, const Copy& copy) {
    copy();
#pragma unroll(SHARERS > 1 ? 2 : 1)
    for (int depth = first; depth < first + WARP_DEPTH; depth += RUN) {
      float a_values[DOWN][RUN], b_values[ACROSS][RUN];
      PartA::read(a, first_row_of_warp(), group(), depth, a_values);
      PartB::read(b, first_column_of_warp(), member(), depth, b_values);
#pragma unroll
      for (int k = 0; k < RUN; ++k) {
#pragma unroll
        for (int i = 0; i < DOWN; ++i) {
#pragma unroll
          for (int j = 0; j < ACROSS; ++j) {
            sums[i][j] = __fmaf_rn(a_values[i][k], b_values[j][k], sums[i][j]);
          }
        }
      }
    }
  }

  // Writes the sums to a result.
  __device__ __forceinline__ void store(float* result) const {
#pragma unroll
    for (int i = 0; i < DOWN; ++i) {
#pragma unroll
      for (int j = 0; j < ACROSS; ++j) {
        int row = first_row_of_warp() + PartA::outer(group(), i);
        int column = first_column_of_warp() + PartB::outer(member(), j);
        result[in_result(row, column)] = sums[i][j];
      }
    }
  }
};
#endif

// A tile's result: a row with the sums over depth of B's columns, where they were asked for, and
// below it ROWS of the product.
const int RESULT = (ROWS + 1) * COLUMNS;

const int SLICES = (ROWS + COLUMNS) * DEPTH;
const int STAGE = STAGE_SLICES * SLICES;
const int MEMORY = STAGES * STAGE > SHARERS * RESULT ? STAGES * STAGE : SHARERS * RESULT;

__shared__ __align__(16) float memory[MEMORY];

__device__ __forceinline__ void add(float4& sum, float4 term) {
  sum.x += term.x, sum.y += term.y, sum.z += term.z, sum.w += term.w;
}

// The runs of a result that a thread has.
const int RUNS = (RESULT / RUN + THREADS - 1) / THREADS;

// Adds up the sharers' results, one behind the other in `memory`.
__device__ __forceinline__ void add_sharers(float* memory, bool with_sums) {
  float4* runs = (float4*)memory;
  int first = with_sums ? 0 : COLUMNS / RUN;
#pragma unroll
  for (int r = 0; r < RUNS; ++r) {
    int i = first + threadIdx.x + r * THREADS;
    if (i < RESULT / RUN) {
      float4 sum = runs[i];
#pragma unroll
      for (int other = 1; other < SHARERS; ++other) add(sum, runs[other * (RESULT / RUN) + i]);
      runs[i] = sum;
    }
  }
  __syncthreads();
}

// The product of rows from `row`, columns from `column` and depths from `first` to `end`, left in
// `memory` (MEMORY,) as a result. Ends with a barrier.
template <class A, class B>
__device__ __forceinline__ void multiply(
    float* memory, const A& a, const B& b, int row, int column, int first, int end,
    bool with_sums) {
  using LayoutA = Slice<A::INNER_DEPTH, ROWS>;
  using LayoutB = Slice<B::INNER_DEPTH, COLUMNS>;
  Copier<ROWS, A> copier_a(a, row);
  Copier<COLUMNS, B> copier_b(b, column);
  int count = ceil_div(end - first, STAGE_DEPTH);
  bool vectors = copier_a.vectors && copier_b.vectors;
  auto for_each_slice = [&](int stage, const auto& copy_slice) {
#pragma unroll
    for (int slice = 0; slice < STAGE_SLICES; ++slice) {
      copy_slice(
          memory + stage % STAGES * STAGE + slice * SLICES,
          first + stage * STAGE_DEPTH + slice * DEPTH);
    }
  };
  auto copy = [&](int stage) {
    if (stage < count) {
      if (vectors) {  // one branch for all copies
        for_each_slice(stage, [&](float* slice, int depth) {
          copier_b.copy_vectors(slice + LayoutA::SIZE, depth);
          copier_a.copy_vectors(slice, depth);  // last, since it may compute what it brings
        });
      } else {
        for_each_slice(stage, [&](float* slice, int depth) {
          copier_b.copy(slice + LayoutA::SIZE, depth);
          copier_a.copy(slice, depth);
        });
      }
    }
    commit_copies();
  };
  Product<LayoutA, LayoutB> product;
  int depth = sharer() * WARP_DEPTH;
  int summed = threadIdx.x % COLUMNS;
  bool sums = with_sums && threadIdx.x < SHARERS * COLUMNS;
  float column_sum = 0.0f;
#pragma unroll 1
  for (int stage = 0; stage < STAGES - 1; ++stage) copy(stage);
#pragma unroll 1
  for (int stage = 0; stage < count; ++stage) {
    wait_copies<STAGES - 2>();
    __syncthreads();  // all copies of this stage have landed, and all reads of the last are over
    const float* a_slice = memory + stage % STAGES * STAGE + depth / DEPTH * SLICES;
    const float* b_slice = a_slice + LayoutA::SIZE;
    product.add(a_slice, b_slice, depth % DEPTH, [&] { copy(stage + STAGES - 1); });
    if (sums) {
      for (int k = 0; k < WARP_DEPTH; ++k) {
        column_sum += b_slice[LayoutB::at(summed, depth % DEPTH + k)];
      }
    }
  }
  wait_copies<0>();
  __syncthreads();
  float* result = memory + sharer() * RESULT;
  if (sums) result[summed] = column_sum;
  product.store(result + COLUMNS);
  __syncthreads();
  if (SHARERS > 1) add_sharers(memory, with_sums);
}

#ifdef __CUDA_ARCH__
// Counts one more arrival; returns how many there were. Between barriers, one thread's release and
// acquire are for its whole block.
__device__ __forceinline__ int arrive(int* counter) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(counter)
               : "memory");
  return before;
}

// The same without acquire: its caller reads nothing that others wrote, nor the count at once.
__device__ __forceinline__ int arrive_before(int* counter) {
  int before;
  asm volatile("atom.release.gpu.global.add.s32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(counter)
               : "memory");
  return before;
}
#endif

// Whether this block is the last of `expected` to arrive at `counter`, which is then zero again.
// What the others wrote before is visible to it, if it reads past the L1 cache.
__device__ __forceinline__ bool last_to_arrive(int* counter, int expected) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    last = arrive(counter) == expected - 1;
    if (last) *counter = 0;
  }
  __syncthreads();
  return last;
}

// Where a tile of a matrix begins.
struct Place {
  int row, column;
  __device__ __forceinline__ Place(int tile, int columns)
      : row(tile / ceil_div(columns, COLUMNS) * ROWS),
        column(tile % ceil_div(columns, COLUMNS) * COLUMNS) {}
};

// The most results that one block adds up: more are added up by a tree of blocks.
const int FAN = 12;

// How many of their runs a thread has in flight.
const int FETCHED = 18;

// A block's share of a launch: one split of one tile. Each split has a result in `partials`, and on
// each level of the tree a counter in `arrivals`.
struct Share {
  int tile, tiles, split, splits;
  float* partials;
  int* arrivals;

  // The depths of this split, a whole number of stages but for the last.
  __device__ __forceinline__ int first(int depth) const {
    return min(depth, split * ceil_div(ceil_div(depth, STAGE_DEPTH), splits) * STAGE_DEPTH);
  }
  __device__ __forceinline__ int end(int depth) const {
    return min(depth, (split + 1) * ceil_div(ceil_div(depth, STAGE_DEPTH), splits) * STAGE_DEPTH);
  }

  // Adds up the splits' results in `memory`, as far as their first `rows` rows. False for all
  // blocks of a tile but the last to arrive.
  __device__ __forceinline__ bool gather(float* memory, int rows) const {
    int index = split, left = splits, step = 1, *counters = arrivals;
    int runs = (1 + min(rows, ROWS)) * COLUMNS / RUN;
    while (left > 1) {
      int first = index / FAN * FAN, count = min(FAN, left - first);
      leave(memory, index * step, runs);
      if (!last_to_arrive(counters + first * step * tiles + tile, count)) return false;
      add_up(memory, first * step, count, step, runs);
      index /= FAN, left = ceil_div(left, FAN), step *= FAN, counters += splits * tiles;
    }
    return true;
  }

  __device__ __forceinline__ float4* result_of(int split) const {
    return (float4*)(partials + ((size_t)split * tiles + tile) * RESULT);
  }

  __device__ __forceinline__ void leave(const float* memory, int split, int runs) const {
    float4* mine = result_of(split);
#pragma unroll
    for (int r = 0; r < RUNS; ++r) {
      int i = threadIdx.x + r * THREADS;
      if (i < runs) mine[i] = ((const float4*)memory)[i];
    }
  }

  // The sum of `count` results, `step` splits apart, from `first` on.
  __device__ __forceinline__ void add_up(
      float* memory, int first, int count, int step, int runs) const {
    const int at_once = FETCHED / RUNS;
    float4 sums[RUNS] = {};
#pragma unroll 1
    for (int other = 0; other < count; other += at_once) {
      float4 terms[at_once][RUNS] = {};
#pragma unroll
      for (int t = 0; t < at_once; ++t) {
        const float4* theirs = result_of(first + (other + t) * step);
#pragma unroll
        for (int r = 0; r < RUNS; ++r) {
          int i = threadIdx.x + r * THREADS;
          if (i < runs && other + t < count) terms[t][r] = __ldcg(theirs + i);
        }
      }
#pragma unroll
      for (int t = 0; t < at_once; ++t) {
#pragma unroll
        for (int r = 0; r < RUNS; ++r) add(sums[r], terms[t][r]);
      }
    }
#pragma unroll
    for (int r = 0; r < RUNS; ++r) {
      int i = threadIdx.x + r * THREADS;
      if (i < runs) ((float4*)memory)[i] = sums[r];
    }
    __syncthreads();
  }
};

// A job's part of a launch of several: its first block, tiles and splits, and where its own parts of
// `partials` and `arrivals` begin.
struct Division {
  long long first_block, tiles, splits, first_partial, first_arrival;

  __device__ __forceinline__ Share share(float* partials, int* arrivals) const {
    int block = blockIdx.x - (int)first_block, count = (int)tiles;
    return {block % count, count, block / count, (int)splits, partials + first_partial,
            arrivals + first_arrival};
  }
};

// The job that this block belongs to, of jobs (count,). Several jobs' first_block are loaded at
// once, where a search would wait for each load.
template <class Job>
__device__ __forceinline__ const Job* this_job(const long long* jobs, int count) {
  const Job* table = (const Job*)jobs;
  const int at_once = 8;
  int before = 0;
#pragma unroll 1
  for (int first = 1; first < count; first += at_once) {
#pragma unroll
    for (int j = 0; j < at_once; ++j) {
      before += first + j < count && table[first + j].first_block <= blockIdx.x;
    }
  }
  return table + before;
}

// At the end of a launch that changes no state.
struct NoEnd {
  __device__ __forceinline__ void count() {}
};

// The last of the launch's `blocks` to have read the state advances it to the next step; none
// does if batch_size is 0.
struct StepEnd {
  int* all;
  long long* state;
  int batch_size, blocks, number;

  // Counts this block, whose threads have read the state before a barrier. Nothing waits here for
  // the result, which only `finish` uses.
  __device__ __forceinline__ void count() {
    if (batch_size && threadIdx.x == 0) number = arrive_before(all);
  }

  __device__ __forceinline__ void finish() const {
    if (!batch_size || threadIdx.x > 0 || number < blocks - 1) return;
    *all = 0;
    next_step(state, batch_size);
  }
};

// Tiles along x, after `before` other blocks, and in launches that have phases along z; splits
// along y.
__device__ __forceinline__ Share this_share(float* partials, int* arrivals, int before = 0) {
  int across = gridDim.x - before, tiles = gridDim.z * across;
  int tile = blockIdx.z * across + blockIdx.x - before;
  return {tile, tiles, (int)blockIdx.y, (int)gridDim.y, partials, arrivals};
}

// The epilogue of a tile of a matrix (rows, columns).
template <class Finish>
struct Epilogue {
  static const int MOST = ROWS * COLUMNS / (RUN * THREADS);  // runs of a thread
  static const int TOGETHER = Finish::TOGETHER < MOST ? Finish::TOGETHER : MOST;

  Finish finish;
  int first_row, first_column, runs, columns;
  bool vectors;

  __device__ __forceinline__ Epilogue(
      const Finish& finish, const Place& place, int rows, int columns)
      : finish(finish),
        first_row(place.row),
        first_column(place.column),
        runs(min(rows - place.row, ROWS) * COLUMNS / RUN),
        columns(columns),
        vectors(columns % RUN == 0 && finish.is_aligned()) {}

  __device__ __forceinline__ int row(int run) const { return first_row + run * RUN / COLUMNS; }
  __device__ __forceinline__ int column(int run) const {
    return first_column + run * RUN % COLUMNS;
  }
  __device__ __forceinline__ int count(int run) const {
    return run < runs ? columns - column(run) : 0;
  }

  template <bool VECTORS>
  __device__ __forceinline__ void apply_runs(const float* result) const {
    int end = ceil_div(runs, THREADS) * THREADS;  // uniform, as epilogues may shuffle
#pragma unroll 1
    for (int first = threadIdx.x; first < end; first += TOGETHER * THREADS) {
      typename Finish::Fetched fetched[TOGETHER];
#pragma unroll
      for (int t = 0; t < TOGETHER; ++t) {
        int run = first + t * THREADS;
        fetched[t] = finish.template fetch<VECTORS>(row(run), column(run), count(run));
      }
#pragma unroll
      for (int t = 0; t < TOGETHER; ++t) {
        int run = first + t * THREADS;
        int place = COLUMNS + in_result(run * RUN / COLUMNS, run * RUN % COLUMNS);
        finish.template apply<VECTORS>(
            row(run), column(run), count(run), *(const Run*)(result + place), fetched[t]);
      }
    }
  }

  // Applies it to a result.
  __device__ __forceinline__ void apply(const float* result) const {
    if (vectors) {
      apply_runs<true>(result);
    } else {
      apply_runs<false>(result);
    }
  }
};

// The row of sums above a result.
template <class Finish>
__device__ __forceinline__ void for_sums(
    const float* result, int first_column, int columns, const Finish& finish) {
  if (threadIdx.x >= COLUMNS / RUN) return;
  int column = first_column + RUN * threadIdx.x, count = columns - column;
  Run run = *(const Run*)(result + RUN * threadIdx.x);
  finish_run(0, column, count, run, finish);
}
