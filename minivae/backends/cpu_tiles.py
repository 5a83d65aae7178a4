"""Tiles of a matrix product that live in vector registers: what BLAS has at its heart.

A tile is ROWS x (VECTORS LANES) numbers of a product a b, or fewer at its edges, where idle rows
and lanes would cost as much as busy ones. `multiply_add` adds the outer product of ROWS numbers of
a and VECTORS vectors of b to it, so that ROWS + VECTORS loads feed ROWS * VECTORS fused
multiply-adds. The rows of a tile may lie anywhere: `places` (ROWS,) holds where each begins in a
flat array, which is all that a convolution needs to be a matrix product; None stands for 0, 1, 2
and so on.

LLVM's vector types carry this to every processor; only the tile's size is chosen for the one at
hand. All arrays are contiguous, indices are in elements, and columns at or beyond `width` are
neither read nor written.
"""

from typing import Any

from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

_AVX512 = bool(binding.get_host_cpu_features().get("avx512f"))

ROWS, VECTORS, LANES = (8, 2, 16) if _AVX512 else (6, 2, 8)
"""As many accumulators as leave vector registers for every operand, and address registers for
every row: 16 of AVX-512's 32, 12 of AVX2's 16."""

DENSE_VECTORS = 3 if _AVX512 else 2
"""A tile of a dense layer has 24 accumulators where it can: a step that reads more of a row waits
less often for memory. Convolutions of 32 filters would leave a third of them idle."""

