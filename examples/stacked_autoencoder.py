"""A deep autoencoder built layer by layer, with tied weights.

    python examples/stacked_autoencoder.py --data mnist

Each layer is first trained alone, to reconstruct the codes of the layer below (greedy layer-wise
training: Bengio et al. 2007; Hinton & Salakhutdinov 2006), then the whole stack together. Encoder
and decoder share one matrix a layer: the decoder's is the encoder's transpose.

For a layer with code h = f(a), a = x w + b, and reconstruction g(r), r = h w^T + c, the matrix
occurs twice, and the gradient is the sum over both occurrences:

    E1    from the encoder, dense.E2:           dw  = x^T da
    E2    from the decoder, dense.E2 of w^T:    d(w^T) = h^T dr,  so  dw += dr^T h
    E3    what reaches the code, dense.E4:      da  = (dr w) * f'(a)

Look at the printed errors: each stage adds a narrower layer and loses a little, and training the
whole stack wins most of it back.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from common import chosen, options, run
from numpy.typing import NDArray

from minivae import Adam, InputError, Training, backends, plots
from minivae.data import load
from minivae.data.batching import epoch_permutation
from minivae.data.dataset import unit_pixels
from minivae.ops.activations import Activation
from minivae.ops.state import INDEX, new_state
from minivae.params import Parameters

BATCH, SHOWN = 128, 10
SIGMOID = Activation("sigmoid")
OPTIMIZER = Adam(lr=1e-3)


class Layer(NamedTuple):
    """A tied layer's values, or gradients: w (inputs, units), b (units,), c (inputs,)."""

    w: NDArray
    b: NDArray
    c: NDArray


class TiedStack:
    """Tied layers over one flat parameter buffer; all of them, or one, can be trained.

    All units are sigmoid, so that every code lies in [0, 1] like the pixels.
    """

    def __init__(
        self, sizes: Sequence[int], seed: int = 0, device: str = "cpu", dtype: type = np.float32
    ) -> None:
        self.backend = backends.get(device)
        self.dtype = dtype
        self.widths = list(sizes)
        shapes: dict[str, tuple[int, ...]] = {}
        for index, (inputs, units) in enumerate(pairwise(sizes)):
            shapes |= {f"{index}.w": (inputs, units), f"{index}.b": (units,)}
            shapes |= {f"{index}.c": (inputs,)}
        self.parameters = Parameters(shapes, self.backend, dtype)
        rng = np.random.default_rng(seed)
        for index, (inputs, units) in enumerate(pairwise(sizes)):
            # Glorot & Bengio 2010, for a slope of 1 at 0; a sigmoid's is 1/4.
            bound = 4 * np.sqrt(6 / (inputs + units))
            self.parameters.values[f"{index}.w"][...] = rng.uniform(-bound, bound, (inputs, units))

    def layers(self, kind: str = "values") -> list[Layer]:
        """The layers' views of the parameters' `values` or `gradients`."""
        views = getattr(self.parameters, kind)
        return [
            Layer(*(views[f"{index}.{name}"] for name in "wbc"))
            for index in range(len(self.widths) - 1)
        ]

    def _empty(self, rows: int, width: int) -> NDArray:
        return self.backend.zeros((rows, width), self.dtype)

    def encode(self, x: NDArray, depth: int) -> list[NDArray]:
        """x and the outputs of the first `depth` layers."""
        outputs = [x]
        for layer in self.layers()[:depth]:
            y = self._empty(len(x), len(layer.b))
            self.backend.dense_forward(outputs[-1], layer.w, layer.b, y, SIGMOID)
            outputs.append(y)
        return outputs

    def decode(self, code: NDArray, first: int, depth: int) -> list[NDArray]:
        """The code of layer `depth` and what the decoders down to layer `first` make of it."""
        outputs = [code]
        for layer in reversed(self.layers()[first:depth]):
            y = self._empty(len(code), len(layer.c))
            transposed = np.ascontiguousarray(layer.w.T)
            self.backend.dense_forward(outputs[-1], transposed, layer.c, y, SIGMOID)
            outputs.append(y)
        return outputs

    def loss_and_gradient(self, x: NDArray, first: int, depth: int) -> float:
        """Returns the squared error, summed over a row, averaged over rows, of layers `first` to
        `depth` - 1 reconstructing their input; writes their `gradients` (E1 to E3)."""
        codes = self.encode(x, depth)[first:]
        decoded = self.decode(codes[-1], first, depth)
        rows, loss = len(x), self.backend.zeros((len(x),), self.dtype)
        dz = np.empty_like(decoded[-1])
        self.backend.squared_error_loss(decoded[-1], codes[0], loss, dz, 1 / rows, 1.0, SIGMOID)
        values, gradients = (self.layers(kind)[first:depth] for kind in ("values", "gradients"))
        for index in range(depth - first):  # the decoder, from the output inwards
            h, transposed = decoded[-2 - index], np.ascontiguousarray(values[index].w.T)
            dw_transposed = np.empty_like(transposed)
            self.backend.dense_weight_gradient(h, dz, dw_transposed, gradients[index].c)
            gradients[index].w[...] = dw_transposed.T  # E2
            da = np.empty_like(h)
            self.backend.dense_input_gradient(dz, transposed, h, da, SIGMOID)  # E3
            dz = da
        for index in reversed(range(depth - first)):  # the encoder, from the code outwards
            x_below = codes[index]
            dw = np.empty_like(values[index].w)
            self.backend.dense_weight_gradient(x_below, dz, dw, gradients[index].b)  # E1
            gradients[index].w[...] += dw
            if index:
                dx = np.empty_like(x_below)
                self.backend.dense_input_gradient(dz, values[index].w, x_below, dx, SIGMOID)
                dz = dx
        return float(loss.mean())

    def train(self, images: NDArray, first: int, depth: int, steps: int, seed: int) -> float:
        """Adam for so many steps on layers `first` to `depth`; returns the last epoch's loss."""
        flat = self.parameters.flat
        # Moments of an earlier stage would keep pushing layers that this one does not train.
        flat["first_moments"][...] = flat["second_moments"][...] = 0
        schedule = OPTIMIZER.schedule_rows(0, steps, steps).astype(self.dtype)
        state, losses = new_state(), []
        per_epoch = len(images) // BATCH
        for step in range(steps):
            epoch, position = divmod(step, per_epoch)
            order = epoch_permutation(len(images), seed, epoch)[position * BATCH :][:BATCH]
            x = unit_pixels(images[order])
            flat["gradients"][...] = 0
            losses.append(self.loss_and_gradient(x, first, depth))
            self.backend.adam_update(
                *(flat["values"], flat["gradients"], flat["first_moments"]),
                *(flat["second_moments"], schedule, state),
                *(OPTIMIZER.beta1, OPTIMIZER.beta2, OPTIMIZER.epsilon),
            )
            state[INDEX] += 1
        return float(np.mean(losses[-per_epoch:]))


