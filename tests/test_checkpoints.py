"""The original authors' checkpoints: every kind gives the residual of its formula, and a bad file gives an error."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from gift.checkpoints import MAX_FILE_BYTES, convert_checkpoint
from tests.models import make_images, make_vit

OFFICIAL = os.environ.get("GIFT_OFFICIAL_CHECKPOINT")
FORMS = ("simple_block", "pamcat_attn", "pamcat_transformer", "transformer", "mlp", "mlp_mixer")
# Names as in the files, with (d_out, d_in) in a tiny ViT, and where its layers lie in a block there.
SHAPES = {"attn:proj": (32, 32), "mlp:fc1": (128, 32), "mlp:fc2": (32, 128), "qkv": (96, 32), "fc1": (128, 32)}
LAYERS = {"qkv": "attn.qkv", "fc1": "mlp.fc1"}


# ---- checkpoints as the authors' script writes them ------------------------------------------------------------------


def linear_shapes(name, inputs, outputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def block_shapes(form, rank, rows, norm="l2", clusters=5, hidden=10, mixed=7):
    """Return the shapes of the tensors of one block, by the authors' names."""
    project = linear_shapes("attn.proj", rank, rank)
    mlp = linear_shapes("mlp.fc1", rank, hidden) | linear_shapes("mlp.fc2", hidden, rank)
    attention = project | linear_shapes("attn.cluster.cluster", rank, clusters)
    for name in "qkv":
        attention |= linear_shapes(f"attn.{name}", rank, rank)
    tokens = linear_shapes("mlp1.fc1", rows, mixed) | linear_shapes("mlp1.fc2", mixed, rows)
    channels = linear_shapes("mlp2.fc1", rank, hidden) | linear_shapes("mlp2.fc2", hidden, rank)
    shapes, norms = {
        "simple_block": ({}, []),
        "pamcat_attn": (attention, ["norm"]),
        "pamcat_transformer": (attention | mlp, ["norm1", "norm2"]),
        "transformer": (linear_shapes("attn.qkv", rank, 3 * rank) | project | mlp, ["norm1", "norm2"]),
        "mlp": (mlp, ["norm1"]),
        "mlp_mixer": (tokens | channels, ["norm1", "norm2"]),
    }[form]
    for name in norms if norm == "ln" else []:
        shapes |= {f"{name}.weight": (rank,), f"{name}.bias": (rank,)}
    return shapes


def make_state(form, targets, rank=6, blocks=1, bias=False, classes=5, width=32, shapes=SHAPES, **sizes):
    """Return random float64 tensors of a checkpoint, by the authors' names."""
    state = {"backbone.head.weight": (classes, width), "backbone.head.bias": (classes,)}
    for target in targets:
        rows, columns = shapes[target]
        for side, shape in (("in", (rank, columns)), ("out", (columns, rank))):
            state[f"{side}_projections.{target}.weight"] = shape
            state |= {f"{side}_projections.{target}.bias": shape[:1]} if bias else {}
        for index in range(blocks):
            block = block_shapes(form, rank, rows, **sizes)
            state |= {f"hypernets.{target}.blocks.{index}.{name}": shape for name, shape in block.items()}
    return OrderedDict((name, torch.randn(shape, dtype=torch.float64)) for name, shape in state.items())


def make_checkpoint(form="simple_block", targets=("attn:proj",), dtype=torch.float32, options=None, **sizes):
    """Return the content of a checkpoint; sizes are those of `make_state`, options those of the training."""
    norm, blocks = sizes.get("norm", "l2"), sizes.get("blocks", 1)
    block = {
        "block_type": form,
        "num_blocks": blocks,
        "num_heads": 1,
        "norm_layer": norm,
        "cluster_activation": "sigmoid",
    }
    block |= options or {}
    args = Namespace(model="vit", hypernet_target_modules=list(targets), hypernet_embed_dim=sizes.get("rank", 6))
    for name, value in block.items():
        setattr(args, f"hypernet_block_{name}", value)
    state = make_state(form, targets, **sizes)
    return {
        "epoch": 99,
        "arch": "vit_base_patch16_224.augreg_in21k",
        "state_dict": OrderedDict((name, tensor.to(dtype)) for name, tensor in state.items()),
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-6, "params": [0]}]},
        "version": 2,
        "args": args,
        "metric": 99.2,
    }


def convert(folder, content):
    torch.save(content, folder / "last.pth.tar")
    return convert_checkpoint(folder / "last.pth.tar", folder / "adapter")


