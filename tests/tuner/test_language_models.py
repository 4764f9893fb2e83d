"""Language models: gradients against the plain backbone with other weights, and text from one generation of factors."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    TextIteratorStreamer,
)
from transformers.pytorch_utils import Conv1D

from gift import GiftConfig
from gift.tuner.generator import WeightGenerator
from tests.models import perturb

BLOCKS, SCALING = 2, 0.7
TOKENS = {"vocab_size": 50, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {"hidden_size": 16, "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "intermediate_size": 24}
# Two heads for keys and values: v_proj of LLaMA is 8 x 16.
LLAMA = LlamaConfig(**SIZES, **TOKENS, num_key_value_heads=2)
# Heads wider than the model by themselves: o_proj of Qwen3 is 16 x 24, v_proj 12 x 16.
QWEN3 = Qwen3Config(**SIZES, **TOKENS, num_key_value_heads=2, head_dim=6)
BERT = BertConfig(**SIZES, **TOKENS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
GPT2 = GPT2Config(n_embd=16, n_layer=BLOCKS, n_head=4, **TOKENS, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
PARTS = {"q": 0, "k": 1, "v": 2}


@dataclass(frozen=True)
class Case:
    """How to build a backbone, which layers the configuration names, and which these are (by default the same)."""

    build: Callable[[], nn.Module]
    targets: list[str] | str | None
    layers: tuple[str, ...] = ()

    def plain(self) -> nn.Module:
        """Return the backbone in double precision, with the same weights every time."""
        torch.manual_seed(0)
        return self.build().double().eval()

    def names(self, model: nn.Module) -> Iterator[tuple[str, str | None]]:
        """Yield the name of every layer that should be adapted, and the part of it."""
        for suffix in self.layers or self.targets or ():
            layer, _, part = suffix.removesuffix("]").partition("[")
            found = [name for name, _ in model.named_modules() if name.endswith(f".{layer}")]
            assert len(found) == BLOCKS
            yield from ((name, part or None) for name in found)


ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
CASES = {
    "LLaMA": Case(lambda: LlamaForCausalLM(LLAMA), None, ("self_attn.o_proj",)),
    "LLaMA q v": Case(lambda: LlamaForCausalLM(LLAMA), ["q_proj", "v_proj"]),
    "LLaMA all": Case(lambda: LlamaForCausalLM(LLAMA), "all-linear", (*ATTENTION, "gate_proj", "up_proj", "down_proj")),
    "Qwen3": Case(lambda: Qwen3ForCausalLM(QWEN3), None, ("self_attn.o_proj",)),
    "Qwen3 q v": Case(lambda: Qwen3ForCausalLM(QWEN3), ["q_proj", "v_proj"]),
    "BERT": Case(lambda: BertForMaskedLM(BERT), None, ("attention.output.dense",)),
    "BERT q v": Case(lambda: BertForMaskedLM(BERT), ["query", "value"]),
    "GPT-2": Case(lambda: GPT2LMHeadModel(GPT2), None, ("attn.c_proj",)),
    "GPT-2 q v": Case(lambda: GPT2LMHeadModel(GPT2), ["attn.c_attn[q]", "attn.c_attn[v]"]),
}


def cases(*names: str) -> pytest.MarkDecorator:
    """Run a test for the cases of these names, by default for all."""
    return pytest.mark.parametrize("case", [pytest.param(CASES[name], id=name) for name in names or CASES])


def adapt(case: Case, **options) -> PeftModel:
    """Return an adapted model in double precision whose residual is not zero."""
    config = GiftConfig(
        **{"target_modules": case.targets, "r": 4, "num_clusters": 6, "scaling": SCALING, "generator_dtype": "float64"}
        | options
    )
    return perturb(get_peft_model(case.plain(), config), std=0.3).eval()


def batch(seed: int = 1) -> dict[str, Tensor]:
    """Return three sequences, of which the last is padded, and their labels."""
    tokens = torch.randint(3, 50, (3, 7), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(tokens)
    mask[2, 5:] = 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


def generators(model: PeftModel) -> nn.ModuleDict:
    return model.base_model.gift_generators["default"]


def as_matrix(layer: nn.Module, weight: Tensor) -> Tensor:
    """Return a weight with a row for each output, or such a matrix as it is stored: transposed in GPT-2's Conv1D."""
    return weight.T if isinstance(layer, Conv1D) else weight


def summed_weights(case: Case, model: PeftModel) -> dict[str, Tensor]:
    """Return W + scaling * left @ right of every adapted layer of the plain backbone by name, with their graph."""
    plain = case.plain().requires_grad_(False)
    summed: dict[str, Tensor] = {}
    for name, part in case.names(plain):
        layer = plain.get_submodule(name)
        weight = as_matrix(layer, layer.weight)
        third = len(weight) // len(PARTS)
        rows = slice(None) if part is None else slice(PARTS[part] * third, (PARTS[part] + 1) * third)
        (generator,) = (g for g in generators(model).values() if g.reduce.in_features == weight.shape[1])
        factors = generator([weight[rows]])
        whole = summed.get(name, weight).clone()
        whole[rows] += SCALING * factors.left[0] @ factors.right
        summed[name] = whole
    return {f"{name}.weight": as_matrix(plain.get_submodule(name), weight) for name, weight in summed.items()}


