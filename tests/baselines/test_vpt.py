import copy
import re

import pytest
import timm
import torch
from peft import PeftModel, get_peft_model
from timm.layers.config import set_reentrant_ckpt

from gift.baselines.vpt import VptBlock, VptConfig
from tests.baselines.models import FAMILIES, WrittenOut, logits_of, make_family, make_float64_images
from tests.models import make_images, make_vit
from tests.training.killed_run import make_backbone


def make_prompted(backbone=None, **options):
    return get_peft_model(make_vit() if backbone is None else backbone, VptConfig(**options)).eval()


def prompts_of(model):
    return [p for name, p in model.named_parameters() if ".vpt_prompts." in name]


def put_in(tokens, prompts, place):
    return torch.cat([tokens[:, :place], prompts.expand(len(tokens), -1, -1), tokens[:, place:]], dim=1)


@pytest.mark.parametrize("name", FAMILIES)
def test_deep_prompts_are_new_in_every_block_and_dropped_behind_it(name):
    backbone, place = make_family(name), FAMILIES[name][1]
    written = WrittenOut(backbone)
    model = make_prompted(backbone, num_prompts=3)
    tokens = written.tokens(make_float64_images())
    for block, prompts in zip(written.blocks, prompts_of(model), strict=True):
        tokens = written.block(block, put_in(tokens, prompts, place))
        tokens = torch.cat([tokens[:, :place], tokens[:, place + 3 :]], dim=1)
    torch.testing.assert_close(logits_of(model(make_float64_images())), written.head(tokens))


@pytest.mark.parametrize("name", FAMILIES)
def test_shallow_prompts_go_through_all_blocks_and_leave_before_the_head(name):
    backbone, place = make_family(name), FAMILIES[name][1]
    written = WrittenOut(backbone)
    model = make_prompted(backbone, num_prompts=3, deep=False)
    [prompts] = prompts_of(model)
    tokens = put_in(written.tokens(make_float64_images()), prompts, place)
    for block in written.blocks:
        tokens = written.block(block, tokens)
    tokens = torch.cat([tokens[:, :place], tokens[:, place + 3 :]], dim=1)
    torch.testing.assert_close(logits_of(model(make_float64_images())), written.head(tokens))


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_stand_behind_the_tokens_that_are_no_patches(name):
    model, seen = make_prompted(make_family(name), num_prompts=3), []
    block = next(module for module in model.modules() if isinstance(module, VptBlock))
    block.base_layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(make_float64_images())
    prompts, place = prompts_of(model)[0], FAMILIES[name][1]
    assert torch.equal(seen[0][:, place : place + 3], prompts.expand(2, -1, -1))
    assert seen[0].shape[1] == place + 3 + 16


@pytest.mark.parametrize(("deep", "count"), [(True, 12 * 5 * 768), (False, 5 * 768)])
def test_as_many_weights_are_trained_as_published(deep, count):
    with torch.device("meta"):
        backbone = timm.create_model("vit_base_patch16_224", num_classes=100)
    model = make_prompted(backbone, deep=deep)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == count + 100 * 769


def test_prompts_start_uniform_within_the_published_bound():
    prompts = torch.cat(prompts_of(make_prompted(num_prompts=200)))
    bound = (6 / (3 * 8 * 8 + 32)) ** 0.5
    assert bound * 0.99 < prompts.abs().max() <= bound
    assert abs(prompts.mean()) < 0.01
    assert abs(prompts.std() - bound / 3**0.5) < 0.01


@pytest.mark.parametrize("deep", [True, False])
def test_gradients_reach_the_prompts_and_the_head_and_nothing_else(deep):
    model = make_prompted(deep=deep).train()
    model(make_images()).square().sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().min() > 0}
    assert reached == {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[-1 if "vpt" in name else -2] for name in reached} == {"default"}
    assert len(reached) == 2 + (2 if deep else 1)


def test_the_encoder_stays_in_eval_mode_while_training():
    model = make_prompted(make_backbone())  # with dropout
    expected = model(make_images()).logits
    assert torch.equal(model.train()(make_images()).logits, expected)
    assert model.training
    assert model.base_model.model.classifier.modules_to_save["default"].training
    model.eval()
    assert not any(module.training for module in model.modules())


def gradients(model, images):
    model.zero_grad()
    logits_of(model.train()(images)).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("deep", [True, False])