# ---- what they mean, in float64 and by the authors' names ------------------------------------------------------------


def l2(x):
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)  # as torch does; a cluster without any token is as short


def layer_norm(x, weight, bias):
    deviation = x - x.mean(dim=-1, keepdim=True)
    return deviation / (deviation.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def gelu(x):
    return x / 2 * (1 + torch.erf(x / 2**0.5))


def attend(q, k, v, heads):
    outputs = []
    for q_head, k_head, v_head in zip(*(x.chunk(heads, dim=1) for x in (q, k, v)), strict=True):
        outputs.append((q_head @ k_head.T / q_head.shape[1] ** 0.5).softmax(dim=1) @ v_head)
    return torch.cat(outputs, dim=1)


class Block:
    """The formulas of one block."""

    def __init__(self, tensors, norm, heads):
        self.tensors, self.norm_layer, self.heads = tensors, norm, heads

    def linear(self, name, x):
        return x @ self.tensors[f"{name}.weight"].T + self.tensors[f"{name}.bias"]

    def norm(self, name, x):
        if self.norm_layer == "ln":
            return layer_norm(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])
        return l2(x) if self.norm_layer == "l2" else x

    def mlp(self, name, x):
        return self.linear(f"{name}.fc2", gelu(self.linear(f"{name}.fc1", x)))

    def cluster_attention(self, x):
        assignment = torch.sigmoid(self.linear("attn.cluster.cluster", x)).T / len(x)
        z = l2(assignment @ x)
        q, k, v = self.linear("attn.q", x), self.linear("attn.k", z), self.linear("attn.v", z)
        return self.linear("attn.proj", attend(q, k, v, self.heads))

    def self_attention(self, x):
        q, k, v = self.linear("attn.qkv", x).chunk(3, dim=1)
        return self.linear("attn.proj", attend(q, k, v, self.heads))

    def apply(self, form, u):
        if form == "pamcat_attn":
            return u + self.cluster_attention(self.norm("norm", u))
        if form == "mlp":
            return u + self.mlp("mlp", self.norm("norm1", u))
        if form == "mlp_mixer":
            u = u + self.mlp("mlp1", self.norm("norm1", u).T).T
            return u + self.mlp("mlp2", self.norm("norm2", u))
        attention = self.cluster_attention if form == "pamcat_transformer" else self.self_attention
        u = u + attention(self.norm("norm1", u))
        return u + self.mlp("mlp", self.norm("norm2", u))


def residual(state, target, weight, form="simple_block", blocks=1, heads=1, norm="l2", activation=lambda u: u):
    """Return dW of one weight, from the tensors of a checkpoint."""
    state = {name: tensor.double() for name, tensor in state.items()}
    u = weight.double() @ state[f"in_projections.{target}.weight"].T + state.get(f"in_projections.{target}.bias", 0)
    if form == "simple_block":
        u = activation(u)
    for index in range(0 if form == "simple_block" else blocks):
        prefix = f"hypernets.{target}.blocks.{index}."
        tensors = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        u = Block(tensors, norm, heads).apply(form, u)
    return u @ state[f"out_projections.{target}.weight"].T + state.get(f"out_projections.{target}.bias", 0)


def deviation(model, state, target, **options):
    """Return the largest deviation of a loaded adapter's residuals from the formula, in units of the largest entry."""
    worst = 0.0
    for block in model.base_model.model.blocks:
        layer = block.get_submodule(LAYERS.get(target, target.replace(":", ".")))
        expected = residual(state, target, layer.weight, **options)
        difference = layer.get_delta_weight("default").double() - expected
        worst = max(worst, (difference.abs().max() / expected.abs().max()).item())
    return worst


# ---- tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("target", "heads", "blocks", "bias", "norm"),
    [
        ("attn:proj", 1, 1, False, "l2"),
        ("attn:proj", 2, 2, True, "l2"),
        ("mlp:fc1", 3, 1, False, "l2"),
        ("mlp:fc2", 2, 2, False, "none"),
        ("qkv", 2, 3, True, "ln"),
    ],
)
def test_every_kind_of_block_gives_the_residual_of_its_formula(tmp_path, form, target, heads, blocks, bias, norm):
    sizes = {"blocks": blocks, "bias": bias, "norm": norm}
    content = make_checkpoint(form, [target], torch.float64, {"num_heads": heads}, **sizes)
    convert(tmp_path, content)
    model = PeftModel.from_pretrained(make_vit(), tmp_path / "adapter")
    options = {"form": form, "blocks": blocks, "heads": heads, "norm": norm}
    assert deviation(model, content["state_dict"], target, **options) < 1e-10


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_of_two_targets_in_float32_is_close_to_the_formula(tmp_path, form):
    content = make_checkpoint(form, ["attn:proj", "fc1"], blocks=2)
    convert(tmp_path, content)
    model = PeftModel.from_pretrained(make_vit(), tmp_path / "adapter")
    for target in ("attn:proj", "fc1"):
        assert deviation(model, content["state_dict"], target, form=form, blocks=2) < 1e-6


