"""Names that people give to clusters and to combinations of clusters, kept in a file beside the adapter."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from gift.explain.scores import standardised

FILE = "cluster_names.json"
LABEL = re.compile(r"L(0|[1-9][0-9]{0,8})/C(0|[1-9][0-9]{0,8})")
ANY_LABEL = re.compile(r"\bL[0-9]+/C[0-9]+", re.IGNORECASE)  # what a person would take for a label
LONGEST_NAME = 60
SUM, INTERSECTION = "sum", "intersection"
HOWS = (SUM, INTERSECTION)


@dataclass(frozen=True, order=True)
class ClusterRef:
    """One cluster of one layer; as text its label, such as "L8/C28".

    Attributes:
        layer: Place of the layer among the adapted ones, from 0.
        cluster: Number of the cluster, from 0.

    Raises:
        ValueError: If a number is negative.
    """

    layer: int
    cluster: int

    def __post_init__(self) -> None:
        if self.layer < 0 or self.cluster < 0:
            raise ValueError(
                f"Layers and clusters are counted from 0, got layer {self.layer}, cluster {self.cluster}: "
                "give their places from the start."
            )

    def __str__(self) -> str:
        return f"L{self.layer}/C{self.cluster}"

    @classmethod
    def parse(cls, label: str) -> "ClusterRef":
        """Return the cluster that a label such as "L8/C28" stands for.

        Raises:
            ValueError: If it is no label.
        """
        match = LABEL.fullmatch(label)
        if match is None:
            raise ValueError(f"A cluster is written like L8/C28 (layer 8, cluster 28), got {label!r}.")
        return cls(int(match[1]), int(match[2]))


@dataclass(frozen=True)
class Combination:
    """Clusters that mean something together.

    Attributes:
        how: "sum" or "intersection", see `combined_map`.
        members: The clusters: at least two, all different, of any layers.

    Raises:
        ValueError: If they are fewer, or repeat, or `how` is another word.
    """

    how: str
    members: tuple[ClusterRef, ...]

    def __post_init__(self) -> None:
        _check_how(self.how)
        listed = ", ".join(map(str, self.members))
        if len(self.members) < 2:
            raise ValueError(f"A combination needs at least two clusters, got {listed or 'none'}: add another.")
        if len(set(self.members)) < len(self.members):
            raise ValueError(f"The clusters of a combination must differ, got {listed}: name each of them once.")


@dataclass(frozen=True)
class ClusterNames:
    """The names of some clusters and combinations, no two alike; changes give new `ClusterNames`.

    Attributes:
        clusters: Name of every named cluster, by its label.
        combinations: Combinations by their names.

    Raises:
        ValueError: If a name is empty, longer than 60 characters, not printable, begins or ends with a space, contains
            a label, or is given twice; or if a key of `clusters` is no label.
    """

    clusters: Mapping[str, str] = field(default_factory=dict)
    combinations: Mapping[str, Combination] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "clusters", dict(self.clusters))  # our own: a caller may go on changing theirs
        object.__setattr__(self, "combinations", dict(self.combinations))
        owners: dict[str, str] = {}
        for label, name in self.clusters.items():
            _claim(owners, name, str(ClusterRef.parse(label)))
        for name in self.combinations:
            _claim(owners, name, "a combination")

    def label(self, ref: ClusterRef) -> str:
        """Return what to call a cluster: its name with its label, "beak (L8/C28)", or only its label."""
        name = self.clusters.get(str(ref))
        return str(ref) if name is None else f"{name} ({ref})"

    def with_name(self, ref: ClusterRef, name: str) -> "ClusterNames":
        """Return these names with one for a cluster, instead of the one it may have had; outer spaces are dropped.

        Raises:
            ValueError: If it is no name, or belongs to another cluster or a combination.
        """
        return replace(self, clusters={**self.clusters, str(ref): name.strip()})

    def with_combination(self, name: str, combination: Combination) -> "ClusterNames":
        """Return these names with a combination; spaces around its name are dropped.

        Raises:
            ValueError: If it is no name, or belongs to a cluster or a combination already.
        """
        name = name.strip()
        if name in self.combinations:
            raise ValueError(f"{name!r} already names a combination: choose another name, or remove that one first.")
        return replace(self, combinations={**self.combinations, name: combination})

    def without(self, name: str) -> "ClusterNames":
        """Return these names less one, of a cluster or a combination.

        Raises:
            ValueError: If there is no such name.
        """
        name = name.strip()
        known = [*self.clusters.values(), *self.combinations]
        if name not in known:
            raise ValueError(f"There is no name {name!r} to remove; there are: {', '.join(sorted(known)) or 'none'}.")
        clusters = {label: given for label, given in self.clusters.items() if given != name}
        combinations = {given: members for given, members in self.combinations.items() if given != name}
        return ClusterNames(clusters, combinations)

    def save(self, folder: Path | str) -> None:
        """Write `cluster_names.json` into a folder, which is made if need be, whole or not at all."""
        combinations = {
            name: {"how": combination.how, "members": [str(member) for member in combination.members]}
            for name, combination in self.combinations.items()
        }
        record = {"clusters": self.clusters, "combinations": combinations}
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{FILE}.partial"
        try:
            partial.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            partial.replace(folder / FILE)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: Path | str) -> "ClusterNames":
        """Return the names that a folder holds; none if it has no `cluster_names.json`.

        Raises:
            ValueError: If the file is damaged or holds anything but valid names; the message gives its path.
        """
        path = Path(folder) / FILE
        if not path.exists():
            return cls()
        content = path.read_bytes()
        try:
            return _names(json.loads(content.decode("utf-8"), object_pairs_hook=_distinct_keys))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} holds no valid names; correct it or move it away: {error}") from error


def combined_map(
    maps: Float[np.ndarray, "batch members rows columns"], how: str
) -> Float[np.ndarray, "batch rows columns"]:
    """Return one map of several clusters: where any of them responds, or where all of them do.

    Every member is standardised over all patches of all images (mean 0, standard deviation 1; one that does not vary
    becomes 0), so that they count alike. In units of standard deviations.

    Args:
        maps: The members' maps, of one or of several layers.
        how: "sum" adds the members, "intersection" takes the smallest of them in every patch.

    Raises:
        ValueError: If `how` is another word, or the maps are none or not finite.
    """
    _check_how(how)
    if maps.size == 0:
        raise ValueError(f"There must be an image, a member and a patch at least, got maps of shape {maps.shape}.")
    broken = np.flatnonzero(~np.isfinite(maps).all(axis=(0, 2, 3)))
    if broken.size:
        listed = ", ".join(str(member) for member in broken)
        raise ValueError(f"The maps of the members {listed} (from 0) have NaN or infinite values: leave them out.")
    by_member = np.moveaxis(maps, 1, 0)  # [members, batch, rows, columns]
    responses = standardised(by_member.reshape(len(by_member), -1)).reshape(by_member.shape)
    return responses.sum(axis=0) if how == SUM else responses.min(axis=0)


def _check_how(how: str) -> None:
    if how not in HOWS:
        raise ValueError(f"Clusters are combined by one of {', '.join(HOWS)}, got {how!r}.")


def _claim(owners: dict[str, str], name: str, owner: str) -> None:
    """Add a name and what it names, unless it is no name or taken."""
    if name != name.strip() or not name.isprintable() or not 1 <= len(name) <= LONGEST_NAME:
        raise ValueError(
            f"A name has 1 to {LONGEST_NAME} printable characters and no space at its ends, got {name!r} for {owner}."
        )
    if ANY_LABEL.search(name):
        raise ValueError(f"A name must not contain what looks like a label such as L1/C2, got {name!r} for {owner}.")
    if name in owners:
        raise ValueError(f"{name!r} cannot name {owner}, for it names {owners[name]}: choose another name.")
    owners[name] = owner


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, of which Python would drop all but the last value of a key."""
    keys = [key for key, _ in pairs]
    repeated = sorted({key for key in keys if keys.count(key) > 1})
    if repeated:
        raise ValueError(f"{', '.join(map(repr, repeated))} stands there twice.")
    return dict(pairs)


