"""How good the choice of an algorithm is, and what it is made from: all native algorithms, timed on random layers.

    python -m fastconv.bench.choice measure times.jsonl     draw layers, time the algorithms, append a line for each
    python -m fastconv.bench.choice check times.jsonl       what is chosen against what was fastest
    python -m fastconv.bench.choice fit times.jsonl         make src/fastconv/costs.json from the times

``measure`` is for one instruction set (``FASTCONV_ISA``), precision and layout, and may be called again for the same
layers: the least time counts, which a busy machine needs. ``fit`` replaces the operations of the machines that the
times are of, and leaves the rest.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import fastconv as fc
from fastconv import costs, registry, runtime
from fastconv.dims import ConvDims, conv_dims
from fastconv.progress import progress_bar

from .cli import positive
from .engines import Problem, public_call
from .layers import CONV_OPS, ConvLayer
from .timing import take_turns

Array = np.ndarray[Any, np.dtype[Any]]

TURN = 0.001  #: seconds that an algorithm is timed for in a turn
FAR = 3  #: times as long as the fastest: what takes longer isn't timed again
LEAST, MOST = 2e5, 1.2e9  #: floating-point operations of a layer
USEFUL = 1.004  #: a part without which errors grow by less is left out
OPS = CONV_OPS


class Layer(NamedTuple):
    """A convolution of two dimensions."""

    batch: int
    channels: int
    height: int
    width: int
    filters: int
    kernel_height: int
    kernel_width: int
    stride: int
    pad_height: int
    pad_width: int
    dilation: int
    groups: int

    @property
    def input_size(self) -> tuple[int, ...]:
        return self.batch, self.channels, self.height, self.width

    @property
    def weight_size(self) -> tuple[int, ...]:
        return self.filters, self.channels // self.groups, self.kernel_height, self.kernel_width

    @property
    def padding(self) -> tuple[int, int]:
        return self.pad_height, self.pad_width

    @property
    def geometry(self) -> tuple[int, tuple[int, int], int, int]:
        """What follows input and weights in a call."""
        return self.stride, self.padding, self.dilation, self.groups

    @property
    def convolution(self) -> ConvLayer:
        """The same layer as the rest of ``bench`` has it."""
        return ConvLayer("", self.input_size, self.weight_size, *self.geometry)

    def dims(self, channels_last: bool) -> ConvDims:
        return conv_dims(self.input_size, self.weight_size, *self.geometry, channels_last=channels_last)


Key = tuple[str, str, Layer]  #: machine, operation, layer
Seconds = dict[str, float]  #: of each algorithm


# Layers ---------------------------------------------------------------------------------------------------------------


def draw(seed: int, count: int) -> list[Layer]:
    """Return layers of all kinds, small enough to be timed many times."""
    rng = np.random.default_rng(seed)
    layers: list[Layer] = []
    while len(layers) < count:
        layer = _draw(rng)
        least = min(
            size + 2 * pad - layer.dilation * (taps - 1)
            for size, pad, taps in zip(layer.input_size[2:], layer.padding, layer.weight_size[2:], strict=True)
        )
        if least > 0 and _suits(layer.dims(False)):
            layers.append(layer)
    return layers


def _suits(dims: ConvDims) -> bool:
    image, output = math.prod(dims.input_size), math.prod(dims.output_size)
    numbers = dims.batch * max(dims.in_channels * image, dims.out_channels * output)
    return LEAST < dims.flops < MOST and numbers <= 3e6 and dims.out_channels * dims.reduction <= 5e6


def _draw(rng: np.random.Generator) -> Layer:
    shares = {"square": 40, "1x1": 18, "depthwise": 10, "grouped": 8, "row": 8, "dilated": 6, "first": 6, "few": 4}
    kind = rng.choice(list(shares), p=[share / 100 for share in shares.values()])
    channels, filters, groups, dilation = _channels(rng, 1, 700), _channels(rng, 1, 700), 1, 1
    stride, batch = int(rng.choice([1, 1, 1, 1, 2, 2, 4])), int(rng.choice([1, 1, 1, 2, 4, 16]))
    height = round(2 ** rng.uniform(2, 7.8))
    if rng.random() < 0.6:
        height = int(rng.choice([4, 7, 8, 10, 13, 14, 16, 17, 20, 28, 32, 35, 40, 56, 64, 80, 112, 128, 224]))
    width = height if rng.random() < 0.75 else round(2 ** rng.uniform(2, 8))
    taps = int(rng.choice([2, 3, 3, 3, 3, 3, 3, 4, 5, 5, 7, 11]))
    kernel = (taps, taps)
    if kind == "1x1":
        kernel, stride = (1, 1), int(rng.choice([1, 1, 1, 2]))
    elif kind == "dilated":
        dilation, stride = 2, 1
    elif kind == "first":
        channels, filters, stride = (
            int(rng.choice([1, 3, 3, 4])),
            _channels(rng, 16, 100),
            int(rng.choice([1, 2, 2, 4])),
        )
        height = width = int(rng.choice([112, 160, 224, 256, 299]))
    elif kind == "depthwise":
        taps, stride = int(rng.choice([3, 3, 5, 7])), int(rng.choice([1, 1, 2]))
        groups = channels = _channels(rng, 8, 700)
        kernel, filters = (taps, taps), channels * (2 if rng.random() < 0.15 else 1)
    elif kind == "grouped":
        groups = int(rng.choice([2, 4, 8, 32]))
        channels, filters = _channels(rng, 1, 64) * groups, _channels(rng, 1, 64) * groups
    elif kind == "row":
        taps = int(rng.choice([3, 5, 7, 9]))
        kernel = (1, taps) if rng.random() < 0.6 else (taps, 1)
        if rng.random() < 0.4:
            height, width, kernel = 1, int(rng.choice([100, 200, 500, 1000, 2000])), (1, taps)
    elif kind == "few":
        channels, filters, stride = _channels(rng, 32, 2048), _channels(rng, 32, 2048), 1
        height, batch = int(rng.choice([1, 1, 1, 2, 2, 3, 4])), int(rng.choice([1, 1, 1, 2, 4, 16, 64]))
        width, kernel = height, (int(rng.choice([1, 1, 1, min(height, 3), height])),) * 2
    high, wide = (0 if rng.random() < 0.1 else dilation * (size - 1) // 2 for size in kernel)
    return Layer(batch, channels, height, width, filters, kernel[0], kernel[1], stride, high, wide, dilation, groups)


def _channels(rng: np.random.Generator, least: int, most: int) -> int:
    """Return a number of channels; there are as many between 8 and 16 as between 16 and 32."""
    count = 2 ** rng.uniform(math.log2(least), math.log2(most))
    return max(least, round(count / 8) * 8 if count > 24 else round(count / 2) * 2 if count > 10 else round(count))


# Times ----------------------------------------------------------------------------------------------------------------


def _calls(layer: Layer, precision: str, channels_last: bool) -> Iterator[tuple[str, dict[str, Callable[[], Array]]]]:
    """Yield each operation with a call of each algorithm that computes it."""
    problem, layout = Problem.random(layer.convolution), "NHWC" if channels_last else "NCHW"
    dims = layer.dims(channels_last)
    for op, kernel_op in OPS.items():
        rows = (row for row in registry.ROWS[kernel_op] if row.engine == "cython" and row.can(kernel_op, dims))
        how = {"engine": "cython", "precision": precision}
        yield op, {row.algorithm: public_call(problem, op, layout, algorithm=row.algorithm, **how) for row in rows}


def _fastest(calls: Mapping[str, Callable[[], Array]], repeat: int) -> Seconds:
    """Return the seconds of each one's fastest call."""
    timings = take_turns(list(calls.values()), repeat, TURN)
    return {name: timing.minimum for name, timing in zip(calls, timings, strict=True)}


