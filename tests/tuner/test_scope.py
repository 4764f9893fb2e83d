"""When factors are generated: once per forward, not again while nothing changed, never stale."""

import copy
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from gift import GiftConfig, GiftLinear
from gift.tuner.generator import WeightGenerator
from gift.tuner.scope import FactorSource
from gift.tuner.weights import probe_weight
from tests.models import make_adapted_vit, make_images, make_vit, perturb


@pytest.fixture
def calls(monkeypatch):
    """Count calls of any generator, as the number of weights each was given."""
    counted, forward = [], WeightGenerator.forward

    def counting(self, weights):
        counted.append(len(weights))
        return forward(self, weights)

    monkeypatch.setattr(WeightGenerator, "forward", counting)
    return counted


def gradients(model, images):
    model.zero_grad()
    model(images).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_training_forward_generates_all_layers_as_one_batch(calls):
    model, images = make_adapted_vit().train(), make_images()
    model(images)
    model.base_model.model(images)
    assert calls == [2, 2]


def test_without_gradients_factors_are_generated_once_until_something_changes(calls):
    model, images = make_adapted_vit(), make_images()
    with torch.no_grad():
        model(images)
        model(images)
    with torch.inference_mode():
        model(images)
    with torch.no_grad():
        model(images)
        model.base_model.model.forward_features(images)
    assert calls == [2]


@torch.no_grad()
def test_every_write_to_a_generator_changes_the_output_also_through_data():
    model, images = make_adapted_vit(), make_images()
    for name, parameter in model.base_model.gift_generators.named_parameters():
        before = model(images)
        parameter.data.mul_(1.5).add_(0.1)
        assert not torch.equal(model(images), before), name


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_write_to_any_single_entry_of_a_frozen_weight_is_noticed(dtype):
    layer = GiftLinear(nn.Linear(768, 4).to(dtype), "layer", FactorSource(nn.ModuleDict()))
    before = probe_weight(layer.frozen_weight())
    for column in range(768):
        entry = layer.weight[column % 4, column].item()
        layer.weight.data[column % 4, column] = entry + max(abs(entry), 1e-3) / 16
        assert not torch.equal(probe_weight(layer.frozen_weight()), before), column
        layer.weight.data[column % 4, column] = entry


@torch.no_grad()
@pytest.mark.parametrize("apply", ["factored", "dense"])
def test_a_write_to_a_frozen_weight_changes_the_output_also_through_data(apply):
    model, images = make_adapted_vit(apply=apply), make_images()
    model(images)
    weight = model.base_model.model.blocks[0].attn.proj.base_layer.weight
    weight.data[[0, 1]] = weight.data[[1, 0]]
    after = model(images)
    fresh = copy.deepcopy(model)
    assert torch.equal(fresh(images), after)


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.base_model.set_scale("default", 3.0),
        lambda m: m.set_adapter("second"),
        lambda m: m.base_model.set_adapter(["default", "second"]),
        lambda m: m.delete_adapter("default"),
        lambda m: m.base_model.disable_adapter_layers(),
    ],
)
@pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted")
def test_every_change_of_the_adapters_in_effect_is_seen(change):
    model, images = make_adapted_vit(modules_to_save=[]), make_images()
    model.add_adapter("second", GiftConfig(r=2, num_clusters=3, modules_to_save=[]))
    perturb(model, "second", std=0.3)
    before = model(images)
    change(model)
    after = model(images)
    assert not torch.equal(after, before)
    assert torch.allclose(copy.deepcopy(model)(images), after, atol=1e-6)


@torch.no_grad()
def test_changing_the_dtype_of_the_backbone_is_seen():
    model, images = make_adapted_vit(), make_images()
    before = model(images)
    after = model.double()(images.double())
    assert after.dtype == torch.float64
    assert (after - before).abs().max() < 1e-5
    assert not torch.equal(after.float(), before)


def test_training_after_evaluation_and_evaluation_after_training_are_not_stale():
    model, images = make_adapted_vit(), make_images()
    with torch.no_grad():
        before = model(images)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    model(images).sum().backward()
    optimizer.step()
    model.eval()
    with torch.no_grad():
        after = model(images)
    assert not torch.equal(after, before)
    assert torch.allclose(model(images), after, atol=1e-6)


def test_submodules_called_directly_give_the_same_output_and_gradients():
    model, images = make_adapted_vit(), make_images()
    inner = model.base_model.model
    expected = gradients(model, images)
    model.zero_grad()
    inner.forward_head(inner.forward_features(images)).square().sum().backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            assert torch.allclose(parameter.grad, expected[name], atol=1e-5), name


@pytest.mark.parametrize("generator", ["paca", "linear"])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_gradients_with_checkpointing_are_those_without(use_reentrant, generator):
    model, images = make_adapted_vit(generator=generator).double(), make_images().double().requires_grad_()
    expected = gradients(model, images)
    for block in model.base_model.model.blocks:
        forward = block.forward
        block.forward = lambda x, f=forward: checkpoint(f, x, use_reentrant=use_reentrant)
    got = gradients(model, images)
    assert got.keys() == expected.keys()
    assert max((got[name] - expected[name]).abs().max() for name in got) < 1e-10


