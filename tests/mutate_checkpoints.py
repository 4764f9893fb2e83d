"""Convert over 200 mutated or hostile checkpoints: each must be refused with a clear error, or converted right.

None may execute anything, and a refused one must leave nothing behind. Run by tests/test_checkpoints.py in a process of
its own, without the test suite's shape checks:
    python tests/mutate_checkpoints.py FOLDER
"""

import io
import os
import pickle
import random
import subprocess
import sys
import time
import warnings
import zipfile
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save

sys.path.insert(0, str(Path(__file__).parents[1]))
from gift.checkpoints import convert_checkpoint
from tests.models import make_vit
from tests.test_checkpoints import FORMS, make_checkpoint

CANARY = Path(
    sys.argv[1] if len(sys.argv) > 1 else "", "canary.npy"
).absolute()  # exists as soon as something was executed
BLOCK, FIRST = "hypernets.attn:proj.blocks.0.", "in_projections.attn:proj.weight"


class Calls:
    """Pickles as a call of a function, which unpickling carelessly would make."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


class TouchingNamespace(Namespace):
    def __setstate__(self, state):
        CANARY.touch()


TOUCH = f"open({str(CANARY)!r}, 'w')"
EVIL = (
    Calls(os.system, f"touch {CANARY}"),
    Calls(eval, TOUCH),
    Calls(exec, TOUCH),
    Calls(subprocess.Popen, ["touch", str(CANARY)]),
    Calls(Path.touch, CANARY),
    Calls(getattr, Path, "touch"),
    Calls(map, eval, [TOUCH]),
    Calls(np.save, str(CANARY), np.zeros(1)),
    Calls(torch.serialization.add_safe_globals, [os.system]),
    Calls(Namespace, Calls(os.system, f"touch {CANARY}")),
    TouchingNamespace(a=1),
)


def _put(**values):
    return lambda content: content.update(values)


def _option(name, value, form="pamcat_transformer"):
    def change(content):
        setattr(content["args"], f"hypernet_block_{name}", value)

    change.form = form
    return change


def _tensor(name, edit):
    return lambda content: content["state_dict"].update({name: edit(content["state_dict"][name])})


def _all(edit):
    return lambda content: content.update(state_dict={name: edit(t) for name, t in content["state_dict"].items()})


def _with(name, shape=(6, 6)):
    return lambda content: content["state_dict"].update({name: torch.randn(shape)})


def _without(start):
    def change(content):
        content["state_dict"] = {n: t for n, t in content["state_dict"].items() if not n.startswith(start)}

    return change


def _renamed(target):
    def change(content):
        content["state_dict"] = {n.replace("attn:proj", target): t for n, t in content["state_dict"].items()}

    return change


def _instead(make):
    def change(content):
        made = make(content)
        content.clear()
        content.update(made)

    return change


def _endless(value="l2"):
    """Return a small object that would take 2^200 characters to print."""
    for _ in range(200):
        value = [value, value]
    return value


def _number(number):
    def edit(tensor):
        tensor.view(-1)[3] = number
        return tensor

    return edit


def _with_attribute(tensor):
    tensor = torch.nn.Parameter(tensor)
    tensor.detach = torch.Size
    return tensor


def _in_one_memory(content):
    state = content["state_dict"]
    memory = torch.cat([torch.zeros(3), *[tensor.flatten() for tensor in state.values()]])
    pieces = memory[3:].split([tensor.numel() for tensor in state.values()])
    content["state_dict"] = {n: piece.view(state[n].shape) for n, piece in zip(state, pieces, strict=True)}


def _newer_options(content):
    values = {name.replace("hypernet_", "gift_"): value for name, value in vars(content["args"]).items()}
    content["args"] = Namespace(**values, gift_rank=999, gift_block_num_clusters=999, gift_block_mlp_ratio=9.0)


NAN, INF = float("nan"), float("inf")
OTHER_NAMES = (
    "query",
    "attn.proj",
    "0:attn:proj",
    "attn::proj",
    ":",
    "é",
    "attn:proj\n",
    "x" * 9999,
)
BAD_CONTENT = {
    "evil in a namespace in a namespace": _put(args=Namespace(a=Namespace(b=[{"c": EVIL[0]}]))),
    "evil as args": _put(args=EVIL[1]),
    "evil in the optimizer": lambda content: content["optimizer"]["state"].update(evil=EVIL[0]),
    "evil as a tensor": _tensor(FIRST, lambda tensor: EVIL[1]),
    "evil as all tensors": _put(state_dict=EVIL[0]),
    "evil as a name": lambda content: content["state_dict"].update({EVIL[0]: torch.zeros(1)}),
    "a module": _put(model=torch.nn.Linear(2, 2)),
    "endless norm": _option("norm_layer", _endless()),
    "endless heads": _option("num_heads", _endless()),
    "endless activation": _option("act_layer", _endless(), "simple_block"),
    "endless tensor": _tensor(FIRST, lambda tensor: _endless()),
    "no state_dict": lambda content: content.pop("state_dict"),
    "sparse": _tensor(FIRST, lambda tensor: tensor.to_sparse()),
    "sparse rows": _tensor(FIRST, lambda tensor: tensor.to_sparse_csr()),
    "quantised": _tensor(FIRST, lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)),
    "nested": _tensor(FIRST, lambda tensor: torch.nested.nested_tensor([tensor])),
    "virtual": _tensor(FIRST, lambda tensor: tensor.to("meta")),
    "expanded": _tensor(FIRST, lambda tensor: tensor[:, :1].clone().expand(-1, 32)),
    "huge": _tensor(FIRST, lambda tensor: torch.zeros(1).expand(2**30, 2**31)),
    "overlapping": _tensor(FIRST, lambda tensor: torch.zeros(40).as_strided((6, 32), (1, 1))),
    "with attributes": _tensor(FIRST, _with_attribute),
    "a number": _tensor(FIRST, lambda tensor: 1.0),
    "a list": _tensor(FIRST, lambda tensor: tensor.tolist()),
    "an array": _tensor(FIRST, lambda tensor: tensor.numpy()),
    "mixed dtypes": _tensor(FIRST, lambda tensor: tensor.double()),
    "wrong block": _tensor(BLOCK + "attn.q.weight", lambda tensor: torch.randn(6, 7)),
    "wrong bias": _tensor(BLOCK + "attn.v.bias", lambda tensor: torch.randn(7)),
    "wrong clusters": _tensor(BLOCK + "attn.cluster.cluster.bias", lambda tensor: torch.randn(4)),
    "wrong head": _tensor("backbone.head.bias", lambda tensor: torch.randn(4)),
    "not finite in a block": _tensor(BLOCK + "mlp.fc1.bias", _number(NAN)),
    "without head": _without("backbone.head."),
    "without blocks": _without(BLOCK),
    "without attention": _without(BLOCK + "attn."),
    "without feed-forward": _without(BLOCK + "mlp."),
    "without assignment": _without(BLOCK + "attn.cluster"),
    "with half a norm": _with(BLOCK + "norm1.weight", (6,)),
    "with another target": _with(FIRST.replace("attn:proj", "mlp:fc1"), (6, 32)),
    "with a later block": _with(BLOCK.replace("0", "7") + "attn.q.weight"),
    "with no name": lambda content: content["state_dict"].update({("a", 1): torch.zeros(2, 2)}),
    "a timm model": _instead(lambda content: {"state_dict": make_vit().state_dict()}),
    "a bare timm model": _instead(lambda content: dict(make_vit().state_dict())),
    "bare tensors": _instead(lambda content: dict(content["state_dict"])),
}
BAD_CONTENT |= {f"evil {index}": _put(note=evil) for index, evil in enumerate(EVIL)}
BAD_CONTENT |= {f"heads {value!r}": _option("num_heads", value) for value in (0, -1, 4, True, "2", 2.0, 10**30, NAN)}
BAD_CONTENT |= {f"norm {value!r}": _option("norm_layer", value) for value in ("batch", "L2 ", "", 2, "ln")}
BAD_CONTENT |= {f"assignment {value!r}": _option("cluster_activation", value) for value in ("softmax", "hsigmoid", 1)}
BAD_CONTENT |= {
    f"act {value!r}": _option("act_layer", value, "simple_block") for value in ("relu", "hsigmoid", "softmax")
}
BAD_CONTENT |= {f"args {value!r}": _put(args=value) for value in ([1], "args", 3)}
BAD_CONTENT |= {f"state_dict {value!r}": _put(state_dict=value) for value in (None, [], "x", {}, {3: 4})}
BAD_CONTENT |= {
    f"{t}": _tensor(FIRST, lambda tensor, t=t: tensor.to(t)) for t in (torch.int64, torch.bool, torch.cfloat)
}
BAD_CONTENT |= {f"{value}": _tensor(FIRST, _number(value)) for value in (NAN, INF, -INF)}
BAD_CONTENT |= {
    f"shape {shape}": _tensor(FIRST, lambda tensor, shape=shape: torch.zeros(shape))
    for shape in ((0, 32), (192,), (), (6, 31), (32, 6), (6, 32, 1))
}
BAD_CONTENT |= {
    f"without {name}": _without(name) for name in (FIRST, FIRST.replace("in_", "out_"), "backbone.head.bias")
}
BAD_CONTENT |= {f"without {name}": _without(BLOCK + name) for name in ("attn.q.weight", "attn.k.bias", "mlp.fc2")}
BAD_CONTENT |= {
    f"with {name[:20]}": _with(name) for name in ("head.weight", "lora_A.weight", BLOCK + "attn.w.weight", "x" * 99999)
}
BAD_CONTENT |= {f"target {name[:20]!r}": _renamed(name) for name in OTHER_NAMES}
FINE_CONTENT = {
    "as it is": lambda content: None,
    "options of the released code": _newer_options,
    "options as a dict": lambda content: content.update(args=vars(content["args"])),
    "no options": lambda content: content.pop("args"),
    "other sizes in the options": lambda content: vars(content["args"]).update(
        hypernet_embed_dim=99, hypernet_rank="x"
    ),
    "nothing but tensors": _instead(lambda content: {"state_dict": content["state_dict"]}),
    "endless note": _put(note=_endless()),
    "endless options": lambda content: setattr(content["args"], "gift_lr", _endless()),
    "odd arch": _put(arch='"); import os  # [x](http://y) {0} {file}'),
    "odd values": _put(arch=["a"], epoch=INF, metric=NAN, version=10**30),
    "a plain dict": lambda content: content.update(state_dict=dict(content["state_dict"])),
    "backwards": lambda content: content.update(state_dict=dict(reversed(content["state_dict"].items()))),
    "parameters": _all(torch.nn.Parameter),
    "columns first": _all(lambda tensor: tensor.T.contiguous().T if tensor.dim() == 2 else tensor),
    "every second number": _all(lambda tensor: torch.stack([tensor, tensor + 1], dim=-1)[..., 0]),
    "one memory": _in_one_memory,
}
FINE_CONTENT |= {
    f"{dtype}": _all(lambda tensor, t=dtype: tensor.to(t)) for dtype in (torch.double, torch.half, torch.bfloat16)
}


# ---- what is done to the file ----------------------------------------------------------------------------------------


def _saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def _repacked(data, edit, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, edit(name, old.read(name)))
    return buffer.getvalue()


def _flipped(data, rng, start=0, stop=None):
    data = bytearray(data)
    for _ in range(3):
        data[rng.randrange(start, stop or len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _with_pickle(data, content):
    return _repacked(data, lambda name, part: pickle.dumps(content, 2) if name.endswith("data.pkl") else part)


def _claiming(data):
    """Return an archive whose table of contents says that the first projection (768 bytes) has 3 GB."""
    return data.replace((6 * 32 * 4).to_bytes(4, "little") * 2, (3 * 2**30).to_bytes(4, "little") * 2)


def _scripted():
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), buffer)
    return buffer.getvalue()


BAD_FILE = {
    "empty": lambda data, rng: b"",
    "text": lambda data, rng: b"epoch: 99\nmetric: 99.22\n" * 50,
    "noise": lambda data, rng: rng.randbytes(5000),
    "noise in a zip": lambda data, rng: data[:4] + rng.randbytes(5000),
    "an archive without parts": lambda data, rng: _repacked(data, lambda name, part: b""),
    "a bomb": lambda data, rng: _repacked(data, lambda name, part: bytes(2**24), zipfile.ZIP_DEFLATED),
    "a claim": lambda data, rng: _claiming(data),
    "a long pickle": lambda data, rng: _with_pickle(data, {"state_dict": {}, "note": "x" * 2**21}),
    "raw evil": lambda data, rng: pickle.dumps(EVIL[0]),
    "raw evil, 2": lambda data, rng: pickle.dumps(EVIL[1], 2),
    "raw evil in the archive": lambda data, rng: _with_pickle(data, EVIL[0]),
    "evil namespace in the archive": lambda data, rng: _with_pickle(data, {"args": Namespace(a=EVIL[1])}),
    "evil of an older torch": lambda data, rng: _saved({"a": EVIL[0]}, _use_new_zipfile_serialization=False),
    "of an older torch": lambda data, rng: _saved({"state_dict": {}}, _use_new_zipfile_serialization=False),
    "a safetensors file": lambda data, rng: save({"in_projections.attn:proj.weight": torch.zeros(6, 32)}),
    "a scripted model": lambda data, rng: _scripted(),
    "a whole model": lambda data, rng: _saved(make_vit()),
    "a list": lambda data, rng: _saved([1, 2]),
    **{f"cut {i}": lambda data, rng: data[: rng.randrange(len(data))] for i in range(8)},
}
ANY_FILE = {
    **{f"flipped {i}": _flipped for i in range(16)},
    **{f"flipped at the end {i}": lambda data, rng: _flipped(data, rng, start=len(data) - 400) for i in range(8)},
    "more at the end": lambda data, rng: data + b"\0" * 10,
    "packed by another program": lambda data, rng: _repacked(data, lambda name, part: part),
}


# ---- trying them -----------------------------------------------------------------------------------------------------


def try_to_convert(path, root, expected):
    """Return what became of a file, and what is wrong with that, if anything."""
    out, before, start = root / "out", sorted(root.iterdir()), time.perf_counter()
    problem = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            convert_checkpoint(path, out)
        outcome, written = "converted", load_file(out / "adapter_model.safetensors")
        if written.keys() != expected.keys() or not all(
            torch.equal(written[k], expected[k].to(written[k])) for k in written
        ):
            problem = "but to other tensors"
        subprocess.run(["rm", "-r", out], check=True)
    except ValueError as error:
        outcome = "refused"
        if type(error) is not ValueError or not 60 < len(str(error)) < 1500:
            problem = f"no message: {error!r:.300}"
    except Exception as error:
        outcome, problem = "refused", f"as {error!r:.300}"
    if CANARY.exists():
        problem = "EXECUTED"
    if sorted(root.iterdir()) != before:
        problem = f"left behind {set(root.iterdir()) - set(before)}"
    if time.perf_counter() - start > 10:
        problem = "took long"
    return outcome, problem


def all_files():
    """Yield (kind, name, form, bytes) of every file; the kind is what must become of it."""
    rng = random.Random(0)
    for kind, changes in (("refused", BAD_CONTENT), ("converted", FINE_CONTENT)):
        for name, change in changes.items():
            form = getattr(change, "form", "pamcat_transformer")
            content = content_of(form)
            change(content)
            yield kind, name, form, _saved(content)
    for kind, changes in (("refused", BAD_FILE), (None, ANY_FILE)):
        for name, change in changes.items():
            for form in ("simple_block", "mlp_mixer"):
                yield kind, name, form, change(_saved(content_of(form)), rng)


def content_of(form):
    torch.manual_seed(FORMS.index(form))
    return make_checkpoint(form)


def main(root):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    good, outcomes, problems = {}, Counter(), []
    for form in FORMS:
        torch.save(content_of(form), root / "good.pth.tar")
        convert_checkpoint(root / "good.pth.tar", root / f"good-{form}")
        good[form] = load_file(root / f"good-{form}" / "adapter_model.safetensors")
    path = root / "mutated.pth.tar"
    for kind, name, form, data in all_files():
        path.write_bytes(data)
        dtype = next((d for d in (torch.bfloat16, torch.float16) if str(d) == name), torch.float32)
        outcome, problem = try_to_convert(path, root, {k: t.to(dtype) for k, t in good[form].items()})
        outcomes[outcome] += 1
        if problem or (kind is not None and outcome != kind):
            problems.append(f"{name} ({form}): {outcome}, {problem}")
    print(*problems, *outcomes.items(), sep="\n")
    print(f"{sum(outcomes.values())} files, {len(problems)} not refused or converted as they should be")
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
