"""The command ``fastconv demo | bench | warmup | info``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from . import __version__
from .arrays import DTYPES
from .runtime import ENGINES, check_isa, config_context, get_config, show_config


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments; those of the process if None.

    Examples
    --------
    >>> from fastconv.cli import main
    >>> main(["info"])  # doctest: +ELLIPSIS
    fastconv ...
    0
    """
    parser = _parser()
    args = parser.parse_args(argv)
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        get_config()  # a mistake in an environment variable is one line here, and not a traceback
        check_isa()
    except (ImportError, ValueError) as error:
        parser.error(str(error))
    try:
        return run(args)
    except ImportError as error:  # an extra or an engine that is not installed
        print(f"fastconv {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    from .bench import cli as bench

    parser = argparse.ArgumentParser("fastconv", description="Convolution and pooling for NumPy arrays on a CPU.")
    parser.add_argument("--version", action="version", version=f"fastconv {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="{demo,bench,warmup,info}", required=True)

    demo = commands.add_parser("demo", allow_abbrev=False, help="train a network on digits and time its layers")
    add = demo.add_argument
    add("--epochs", type=bench.positive, default=15, help="times through the digits (default: %(default)s)")
    add("--engine", choices=ENGINES, help="engine to train on (default: the fastest there is)")
    add("--threads", type=bench.threads, help="largest number of threads (default: what the machine has)")
    add("--seed", type=bench.natural, default=0, help="of weights and order of the digits (default: %(default)s)")
    add("--no-progress", dest="progress", action="store_false", help="show no progress bars")
    demo.set_defaults(run=_demo)

    measure = commands.add_parser("bench", allow_abbrev=False, help="measure the named layers on every engine")
    bench.add_arguments(measure)
    measure.set_defaults(run=bench.run)

    warmup = commands.add_parser("warmup", allow_abbrev=False, help="compile the Numba engine's kernels ahead of time")
    warmup.add_argument("--dtype", choices=list(map(str, DTYPES)), help="only the kernels for this type (default: all)")
    warmup.add_argument("--no-progress", dest="progress", action="store_false", help="show no progress bar")
    warmup.set_defaults(run=_warmup)

    info = commands.add_parser("info", allow_abbrev=False, help="show versions, engines, CPU and threads")
    info.set_defaults(run=_info)
    return parser


def _demo(args: argparse.Namespace) -> int:
    from .demo import run

    with config_context(engine=args.engine, num_threads=args.threads):
        run(epochs=args.epochs, seed=args.seed, progress=args.progress)
    return 0


def _warmup(args: argparse.Namespace) -> int:
    from .warmup import run

    run([dtype for dtype in DTYPES if args.dtype in (None, dtype)], args.progress)
    return 0


def _info(args: argparse.Namespace) -> int:
    show_config()
    return 0
