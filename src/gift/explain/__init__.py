"""What an adapter learned: cluster maps of images, which of them to look at, how far to trust them."""

from gift.explain.assignments import Assignments
from gift.explain.clusters import ClusterMaps, explain_images
from gift.explain.merged import merge_and_save
from gift.explain.names import ClusterNames, ClusterRef, Combination
from gift.explain.readings import Reading, TokenStatistics
from gift.explain.recording import recording_maps, token_statistics
from gift.explain.segments import LabelMaps

__all__ = [
    "Assignments",
    "ClusterMaps",
    "ClusterNames",
    "ClusterRef",
    "Combination",
    "LabelMaps",
    "Reading",
    "TokenStatistics",
    "explain_images",
    "merge_and_save",
    "recording_maps",
    "token_statistics",
]