def test_checkpointing_in_transformers_gives_the_same_gradients_with_less_kept(use_reentrant, deep):
    model, calls = make_prompted(make_backbone(), deep=deep), []
    expected = gradients(model, make_images())
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    model.base_model.model.vit.layers[1].base_layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(gradients(model, make_images()), expected)
    assert len(calls) == 2  # the second time in the backward pass


def test_checkpointing_in_timm_gives_the_same_gradients_unless_it_is_reentrant():
    model = make_prompted()
    expected = gradients(model, make_images())
    model.base_model.model.set_grad_checkpointing(True)
    torch.testing.assert_close(gradients(model, make_images()), expected)
    set_reentrant_ckpt(True)
    try:
        with pytest.raises(ValueError, match="Reentrant checkpointing would pass no gradients"):
            model.train()
    finally:
        set_reentrant_ckpt(False)


def test_disabled_prompts_leave_the_plain_backbone_and_come_back():
    expected = make_vit()(make_images())
    model = make_prompted()
    prompted = model(make_images())
    with model.disable_adapter():
        assert torch.equal(model(make_images()), expected)
    assert torch.equal(model(make_images()), prompted)
    assert not torch.equal(prompted, expected)


def test_unloading_gives_back_the_blocks_and_merging_is_refused():
    names = [name for name, _ in make_vit().named_modules()]
    model = make_prompted()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="VPT cannot be merged into the weights"):
            merge()
    unloaded = model.unload()
    assert [name for name, _ in unloaded.named_modules()] == names
    assert torch.equal(unloaded(make_images()), make_vit()(make_images()))


@pytest.mark.parametrize("few_memory", [True, False])
@pytest.mark.parametrize("deep", [True, False])
def test_a_stored_adapter_reloads_to_the_same_bits_under_any_name(deep, few_memory, tmp_path):
    model = make_prompted(deep=deep)
    torch.nn.init.normal_(model.base_model.model.head.modules_to_save["default"].weight)
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(make_vit(), str(tmp_path), adapter_name="other", low_cpu_mem_usage=few_memory)
    assert torch.equal(again(make_images()), model(make_images()))
    assert not any(p.requires_grad for p in again.parameters())


def test_an_adapter_for_other_blocks_is_refused_when_it_is_loaded(tmp_path):
    make_prompted().save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=re.escape("has shape (5, 32), this model needs (5, 48)")):
        PeftModel.from_pretrained(make_vit(embed_dim=48), str(tmp_path))
    with pytest.raises(ValueError, match=r"blocks\.2\.vpt_prompts\.default is missing"):
        PeftModel.from_pretrained(make_vit(depth=3), str(tmp_path))


def test_a_copy_is_a_model_of_its_own():
    model = make_prompted()
    expected, twin = model(make_images()), copy.deepcopy(model)
    assert torch.equal(twin(make_images()), expected)
    torch.nn.init.zeros_(prompts_of(twin)[0])
    assert not torch.equal(twin(make_images()), expected)
    assert torch.equal(model(make_images()), expected)


def test_a_mask_made_for_the_tokens_without_prompts_is_refused():
    model = make_prompted()
    with pytest.raises(ValueError, match="VPT adds tokens, so an attention mask does not fit"):
        model(make_images(), attn_mask=torch.zeros(17, 17))
    with model.disable_adapter():
        model(make_images(), attn_mask=torch.zeros(17, 17))
    in_transformers = make_prompted(make_backbone())
    with pytest.raises(ValueError, match="VPT adds tokens"):
        in_transformers(make_images(), attention_mask=torch.ones(2, 17).tril())
    in_transformers(make_images(), num_items_in_batch=torch.tensor(2))  # from Trainer


def test_prompts_are_trained_in_full_precision_beside_a_backbone_in_half():
    model = make_prompted(make_vit().to(torch.bfloat16))
    assert {p.dtype for p in prompts_of(model)} == {torch.float32}
    assert model(make_images().to(torch.bfloat16)).dtype == torch.bfloat16


def test_an_option_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="num_prompts must be a whole number of at least 1, got 0"):
        VptConfig(num_prompts=0)
    config = VptConfig()
    config.deep = "yes"
    with pytest.raises(ValueError, match="deep must be True or False, got 'yes'"):
        config.__post_init__()
