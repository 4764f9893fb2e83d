"""Export adapted models that were not merged, and compare with eager, also after the generator was changed.

An export that had computed the residuals once and for all would not follow the change. Run by tests/test_export.py in
a process of its own, without the test suite's shape checks.
"""

import copy
import sys
from pathlib import Path

import onnxruntime
import torch
from peft import get_peft_model

sys.path.insert(0, str(Path(__file__).parents[1]))
from gift import GiftConfig
from tests.models import make_adapted_vit, make_images, make_vit, perturb

TOLERANCE = 1e-4
EXAMPLE, OTHERS = make_images(2), make_images(5)
ANY_BATCH = {"args": ({0: torch.export.Dim.DYNAMIC},)}  # the arguments of a PeftModel are called `*args`
WAYS = {
    "paca": {},
    "linear": {"generator": "linear"},
    "dense": {"apply": "dense"},
    "factored, in parts": {"apply": "factored", "target_modules": ["attn.qkv[q]", "attn.qkv[v]", "attn.proj"]},
}


def change_generator(model):
    """Make every number of the generators half as large again, as a later training step might."""
    for name, parameter in model.named_parameters():
        if "gift_generators" in name:
            parameter.data.mul_(1.5)
    return model


@torch.no_grad()
def largest_difference(got, expected):
    return (got(OTHERS) - expected(OTHERS)).abs().max().item()


def check(way, *differences):
    print(f"{way}: largest difference {max(differences):.1e}")
    assert max(differences) <= TOLERANCE


def export(model, strict):
    return torch.export.export(model, (EXAMPLE,), dynamic_shapes=ANY_BATCH, strict=strict).module()


def check_export(way, strict):
    model = make_adapted_vit(**WAYS[way])
    untouched = copy.deepcopy(model)
    with torch.no_grad():
        model(EXAMPLE)  # whose factors are kept
    exported = export(model, strict)
    before = largest_difference(exported, untouched)
    leftover = largest_difference(model, untouched)  # the export leaves nothing behind in the model
    changed = change_generator(copy.deepcopy(untouched))
    assert largest_difference(changed, untouched) > 1e-2
    check(f"{way}, strict={strict}", before, leftover, largest_difference(change_generator(exported), changed))


@torch.no_grad()
def check_onnx():
    model = make_adapted_vit()
    program = torch.onnx.export(model, (EXAMPLE,), dynamo=True, dynamic_shapes=ANY_BATCH, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (got,) = session.run(None, {session.get_inputs()[0].name: OTHERS.numpy()})
    check("ONNX", (torch.from_numpy(got) - model(OTHERS)).abs().max().item())


def check_batches_on_both_sides_of_the_rule(strict):
    """With apply=auto the number of tokens decides how a residual is applied, but not once for all batches."""
    model = perturb(get_peft_model(make_vit(embed_dim=64), GiftConfig(r=4, num_clusters=6))).eval()
    check(f"both sides of the rule, strict={strict}", largest_difference(export(model, strict), model))


@torch.no_grad()
def check_refusal(strict):
    """A model that is merged and disabled would have to be unmerged by the exported program."""
    model = make_adapted_vit()
    model.merge_adapter()
    model.base_model.disable_adapter_layers()
    try:
        export(model, strict)
    except Exception as error:  # in strict mode dynamo puts its own around ours
        message = str(error)
    else:
        message = "exported"
    if "unmerge_adapter" not in message:
        raise AssertionError(f"merged and disabled, strict={strict}: {message}")
    print(f"merged and disabled, strict={strict}: refused")


def main():
    torch.set_num_threads(1)
    for strict in (False, True):
        for way in WAYS:
            check_export(way, strict)
        check_batches_on_both_sides_of_the_rule(strict)
        check_refusal(strict)
    check_onnx()


if __name__ == "__main__":
    main()
