"""The benchmark: its layers, its slices, its arithmetic, its command."""

from __future__ import annotations

import argparse
import json
import math
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastconv import registry, runtime
from fastconv.bench import cli, digits_error, engines, peers, report, tile, timing, training, winograd_error
from fastconv.bench.layers import LAYERS, ConvLayer, Layer, PoolLayer, find_layers, slice_layer
from fastconv.kernels import winograd

pytest.importorskip("threadpoolctl")

TINY = ConvLayer("tiny", (2, 3, 6, 7), (4, 3, 3, 3), stride=2, padding=1)
TINY_POOL = PoolLayer("tiny_pool", (2, 3, 8, 8), kernel=2, stride=2)
TINY_NETWORK = training.Network("tiny_net", (5, 2, 8, 8), (3, 4, 0, 5, 0))


@pytest.fixture(autouse=True)
def _short_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the bare tile only once: nobody reads the speed here, and where AMX is modelled it would take minutes."""
    for name in ("TURNS", "CALLS", "ROUNDS"):
        monkeypatch.setattr(tile, name, 1)


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args(words)


def ids(layer: Layer) -> str:
    return layer.name


# Layers


def test_layers_have_their_own_names() -> None:
    assert len({layer.name for layer in LAYERS}) == len(LAYERS)


@pytest.mark.parametrize(
    ("name", "output", "gflop"),
    [
        ("vgg1_1", (1, 64, 224, 224), 0.173),
        ("resnet_conv1", (1, 64, 112, 112), 0.236),
        ("resnet3_s2", (1, 128, 28, 28), 0.231),
        ("mobilenet_dw14", (1, 512, 14, 14), 0.0018),
        ("lenet2", (32, 16, 10, 10), 0.0154),
        ("audio_m5", (4, 128, 3981), 0.326),
        ("volume_unet", (1, 32, 32, 32, 32), 1.81),
    ],
)
def test_sizes_and_flops_of_layers(name: str, output: tuple[int, ...], gflop: float) -> None:
    (layer,) = find_layers(name)
    assert layer.output_size == output
    assert layer.flops / 1e9 == pytest.approx(gflop, rel=0.05)


def test_layers_are_found_by_glob_in_their_own_order() -> None:
    assert [layer.name for layer in find_layers("lenet?, vgg5*")] == ["vgg5_1", "lenet1", "lenet2"]


def test_an_unknown_layer_is_told_with_the_closest_and_all_names() -> None:
    with pytest.raises(
        ValueError, match=r"no layer is called 'vgg3'; did you mean 'vgg3_2'\? There are vgg1_1, vgg1_2, "
    ):
        find_layers("vgg1_1,vgg3")


# Slices


@pytest.mark.parametrize("layer", LAYERS, ids=ids)
@pytest.mark.parametrize("outputs", [1, 1000, 8192])
def test_a_slice_is_small_and_keeps_rows_and_reduction(layer: Layer, outputs: int) -> None:
    piece = slice_layer(layer, outputs)
    row = piece.output_size[-1]
    assert row == layer.output_size[-1]
    assert math.prod(piece.output_size) <= max(outputs, row * layer.channel_step)
    assert piece.kernel_size == layer.kernel_size
    assert piece.flops * math.prod(layer.output_size) == layer.flops * math.prod(piece.output_size)


def test_a_small_layer_is_its_own_slice() -> None:
    assert slice_layer(TINY, 1000) == TINY


def test_a_slice_is_a_part_of_the_layer() -> None:
    layer = ConvLayer("strided", (3, 4, 20, 9), (6, 4, 3, 2), stride=2, padding=1, dilation=2)
    piece = slice_layer(layer, 3 * 5)
    assert piece == layer._replace(input_size=(1, 4, 9, 9), weight_size=(1, 4, 3, 2), padding=(0, 1))
    whole, part = (engines.Problem.random(each) for each in (layer, piece))
    # Rows 1, 2 and 3 of the output see rows 1 to 9 of the input: 2 * 1 - 1 to 2 * 3 - 1 + 2 * 2.
    part = part._replace(input=whole.input[:1, :, 1:10], weight=whole.weight[:1])
    expected = engines.reference(whole, "forward")[:1, :1, 1:4]
    np.testing.assert_allclose(engines.reference(part, "forward"), expected, rtol=1e-12)


def test_a_slice_of_groups_is_made_of_whole_groups() -> None:
    layer = ConvLayer("grouped", (1, 8, 5, 5), (12, 2, 3, 3), padding=1, groups=4)
    expected = layer._replace(input_size=(1, 4, 5, 5), weight_size=(6, 2, 3, 3), padding=(1, 1), groups=2)
    assert slice_layer(layer, 150) == expected


# Candidates


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("layer", [TINY, TINY_POOL], ids=ids)
def test_every_row_of_the_registry_is_measured_and_agrees(layer: Layer, layout: str) -> None:
    problem = engines.Problem.random(layer)
    for op, kind in layer.ops.items():
        found = engines.candidates(problem, op, layout, runtime.ENGINES, cli.ALGORITHMS)
        rows = [row for row in registry.available(kind) if row.can(kind, layer.dims)]
        assert {c.name for c in found} == {f"{row.engine}/{row.algorithm}" for row in rows}
        assert sum(candidate.chosen for candidate in found) == 1
        reference = engines.reference(problem, op)
        for candidate in found:
            assert report.relative_error(candidate.to_numpy(candidate.call()), reference) < 1e-6, candidate.name


def test_the_baselines_are_there_whatever_is_asked_for() -> None:
    found = engines.candidates(engines.Problem.random(TINY), "forward", "NCHW", ("numba",), ("direct",))
    assert {"numpy/im2col", "numpy/naive"} <= {candidate.name for candidate in found}
    assert {candidate.name for candidate in found} <= {"numpy/im2col", "numpy/naive", "numba/direct"}


@pytest.mark.parametrize("peer", peers.PEERS)
@pytest.mark.parametrize(
    "layer",
    [
        TINY,
        ConvLayer("tiny_1d", (2, 4, 20), (6, 2, 3), padding=2, dilation=2, groups=2),
        ConvLayer("tiny_3d", (1, 3, 4, 5, 6), (4, 3, 3, 3, 3), padding=1),
        TINY_POOL,
        PoolLayer("tiny_pool_1d", (2, 3, 17), kernel=3, stride=2, padding=1),
        PoolLayer("tiny_pool_3d", (1, 3, 4, 6, 8), kernel=2, stride=2),
    ],
    ids=ids,
)
def test_peers_agree(peer: str, layer: Layer) -> None:
    try:
        (library,) = peers.load_peers([peer], 1)
    except ImportError as error:
        pytest.skip(str(error))
    problem = engines.Problem.random(layer)
    for op in layer.ops:
        for candidate in library.candidates(problem, op):
            result = candidate.to_numpy(candidate.call())
            assert report.relative_error(result, engines.reference(problem, op)) < 1e-6, candidate.name


# Training steps


def test_networks_have_the_layers_that_their_widths_say() -> None:
    model = training.build(TINY_NETWORK, "NHWC")
    assert [type(layer).__name__ for layer in model] == [
        "Conv2d", "ReLU", "Conv2d", "ReLU", "MaxPool2d", "Conv2d", "ReLU", "MaxPool2d", "Flatten", "Linear",
    ]  # fmt: skip
    assert model.output_shape((5, 8, 8, 2)) == (5, training.CLASSES)
    products = 3 * 2 * 9 * 64 + 4 * 3 * 9 * 64 + 5 * 4 * 9 * 16 + 5 * 4 * training.CLASSES
    assert TINY_NETWORK.flops == 2 * 5 * (3 * products - 3 * 2 * 9 * 64)  # nobody wants the input's gradient


@pytest.mark.parametrize("who", ["fastconv", *peers.PEERS])
def test_everyone_takes_the_same_steps(who: str) -> None:
    batch = training.Batch.random(TINY_NETWORK)
    if who == "fastconv":
        steps = training.steps(batch, "NCHW")
    else:
        try:
            (library,) = peers.load_peers([who], 1)
        except ImportError as error:
            pytest.skip(str(error))
        steps = library.steps(batch)
    reference = training.step(batch, "NCHW", np.float64)
    for _ in range(3):  # the third gradient depends on the weights after two steps
        wanted = reference.call().copy()
        for step in steps:
            assert report.relative_error(step.to_numpy(step.call()), wanted) < 1e-5, step.name


def test_training_is_measured_in_place_of_layers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "NETWORKS", (TINY_NETWORK,))
    assert cli.run(arguments("--train", "--repeat", "1", "--layout", "NHWC")) == 0
    out = capsys.readouterr().out
    assert "| tiny_net        | train   | fastconv NHWC *" in out
    assert "| tiny_net        | train   | fastconv NCHW  " in out
    assert "train, geometric mean of * over fastconv NCHW" in out
    assert "vgg" not in out


# The bare tile


def test_the_bare_tile_and_its_ceiling_count_their_operations() -> None:
    native = runtime.native_module()
    if native is None:
        assert tile.measure() == []
        assert tile.best([]) == 0
        return
    assert [each.pieces for each in tile.measure()] == native.tiles()
    for pieces in native.tiles():
        for run in (native.run_tile, native.run_ceiling):
            assert run(pieces, 12) == 2 * run(pieces, 6) > 0
    with pytest.raises(ValueError, match=r"pieces must be one of \[0.*\], got 4"):
        native.run_tile(4, 1)


@pytest.mark.parametrize(("precision", "speed"), [("highest", 500.0), ("high", 900.0), ("medium", 2000.0)])
def test_the_tile_to_compare_with_is_the_fastest_of_the_precision(precision: str, speed: float) -> None:
    tiles = [tile.Tile(0, 200.0, 220.0), tile.Tile(1, 2000.0, 2200.0), tile.Tile(2, 900.0, 950.0)]
    with runtime.config_context(precision=precision):
        assert tile.best([*tiles, tile.Tile(3, 500.0, 550.0)]) == speed
        assert tile.best(tiles[:1]) == 200.0


def test_the_tiles_are_described_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "isa", lambda: "amx")
    assert tile.describe([tile.Tile(0, 97e9, 99e9), tile.Tile(3, 540e9, 560e9)]) == (
        "amx 97 GFLOP/s of 99, split in 3 540 GFLOP/s of 560 (ceiling of multiply-adds alone), one thread"
    )


# Timing and report


def test_all_take_turns() -> None:
    order: list[str] = []

    def call(name: str) -> None:
        if order[-1:] != [name]:
            order.append(name)

    timings = timing.take_turns([lambda: call("a"), lambda: call("b")], 2)
    assert order == ["a", "b", "a", "b"]
    assert all(0 <= each.minimum <= each.median for each in timings)


def result_of(name: str, seconds: float, **facts: Any) -> report.Result:
    values = {
        "peer": False,
        "chosen": False,
        "timed": 1.0,
        "median": seconds,
        "flops": 2 * 10**9,
        "bytes": 10**9,
        "error": 1e-7,
    }
    return report.Result(layer="tiny", op="forward", name=name, minimum=seconds, **(values | facts))


def test_times_of_a_slice_are_extrapolated_by_outputs() -> None:
    layer = TINY._replace(input_size=(8, 3, 6, 7))
    whole, part = engines.Problem.random(layer), engines.Problem.random(TINY)
    candidate = engines.Candidate("numpy/naive", part, lambda: None, np.asarray)
    measured = report.result(layer, "forward", candidate, timing.Timing([2.0, 3.0, 7.0]), 0.0)
    assert (measured.timed, measured.minimum, measured.median) == (0.25, 8.0, 12.0)
    assert measured.flops == whole.layer.flops


def test_ratios_and_rates() -> None:
    group = [
        result_of("cython/direct", 0.5, chosen=True, peak=5e9),
        result_of("numpy/im2col", 2.0),
        result_of("numpy/naive", 800.0, timed=0.01),
        result_of("torch NCHW", 1.0, peer=True),
        result_of("torch NHWC", 0.75, peer=True),
    ]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.lines(group)]
    table = [dict(zip((column.heading for column in report.COLUMNS), row, strict=True)) for row in cells]
    assert table[0]["who"] == "cython/direct *"
    assert (table[0]["ms min"], table[0]["GFLOP/s"], table[0]["GB/s"]) == ("500", "4.00", "2.00")
    assert (table[0]["x naive"], table[0]["x NumPy"], table[0]["x peers"]) == ("1600", "4.00", "1.50")
    assert (table[0]["% tile"], table[1]["% tile"]) == ("80", "")
    assert table[2]["ms min"] == "~800000"
    assert report.means([group])[0].startswith("convolution forward")
    assert "numpy/im2col: 4.00 (1)" in report.means([group])[0]
    assert any(note.startswith("~") for note in report.footnotes([group]))
    assert not any(note.startswith("~") for note in report.footnotes([group[:2]]))
    assert any(note.startswith("% tile") for note in report.footnotes([group]))
    assert not any(note.startswith("% tile") for note in report.footnotes([group[1:]]))


def test_who_packs_weights_in_the_time_is_said_of_every_peer() -> None:
    (note,) = (note for note in report.footnotes([[result_of("peer", 1.0, peer=True)]]) if note.startswith("Weights"))
    assert all(name in note for name in ("fastconv", *peers.PEERS))
    assert not any(note.startswith("Weights") for note in report.footnotes([[result_of("cython/direct", 1.0)]]))


def test_without_a_baseline_there_is_no_ratio() -> None:
    alone = result_of("cython/direct", 0.5)
    assert report.ratio(alone, [alone], report.is_naive) is None


# The command


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layers", "vgg9"], "no layer is called 'vgg9'"),
        (["--layers", ","], "expected one or more names"),
        (["--engine", "numpy,fortran"], "expected some of cython, numba, numpy, got 'fortran'"),
        (["--algorithm", "magic"], "got 'magic'"),
        (["--ops", "backward"], "expected some of forward, input, weight, got 'backward'"),
        (["--peers", "tensorflow"], "expected some of torch, onnxruntime, openvino, got 'tensorflow'"),
        (["--threads", "0"], "argument --threads: must be a positive integer, got '0'"),
        (["--json", "no/such/folder/out.json"], "there is no folder 'no/such/folder'"),
        (["--threads", "5000"], "argument --threads: must be from 1 to 1024, got 5000"),
        (["--json", "."], "argument --json: must be a file, got the folder '.'"),
        (["--repeat", "many"], "argument --repeat: must be a positive integer, got 'many'"),
    ],
)
def test_errors_say_what_was_wanted(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        arguments(*words)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_nothing_to_measure_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(arguments("--layers", "pool_*", "--ops", "weight")) == 2
    assert "no layer that was asked for has the operation(s) weight" in capsys.readouterr().err


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "NEEDED", ("threadpoolctl", "no_such_package"))
    assert cli.run(arguments("--layers", "digits")) == 2
    assert capsys.readouterr().err == (
        "fastconv bench: error: no_such_package not installed; python -m pip install 'fastconv[bench]'\n"
    )


def test_a_missing_peer_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Missing(peers.OnnxRuntime):
        def __init__(self, threads: int) -> None:
            raise ImportError("No module named 'onnx'")

    monkeypatch.setitem(peers.PEERS, "onnxruntime", Missing)
    assert cli.run(arguments("--layers", "digits", "--peers", "onnxruntime")) == 2
    error = capsys.readouterr().err
    assert "peer 'onnxruntime' does not load (No module named 'onnx'); python -m pip install onnxruntime onnx" in error


def test_startup_measures_each_engine_that_works(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(arguments("--startup", "--engine", "numpy")) == 0
    heading, _, row = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in heading.split("|")[2:5]] == [
        "import numba",
        "first call, cold",
        "first call, warm",
    ]
    engine, *times = (cell.strip() for cell in row.split("|")[1:-1])
    assert engine == "numpy"
    assert all(float(time) >= 0 for time in times)


def test_the_command_prints_a_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = arguments(
        "--ops", "forward,weight", "--repeat", "1", "--engine", "numpy", "--json", str(tmp_path / "out.json")
    )
    args.layers = (TINY, TINY_POOL)
    assert cli.run(args) == 0
    printed = capsys.readouterr()
    assert "| tiny            | forward | numpy/im2col" in printed.out
    assert ("3/3" in printed.err) == (find_spec("tqdm") is not None), "the progress bar"
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["machine"]["numpy"] == np.__version__
    assert written["machine"]["tile"].startswith(runtime.isa())
    found = {(r["layer"], r["op"], r["name"]) for r in written["results"]}
    assert found == {
        ("tiny", "forward", "numpy/im2col"),
        ("tiny", "forward", "numpy/naive"),
        ("tiny", "weight", "numpy/im2col"),
        ("tiny", "weight", "numpy/naive"),
        ("tiny_pool", "forward", "numpy/windows"),
        ("tiny_pool", "forward", "numpy/naive"),
    }
    for result in written["results"]:
        assert 0 < result["minimum"] <= result["median"]
        assert result["error"] < 1e-6
        assert result["x_naive"] > 0
        assert result["x_peers"] is None
        assert (result["tile_share"] is not None) == (result["layer"] == "tiny" and runtime.isa() != "none")


def test_the_command_works_without_tqdm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    args = arguments("--ops", "forward", "--repeat", "1", "--engine", "numpy")
    args.layers = (TINY,)
    assert cli.run(args) == 0
    out, err = capsys.readouterr()
    assert "| tiny            | forward | numpy/im2col" in out
    assert not err


# Errors of Winograd and digits


@pytest.mark.skipif(bool(runtime.why_missing("cython")), reason="asks the native engine")
def test_digits_are_more_exact_than_plain_sums_wherever_they_are_used() -> None:
    found = list(digits_error.ratios((320, 1100)))
    assert any(each.digits for each in found) == (runtime.isa() == "amx")
    assert not any(each.digits and each.error > 1 for each in found)


@pytest.mark.parametrize("side", sorted({side for pair in winograd.TERMS for side in pair}), ids=str)
def test_the_transforms_convolve(side: winograd.Side, rng: np.random.Generator) -> None:
    transforms = winograd_error.matrices(side)
    signal, taps = rng.standard_normal(side.points), rng.standard_normal(side.taps)
    result = transforms.outputs @ ((transforms.taps @ taps) * (transforms.inputs @ signal))
    np.testing.assert_allclose(result, np.correlate(signal, taps)[:: side.stride], atol=1e-12)


def test_points_that_share_a_tap_have_the_same() -> None:
    for side in {side for pair in winograd.TERMS for side in pair}:
        values = winograd_error.matrices(side).taps
        for point, shared in enumerate(side.tap_points):
            np.testing.assert_array_equal(values[point], values[side.tap_points.index(shared)])


def test_larger_tiles_have_larger_errors_and_longer_sums_smaller_ones() -> None:
    two, four = (winograd_error.matrices(winograd.Side(outputs, 3)) for outputs in (2, 4))
    assert (
        winograd_error.error_ratio(64, two, two, 32, False) < 1 < winograd_error.error_ratio(64, four, four, 16, False)
    )
    assert winograd_error.error_ratio(256, four, four, 16, False) < 1
