"""``fastconv demo``: a convolutional network learns real handwritten digits, and each of its layers is timed.

The network is the typical one of section 9.3 of the lecture notes; the digits are the 1797 of 8x8 pixels that
scikit-learn bundles (E. Alpaydin, C. Kaynak, UCI Machine Learning Repository, 1998). Nothing is downloaded.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from .functional import Array
from .layers import Conv2d, Flatten, Layer, Linear, MaxPool2d, ReLU, Sequential, Softmax
from .losses import cross_entropy
from .optim import Adam
from .progress import progress_bar, tell_if_missing
from .runtime import ENGINES, get_config, get_num_threads, why_missing
from .training import accuracy, fit, predict

HELD_OUT = 360  #: digits for the test: a fifth of them
BATCH = 32
NAIVE_SLICE = 4  #: how many digits of a batch the textbook loops get
NAIVE = "naive NumPy"
INSTALL = 'pip install "fastconv[demo]"'


def run(epochs: int, seed: int, progress: bool) -> float:
    """Train, test and time; print the report and return the test accuracy."""
    digits = _load_digits()
    tell_if_missing(progress)
    model = build(seed)
    engine = get_config().engine or next(name for name in ENGINES if not why_missing(name))
    print(f"{len(digits.x)} handwritten digits of 8x8 pixels to learn from, {len(digits.test_x)} held out")
    print(f"engine {engine}, {get_num_threads()} thread(s)\n")
    model.summary(digits.x.shape)
    train(model, digits, epochs, seed, progress)
    print(f"\n{_example(model, digits)}\n")
    times = measure(model, digits.x[:BATCH], progress)
    score = accuracy(model, digits.test_x, digits.test_y)
    print(f"test accuracy: {score:.4f}")
    print(table(model, times))
    return score


class Digits(NamedTuple):
    """Images (N, 1, 8, 8) from 0 to 1, and which digit each is."""

    x: Array
    y: Array
    test_x: Array
    test_y: Array


def _load_digits() -> Digits:
    """Return scikit-learn's digits, always split in the same way."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(f"the digits come with scikit-learn, which is not installed; {INSTALL}") from error
    pixels, classes = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(pixels))
    x = (pixels[order] / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    y = classes[order]
    return Digits(x[HELD_OUT:], y[HELD_OUT:], x[:HELD_OUT], y[:HELD_OUT])


def build(seed: int) -> Sequential:
    """Return the untrained network: images (N, 1, 8, 8) to logits (N, 10)."""
    rng = np.random.default_rng(seed)
    return Sequential(
        Conv2d(1, 32, 3, padding=1, rng=rng),
        ReLU(),
        MaxPool2d(2),
        Conv2d(32, 64, 3, padding=1, rng=rng),
        ReLU(),
        MaxPool2d(2),
        Flatten(),
        Linear(64 * 2 * 2, 10, rng=rng),
    )


def train(model: Sequential, digits: Digits, epochs: int, seed: int, progress: bool) -> None:
    """Train with Adam, the last quarter of the epochs in steps of a tenth."""
    rng = np.random.default_rng(seed)
    optimizer = Adam(model, lr=5e-3)
    for count in (epochs - epochs // 4, epochs // 4):
        fit(
            model, digits.x, digits.y, loss=cross_entropy, optimizer=optimizer, epochs=count, batch_size=BATCH,
            validation=(digits.test_x, digits.test_y), rng=rng, progress=progress and count > 0,
        )  # fmt: skip
        optimizer.lr /= 10


def _example(model: Sequential, digits: Digits) -> str:
    """Return a drawing of a held-out digit beside what the network makes of it."""
    image = digits.test_x[:1]
    probabilities = predict(Sequential(*model, Softmax()), image)[0]
    best = probabilities.argsort()[::-1][:3]
    notes = ["a held-out digit; the network says"] + [f"  {digit}: {probabilities[digit]:6.1%}" for digit in best]
    drawing = ["".join(" .:-=+*#%@"[int(pixel * 9)] * 2 for pixel in row) for row in image[0, 0]]
    notes += [""] * (len(drawing) - len(notes))
    return "\n".join(f"  {row}   {note}".rstrip() for row, note in zip(drawing, notes, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Each layer's time
# ---------------------------------------------------------------------------------------------------------------------

Times = dict[str, list[tuple[float, float]]]  #: milliseconds (forward, backward) of each layer, by engine


def measure(model: Sequential, x: Array, progress: bool) -> Times:
    """Return how long each layer takes for a batch, with every engine and with the textbook loops."""
    engines = {name: {"engine": name} for name in reversed(ENGINES) if not why_missing(name)}
    jobs = {NAIVE: {"engine": "numpy", "algorithm": "naive"}, **engines}
    times: Times = {}
    model.train()
    try:
        with progress_bar(len(jobs), progress, title="timing the layers", unit="engine") as bar:
            for name, options in jobs.items():
                times[name] = _layer_times(model, x, options, naive=name == NAIVE)
                bar.update()
        return times
    finally:
        for layer in model:
            layer.options = {}


def _layer_times(model: Sequential, x: Array, options: dict[str, Any], naive: bool) -> list[tuple[float, float]]:
    """Return milliseconds (forward, backward) of each layer; those that are plain NumPy anyway get the whole batch."""
    times = []
    for layer in model:
        layer.options = options
        count = NAIVE_SLICE if naive and _has_kernels(layer) else len(x)
        part, repeat = x[:count], 1 if count < len(x) else 20
        grad = np.ones_like(layer(part))
        scale = 1e3 * len(x) / count
        forward = scale * _seconds(partial(layer, part), repeat)
        backward = scale * _seconds(partial(layer.backward, grad), repeat)
        times.append((forward, backward))
        layer.options = {}
        x = layer(x)
    return times


def _seconds(call: Callable[[], Any], repeat: int) -> float:
    """Return the shortest of several times, so that a first one that compiles does not count."""
    return min(timeit.repeat(call, number=1, repeat=repeat))


def _has_kernels(layer: Layer) -> bool:
    """Whether an engine computes this layer; the others are plain NumPy."""
    return isinstance(layer, (Conv2d, MaxPool2d))


def table(model: Sequential, times: Times) -> str:
    """Return the table of each layer's times, with the ratio to the textbook loops."""
    engines = [name for name in times if name != NAIVE]
    lines = [
        f"milliseconds for a batch of {BATCH} digits, and how many times faster than {NAIVE} "
        f"(timed on {NAIVE_SLICE} of the {BATCH}, scaled up)",
        f"{'layer':<28}{'':<10}{NAIVE:>12}" + "".join(f"{name:>18}" for name in engines),
    ]
    for position, layer in enumerate(model):
        for way, direction in enumerate(("forward", "backward")):
            label = f"{position} {layer!r}" if way == 0 else ""
            row = {name: layers[position][way] for name, layers in times.items()}
            lines.append(_row(label, direction, row, engines if _has_kernels(layer) else []))
    totals = {name: sum(map(sum, layers)) for name, layers in times.items()}
    lines.append(_row("all layers", "both", totals, engines))
    return "\n".join(lines)


def _row(label: str, direction: str, row: dict[str, float], engines: list[str]) -> str:
    """Return one line of the table; without engines the row is plain NumPy on every engine."""
    cells = [f"{row[name]:>10.3f} {_ratio(row[NAIVE] / row[name]):>7}" for name in engines]
    plain = "" if engines else "    plain NumPy on every engine"
    return f"{label:<28}{direction:<10}{row[NAIVE]:>12.3f}{''.join(cells)}{plain}"


def _ratio(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.1f}x"
