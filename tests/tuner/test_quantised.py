"""Backbones quantised by bitsandbytes and torchao: right gradients, nothing kept dense, original bytes restored.

Run by `make test-all` with both packages; without them everything here is skipped.
"""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, TorchAoConfig

from gift import GiftConfig, GiftLinear
from gift.tuner.scope import FactorSource
from gift.tuner.weights import QuantisedWeight
from tests.models import make_images, make_vit, perturb

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (make test-all installs it)")
quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed (make test-all does it)")

pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`(is_gradient_checkpointing|gradient_checkpointing_)"),
    pytest.mark.filterwarnings("ignore:Merging quantises the merged weights again"),
]
KINDS = ("8 bit", "4 bit", "torchao")
every_kind = pytest.mark.parametrize("kind", KINDS)
every_generator = pytest.mark.parametrize("generator", ["paca", "linear", "transformer", "mlp", "mixer"])
TOKENS = torch.tensor([[1, 5, 7, 9, 2, 8], [3, 4, 6, 1, 0, 2]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny LLaMA on disk, as wide as one block of 64 4-bit numbers."""
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64}
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=50, num_key_value_heads=2, **sizes)).save_pretrained(path)
    return path


def load(folder, kind):
    """Load the LLaMA as users do: quantised while it is read."""
    four_bit = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "float32"}
    config = {
        "8 bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
        "4 bit": lambda: BitsAndBytesConfig(load_in_4bit=True, **four_bit),
        "torchao": lambda: TorchAoConfig(quantization.Int8WeightOnlyConfig()),
    }[kind]()
    options = {"quantization_config": config, "dtype": torch.float32, "device_map": "cpu"}
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def adapt(folder, kind, **options):
    config = GiftConfig(**({"r": 4, "num_clusters": 6, "task_type": "CAUSAL_LM"} | options))
    return perturb(get_peft_model(load(folder, kind), config), std=0.2).eval()


def layers_of(model):
    return {layer.gift_name: layer for layer in model.modules() if isinstance(layer, GiftLinear)}


def raw_bytes(model):
    return [tensor.clone() for layer in layers_of(model).values() for tensor in layer.frozen_weight().raw()]


def dense_twin(model, folder):
    """Return the same adapted model with the dequantised weights in plain layers."""
    twin = AutoModelForCausalLM.from_pretrained(folder)
    quantised = model.base_model.model
    for name, module in twin.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            layer = quantised.get_submodule(name)
            adapted = layer if isinstance(layer, GiftLinear) else GiftLinear(layer, name, model.base_model.gift_source)
            module.weight.data = adapted.frozen_weight().dense().clone()
    twin = get_peft_model(twin, copy.deepcopy(model.peft_config["default"])).eval()
    twin.base_model.gift_generators.load_state_dict(model.base_model.gift_generators.state_dict())
    return twin


def gradients(model):
    model.zero_grad()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@every_generator
@every_kind
def test_gradients_and_outputs_are_those_of_the_dequantised_weights(folder, kind, generator):
    model = adapt(folder, kind, generator=generator, target_modules=["q_proj", "v_proj", "o_proj"])
    twin = dense_twin(model, folder)
    tolerance = 0.02 if kind == "8 bit" else 1e-4  # 8-bit layers quantise their inputs, too
    with torch.no_grad():
        logits, expected = model(input_ids=TOKENS).logits, twin(input_ids=TOKENS).logits
    assert (logits - expected).norm() <= tolerance * expected.norm()
    got, expected = gradients(model), gradients(twin)
    assert (got - expected).norm() <= tolerance * expected.norm()


@every_kind
def test_training_after_an_evaluation_has_the_gradients_of_training_before_it(folder, kind):
    model = adapt(folder, kind)
    before = gradients(model.train())
    with torch.no_grad():
        model.eval()(input_ids=TOKENS)
    assert torch.equal(gradients(model.train()), before)


@every_kind
def test_a_few_steps_of_training_lower_the_loss(folder, kind):
    model = adapt(folder, kind).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        losses.append(model(input_ids=TOKENS, labels=TOKENS).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.95 * losses[0]


@every_generator
@every_kind
def test_a_stored_adapter_gives_the_same_logits_on_the_quantised_backbone(folder, kind, generator, tmp_path):
    model = adapt(folder, kind, generator=generator)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(folder, kind), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)


def test_loading_onto_the_dense_backbone_warns_that_the_weights_are_others(folder, tmp_path):
    adapt(folder, "4 bit").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="saved with other frozen weights"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path)


@every_kind
def test_merging_quantises_the_sum_again_and_unmerging_restores_the_bytes(folder, kind):
    model = adapt(folder, kind)
    before, expected = raw_bytes(model), {}
    for name, layer in layers_of(model).items():
        expected[name] = layer.frozen_weight().dense() + layer.get_delta_weight("default")
    with torch.no_grad():
        unmerged = model(input_ids=TOKENS).logits
        model.merge_adapter()
        for name, layer in layers_of(model).items():
            error = stored(layer).dense() - expected[name]
            assert error.norm() < (0.12 if kind == "4 bit" else 0.01) * expected[name].norm()
        merged = model(input_ids=TOKENS).logits
        assert (merged - unmerged).norm() < 0.3 * unmerged.norm()
        model.unmerge_adapter()
        assert all(torch.equal(new, old) for new, old in zip(raw_bytes(model), before, strict=True))
        assert torch.equal(model(input_ids=TOKENS).logits, unmerged)


def stored(layer):
    """Return what the layer holds now, merged or not."""
    fresh = GiftLinear(layer.base_layer, layer.gift_name, layer.gift_source)
    return fresh.frozen_weight()


@every_kind
def test_a_merged_model_is_a_quantised_model_without_any_trace_of_gift(folder, kind):
    model = adapt(folder, kind)
    with torch.no_grad():
        model.merge_adapter()
        merged = model(input_ids=TOKENS).logits
        model.unmerge_adapter()
        plain = model.merge_and_unload()
        # bitsandbytes rounds the scales of 4-bit weights to bfloat16 in the first evaluation on some CPUs.
        tolerance = 0.02 if kind == "4 bit" else 0
        assert (plain(input_ids=TOKENS).logits - merged).norm() <= tolerance * merged.norm()
    assert not [module for module in plain.modules() if type(module).__module__.startswith(("gift", "peft"))]
    assert {type(module) for module in plain.modules()} == {type(module) for module in load(folder, kind).modules()}


@every_kind
def test_while_merged_residuals_are_still_generated_from_the_original_weight(folder, kind):
    model = adapt(folder, kind)
    layer = next(iter(layers_of(model).values()))
    residual = layer.get_delta_weight("default")
    model.merge_adapter()
    assert torch.equal(layer.get_delta_weight("default"), residual)


@every_kind
def test_the_linear_generator_needs_no_dequantisation(folder, kind, monkeypatch):
    model = adapt(folder, kind, generator="linear", target_modules=["q_proj", "v_proj"])
    expected = gradients(dense_twin(model, folder))

    def refuse(self):
        raise AssertionError("dequantised")

    monkeypatch.setattr(QuantisedWeight, "dense", refuse)
    got = gradients(model)
    assert (got - expected).norm() <= (0.02 if kind == "8 bit" else 1e-4) * expected.norm()
    assert model.generate(TOKENS, max_new_tokens=3, do_sample=False).shape == (2, 9)


@every_kind
def test_no_dense_weight_is_kept_for_the_backward_pass(folder, kind):
    model, kept = adapt(folder, kind), []
    weight = layers_of(model)["model.layers.0.self_attn.o_proj"].frozen_weight()
    matrix = torch.randn(4, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape), lambda shape: shape):
        products = weight.times(matrix)
    assert kept == []
    assert torch.allclose(products, weight.dense() @ matrix.T, atol=1e-5)


@every_kind
def test_text_is_generated_with_one_call_of_the_generator(folder, kind, monkeypatch):
    model, calls = adapt(folder, kind), []
    generator = model.base_model.gift_generators["default"]["all-64"]
    generator.register_forward_hook(lambda *_: calls.append(1))
    twin = dense_twin(model, folder)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    tokens = model.generate(TOKENS, **options)
    assert len(calls) == 1
    assert torch.equal(tokens, twin.generate(TOKENS, **options))


@torch.no_grad()
@every_kind
def test_a_write_to_the_stored_numbers_is_seen(folder, kind):
    model = adapt(folder, kind, generator="mlp")
    before = model(input_ids=TOKENS).logits
    layer = layers_of(model)["model.layers.1.self_attn.o_proj"]
    numbers = layer.frozen_weight().raw()[0]
    numbers.data.copy_(numbers.data.flip(0))
    after = model(input_ids=TOKENS).logits
    assert not torch.equal(after, before)
    model.base_model.gift_source.drop()
    assert torch.equal(model(input_ids=TOKENS).logits, after)


@every_kind
def test_a_backbone_prepared_for_training_in_few_bits_trains_with_checkpointing(folder, kind):
    model = get_peft_model(prepare_model_for_kbit_training(load(folder, kind)), GiftConfig(r=4, num_clusters=6))
    model = perturb(model, std=0.2).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    got = gradients(model)
    model.gradient_checkpointing_disable()
    assert torch.allclose(got, gradients(model), atol=1e-6)


@torch.no_grad()
@every_kind
def test_copies_are_whole_and_independent(folder, kind):
    model = adapt(folder, kind)
    before = model(input_ids=TOKENS).logits
    twin = copy.deepcopy(model)
    perturb(model, seed=9)
    assert torch.equal(twin(input_ids=TOKENS).logits, before)
    assert not torch.equal(model(input_ids=TOKENS).logits, before)


@pytest.mark.filterwarnings("ignore:.*dynamic.*quantiz")
def test_layers_that_quantise_their_inputs_and_give_them_no_gradient_are_refused(folder):
    config = TorchAoConfig(quantization.Int8DynamicActivationInt8WeightConfig())
    backbone = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    layer = backbone.model.layers[0].self_attn.o_proj
    with pytest.raises(ValueError, match="gives no gradients to its input"):
        get_peft_model(backbone, GiftConfig())
    assert backbone.model.layers[0].self_attn.o_proj is layer


@torch.no_grad()
def test_packed_bytes_that_are_no_numbers_are_compared_as_bytes(folder):
    options = {"bnb_4bit_quant_storage": "bfloat16", "bnb_4bit_compute_dtype": "float32"}
    config = BitsAndBytesConfig(load_in_4bit=True, **options)
    backbone = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    model, calls = get_peft_model(backbone, GiftConfig(r=4, num_clusters=6)).eval(), []
    model.base_model.gift_generators["default"]["all-64"].register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        model(input_ids=TOKENS)
    assert len(calls) == 1


@torch.no_grad()
def test_weights_of_eight_bit_floats_are_evaluated(folder):
    config = TorchAoConfig(quantization.Float8WeightOnlyConfig())
    backbone = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    model = perturb(get_peft_model(backbone, GiftConfig(r=4, num_clusters=6)), std=0.2).eval()
    before = model(input_ids=TOKENS).logits
    assert torch.equal(model(input_ids=TOKENS).logits, before)
    model.base_model.gift_source.drop()
    assert torch.equal(model(input_ids=TOKENS).logits, before)


def test_parts_of_a_fused_quantised_layer_are_adapted():
    backbone = make_vit(embed_dim=64)
    for block in backbone.blocks:
        fused = bitsandbytes.nn.Linear4bit(64, 192, compute_dtype=torch.float32, quant_type="nf4")
        fused.load_state_dict(block.attn.qkv.state_dict())
        block.attn.qkv = fused.to("cpu")
    model = get_peft_model(backbone, GiftConfig(r=4, num_clusters=6, target_modules=["attn.qkv[v]"]))
    layer = perturb(model, std=0.2).base_model.model.blocks[0].attn.qkv
    x = torch.randn(2, 5, 64)
    expected = layer.base_layer(x)
    expected[..., 128:] += x @ layer.get_delta_weight("default")[128:].T
    assert torch.allclose(layer(x), expected, atol=1e-5)
    assert not layer.get_delta_weight("default")[:128].any()


def test_weights_that_were_repacked_for_evaluation_on_a_cpu_are_refused_before_anything_is_changed(folder):
    backbone = load(folder, "4 bit").eval()
    layer = backbone.model.layers[0].self_attn.q_proj
    if not layer.support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes repacks weights on CPUs with AVX512-BF16 only")
    with torch.no_grad():
        backbone(input_ids=TOKENS)
    with pytest.raises(ValueError, match="repacked its 4-bit weights"):
        get_peft_model(backbone, GiftConfig())
    assert backbone.model.layers[0].self_attn.q_proj is layer
    assert layer.support_avx512bf16_for_cpu


def test_repacking_is_left_to_the_backbone_again_once_the_adapter_is_gone(folder):
    before = load(folder, "4 bit").model.layers[0].mlp.up_proj.support_avx512bf16_for_cpu
    model = adapt(folder, "4 bit")
    assert not model.base_model.model.model.layers[0].mlp.up_proj.support_avx512bf16_for_cpu
    assert model.unload().model.layers[0].mlp.up_proj.support_avx512bf16_for_cpu == before


def test_merging_weights_that_torchao_quantised_by_itself_raises_and_leaves_the_model(folder):
    backbone = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    quantization.quantize_(backbone.model, quantization.Int8WeightOnlyConfig())
    model = perturb(get_peft_model(backbone, GiftConfig(r=4, num_clusters=6))).eval()
    with torch.no_grad():
        before = model(input_ids=TOKENS).logits
        with pytest.raises(ValueError, match="without transformers' TorchAoConfig"):
            model.merge_adapter()
        assert torch.equal(model(input_ids=TOKENS).logits, before)


def test_the_images_of_a_quantised_vit_are_classified_as_by_the_dequantised_one():
    backbone, twin = make_vit(embed_dim=64), make_vit(embed_dim=64)
    for block, plain in zip(backbone.blocks, twin.blocks, strict=True):
        layer = bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
        layer.load_state_dict(block.attn.proj.state_dict())
        block.attn.proj = layer.to("cpu")
        adapted = GiftLinear(block.attn.proj, "proj", FactorSource(nn.ModuleDict()))
        plain.attn.proj.weight.data = adapted.frozen_weight().dense()
    model, dense = (perturb(get_peft_model(net, GiftConfig(r=4, num_clusters=6))).eval() for net in (backbone, twin))
    dense.base_model.gift_generators.load_state_dict(model.base_model.gift_generators.state_dict())
    with torch.no_grad():
        assert (model(make_images()) - dense(make_images())).norm() < 0.02 * dense(make_images()).norm()