def measure(layer: Layer, precision: str, channels_last: bool) -> Iterator[tuple[str, Seconds]]:
    """Yield each operation with the seconds of each algorithm, which take turns."""
    for op, calls in _calls(layer, precision, channels_last):
        for call in calls.values():
            call()
        seconds = _fastest(calls, 1)
        near = {name: call for name, call in calls.items() if seconds[name] <= FAR * min(seconds.values())}
        yield op, seconds | {name: min(value, seconds[name]) for name, value in _fastest(near, 2).items()}


def load(paths: Iterable[Path]) -> dict[Key, Seconds]:
    """Return the least time of each algorithm."""
    times: dict[Key, Seconds] = defaultdict(dict)
    for path in paths:
        for line in path.read_text().splitlines():
            machine, op, layer, seconds = json.loads(line)
            least = times[machine, op, Layer(*layer)]
            for name, value in seconds.items():
                least[name] = min(value, least.get(name, math.inf))
    return times


# Fit ------------------------------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """One algorithm on one layer."""

    counts: costs.Parts
    nanoseconds: float


Kind = tuple[str, str, str]  #: machine, the registry's operation, algorithm and how it multiplies


def _machine(name: str) -> costs.Machine:
    """Return the machine that a file calls so."""
    isa, *precision, layout = name.split()
    return costs.Machine(isa, precision[0] if precision else "highest", layout == "channels-last")


