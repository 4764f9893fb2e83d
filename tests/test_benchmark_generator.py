"""The scale benchmark counts what formulas give, measures memory to the byte, and its document shows its numbers."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
RANK, CLUSTERS, FLOAT_BYTES = 16, 96, 4
WIDTH, BLOCKS = 32, 2  # of both models of --tiny; the values of its LLaMA have half the width


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")
    return importlib.import_module("generator")


@pytest.fixture
def generator_tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("generator_tables")


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    path = tmp_path_factory.mktemp("benchmarks") / "generator.json"
    command = [sys.executable, "-W", "error", ROOT / "benchmarks" / "generator.py"]
    options = ["--tiny", "--rounds", "2", "--out", path]
    finished = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return json.loads(path.read_text()), finished.stdout


def paca_flops(shapes: list[tuple[int, int]]) -> tuple[int, int]:
    """Forward; and forward, recomputation without its last product, backward with the attention's scores made anew.

    Layers of equal width are one batch, and the last width is that of the last layer.
    """
    forward = training = 0
    for rows, columns in shapes:
        reduce = 2 * rows * columns * RANK
        assignment = clusters = scores = attended = 2 * rows * CLUSTERS * RANK
        query = project = 2 * rows * RANK**2
        key = value = 2 * CLUSTERS * RANK**2
        expand = contract = 2 * rows * RANK * 2 * RANK
        block = assignment + clusters + scores + attended + query + project + key + value + expand + contract
        forward += reduce + block
        left_out = contract if rows == shapes[-1][0] else 0
        training += (reduce + block) + (reduce + block - left_out) + (reduce + 2 * block + scores)
    return forward, training


# ---- what is counted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shapes", [[(24, 32)] * 3, [(24, 40), (8, 40)]])
def test_the_flops_are_those_of_the_formula(generator: ModuleType, shapes: list[tuple[int, int]]) -> None:
    reductions = sum(2 * rows * columns * RANK for rows, columns in shapes)
    assert generator.generator_flops("linear", shapes) == (reductions, 2 * reductions)
    assert generator.generator_flops("paca", shapes) == paca_flops(shapes)


@pytest.mark.parametrize("kind", ["linear", "paca"])
def test_the_flops_are_those_that_torch_counts(generator: ModuleType, kind: str) -> None:
    shapes = [(24, 40), (24, 40), (8, 40)]
    work = generator.Workload(kind, [torch.randn(shape) for shape in shapes])
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        work.factors()
    with FlopCounterMode(display=False) as training:
        work.backward(work.factors())
    assert generator.generator_flops(kind, shapes) == (forward.get_total_flops(), training.get_total_flops())


def test_a_step_is_four_flops_per_parameter_and_token(generator: ModuleType) -> None:
    vit, llama = (generator.on_paper(architecture) for architecture in generator.TINY_ARCHITECTURES)
    patches, head = 3 * 8 * 8 * WIDTH, 1000 * WIDTH
    assert vit["step_tokens"] == (32 // 8) ** 2 + 1
    assert vit["step_flops"] == 4 * (BLOCKS * 12 * WIDTH**2 + patches + head) * vit["step_tokens"]
    attention, mlp = 3 * WIDTH**2, 3 * WIDTH * 64  # query and output; key and value of half the width
    assert llama["step_flops"] == 4 * (BLOCKS * (attention + mlp) + 50 * WIDTH) * 2048


def test_trained_parameters_are_those_of_the_formulas(generator: ModuleType) -> None:
    vit, llama = (generator.on_paper(architecture) for architecture in generator.TINY_ARCHITECTURES)
    maps = 4 * (RANK**2 + RANK) + (RANK * CLUSTERS + CLUSTERS)  # query, key, value, output; clusters
    feed_forward = 2 * RANK * 2 * RANK + 2 * RANK + RANK
    shared = {"gift paca": 2 * RANK * WIDTH + maps + feed_forward + 1, "gift linear": 2 * RANK * WIDTH}
    assert vit["trained_parameters"] == shared | {"lora r=8": BLOCKS * 8 * 2 * WIDTH}
    values = WIDTH // 2 + WIDTH
    assert llama["trained_parameters"] == shared | {"lora r=8": BLOCKS * 8 * (2 * WIDTH + values)}
    assert llama["shapes"] == [[BLOCKS, WIDTH, WIDTH], [BLOCKS, WIDTH // 2, WIDTH]]


def test_the_large_models_have_their_public_sizes(generator: ModuleType) -> None:
    papers = [generator.on_paper(architecture) for architecture in generator.ARCHITECTURES]
    billions = {paper["name"]: round(paper["backbone_parameters"] / 1e9, 2) for paper in papers}
    expected = {"ViT-B/16": 0.09, "ViT-L/16": 0.3, "ViT-H/14": 0.63, "LLaMA 3 8B": 8.03, "LLaMA 3 70B": 70.55}
    assert billions == expected
    assert papers[5]["shapes"] == [[80, 8192, 8192]]
    assert papers[6]["shapes"] == [[80, 8192, 8192], [80, 1024, 8192]]


def test_from_the_tokens_it_names_the_generator_is_below_the_share(generator: ModuleType) -> None:
    paper = generator.on_paper(generator.TINY_ARCHITECTURES[1])
    per_token = paper["step_flops"] / paper["step_tokens"]
    for of_kind in paper["generators"].values():
        for share, tokens in of_kind["tokens_at_share"].items():
            assert of_kind["training_flops"] / (tokens * per_token) <= float(share)
            assert of_kind["training_flops"] / ((tokens - 1) * per_token) > float(share)


def test_an_exponent_is_found_in_a_power_of_the_size(generator: ModuleType) -> None:
    sizes = [1, 2, 4, 8]
    assert generator.exponent(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    assert generator.exponent(sizes, [7, 7, 7, 7]) == pytest.approx(0)


# ---- what is measured ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "paca"])
def test_only_the_left_factors_live_from_forward_to_backward(generator: ModuleType, kind: str) -> None:
    work = generator.Workload(kind, generator.make_weights([(256, 32)] * 3, torch.float32))
    work.factors()  # fills the cache of positions
    kept, peak = generator.memory_bytes(work)
    left_factors = 3 * 256 * RANK * FLOAT_BYTES
    assert left_factors <= kept <= left_factors + 256  # and a few scalars
    assignments = 3 * 256 * CLUSTERS * FLOAT_BYTES
    assert peak > left_factors + (3 * assignments if kind == "paca" else 0)
    assert peak < 4 * left_factors + (4 * assignments if kind == "paca" else 0)
    assert generator.memory_bytes(work) == (kept, peak)


def test_weights_have_memory_of_their_own(generator: ModuleType) -> None:
    weights = generator.make_weights([(4, 6), (2, 6), (4, 6)], torch.bfloat16)
    assert len({weight.data_ptr() for weight in weights}) == 3
    assert [weight.shape for weight in weights] == [(4, 6), (2, 6), (4, 6)]


def test_what_does_not_fit_is_left_out_with_the_reason(generator: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "available_bytes", lambda: 64 * 2**30)
    paper = generator.on_paper(generator.ARCHITECTURES[5])
    result = generator.measure_architecture(paper, rounds=1, limit_bytes=10 * 2**30)
    assert result["skipped"].endswith("10.0 GiB may be used")
    assert "measured" not in result


@pytest.mark.slow
def test_every_generator_is_timed_in_every_round(tiny_run: tuple[dict[str, Any], str]) -> None:
    results, _ = tiny_run
    assert len(results["architectures"]) == 2
    for row in results["architectures"]:
        for measured in row["measured"].values():
            assert len(measured["forward_s_by_round"]) == len(measured["training_s_by_round"]) == 2
            assert 0 < measured["forward_s"]["median"] < measured["training_s"]["median"]
    axes = [(line["axis"], line["kind"]) for line in results["sweep"]]
    assert axes == [(axis, kind) for axis in ("layers", "rows", "columns") for kind in ("paca", "linear")]


@pytest.mark.slow
def test_the_printed_tables_are_those_of_the_written_numbers(
    tiny_run: tuple[dict[str, Any], str], generator_tables: ModuleType
) -> None:
    results, printed = tiny_run
    assert printed.endswith(generator_tables.tables(results) + "\n")
    assert (
        "| tiny LLaMA | self_attn.q_proj, self_attn.v_proj | 2 × (32 × 32) + 2 × (16 × 32) | 0 M | 4,817 |" in printed
    )


# ---- the document ----------------------------------------------------------------------------------------------------


def test_the_document_shows_what_was_measured(generator_tables: ModuleType) -> None:
    results = json.loads((ROOT / "results" / "generator.json").read_text())
    document = (ROOT / "docs" / "scale.md").read_text()
    start, end = generator_tables.START, generator_tables.END
    assert document.split(start)[1].split(end)[0].strip() == generator_tables.tables(results)
    assert len(document.splitlines()) <= 100


def test_only_what_stands_between_the_markers_is_replaced(generator_tables: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "scale.md"
    start, end = generator_tables.START, generator_tables.END
    path.write_text(f"before\n{start}\nold\n{end}\nafter\n")
    results = json.loads((ROOT / "results" / "generator.json").read_text())
    generator_tables.write_docs(path, results)
    assert path.read_text() == f"before\n{start}\n{generator_tables.tables(results)}\n{end}\nafter\n"


def test_numbers_have_three_digits_and_intervals_more_than_one_value(generator_tables: ModuleType) -> None:
    assert [generator_tables.short(value) for value in (33061.2, 1.4567, 0.05, 100)] == [
        "33,100",
        "1.46",
        "0.05",
        "100",
    ]
    assert generator_tables.interval({"median": 0.002, "low": 0.001, "high": 0.003}) == "2 [1, 3]"
    assert generator_tables.interval({"median": 0.002, "low": 0.002, "high": 0.002}) == "2"
