"""A whole benchmark, on a few pictures."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from gift.benchmark import benchmark
from gift.benchmark import perform as perform_file
from gift.benchmark.benchmark import run_benchmark
from gift.benchmark.perform import forget_weights, perform
from gift.benchmark.record import FILE, read_lines
from gift.benchmark.runs import SEARCH, TEST
from gift.cli import main
from gift.evaluation import evaluate_adapter
from gift.training.loop import TrainingDivergedError
from tests.benchmark.small import METHODS, final_run, lasting, small_options


@pytest.fixture(scope="module")
def complete(pictures, backbone, tmp_path_factory):
    """Return the folder of a complete benchmark, which no test changes, its lines and what was said."""
    out, said = tmp_path_factory.mktemp("benchmark") / "out", []
    return out, run_benchmark(small_options(out, pictures, backbone), said.append), said


def test_every_method_has_as_many_tries_and_one_test_a_seed(complete):
    out, lines, said = complete
    for method in METHODS:
        own = [line for line in lines if line["method"] == method]
        assert [line["phase"] for line in own] == ["search", "search", "test", "test"]
        assert [line["seed"] for line in own if line["phase"] == "test"] == [0, 1]
        assert {line["images"] for line in own if line["phase"] == "test"} == {24}
        best = min(own[:2], key=lambda line: (-line["accuracy"], line["loss"]))
        rates = {(line["learning_rate"], line["weight_decay"]) for line in own[2:]}
        assert rates == {(best["learning_rate"], best["weight_decay"])}
    assert [json.loads(line) for line in (out / FILE).read_text().splitlines()] == read_lines(out)
    assert said[0] == "search: 4 runs, 0 of them done before"
    assert said[-1].startswith("[4 of 4] stripes/gift-paca:r=4,num_clusters=6/test/seed=1: ")


def test_a_line_says_what_was_run_with_what_and_what_came_out(complete):
    _, lines, _ = complete
    final = lines[-1]
    assert final["config"]["method_options"] == {"generator": "paca", "r": 4, "num_clusters": 6}
    assert final["trained_parameters"] > final["trained_parameters_without_head"] > 0
    assert final["backbone_parameters"] > 10_000
    assert final["train_seconds"] > 0
    assert final["inference_ms_per_image"] > 0
    assert (final["merged"], lines[0]["inference_ms_per_image"]) == (True, None)
    assert final["peak_memory_mb"] > 100
    assert {"commit", "versions", "python", "device", "threads", "date", "images_digest"} <= final.keys()
    assert torch.backends.cpu.get_cpu_capability() in final["device"] or torch.cuda.is_available()
    probes = [line for line in lines if line["method"] == "linear-probe"]
    assert {line["trained_parameters_without_head"] for line in probes} == {0}
    assert len({line["backbone_parameters"] for line in lines}) == 1


def test_a_number_leads_back_to_a_run_that_can_be_measured_again(complete):
    out, lines, _ = complete
    for line in lines[-4:]:
        folder = next(path for path in (out / "runs").glob(f"*/*/test/seed={line['seed']}") if _is_of(path, line))
        assert evaluate_adapter(folder)[1].accuracy == line["accuracy"]


def _is_of(folder, line):
    return json.loads((folder / "metrics.json").read_text())["trained_parameters"] == line["trained_parameters"]


def test_weights_of_searches_are_not_kept(complete):
    out, _, _ = complete
    assert [path for path in out.glob("runs/*/*/search/*/*") if path.name in ("adapter", "checkpoints")] == []
    assert len(list(out.glob("runs/*/*/search/*/log.jsonl"))) == 4
    assert len(list(out.glob("runs/*/*/test/*/adapter"))) == 4


def test_table_and_plot_are_written(complete):
    out, _, _ = complete
    assert "| GIFT paca r=4 M=6 |" in (out / "table.md").read_text()
    assert (out / "table.csv").read_text().count("\n") >= 5
    assert (out / "pareto.png").stat().st_size > 5000
    assert (out / "pareto.svg").read_text().lstrip().startswith("<?xml")


def test_a_complete_benchmark_is_not_run_again_and_can_grow(complete, pictures, backbone, tmp_path, monkeypatch):
    out, lines, _ = complete
    grown = tmp_path / "out"
    grown.mkdir()
    (grown / FILE).write_text((out / FILE).read_text())
    done = []
    monkeypatch.setattr(benchmark, "perform", lambda run, folder: done.append(run.id) or perform(run, folder))
    options = small_options(grown, pictures, backbone)
    assert run_benchmark(options) == lines
    assert done == []
    more = run_benchmark(replace(options, seeds=(0, 1, 5)))
    assert done == [f"stripes/{method}/test/seed=5" for method in METHODS]
    assert [line for line in more if line["seed"] != 5] == lines


def test_other_options_in_the_same_folder_are_refused(complete, pictures, backbone):
    out, _, _ = complete
    with pytest.raises(ValueError, match=r"epochs was 1, now 2.*--out"):
        run_benchmark(small_options(out, pictures, backbone, epochs=2))


@pytest.mark.slow
def test_the_same_run_gives_the_same_line(complete, pictures, backbone, tmp_path):
    _, lines, _ = complete
    again = run_benchmark(small_options(tmp_path / "out", pictures, backbone))
    assert list(map(lasting, again)) == list(map(lasting, lines))


def test_a_loss_that_is_not_finite_is_a_result_that_is_not_chosen(pictures, backbone, tmp_path, monkeypatch):
    train = perform_file.train

    def diverge_at_low_rates(options, after_epoch):
        if options.learning_rate < 0.01:
            raise TrainingDivergedError("The loss is nan.")
        return train(options, after_epoch)

    monkeypatch.setattr(perform_file, "train", diverge_at_low_rates)
    lines = run_benchmark(small_options(tmp_path / "out", pictures, backbone, methods=METHODS[1:], seeds=(0,)))
    assert [(line["accuracy"] is None, line["problem"]) for line in lines] == [
        *((True, "The loss is nan."), (False, None), (False, None))
    ]
    assert lines[-1]["learning_rate"] == lines[1]["learning_rate"]


def diverging(monkeypatch, phase):
    """Let every training of GIFT in that phase end with a loss that is not finite."""
    train = perform_file.train

    def train_or_diverge(options, after_epoch):
        if options.method == "gift" and options.train_on_validation == (phase == TEST):
            raise TrainingDivergedError("The loss is nan.")
        return train(options, after_epoch)

    monkeypatch.setattr(perform_file, "train", train_or_diverge)


@pytest.mark.slow
@pytest.mark.parametrize("phase", [SEARCH, TEST])
def test_a_method_that_diverges_keeps_no_other_from_its_table(phase, pictures, backbone, tmp_path, monkeypatch):
    diverging(monkeypatch, phase)
    out, said = tmp_path / "out", []
    lines = run_benchmark(small_options(out, pictures, backbone, seeds=(0,)), said.append)
    assert [line["phase"] for line in lines if line["method"] == METHODS[0]] == [SEARCH, SEARCH, TEST]
    text = (out / "table.md").read_text()
    assert "| linear probe | 1 | 0 (0 %) |" in text
    if phase == SEARCH:
        assert f"stripes/{METHODS[1]}: no try came to an end" in said[-1]
        assert "Searched for, not tested, and so not shown: GIFT paca r=4 M=6." in text
    else:
        assert "GIFT paca r=4 M=6 diverged on stripes seed 0 (The loss is nan.)" in text
    keys = [list(line) for line in lines]
    assert all(set(one) == set(keys[0]) for one in keys)


@pytest.mark.slow
def test_an_error_stops_the_benchmark_and_the_next_start_goes_on(pictures, backbone, tmp_path, monkeypatch):
    options, calls = small_options(tmp_path / "out", pictures, backbone, seeds=(0,)), []

    def failing(run, out):
        calls.append(run.id)
        if len(calls) == 3:
            raise OSError("No space left on device")
        return perform(run, out)

    monkeypatch.setattr(benchmark, "perform", failing)
    with pytest.raises(OSError, match="No space"):
        run_benchmark(options)
    assert len(read_lines(options.out)) == 2
    assert len(run_benchmark(options)) == 6
    assert len(calls) == 7  # six runs, and the one that failed again


@pytest.mark.slow
def test_a_run_that_cannot_be_done_is_named_when_all_others_are(pictures, backbone, tmp_path, monkeypatch):
    options = small_options(tmp_path / "out", pictures, backbone, seeds=(0,))

    def failing(run, out):
        if run.method.name == METHODS[1]:
            raise ValueError("x.png cannot be read.")
        return perform(run, out)

    monkeypatch.setattr(benchmark, "perform", failing)
    with pytest.raises(ValueError, match=r"2 of 5 runs failed: stripes/gift.*x.png cannot be read.*repeat only these"):
        run_benchmark(options)
    assert [line["method"] for line in read_lines(options.out)] == [METHODS[0]] * 3
    assert "| linear probe |" in (options.out / "table.md").read_text()


def test_a_reference_of_which_every_run_failed_hides_no_failure_and_no_table(
    pictures, backbone, tmp_path, monkeypatch, caplog
):
    def failing(run, out):
        if run.method.name == METHODS[1]:
            raise ValueError("x.png cannot be read.")
        return perform(run, out)

    monkeypatch.setattr(benchmark, "perform", failing)
    options = small_options(tmp_path / "out", pictures, backbone, seeds=(0,), budget=1, reference=METHODS[1])
    with pytest.raises(ValueError, match=r"1 of 3 runs failed: stripes/gift.*x.png cannot be read"):
        run_benchmark(options)
    assert f"The reference {METHODS[1]} has no test, so differences are taken to {METHODS[0]}." in caplog.messages
    for name in ("validation.md", "table.md"):
        assert "| linear probe |" in (options.out / name).read_text()


def test_forgotten_weights_let_a_run_be_trained_again(pictures, backbone, tmp_path):
    task = {"data": str(pictures), "method": "linear-probe", "model": str(backbone)}
    run = final_run(method="linear-probe", model=task["model"], epochs=1, batch_size=8)
    run = replace(run, task=replace(run.task, source=task["data"]))
    first = perform(run, tmp_path)
    forget_weights(run.folder(tmp_path))
    assert not (run.folder(tmp_path) / "metrics.json").exists()
    assert lasting(perform(run, tmp_path)) == lasting(first)


def test_a_complete_run_without_a_line_is_not_trained_again(pictures, backbone, tmp_path):
    run = final_run(method="linear-probe", model=str(backbone), epochs=1, batch_size=8)
    run = replace(run, task=replace(run.task, source=str(pictures)))
    first = perform(run, tmp_path)
    weights = run.folder(tmp_path) / "adapter" / "adapter_model.safetensors"
    save_file({key: 0 * value for key, value in load_file(weights).items()}, weights, {"format": "pt"})
    assert perform(run, tmp_path)["train_seconds"] == first["train_seconds"]
    assert perform(run, tmp_path)["loss"] != first["loss"]


def test_the_command_says_how_far_it_is_and_shows_the_table(complete, pictures, backbone, capsys):
    out, _, _ = complete
    words = ["--out", str(out), "--data", str(out.with_name("data")), "--model", str(backbone), "--ray", "none"]
    words += ["--folders", str(pictures), "--tasks", pictures.name, "--epochs", "1", "--budget", "2"]
    main(["benchmark", "offline", *words, "--methods", *METHODS, "--seeds", "0", "1"])
    said = capsys.readouterr().out
    assert "search: 4 runs, 4 of them done before" in said
    assert "| GIFT paca r=4 M=6 |" in said


def test_the_command_shows_the_searches_where_nothing_could_be_chosen(
    pictures, backbone, tmp_path, monkeypatch, capsys
):
    diverging(monkeypatch, SEARCH)
    words = ["--out", str(tmp_path / "out"), "--model", str(backbone), "--ray", "none", "--folders", str(pictures)]
    words += ["--tasks", pictures.name, "--epochs", "1", "--budget", "2", "--methods", METHODS[1]]
    main(["benchmark", "offline", *words])
    said = capsys.readouterr().out
    assert "no try came to an end that could be chosen" in said
    assert "| GIFT paca r=4 M=6 |" in said
    assert said.endswith(f"Wrote {tmp_path / 'out'}: runs.jsonl, validation.md\n")


def test_tables_and_plots_are_made_of_results(complete, tmp_path, capsys):
    out, _, _ = complete
    main(["benchmark", "table", str(out), "--reference", METHODS[1]])
    assert "difference to GIFT paca r=4 M=6" in capsys.readouterr().out
    for name in ("tables/table.csv", "tables/table.md"):
        main(["benchmark", "table", str(out / FILE), "--out", str(tmp_path / name)])
        assert (tmp_path / name).stat().st_size > 100
    main(["benchmark", "plot", str(out), "--out", str(tmp_path / "plots" / "front.svg")])
    assert "<svg" in (tmp_path / "plots" / "front.svg").read_text()


@pytest.mark.parametrize(
    "words", [["table", "--out", "table.txt"], ["plot", "--out", "plot.gif"], ["table", "--reference", "x"]]
)
def test_files_and_references_that_cannot_be_are_refused(words, complete, tmp_path, monkeypatch, capsys):
    out, _, _ = complete
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(["benchmark", words[0], str(out), *words[1:]])
    assert "gift: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_ray_that_is_not_installed_is_said_before_anything_is_trained(pictures, backbone, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "gift.benchmark.cluster", raising=False)
    with pytest.raises(ValueError, match=r"need ray: pip install 'gift-peft\[cluster\]', or .* --ray none"):
        run_benchmark(small_options(tmp_path / "out", pictures, backbone, ray="local"))
    assert not (tmp_path / "out" / FILE).exists()
