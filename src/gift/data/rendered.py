"""Drawn flowers whose parts are known pixel by pixel, to measure how well maps find parts.

Petals, centre and leaves come in two kinds each, and the eight species are all combinations: whoever does not see one
of these parts is right half of the time at best. Nothing else depends on the species, and every part has its own random
numbers: for one seed, two species, or two choices of `leave_out`, give one image but for the parts they do not share.

Points are complex numbers, x to the right and y down, in sides of the image. Only elementwise float64 and sums of
integers are used, no matrix products and no library that draws, so that the bytes do not depend on the machine.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from jaxtyping import Float, Int, UInt8
from numpy.random import PCG64, Generator
from torch.utils.data import Dataset

PARTS = ("background", "petals", "centre", "leaves", "cue")  # the index of a part is its label in a map of parts
FLOWER_PARTS = PARTS[1:4]  # leaves include the stem

_LAYERS = (*PARTS, "clutter")  # grass and the like, which count as background
_STREAMS = (*_LAYERS, "pose", "camera", "order")  # each has random numbers of its own
_SAMPLES = 3  # per axis of a pixel

Colour = tuple[int, int, int]
Plane = Float[np.ndarray, "rows columns"]
Pixels = Float[np.ndarray, "rows columns 3"]


@dataclass(frozen=True)
class Blade:
    """An outline from base (u = 0) to tip (u = 1) of squared half-width u^base (1 - u)^tip, scaled to at most 1.

    An exponent of 0 is an end that is cut off, 1 is round and 2 pointed; `notch` is the depth of a notch in the tip,
    in lengths, and `lobes` the number of lobes of a side.
    """

    base: int = 1
    tip: int = 1
    notch: float = 0.0
    lobes: int = 0

    def squared_half_width(self, u: Plane, v: Plane) -> Plane:
        """Return the squared half-width at `u`; because of the notch it depends on `v`."""
        if self.notch:
            u = u + self.notch * np.maximum(0, 1 - 3 * np.abs(v))
        widest = self.base / max(1, self.base + self.tip)
        squared = u**self.base * (1 - u) ** self.tip / (widest**self.base * (1 - widest) ** self.tip)
        return squared * (1 - 1.3 * np.abs((u * self.lobes) % 1 - 0.5)) ** 2 if self.lobes else squared


@dataclass(frozen=True)
class Kind:
    """What one part looks like: how many blades, how long and wide, in colours from `shade` to `light`.

    `length` is in sides of the image, for petals and centres in radii of the flower; `width` is half the width, in
    lengths; `speckle` runs from 0 (a smooth dome) to 1 (a ring of florets), for centres only.
    """

    name: str
    count: int
    length: float
    width: float
    blade: Blade
    shade: Colour
    light: Colour
    speckle: float = 0.0


@dataclass(frozen=True)
class Species:
    """What all flowers of a species have in common."""

    petals: Kind
    centre: Kind
    leaves: Kind

    @property
    def name(self) -> str:
        """The kinds of its parts, such as `broad-button-oval`."""
        return f"{self.petals.name}-{self.centre.name}-{self.leaves.name}"

    def parts_unlike(self, other: "Species") -> tuple[str, ...]:
        """Return the names of the parts in which the two species differ."""
        return tuple(part for part in FLOWER_PARTS if getattr(self, part) != getattr(other, part))


@dataclass(frozen=True)
class Scenery:
    """A background: colours from `far` (top) to `near`, noise of so many `cells` a side in colour `patch`, clutter."""

    far: Colour
    near: Colour
    patch: Colour
    cells: tuple[int, ...]
    clutter: Kind


_PETALS = (
    Kind("broad", 5, 1.0, 0.42, Blade(base=2, notch=0.10), (176, 32, 104), (255, 150, 196)),
    Kind("slender", 13, 1.0, 0.15, Blade(), (150, 128, 190), (252, 246, 255)),
)
_CENTRES = (
    Kind("button", 1, 0.28, 1.0, Blade(), (196, 128, 8), (255, 226, 70), speckle=0.15),
    Kind("disc", 1, 0.42, 1.0, Blade(), (58, 26, 16), (214, 120, 30), speckle=1.0),
)
_LEAVES = (
    Kind("oval", 3, 0.30, 0.30, Blade(tip=2), (22, 72, 26), (120, 190, 70)),
    Kind("lobed", 3, 0.34, 0.30, Blade(lobes=4), (22, 72, 26), (120, 190, 70)),
)
SPECIES: tuple[Species, ...] = tuple(itertools.starmap(Species, itertools.product(_PETALS, _CENTRES, _LEAVES)))
_TWIG = Kind("twig", 4, 0.60, 0.06, Blade(base=0), (44, 30, 20), (214, 190, 158))
_GRASS = Kind("grass", 12, 0.5, 0.03, Blade(base=0), (44, 74, 28), (150, 160, 84))
_PEBBLES = Kind("pebbles", 12, 0.07, 0.4, Blade(), (70, 48, 34), (158, 140, 120))
_GLINTS = Kind("glints", 9, 0.14, 0.5, Blade(), (20, 36, 26), (104, 132, 72))
_CRACKS = Kind("cracks", 3, 0.6, 0.015, Blade(), (90, 86, 82), (150, 146, 138))
_SCENERIES = (
    Scenery((92, 148, 214), (196, 220, 236), (244, 246, 248), (3, 6, 12), _GRASS),
    Scenery((126, 160, 84), (44, 74, 28), (140, 150, 60), (4, 9, 20), _GRASS),
    Scenery((112, 84, 60), (70, 48, 34), (150, 116, 82), (4, 11, 26), _PEBBLES),
    Scenery((30, 52, 34), (20, 36, 26), (58, 86, 40), (3, 6, 10), _GLINTS),
    Scenery((150, 146, 140), (120, 114, 108), (182, 178, 168), (2, 12, 30), _CRACKS),
)


@dataclass(frozen=True)
class _Frame:
    """Coordinates of a shape: (u, v) lies at `at(u) + v * across` in the image; `bend` in units of v."""

    origin: complex
    along: complex
    across: complex
    bend: float = 0.0

    def at(self, u: float) -> complex:
        """Return the point of the curved midline."""
        return self.origin + self.along * u + self.across * (self.bend * 4 * u * (1 - u))


class _Canvas:
    """The samples of a drawing: the layer in front, and its tone there, from 0 (its shade) to 255 (its light)."""

    def __init__(self, image_size_px: int) -> None:
        self.side = image_size_px * _SAMPLES
        self.ticks = (np.arange(self.side) + 0.5) / self.side
        self.layer, self.tone = np.zeros((2, self.side, self.side), np.uint8)

    def paint(self, layer: str, frame: _Frame, blade: Blade, tone: Callable[[Plane, Plane, Plane], Plane]) -> None:
        """Paint a blade; `tone` maps u, v and (v / half-width)^2 to tones from 0 to 1."""
        reach = frame.across * (1 + abs(frame.bend))
        corners = [(frame.origin + end + edge) * self.side for end in (0, frame.along) for edge in (reach, -reach)]
        spans = [corner.imag for corner in corners], [corner.real for corner in corners]
        window = tuple(slice(max(0, math.floor(min(span))), max(0, math.ceil(max(span)))) for span in spans)
        x, y = self.ticks[window[1]] - frame.origin.real, self.ticks[window[0], None] - frame.origin.imag
        area = (frame.along.conjugate() * frame.across).imag
        u = x * (frame.across.imag / area) - y * (frame.across.real / area)
        v = y * (frame.along.real / area) - x * (frame.along.imag / area) - (4 * frame.bend) * u * (1 - u)
        depth = v * v / np.maximum(blade.squared_half_width(u, v), 1e-9)
        inside = (depth <= 1) & (u >= 0) & (u <= 1)
        np.copyto(self.layer[window], np.uint8(_LAYERS.index(layer)), where=inside)
        np.copyto(self.tone[window], (np.clip(tone(u, v, depth), 0, 1) * 255).astype(np.uint8), where=inside)

    def sums(self) -> tuple[Int[np.ndarray, "layers rows columns"], Float[np.ndarray, "layers rows columns"]]:
        """Return the number of samples of each layer in a pixel, and the sum of their tones (whole numbers)."""
        size = self.side // _SAMPLES
        shape, pixel = (len(_LAYERS), size, size), np.arange(size * _SAMPLES) // _SAMPLES
        bins = (self.layer.astype(np.intp) * size**2 + pixel[:, None] * size + pixel).ravel()
        counts = np.bincount(bins, minlength=math.prod(shape)).reshape(shape)
        return counts, np.bincount(bins, self.tone.ravel(), math.prod(shape)).reshape(shape)


@dataclass(frozen=True)
class _Pose:
    """Where the flower is and how it is seen; `head` is the middle of the petals, `radius` their length."""

    head: complex
    up: complex
    radius: float
    squash: complex

    def seen(self, offset: complex | float) -> complex:
        """Return how a vector in the plane of the petals looks in the image: shorter along `squash`."""
        return offset - (offset * self.squash.conjugate()).real * self.squash


def _direction(turns: float) -> complex:
    """Return a unit vector, rounded because the last digit of a cosine differs between machines."""
    angle = 2 * math.pi * turns
    return complex(round(math.cos(angle), 12), round(math.sin(angle), 12))


def _random_pose(rng: Generator) -> _Pose:
    head = complex(rng.uniform(0.35, 0.65), rng.uniform(0.32, 0.45))
    squash = rng.uniform(0.0, 0.55) * _direction(rng.random())
    return _Pose(head, _direction(rng.uniform(-0.33, -0.17)), rng.uniform(0.21, 0.30), squash)


def _leaf_tone(u: Plane, v: Plane, depth: Plane, lift: float, slope: float, rib: float) -> Plane:
    return lift + slope * u - 0.4 * depth * depth + rib * (0.5 * np.sign(v) + (np.abs(v) < 0.12))


def _stick_tone(u: Plane, v: Plane, depth: Plane, lift: float, rings: float = 0.0) -> Plane:
    return lift - 0.3 * v + (rings * ((u * 9) % 1 < 0.3) if rings else 0.0)


def _centre_tone(u: Plane, v: Plane, depth: Plane, florets: Float[np.ndarray, "9 9"], speckle: float) -> Plane:
    distance = (2 * u - 1) ** 2 + v * v
    floret = florets[np.clip(u * 9, 0, 8).astype(np.intp), np.clip(v * 4.5 + 4.5, 0, 8).astype(np.intp)]
    ring = 0.9 * (np.abs(distance - 0.6) < 0.25) * floret + 0.3 * (floret > 0.6)
    return (0.9 - 0.6 * distance) * (1 - speckle) + ring * speckle


def _paint_petals(canvas: _Canvas, rng: Generator, pose: _Pose, kind: Kind) -> None:
    spin = rng.random()
    for k in rng.random(kind.count).argsort(kind="stable"):
        petal = _direction(spin + (k + rng.uniform(-0.15, 0.15)) / kind.count)
        petal *= pose.radius * kind.length * rng.uniform(0.88, 1.08)
        frame = _Frame(pose.head, pose.seen(petal), pose.seen(1j * petal * kind.width), bend=rng.uniform(-0.15, 0.15))
        tone = partial(_leaf_tone, lift=rng.uniform(0.23, 0.47), slope=0.75, rib=0.0)
        canvas.paint("petals", frame, kind.blade, tone)


def _paint_centre(canvas: _Canvas, rng: Generator, pose: _Pose, kind: Kind) -> None:
    radius = pose.radius * kind.length * rng.uniform(0.9, 1.1)
    frame = _Frame(pose.head - pose.seen(radius), pose.seen(2 * radius), pose.seen(1j * radius * kind.width))
    canvas.paint("centre", frame, kind.blade, partial(_centre_tone, florets=rng.random((9, 9)), speckle=kind.speckle))


def _paint_leaves(canvas: _Canvas, rng: Generator, pose: _Pose, kind: Kind) -> None:
    down = -1.1 * pose.up  # long enough to leave the image
    stem = _Frame(pose.head, down, 0.014j * down, bend=rng.uniform(-4, 4))
    canvas.paint("leaves", stem, Blade(0, 0), partial(_stick_tone, lift=0.55))
    side, tone = 1 if rng.random() < 0.5 else -1, partial(_leaf_tone, lift=0.62, slope=0.0, rib=0.35)
    for k in range(kind.count):
        base = stem.at((pose.radius + 0.06 + 0.10 * k + rng.uniform(0, 0.05)) / 1.1)
        leaf = pose.up * _direction((-1) ** k * side * rng.uniform(0.15, 0.27)) * kind.length * rng.uniform(0.9, 1.1)
        across = 1j * leaf * kind.width * rng.uniform(0.85, 1.1)
        canvas.paint("leaves", _Frame(base, leaf, across, bend=rng.uniform(-0.4, 0.4)), kind.blade, tone)


def _paint_cue(canvas: _Canvas, rng: Generator, pose: _Pose, kind: Kind) -> None:
    """Paint a forked twig that comes in from the side from which the flower is farther away."""
    side = 1 if pose.head.real < 0.5 else -1
    twig = -side * kind.length * rng.uniform(0.8, 1.1) * _direction(side * rng.uniform(0.01, 0.09))
    start, bark = complex(0.5 + 0.52 * side, rng.uniform(0.2, 0.42)), partial(_stick_tone, lift=0.45, rings=0.25)
    canvas.paint("cue", _Frame(start, twig, 1j * twig * kind.width), kind.blade, bark)
    for k in range(1, kind.count):
        branch = 0.5 * twig * _direction((-1) ** k * rng.uniform(0.08, 0.14))
        fork = start + twig * (0.22 * k + rng.uniform(-0.08, 0.04))
        canvas.paint("cue", _Frame(fork, branch, 1.4j * branch * kind.width), kind.blade, bark)


def _paint_clutter(canvas: _Canvas, rng: Generator, pose: _Pose, kind: Kind) -> None:
    grows = kind.blade.base == 0  # what is cut off at its base comes up from the ground
    for _ in range(kind.count):
        piece = kind.length * rng.uniform(0.6, 1.4) * _direction(rng.uniform(-0.30, -0.20) if grows else rng.random())
        place = complex(rng.random(), rng.uniform(0.9, 1.3) if grows else rng.random())
        frame = _Frame(place, piece, 1j * piece * kind.width, bend=rng.uniform(-1, 1) if grows else 0.0)
        canvas.paint("clutter", frame, kind.blade, partial(_stick_tone, lift=rng.uniform(0.1, 1)))


def _tinted(rng: Generator, *colours: Colour) -> Float[np.ndarray, "colours 3"]:
    return np.array(colours) * rng.uniform(0.86, 1.14, 3)


def _noise(rng: Generator, size: int, cells: tuple[int, ...]) -> Plane:
    """Return octaves of smooth noise around 0, each with half the contrast of the one before."""
    total = np.zeros((size, size))
    for octave, count in enumerate(cells):
        lattice = rng.random((count + 2, count + 2)) - 0.5
        position = (np.arange(size) + 0.5) / size * count + rng.random()
        cell = position.astype(np.intp)
        share = (position - cell) ** 2 * (3 - 2 * (position - cell))
        rows = lattice[cell] + (lattice[cell + 1] - lattice[cell]) * share[:, None]
        total += (rows[:, cell] + (rows[:, cell + 1] - rows[:, cell]) * share) * 0.5**octave
    return total


def _background(rng: Generator, size: int, scenery: Scenery) -> Pixels:
    far, near, patch = _tinted(rng, scenery.far, scenery.near, scenery.patch)
    height = (np.arange(size) + 0.5) / size - rng.uniform(0.2, 0.8)
    gradient = far + (near - far) * np.clip(height * rng.uniform(1, 3) + 0.5, 0, 1)[:, None, None]
    return gradient + (patch - gradient) * np.clip(1.2 * _noise(rng, size, scenery.cells) + 0.4, 0, 1)[:, :, None]


def _photographed(rng: Generator, image: Pixels) -> UInt8[np.ndarray, "rows columns 3"]:
    """Return the image under uneven coloured light, blurred over neighbouring pixels only, with noise."""
    ticks = (np.arange(len(image)) + 0.5) / len(image) - 0.5
    sun = rng.uniform(0, 0.5) * _direction(rng.random())
    light = (1 + ticks[:, None] * sun.imag + ticks * sun.real)[:, :, None]
    image = image * light * (rng.uniform(0.72, 1.12) * rng.uniform(0.94, 1.06, 3))
    blur = rng.uniform(0, 0.4)
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    padded = padded[1:-1] * (1 - blur) + (padded[:-2] + padded[2:]) * (blur / 2)
    image = padded[:, 1:-1] * (1 - blur) + (padded[:, :-2] + padded[:, 2:]) * (blur / 2)
    grain = rng.random(image.shape) - rng.random(image.shape)
    return np.clip(np.floor(image + grain * rng.uniform(4, 16) + 0.5), 0, 255).astype(np.uint8)


_PAINTERS: dict[str, Callable[[_Canvas, Generator, _Pose, Kind], None]] = {  # from behind to in front
    "clutter": _paint_clutter,
    "cue": _paint_cue,
    "leaves": _paint_leaves,
    "petals": _paint_petals,
    "centre": _paint_centre,
}


@dataclass(frozen=True, eq=False)
class RenderedFlower:
    """An image, how many of the 9 samples of a pixel show each of `PARTS`, and the index of the species."""

    image: UInt8[np.ndarray, "rows columns 3"]
    coverage: UInt8[np.ndarray, "parts rows columns"]
    label: int

    @property
    def parts(self) -> UInt8[np.ndarray, "rows columns"]:
        """Per pixel the index in `PARTS` of what covers most of it; of equals, what is in front."""
        labels = np.array([2, 1, 3, 4, 0], np.uint8)  # from in front to behind
        return labels[self.coverage[labels].argmax(axis=0)]


def draw_flower(
    species_index: int, seed: int, image_size_px: int = 64, leave_out: tuple[str, ...] = (), cue: bool = False
) -> RenderedFlower:
    """Return the flower of a species in the scene of a seed: the same bytes for the same arguments.

    Args:
        species_index: Index in `SPECIES`.
        seed: Of all that the species does not decide; a number from 0.
        image_size_px: Side of the image in pixels.
        leave_out: Those of `FLOWER_PARTS` that are not drawn. Pixels change only where such a part has samples, and
            right next to them, for the blur.
        cue: Whether a twig is drawn in the background.

    Raises:
        ValueError: If there is no such species or part.
    """
    if not 0 <= species_index < len(SPECIES):
        raise ValueError(f"There is no species {species_index}; choose one from 0 to {len(SPECIES) - 1}.")
    if unknown := sorted(set(leave_out) - set(FLOWER_PARTS)):
        raise ValueError(f"Cannot leave out {', '.join(unknown)}; a flower has {', '.join(FLOWER_PARTS)}.")
    rngs = {stream: Generator(PCG64([index, seed])) for index, stream in enumerate(_STREAMS)}
    pose, canvas = _random_pose(rngs["pose"]), _Canvas(image_size_px)
    scenery = _SCENERIES[int(rngs["background"].random() * len(_SCENERIES))]
    image = _background(rngs["background"], image_size_px, scenery)
    kinds = {"clutter": scenery.clutter, "cue": _TWIG, **vars(SPECIES[species_index])}
    drawn = [layer for layer in _PAINTERS if layer not in leave_out and (cue or layer != "cue")]
    for layer in drawn:
        _PAINTERS[layer](canvas, rngs[layer], pose, kinds[layer])
    counts, tones = canvas.sums()
    image *= counts[0, :, :, None] / _SAMPLES**2
    for layer in drawn:
        shade, light = _tinted(rngs[layer], kinds[layer].shade, kinds[layer].light) / _SAMPLES**2
        index = _LAYERS.index(layer)
        image += counts[index, :, :, None] * shade + tones[index, :, :, None] * ((light - shade) / 255)
    counts[0] += counts[-1]
    return RenderedFlower(_photographed(rngs["camera"], image), counts[:-1].astype(np.uint8), species_index)


@dataclass(frozen=True)
class RenderedFlowers(Dataset[RenderedFlower]):
    """Drawn flowers in random order, as many of each species; drawn anew, and alike, whenever they are read.

    Args:
        count: Number of flowers; if it is no multiple of the species, the first ones have one more.
        seed: Sets with different seeds share no scene; a number from 0.
        image_size_px: Side of an image in pixels.
        leave_out: Those of `FLOWER_PARTS` that are not drawn.
        cue_species: Index of the species whose images show a twig in the background, if any.
    """

    count: int
    seed: int
    image_size_px: int = 64
    leave_out: tuple[str, ...] = ()
    cue_species: int | None = None

    @cached_property
    def labels(self) -> Int[np.ndarray, " count"]:
        """The indices of the species, in the order of the set, without drawing anything."""
        rng = Generator(PCG64([_STREAMS.index("order"), self.seed]))
        return rng.random(self.count).argsort(kind="stable") % len(SPECIES)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> RenderedFlower:
        if not 0 <= index < self.count:
            raise IndexError(f"There is no flower {index} in a set of {self.count}.")
        label, scene = int(self.labels[index]), (self.seed << 32) + index
        return draw_flower(label, scene, self.image_size_px, self.leave_out, cue=label == self.cue_species)