def test_reentrant_checkpointing_on_several_processes_raises_instead_of_giving_wrong_gradients(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    model, images = make_adapted_vit(), make_images().requires_grad_()
    for block in model.base_model.model.blocks:
        block.forward = lambda x, f=block.forward: checkpoint(f, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="Use non-reentrant checkpointing"):
        model(images)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_gradients_that_a_later_forward_would_lose_to_reentrant_checkpointing_raise():
    model, images = make_adapted_vit(), make_images().requires_grad_()
    blocks = model.base_model.model.blocks
    plain = [block.forward for block in blocks]
    for block, forward in zip(blocks, plain, strict=True):
        block.forward = lambda x, f=forward: checkpoint(f, x, use_reentrant=True)
    loss = model(images).square().sum()
    for block, forward in zip(blocks, plain, strict=True):
        block.forward = forward
    model(images)
    with pytest.raises(RuntimeError, match="gradients of the generator would be lost"):
        loss.backward()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_that_would_pass_no_gradients_raises_in_the_backward_pass():
    model, images = make_adapted_vit(), make_images()
    for block in model.base_model.model.blocks:
        block.forward = lambda x, f=block.forward: checkpoint(f, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="passed no gradients to the adapted layers"):
        model(images).square().sum().backward()
    model(images.requires_grad_()).square().sum().backward()
    assert all(p.grad is not None for p in model.base_model.gift_generators.parameters())


@pytest.mark.parametrize("order", [("teacher", "pupil"), ("pupil", "teacher")])
def test_a_model_that_teaches_itself_without_gradients_has_the_gradients_of_the_pupil(order):
    class TeachesItself(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = make_vit()

        def forward(self, x):
            outputs = {}
            for who in order:
                with torch.set_grad_enabled(who == "pupil"):
                    outputs[who] = self.vit(x.flip(-1) if who == "teacher" else x)
            return (outputs["pupil"] - outputs["teacher"]).square().sum()

    model = perturb(get_peft_model(TeachesItself().double(), GiftConfig(r=4, num_clusters=6, modules_to_save=[])))
    images, vit = make_images().double(), model.base_model.model.vit
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = (vit(images) - vit(images.flip(-1)).detach()).square().sum()  # each layer generates for itself
    expected = torch.autograd.grad(loss, trained)
    got = torch.autograd.grad(model(images), trained)
    assert all(torch.allclose(one, other, rtol=1e-4) for one, other in zip(got, expected, strict=True))


def test_a_weight_that_is_offloaded_is_refused_with_a_reason():
    adapted = cpu_offload(make_adapted_vit(), execution_device=torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"weight of blocks\.0\.attn\.proj is offloaded"):
        adapted(make_images())
    backbone = cpu_offload(make_vit(), execution_device=torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"weight of blocks\.0\.attn\.proj is offloaded"):
        get_peft_model(backbone, GiftConfig(r=2))


def test_on_the_meta_device_shapes_can_be_checked():
    with torch.device("meta"):
        model = get_peft_model(make_vit(), GiftConfig(r=2))
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 5)


def test_two_forwards_before_one_backward_add_up():
    model, images, others = make_adapted_vit().double(), make_images().double(), make_images(seed=5).double()
    one, other = gradients(model, images), gradients(model, others)
    model.zero_grad()
    (model(images).square().sum() + model(others).square().sum()).backward()
    for name, parameter in model.named_parameters():
        if name in one:
            assert (parameter.grad - one[name] - other[name]).abs().max() < 1e-10, name


def test_the_first_forward_raises_if_an_adapted_layer_is_never_called():
    class ReadsWeight(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return nn.functional.linear(self.used(x), self.unused.weight)

    config = GiftConfig(target_modules=["used", "unused"], r=2, modules_to_save=[])
    model = get_peft_model(ReadsWeight(), config)
    with pytest.raises(RuntimeError, match="did not call these adapted layers: unused"):
        model(torch.randn(1, 4))


@pytest.mark.parametrize("steps", [1, 3])
def test_layers_that_are_called_in_training_but_read_directly_in_evaluation_raise_there(steps):
    encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    stack = nn.TransformerEncoder(encoder, 1)
    model = get_peft_model(nn.Sequential(stack), GiftConfig(target_modules=["linear1"], r=2, modules_to_save=[]))
    x = torch.randn(2, 5, 16)
    for _ in range(steps):
        model.train()(x)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"did not call these adapted layers: 0\.layers"):
        model.eval()(x)


def test_a_frozen_adapter_is_not_generated_again_although_gradients_are_enabled(calls):
    model, images = make_adapted_vit(), make_images().requires_grad_()
    expected = torch.autograd.grad(model(images).square().sum(), images)[0]
    calls.clear()
    model.requires_grad_(False)
    with torch.inference_mode():
        model(images)
    for _ in range(3):
        got = torch.autograd.grad(model(images).square().sum(), images)[0]
        assert torch.allclose(got, expected, atol=1e-4)
    assert calls == [2]


def test_a_forward_that_raises_leaves_nothing_behind():
    model, images = make_adapted_vit(), make_images()
    expected = model(images)
    with pytest.raises(AssertionError, match="Input"):
        model(torch.randn(1, 3, 8, 8))
    assert not model.base_model.gift_source._scopes
    assert torch.equal(model(images), expected)


@torch.no_grad()
def test_a_forward_that_is_interrupted_from_the_keyboard_leaves_no_factors_behind():
    def interrupt(*_):
        raise KeyboardInterrupt

    model, images = make_adapted_vit(), make_images()
    handle = model.base_model.model.blocks[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(images)
    handle.remove()
    perturb(model, seed=11)
    inner = model.base_model.model
    assert torch.equal(inner.forward_head(inner.forward_features(images)), copy.deepcopy(model)(images))


def test_an_evaluation_in_another_thread_does_not_take_the_gradients_of_a_training_forward():
    model, images = make_adapted_vit().double(), make_images().double()
    expected = gradients(model, images)

    def evaluate_elsewhere(*_):
        with torch.no_grad():
            thread = threading.Thread(target=model.base_model.model, args=(images,))
            thread.start()
            thread.join()

    handle = model.base_model.model.blocks[0].register_forward_pre_hook(
        lambda *_: evaluate_elsewhere() if threading.current_thread() is threading.main_thread() else None
    )
    got = gradients(model, images)
    handle.remove()
    assert got.keys() == expected.keys()
    assert max((got[name] - expected[name]).abs().max() for name in got) < 1e-10


@pytest.mark.parametrize("options", [{}, {"recover_bias": True}])
def test_a_step_between_forward_and_backward_raises_instead_of_giving_wrong_gradients(options):
    model, images = make_adapted_vit(**options), make_images()
    loss = model(images).sum()
    perturb(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_whole_and_independent(clone):
    model, images = make_adapted_vit(), make_images()
    with torch.no_grad():
        expected = model(images)
        twin = clone(model)
        perturb(model, seed=9)
        assert torch.equal(twin(images), expected)
        assert not torch.equal(model(images), expected)
        perturb(twin, seed=9)
        assert torch.equal(twin(images), model(images))


def test_generating_text_calls_the_generator_once_for_all_tokens(calls):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 16}
    backbone = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=1, **sizes)).eval()
    model = perturb(get_peft_model(backbone, GiftConfig(r=2, task_type="CAUSAL_LM"))).eval()
    tokens = model.generate(input_ids=torch.tensor([[1, 2, 3]]), max_new_tokens=10, min_new_tokens=10, do_sample=False)
    assert tokens.shape == (1, 13)
    assert calls == [2]


