"""Read the adapted layers of a model while it runs: one's own loop, or batch by batch."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from gift.backbones import find_family, prefix_tokens
from gift.explain.assignments import Chosen, ExplainedModel, choose, explained_model
from gift.explain.capture import before_adaptation, evaluating, watched
from gift.explain.layout import TokenLayout
from gift.explain.readings import Reading, Readout, TokenStatistics
from gift.tuner.scope import is_recomputing
from gift.tuner.targets import Target
from gift.tuner.weights import PARTS

IMAGES_PER_PASS = 64

Images = Tensor | Iterable[Any]  # (batch, 3, height, width), or batches of them


class RecordedMaps:
    """The maps of the last forward pass of a model that is being recorded; see `recording_maps`."""

    def __init__(self, layer_names: tuple[str, ...]) -> None:
        self.layer_names = layer_names
        self._of_layers: dict[str, Tensor] = {}

    @property
    def maps(self) -> Float[Tensor, "batch layers clusters rows columns"]:
        """The maps, on the model's device; of a model on several devices, on that of the first layer.

        Raises:
            RuntimeError: If there was no forward pass, or it did not reach all layers.
        """
        if missing := [name for name in self.layer_names if name not in self._of_layers]:
            raise RuntimeError(f"There are no maps yet of {', '.join(missing[:4])}: call the model first.")
        first = self._of_layers[self.layer_names[0]]
        return torch.stack([self._of_layers[name].to(first) for name in self.layer_names], dim=1)


@contextmanager
def recording_maps(
    model: nn.Module,
    layers: Chosen = None,
    clusters: Chosen = None,
    block: int = -1,
    reading: Reading | str = "plain",
) -> Iterator[RecordedMaps]:
    """Record the maps of every forward pass of one's own loop.

    `with recording_maps(model) as recorded:` and inside it `model(images)`, then `recorded.maps`. The model runs in
    whatever mode it is in; the clusters are those at the start. Compiled models run uncompiled meanwhile. The output is
    not changed, except by a reading of the layers before adaptation: inside it these are not adapted.

    Args:
        model: As for `explain_images`, and so are the others.
        layers: Numbers or names of the layers.
        clusters: Numbers of the clusters.
        block: Which of the generator's blocks gives the assignment.
        reading: How the tokens are read.

    Raises:
        ValueError: As for `explain_images`; inside, if not the model itself is called but a part of it that has layers.
    """
    with plan_recording(model, layers, clusters, block, reading).recording() as recorded:
        yield recorded


@dataclass(frozen=True, eq=False)
class Plan:
    """What is read from which layers of a model."""

    explained: ExplainedModel
    readouts: dict[str, Readout]
    layer_numbers: tuple[int, ...]
    cluster_numbers: tuple[int, ...]
    reading: Reading
    block: int

    @contextmanager
    def recording(self) -> Iterator[RecordedMaps]:
        """Record the maps of every forward pass inside."""
        recorded = RecordedMaps(tuple(self.readouts))

        def start() -> None:
            recorded._of_layers.clear()  # nothing of an earlier image is left if this pass fails

        def read(name: str, tokens: Tensor) -> None:
            recorded._of_layers[name] = self.readouts[name](tokens)

        with self.watching(read, start):
            yield recorded

    @contextmanager
    def watching(self, read: Callable[[str, Tensor], None], start: Callable[[], None] | None = None) -> Iterator[None]:
        """Call `read` with the name of a target and its tokens whenever it runs, and `start` before every pass."""
        layers: Any = self.explained.modules
        unadapted = nullcontext() if self.reading.adapted else before_adaptation(layers.values())
        with unadapted, TokenWatch(self.explained.inner, list(self.readouts), read, start).watching(layers):
            yield

    def stacked_assignments(self) -> Float[np.ndarray, "layers out_features clusters"]:
        """Return the assignments of what is read, narrower layers with rows of zeros."""
        matrices = [self.explained.assignments.matrices[name] for name in self.readouts]
        stacked = np.zeros((len(matrices), max(map(len, matrices)), len(self.cluster_numbers)), np.float32)
        for index, matrix in enumerate(matrices):
            stacked[index, : len(matrix)] = matrix[:, list(self.cluster_numbers)].float().cpu().numpy()
        return stacked


def plan_recording(
    model: nn.Module,
    layers: Chosen = None,
    clusters: Chosen = None,
    block: int = -1,
    reading: Reading | str = "plain",
) -> Plan:
    """Return what is to be read; the arguments, and what is wrong with them, are those of `explain_images`."""
    reading = Reading(reading) if isinstance(reading, str) else reading
    explained = explained_model(model, block, reading.assignments)
    if not reading.adapted and not explained.is_before_adaptation_known:
        raise ValueError(
            "The adapter is merged, so the layers before adaptation are not there: unmerge it, or load the adapter "
            "onto its backbone."
        )
    matrices = explained.assignments.matrices
    names = list(matrices)
    numbers = choose(names, layers, "layer")
    of_clusters = choose([str(number) for number in range(explained.assignments.clusters)], clusters, "cluster")
    readouts = {names[n]: reading.readout(names[n], matrices[names[n]]).select(of_clusters) for n in numbers}
    return Plan(explained, readouts, tuple(numbers), tuple(of_clusters), reading, block)


class TokenWatch:
    """Calls `read` with the name of a target and its tokens on the patch grid whenever its layer runs.

    Args:
        model: The model in which the names of layers hold.
        targets: Names of the targets.
        read: What to do with the tokens (batch, rows, columns, channels).
        start: Called before every pass.

    Raises:
        ValueError: If the model is not a known backbone of image patches.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[str],
        read: Callable[[str, Tensor], None],
        start: Callable[[], None] | None = None,
    ) -> None:
        prefix_tokens(model)  # raises with the reason
        self.model, self.read, self.start = model, read, start
        self.by_layer: dict[str, list[Target]] = {}
        for target in map(Target.parse, targets):
            self.by_layer.setdefault(target.layer, []).append(target)
        self._images: tuple[int, TokenLayout] | None = None  # how many the running pass has, and where tokens lie

    @contextmanager
    def watching(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Read the layers, given by name, of every pass inside.

        Code that was compiled before it had hooks would not call them, so compiled models run uncompiled meanwhile.

        Raises:
            ValueError: Inside, if the model is called without images, or not itself but a part of it.
        """
        found = find_family(self.model)
        assert found is not None
        backbone = self.model.get_submodule(found[0])
        # What lies outside the backbone, such as a head, runs after it.
        outermost = backbone if all(name.startswith(found[0]) for name in self.by_layer) else self.model
        hooks = [
            backbone.register_forward_pre_hook(self._look_at_images, with_kwargs=True),
            outermost.register_forward_hook(self._forget_images, always_call=True),
        ]
        try:
            uncompiled = torch.compiler.set_stance("force_eager")
            with uncompiled, watched({name: layers[name] for name in self.by_layer}, self._read_output):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _look_at_images(self, module: nn.Module, args: tuple, keywords: dict[str, Any]) -> None:
        pixels = next((x for x in (*args, *keywords.values()) if isinstance(x, Tensor) and x.ndim == 4), None)
        if pixels is None:
            raise ValueError("The model was called without images (batch, 3, height, width), so there are no maps.")
        if self.start is not None:
            self.start()
        self._images = len(pixels), TokenLayout(self.model, self.by_layer, pixels.shape[2], pixels.shape[3])

    def _forget_images(self, *_: Any) -> None:
        self._images = None

    def _read_output(self, name: str, output: Tensor) -> None:
        if is_recomputing():
            return  # it was read before
        if self._images is None:
            raise ValueError(
                f"{name} ran outside a call of the model, so where its tokens lie is not known: call the model itself "
                "on images, and no part of it such as `forward_features`."
            )
        batch, layout = self._images
        tokens = layout.lay_out(name, output, batch)
        for target in self.by_layer[name]:
            part = tokens if target.part is None else tokens.chunk(len(PARTS), dim=-1)[PARTS.index(target.part)]
            self.read(str(target), part)


@torch.no_grad()
def token_statistics(model: nn.Module, images: Images) -> TokenStatistics:
    """Return mean and covariance of the output tokens of every adapted layer over images, for the reading `whitened`.

    Keep them beside the adapter: `token_statistics(model, images).save(folder)`.

    Args:
        model: As for `explain_images`.
        images: As for `explain_images`.
    """

    def batches() -> Iterator[dict[str, Tensor]]:
        for _, tokens in tokens_of(model, images):
            yield {name: of_layer.flatten(0, 2) for name, of_layer in tokens.items()}

    return TokenStatistics.of(batches())


def tokens_of(
    model: nn.Module, images: Images, adapted: bool = True
) -> Iterator[tuple[Float[Tensor, "batch classes"], dict[str, Tensor]]]:
    """Yield, batch by batch, the logits and every target's output tokens on the patch grid.

    Args:
        model: As for `explain_images`.
        images: As for `explain_images`.
        adapted: Whether the layers are adapted, or as they were before.
    """
    plan = plan_recording(model, reading=Reading(adapted=adapted))
    first = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    tokens: dict[str, Tensor] = {}
    for pixels in batches_of(images):
        with (
            torch.no_grad(),
            evaluating(model),
            plan.watching(tokens.__setitem__),
        ):  # between batches the model is as it was
            logits = logits_of(model(pixels.to(first)))
        yield logits, dict(tokens)


def batches_of(images: Images) -> Iterator[Float[Tensor, "batch channels height width"]]:
    """Yield the pixels of images, some at a time.

    Raises:
        ValueError: If something is no batch of pixels.
    """
    images = images["pixel_values"] if isinstance(images, Mapping) and "pixel_values" in images else images
    size: tuple[int, ...] | None = None
    for batch in images.split(IMAGES_PER_PASS) if isinstance(images, Tensor) and len(images) else images:
        pixels = batch.get("pixel_values") if isinstance(batch, Mapping) else batch
        pixels = pixels[0] if isinstance(pixels, (list, tuple)) else pixels
        if not (isinstance(pixels, Tensor) and pixels.ndim == 4 and len(pixels) and pixels.is_floating_point()):
            got = f"{tuple(pixels.shape)} of {pixels.dtype}" if isinstance(pixels, Tensor) else type(pixels).__name__
            raise ValueError(
                f"Images are batches of normalised pixels (batch, 3, height, width) in floating point, got {got}."
            )
        if size not in (None, pixels.shape[2:]):
            raise ValueError(
                f"All images must be of one size, got {tuple(pixels.shape[2:])} after {tuple(size or ())}."
            )
        size = pixels.shape[2:]
        yield pixels


def logits_of(answer: Any) -> Float[Tensor, "batch classes"]:
    """Return the logits in what an image classifier gave.

    Raises:
        ValueError: If there are none.
    """
    logits = answer if isinstance(answer, Tensor) else getattr(answer, "logits", None)
    if logits is None or logits.ndim != 2:
        raise ValueError(f"The model must be an image classifier, which gives logits; it gave {type(answer).__name__}.")
    return logits
