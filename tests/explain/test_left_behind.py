"""Explaining leaves a model, and the memory of the machine, as they were."""

import psutil
import pytest
import torch
from peft import get_peft_model

from gift import GiftConfig
from gift.explain import Reading, explain_images, recording_maps, token_statistics
from gift.explain.ranking import stability_under_augmentation
from gift.explain.removal import logit_drops
from tests.models import make_adapted_vit, make_images, make_vit, perturb


def state_of(model):
    """Return everything that explaining may change and must not."""
    modules = dict(model.named_modules())
    layers = model.base_model.gift_source.layers.values()
    return {
        "hooks": {name: [len(hooks) for hooks in hooks_of(module)] for name, module in modules.items()},
        "modes": {name: module.training for name, module in modules.items()},
        "flags": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [parameter.grad for parameter in model.parameters()],
        "adapters": (
            model.active_adapters,
            model.base_model.active_adapters,
            [layer.disable_adapters for layer in layers],
        ),
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "weights": [parameter._version for parameter in model.parameters()],
    }


def hooks_of(module):
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
        module._forward_hooks_with_kwargs,
        module._forward_pre_hooks_with_kwargs,
    )


def make_model():
    model = make_adapted_vit().train()
    model.base_model.model.blocks[0].eval()
    model.add_adapter("other", GiftConfig(r=4, num_clusters=3))
    return model


def record(model, images, **options):
    with recording_maps(model, **options):
        model(images)


CALLS = {
    "explain_images": explain_images,
    "before adaptation": lambda model, images: explain_images(model, images, reading=Reading(adapted=False)),
    "recording_maps": record,
    "token_statistics": token_statistics,
    "stability": stability_under_augmentation,
    "logit_drops": lambda model, images: logit_drops(model, images, torch.ones(2, 1, 4, 4).bool().numpy()),
}


@pytest.mark.parametrize("call", CALLS)
def test_the_model_is_as_it_was(call):
    model = make_model()
    before = state_of(model)
    CALLS[call](model, make_images())
    assert state_of(model) == before


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("block", [0, 1])
def test_the_model_is_as_it_was_also_when_its_forward_raises(call, block, monkeypatch):
    model = make_model()
    before = state_of(model)

    def fail(*args, **kwargs):
        raise RuntimeError("no forward today")

    with monkeypatch.context() as patched:
        patched.setattr(type(model.base_model.model.blocks[block].mlp), "forward", fail)
        with pytest.raises(RuntimeError, match="no forward today"):
            CALLS[call](model, make_images())
    assert state_of(model) == before


def test_the_model_is_as_it_was_also_after_an_interrupt():
    model = make_model()
    before = state_of(model)

    def batches():
        yield make_images()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        explain_images(model, batches())
    assert state_of(model) == before


def test_the_memory_stays_flat_over_a_thousand_images_that_are_streamed(tmp_path):
    backbone = make_vit(img_size=64)
    model = perturb(get_peft_model(backbone, GiftConfig(r=4, num_clusters=96))).eval()
    process, seen = psutil.Process(), []

    def batches():
        for _ in range(50):
            seen.append(process.memory_info().rss)
            yield torch.randn(20, 3, 64, 64)

    found = explain_images(model, batches(), out=tmp_path)
    assert found.maps.shape == (1000, 2, 96, 8, 8)
    size = 4 * found.maps.size  # bytes
    assert max(seen[10:]) - seen[10] < size / 5
