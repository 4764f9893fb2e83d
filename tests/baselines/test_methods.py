import re

import pytest
from peft import LoraConfig, PeftType, VeraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, SwinConfig, SwinForImageClassification

from gift import GiftConfig
from gift.baselines.bitfit import BitFitConfig
from gift.baselines.methods import FULL, METHODS, method_config
from gift.baselines.toast import ToastConfig
from gift.baselines.vpt import VptConfig
from tests.models import make_images
from tests.training.killed_run import make_backbone

OWN_TARGETS = {"attention.o_proj"}
REFUSED = {
    "prompt_tuning": "tokens of language models; prompts of images are vpt-shallow and vpt-deep",
    "prefix_tuning": "tokens of language models",
    "adaption_prompt": "tokens of language models",
    "trainable_tokens": "tokens of language models",
    "poly": "the number of its task",
    "xlora": "trained before",
    "shadow": "language models",
}
# Types of PEFT that need options on a layer of 32 x 32.
OPTIONS = {
    "c3a": {"block_size": 8},
    "miss": {"r": 4},
    "shira": {"r": 2},
    "road": {"group_size": 8},
    "vblora": {"vector_length": 8, "num_vectors": 16, "topk": 2},
    "waveft": {"n_frequency": 64},
    "adalora": {"total_step": 10},
}
# One would compile an extension; the others are of language models, for one and the same reason.
LEFT_OUT = {"boft", "cartridge", "cpt", "multitask_prompt_tuning", "p_tuning"}


def test_every_method_has_a_configuration_of_its_kind():
    found = {name: method_config(name, make_backbone(), {}) for name in METHODS}
    assert found["linear-probe"] is None
    assert found["full"] == FULL
    kinds = {"gift": GiftConfig, "bitfit": BitFitConfig, "lora": LoraConfig, "dora": LoraConfig, "vera": VeraConfig}
    kinds |= {"vpt-shallow": VptConfig, "vpt-deep": VptConfig, "toast": ToastConfig, "toast-lite": ToastConfig}
    assert {name: type(found[name]) for name in kinds} == kinds
    assert (found["lora"].r, found["lora"].lora_alpha, found["lora"].target_modules) == (8, 8, OWN_TARGETS)
    assert [found[name].use_dora for name in ("lora", "dora")] == [False, True]
    assert [found[name].deep for name in ("vpt-shallow", "vpt-deep")] == [False, True]
    assert [found[name].lite for name in ("toast", "toast-lite")] == [False, True]
    assert found["vera"].target_modules == OWN_TARGETS


def test_options_take_the_place_of_defaults():
    config = method_config("lora", make_backbone(), {"r": 2, "target_modules": ["q_proj"], "modules_to_save": []})
    assert (config.r, config.lora_alpha, config.target_modules, config.modules_to_save) == (2, 8, {"q_proj"}, [])
    assert method_config("toast-lite", make_backbone(), {"lite": True, "reconstruct": True}).reconstruct


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT's layer norm tuning, of layer norms
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch, for PEFT's methods with sparse matrices
@pytest.mark.parametrize("name", sorted({kind.value.lower() for kind in PeftType} - set(REFUSED) - LEFT_OUT))
def test_every_other_method_of_peft_adapts_an_image_classifier(name):
    config = method_config(name, make_backbone(), OPTIONS.get(name, {}))
    model = get_peft_model(make_backbone(), config)
    model(make_images()).logits.sum().backward()
    assert any(p.grad is not None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_layer_norm_tuning_trains_the_norms():
    model = get_peft_model(make_backbone(), method_config("ln_tuning", make_backbone(), {}))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * (2 * 2 + 1)
    assert all("layernorm" in name for name in trained)


@pytest.mark.parametrize("name", REFUSED)
def test_methods_that_cannot_work_on_images_are_refused_with_the_reason(name):
    with pytest.raises(ValueError, match=f"{name} cannot train an image classifier: it .*{REFUSED[name]}"):
        method_config(name, make_backbone(), {})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lroa", {}, "There is no method 'lroa'. Did you mean 'lora'? Methods: gift, linear-probe, full, bitfit, lora"),
        ("zzzz", {}, "There is no method 'zzzz'. Methods: gift"),
        ("vpt-deep", {"num_prompt": 3}, "vpt-deep has no option 'num_prompt'. Did you mean 'num_prompts'?"),
        ("vpt-deep", {"num_prompt": 3}, "Its options: modules_to_save, num_prompts."),
        ("vpt-deep", {"deep": False}, "deep=False is not an option of vpt-deep, which is deep=True"),
        ("vpt-deep", {"num_prompts": 0}, "num_prompts must be a whole number of at least 1, got 0"),
        ("lora", {"peft_type": "VERA"}, "lora has no option 'peft_type'"),
        ("full", {"r": 3}, "full has no option 'r'. Its options: none."),
        ("linear-probe", {"r": 3}, "linear-probe has no option 'r'"),
    ],
)
def test_a_wrong_name_or_option_is_refused_with_the_near_one(name, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        method_config(name, make_backbone(), options)


def test_a_backbone_that_does_not_fit_is_refused_at_once():
    swin = SwinForImageClassification(SwinConfig(embed_dim=12, depths=(1, 1), num_heads=(1, 1), image_size=32))
    for name in ("vpt-deep", "toast"):
        with pytest.raises(ValueError, match="SwinForImageClassification holds Swin"):
            method_config(name, swin, {})
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    bert = BertForSequenceClassification(BertConfig(**small))
    bert.config.model_type = "unheard-of"
    with pytest.raises(ValueError, match="layers that lora should adapt in BertForSequenceClassification are unknown"):
        method_config("lora", bert, {})
