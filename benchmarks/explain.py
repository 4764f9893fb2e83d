"""What cluster maps cost beside a plain forward pass, and the best clusters of an image beside Grad-CAM.

    python benchmarks/explain.py --rounds 15 --out results/explain.json

A ViT-B/16 with random weights (time does not depend on them) and the default adapter: 12 layers x 96 clusters. Grad-CAM
explains the five best classes at one layer; by the package's own call, and by `gift.explain.saliency`, which makes one
forward pass for all classes.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from interleaved import environment, estimate, interleave, ratio, write_json
from peft import PeftModel, get_peft_model
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor

from gift import GiftConfig, explain_images
from gift.explain.ranking import ClusterScales, rank_for_image
from gift.explain.saliency import grad_cam

ARCHITECTURE = "vit_base_patch16_224"
PLAIN, MAPS, BEST, OURS, LIBRARY = (
    "plain forward",
    "all maps",
    "five best clusters",
    "Grad-CAM of five classes, one forward",
    "Grad-CAM of five classes, package's call",
)
COUNT = 5


def make_model(architecture: str) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(timm.create_model(architecture), GiftConfig()).eval()


def timed(call: Callable[[], object]) -> Callable[[], float]:
    def measure() -> float:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    return measure


def measurements(model: PeftModel, images: Tensor) -> dict[str, Callable[[], float]]:
    scales = ClusterScales.of(explain_images(model, torch.randn(8, *images.shape[1:])))
    name = f"base_model.model.blocks.{len(model.base_model.model.blocks) - 1}.norm1"
    layer = model.get_submodule(name)
    side = images.shape[2] // 16

    def plain() -> None:
        with torch.no_grad():
            model(images)

    def classes() -> list[int]:
        with torch.no_grad():
            return model(images)[0].topk(COUNT).indices.tolist()

    best = classes()

    def by_library() -> None:
        with GradCAM(model, [layer], lambda tokens: tokens[:, 1:].transpose(1, 2).unflatten(2, (side, side))) as cam:
            for label in best:
                cam(images, [ClassifierOutputTarget(label)])

    calls = {
        PLAIN: plain,
        MAPS: lambda: explain_images(model, images),
        BEST: lambda: rank_for_image(explain_images(model, images), 0, scales, COUNT),
        OURS: lambda: grad_cam(model, images, [name], best),
    }
    calls |= {LIBRARY: by_library} if len(images) == 1 else {}
    return {one: timed(call) for one, call in calls.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default=ARCHITECTURE, help="of timm")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, results = make_model(arguments.architecture), {}
    for batch in arguments.batches:
        images = torch.randn(batch, 3, *model.base_model.model.patch_embed.img_size)
        values = interleave(measurements(model, images), arguments.rounds)
        of_batch = {}
        for name, seconds in values.items():
            times = ratio(seconds, values[PLAIN])
            of_batch[name] = {"seconds": estimate(seconds)._asdict(), "of a plain forward": times._asdict()}
            print(f"batch {batch}: {name:42s} {1e3 * estimate(seconds).median:8.1f} ms, {times} of a plain forward")
        results[str(batch)] = of_batch
    if arguments.out:
        described = {"environment": environment(), "architecture": arguments.architecture, "rounds": arguments.rounds}
        write_json(arguments.out, described | {"batches": results})


if __name__ == "__main__":
    main()