def _names(record: Any) -> ClusterNames:
    """Return the names that a file's JSON stands for."""
    parts = _fields(record, "the file", ("clusters", "combinations"))
    clusters = _object(parts["clusters"], "clusters")
    for label, name in clusters.items():
        if not isinstance(name, str):
            raise ValueError(f"The name of {label} must be text, got {name!r}.")
    combinations = _object(parts["combinations"], "combinations")
    return ClusterNames(clusters, {name: _combination(name, stored) for name, stored in combinations.items()})


def _combination(name: str, stored: Any) -> Combination:
    parts = _fields(stored, f"the combination {name!r}", ("how", "members"))
    how, members = parts["how"], parts["members"]
    if not isinstance(how, str):
        raise ValueError(f"'how' of the combination {name!r} must be text, got {how!r}.")
    if not isinstance(members, list) or not all(isinstance(member, str) for member in members):
        raise ValueError(f"'members' of the combination {name!r} must be a list of labels, got {members!r}.")
    return Combination(how, tuple(ClusterRef.parse(member) for member in members))


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"Expected a JSON object for {what}, got {type(value).__name__}.")
    return value


def _fields(value: Any, what: str, expected: Sequence[str]) -> dict[str, Any]:
    found = _object(value, what)
    if set(found) != set(expected):
        raise ValueError(f"Expected {_listed(expected)} in {what}, got {_listed(found) or 'nothing'}.")
    return found


def _listed(keys: Iterable[str]) -> str:
    return ", ".join(repr(key) for key in keys)
