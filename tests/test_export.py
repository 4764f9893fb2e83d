"""The merged model leaves PyTorch: through torch.export, as ONNX in onnxruntime, and never with anything of GIFT."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnxruntime
import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from gift import SMALL_BACKBONE, GiftConfig
from tests.models import make_vit, perturb

TOLERANCE = 1e-4
BATCH, OTHER_BATCH = 2, 5  # the batch of the example that is exported, and one that the exported model is given
ANY_BATCH = ({0: torch.export.Dim.DYNAMIC},)
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


class Logits(nn.Module):
    """The logits of a transformers model alone, from its input alone: exporters take tensors, not dictionaries."""

    def __init__(self, model: nn.Module, key: str) -> None:
        super().__init__()
        self.model, self.key = model, key

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(**{self.key: inputs}).logits


def images(batch: int, size: int = 32) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


def tokens(batch: int) -> Tensor:
    return torch.randint(3, 64, (batch, 7), generator=torch.Generator().manual_seed(batch))


@dataclass(frozen=True)
class Case:
    """How to build a backbone, what to feed it, and the name of that input (None: the model gives logits itself)."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    key: str | None = None

    def plain(self) -> nn.Module:
        """Return the backbone, with the same weights every time."""
        torch.manual_seed(0)
        return self.build().eval()

    def logits(self, model: nn.Module) -> nn.Module:
        """Return a module that gives the logits of the model."""
        return model if self.key is None else Logits(model, self.key).eval()


CASES = {
    "timm ViT": Case(make_vit, images),
    "transformers ViT": Case(
        lambda: ViTForImageClassification(ViTConfig(**SIZES, image_size=32, patch_size=8, num_labels=5)),
        images,
        "pixel_values",
    ),
    "small backbone": Case(
        lambda: AutoModelForImageClassification.from_pretrained(SMALL_BACKBONE, num_labels=5),
        lambda batch: images(batch, 64),
        "pixel_values",
    ),
    "LLaMA": Case(
        lambda: LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=64, num_key_value_heads=1, initializer_range=0.2)),
        tokens,
        "input_ids",
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_generator = pytest.mark.parametrize("generator", ["paca", "linear", "transformer", "mlp", "mixer"])
# Without (fast) and with (slow) dynamo, which reads the byte code of the whole model.
every_strictness = pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])


def adapt_and_merge(case: Case, **options) -> tuple[nn.Module, Tensor]:
    """Return the merged model, and the logits of the adapted one before merging, which are not the backbone's."""
    model = perturb(get_peft_model(case.plain(), GiftConfig(**({"r": 4, "num_clusters": 6} | options)))).eval()
    inputs = case.inputs(OTHER_BATCH)
    with torch.no_grad():
        expected = case.logits(model)(inputs)
        assert (expected - case.logits(case.plain())(inputs)).abs().max() > 1e-2
    return case.logits(model.merge_and_unload()), expected


def plain_with_weights_of(case: Case, merged: nn.Module) -> nn.Module:
    """Return a backbone that never met GIFT with the weights of the merged one, which must have the same names."""
    plain = case.logits(case.plain())
    plain.load_state_dict(merged.state_dict(), strict=True)
    return plain


def export(model: nn.Module, case: Case, strict: bool = False) -> torch.export.ExportedProgram:
    return torch.export.export(model, (case.inputs(BATCH),), dynamic_shapes=ANY_BATCH, strict=strict)


def export_onnx(model: nn.Module, case: Case) -> torch.onnx.ONNXProgram:
    program = torch.onnx.export(
        model, (case.inputs(BATCH),), dynamo=True, dynamic_shapes=ANY_BATCH, verbose=False, external_data=False
    )
    assert program is not None
    return program


