"""How long each launch of a training step takes on a GPU, beside the whole step:

    python -m minivae.benchmarks.launch_times [--divisions] [--output FILE]

A launch is repeated in a graph of its own, so what it reads is in the L2 cache if it fits. With
`--divisions` matrix products are also timed in their other tiles and splits: what the constants of
`minivae/backends/tiling.py` are fitted to. `--device emulated` rehearses it.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from minivae import backends
from minivae.backends import tiling
from minivae.backends.kernel_arguments import kernels
from minivae.backends.tiling import Division, Product
from minivae.environment import environment
from minivae.errors import InputError
from minivae.kernels import TILES, Tile
from minivae.train import Trainer

from .cases import IMAGES, RANDOM, Case, step_cases
from .launches import Launch as Counted
from .launches import launch_of
from .measure import Candidate, Turns, write_result

REPEATS = 20
"""Of a launch in its graph."""

SECONDS, TURNS = 0.004, 3
SPLITS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 26, 32)
LARGE_BATCH = 4096
QUICK_BATCH, QUICK_IMAGES = 4, 16


Launch = tuple[str, Tile, tuple[int, int, int], list[Any]]
"""As `KernelBackend.run` takes it."""


class Step:
    """A training step on a device, whose launches can be told and timed."""

    def __init__(self, case: Case, device: str, precision: str, repeats: int) -> None:
        self.model = case.model.to(backends.get(device, precision))
        self.backend: Any = self.model.backend
        self.trainer = Trainer(self.model, case.splits, case.training)
        self.rows, self.repeats = case.training.batch_size, repeats
        self.trainer.step()
        arrays = [*self.model.parameters.flat.values(), self.trainer.state, self.trainer.totals]
        self._before = [(array, self.backend.to_numpy(array).copy()) for array in arrays]

    def launches(self) -> list[Launch]:
        """Those of a step, which are not run."""
        found: list[Launch] = []
        self.backend.run = lambda *launch: found.append(launch)
        try:
            self.trainer._step(self.rows)
        finally:
            del self.backend.run
        return found

    def row(self, launch: Launch) -> dict[str, Any]:
        """A launch, its tiles, splits and stages, and its time, for the result file."""
        kernel, tile, grid, _ = launch
        parts = [[*part] for part in self.counted(launch).parts]
        found = {"kernel": kernel, "tile": str(tile), "grid": [*grid], "parts": parts}
        return found | {"microseconds": self.microseconds(launch)}

    def counted(self, launch: Launch) -> Counted:
        """A launch with its sizes by name and its parts."""
        kernel, tile, grid, arguments = launch
        if "weight" in kernel:
            arguments = [self.backend.to_numpy(arguments[0]), *arguments[1:]]
        return launch_of(kernel, tile, grid, arguments)

    def does_the_same(self, launch: Launch, other: Launch) -> bool:
        """Whether two launches are of one kernel and of the same sizes."""
        one, two = ({**self.counted(each).sizes, "columns_of_tiles": 0} for each in (launch, other))
        return launch[0] == other[0] and one == two

    def microseconds(self, launch: Launch) -> float:
        """What a launch takes. Parameters and state are then what they were."""
        kernel, tile, grid, arguments = launch
        names = [name for name, *_ in kernels()[kernel].parameters]
        # An update goes on to no further step, for which there might be no schedule.
        arguments = [
            np.int32(0) if name == "batch_size" else argument
            for name, argument in zip(names, arguments, strict=True)
        ]

        def repeated() -> None:
            for _ in range(self.repeats):
                self.backend.run(kernel, tile, grid, arguments)

        found = self._time(self.backend.capture(repeated), self.repeats)
        for array, values in self._before:
            self.backend.assign(array, values)
        return found

    def whole_microseconds(self) -> float:
        """What a step takes in training."""
        return self._time(self.trainer.step)

    def _time(self, run: Callable[[], None], calls: int = 1) -> float:
        turns = Turns({"": Candidate(run, self.backend.synchronize, calls)}, SECONDS)
        return float(f"{1e3 * min(turns.take()[''] for _ in range(TURNS)):.4g}")


@contextmanager
def forced(tile: Tile, most: int) -> Iterator[None]:
    """Gives products this tile, where their source has it, and up to so many splits."""
    chosen = tiling.division

    def division(
        precision: str, stem: str, tiles: Sequence[Tile], products: Sequence[Product], taken: int
    ) -> Division:
        if tile not in tiles:
            return chosen(precision, stem, tiles, products, taken)
        *_, last = tiling.divisions((tile,), products, taken, most)
        return last

    tiling.division = division
    try:
        yield
    finally:
        tiling.division = chosen


def measure_case(
    case: Case, device: str, precision: str, *, divisions: bool, repeats: int = REPEATS
) -> dict[str, Any]:
    """The times of a step and of its launches, in microseconds."""
    step = Step(case, device, precision, repeats)
    found: dict[str, Any] = {
        "case": case.name,
        "precision": precision,
        "step": step.whole_microseconds(),
    }
    launches = step.launches()
    rows = [step.row(launch) for launch in launches]
    if divisions:
        seen = {(i, *launch[:3]) for i, launch in enumerate(launches)}
        for tile in TILES:
            for most in SPLITS:
                with forced(tile, most):
                    others = step.launches()
                if len(others) != len(launches):  # with this tile something is fused, or apart
                    continue
                for i, launch in enumerate(others):
                    key = i, *launch[:3]
                    if step.does_the_same(launch, launches[i]) and key not in seen:
                        seen.add(key)
                        rows[i].setdefault("others", []).append(step.row(launch))
    case.model.to("reference")
    return found | {"launches": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("launches.json"), metavar="FILE")
    parser.add_argument("--device", default="cuda", metavar="NAME")
    parser.add_argument("--divisions", action="store_true", help="time other tiles and splits too")
    arguments = parser.parse_args()
    quick = arguments.device != "cuda"
    repeats = 1 if quick else REPEATS
    sizes = ((QUICK_BATCH, QUICK_IMAGES),) if quick else ((None, IMAGES), (LARGE_BATCH, IMAGES))
    try:
        backends.get(arguments.device)
        result: dict[str, Any] = {"environment": environment(arguments.device), "steps": []}
    except InputError as error:
        raise SystemExit(str(error)) from None
    for precision in backends.PRECISIONS:
        for batch, images in sizes:
            for case in step_cases(batch, images=images):
                if RANDOM in case.name:
                    continue
                options: Any = {"divisions": arguments.divisions, "repeats": repeats}
                found = measure_case(case, arguments.device, precision, **options)
                result["steps"].append(found)
                write_result(arguments.output, result)
                print(f"{case.name}, {precision}: {found['step']:.1f} µs")
                for row in found["launches"]:
                    print("  {kernel:<34} {tile:<22} {microseconds:9.2f} µs".format(**row))


if __name__ == "__main__":
    main()
