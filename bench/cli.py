"""The command ``fastconv bench``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from fastconv import registry, runtime
from fastconv.progress import progress_bar

from . import engines, peers, report, startup, tile, timing
from .layers import CONV_OPS, LAYERS, Layer, find_layers, split_words
from .report import Result
from .training import NETWORKS, Batch, Network, reference, steps

T = TypeVar("T")

NEEDED = ("threadpoolctl",)
OPS = tuple(CONV_OPS)
ALGORITHMS = tuple(dict.fromkeys(row.algorithm for rows in registry.ROWS.values() for row in rows))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastconv bench``."""
    add = parser.add_argument
    names = ", ".join(layer.name for layer in LAYERS)
    add("--layers", type=_told(find_layers), default=LAYERS, metavar="NAMES", help=f"names or globs, of {names}")
    for option, words, what in (
        ("--engine", runtime.ENGINES, "engines to measure; the rows of numpy are always there, as baselines"),
        ("--algorithm", ALGORITHMS, "algorithms to measure"),
        ("--ops", OPS, "operations: the forward one and the gradients of input and weight"),
    ):
        of = _told(partial(_some_of, words))
        add(option, type=of, default=words, metavar="NAMES", help=f"{what} (default: {','.join(words)})")
    of = _told(partial(_some_of, tuple(peers.PEERS)))
    add("--peers", type=of, default=(), metavar="NAMES", help=f"libraries to compare with, of {','.join(peers.PEERS)}")
    add("--train", action="store_true", help="whole training steps of two networks, instead of single operations")
    add("--layout", choices=("NCHW", "NHWC"), default="NCHW", help="of fastconv's arrays (default: %(default)s)")
    add("--threads", type=threads, default=1, metavar="N", help="threads for everyone (default: %(default)s)")
    add("--repeat", type=positive, default=5, metavar="N", help="turns for everyone (default: %(default)s)")
    add("--startup", action="store_true", help="measure only the first call of a process: milliseconds, cold and warm")
    add("--json", type=_told(_new_file), metavar="FILE", help="write the results to FILE, too")


def run(args: argparse.Namespace) -> int:
    """Measure what the arguments ask for, print each row when it is done, and return the exit status."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        return _fail(f"{' and '.join(missing)} not installed; python -m pip install 'fastconv[bench]'")
    jobs: list[tuple[Layer | Network, str]]
    if args.train:
        jobs = [(network, "train") for network in NETWORKS]
    else:
        jobs = [(layer, op) for layer in args.layers for op in args.ops if op in layer.ops]
    if not jobs:
        return _fail(f"no layer that was asked for has the operation(s) {', '.join(args.ops)}")
    try:
        for engine in args.engine if args.engine != runtime.ENGINES else ():
            runtime.check_engine(engine, "--engine")
        if args.startup:
            print("\n".join(startup.table(startup.measure(args.engine))))
            return 0
        others = peers.load_peers(args.peers, args.threads)
    except ImportError as error:
        return _fail(str(error))
    groups: list[list[Result]] = []
    with timing.pinned_threads(args.threads), progress_bar(len(jobs), unit="op") as bar:
        tiles = tile.measure()
        peak = tile.best(tiles) * args.threads
        machine = _machine(args, others) | {"tile": tile.describe(tiles)}
        bar.write("\n".join([*(f"{key:<16} {value}" for key, value in machine.items()), "", *report.header()]))
        for layer, op in jobs:
            bar.set_postfix_str(f"{layer.name} {op}")
            measured = _train(layer, args, others) if isinstance(layer, Network) else _measure(layer, op, args, others)
            groups.append([result._replace(peak=peak) for result in measured])
            bar.write("\n".join(report.lines(groups[-1])))
            bar.update()
    print("", *report.means(groups), "", *report.footnotes(groups), sep="\n")
    if args.json:
        report.write_json(args.json, machine, groups)
    return 0


def _measure(layer: Layer, op: str, args: argparse.Namespace, others: Sequence[peers.Peer]) -> list[Result]:
    """Return the results of all who can compute ``op`` of ``layer``; they take turns."""
    problem = engines.Problem.random(layer)
    found = engines.candidates(problem, op, args.layout, args.engine, args.algorithm)
    for peer in others:
        found += peer.candidates(problem, op)
    reference = engines.reference(problem, op)
    errors = []
    for candidate in found:  # also the first call, which may compile
        wanted = reference if candidate.problem is problem else engines.reference(candidate.problem, op)
        errors.append(report.relative_error(candidate.to_numpy(candidate.call()), wanted))
    timings = timing.take_turns([candidate.call for candidate in found], args.repeat)
    return [report.result(layer, op, *measured) for measured in zip(found, timings, errors, strict=True)]


def _train(network: Network, args: argparse.Namespace, others: Sequence[peers.Peer]) -> list[Result]:
    """Return the results of all who can train a network; they take turns."""
    batch = Batch.random(network)
    found = steps(batch, args.layout)
    for peer in others:
        found += peer.steps(batch)
    wanted = reference(batch)
    errors = [report.relative_error(step.to_numpy(step.call()), wanted) for step in found]
    timings = timing.take_turns([step.call for step in found], args.repeat)
    return [report.step_result(network, *measured) for measured in zip(found, timings, errors, strict=True)]


def positive(text: str) -> int:
    """Return the number that an option is, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def natural(text: str) -> int:
    """Return the number that an option is, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be an integer from 0, got {text!r}")
    return int(text)


def threads(text: str) -> int:
    """Return the number of threads that an option is."""
    number = positive(text)
    if number > runtime.MOST_THREADS:
        raise argparse.ArgumentTypeError(f"must be from 1 to {runtime.MOST_THREADS}, got {text}")
    return number


def _machine(args: argparse.Namespace, others: Sequence[peers.Peer]) -> dict[str, str]:
    """Return what the numbers were measured on, and how."""
    return runtime.config_report() | {
        "peers": "; ".join(peer.title for peer in others) or "none",
        "instruction caps": peers.caps() or "none",
        "pinned threads": timing.thread_report(),
        "measured": f"float32, {args.layout}, {args.repeat} turns of at least {timing.TURN * 1e3:.0f} ms each",
    }


def _fail(message: str) -> int:
    print(f"fastconv bench: error: {message}", file=sys.stderr)
    return 2


def _told(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Return ``parse`` with its ValueError in the form whose message argparse prints."""

    def parse_argument(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse_argument


def _some_of(words: tuple[str, ...], text: str) -> tuple[str, ...]:
    """Return the comma-separated words of ``text``, each of which is one of ``words``."""
    chosen = tuple(split_words(text))
    if unknown := [word for word in chosen if word not in words]:
        raise ValueError(f"expected some of {', '.join(words)}, got {', '.join(map(repr, unknown))}")
    return chosen


def _new_file(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {str(path.parent)!r}")
    if path.is_dir():
        raise ValueError(f"must be a file, got the folder {text!r}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{text!r} can't be written")
    return path