def samples(times: Mapping[Key, Seconds]) -> dict[Kind, list[Sample]]:
    """Return what is known of each kind."""
    found: dict[Kind, list[Sample]] = defaultdict(list)
    for (name, op, layer), seconds in times.items():
        machine = _machine(name)
        layer_dims = layer.dims(machine.channels_last)
        if layer_dims.channels_last != machine.channels_last:
            continue  # of a single channel and a single filter
        dims = registry.seen("cython", OPS[op], layer_dims)
        assert isinstance(dims, ConvDims)
        for algorithm, value in seconds.items():
            made = costs.parts(OPS[op], algorithm, dims, machine, layer.batch)
            if made is not None and made[1]:
                found[name, OPS[op], made[0]].append(Sample(made[1], 1e9 * value))
    return found


def fit(known: list[Sample]) -> dict[str, float]:
    """Return the nanoseconds of the parts, none negative, by relative errors; parts that change little are left out."""
    parts = list(known[0].counts)
    counts = np.array([[sample.counts[part] for part in parts] for sample in known], float)
    kept = np.flatnonzero(counts.any(axis=0))
    values, error = _solve(counts[:, kept], known)
    while True:
        kept, values = kept[values > 0], values[values > 0]
        tries = [(*_solve(counts[:, np.delete(kept, i)], known), i) for i in range(len(kept))] if len(kept) > 2 else []
        fewer, worse, least = min(tries, key=lambda each: each[1], default=(values, math.inf, 0))
        if worse > USEFUL * error:
            return {parts[i]: float(f"{value:.4g}") for i, value in zip(kept, values, strict=True)}
        kept, values = np.delete(kept, least), fewer


def _solve(counts: Array, known: list[Sample]) -> tuple[Array, float]:
    """Return the least-squares solution, large errors counting less than their squares, and its mean error."""
    from scipy.optimize import nnls

    time = np.array([sample.nanoseconds for sample in known])
    scale, weight = counts.max(axis=0), 1 / time
    for _ in range(10):
        values, _ = nnls(counts / scale * weight[:, None], time * weight)
        modelled = np.maximum(counts / scale @ values, time / 100)
        errors = np.abs(np.log(modelled / time))
        weight = 1 / np.sqrt(time * modelled * np.maximum(errors, 0.06))
    return values / scale, float(errors.mean())


def fit_all(times: Mapping[Key, Seconds], costs_file: Path) -> None:
    """Put the times of the parts into a file."""
    table: dict[str, dict[str, dict[str, dict[str, float]]]] = json.loads(costs_file.read_text() or "{}")
    known = samples(times)
    for machine, op in {kind[:2] for kind in known}:
        table.setdefault(machine, {})[op] = {}
    for (machine, op, name), each in sorted(known.items()):
        table[machine][op][name] = fit(each)
    costs_file.write_text(_text(table))


