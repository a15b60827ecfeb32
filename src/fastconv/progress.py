"""Progress bars: on standard error where tqdm is installed, else none. Nothing needs tqdm."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any


def progress_bar(steps: int, wanted: bool = True, *, title: str | None = None, unit: str = "step") -> Any:
    """Return a bar of tqdm, to be used in a ``with`` statement; without tqdm, or unless it is wanted, a ``NoBar``."""
    if not wanted or find_spec("tqdm") is None:
        return NoBar()
    from tqdm import tqdm

    return tqdm(total=steps, desc=title, unit=unit, file=sys.stderr)


def tell_if_missing(wanted: bool) -> None:
    """Say, once for a command whose bars are wanted, how to get them."""
    if wanted and find_spec("tqdm") is None:
        print('no progress bar: tqdm is not installed; pip install "fastconv[demo]"', file=sys.stderr)


class NoBar:
    """What of a bar of tqdm is used here, where none is shown."""

    def __enter__(self) -> NoBar:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self) -> None:
        """Count a step."""

    def set_postfix_str(self, text: str) -> None:
        """Show text behind the bar."""

    def write(self, text: str) -> None:
        """Print a line on standard output, where it does not disturb the bar."""
        print(text)
