"""Load mutated adapter folders: each must be refused with a clear error, or loaded right; none half.

Run by tests/tuner/test_saving.py in a process of its own, without the test suite's shape checks:
    python tests/mutate_adapters.py FOLDER COUNT [SEED]
"""

import dataclasses
import json
import random
import shutil
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from gift import GiftConfig
from gift.tuner.options import GeneratorOptions
from tests.models import make_adapted_vit, make_images, make_vit

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
WRONG_VALUES = (None, "x", -3, [], {"a": 1}, 1e9, True, "sigmoid ")


def cut(folder, rng):
    path = folder / rng.choice([WEIGHTS, CONFIG])
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def flip_bytes(folder, rng):
    path = folder / WEIGHTS
    data = bytearray(path.read_bytes())
    for _ in range(8):
        data[rng.randrange(200)] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def edit_tensors(folder, rng, edit):
    tensors = load_file(folder / WEIGHTS)
    name = rng.choice(sorted(tensors))
    edit(tensors, name)
    save_file(tensors, folder / WEIGHTS)


def rename(folder, rng):
    edit_tensors(folder, rng, lambda tensors, name: tensors.update({name + "x": tensors.pop(name)}))


def drop(folder, rng):
    edit_tensors(folder, rng, lambda tensors, name: tensors.pop(name))


def add(folder, rng):
    edit_tensors(folder, rng, lambda tensors, name: tensors.update({name + ".more": tensors[name].clone()}))


def reshape(folder, rng):
    edit_tensors(folder, rng, lambda t, name: t.update({name: torch.cat([t[name].flatten(), torch.zeros(1)])}))


def not_finite(folder, rng):
    value = rng.choice([float("nan"), float("inf")])

    def edit(tensors, name):
        tensors[name].view(-1)[rng.randrange(tensors[name].numel())] = value

    edit_tensors(folder, rng, edit)


def swap_dtype(folder, rng):
    dtype = rng.choice([torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.bool])
    edit_tensors(folder, rng, lambda tensors, name: tensors.update({name: tensors[name].to(dtype)}))


def wrong_json(folder, rng):
    path = folder / CONFIG
    config = json.loads(path.read_text())
    kind = rng.choice(["value", "missing", "syntax", "not an object", "other method"])
    option = rng.choice(sorted(set(config) - {"task_type", "revision", "auto_mapping", "base_model_name_or_path"}))
    if kind == "value":
        config[option] = rng.choice(WRONG_VALUES)
    elif kind == "missing":
        del config[option]
    elif kind == "other method":
        config["peft_type"] = rng.choice(["GIFT2", 3, None])  # with "LORA" the folder would be PEFT's business alone
    text = json.dumps(config)
    path.write_text({"syntax": text.replace(":", ";", 1), "not an object": "[1, 2]"}.get(kind, text))


def missing_file(folder, rng):
    (folder / rng.choice([WEIGHTS, CONFIG])).unlink()


MUTATIONS = (cut, flip_bytes, rename, drop, add, reshape, not_finite, swap_dtype, wrong_json, wrong_json, missing_file)


def try_to_load(folder, expected, stored):
    """Return what became of loading the folder, and what is wrong with that, if anything."""
    backbone = make_vit()
    modules = [type(module) for module in backbone.modules()]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(backbone, folder)
    except Exception as error:
        return f"refused, {type(error).__name__}", wrong_refusal(error, backbone, modules)
    tensors = {name: p for name, p in model.state_dict().items() if "gift_" in name or "modules_to_save" in name}
    if tensors.keys() != stored.keys():
        return "loaded", "not every tensor was loaded"
    # With a valid number in place of another the folder holds another adapter, and that is what must come.
    wanted = as_the_configuration_says(folder, stored) if changes_the_meaning(folder) else expected
    if (model(make_images()) - wanted).abs().max() > 1e-2 * wanted.abs().max():  # tensors may have been rounded
        return "loaded", "but gives other outputs"
    return "loaded right", None


def changes_the_meaning(folder):
    """Return whether a factor in the configuration has another valid value than the stored adapter had."""
    config, good = (json.loads((where / CONFIG).read_text()) for where in (folder, folder.parent / "good"))
    return any(config[option] != good[option] for option in ("scaling", "assignment_gain"))


def as_the_configuration_says(folder, stored):
    """Return the outputs of an adapter made from the folder's configuration, with the stored tensors put in by hand."""
    config = json.loads((folder / CONFIG).read_text())
    options = {option.name: config[option.name] for option in dataclasses.fields(GeneratorOptions)}
    model = get_peft_model(make_vit(), GiftConfig(scaling=config["scaling"], **options)).eval()
    model.load_state_dict(stored, strict=False)
    return model(make_images())


def wrong_refusal(error, backbone, modules):
    """Return what is wrong with a refusal: a backbone that was changed, or no message."""
    if [type(module) for module in backbone.modules()] != modules:
        return f"half loaded after {error!r}"
    if not torch.equal(backbone(make_images()), make_vit()(make_images())):
        return "the backbone was changed"
    # For a method it does not know PEFT raises a KeyError with the method's name alone.
    return None if isinstance(error, KeyError) or len(str(error)) > 20 else f"no message: {error!r}"


def model_names(folder):
    """Return the stored tensors by the names they have in a model with the adapter `default`."""
    names = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        generator_name = name.replace("gift_generators.", "gift_generators.default.")
        names[generator_name.replace("model.head.", "model.head.modules_to_save.default.")] = tensor
    return names


def main(root, count, seed=0):
    torch.set_num_threads(1)
    rng, outcomes, problems = random.Random(seed), Counter(), []
    model = make_adapted_vit(num_heads=2, scaling=1.5, assignment_gain=2.0)
    model.save_pretrained(root / "good")
    expected, stored = model(make_images()).detach(), model_names(root / "good")
    for index in range(count):
        mutation = MUTATIONS[index % len(MUTATIONS)]
        folder = root / f"mutated-{index}"
        shutil.copytree(root / "good", folder)
        mutation(folder, rng)
        outcome, problem = try_to_load(folder, expected, stored)
        outcomes[mutation.__name__, outcome] += 1
        if problem:
            problems.append(f"{folder}: {mutation.__name__}, {outcome}, {problem}")
    for (mutation, outcome), times in sorted(outcomes.items()):
        print(f"{mutation:14} {outcome:32} {times}")
    print(*problems, f"{count} mutated folders, {len(problems)} not refused or loaded as they should be", sep="\n")
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