def run_onnx(path: Path, inputs: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    return torch.from_numpy(session.run(None, {entry.name: inputs.numpy()})[0])


def largest_difference(got: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference, and print it for who runs pytest with -s."""
    assert got.shape == expected.shape
    difference = (got - expected).abs().max().item()
    print(f"largest difference {difference:.1e}")
    return difference


@every_strictness
@every_case
# transformers' own collector of hidden states, of which dynamo tells.
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects.*output_capturing:UserWarning")
def test_a_merged_model_that_was_exported_gives_the_adapted_models_logits_for_any_batch(case, strict):
    merged, expected = adapt_and_merge(case)

    program = export(merged, case, strict)

    with torch.no_grad():
        assert largest_difference(program.module()(case.inputs(OTHER_BATCH)), expected) <= TOLERANCE


@every_generator
def test_models_merged_from_every_generator_can_be_exported(generator):
    case = CASES["timm ViT"]
    merged, expected = adapt_and_merge(case, generator=generator, target_modules=["attn.qkv[v]", "attn.proj"])

    program = export(merged, case)

    with torch.no_grad():
        assert largest_difference(program.module()(case.inputs(OTHER_BATCH)), expected) <= TOLERANCE


@every_case
def test_the_exported_graph_of_a_merged_model_is_that_of_a_backbone_without_gift(case):
    merged, _ = adapt_and_merge(case)

    got, plain = (export(model, case) for model in (merged, plain_with_weights_of(case, merged)))

    assert [str(node.target) for node in got.graph.nodes] == [str(node.target) for node in plain.graph.nodes]
    assert got.state_dict.keys() == plain.state_dict.keys() == merged.state_dict().keys()
    assert got.constants.keys() == plain.constants.keys()
    stacks = [node.meta.get("nn_module_stack", {}) for node in got.graph.nodes]
    kinds = {kind for stack in stacks for _, kind in stack.values()}
    assert any(kind.startswith(("timm.", "transformers.")) for kind in kinds)
    assert not [kind for kind in kinds if kind.startswith(("gift.", "peft."))]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name, marks=[pytest.mark.slow] * (case.key is not None)) for name, case in CASES.items()],
)
def test_a_merged_model_in_onnxruntime_gives_the_adapted_models_logits_for_any_batch(case, tmp_path):
    merged, expected = adapt_and_merge(case)

    export_onnx(merged, case).save(tmp_path / "model.onnx")

    got = run_onnx(tmp_path / "model.onnx", case.inputs(OTHER_BATCH))
    assert largest_difference(got, expected) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("generator", ["linear", "mixer"])
def test_models_merged_from_other_generators_give_their_logits_in_onnxruntime_too(generator, tmp_path):
    case = CASES["timm ViT"]
    merged, expected = adapt_and_merge(case, generator=generator, target_modules=["attn.qkv[v]", "attn.proj"])

    export_onnx(merged, case).save(tmp_path / "model.onnx")

    got = run_onnx(tmp_path / "model.onnx", case.inputs(OTHER_BATCH))
    assert largest_difference(got, expected) <= TOLERANCE


@pytest.mark.slow
@every_case
def test_the_onnx_graph_of_a_merged_model_is_that_of_a_backbone_without_gift(case):
    merged, _ = adapt_and_merge(case)

    got, plain = (export_onnx(model, case).model.graph for model in (merged, plain_with_weights_of(case, merged)))

    assert [node.op_type for node in got] == [node.op_type for node in plain]
    shapes, plain_shapes = (
        {name: tuple(value.shape) for name, value in graph.initializers.items()} for graph in (got, plain)
    )
    assert shapes == plain_shapes
    hierarchies = {node.metadata_props.get("pkg.torch.onnx.class_hierarchy", "") for node in got}
    assert any("timm." in kinds or "transformers." in kinds for kinds in hierarchies)
    assert not [kinds for kinds in hierarchies if "'gift." in kinds or "'peft." in kinds]


@pytest.mark.slow
def test_a_process_without_gift_loads_and_runs_the_exported_model(tmp_path):
    case = CASES["small backbone"]
    merged, expected = adapt_and_merge(case)
    torch.export.save(export(merged, case), tmp_path / "model.pt2")
    torch.save(case.inputs(OTHER_BATCH), tmp_path / "inputs.pt")

    lines = [
        "import sys, torch",
        "model = torch.export.load('model.pt2').module()",
        "torch.save(model(torch.load('inputs.pt')).detach(), 'logits.pt')",
        "assert not {'gift', 'peft', 'transformers'} & set(sys.modules)",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=tmp_path, check=True)

    assert largest_difference(torch.load(tmp_path / "logits.pt"), expected) <= TOLERANCE


@pytest.mark.slow
def test_an_adapted_model_that_was_not_merged_is_exported_with_its_generator():
    # In a process of its own: the shape checks of this test suite break graphs.
    script = Path(__file__).parent / "export_unmerged.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("largest difference") == 11, done.stdout
    assert done.stdout.count("refused") == 2, done.stdout
