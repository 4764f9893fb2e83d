"""The README's example runs as it stands there, and what it stores can be loaded again."""

import json
import re
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForImageClassification

from gift import SMALL_BACKBONE

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLE = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]


def test_the_example_runs_and_what_it_stores_gives_the_merged_models_logits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = {}
    exec(compile(EXAMPLE, "README.md", "exec"), example)

    merged, images = example["plain_vit"].eval(), example["images"]
    backbone = AutoModelForImageClassification.from_pretrained(SMALL_BACKBONE, num_labels=10).eval()
    assert not torch.equal(backbone(images).logits, merged(images).logits)
    loaded = PeftModel.from_pretrained(backbone, tmp_path / "my-adapter")
    assert (loaded(images).logits - merged(images).logits).abs().max() < 1e-5
    size = (tmp_path / "my-adapter" / "adapter_model.safetensors").stat().st_size
    assert f"{size / 1e6:.2f} MB" in README


def test_the_readme_and_its_example_stay_short():
    assert len(README.splitlines()) <= 120
    assert len(EXAMPLE.splitlines()) <= 14


def test_every_file_the_readme_points_to_is_there():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(links) >= 4
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_table_shows_what_was_measured():
    results = json.loads((ROOT / "results" / "demo.json").read_text())
    for row, summary in zip(results["demos"][0]["rows"], results["summary"], strict=True):
        accuracies = ", ".join(f"{accuracy:.1f}" for accuracy in summary["accuracies"]) + f" | {summary['mean']:.1f}"
        trained = f"{row['trained_without_head']:,} / {row['trained']:,}"
        assert f"| {row['task']} | {row['method']} | {accuracies} | {trained} |" in README


def test_the_card_of_the_backbone_shows_what_was_measured():
    card = (SMALL_BACKBONE / "README.md").read_text()
    for row in json.loads((ROOT / "results" / "backbone.json").read_text())["data"].values():
        shown = (f"{row[name]['accuracy']:.1f} [" for name in ("linear probe", "k-NN"))
        assert f"| {row['train']:,} / {row['test']:,} | {next(shown)}" in card
        assert f"| {next(shown)}" in card
    for tried in ("d128", "d192"):
        found = json.loads((ROOT / "results" / f"backbone_{tried}_l12.json").read_text())["data"]
        probes = [found[name]["linear probe"] for name in ("flowers17", "caltech97")]
        cells = ("{:.1f} [{:.1f}, {:.1f}]".format(one["accuracy"], *one["interval"]) for one in probes)
        assert f"| {' | '.join(cells)} |" in card
