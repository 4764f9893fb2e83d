import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

SCRIPTS = Path(__file__).parents[2] / "scripts"
TINY = ["--embed_dim=32", "--depth=2", "--num_heads=2", "--image_size_px=16", "--patch_size_px=4"]
SHORT = ["--samples=48", "--batch_size=8", "--warmup_steps=2", "--device=cpu"]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("pretrain_backbone")


def make_images(folder, classes, per_class=6):
    rng = np.random.default_rng(classes)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for index in range(per_class):
            pixels = (rng.random((16, 16, 3)) * 60 + 190 * label / (classes - 1)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{index}.png")
    return str(folder)


@pytest.fixture
def data(tmp_path):
    return ["--data", make_images(tmp_path / "two", 2), make_images(tmp_path / "three", 3)]


def pretrain(script, data, out, *changes):
    script.main([*data, f"--out={out}", *TINY, *SHORT, *changes])
    return load_file(out / "backbone" / "model.safetensors")


class Killed(Exception):
    pass


def kill_after(script, monkeypatch, steps):
    """Raise Killed in the step after so many, saving the state after each."""
    original, count = script.Run.train_step, iter(range(steps + 1))

    def step(run, batches):
        if next(count) == steps:
            raise Killed
        return original(run, batches)

    monkeypatch.setattr(script.Run, "train_step", step)


def test_a_killed_run_goes_on_and_gives_the_same_bits(script, data, tmp_path):
    whole = pretrain(script, data, tmp_path / "whole")
    patched = pytest.MonkeyPatch()
    kill_after(script, patched, steps=3)
    with pytest.raises(Killed):
        pretrain(script, data, tmp_path / "killed", "--save_every_minutes=0")
    patched.undo()
    assert torch.load(tmp_path / "killed" / "state.pt", weights_only=True)["step"] == 3
    continued = pretrain(script, data, tmp_path / "killed")
    assert whole.keys() == continued.keys()
    assert all(torch.equal(whole[name], continued[name]) for name in whole)
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("whole", "killed")]
    assert [(log.count("\n"), json.loads(log)["step"]) for log in logs] == [(1, 6), (1, 6)]
    assert json.loads(logs[0])["loss"] == json.loads(logs[1])["loss"]
    other_seed = pretrain(script, data, tmp_path / "other", "--seed=1")
    assert not torch.equal(whole["timm_model.norm.bias"], other_seed["timm_model.norm.bias"])


def test_the_backbone_loads_like_any_other_in_float32(script, data, tmp_path):
    stored = pretrain(script, data, tmp_path / "run")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "backbone", num_labels=7)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model(pixel_values=torch.zeros(2, 3, 16, 16)).logits.shape == (2, 7)
    assert len(model.timm_model.blocks) == 2


def test_the_state_of_other_options_or_data_is_not_gone_on_with(script, data, tmp_path):
    pretrain(script, data, tmp_path / "run")
    with pytest.raises(ValueError, match=r"other options: muon_lr was 0\.02, now 0\.1\. Choose"):
        pretrain(script, data, tmp_path / "run", "--muon_lr=0.1")
    (tmp_path / "two" / "class0" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"data was two \(12 images\).* now two \(11 images\)"):
        pretrain(script, data, tmp_path / "run")


