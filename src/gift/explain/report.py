"""One HTML file that shows what an adapter sees in some pictures: no server, no network, opens from disk.

`assets/report/page.html` is the page, into which its style, its script and the data are put; the script draws what is
computed here. Responses are stored as bytes: strengths on each cluster's scale, 0 to 1.
"""

import base64
import io
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Integer
from matplotlib import colormaps
from PIL import Image

from gift.explain.names import ClusterNames, ClusterRef
from gift.explain.ranking import ClusterScales, rank_for_dataset, rank_for_image, strongest_responses
from gift.explain.render import COLOURS
from gift.explain.viewer import Seen, Viewer

PAGE = Path(__file__).parents[1] / "assets" / "report"
MAPS_BYTES = 5_000_000  # of all strengths; where there are more, only the clusters that rank best are kept
FEWEST_CLUSTERS = 8
RANKED, LIKES, RESPONSES, CLASSES_SHOWN = 12, 8, 6, 3
QUALITY = 85  # of the pictures, as JPEG


@dataclass(frozen=True)
class Surrounding:
    """What a report says beside what is seen.

    Attributes:
        adapter: What to call the adapter.
        names: What people call its clusters.
        problems: Why some pictures are not shown, by their names.
        left_out: How many others are not shown, as there are too many.
        scores: What `gift score` wrote of the adapter, or None.
    """

    adapter: str
    names: ClusterNames = field(default_factory=ClusterNames)
    problems: dict[str, str] = field(default_factory=dict)
    left_out: int = 0
    scores: dict[str, Any] | None = None


def write_report(viewer: Viewer, seen: Seen, surrounding: Surrounding, path: Path) -> None:
    """Write the report."""
    data = json.dumps(report_data(viewer, seen, surrounding), ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    page = (PAGE / "page.html").read_text(encoding="utf-8")
    parts = {"style": (PAGE / "page.css").read_text(encoding="utf-8")}
    parts |= {"script": (PAGE / "page.js").read_text(encoding="utf-8")}
    parts |= {"data": data.replace("<", "\\u003c")}  # a name must not end the script
    before, *rest = page.split("{{")
    with path.open("w", encoding="utf-8") as file:
        file.write(before)
        for part in rest:
            name, _, after = part.partition("}}")
            file.write(parts[name])
            file.write(after)


def report_data(viewer: Viewer, seen: Seen, surrounding: Surrounding) -> dict[str, Any]:
    """Return all that the page shows, as JSON can hold it; README of `assets/report` says what is what."""
    seen = replace(seen, maps=_fitting(seen, surrounding.names))
    maps, scales = seen.maps, seen.scales()
    segments = [maps.segment(place) for place in range(len(maps.layer_names))]
    labels = np.stack([of_layer.labels for of_layer in segments], axis=1)
    strength = scales.strength(np.asarray(maps.maps))
    geometry = viewer.geometry
    return {
        "adapter": surrounding.adapter,
        "method": viewer.loaded.classifier.method,
        "backbone": Path(viewer.loaded.classifier.backbone).name,
        "reading": maps.reading,
        "image_size_px": geometry.size_px,
        "versions": maps.versions,
        "classes": list(seen.class_names),
        "grid": list(maps.maps.shape[3:]),
        "all_clusters": viewer.clusters,
        "clusters": list(maps.cluster_numbers),
        "colours": {name: _bytes(colormaps[name](np.arange(256), bytes=True)[:, :3]) for name in COLOURS},
        "layers": [
            {
                "name": name,
                "number": number,
                "labels": list(of_layer.names),
                "palette": ["#" + bytes(colour).hex() for colour in of_layer.palette],
                "likes": _likes(seen, scales, place),
            }
            for place, (name, number, of_layer) in enumerate(
                zip(maps.layer_names, maps.layer_numbers, segments, strict=True)
            )
        ],
        "images": [_image(seen, scales, image, strength[image], labels[image]) for image in range(len(seen.pictures))],
        "names": dict(surrounding.names.clusters),
        "combinations": [
            {"name": name, "how": combination.how, "members": [str(member) for member in combination.members]}
            for name, combination in surrounding.names.combinations.items()
        ],
        "scores": surrounding.scores,
        "problems": [[name, reason] for name, reason in surrounding.problems.items()],
        "left_out": surrounding.left_out,
    }


def _fitting(seen: Seen, names: ClusterNames) -> Any:
    """Return the maps of as many clusters as the report can hold: the named ones, then those that rank best."""
    maps = seen.maps
    count = max(FEWEST_CLUSTERS, MAPS_BYTES // (maps.maps.size // maps.maps.shape[2]))
    if count >= maps.maps.shape[2]:
        return maps
    members = [member for combination in names.combinations.values() for member in combination.members]
    named = [ref.cluster for ref in (*map(ClusterRef.parse, names.clusters), *members)]
    labels = np.unique(seen.labels, return_inverse=True)[1]
    ranked = rank_for_dataset(maps, labels, count=maps.maps.shape[2])
    order = dict.fromkeys([place for place in named if place < maps.maps.shape[2]] + [one.cluster for one in ranked])
    order |= dict.fromkeys(place for place in range(maps.maps.shape[2]) if place not in order)
    return maps.of_clusters(sorted(list(order)[:count]))


def _image(
    seen: Seen,
    scales: ClusterScales,
    image: int,
    strength: Float[np.ndarray, "layers clusters rows columns"],
    labels: Integer[np.ndarray, "layers rows columns"],
) -> dict[str, Any]:
    picture, layers = seen.pictures[image], range(len(strength))
    ranked = [rank_for_image(seen.maps, image, scales, RANKED, layer) for layer in layers]
    encoded = io.BytesIO()
    Image.fromarray(picture.shown).save(encoded, "JPEG", quality=QUALITY)
    return {
        "name": picture.name,
        "group": picture.group,
        "is_class": picture.group in seen.class_names,
        "src": f"data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode()}",
        "with": seen.predictions(image),
        "without": seen.predictions_without(image),
        "maps": _bytes(np.rint(255 * np.clip(strength, 0, 1))),
        "labels": _bytes(labels),
        "ranked": [[_entry(one) for one in of_layer] for of_layer in ranked],
        "best": [[one.layer, *_entry(one)] for one in rank_for_image(seen.maps, image, scales)],
    }


def _entry(one: Any) -> list[Any]:
    return [one.cluster, round(one.score, 4), {name: round(value, 4) for name, value in one.criteria.items()}]


def _likes(seen: Seen, scales: ClusterScales, layer: int) -> list[dict[str, Any]]:
    """Return what the clusters of a layer respond to, those that are most worth looking at first."""
    labels = np.unique(seen.labels, return_inverse=True)[1]
    found = []
    for one in rank_for_dataset(seen.maps, labels, count=LIKES, layer=layer):
        of_classes = scales.class_means[layer, one.cluster]
        liked = [number for number in np.argsort(-of_classes, kind="stable")[:CLASSES_SHOWN] if of_classes[number] > 0]
        responses = strongest_responses(seen.maps, layer, one.cluster, RESPONSES)
        found.append(
            {
                "cluster": one.cluster,
                "score": round(one.score, 4),
                "responses": [[each.image, each.row, each.column] for each in responses],
                "classes": [[seen.class_names[number], round(float(of_classes[number]), 2)] for number in liked],
            }
        )
    return found


def _bytes(values: Any) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype=np.uint8).tobytes()).decode()
