"""The ceiling: what the native engine's register tile of float32 does, bare, and multiply-adds alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from fastconv import runtime

from .timing import take_turns

#: Into how many pieces a number must be split at least, if it is split.
PIECES = {"highest": 3, "high": 2, "medium": 1}
#: Turns of each loop. Many: on a shared machine the tile may be a quarter slower for a while.
TURNS = 40
#: So many calls and rounds take some 200 microseconds.
CALLS, ROUNDS = 200, 100_000


class Tile(NamedTuple):
    """Operations per second, of one thread."""

    pieces: int  #: that numbers are split into; 0: they are not; 6 to 8: products of digits
    speed: float  #: of the tile, on operands that stay in the first-level cache
    ceiling: float  #: of multiply-adds alone

    def __str__(self) -> str:
        kind = f"{self.pieces} of digits " if self.pieces > 3 else f"split in {self.pieces} " if self.pieces else ""
        return f"{kind}{self.speed / 1e9:.0f} GFLOP/s of {self.ceiling / 1e9:.0f}"


def measure() -> list[Tile]:
    """Return what each tile of the instruction set in use does; none without the native engine."""
    native = runtime.native_module()
    if native is None:
        return []
    pieces = native.tiles()
    loops = [partial(native.run_tile, p, CALLS) for p in pieces] + [
        partial(native.run_ceiling, p, ROUNDS) for p in pieces
    ]
    speeds = _speeds(loops)
    return [Tile(*each) for each in zip(pieces, speeds, speeds[len(pieces) :], strict=False)]


def _speeds(loops: Sequence[Callable[[], int]]) -> list[float]:
    """Return the operations per second of loops that return how many they made."""
    made = [loop() for loop in loops]
    return [n / timing.minimum for n, timing in zip(made, take_turns(loops, TURNS), strict=True)]


def best(tiles: Sequence[Tile]) -> float:
    """Return the speed of the fastest tile that the precision in force allows, 0 if there is none."""
    least = PIECES[runtime.get_config().precision]
    allowed = [tile for tile in tiles if tile.pieces == 0 or least <= tile.pieces <= (8 if least == 3 else 3)]
    return max((tile.speed for tile in allowed), default=0.0)


def describe(tiles: Sequence[Tile]) -> str:
    """Return one line for the header of a table."""
    if not tiles:
        return "none: no native engine"
    return f"{runtime.isa()} {', '.join(map(str, tiles))} (ceiling of multiply-adds alone), one thread"