@pytest.mark.parametrize(
    "option",
    [
        *("--samples=0", "--warmup_steps=0", "--constant_until=1", "--batch_size=1", "--mixed=2", "--whole_from=-1"),
        *("--head_dim=-1", "--mlp_ratio=0"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_read(script, data, tmp_path, option):
    with pytest.raises(ValueError, match=r"must be|cannot hold"):
        pretrain(script, data, tmp_path / "run", option)
    assert not (tmp_path / "run").exists()


def test_it_learns(script, data, tmp_path):
    pretrain(script, data, tmp_path / "run", "--samples=640", "--label_smoothing=0.0")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.8 * (np.log(2) + np.log(3)) / 2


@pytest.mark.parametrize("shape", [(3, 4, 9), (2, 9, 4)])
def test_an_update_has_the_gradients_singular_vectors_and_values_near_one(script, shape):
    matrices = torch.randn(shape, dtype=torch.float64)
    found = script.orthogonal(matrices)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    values = left.mT @ found @ right.mT
    assert (values - torch.diag_embed(values.diagonal(dim1=1, dim2=2))).abs().max() < 1e-6
    assert values.diagonal(dim1=1, dim2=2).min() > 0.6
    assert values.diagonal(dim1=1, dim2=2).max() < 1.3


def test_muon_moves_a_matrix_along_its_momentum(script):
    matrix, gradient = torch.nn.Parameter(torch.zeros(6, 3)), torch.randn(6, 3)
    optimizer = script.Muon([matrix], lr=0.1, momentum=0.9)
    for _ in range(2):
        before, matrix.grad = matrix.detach().clone(), gradient
        optimizer.step()
    expected = script.orthogonal((gradient + 0.9 * 1.9 * gradient)[None])[0] * 0.1 * 2**0.5
    assert torch.allclose(before - matrix, expected, atol=1e-6)


def test_crops_show_parts_of_the_image_mirrored_or_not(script):
    ramp = torch.arange(16, dtype=torch.uint8).expand(200, 3, 16, 16) * 10  # brighter to the right
    crops = script.augment(ramp, 0.5)
    std, mean = (torch.tensor(values)[:, None, None] for values in (script.STD, script.MEAN))
    pixels = (crops * std + mean) * 255
    slope = (pixels[..., -1] - pixels[..., 0]).mean(dim=(1, 2)) / 15
    assert 60 < (slope > 0).sum() < 140  # half of them
    assert slope.abs().max() < 10.01  # a crop is enlarged ...
    assert slope.abs().min() > 10 * (0.5 * 3 / 4) ** 0.5 - 0.5  # ... and never narrower than this
    assert script.augment(ramp, 1.0).shape == ramp.shape


def test_the_learning_rate_rises_stays_and_falls_to_zero(script):
    options = script.Pretraining([], Path(), samples=1000, batch_size=10, warmup_steps=10, constant_until=0.5)
    rates = [options.rate(step) for step in range(100)]
    assert rates[:2] == [0.1, 0.2]
    assert set(rates[9:51]) == {1.0}
    assert rates[-1] == pytest.approx(0.02)


def test_every_batch_has_equally_many_images_of_each_data_set(script, data):
    options = script.Pretraining([Path(path) for path in data[1:]], Path(), image_size_px=16, batch_size=8)
    sets = [script.DataSet(path, options, torch.device("cpu")) for path in options.data]
    seen = [[], []]
    for step in range(6):
        for index, (_, labels) in enumerate(script.batches_of(sets, options, step)):
            seen[index] += labels.tolist()
    assert [len(labels) for labels in seen] == [24, 24]
    assert np.bincount(seen[0][:12]).tolist() == [6, 6]  # an epoch shows every image once
    assert seen[0][:12] != seen[0][12:]


def test_batches_are_shared_as_is_said(script, data):
    paths = [Path(path) for path in data[1:]]
    options = script.Pretraining(paths, Path(), image_size_px=16, batch_size=16, shares=[1, 3])
    sets = [script.DataSet(path, options, torch.device("cpu")) for path in paths]
    assert [len(labels) for _, labels in script.batches_of(sets, options, 0)] == [4, 12]
    for shares in ([1.0], [1.0, 0.0], [1.0, -1.0]):
        with pytest.raises(ValueError, match="shares must be positive, one for each of 2 data sets"):
            script.Pretraining(paths, Path(), shares=shares)
    with pytest.raises(ValueError, match="mixed in pairs: batch_size must be even, got 9"):
        script.Pretraining(paths, Path(), batch_size=9, mixed=0.5)


def make_run(script, **changes):
    given = {"depth": 1, "embed_dim": 32, "num_heads": 2, "image_size_px": 16, "patch_size_px": 4, "batch_size": 8}
    options = script.Pretraining([Path("two"), Path("three")], Path(), samples=80, **(given | changes))
    return script.Run(options, [2, 3], torch.device("cpu"))


def test_images_are_mixed_with_others_of_their_data_set_and_targets_with_them(script):
    torch.manual_seed(0)
    images = torch.stack([torch.full((3, 16, 16), float(value)) for value in (0, 1, 0, 1, 5, 6, 7, 5)])
    labels = [torch.tensor([0, 1, 0, 1]), torch.tensor([0, 1, 2, 0])]
    mixed, (two, three) = make_run(script, mixed=1.0).mix(images.clone(), labels)
    assert (two.shape, three.shape) == ((4, 2), (4, 3))
    assert torch.allclose(two.sum(dim=1), torch.ones(4))
    # The mean of an image tells how much of it is of the other one.
    assert torch.allclose(mixed[:4].mean(dim=(1, 2, 3)), two[:, 1], atol=1e-5)
    assert torch.allclose(mixed[4:].mean(dim=(1, 2, 3)), three @ torch.tensor([5.0, 6.0, 7.0]), atol=1e-5)
    assert (two.max(dim=1).values < 1).any()


def test_the_last_steps_see_whole_images_as_they_are(script, monkeypatch):
    run = make_run(script, mixed=1.0, whole_from=0.5, patch_drop_rate=0.5)
    mixed, tokens = [], []
    monkeypatch.setattr(script.Run, "mix", lambda run, images, labels: (mixed.append(run.step), (images, labels))[1])
    run.vit.blocks[0].register_forward_hook(lambda module, inputs, output: tokens.append(output.shape[1]))
    batches = [(torch.zeros(4, 3, 16, 16, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))] * 2
    for _ in range(10):
        run.train_step(batches)
    assert mixed == [0, 1, 2, 3, 4]
    assert tokens == [1 + 8] * 5 + [1 + 16] * 5


def test_registers_may_take_the_place_of_the_class_token(script, data, tmp_path):
    changes = ["--class_token=false", "--reg_tokens=2", "--global_pool=avg", "--mixed=0.5", "--whole_from=0.5"]
    whole = pretrain(script, data, tmp_path / "whole", *changes)
    patched = pytest.MonkeyPatch()
    kill_after(script, patched, steps=4)
    with pytest.raises(Killed):
        pretrain(script, data, tmp_path / "killed", "--save_every_minutes=0", *changes)
    patched.undo()
    continued = pretrain(script, data, tmp_path / "killed", *changes)
    assert all(torch.equal(whole[name], continued[name]) for name in whole)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "whole" / "backbone", num_labels=2).eval()
    vit, images = model.timm_model, torch.randn(2, 3, 16, 16)
    assert (vit.cls_token, vit.num_reg_tokens, vit.global_pool) == (None, 2, "avg")
    expected = vit.forward_features(images)[:, 2:].mean(dim=1)  # the norm comes before the mean
    assert torch.allclose(vit.forward_head(vit.forward_features(images), pre_logits=True), expected)
    assert any(name.endswith(".norm.weight") for name in whole)


def test_heads_with_a_hidden_layer_stay_behind(script, data, tmp_path):
    run = make_run(script, head_dim=24, mlp_ratio=1.0)
    assert [[tuple(p.shape) for p in head.parameters() if p.ndim == 2] for head in run.heads] == [
        [(24, 32), (classes, 24)] for classes in (2, 3)
    ]
    linear = pretrain(script, data, tmp_path / "linear", "--mlp_ratio=1")
    hidden = pretrain(script, data, tmp_path / "hidden", "--mlp_ratio=1", "--head_dim=24")
    assert {name: tensor.shape for name, tensor in linear.items()} == {n: t.shape for n, t in hidden.items()}
    assert linear["timm_model.blocks.0.mlp.fc1.weight"].shape == (32, 32)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "hidden" / "backbone", num_labels=2)
    assert model.timm_model.blocks[0].mlp.fc1.out_features == 32


def test_help_is_shown(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    assert "parquet files or folders" in " ".join(capsys.readouterr().out.split())
