"""The reference for every way of running an adapted model: a plain backbone whose weights are W + dW, by autograd.

Nothing of the tuner takes part but the generators' own forward pass: no wrapped layer, no hook, no kept factor, no
product of its own. One graph leads from the loss through the dense weights into the generators.
"""

import copy
from collections.abc import Callable, Iterable, Mapping

import timm
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call

from gift import GiftConfig

GENERATORS = ("paca", "linear", "transformer", "mlp", "mixer")
Gradients = dict[str, Tensor]


def make_backbone(width: int = 32, dtype: torch.dtype = torch.float64, **changes: float) -> nn.Module:
    """Return a timm ViT with 2 blocks for 32 px images and 5 classes, always the same one, in training mode."""
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": width, "depth": 2, "num_heads": 2, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **(sizes | changes)).to(dtype)


def adapt(backbone: nn.Module, generator: str, **options: object) -> PeftModel:
    """Return the adapted backbone, with an adapter and a head that were moved away from their start."""
    dtype = next(backbone.parameters()).dtype
    of_generator = str(dtype).removeprefix("torch.")
    config = GiftConfig(generator=generator, r=4, num_clusters=6, generator_dtype=of_generator, **options)
    model = get_peft_model(backbone, config)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=noise).to(dtype))
    return model.train()


def make_images(batch: int = 4, dtype: torch.dtype = torch.float64, seed: int = 2) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)


def loss_of(logits: Tensor) -> Tensor:
    """Return a loss that is a mean over images, so that halves of a batch and processes average to the whole."""
    return logits.square().sum(dim=1).mean()


def collect(model: nn.Module) -> Gradients:
    """Return the gradients that a backward pass left, by the names of `trained`."""
    return {short_name(name): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def short_name(name: str) -> str:
    """Return the name of a trained parameter without what PEFT, DDP and torch.compile put around it."""
    for part in ("_orig_mod.", "module.", "base_model.", "model.", "modules_to_save.default."):
        name = name.replace(part, "")
    return name


def plain_gradients(
    model: PeftModel, images: Tensor, forward: Callable[[nn.Module, Mapping[str, Tensor], Tensor], Tensor] | None = None
) -> Gradients:
    """Return the gradients of an adapted model, computed without its wrapped layers.

    Args:
        model: Adapted model that nothing was wrapped around; it is not changed.
        images: The whole batch.
        forward: Backbone, replaced parameters and images in, loss out; by default the loss of the logits.
    """
    model = copy.deepcopy(model)
    source = model.base_model.gift_source
    generators = {
        name: p.requires_grad_() for name, p in model.base_model.named_parameters() if "gift_generators" in name
    }
    heads = {
        short_name(name): p
        for name, p in model.named_parameters()
        if ".modules_to_save.default." in name and p.requires_grad
    }
    weights = _adapted_weights(model)
    backbone = model.base_model.model
    layers = list(source.layers)
    for name in layers:
        parent, _, child = name.rpartition(".")
        setattr(backbone.get_submodule(parent), child, _plain_layer(backbone.get_submodule(name)))
    for name in {head.rpartition(".")[0] for head in heads}:
        parent, _, child = name.rpartition(".")
        setattr(backbone.get_submodule(parent), child, backbone.get_submodule(name).original_module)
    for handle in (backbone._forward_pre_hooks, backbone._forward_hooks):
        handle.clear()
    run = forward or (lambda net, replaced, batch: loss_of(functional_call(net, dict(replaced), (batch,))))
    trained = {short_name(name): parameter for name, parameter in generators.items()} | heads
    gradients = torch.autograd.grad(run(backbone, weights | heads, images), list(trained.values()))
    return dict(zip(trained, gradients, strict=True))


def _adapted_weights(model: PeftModel) -> dict[str, Tensor]:
    """Return W + scaling * left right of every target, as functions of the generators."""
    source = model.base_model.gift_source
    weights: dict[str, Tensor] = {}
    for group, targets in source.groups["default"].items():
        frozen = [dense(source.layers[target.layer]) for target in targets]
        factors = source.generators["default"][group](frozen)
        for target, weight, left in zip(targets, frozen, factors.left, strict=True):
            layer = source.layers[target.layer]
            scaling = layer.gift_scaling["default"]
            adapted = weight + scaling * left @ factors.right
            weights[f"{target.layer}.weight"] = adapted.T if layer.is_transposed else adapted
    return weights


def _plain_layer(layer: nn.Module) -> nn.Module:
    """Return the layer below an adapted one; for a quantised one a plain layer, whose weight will be replaced."""
    if not layer.is_quantised:
        return layer.base_layer
    plain = nn.Linear(layer.in_features, layer.out_features)
    plain.bias = layer.base_layer.bias
    return plain


def dense(layer: nn.Module) -> Tensor:
    """Return the frozen weight of an adapted layer as a matrix."""
    weight = layer.frozen_weight()
    return weight if isinstance(weight, Tensor) else weight.dense()


def largest_difference(got: Gradients, expected: Gradients) -> float:
    """Return the largest difference of any entry over the largest expected entry; infinity if a gradient is missing."""
    if got.keys() != expected.keys():
        return float("inf")
    worst = max((got[name] - expected[name]).abs().max().item() for name in expected)
    return worst / max(gradient.abs().max().item() for gradient in expected.values())


def relative_difference(got: Gradients, expected: Gradients) -> float:
    """Return the norm of the difference of all gradients over the norm of the expected ones."""
    if got.keys() != expected.keys():
        return float("inf")
    return (_flat(got) - _flat(expected)).norm().item() / _flat(expected).norm().item()


def _flat(gradients: Gradients) -> Tensor:
    ordered: Iterable[Tensor] = (gradients[name].double().flatten() for name in sorted(gradients))
    return torch.cat(list(ordered))
