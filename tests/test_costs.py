"""The model that the choice of a native algorithm is made by, and the command that fits it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import CONV_CASES, CONV_OPS

from fastconv import costs, registry, runtime
from fastconv.bench import choice
from fastconv.dims import conv_dims

MACHINES = [
    costs.Machine(isa, precision, last)
    for isa in costs.LANES
    for precision in (("highest", "high", "medium") if isa == "amx" else ("highest",))
    for last in (False, True)
]
on_machines = pytest.mark.parametrize("machine", MACHINES, ids=str)


NATIVE = Path(__file__).parent.parent / "kernels" / "native"
CONVOLUTIONS = [  # of all ways that there are to multiply
    *(case.dims for case in CONV_CASES),
    conv_dims((1, 16, 2, 2), (32, 1, 3, 3), 1, 1, 1, 16),
    conv_dims((1, 16, 4, 4), (16, 1, 3, 3), 1, 1, 1, 16),
    conv_dims((1, 1, 24, 24), (8, 1, 3, 3), 2, 1, 1, 1),
    *(conv_dims((1, c, 40, 40), (k, c, 1, 1), 2, 0, 1, 1) for c, k in ((8, 8), (256, 32), (256, 256))),
    *(conv_dims((1, c, 16, 16), (k, c, 1, 1), 1, 0, 1, 1) for c, k in ((32, 256), (256, 32), (256, 256))),
]


@on_machines
def test_what_is_timed_is_what_is_counted(machine: costs.Machine) -> None:
    """Each algorithm, in each way of it to multiply, has times, and each part that has a time is counted."""
    counted: dict[tuple[str, str], set[str]] = {}
    for dims in CONVOLUTIONS:
        for op in CONV_OPS:
            for algorithm in costs.ALGORITHMS:
                made = costs.parts(op, algorithm, dims._replace(channels_last=machine.channels_last), machine)
                if made is not None and made[1]:  # else it can't, or leaves the problem to another
                    assert all(count >= 0 for count in made[1].values()), f"{dims}: {made}"
                    counted.setdefault((op, made[0]), set()).update(made[1])
    times = {(op, name): parts for op, kinds in costs.measured()[str(machine)].items() for name, parts in kinds.items()}
    assert set(times) == set(counted)
    for kind, parts in times.items():
        assert set(parts) <= counted[kind], kind
        assert all(0 < value < math.inf for value in parts.values()), kind


@on_machines
@pytest.mark.parametrize("op", CONV_OPS)
def test_every_algorithm_has_times(machine: costs.Machine, op: str) -> None:
    names = {name.split()[0] for name in costs.measured()[str(machine)][op]}
    leaves = {"planar"} if machine.channels_last and op == "conv_weight_grad" else set()  # all of them to others
    assert names == set(costs.ALGORITHMS) - leaves


@on_machines
@pytest.mark.parametrize("op", CONV_OPS)
def test_some_algorithm_is_timed_for_every_problem(machine: costs.Machine, op: str) -> None:
    for case in CONV_CASES:
        dims = case.dims._replace(batch=max(1, case.dims.batch), channels_last=machine.channels_last)
        found = costs.estimate(op, dims, machine)
        assert 0 < min(found.values()) < math.inf, case.name


@pytest.mark.parametrize("op", ["conv_forward", "conv_input_grad"])
def test_the_batch_is_not_what_an_image_is_computed_by(op: str) -> None:
    for case in CONV_CASES:
        few, many = case.dims._replace(batch=1), case.dims._replace(batch=64)
        for machine in MACHINES:
            assert costs.estimate(op, few, machine) == costs.estimate(op, many, machine)


def test_what_a_driver_counts() -> None:
    """20 filters of 3x3 on 8 channels of 10x12: two vectors of filters, and 12 columns fill one."""
    dims, machine = conv_dims((1, 8, 10, 12), (20, 8, 3, 3), 1, 1, 1, 1), costs.Machine("avx512")
    how, counts = made("conv_forward", "direct", dims, machine)
    assert how == "direct"
    assert counts["product"] == 120 * 32 * 72
    assert (counts["cell"], counts["line"], counts["number"]) == (8 * 12 * 14, 72 * 2, 120 * 20)
    how, counts = made("conv_forward", "planar", dims, machine)
    assert counts["product"] == 10 * 16 * 20 * 72
    how, counts = made("conv_forward", "im2col", dims, machine)
    assert (counts["product"], counts["patch"]) == (128 * 20 * 72, 72 * 128)
    how, counts = made("conv_weight_grad", "direct", dims, machine)
    assert (counts["product"], counts["sum"]) == (120 * 32 * 72, 32 * 72)
    how, counts = made("conv_input_grad", "direct", dims, machine)
    assert (counts["product"], counts["narrow"]) == (0, 120 * 16 * 20 * 9)


def test_the_tile_of_an_instruction_set_counts() -> None:
    dims = conv_dims((1, 64, 14, 14), (64, 64, 3, 3), 1, 1, 1, 1)
    assert made("conv_forward", "direct", dims, costs.Machine("amx"))[0] == "direct digits"
    assert made("conv_forward", "direct", dims, costs.Machine("amx", "high"))[0] == "direct pieces"
    assert made("conv_forward", "direct", dims, costs.Machine("avx512"))[0] == "direct"


def made(op: str, algorithm: str, dims: Any, machine: costs.Machine) -> tuple[str, costs.Parts]:
    found = costs.parts(op, algorithm, dims, machine, 1)
    assert found is not None
    return found


def native(file: str, name: str) -> int:
    """A constant of the drivers, where their sources are."""
    if not (NATIVE / file).exists():
        pytest.skip("the sources of the drivers are not here")
    found = re.search(rf"^    {name} = (\d[\d_]*)(?: << (\d+))?\s*(?:#|$)", (NATIVE / file).read_text(), re.MULTILINE)
    assert found is not None, f"{file} has no {name}"
    return int(found[1]) << int(found[2] or 0)


@pytest.mark.parametrize(
    ("limit", "file", "name"),
    [
        (costs.SUMMED, "conv_planar.pyx", "TERMS"),
        (4 * costs.PLANES, "conv_planar.pyx", "NEAR_BYTES"),
        (costs.TOGETHER, "few_pixels.pyx", "ROWS"),
        (costs.TURN, "weight_im2col.pyx", "TURN"),
        (costs.VECTOR, "blocking.pxd", "CHANNELS"),
        (costs.VECTOR, "blocking.pyx", "SPLIT_CHANNELS"),
    ],
    ids=lambda value: str(value),
)
def test_limits_are_those_of_the_drivers(limit: int, file: str, name: str) -> None:
    assert limit == native(file, name)


def test_digits_are_counted_where_the_drivers_use_them() -> None:
    channels, terms = native("digits.pyx", "FEW_CHANNELS"), native("digits.pyx", "SUMMED")

    def kind(channels: int, taps: int) -> str:
        dims = conv_dims((1, channels, 20, 20), (64, channels, 1, taps), 1, 0, 1, 1)
        return made("conv_forward", "direct", dims, costs.Machine("amx"))[0]

    assert [kind(count, 9) for count in (channels, channels - 1)] == ["direct digits", "direct pieces"]
    assert [kind(count, 2) for count in (terms // 2, terms // 2 - 1)] == ["direct digits", "direct pieces"]


@pytest.mark.parametrize(("stride", "name"), [(1, "FEW_PIXELS"), (2, "COLUMN_PIXELS")])
def test_columns_are_counted_where_the_driver_makes_them(stride: int, name: str) -> None:
    most = native("conv_im2col.pyx", name)
    for pixels, columns in ((most, True), (most + 1, False)):
        dims = conv_dims((1, 40, 1, stride * pixels), (40, 40, 1, 1), stride, 0, 1, 1)
        kind, _ = made("conv_input_grad", "im2col", dims, costs.Machine("avx2"))
        assert kind.startswith("im2col columns") == columns


def test_larger_images_take_longer() -> None:
    for machine in MACHINES:
        for op in CONV_OPS:
            small, large = (conv_dims((1, 24, n, n), (40, 24, 3, 3), 1, 1, 1, 1) for n in (28, 112))
            less, more = (
                costs.estimate(op, dims._replace(channels_last=machine.channels_last), machine)
                for dims in (small, large)
            )
            assert min(less.values()) < min(more.values())


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def test_drawn_layers_are_the_same_for_a_seed() -> None:
    layers = choice.draw(3, 40)
    assert layers == choice.draw(3, 40) != choice.draw(4, 40)
    assert {layer.stride for layer in layers} >= {1, 2}
    assert any(layer.groups > 1 for layer in layers)


def test_a_fit_finds_the_times_that_samples_are_made_of() -> None:
    rng = np.random.default_rng(0)
    true = {"product": 0.02, "cell": 0.5, "call": 3000.0}
    known = []
    for _ in range(60):
        counts = {part: float(rng.integers(1, 10**6)) for part in ("product", "cell", "row")} | {"call": 1.0}
        known.append(choice.Sample(counts, sum(counts[part] * time for part, time in true.items())))
    found = choice.fit(known)
    assert found == pytest.approx(true, rel=1e-3)


@pytest.mark.skipif(bool(runtime.why_missing("cython")), reason="times the native engine")
def test_layers_are_measured_checked_and_fitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times, table = tmp_path / "times.jsonl", tmp_path / "costs.json"
    layers = [choice.Layer(1, 4, 6, 6, 8, 3, 3, 1, 1, 1, 1, 1), choice.Layer(2, 8, 5, 5, 8, 1, 1, 1, 0, 0, 1, 8)]
    monkeypatch.setattr(choice, "draw", lambda seed, count: layers)
    for layout in ([], ["--channels-last"]):
        choice.main(["measure", str(times), "--passes", "1", *layout])
    lines = [json.loads(line) for line in times.read_text().splitlines()]
    assert [line[1] for line in lines] == 4 * ["forward", "input", "weight"]
    choice.main(["check", str(times), "--worst", "1"])
    report = capsys.readouterr().out
    assert f"{runtime.isa()} channels-last weight: " in report
    assert "1,4,6,6,8,3,3,1,1,1,1,1: " in report or "2,8,5,5,8,1,1,1,0,0,1,8: " in report
    here = f"{runtime.isa()} channels-first"
    table.write_text(json.dumps({"elsewhere": {}, here: {"conv_forward": {"a former name": {"call": 1.0}}}}))
    choice.main(["fit", str(times), "--costs", str(table)])
    fitted = json.loads(table.read_text())
    assert set(fitted) == {"elsewhere", f"{runtime.isa()} channels-first", f"{runtime.isa()} channels-last"}
    names = {name.split()[0] for name in fitted[here]["conv_forward"]}
    assert {"direct", "im2col"} <= names <= set(costs.ALGORITHMS)


@pytest.mark.skipif(bool(runtime.why_missing("cython")), reason="asks the native engine")
def test_a_native_row_is_chosen_by_the_model() -> None:
    for case in CONV_CASES:
        for op in CONV_OPS:
            dims = registry.seen("cython", op, case.dims)
            found = costs.estimate(op, dims, costs.Machine(runtime.isa()))  # type: ignore[arg-type]
            assert registry.select(op, case.dims, "cython").algorithm == min(found, key=lambda name: found[name])
