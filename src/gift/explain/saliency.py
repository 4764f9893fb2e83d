"""The maps that other methods draw of an image classifier, as controls for cluster maps.

Attention rollout (Abnar and Zuidema 2020, arXiv 2005.00928) follows attention back to the patches, for no class at all.
Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391) weights the channels of a layer by the gradient of one class.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pytorch_grad_cam.grad_cam import GradCAM
from torch import Tensor, nn

from gift.backbones import default_targets, find_family, patch_grid, prefix_tokens
from gift.baselines.toast import ToastModel
from gift.explain.capture import evaluating

IMAGES_PER_PASS = 32
Images = Float[Tensor, "batch 3 height width"]
Attention = Float[Tensor, "batch tokens tokens"]


@torch.no_grad()
def attention_rollout(model: nn.Module, images: Images) -> Float[np.ndarray, "batch blocks rows columns"]:
    """Return how much of every patch attention has carried to the class token, after each block.

    Attention is averaged over heads, the identity is added for the residual connection, rows are divided by their sums,
    and each block multiplies those before it. Without a class token the map is the mean of what all patches receive.

    Args:
        model: A timm or transformers ViT, plain or in a `PeftModel`; it is left as it was.
        images: What the model takes: normalised pixels, on any device.

    Raises:
        ValueError: If the model is not a ViT with one attention of all tokens per block.
    """
    backbone, prefix, grid = _find_patches(model, images)
    attentions = _find_attentions(backbone)
    has_class_token = prefix > 0 and getattr(backbone, "cls_token", True) is not None
    receivers = slice(0, 1) if has_class_token else slice(prefix, None)
    maps = []
    for part in images.split(IMAGES_PER_PASS):
        with evaluating(model), _recorded_probabilities(attentions) as recorded:
            model(part.to(next(model.parameters()).device))
        received = [rollout[:, receivers].mean(dim=1).unsqueeze(2) for rollout in _rollouts(recorded)]
        maps.append(torch.cat([_on_grid(tokens, prefix, grid) for tokens in received], dim=1).cpu())
    return torch.cat(maps).numpy()


def grad_cam(
    model: nn.Module, images: Images, layer_names: Sequence[str], classes: Sequence[int] | None = None
) -> Float[np.ndarray, "batch layers classes rows columns"]:
    """Return the Grad-CAM of layers: channels weighted by their mean gradient over the patches, summed, negatives cut.

    Maps are not scaled, so those of one layer can be compared across images and classes. Behind its last attention a
    model that classifies by the class token has zero gradients in all patches: choose an earlier layer.

    Args:
        model: An image classifier of timm or transformers, plain or in a `PeftModel`; it is left as it was.
        images: What the model takes: normalised pixels, on any device.
        layer_names: Dotted names in `model` of layers that put out (batch, tokens, channels).
        classes: The classes to explain, the same for all images; None for the one that each image is predicted as.

    Raises:
        ValueError: If there is no such layer or class, the tokens of a layer are not the grid of patches, or the layer
            does not run exactly once on the way from the images to the logits.
    """
    _, prefix, grid = _find_patches(model, images)
    modules = dict(model.named_modules(remove_duplicate=False))
    unknown = [name for name in layer_names if name not in modules]
    if unknown or not layer_names:
        similar = [match for name in unknown for match in get_close_matches(name, modules, cutoff=0.4)]
        raise ValueError(f"{type(model).__name__} has no layers {unknown}: name at least one it has, as {similar}.")
    layers = [modules[name] for name in layer_names]
    maps = []
    for part in images.to(next(model.parameters()).device).split(IMAGES_PER_PASS):
        with evaluating(model), torch.enable_grad():
            maps.append(_class_maps(model, layers, part, classes, lambda out: _on_grid(out, prefix, grid)))
    return np.concatenate(maps)


def _class_maps(
    model: nn.Module,
    layers: Sequence[nn.Module],
    images: Images,
    classes: Sequence[int] | None,
    on_grid: Callable[[Any], Tensor],
) -> Float[np.ndarray, "batch layers classes rows columns"]:
    # Calling GradCAM would scale each map to 0..1 and to the pixels of its image, clear the gradients of all parameters
    # and, of several layers, pair activations with gradients by the order in which they come. Hence one for each layer.
    images = images.detach().requires_grad_()
    with ExitStack() as stack:
        cams = [GradCAM(model, [layer], on_grid) for layer in layers]
        for cam in cams:
            stack.callback(cam.activations_and_grads.release)
        by_class = []
        for scores in _scores(model(images), classes):
            for cam in cams:
                cam.activations_and_grads.gradients = []
            torch.autograd.grad(scores.sum(), images, retain_graph=True)  # into no parameter's `.grad`
            by_class.append(np.stack([_class_map(cam, images) for cam in cams], axis=1))
    return np.stack(by_class, axis=2)


def _scores(answer: Any, classes: Sequence[int] | None) -> Sequence[Float[Tensor, " batch"]]:
    logits = answer if isinstance(answer, Tensor) else getattr(answer, "logits", None)
    if logits is None or logits.ndim != 2:
        raise ValueError(f"Grad-CAM needs an image classifier, which gives logits; got {type(answer).__name__}.")
    if classes is None:
        return [logits.max(dim=1).values]
    if not classes or not all(0 <= index < logits.shape[1] for index in classes):
        raise ValueError(f"`classes` must name some of the classes 0 to {logits.shape[1] - 1}, got {list(classes)}.")
    return [logits[:, index] for index in classes]


def _class_map(cam: GradCAM, images: Images) -> Float[np.ndarray, "batch rows columns"]:
    record, layer = cam.activations_and_grads, cam.target_layers[0]
    if len(record.gradients) != 1:
        raise ValueError(
            f"The logits have {len(record.gradients)} gradients in this layer instead of one: {layer}. Choose a layer "
            "that runs once on the way from the images to the logits."
        )
    activations, gradients = record.activations[0].numpy(), record.gradients[0].numpy()
    return np.maximum(cam.get_cam_image(images, layer, [], activations, gradients), 0)


def _find_patches(model: nn.Module, images: Images) -> tuple[nn.Module, int, tuple[int, int]]:
    """Return the backbone, the number of its prefix tokens and its grid of patches, the same in all blocks."""
    if any(isinstance(module, ToastModel) for module in model.modules()):
        raise ValueError("TOAST runs the backbone twice, and a map would mix both passes: explain another model.")
    found = find_family(model)
    if found is not None and found[1].hierarchical:
        raise ValueError(
            f"{type(model).__name__} ({found[1].name}) attends inside windows, on a grid that shrinks from stage to "
            "stage, so it has no such map. Pass a model that keeps one grid of patches, as a ViT does."
        )
    prefix, grid = prefix_tokens(model), patch_grid(model, images.shape[2], images.shape[3])  # refuse unknown models
    return model.get_submodule(found[0] if found else ""), prefix, grid


def _on_grid(output: Any, prefix: int, grid: tuple[int, int]) -> Float[Tensor, "batch channels rows columns"]:
    if not isinstance(output, Tensor) or output.ndim != 3 or output.shape[1] != prefix + grid[0] * grid[1]:
        came = f"{type(output).__name__} of shape {tuple(getattr(output, 'shape', ()))}"
        tokens = f"{prefix} prefix and {grid[0]} x {grid[1]} patch tokens"
        raise ValueError(
            f"Expected (batch, tokens, channels) with {tokens}, got a {came}: choose a layer that puts out all tokens, "
            "and images of the size that the model takes."
        )
    # A copy, as later layers may write into the output. In single precision, as NumPy has no bfloat16.
    return output[:, prefix:].mT.unflatten(2, grid).to(torch.float32, copy=True)


def _find_attentions(backbone: nn.Module) -> list[nn.Module]:
    """Return the attentions of a backbone: the parents of the projections that are GIFT's targets."""
    targets = tuple(f".{target}" for target in default_targets(backbone) or ())
    names = [name.rpartition(".")[0] for name, _ in backbone.named_modules() if f".{name}".endswith(targets)]
    # The number of the block is the only one in a name, unless the block runs several branches side by side.
    if not names or any(sum(part.isdigit() for part in name.split(".")) > 1 for name in names):
        raise ValueError(f"Rollout needs one attention per block; {type(backbone).__name__} has {names}: pass another.")
    return [backbone.get_submodule(name) for name in names]


