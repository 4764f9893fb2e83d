"""Pretrain a small plain ViT on labelled images, one head per data set; killed, it goes on where it was.

    python scripts/pretrain_backbone.py --data cifar10-train.parquet tinyimagenet64-train.parquet --out runs/backbone

A data set is a parquet file with the columns image and label, or a folder with one subfolder per class. The backbone is
written as a folder for `AutoModelForImageClassification.from_pretrained`, its weights in half precision. On a CPU with
one and the same number of threads the result depends on the options alone, however often the run was killed.
"""

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import torch
from jsonargparse import ArgumentParser
from timm.data import Mixup
from torch import Tensor, nn
from torch.nn import functional
from transformers import TimmWrapperConfig, TimmWrapperModel

from gift.data.readers import read_images

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ARCHITECTURE = "vit_tiny_patch16_224"  # the timm model whose sizes are changed
TO_POLAR = (3.4445, -4.7750, 2.0315)  # coefficients of Muon's quintic (kellerjordan.github.io/posts/muon)


@dataclass(frozen=True)
class Pretraining:
    """How to pretrain.

    Args:
        data: Data sets, each a parquet file or an image folder.
        shares: Share of every batch that is of each data set; equal ones by default.
        out: Folder of this run and of no other: `state.pt`, `log.jsonl`, and at the end `backbone/`.
        depth: Blocks.
        embed_dim: Width of a token.
        num_heads: Attention heads.
        mlp_ratio: Width of an MLP's hidden layer, in widths of a token.
        image_size_px: Side of the images in pixels.
        patch_size_px: Side of a patch in pixels.
        class_token: Whether there is one.
        reg_tokens: Register tokens.
        global_pool: What the heads are given: `token`, the class token, or `avg`, the mean of the patch tokens.
        head_dim: Width of a hidden layer in the heads, which keeps the backbone's features less bound to the classes
            (Sariyildiz et al., arXiv 2206.15369); 0 makes the heads linear.
        samples: Images to train on, all in all.
        batch_size: Images per step.
        patch_drop_rate: Share of the patch tokens that is left out in training.
        whole_from: Share of the run after which no token is left out and no images are mixed.
        mixed: Share of the images that are mixed with another one, by CutMix (alpha 1) or Mixup (alpha 0.8).
        muon_lr: Peak learning rate of the matrices of the blocks.
        adamw_lr: Peak learning rate of everything else.
        weight_decay: Of what AdamW trains.
        warmup_steps: Steps in which the learning rates rise from zero.
        constant_until: Share of the run after which they fall linearly to zero.
        smallest_crop: Smallest area of a random crop, as a share of the image; the largest is 1.
        label_smoothing: Share of the target that is spread over all classes.
        seed: Of everything random.
        device: Such as `cpu` or `cuda`; by default a GPU if there is one.
        save_every_minutes: Time between two saved states.
    """

    data: list[Path]
    out: Path
    shares: list[float] | None = None
    depth: int = 8
    embed_dim: int = 128
    num_heads: int = 4
    mlp_ratio: float = 4.0
    image_size_px: int = 64
    patch_size_px: int = 8
    class_token: bool = True
    reg_tokens: int = 0
    global_pool: Literal["token", "avg"] = "token"
    head_dim: int = 0
    samples: int = 824_320
    batch_size: int = 256
    patch_drop_rate: float = 0.5
    whole_from: float = 1.0
    mixed: float = 0.0
    muon_lr: float = 0.02
    adamw_lr: float = 2e-3
    weight_decay: float = 0.01
    warmup_steps: int = 300
    constant_until: float = 0.3
    smallest_crop: float = 0.5
    label_smoothing: float = 0.1
    seed: int = 0
    device: str | None = None
    save_every_minutes: float = 5.0

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot be trained."""
        for name in ("samples", "batch_size", "warmup_steps", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.head_dim < 0:
            raise ValueError(f"head_dim must be at least 0, got {self.head_dim}.")
        if not 0 <= self.constant_until < 1:
            raise ValueError(f"constant_until must be from 0 to less than 1, got {self.constant_until}.")
        if self.shares is not None and (len(self.shares) != len(self.data) or min(self.shares, default=1) <= 0):
            raise ValueError(f"shares must be positive, one for each of {len(self.data)} data sets; got {self.shares}.")
        for name in ("patch_drop_rate", "whole_from", "mixed"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}.")
        if self.mixed and self.batch_size % 2:
            raise ValueError(f"Images are mixed in pairs: batch_size must be even, got {self.batch_size}.")
        if self.mlp_ratio <= 0:
            raise ValueError(f"mlp_ratio must be positive, got {self.mlp_ratio}.")
        if self.data and min(self.counts) < 1:
            raise ValueError(
                f"A batch of {self.batch_size} cannot hold an image of each of {len(self.data)} data sets."
            )

    @property
    def steps(self) -> int:
        """Number of steps of the whole run."""
        return math.ceil(self.samples / self.batch_size)

    @property
    def model_args(self) -> dict[str, Any]:
        """What `timm.create_model` is given beside the name of the architecture."""
        sizes = {"img_size": self.image_size_px, "patch_size": self.patch_size_px, "embed_dim": self.embed_dim}
        tokens = {"class_token": self.class_token, "reg_tokens": self.reg_tokens, "global_pool": self.global_pool}
        # The norm stays where it is with a class token: after the blocks, on every token.
        blocks = {"depth": self.depth, "num_heads": self.num_heads, "mlp_ratio": self.mlp_ratio}
        return sizes | tokens | blocks | {"fc_norm": False}

    @property
    def counts(self) -> list[int]:
        """Number of images of each data set in a batch; all but the first are even, for mixing."""
        shares = self.shares or [1.0] * len(self.data)
        rest = [max(2, round(self.batch_size * share / sum(shares) / 2) * 2) for share in shares[1:]]
        return [self.batch_size - sum(rest), *rest]

    @property
    def whole_step(self) -> int:
        """Number of steps after which whole images are shown as they are."""
        return round(self.steps * self.whole_from)

    def rate(self, step: int) -> float:
        """Return the factor on the learning rates."""
        fall = (self.steps - step) / (self.steps * (1 - self.constant_until))
        return min((step + 1) / self.warmup_steps, 1.0, fall)


class DataSet:
    """Images on the device of training, drawn in a new order every epoch."""

    def __init__(self, path: Path, options: Pretraining, device: torch.device) -> None:
        images = read_images(path, options.image_size_px)
        self.pixels = torch.from_numpy(images.pixels).permute(0, 3, 1, 2).to(device)
        self.labels = torch.from_numpy(images.labels).to(device)
        self.classes, self.seed = len(images.class_names), options.seed

    def batch(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Return images and labels number `start` to `start + count` of the endless sequence of epochs."""
        total = len(self.labels)
        epochs = range(start // total, (start + count - 1) // total + 1)
        orders = [np.random.default_rng([self.seed, epoch]).permutation(total) for epoch in epochs]
        first = start - epochs[0] * total
        chosen = torch.from_numpy(np.concatenate(orders)[first : first + count]).to(self.labels.device)
        return self.pixels[chosen], self.labels[chosen]


class Muon(torch.optim.Optimizer):
    """Momentum whose update of every matrix is replaced by the nearest orthogonal one (Jordan et al., 2024).

    `torch.optim.Muon` computes the products in bfloat16, which is many times slower on CPUs without such instructions;
    here they are float32, and matrices of one shape go through them as one batch.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """Change the matrices by their gradients."""
        group = self.param_groups[0]
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for matrix in group["params"]:
            by_shape.setdefault(matrix.shape, []).append(matrix)
        for (rows, columns), matrices in by_shape.items():
            updates = orthogonal(torch.stack([self._nesterov(matrix, group["momentum"]) for matrix in matrices]))
            for matrix, update in zip(matrices, updates, strict=True):
                matrix.sub_(update, alpha=group["lr"] * math.sqrt(max(1.0, rows / columns)))

    def _nesterov(self, matrix: nn.Parameter, momentum: float) -> Tensor:
        assert matrix.grad is not None
        velocity = self.state[matrix].setdefault("velocity", torch.zeros_like(matrix))
        velocity.mul_(momentum).add_(matrix.grad)
        return matrix.grad.add(velocity, alpha=momentum)


def orthogonal(matrices: Tensor) -> Tensor:
    """Return for each of the matrices (count, rows, columns) one with the same singular vectors and values near 1."""
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = TO_POLAR
    for _ in range(5):
        gram = wide @ wide.mT
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide if matrices.shape[1] <= matrices.shape[2] else wide.mT


def augment(pixels: Tensor, smallest_crop: float) -> Tensor:
    """Return normalised random crops, half of them mirrored, in the size of the images (batch, 3, rows, columns)."""
    count, device = len(pixels), pixels.device
    area = torch.empty(count, device=device).uniform_(smallest_crop, 1)
    ratio = torch.empty(count, device=device).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    left, top = ((1 - side) * torch.empty(count, device=device).uniform_(-1, 1) for side in (width, height))
    mirror = torch.randint(2, (count,), device=device) * 2 - 1
    zero = torch.zeros_like(area)
    frame = torch.stack([torch.stack([width * mirror, zero, left], 1), torch.stack([zero, height, top], 1)], 1)
    grid = functional.affine_grid(frame, list(pixels.shape), align_corners=False)
    crops = functional.grid_sample(pixels.float() / 255, grid, padding_mode="border", align_corners=False)
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))
    return (crops - mean) / std


def head(dim: int, hidden_dim: int, classes: int) -> nn.Module:
    """Return a head (batch, dim) -> (batch, classes), with one hidden layer unless its width is 0."""
    if not hidden_dim:
        return nn.Linear(dim, classes)
    return nn.Sequential(
        nn.Linear(dim, hidden_dim), nn.LayerNorm(hidden_dim), nn.GELU(), nn.Linear(hidden_dim, classes)
    )


class Run:
    """Model, heads and optimizers of a run, and what it has reached: `history` has an entry for every 50 steps."""

    def __init__(self, options: Pretraining, classes: list[int], device: torch.device) -> None:
        torch.manual_seed(options.seed)
        self.history: list[dict[str, float]] = []
        self.losses: list[float] = []  # since the last entry
        vit = timm.create_model(
            ARCHITECTURE, num_classes=0, patch_drop_rate=options.patch_drop_rate, **options.model_args
        )
        self.options, self.step, self.seconds = options, 0, 0.0
        self.vit = vit
        self.heads = nn.ModuleList(head(options.embed_dim, options.head_dim, count) for count in classes)
        mixing: dict[str, Any] = {"prob": options.mixed, "mode": "elem", "label_smoothing": 0.0}  # that is of the loss
        self.mixers = [Mixup(0.8, 1.0, num_classes=count, **mixing) for count in classes]
        self.model = nn.ModuleDict({"vit": self.vit, "heads": self.heads})
        self.model.to(device)
        matrices = [p for name, p in vit.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
        others = [p for p in self.model.parameters() if not any(p is matrix for matrix in matrices)]
        adamw = torch.optim.AdamW(others, lr=options.adamw_lr, weight_decay=options.weight_decay)
        self.optimizers = {"muon": Muon(matrices, options.muon_lr), "adamw": adamw}
        self.peak_rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in self.optimizers.items()}

    def train_step(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        """Train on one batch per head."""
        torch.manual_seed(np.random.SeedSequence([self.options.seed, self.step]).generate_state(1)[0])
        for name, optimizer in self.optimizers.items():
            optimizer.param_groups[0]["lr"] = self.peak_rates[name] * self.options.rate(self.step)
            optimizer.zero_grad()
        images, targets = (
            augment(torch.cat([p for p, _ in batches]), self.options.smallest_crop),
            [t for _, t in batches],
        )
        if self.step >= self.options.whole_step:
            self.vit.patch_drop = nn.Identity()
        elif self.options.mixed:
            images, targets = self.mix(images, targets)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            features = self.vit(images).split([len(target) for target in targets])
        losses = [
            functional.cross_entropy(
                classify(part.float()), target, reduction="none", label_smoothing=self.options.label_smoothing
            )
            for classify, part, target in zip(self.heads, features, targets, strict=True)
        ]
        loss = torch.cat(losses).mean()
        loss.backward()
        for optimizer in self.optimizers.values():
            optimizer.step()
        self.step += 1
        self.losses.append(loss.item())

    def mix(self, images: Tensor, labels: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return images, some of them mixed with others of their data set, and the shares of the classes in each."""
        np.random.seed(int(torch.randint(2**31, ())))  # timm draws from numpy's global generator
        parts = images.split([len(part) for part in labels])
        pairs = [mixer(part, target) for mixer, part, target in zip(self.mixers, parts, labels, strict=True)]
        return torch.cat([part for part, _ in pairs]), [target for _, target in pairs]

    def save(self, path: Path, description: dict[str, str]) -> None:
        """Write the state and what decides the result, whole or not at all."""
        state = {name: getattr(self, name) for name in ("step", "seconds", "history", "losses")}
        state |= {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        state |= {"model": self.model.state_dict(), "description": description}
        torch.save(state, partial := path.with_suffix(".partial"))
        os.replace(partial, path)

    def load(self, path: Path, description: dict[str, str]) -> None:
        """Go on from a state, or raise ValueError if it is of another run."""
        state = torch.load(path, map_location=next(self.model.parameters()).device, weights_only=True)
        before = state["description"]
        changed = [
            f"{name} was {before.get(name)}, now {now}" for name, now in description.items() if before.get(name) != now
        ]
        if changed:
            raise ValueError(f"{path} is of a run of other options: {'; '.join(changed)}. Choose another folder.")
        for name in ("step", "seconds", "history", "losses"):
            setattr(self, name, state[name])
        self.model.load_state_dict(state["model"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])


def export(vit_state: dict[str, Tensor], model_args: dict[str, int], folder: Path) -> None:
    """Write a backbone as a folder of transformers, the weights in half precision, to be loaded in float32."""
    size = model_args["img_size"]
    data = {"input_size": [3, size, size], "mean": list(MEAN), "std": list(STD), "interpolation": "bicubic"}
    data |= {"crop_pct": 1.0, "crop_mode": "center", "fixed_input_size": True, "num_classes": 0}
    data |= {"first_conv": "patch_embed.proj", "classifier": "head"}
    config = TimmWrapperConfig(
        architecture=ARCHITECTURE, num_labels=0, do_pooling=True, model_args=model_args, pretrained_cfg=data
    )
    model = TimmWrapperModel(config)
    model.timm_model.load_state_dict(vit_state)
    model.half().save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | {"dtype": "float32"}, indent=2) + "\n")


