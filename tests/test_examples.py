"""The examples run and show what they promise."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"
CLUSTERS = 5


@pytest.mark.slow
def test_patch_clusters_learns_digits_and_draws_a_map_for_every_cluster(tmp_path: Path) -> None:
    path = tmp_path / "clusters.png"
    command = [sys.executable, "-W", "error", EXAMPLES / "patch_clusters.py", "--out", path]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    accuracy = re.fullmatch(r"test accuracy ([\d.]+) %\n", finished.stdout)
    assert accuracy is not None
    assert float(accuracy[1]) > 95

    picture = np.asarray(Image.open(path).convert("RGB"), dtype=float)
    columns = np.array_split(picture, 1 + CLUSTERS, axis=1)
    colourfulness = [np.ptp(column, axis=2).mean() for column in columns]  # the image itself is grey
    assert colourfulness[0] < 1
    assert min(colourfulness[1:]) > 2