@pytest.mark.parametrize(
    ("name", "activation"), [("gelu", gelu), ("sigmoid", torch.sigmoid), ("identity", lambda u: u)]
)
def test_a_simple_block_has_the_activation_its_options_say(tmp_path, name, activation):
    content = make_checkpoint(dtype=torch.float64, options={"act_layer": name}, bias=True)
    assert convert(tmp_path, content).activation == name
    model = PeftModel.from_pretrained(make_vit(), tmp_path / "adapter")
    assert deviation(model, content["state_dict"], "attn:proj", activation=activation) < 1e-10


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_the_whole_model_gives_the_logits_of_the_changed_weights(tmp_path, low_cpu_mem_usage):
    content = make_checkpoint("pamcat_transformer")
    state = content["state_dict"]
    convert(tmp_path, content)
    model = PeftModel.from_pretrained(make_vit(), tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage).eval()
    plain = make_vit()
    plain.head.load_state_dict({name: state[f"backbone.head.{name}"] for name in ("weight", "bias")})
    for block in plain.blocks:
        weight = block.attn.proj.weight.data
        weight += residual(state, "attn:proj", weight, form="pamcat_transformer").float()
    expected = plain(make_images())
    assert (model(make_images()) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_targets_that_share_one_generator_still_share_it(tmp_path):
    content = make_checkpoint("mlp", ["shared_projection"], torch.float64, shapes={"shared_projection": (32, 32)})
    content["args"].hypernet_target_modules = ["attn:proj", "mlp:fc1"]
    assert convert(tmp_path, content).share == "all"
    model = PeftModel.from_pretrained(make_vit(), tmp_path / "adapter")
    for layer in (model.base_model.model.blocks[1].attn.proj, model.base_model.model.blocks[0].mlp.fc1):
        expected = residual(content["state_dict"], "shared_projection", layer.weight, form="mlp")
        assert (layer.get_delta_weight("default") - expected).abs().max() < 1e-10 * expected.abs().max()


@pytest.mark.parametrize(("rank", "hidden"), [(6, 1), (6, 13), (7, 61), (49, 1), (7, 14)])
def test_the_hidden_width_is_the_one_of_the_tensors(tmp_path, rank, hidden):
    content = make_checkpoint("mlp", rank=rank, hidden=hidden)
    assert int(rank * convert(tmp_path, content).mlp_ratio) == hidden
    PeftModel.from_pretrained(make_vit(), tmp_path / "adapter")


def test_a_converted_adapter_can_be_stored_again_and_then_knows_its_backbone(tmp_path):
    convert(tmp_path, make_checkpoint("pamcat_attn"))
    model = PeftModel.from_pretrained(make_vit(), tmp_path / "adapter")
    model.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    prints = [
        json.loads((tmp_path / n / "adapter_config.json").read_text())["fingerprint"] for n in ("adapter", "again")
    ]
    assert prints[0] is None
    assert prints[1].keys() == {"blocks.0.attn.proj", "blocks.1.attn.proj"}


def test_the_folder_says_where_it_comes_from(tmp_path):
    content = make_checkpoint("mlp")
    del content["args"].hypernet_block_norm_layer
    convert(tmp_path, content)
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors", "original.json"}
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == names
    origin = json.loads((tmp_path / "adapter" / "original.json").read_text())
    expected = {"epoch": 99, "version": 2, "metric": 99.2, "classes": 5, "block_type": "mlp"}
    assert expected.items() <= origin.items()
    assert origin["arch"] == "vit_base_patch16_224.augreg_in21k"
    assert origin["defaults_for_lack_of"] == ["norm_layer"]
    assert 'create_model("vit_base_patch16_224.augreg_in21k"' in (tmp_path / "adapter" / "README.md").read_text()


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "notes").write_text("mine")
    with pytest.raises(ValueError, match=r"not an empty folder. Name a new folder; nothing was written"):
        convert(tmp_path, make_checkpoint())
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["notes"]