SUMS = -(-ROWS * VECTORS // LANES) * LANES
"""The vectors of a whole tile, in whole groups of LANES."""

INDEX, SHORT, FLOAT = ir.IntType(64), ir.IntType(32), ir.FloatType()
VECTOR = ir.VectorType(FLOAT, LANES)
SHORTS = ir.VectorType(SHORT, LANES)
MASK = ir.VectorType(ir.IntType(1), LANES)
BAND = ir.VectorType(FLOAT, 1 << (ROWS - 1).bit_length())
"""A row of ROWS columns, and perhaps idle lanes."""


emitted: Any = intrinsic(prefer_literal=True)


class TileType(types.Type):
    """The type of a tile of so many rows and vectors in each."""

    def __init__(self, rows: int, vectors: int) -> None:
        super().__init__(name=f"Tile({rows}, {vectors})")
        self.rows, self.vectors = rows, vectors
        self.layout = ir.ArrayType(VECTOR, rows * vectors)


@register_model(TileType)
class TileModel(models.PrimitiveModel):
    """A tile as LLVM sees it."""

    def __init__(self, manager: Any, numba_type: TileType) -> None:
        super().__init__(manager, numba_type, numba_type.layout)


class Emitter:
    """Writes LLVM instructions for one use of an intrinsic."""

    def __init__(self, context: Any, builder: Any) -> None:
        self.context, self.builder = context, builder

    def data(self, array_type: Any, array: Any) -> Any:
        """The address of an array's first element."""
        return self.context.make_array(array_type)(self.context, self.builder, array).data

    def offsets(self, rows_type: Any, rows: Any, count: int) -> list[Any]:
        """The first `count` numbers in `rows`; None stands for 0, 1, 2 and so on."""
        if isinstance(rows_type, types.NoneType):
            return [INDEX(r) for r in range(count)]
        first = self.data(rows_type, rows)
        return [self.builder.load(self.builder.gep(first, [INDEX(r)])) for r in range(count)]

    def splat(self, value: Any, vector: Any) -> Any:
        """`value` in every lane."""
        undefined = ir.Constant(vector, ir.Undefined)
        first = self.builder.insert_element(undefined, value, SHORT(0))
        zeros = ir.VectorType(SHORT, vector.count)([0] * vector.count)
        return self.builder.shuffle_vector(first, undefined, zeros)

    def masks(self, width: Any, vectors: int) -> list[Any]:
        """For each vector, which of its columns are below `width`."""
        limit = self.splat(self.builder.trunc(width, SHORT), SHORTS)
        return [
            self.builder.icmp_signed("<", SHORTS(list(range(v * LANES, (v + 1) * LANES))), limit)
            for v in range(vectors)
        ]

    def _address(self, first: Any, offset: Any, vector: int) -> Any:
        index = self.builder.add(offset, INDEX(vector * LANES))
        return self.builder.bitcast(self.builder.gep(first, [index]), VECTOR.as_pointer())

    def _call(self, name: str, result: Any, arguments: list[Any]) -> Any:
        signature = ir.FunctionType(result, [argument.type for argument in arguments])
        function = cgutils.get_or_insert_function(self.builder.module, signature, name)
        return self.builder.call(function, arguments)

    def load(self, first: Any, offset: Any, masks: list[Any]) -> list[Any]:
        """Vectors from `offset` on, zeros where they are masked."""
        zeros = VECTOR([0.0] * LANES)
        return [
            self._call(
                f"llvm.masked.load.v{LANES}f32.p0",
                VECTOR,
                [self._address(first, offset, v), SHORT(4), mask, zeros],
            )
            for v, mask in enumerate(masks)
        ]

    def store(self, vectors: list[Any], first: Any, offset: Any, masks: list[Any]) -> None:
        """Vectors to `offset`, but for what is masked."""
        for v, (vector, mask) in enumerate(zip(vectors, masks, strict=True)):
            self._call(
                f"llvm.masked.store.v{LANES}f32.p0",
                ir.VoidType(),
                [vector, self._address(first, offset, v), SHORT(4), mask],
            )

    def row(self, tile: TileType, numbers: Any, r: int) -> list[Any]:
        """The vectors of a tile's row."""
        first = r * tile.vectors
        return [self.builder.extract_value(numbers, first + v) for v in range(tile.vectors)]

    def interleave(self, a: Any, b: Any) -> tuple[Any, Any]:
        """a0 b0 a1 b1 ... of the lower half of the lanes, and of the upper half."""
        low, high = (
            SHORTS([lane // 2 + begin + lane % 2 * LANES for lane in range(LANES)])
            for begin in (0, LANES // 2)
        )
        return self.builder.shuffle_vector(a, b, low), self.builder.shuffle_vector(a, b, high)

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        """a b + c, rounded once."""
        return self._call(f"llvm.fma.v{LANES}f32", VECTOR, [a, b, c])


@emitted
def zero_tile(typing_context: Any, rows: Any, vectors: Any) -> Any:
    """A tile of zeros; `rows` and `vectors` are constants."""
    tile = TileType(rows.literal_value, vectors.literal_value)

    def generate(context, builder, signature, arguments):
        return ir.Constant(tile.layout, None)

    return tile(rows, vectors), generate


@emitted
def load_tile(
    typing_context: Any, source: Any, places: Any, at: Any, width: Any, rows: Any, vectors: Any
) -> Any:
    """A tile from source[places[r] + at + column]; `rows` and `vectors` are constants."""
    tile = TileType(rows.literal_value, vectors.literal_value)

    def generate(context, builder, signature, arguments):
        source, places, at, width, *_ = arguments
        emit = Emitter(context, builder)
        first, masks = emit.data(signature.args[0], source), emit.masks(width, tile.vectors)
        numbers = ir.Constant(tile.layout, ir.Undefined)
        for r, offset in enumerate(emit.offsets(signature.args[1], places, tile.rows)):
            for v, vector in enumerate(emit.load(first, builder.add(offset, at), masks)):
                numbers = builder.insert_value(numbers, vector, r * tile.vectors + v)
        return numbers

    return tile(source, places, types.intp, types.intp, rows, vectors), generate


@emitted
def store_tile(
    typing_context: Any, tile: Any, target: Any, places: Any, at: Any, width: Any
) -> Any:
    """target[places[r] + at + column] gets the tile."""

    def generate(context, builder, signature, arguments):
        numbers, target, places, at, width = arguments
        emit = Emitter(context, builder)
        first, masks = emit.data(signature.args[1], target), emit.masks(width, tile.vectors)
        for r, offset in enumerate(emit.offsets(signature.args[2], places, tile.rows)):
            row = emit.row(tile, numbers, r)
            emit.store(row, first, builder.add(offset, at), masks)
        return context.get_dummy_value()

    return types.none(tile, target, places, types.intp, types.intp), generate


@emitted
def add_tile(
    typing_context: Any,
    tile: Any,
    target: Any,
    places: Any,
    count: Any,
    at: Any,
    width: Any,
    present: Any,
    weight: Any,
) -> Any:
    """target[places[r] + at + column] grows by `weight` times the tile, for the rows r below
    `count`; columns at or beyond `present` are taken to be zero."""

    def generate(context, builder, signature, arguments):
        numbers, target, places, count, at, width, present, weight = arguments
        emit = Emitter(context, builder)
        factor = emit.splat(weight, VECTOR)
        first = emit.data(signature.args[1], target)
        for r, offset in enumerate(emit.offsets(signature.args[2], places, tile.rows)):
            within = builder.icmp_signed("<", INDEX(r), count)
            old, new = (
                emit.masks(builder.select(within, columns, INDEX(0)), tile.vectors)
                for columns in (present, width)
            )
            place = builder.add(offset, at)
            pairs = zip(emit.row(tile, numbers, r), emit.load(first, place, old), strict=True)
            emit.store([emit.multiply_add(factor, *pair) for pair in pairs], first, place, new)
        return context.get_dummy_value()

    integers = (types.intp, types.intp, types.intp, types.intp)
    return types.none(tile, target, places, *integers, types.float32), generate


@emitted
def multiply_add(
    typing_context: Any, tile: Any, a: Any, places: Any, a_at: Any, b: Any, b_at: Any, width: Any
) -> Any:
    """The tile plus a[places[r] + a_at] b[b_at + column]."""

    def generate(context, builder, signature, arguments):
        numbers, a, places, a_at, b, b_at, width = arguments
        emit = Emitter(context, builder)
        first, source = emit.data(signature.args[1], a), emit.data(signature.args[4], b)
        vectors = emit.load(source, b_at, emit.masks(width, tile.vectors))
        for r, offset in enumerate(emit.offsets(signature.args[2], places, tile.rows)):
            # Two steps, so that a row's own address stays the same throughout a loop over a_at.
            value = builder.load(builder.gep(builder.gep(first, [offset]), [a_at]))
            factor = emit.splat(value, VECTOR)
            for v, sum_ in enumerate(emit.row(tile, numbers, r)):
                sum_ = emit.multiply_add(factor, vectors[v], sum_)
                numbers = builder.insert_value(numbers, sum_, r * tile.vectors + v)
        return numbers

    return tile(tile, a, places, types.intp, b, types.intp, types.intp), generate


@emitted
def fetch(typing_context: Any, source: Any, at: Any, vectors: Any) -> Any:
    """Asks for `vectors` vectors from source[at] on, which may be beyond its end: whoever reads
    them soon need not wait for memory. `vectors` is a constant."""

    def generate(context, builder, signature, arguments):
        source, at, _ = arguments
        emit = Emitter(context, builder)
        first = emit.data(signature.args[0], source)
        to_read, to_l2, data = SHORT(0), SHORT(2), SHORT(1)
        for v in range(vectors.literal_value):
            address = builder.gep(first, [builder.add(at, INDEX(v * LANES))])
            address = builder.bitcast(address, ir.IntType(8).as_pointer())
            emit._call(
                "llvm.prefetch.p0",
                ir.VoidType(),
                [address, to_read, to_l2, data],
            )
        return context.get_dummy_value()

    return types.none(source, types.intp, vectors), generate


@emitted
def nonzero_lanes(typing_context: Any, a: Any, places: Any, at: Any, width: Any) -> Any:
    """A number whose bit number `lane` says whether a[places[r] + at + lane] is other than zero for
    some r below ROWS; lanes at or beyond `width` are zero."""

    def generate(context, builder, signature, arguments):
        a, places, at, width = arguments
        emit = Emitter(context, builder)
        first, masks = emit.data(signature.args[0], a), emit.masks(width, 1)
        nonzero = MASK([0] * LANES)
        for offset in emit.offsets(signature.args[1], places, ROWS):
            (numbers,) = emit.load(first, builder.add(offset, at), masks)
            nonzero = builder.or_(
                nonzero, builder.fcmp_unordered("!=", numbers, VECTOR([0.0] * LANES))
            )
        return builder.zext(builder.bitcast(nonzero, ir.IntType(LANES)), INDEX)

    return types.intp(a, places, types.intp, types.intp), generate


@emitted
def copy_row(typing_context: Any, source: Any, at: Any, width: Any, target: Any, to: Any) -> Any:
    """target[to + column] = source[at + column] for the columns below `width`, at most ROWS, and
    zero for those from there up to BAND's. Returns whether any is other than zero."""

    def generate(context, builder, signature, arguments):
        source, at, width, target, to = arguments
        emit, lanes = Emitter(context, builder), ir.VectorType(SHORT, BAND.count)
        limit, zeros = emit.splat(builder.trunc(width, SHORT), lanes), BAND([0.0] * BAND.count)
        mask = builder.icmp_signed("<", lanes(list(range(BAND.count))), limit)
        first = builder.gep(emit.data(signature.args[0], source), [at])
        place = builder.gep(emit.data(signature.args[3], target), [to])
        first, place = (builder.bitcast(pointer, BAND.as_pointer()) for pointer in (first, place))
        name = f"llvm.masked.load.v{BAND.count}f32.p0"
        numbers = emit._call(name, BAND, [first, SHORT(4), mask, zeros])
        builder.store(numbers, place, align=4)
        nonzero = builder.fcmp_unordered("!=", numbers, zeros)
        bits = ir.IntType(BAND.count)
        return builder.icmp_unsigned("!=", builder.bitcast(nonzero, bits), bits(0))

    return types.boolean(source, types.intp, types.intp, target, types.intp), generate


@emitted
def leaky_relu_tile(typing_context: Any, tile: Any, slope: Any) -> Any:
    """The tile, what is negative in it multiplied by `slope`."""

    def generate(context, builder, signature, arguments):
        numbers, slope = arguments
        emit = Emitter(context, builder)
        factor, zero = emit.splat(slope, VECTOR), VECTOR([0.0] * LANES)
        for i in range(tile.rows * tile.vectors):
            z = builder.extract_value(numbers, i)
            positive = builder.fcmp_ordered(">", z, zero)
            scaled = builder.select(positive, z, builder.fmul(factor, z))
            numbers = builder.insert_value(numbers, scaled, i)
        return numbers

    return tile(tile, types.float32), generate


@emitted
def leaky_relu_gradient_tile(
    typing_context: Any, tile: Any, x: Any, places: Any, at: Any, width: Any, slope: Any
) -> Any:
    """The tile, multiplied by `slope` where x[places[r] + at + column] is not positive."""

    def generate(context, builder, signature, arguments):
        numbers, x, places, at, width, slope = arguments
        emit = Emitter(context, builder)
        first, masks = emit.data(signature.args[1], x), emit.masks(width, tile.vectors)
        factor, zero = emit.splat(slope, VECTOR), VECTOR([0.0] * LANES)
        for r, offset in enumerate(emit.offsets(signature.args[2], places, tile.rows)):
            outputs = emit.load(first, builder.add(offset, at), masks)
            for v, g in enumerate(emit.row(tile, numbers, r)):
                positive = builder.fcmp_ordered(">", outputs[v], zero)
                g = builder.select(positive, g, builder.fmul(factor, g))
                numbers = builder.insert_value(numbers, g, r * tile.vectors + v)
        return numbers

    return tile(tile, x, places, types.intp, types.intp, types.float32), generate


@emitted
def multiply_add_dots(
    typing_context: Any,
    tile: Any,
    a: Any,
    places: Any,
    a_at: Any,
    b: Any,
    b_at: Any,
    b_step: Any,
    width: Any,
) -> Any:
    """Vector v of row r of the tile, lane by lane, plus a[places[r] + a_at + lane]
    b[b_at + v b_step + lane], for the lanes below `width`: dot products, but for their last sum."""

    def generate(context, builder, signature, arguments):
        numbers, a, places, a_at, b, b_at, b_step, width = arguments
        emit = Emitter(context, builder)
        first, mask = emit.data(signature.args[1], a), emit.masks(width, 1)
        source = emit.data(signature.args[4], b)
        steps = [builder.mul(b_step, INDEX(v)) for v in range(tile.vectors)]
        factors = [emit.load(source, builder.add(b_at, step), mask)[0] for step in steps]
        for r, offset in enumerate(emit.offsets(signature.args[2], places, tile.rows)):
            vector = emit.load(first, builder.add(offset, a_at), mask)[0]
            for v, sum_ in enumerate(emit.row(tile, numbers, r)):
                sum_ = emit.multiply_add(vector, factors[v], sum_)
                numbers = builder.insert_value(numbers, sum_, r * tile.vectors + v)
        return numbers

    index = types.intp
    return tile(tile, a, places, index, b, index, index, index), generate


@emitted
def transpose_square(
    typing_context: Any,
    source: Any,
    at: Any,
    step: Any,
    target: Any,
    to: Any,
    to_step: Any,
    rows: Any,
    columns: Any,
) -> Any:
    """target[to + c to_step + r] = source[at + r step + c] for r < rows and c < columns, of which
    there are LANES at most."""

    def generate(context, builder, signature, arguments):
        source, at, step, target, to, to_step, rows, columns = arguments
        emit = Emitter(context, builder)

        def vectors(first, place, step, count, width):
            """The address and mask of each of LANES vectors, all masked from `count` on."""
            for lane in range(LANES):
                within = builder.icmp_signed("<", INDEX(lane), count)
                mask = emit.masks(builder.select(within, width, INDEX(0)), 1)
                yield first, builder.add(place, builder.mul(step, INDEX(lane))), mask

        loaded = vectors(emit.data(signature.args[0], source), at, step, rows, columns)
        square = [emit.load(*vector)[0] for vector in loaded]
        # Interleaving the upper with the lower half of the rows moves one bit of the row's number
        # to the column's: after as many times as it has bits, they have changed places.
        half = LANES // 2
        for _ in range(LANES.bit_length() - 1):
            pairs = (emit.interleave(square[row], square[row + half]) for row in range(half))
            square = [vector for pair in pairs for vector in pair]
        stored = vectors(emit.data(signature.args[3], target), to, to_step, columns, rows)
        for value, vector in zip(square, stored, strict=True):
            emit.store([value], *vector)
        return context.get_dummy_value()

    index = types.intp
    wanted = (source, index, index, target, index, index, index, index)
    return types.none(*wanted), generate


@emitted
def sum_lanes(typing_context: Any, tile: Any, sums: Any) -> Any:
    """sums[r VECTORS + v] gets the sum over vector v of row r; `sums` holds SUMS numbers."""

    def generate(context, builder, signature, arguments):
        numbers, sums = arguments
        emit = Emitter(context, builder)
        first = emit.data(signature.args[1], sums)
        zero = VECTOR([0.0] * LANES)
        vectors = [vector for r in range(tile.rows) for vector in emit.row(tile, numbers, r)]
        vectors += [zero] * (SUMS - len(vectors))
        everywhere = [MASK([1] * LANES)]
        for begin in range(0, SUMS, LANES):
            group = vectors[begin : begin + LANES]
            # Interleaving two vectors and adding the halves leaves each with half of its lanes.
            while len(group) > 1:
                half = len(group) // 2
                group = [
                    builder.fadd(*emit.interleave(group[i], group[i + half])) for i in range(half)
                ]
            emit.store(group, first, INDEX(begin), everywhere)
        return context.get_dummy_value()

    return types.none(tile, sums), generate