def expected_gradients(case: Case, model: PeftModel) -> list[Tensor]:
    """Return the gradients of all generator parameters by the loss of the plain backbone with the summed weights."""
    loss = functional_call(case.plain(), summed_weights(case, model), kwargs=batch()).loss
    return list(torch.autograd.grad(loss, list(generators(model).parameters())))


def got_gradients(model: PeftModel) -> list[Tensor]:
    """Return the gradients of all generator parameters after a training step's backward pass."""
    model.zero_grad()
    model.train()(**batch()).loss.backward()
    return [parameter.grad for parameter in generators(model).parameters()]


def largest_difference(got: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest absolute difference, and print it for who runs pytest with -s."""
    difference = max((one - other).abs().max().item() for one, other in zip(got, expected, strict=True))
    print(f"largest difference {difference:.1e}")
    return difference


# ---- training --------------------------------------------------------------------------------------------------------


@cases()
def test_a_training_step_has_the_gradients_of_the_plain_backbone_with_summed_weights(case):
    model = adapt(case)

    expected = expected_gradients(case, model)

    names = [name.partition(".")[2] for name, _ in generators(model).named_parameters()]
    zero = {name for name, gradient in zip(names, expected, strict=True) if gradient.abs().max() < 1e-9}
    # The softmax takes away what a bias of the keys adds, the norm after a layer what is added to all its outputs.
    assert zero <= {"blocks.0.mixing.key.bias", "blocks.0.feed_forward.contract.bias"}
    assert largest_difference(got_gradients(model), expected) <= 1e-10


@cases("LLaMA", "Qwen3", "BERT", "GPT-2")
@pytest.mark.parametrize("generator", ["linear", "transformer", "mlp", "mixer"])
def test_a_training_step_of_the_other_generators_has_these_gradients_too(case, generator):
    model = adapt(case, generator=generator)

    expected = expected_gradients(case, model)

    assert largest_difference(got_gradients(model), expected) <= 1e-10


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@cases("LLaMA all", "Qwen3 q v", "BERT q v", "GPT-2 q v")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_training_step_with_checkpointing_by_transformers_has_these_gradients_too(case, use_reentrant):
    model = adapt(case)
    expected = expected_gradients(case, model)

    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})

    assert largest_difference(got_gradients(model), expected) <= 1e-10


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@cases("LLaMA q v", "GPT-2 q v")
@pytest.mark.parametrize(
    "use_reentrant",
    [None, False, True],
)
def test_text_that_is_generated_between_forward_and_backward_leaves_the_gradients_alone(case, use_reentrant):
    model = adapt(case)
    expected = expected_gradients(case, model)
    model.enable_input_require_grads()
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})

    loss = model.train()(**batch()).loss
    model.eval().generate(**PROMPT, **GREEDY)
    loss.backward()

    got = [torch.zeros(()) if p.grad is None else p.grad for p in generators(model).parameters()]
    assert largest_difference(got, expected) <= 1e-10


@cases("LLaMA", "LLaMA q v", "LLaMA all")
def test_a_training_step_in_bfloat16_is_close_to_that_in_double_precision(case):
    rounded = replace(case, build=lambda: case.build().bfloat16())
    model = adapt(rounded).bfloat16().double()
    expected = torch.cat([gradient.flatten() for gradient in expected_gradients(rounded, model)])
    model.bfloat16()
    generators(model).float()

    got = torch.cat([gradient.flatten() for gradient in got_gradients(model)])
    torch.optim.SGD(generators(model).parameters(), lr=0.1).step()

    # bfloat16 has 8 bits: the activations of two blocks are off by a few times 2 ** -8.
    assert largest_difference([got / expected.norm()], [expected / expected.norm()]) < 0.03
    assert (got - expected).norm() < 0.06 * expected.norm()
    assert torch.isfinite(model(**batch()).loss)


# ---- merging ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@cases()
def test_merging_gives_the_plain_backbone_the_summed_weights(case):
    model = adapt(case)
    expected = case.plain().state_dict() | summed_weights(case, model)

    merged = model.merge_and_unload().state_dict()

    assert merged.keys() == expected.keys()
    assert largest_difference(list(merged.values()), list(expected.values())) <= 1e-10


@torch.no_grad()
def test_merging_parts_of_gpt2s_attention_leaves_the_keys_as_they_were_to_the_bit():
    case = CASES["GPT-2 q v"]

    merged = adapt(case).merge_and_unload()

    for name, _ in case.names(merged):
        got, before = (model.get_submodule(name).weight.chunk(3, dim=1) for model in (merged, case.plain()))
        assert [torch.equal(part, old) for part, old in zip(got, before, strict=True)] == [False, True, False]


# ---- generating text -------------------------------------------------------------------------------------------------

PROMPT = {
    "input_ids": torch.tensor([[5, 6, 7, 8], [0, 9, 10, 11]]),
    "attention_mask": torch.tensor([[1] * 4, [0, 1, 1, 1]]),
}
GREEDY = {"min_new_tokens": 10, "max_new_tokens": 10, "do_sample": False}
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "without cache": {"use_cache": False},
}
WAYS = {
    "PeftModel": (None, lambda model: model),
    "PeftModelForCausalLM": ("CAUSAL_LM", lambda model: model),
    "tuner": (None, lambda model: model.base_model),
    "inner model": (None, lambda model: model.base_model.model),
}
language_models = cases("LLaMA q v", "Qwen3 q v", "GPT-2 q v")


@pytest.fixture
def calls(monkeypatch):
    """Count the calls of any generator, as the number of weights each was given."""
    counted, forward = [], WeightGenerator.forward

    def counting(self, weights):
        counted.append(len(weights))
        return forward(self, weights)

    monkeypatch.setattr(WeightGenerator, "forward", counting)
    return counted


def write(model: nn.Module, **options) -> Tensor:
    """Return ten new tokens for each prompt, with the same random numbers every time."""
    torch.manual_seed(3)
    return model.generate(**({**PROMPT, **GREEDY} | options))


@torch.no_grad()
def oracle(case: Case, model: PeftModel) -> nn.Module:
    """Return the plain backbone with the summed weights, computed here."""
    plain = case.plain()
    plain.load_state_dict(plain.state_dict() | summed_weights(case, model))
    return plain


@pytest.mark.parametrize("mode", MODES)
@language_models
def test_all_tokens_come_from_one_generation_of_factors_and_are_those_of_the_merged_model(case, mode, calls):
    model = adapt(case)
    expected = write(oracle(case, model), **MODES[mode])
    calls.clear()

    got = write(model, **MODES[mode])

    assert calls == [len(list(case.names(model)))]
    assert got.shape == (2, 14)
    assert torch.equal(got, expected)
    assert torch.equal(got, write(model.merge_and_unload(), **MODES[mode]))
    assert not torch.equal(got, write(case.plain(), **MODES[mode]))


@pytest.mark.parametrize("way", WAYS)
@language_models
def test_two_texts_come_from_one_generation_of_factors_whichever_object_is_asked(case, way, calls):
    task_type, asked = WAYS[way]
    model = adapt(case, task_type=task_type)
    expected = write(oracle(case, model))
    calls.clear()

    texts = [write(asked(model)), write(asked(model))]

    assert calls == [len(list(case.names(model)))]
    assert all(torch.equal(text, expected) for text in texts)


@pytest.mark.parametrize("way", ["PeftModel", "inner model"])
@pytest.mark.parametrize("training", [False, True])
@language_models
def test_a_step_of_the_optimizer_between_two_texts_changes_the_second_as_it_changes_the_weights(
    case, training, way, calls
):
    task_type, asked = WAYS[way]
    model = adapt(case, task_type=task_type).train(training)
    model(**batch()).loss.backward()
    first = write(asked(model))
    torch.optim.SGD(generators(model).parameters(), lr=1.0).step()
    expected = write(oracle(case, model))
    calls.clear()

    second = write(asked(model))

    assert len(calls) == 1
    assert torch.equal(second, expected)
    assert not torch.equal(second, first)


@language_models
def test_text_is_generated_with_the_help_of_a_smaller_model_or_of_the_prompt_itself(case, calls):
    model = adapt(case)
    one = {key: value[:1] for key, value in PROMPT.items()}
    expected = write(oracle(case, model), **one)
    calls.clear()

    assisted = write(model, **one, assistant_model=case.plain())
    looked_up = write(model, **one, prompt_lookup_num_tokens=2)

    assert len(calls) == 1
    assert torch.equal(assisted, expected)
    assert torch.equal(looked_up, expected)


class Numbers:
    """A tokenizer, as far as a streamer needs one: tokens are written as numbers."""

    def decode(self, tokens, **_):
        return "".join(f"{int(token)} " for token in tokens)


@language_models
def test_texts_that_are_streamed_from_two_threads_at_once_are_those_of_the_merged_model(case):
    model = adapt(case)
    one = {key: value[:1] for key, value in PROMPT.items()}
    expected = Numbers().decode(write(oracle(case, model), **one)[0, 4:])
    streamers = [TextIteratorStreamer(Numbers(), skip_prompt=True, timeout=60) for _ in range(2)]
    threads = [threading.Thread(target=write, args=(model,), kwargs=one | {"streamer": s}) for s in streamers]

    for thread in threads:
        thread.start()
    texts = ["".join(streamer) for streamer in streamers]
    for thread in threads:
        thread.join()

    assert texts == [expected, expected]
