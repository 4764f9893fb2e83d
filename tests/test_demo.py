import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from gift import demo
from gift.adapters import load_adapter


def shortened(task):
    """Return the task with few images and one epoch."""
    few = {"train": task.train[:32], "test": task.test[:16], "epochs": 1}
    return dataclasses.replace(task, drawn_train=task.drawn_train[:32], drawn_test=task.drawn_test[:16], **few)


@pytest.fixture
def short(monkeypatch):
    digits, flowers = shortened(demo.digits_task()), shortened(small_flowers())
    monkeypatch.setattr(demo, "digits_task", lambda: digits)
    monkeypatch.setattr(demo, "flowers_task", lambda: flowers)
    monkeypatch.setattr(demo, "THREADS", 1)


def small_flowers():
    train, drawn_train = demo.draw_flowers(32, 0, 64)
    test, drawn_test = demo.draw_flowers(16, 1, 64)
    return demo.Task("flowers", train, test, 1, drawn_train, drawn_test)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a short task and GIFT's run on it."""
    task, folder = shortened(demo.digits_task()), tmp_path_factory.mktemp("demo")
    return task, demo.train(task, demo.EXPLAINED, demo.demo_options(task, demo.EXPLAINED, 0, folder))


def test_the_digits_are_split_in_their_order():
    task = demo.digits_task()
    assert (len(task.train.labels), len(task.test.labels)) == (1000, 797)
    images = demo.read_digits(64)
    assert np.array_equal(np.concatenate([task.train.labels, task.test.labels]), images.labels)


def test_gift_has_less_than_half_of_loras_parameters_on_the_same_layers(tmp_path):
    task = shortened(demo.digits_task())
    counts = {}
    for method in demo.METHODS[1:]:
        result = demo.train(task, method, demo.demo_options(task, method, 0, tmp_path / method.folder))
        counts[method.folder] = result.metrics["trained_parameters_without_head"]
        adapted = [name for name, module in result.model.named_modules() if hasattr(module, "base_layer")]
        assert len(adapted) == 8
        assert all(name.endswith("attn.proj") for name in adapted)
    assert counts["lora"] == 8 * 8 * (128 + 128)
    assert counts["gift"] < counts["lora"] / 2


def test_a_stored_adapter_that_predicts_otherwise_is_noticed(trained):
    task, result = trained
    assert demo.check_adapter(task, result) < 1e-4
    path = result.adapter_dir / "adapter_model.safetensors"
    kept, tensors = path.read_bytes(), load_file(path)
    head = next(name for name in tensors if name.endswith("head.weight"))
    save_file(tensors | {head: -tensors[head]}, path, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=r"reloaded adapter of .* predicts [1-9]"):
        demo.check_adapter(task, result)
    path.write_bytes(kept)


def test_the_cluster_of_a_part_is_the_one_that_agrees_best_on_the_training_images(trained):
    task = small_flowers()
    found, _ = demo._maps(task, trained[1].model)
    layer, cluster = demo._best_of_parts(task, found)[0]
    coverage = demo.part_coverage(task.drawn_train, (8, 8))[:, demo.PARTS.index("petals")]
    agreement = [
        [np.corrcoef(found.maps[:, row, column].ravel(), coverage.ravel())[0, 1] for column in range(32)]
        for row in range(8)
    ]
    assert agreement[layer][cluster] == pytest.approx(np.max(agreement))


def test_agreement_is_reported_beside_what_it_was_before_training(tmp_path):
    task = small_flowers()
    untrained = demo.demo_options(task, demo.EXPLAINED, 3, tmp_path)
    untrained = dataclasses.replace(untrained, learning_rate=0.0, head_learning_rate=0.0)
    words = demo.compare_parts(task, demo.train(task, demo.EXPLAINED, untrained))
    assert len(words) == 4
    for line in words:
        assert re.fullmatch(r"\w+: (L\d/C\d+), (-?\d\.\d\d) \(before training the best was \1, \2\)", line)


@pytest.mark.parametrize("content", ["other files", "a file", "another demo.json", "a damaged demo.json"])
def test_a_folder_of_other_things_is_left_alone(tmp_path, content):
    out = tmp_path / "out"
    precious = out if content == "a file" else out / "digits" / "probe" / "precious.txt"
    precious.parent.mkdir(parents=True, exist_ok=True)
    precious.write_text("precious")
    if content.endswith("demo.json"):
        (out / "demo.json").write_text('{"name": "mine"}' if "another" in content else "{")
    with pytest.raises(ValueError, match="holds no demo"):
        demo.run_demo(out)
    assert precious.read_text() == "precious"


@pytest.mark.parametrize("seed", [-1, 2**32 - 1])
def test_a_seed_that_cannot_be_is_refused_before_anything_is_written(tmp_path, seed):
    with pytest.raises(ValueError, match="seed must be a number from 0"):
        demo.run_demo(tmp_path / "out", seed)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_demo_gives_the_same_figures_again_and_leaves_what_it_says(short, tmp_path, capfd):
    threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
    first = demo.run_demo(tmp_path / "one")
    assert capfd.readouterr() == ("", "")
    assert (torch.get_num_threads(), logging.get_verbosity()) == (threads, verbosity)
    assert [(row.task, row.method) for row in first.rows] == [
        (task, method.name) for task in ("digits", "flowers") for method in demo.METHODS
    ]
    assert (first.adapter / "adapter_model.safetensors").exists()
    with Image.open(tmp_path / "one" / "explained" / "overview.png") as picture:
        assert min(picture.size) > 500
    assert load_adapter(first.adapter).classifier.class_names == small_flowers().train.class_names
    assert len(first.parts) == 4
    summary = json.loads((tmp_path / "one" / "demo.json").read_text())
    assert summary["rows"] == [dataclasses.asdict(row) for row in first.rows]

    again = demo.run_demo(tmp_path / "one")  # complete, so it is run anew
    assert [dataclasses.replace(row, seconds=0.0) for row in again.rows] == [
        dataclasses.replace(row, seconds=0.0) for row in first.rows
    ]
    assert again.rows[0].seconds != first.rows[0].seconds
    assert again.parts == first.parts


@pytest.mark.slow
def test_a_demo_that_was_stopped_goes_on_and_another_seed_starts_anew(short, tmp_path, monkeypatch):
    def written():
        return (tmp_path / "digits" / "lora" / "metrics.json").stat().st_mtime_ns

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(demo, "explain_pictures", stop)
        with pytest.raises(KeyboardInterrupt):
            demo.run_demo(tmp_path)
        first = written()
        with pytest.raises(KeyboardInterrupt):
            demo.run_demo(tmp_path)
    assert written() == first
    demo.run_demo(tmp_path, seed=1)
    assert written() != first
    assert json.loads((tmp_path / "demo.json").read_text())["seed"] == 1


def test_the_table_shows_every_row(tmp_path):
    row = demo.Row("digits", "LoRA r=8", 0.9352, 16384, 17674, 12.3, 1.2e-6)
    text = demo.describe(demo.DemoResult([row], ["petals: L1/C2"], tmp_path), seed=3)
    assert "| digits | LoRA r=8 | 93.5 % | 16,384 | 17,674 | 12 | 1.2e-06 |" in text
    for part in ("Seed 3", "petals: L1/C2", str(tmp_path / "explained" / "report.html"), "--seed 4"):
        assert part in text