def reconstruction(stack: TiedStack, x: NDArray, depth: int) -> NDArray:
    """Images (n, pixels) through the first `depth` layers and back."""
    return stack.decode(stack.encode(x, depth)[-1], 0, depth)[-1]


def main() -> None:
    """Trains stage by stage, then the whole stack."""
    parser = options(__doc__, "stacked-autoencoder", "glyphs")
    parser.add_argument("--hidden", default="512,256,64", help="units of each layer's code")
    arguments = parser.parse_args()
    try:
        hidden = [int(part) for part in arguments.hidden.split(",")]
    except ValueError:
        raise InputError(f"--hidden {arguments.hidden!r}: expected numbers like 512,64") from None
    splits = load(arguments.data, seed=arguments.seed)
    images = splits.train.images.reshape(len(splits.train), -1)
    test = unit_pixels(splits.test.images.reshape(len(splits.test), -1))
    if min(hidden) < 1 or len(images) < BATCH or len(test) < SHOWN:
        raise InputError(
            f"expected widths of 1 or above, and at least {BATCH} training and {SHOWN} test images"
        )
    training = chosen(Training(epochs=5), arguments)
    steps = training.steps or training.epochs * (len(images) // BATCH)
    stack = TiedStack([images.shape[1], *hidden], arguments.seed)

    def report(stage: str, depth: int) -> None:
        error = np.mean(np.sum((reconstruction(stack, test, depth) - test) ** 2, axis=1))
        print(f"{stage:<28} test squared error per image {error:7.2f}", flush=True)

    for depth in range(1, len(hidden) + 1):
        stack.train(images, depth - 1, depth, steps, arguments.seed)
        report(f"layer {depth} ({hidden[depth - 1]} units) added", depth)
    greedy = reconstruction(stack, test[:SHOWN], len(hidden))
    stack.train(images, 0, len(hidden), steps, arguments.seed)
    report("the whole stack, fine-tuned", len(hidden))
    tuned = reconstruction(stack, test[:SHOWN], len(hidden))
    shape = (SHOWN // 2, 2, *splits.test.image_shape)
    path = arguments.out / "stacked_autoencoder.png"
    columns = {"original": test[:SHOWN], "layer by layer": greedy, "fine-tuned": tuned}
    grids = {name: rows.reshape(shape) for name, rows in columns.items()}
    plots.compare_grids(path, grids, title="A deep autoencoder with tied weights")
    print(path)


if __name__ == "__main__":
    run(main)
