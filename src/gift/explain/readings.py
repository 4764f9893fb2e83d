"""How the output tokens of a layer are read as maps, one per cluster.

Every reading is linear in the tokens f: maps = f A + b, with A made from the assignment C of the layer. `plain` is the
paper's, A = C. All entries of C may be nearly alike, so that each plain map is nearly the same weighted sum of all
channels; the others take that common part away:

- `centred`: C less its mean over the clusters, so that a map says where a cluster responds more than the others do;
- `own`: `centred`, less the mean of each map over the image;
- `whitened`: `centred`, on tokens that are centred and whitened by their statistics over a data set, so that no
  direction in which all tokens vary decides every map.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gift.explain.assignments import Assignments

KINDS = ("plain", "centred", "own", "whitened")
STATISTICS_FILE = "token_statistics.safetensors"
RIDGE = 1e-2  # of the mean variance, added to every direction's before whitening: weak directions are mostly noise


@dataclass(frozen=True, eq=False)
class Readout:
    """maps = tokens @ matrix + offset, for one layer; with `centre`, less each map's mean over the image."""

    matrix: Float[Tensor, "channels maps"]
    offset: Float[Tensor, " maps"] | None = None
    centre: bool = False

    def __call__(
        self, tokens: Float[Tensor, "batch rows columns channels"]
    ) -> Float[Tensor, "batch maps rows columns"]:
        """Return the maps of the tokens of some images."""
        with torch.autocast(tokens.device.type, enabled=False):
            maps = tokens.to(self.matrix) @ self.matrix
            if self.offset is not None:
                maps = maps + self.offset
            if self.centre:
                maps = maps - maps.mean(dim=(1, 2), keepdim=True)
        return maps.permute(0, 3, 1, 2)

    def select(self, maps: list[int]) -> "Readout":
        """Return the read-out of some of the maps."""
        return Readout(self.matrix[:, maps], None if self.offset is None else self.offset[maps], self.centre)


@dataclass(frozen=True, eq=False)
class TokenStatistics:
    """Mean and covariance of the output tokens of every target over a data set, kept beside the adapter.

    Attributes:
        means: By the name of the target.
        covariances: By the name of the target.
    """

    means: dict[str, Float[Tensor, " _"]]
    covariances: dict[str, Float[Tensor, "_ _"]]

    @classmethod
    def of(cls, tokens: Iterable[dict[str, Float[Tensor, "_ channels"]]]) -> "TokenStatistics":
        """Return the statistics of all tokens of all batches.

        Raises:
            ValueError: If there are none.
        """
        count, sums, squares = 0, {}, {}
        for batch in tokens:
            count += len(next(iter(batch.values()), ()))
            for name, of_layer in batch.items():
                values = of_layer.double()
                sums[name] = sums.get(name, 0) + values.sum(dim=0)
                squares[name] = squares.get(name, 0) + values.T @ values
        if not count:
            raise ValueError("There are no tokens to take statistics of: pass at least one image.")
        means = {name: total / count for name, total in sums.items()}
        covariances = {name: total / count - torch.outer(means[name], means[name]) for name, total in squares.items()}
        return cls({name: mean.float() for name, mean in means.items()}, {n: c.float() for n, c in covariances.items()})

    def whitening(self, name: str) -> Float[Tensor, "channels channels"]:
        """Return the symmetric square root of the inverse covariance of a target's tokens, with a ridge of 1 %."""
        values, vectors = torch.linalg.eigh(self.covariances[name].double())
        ridge = RIDGE * values.clamp_min(0).mean() + 1e-12
        return (vectors * (values.clamp_min(0) + ridge).rsqrt() @ vectors.T).float()

    def save(self, folder: Path | str) -> Path:
        """Write `token_statistics.safetensors` into a folder, whole or not at all, and return its path."""
        path = Path(folder) / STATISTICS_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"mean.{name}": mean for name, mean in self.means.items()}
        tensors |= {f"covariance.{name}": covariance for name, covariance in self.covariances.items()}
        partial = path.with_name(f"{path.name}.partial")
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial)
        partial.replace(path)
        return path

    @classmethod
    def load(cls, folder: Path | str) -> "TokenStatistics":
        """Return the statistics that were saved in a folder.

        Raises:
            ValueError: If there are none, or the file is damaged.
        """
        path = Path(folder) / STATISTICS_FILE
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} holds no statistics of tokens: {error}.") from error
        means = {name.removeprefix("mean."): one for name, one in tensors.items() if name.startswith("mean.")}
        covariances = {name: tensors.get(f"covariance.{name}") for name in means}
        whole = all(
            covariances[name] is not None and covariances[name].shape == (len(mean), len(mean))  # type: ignore[union-attr]
            for name, mean in means.items()
        )
        if not (means and whole and all(torch.isfinite(tensor).all() for tensor in tensors.values())):
            raise ValueError(f"{path} is damaged: it must hold a finite mean and covariance of every target.")
        return cls(means, covariances)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Reading:
    """How maps are read from a model.

    Args:
        kind: `plain`, `centred`, `own` or `whitened`.
        statistics: Of the tokens, for `whitened`.
        adapted: Whether to read the adapted layers; otherwise the same clusters are read from the model as it was
            before adaptation, which tells what training changed.
        assignments: Stored clusters, of a model whose adapter was merged and dropped.

    Raises:
        ValueError: If there is no such kind, or statistics are missing or given in vain.
    """

    kind: str = "plain"
    statistics: TokenStatistics | None = None
    adapted: bool = True
    assignments: Assignments | None = None

    def __post_init__(self) -> None:
        """Check that everything fits."""
        if self.kind not in KINDS:
            raise ValueError(f"There is no reading {self.kind!r}; choose one of {', '.join(KINDS)}.")
        if (self.kind == "whitened") != (self.statistics is not None):
            raise ValueError(
                "The reading `whitened`, and no other, takes statistics of the tokens: "
                "Reading('whitened', statistics=token_statistics(model, images))."
            )

    def readout(self, name: str, assignment: Float[Tensor, "channels clusters"]) -> Readout:
        """Return how the tokens of a target are read, given its assignment, in at least float32.

        Raises:
            ValueError: If the statistics lack the target or are of another width.
        """
        matrix = assignment.to(torch.promote_types(assignment.dtype, torch.float32))
        if self.kind == "plain":
            return Readout(matrix)
        matrix = matrix - matrix.mean(dim=1, keepdim=True)
        if self.statistics is None:
            return Readout(matrix, centre=self.kind == "own")
        if name not in self.statistics.means or len(self.statistics.means[name]) != len(matrix):
            raise ValueError(
                f"The statistics of tokens are of another model: they lack {name} with {len(matrix)} channels."
            )
        matrix = self.statistics.whitening(name).to(matrix) @ matrix
        return Readout(matrix, -self.statistics.means[name].to(matrix) @ matrix)
