"""The kernels as NVRTC compiles them, without a GPU: the registers and shared memory that each
takes, and what a stage of a matrix product costs in machine instructions:

    python -m minivae.benchmarks.machine_code [--output FILE]

A multiprocessor issues at most four instructions a cycle, whatever they do: next to bytes and
operations this is the third count that bounds a kernel.
"""

import argparse
import importlib.metadata
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from minivae.backends.kernel_arguments import kernels
from minivae.errors import InputError
from minivae.kernels import MEDIUM, OPTIONS, STEMS, WITH_TILES, Tile, source

from .measure import write_result

CUPY_FLAGS = (*OPTIONS, "-ftz=true", "--device-as-default-execution-space")
"""What CuPy gives to NVRTC. Without the last NVRTC before 13.2 refuses generic lambdas."""

ARCHITECTURES = ("75", "80", "86", "89", "90", "100")
"""Compute capabilities, "90" for 9.0, that the kernels are compiled for."""

COUNTED = "90"
"""That whose instructions are counted."""

INNER_TRIPS = 4
"""How often a loop within a stage is run, where there is one: DEPTH / RUN of kernels/tile.cuh."""


class Specialisation(NamedTuple):
    """One of the ways in which a source is compiled."""

    stem: str
    tensor_cores: bool
    tile: Tile

    def __str__(self) -> str:
        precision = "tf32" if self.tensor_cores else "fp32"
        return f"{self.stem}-{precision}-{self.tile}".replace(" x ", "x")

    @property
    def architectures(self) -> list[str]:
        """Those of ARCHITECTURES that it serves: before 8.0, no tensor core knew TF32."""
        return [t for t in ARCHITECTURES if int(t) >= 80 or not self.tensor_cores]


ALL = [
    Specialisation(stem, tensor_cores, tile)
    for stem in STEMS
    for tensor_cores in ((False, True) if stem in WITH_TILES else (False,))
    for tile in WITH_TILES.get(stem, (MEDIUM,))
]
"""Every specialisation that a backend asks for."""


class Compiled(NamedTuple):
    """PTX, machine code and the assembler's report."""

    ptx: str
    cubin: bytes
    log: str


@cache
def compiled(specialisation: Specialisation, target: str) -> Compiled:
    """The kernels of a specialisation for compute capability `target`, "90" for 9.0; RuntimeError
    with the compiler's log where it fails, InputError without NVRTC."""
    try:
        from cuda.bindings import nvrtc
    except ImportError:
        raise InputError("no NVRTC: expected the extra `cuda12` or `cuda13`") from None
    stem, tensor_cores, tile = specialisation
    text = source(stem, tensor_cores=tensor_cores, tile=tile)
    _, program = nvrtc.nvrtcCreateProgram(text.encode(), f"{stem}.cu".encode(), 0, [], [])
    flags = (f"--gpu-architecture=sm_{target}", *CUPY_FLAGS, "--ptxas-options=-v")
    encoded = [flag.encode() for flag in flags]
    (result,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)

    def content(kind: str) -> bytes:
        _, size = getattr(nvrtc, f"nvrtcGet{kind}Size")(program)
        buffer = b" " * size
        getattr(nvrtc, f"nvrtcGet{kind}")(program, buffer)
        return buffer

    log = content("ProgramLog").decode()
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(log)
    return Compiled(content("PTX").decode(), content("CUBIN"), log)


class Resources(NamedTuple):
    """What a kernel takes: registers of a thread, shared memory of a block, bytes spilled."""

    registers: int
    shared_bytes: int
    spilled_bytes: int


REPORT = re.compile(
    r"Compiling entry function '(\w+)'.*?\d+ bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?",
    re.DOTALL,
)


def reported(log: str) -> dict[str, Resources]:
    """What each kernel takes, by the assembler's report."""
    return {
        name: Resources(int(registers), int(shared or 0), int(stores) + int(loads))
        for name, stores, loads, registers, shared in REPORT.findall(log)
    }


def resources(specialisation: Specialisation) -> dict[str, dict[str, Resources]]:
    """What each kernel takes on each architecture."""
    targets = specialisation.architectures
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(partial(compiled, specialisation), targets))
    return {target: reported(code.log) for target, code in zip(targets, found, strict=True)}


def resource_table(specialisation: Specialisation) -> dict[str, dict[str, Any]]:
    """The same by kernel: threads of a block, its shared memory, the same on every architecture,
    and a thread's registers on each."""
    found = resources(specialisation)
    names = sorted({name for used in found.values() for name in used})
    return {
        name: {
            "threads": kernels()[name].threads,
            "shared_bytes": max(used[name].shared_bytes for used in found.values()),
            "registers": {target: used[name].registers for target, used in found.items()},
        }
        for name in names
    }