def batches_of(data: list[DataSet], options: Pretraining, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Return one batch of every data set, together `batch_size` images."""
    for dataset, count in zip(data, options.counts, strict=True):
        yield dataset.batch(step * count, count)


def describe(options: Pretraining, data: list[DataSet], device: torch.device) -> dict[str, str]:
    """Return by name what decides the result."""
    free = ("out", "save_every_minutes", "data", "device")
    described = {name: str(value) for name, value in asdict(options).items() if name not in free}
    sizes = [f"{path.name} ({len(dataset.labels)} images)" for path, dataset in zip(options.data, data, strict=True)]
    return described | {"data": ", ".join(sizes), "device": device.type}


def pretrain(options: Pretraining) -> None:
    """Pretrain a backbone, or go on with a run that was killed."""
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    options.out.mkdir(parents=True, exist_ok=True)
    state, log = options.out / "state.pt", options.out / "log.jsonl"
    data = [DataSet(path, options, device) for path in options.data]
    run, description = Run(options, [dataset.classes for dataset in data], device), describe(options, data, device)
    if state.exists():
        run.load(state, description)
        print(f"Going on from step {run.step} of {options.steps}")
    seconds_before, saved = run.seconds, time.monotonic()
    started = saved
    while run.step < options.steps:
        run.train_step(list(batches_of(data, options, run.step)))
        run.seconds = seconds_before + time.monotonic() - started
        is_last = run.step == options.steps
        if run.step % 50 == 0 or is_last:
            loss = sum(run.losses) / len(run.losses)
            run.history.append({"step": run.step, "loss": round(loss, 4), "seconds": round(run.seconds, 1)})
            run.losses = []
            log.write_text("".join(json.dumps(entry) + "\n" for entry in run.history))
            print(f"step {run.step} of {options.steps}, loss {loss:.4f}, {run.seconds:.0f} s", flush=True)
        if is_last or time.monotonic() - saved > 60 * options.save_every_minutes:
            run.save(state, description)
            saved = time.monotonic()
    vit = {name: tensor.cpu() for name, tensor in run.vit.state_dict().items()}
    export(vit, options.model_args, options.out / "backbone")
    print(f"Wrote {options.out / 'backbone'}")


def main(arguments: list[str] | None = None) -> None:
    """Read the options and pretrain."""
    parser = ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="parquet files or folders of class folders")
    parser.add_class_arguments(Pretraining, skip={"data"})
    pretrain(Pretraining(**parser.parse_args(arguments)))


if __name__ == "__main__":
    main()