@torch.no_grad()
def test_a_layer_called_before_the_whole_model_does_not_vouch_for_the_others():
    model, images = make_adapted_vit(), make_images()
    inner = model.base_model.model
    model(images)
    inner.blocks[1].attn.proj.base_layer.weight.data.mul_(2)
    with model.base_model.gift_source.pin():
        inner.blocks[0](torch.randn(1, 17, 32))
        after = inner(images)
    assert torch.equal(copy.deepcopy(model)(images), after)


def test_switching_the_mode_between_forward_and_backward_does_not_disturb_checkpointing():
    model, images = make_adapted_vit().double(), make_images().double()
    expected = gradients(model, images)
    for block in model.base_model.model.blocks:
        block.forward = lambda x, f=block.forward: checkpoint(f, x, use_reentrant=False)
    model.zero_grad()
    loss = model(images).square().sum()
    model.train().eval()
    loss.backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            assert (parameter.grad - expected[name]).abs().max() < 1e-10, name


def test_reading_features_without_gradients_before_the_backward_pass_does_not_disturb_checkpointing():
    model, images = make_adapted_vit(generator="linear").double(), make_images().double()
    expected = gradients(model, images)
    for block in model.base_model.model.blocks:
        block.forward = lambda x, f=block.forward: checkpoint(f, x, use_reentrant=False)
    model.zero_grad()
    loss = model(images).square().sum()
    with torch.no_grad():
        model.base_model.model.forward_features(images)
    loss.backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            assert (parameter.grad - expected[name]).abs().max() < 1e-10, name


@pytest.mark.slow
def test_models_and_blocks_that_are_compiled_give_the_same_gradients():
    # In a process of its own: the shape checks of this test suite break graphs.
    script = Path(__file__).parents[1] / "compile_models.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("largest difference") == 4


def test_kept_factors_are_freed_when_training_goes_on():
    model, images = make_adapted_vit(), make_images()
    with torch.no_grad():
        model(images)
    assert model.base_model.gift_source._kept
    model.train()
    assert not model.base_model.gift_source._kept


def test_an_untouched_backbone_is_not_slowed_by_adapters_that_are_switched_off(calls):
    model, images = make_adapted_vit(modules_to_save=[]), make_images()
    with model.disable_adapter():
        assert torch.equal(model(images), make_vit()(images))
    assert calls == []