def disassembled(cubin: bytes) -> dict[str, list[str]]:
    """The instructions of each kernel and the labels between them; InputError without nvdisasm."""
    try:
        files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
    except importlib.metadata.PackageNotFoundError:
        raise InputError(
            "no disassembler: expected the package nvidia-cuda-nvdisasm (extra `machine-code`)"
        ) from None
    program = next(file.locate() for file in files if file.stem == "nvdisasm")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.cubin"
        path.write_bytes(cubin)
        text = subprocess.run(
            [str(program), "-c", str(path)], capture_output=True, text=True, check=True
        ).stdout
    sections = re.split(r"\.section\s+\.text\.(\w+)", text)[1:]
    line = re.compile(r"^(\.L_x_\d+):|^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", re.MULTILINE)
    return {
        name: [label or instruction for label, instruction in line.findall(body)]
        for name, body in zip(sections[::2], sections[1::2], strict=True)
    }


class Stage(NamedTuple):
    """Instructions of a warp for one stage: all, and those that multiply and add."""

    instructions: int
    products: int


def stage_of(code: list[str]) -> Stage | None:
    """What a stage takes in the kernel's main loop, on the way of aligned operands, whose vectors
    are copied by LDGSTS.128; None for a kernel that is no matrix product."""
    labels = {line: index for index, line in enumerate(code) if line.startswith(".L")}
    jumps = {
        index: labels[match[1]]
        for index, line in enumerate(code)
        if (match := re.search(r"\bBRA.*`\((\.L_x_\d+)\)", line)) and match[1] in labels
    }
    loops = [(target, index) for index, target in jumps.items() if target < index]

    def has(loop: tuple[int, int], *names: str) -> bool:
        return all(re.search(name, "\n".join(code[loop[0] : loop[1] + 1])) for name in names)

    product = r"\b(HMMA|FFMA)"
    main = [loop for loop in loops if has(loop, product, "LDGSTS", "LDGDEPBAR", "BAR.SYNC")]
    if not main:
        return None
    first, last = min(main, key=lambda loop: loop[1] - loop[0])
    inner = [loop for loop in loops if first < loop[0] and loop[1] < last and has(loop, product)]

    def times(index: int) -> int:
        return INNER_TRIPS if any(low <= index <= high for low, high in inner) else 1

    # Of all ways forward through the loop, those that copy most vectors; of these the shortest.
    best: dict[int, tuple[int, int, int]] = {first: (0, 0, 0)}
    for index in range(first, last + 1):
        if index not in best:
            continue
        line, (vectors, length, products) = code[index], best[index]
        vectors -= bool(re.search(r"LDGSTS\S*128", line))
        length += times(index) * (not line.startswith("."))
        products += times(index) * bool(re.search(product, line))
        always = re.match(r"(BRA|EXIT|BRX|RET)\b", line)
        following = {jumps.get(index, index)} | (set() if always else {index + 1})
        for other in following:
            if other > index:
                best[other] = min(best.get(other, (1, 0, 0)), (vectors, length, products))
    _, length, products = best[last + 1]
    return Stage(length, products)


@cache
def stages() -> dict[tuple[Specialisation, str], Stage]:
    """What a stage takes in every matrix product."""
    return {
        (specialisation, name): found
        for specialisation in ALL
        if specialisation.stem in WITH_TILES
        for name, code in disassembled(compiled(specialisation, COUNTED).cubin).items()
        if (found := stage_of(code))
    }


def stage_rows() -> list[dict[str, Any]]:
    """`stages` as rows, in order."""
    found = stages()
    return [
        {
            "kernel": name,
            "tile": str(specialisation.tile),
            "precision": "tf32" if specialisation.tensor_cores else "fp32",
            **found[specialisation, name]._asdict(),
        }
        for specialisation, name in sorted(found, key=lambda key: (key[1], key[0]))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Count what the kernels take, in minutes.")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write the counts")
    arguments = parser.parse_args()
    try:
        rows = stage_rows()
    except InputError as error:
        sys.exit(str(error))
    for row in rows:
        print("{kernel:34} {tile:>8} {precision} {instructions:5} {products:4}".format(**row))
    if arguments.output:
        from cuda.bindings import nvrtc

        _, major, minor = nvrtc.nvrtcVersion()
        result = {
            "compiler": f"NVRTC {major}.{minor}",
            "target": f"sm_{COUNTED}",
            "stages": rows,
            "resources": {str(each): resource_table(each) for each in ALL},
        }
        write_result(arguments.output, result)


if __name__ == "__main__":
    main()