def test_an_empty_folder_is_filled_and_missing_parents_are_made(tmp_path):
    torch.save(make_checkpoint(), tmp_path / "last.pth.tar")
    (tmp_path / "empty").mkdir()
    for name in ("empty", "a/b/c"):
        convert_checkpoint(tmp_path / "last.pth.tar", tmp_path / name)
        assert (tmp_path / name / "adapter_config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "empty", "last.pth.tar"]


def test_an_error_while_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("gift.checkpoints.CARD", "{unknown}")
    with pytest.raises(KeyError):
        convert(tmp_path, make_checkpoint())
    assert [path.name for path in tmp_path.iterdir()] == ["last.pth.tar"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": {"num_heads": 4}}, "4 heads for 6 channels"),
        ({"options": {"norm_layer": "batch"}}, "norm_layer = 'batch', and what can be converted is l2, none"),
        ({"options": {"cluster_activation": "softmax"}}, "cluster_activation = 'softmax'"),
        ({"options": {"num_blocks": 3}}, "more blocks than 1"),
        ({"targets": ["query"], "shapes": {"query": (32, 32)}}, "which layers of a block its target 'query' means"),
        ({"targets": ["fc1", "mlp:fc1"]}, "must be different layers"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"cannot be converted, and nothing was written: .*{message}"):
        convert(tmp_path, make_checkpoint("pamcat_transformer", **changes))
    assert not (tmp_path / "adapter").exists()


def test_targets_with_unlike_generators_are_refused(tmp_path):
    content = make_checkpoint("mlp")
    content["state_dict"] |= make_state("mlp", ["fc1"], rank=4)
    content["state_dict"] = {name: tensor.float() for name, tensor in content["state_dict"].items()}
    with pytest.raises(ValueError, match=r"'attn:proj' and 'fc1' have unlike generators.*'r': \(6, 4\)"):
        convert(tmp_path, content)


@pytest.mark.parametrize("path", ["folder", "missing"])
def test_what_is_no_file_is_refused(tmp_path, path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"Name the authors' .pth.tar file"):
        convert_checkpoint(tmp_path / path, tmp_path / "adapter")


def test_a_file_of_a_whole_model_is_refused_by_its_size(tmp_path):
    with (tmp_path / "big").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(ValueError, match="it has 1024 MB, where an adapter has a few"):
        convert_checkpoint(tmp_path / "big", tmp_path / "adapter")


def check_like_the_published_file(checkpoint, folder):
    config = convert_checkpoint(checkpoint, folder)
    assert (config.generator, config.r, config.activation, config.target_modules) == (
        "linear",
        16,
        "identity",
        {"attn.proj"},
    )
    model = PeftModel.from_pretrained(make_vit(embed_dim=768, depth=1, num_classes=102), folder)
    with torch.serialization.safe_globals([Namespace]):
        state = torch.load(checkpoint, weights_only=True, map_location="cpu")["state_dict"]
    assert deviation(model, state, "attn:proj") < 1e-6
    head = model.base_model.model.head.modules_to_save["default"]
    assert torch.equal(head.weight, state["backbone.head.weight"])
    assert torch.equal(head.bias, state["backbone.head.bias"])


@pytest.mark.skipif(OFFICIAL is None, reason="GIFT_OFFICIAL_CHECKPOINT does not name the published file")
def test_the_published_file_of_the_authors_is_converted_right(tmp_path):
    check_like_the_published_file(Path(OFFICIAL or ""), tmp_path / "adapter")
    origin = json.loads((tmp_path / "adapter" / "original.json").read_text())
    assert origin["metric"] == pytest.approx(99.219385)
    assert origin["arch"] == "vit_base_patch16_224.augreg_in21k"


def test_a_file_made_like_the_published_one_is_converted_right(tmp_path):
    content = make_checkpoint(rank=16, classes=102, width=768, shapes={"attn:proj": (768, 768)})
    torch.save(content, tmp_path / "last.pth.tar")
    check_like_the_published_file(tmp_path / "last.pth.tar", tmp_path / "adapter")


@pytest.mark.slow
def test_of_the_mutated_and_hostile_files_each_is_refused_clearly_or_converted_right(tmp_path):
    script = Path(__file__).parent / "mutate_checkpoints.py"
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " files, 0 not refused or converted as they should be" in done.stdout