def _text(found: Mapping[str, Any]) -> str:
    """Return JSON with a line for each algorithm."""
    machines = []
    for machine, ops in sorted(found.items()):
        blocks = []
        for op, algorithms in ops.items():
            lines = ",\n".join(f"   {json.dumps(name)}: {json.dumps(parts)}" for name, parts in algorithms.items())
            blocks.append(f"  {json.dumps(op)}: {{\n{lines}\n  }}")
        machines.append(f" {json.dumps(machine)}: {{\n" + ",\n".join(blocks) + "\n }")
    return "{\n" + ",\n".join(machines) + "\n}\n"


# Check ----------------------------------------------------------------------------------------------------------------


class Miss(NamedTuple):
    """What was chosen for a layer."""

    ratio: float  #: of its time to that of the fastest
    layer: Layer
    chosen: str
    seconds: Seconds

    def __str__(self) -> str:
        times = ", ".join(f"{name} {1e6 * value:.0f}" for name, value in self.seconds.items())
        return f"  {self.ratio:.2f}  {','.join(map(str, self.layer))}: {self.chosen} (us: {times})"


def check(times: Mapping[Key, Seconds], worst: int) -> Iterator[str]:
    """Yield how much longer the choice takes than the fastest, for each machine and operation, and the worst layers."""
    misses: dict[tuple[str, str], list[Miss]] = defaultdict(list)
    for (name, op, layer), seconds in times.items():
        machine = _machine(name)
        if machine.isa == runtime.isa():
            dims = layer.dims(machine.channels_last)
            chosen = registry.select(OPS[op], dims, "cython", precision=machine.precision).algorithm
            ratio = seconds.get(chosen, math.inf) / min(seconds.values())
            misses[name, op].append(Miss(ratio, layer, chosen, seconds))
    for (name, op), found in misses.items():
        mean = math.exp(sum(math.log(miss.ratio) for miss in found) / len(found))
        over = ", ".join(f"{sum(miss.ratio > 1 + more for miss in found)} over {more:.0%}" for more in (0.1, 0.2, 0.5))
        yield f"{name} {op}: {mean:.3f} times the best of {len(found)} layers; {over}"
        yield from map(str, sorted(found, reverse=True)[:worst])


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="fastconv.bench.choice", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("measure", "check", "fit"):
        sub = commands.add_parser(command)
        sub.add_argument("files", type=Path, nargs=1 if command == "measure" else "+", help="of times, JSON lines")
        if command == "measure":
            add = sub.add_argument
            add("--layers", type=positive, default=1500, help="how many to draw (default: %(default)s)")
            add("--seed", type=int, default=1, help="that layers are drawn by (default: %(default)s)")
            add("--passes", type=positive, default=3, help="times through the layers (default: %(default)s)")
            add("--precision", choices=runtime.PRECISIONS, default="highest", help="of AMX (default: %(default)s)")
            add("--channels-last", action="store_true", help="arrays are NHWC, instead of NCHW")
        elif command == "check":
            sub.add_argument("--worst", type=int, default=0, help="layers to print of each kind")
        else:
            table = Path("src/fastconv/costs.json")
            sub.add_argument("--costs", type=Path, default=table, help="file to change (default: %(default)s)")
    options = parser.parse_args(argv)
    if options.command == "check":
        print(*check(load(options.files), options.worst), sep="\n")
    elif options.command == "fit":
        fit_all(load(options.files), options.costs)
    else:
        _measure(options)


def _measure(options: argparse.Namespace) -> None:
    """Time layers, on one thread, and append the times to a file."""
    machine = str(costs.Machine(runtime.isa(), options.precision, options.channels_last))
    layers = draw(options.seed, options.layers)
    bar = progress_bar(options.passes * len(layers), title=machine, unit="layer")
    with options.files[0].open("a") as file, fc.config_context(num_threads=1), bar:
        for layer in options.passes * layers:
            for op, seconds in measure(layer, options.precision, options.channels_last):
                file.write(json.dumps([machine, op, layer, seconds]) + "\n")
            bar.update()


if __name__ == "__main__":
    main()
