"""How cluster maps show themselves in Jupyter."""

import base64
import io
from html import escape
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from PIL import Image

from gift.explain.ranking import ClusterScales, rank_for_dataset
from gift.explain.render import COLOURS

if TYPE_CHECKING:
    from gift.explain.clusters import ClusterMaps

IMAGES, CLUSTERS, SHOWN_PX = 4, 6, 96


def maps_as_html(maps: "ClusterMaps") -> str:
    """Return a table: the first images, and the maps of the clusters that are most worth looking at.

    Each cluster has one scale for all images: dark is its median response, light what 2 % of all patches exceed.
    """
    batch, layers, clusters, rows, columns = maps.maps.shape
    about = f"{batch} images, {layers} layers, {clusters} clusters, {rows} x {columns} patches, read as {maps.reading}"
    ranked = rank_for_dataset(maps, maps.predictions, count=CLUSTERS)
    strength = ClusterScales.of(maps).strength(np.asarray(maps.maps[:IMAGES]))
    head = "".join(f"<th>{escape(str(one.ref))}</th>" for one in ranked)
    body = "".join(
        f"<tr><th>image {image}<br>class {maps.predictions[image]}</th>"
        + "".join(f"<td>{_drawn(of_image[one.layer, one.cluster], image, str(one.ref))}</td>" for one in ranked)
        + "</tr>"
        for image, of_image in enumerate(strength)
    )
    more = f"<p>{batch - IMAGES} more images.</p>" if batch > IMAGES else ""
    return f"<table><caption>{escape(about)}</caption><tr><th></th>{head}</tr>{body}</table>{more}"


def _drawn(strength: np.ndarray, image: int, ref: str) -> str:
    """Return one map as an image in HTML."""
    colours = colormaps[COLOURS[0]](np.clip(strength, 0, 1), bytes=True)[..., :3]
    encoded = io.BytesIO()
    Image.fromarray(colours).resize((SHOWN_PX, SHOWN_PX), Image.Resampling.BILINEAR).save(encoded, "PNG")
    source = base64.b64encode(encoded.getvalue()).decode()
    return f'<img src="data:image/png;base64,{source}" alt="map of {escape(ref)} for image {image}" width="{SHOWN_PX}">'
