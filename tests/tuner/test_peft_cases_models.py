"""The models on which the cases of PEFT's test-suite are run for GIFT, and what the other files need to build them.

The table of all cases stands in `test_peft_cases.py`.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

from gift import GiftConfig, GiftLinear
from tests.models import make_vit as make_timm_vit
from tests.models import perturb

GENERATORS = ("paca", "linear", "transformer", "mlp", "mixer")
SHARINGS = ("all", "kind", "layer")


class TwoLayers(nn.Module):
    """Two linear layers of different shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.act = nn.GELU()
        self.lin1 = nn.Linear(20, 4)

    def forward(self, X: Tensor) -> Tensor:
        return self.lin1(self.act(self.lin0(X)))


class Embedded(nn.Module):
    """An embedding, a layer whose weight is stored transposed, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(30, 6)
        self.conv1d = Conv1D(4, 6)
        self.lin0 = nn.Linear(20, 4)

    def forward(self, X: Tensor) -> Tensor:
        return self.lin0(nn.functional.gelu(self.conv1d(self.emb(X))).flatten(1))


def make_vit() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=5))


TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
    **TOKENS,
)


def make_gpt2() -> nn.Module:
    sizes = {"vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.2}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **TOKENS))


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def whole(limit: int, *shape: int) -> Tensor:
    return torch.randint(3, limit, shape, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Kind:
    """How to build a model, what to feed it, and which of its layers to adapt (None: the family's default)."""

    build: Callable[[], nn.Module]
    inputs: dict[str, Tensor]
    targets: list[str] | None
    layers: int  # how many layers the targets select
    widths: int  # of how many different input widths


KINDS = {
    "mlp": Kind(TwoLayers, {"X": normal(6, 10)}, ["lin0", "lin1"], layers=2, widths=2),
    "conv1d": Kind(Embedded, {"X": whole(30, 6, 5)}, ["conv1d", "lin0"], layers=2, widths=2),
    "timm": Kind(make_timm_vit, {"x": normal(2, 3, 32, 32)}, ["attn.qkv[q]", "attn.qkv[v]", "attn.proj"], 4, 1),
    "vit": Kind(make_vit, {"pixel_values": normal(2, 3, 32, 32)}, None, layers=2, widths=1),
    "llama": Kind(lambda: LlamaForCausalLM(LLAMA), {"input_ids": whole(64, 2, 7)}, ["o_proj", "down_proj"], 4, 2),
    "gpt2": Kind(make_gpt2, {"input_ids": whole(64, 2, 7)}, ["attn.c_proj", "mlp.c_fc"], layers=4, widths=1),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_generator = pytest.mark.parametrize("generator", GENERATORS)
every_sharing = pytest.mark.parametrize("share", SHARINGS)


def make_base(kind: str) -> nn.Module:
    """Return the model of a kind, in eval mode and with the same weights every time."""
    torch.manual_seed(0)
    return KINDS[kind].build().eval()


def make_config(kind: str = "mlp", **changes) -> GiftConfig:
    """Return a small configuration for a kind; no head is trained unless `changes` say so."""
    options = {"target_modules": KINDS[kind].targets, "r": 4, "num_clusters": 6, "modules_to_save": []} | changes
    return GiftConfig(**options)


def adapt(kind: str = "mlp", adapter: str = "default", perturbed: bool = True, **changes) -> PeftModel:
    """Return the adapted model of a kind, in eval mode; its residual is not zero if `perturbed`."""
    model = get_peft_model(make_base(kind), make_config(kind, **changes), adapter_name=adapter).eval()
    return perturb(model, adapter, std=0.2) if perturbed else model


def adapt_twice(kind: str = "mlp", **changes) -> PeftModel:
    """Return an adapted model with two different adapters, `default` (active) and `other`."""
    model = adapt(kind, **changes)
    model.add_adapter("other", make_config(kind, **changes))
    return perturb(model, "other", std=0.2, seed=3)


def call(model: nn.Module, kind: str = "mlp") -> Tensor:
    """Return what the model makes of the inputs of its kind."""
    output = model(**KINDS[kind].inputs)
    return getattr(output, "logits", output)


@torch.no_grad()
def run(model: nn.Module, kind: str = "mlp") -> Tensor:
    """Return what the model makes of the inputs of its kind, without gradients."""
    return call(model, kind)


def differ(one: Tensor, two: Tensor) -> bool:
    return not torch.allclose(one, two, atol=1e-3, rtol=1e-3)


def assert_same(one: Tensor, two: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(one, two, atol=tolerance, rtol=tolerance)


def trainable(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def is_trainable(model: PeftModel, adapter: str) -> bool:
    """Return whether the generators of an adapter are trained; they must agree."""
    states = {parameter.requires_grad for parameter in model.base_model.gift_generators[adapter].parameters()}
    assert len(states) == 1
    return states.pop()


def train(model: PeftModel, kind: str = "mlp", steps: int = 3, learning_rate: float = 0.05) -> None:
    """Take a few steps of gradient descent on what requires gradients."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        call(model, kind).square().mean().backward()
        optimizer.step()
    model.eval()


def gradients(model, kind="mlp"):
    """Return the gradient of every trained parameter after one backward pass."""
    model.zero_grad()
    call(model, kind).square().sum().backward()
    return {name: model.get_parameter(name).grad.clone() for name in trainable(model)}


def gift_layers(model: nn.Module) -> dict[str, GiftLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, GiftLinear)}


def delete(model: PeftModel, adapter: str) -> None:
    """Delete an adapter; that another one becomes active is a warning of PEFT's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*which is now deleted")
        model.delete_adapter(adapter)


@every_kind
def test_a_new_adapter_changes_nothing_and_a_trained_one_does(kind):
    before = run(make_base(kind), kind)

    new = run(adapt(kind, perturbed=False), kind)
    trained = run(adapt(kind), kind)

    assert torch.isfinite(trained).all()
    assert_same(new, before, 1e-6)
    assert differ(trained, before)


@every_kind
def test_the_targets_are_wrapped_and_no_other_layer_is(kind):
    model = adapt(kind)

    layers = gift_layers(model)

    assert len(layers) == KINDS[kind].layers
    assert {name.removeprefix("base_model.model.") for name in layers} == set(model.targeted_module_names)


@every_kind
def test_targets_of_one_input_width_share_a_generator(kind):
    assert len(adapt(kind).base_model.gift_generators["default"]) == KINDS[kind].widths


@every_generator
@every_kind
def test_every_generator_adapts_every_kind_of_model(kind, generator):
    model = adapt(kind, generator=generator, share="kind")

    with_adapter = run(model, kind)
    with model.disable_adapter():
        without = run(model, kind)

    assert differ(with_adapter, without)
    assert torch.equal(without, run(make_base(kind), kind))
