"""The model that the choice of a native algorithm is made by, and the command that fits it."""

from __future__ import annotations

import json
import math
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


@on_machines
def test_every_part_that_is_timed_is_counted(machine: costs.Machine) -> None:
    times = costs.measured()[str(machine)]
    counted: dict[tuple[str, str], set[str]] = {}
    for case in CONV_CASES:
        for op in CONV_OPS:
            for algorithm in costs.ALGORITHMS:
                made = costs.parts(op, algorithm, case.dims._replace(channels_last=machine.channels_last), machine)
                if made is not None:
                    assert all(count >= 0 for count in made[1].values()), f"{case.name}: {made}"
                    counted.setdefault((op, made[0]), set()).update(made[1])
    for (op, name), parts in counted.items():
        if name in times[op]:
            assert set(times[op][name]) <= parts, f"{op} by {name}"
            assert all(0 < value < math.inf for value in times[op][name].values()), f"{op} by {name}"


@on_machines
@pytest.mark.parametrize("op", CONV_OPS)
def test_every_algorithm_has_times(machine: costs.Machine, op: str) -> None:
    names = {name.split()[0] for name in costs.measured()[str(machine)][op]}
    assert names == set(costs.ALGORITHMS)


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