@contextmanager
def _recorded_probabilities(attentions: Sequence[Any]) -> Iterator[list[Attention]]:
    """Yield a list to which every attention that runs adds its probabilities, averaged over heads."""
    recorded: list[Tensor] = []

    def record(attention: Any, found: Tensor | None) -> None:
        if found is None or found.shape[1] != getattr(attention, "num_heads", found.shape[1]):
            raise ValueError(f"{type(attention).__name__} does not give one attention per head: pass another ViT.")
        recorded.append(found.float().mean(dim=1))

    with ExitStack() as stack:
        for attention in attentions:
            # timm passes the probabilities through dropout unless a kernel is fused; eager transformers return them.
            if hasattr(attention, "fused_attn"):
                switch, key, value = attention, "fused_attn", False
                hook = attention.attn_drop.register_forward_hook(lambda _, args, output, a=attention: record(a, output))
            else:
                switch, key, value = attention.config, "_attn_implementation", "eager"
                hook = attention.register_forward_hook(lambda module, args, output: record(module, output[1]))
            stack.callback(hook.remove)
            stack.callback(setattr, switch, key, getattr(switch, key))
            setattr(switch, key, value)
        yield recorded


def _rollouts(attentions: Sequence[Attention]) -> Iterator[Attention]:
    """Yield, after each block, how much of every token (in columns) each token (in rows) has received."""
    identity = carried = torch.eye(attentions[0].shape[-1], device=attentions[0].device)
    for attention in attentions:
        mixed = attention + identity
        carried = mixed / mixed.sum(dim=-1, keepdim=True) @ carried
        yield carried
