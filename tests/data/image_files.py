"""Small images on disk, in the forms that users have them."""

import io

import numpy as np
from PIL import Image

CLASSES = ("blue", "green", "red")


def picture(seed=0, size=(12, 10)):
    """Return an image in RGB that no other seed has: smooth, so that it looks the same at other sizes."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encoded(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def fill(folder, classes=CLASSES, count=3, seed=0):
    """Write a folder of class folders with `count` images each."""
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            picture(1000 * seed + 10 * number + index).save(folder / name / f"{index}.png")
    return folder


def names(rows):
    """Return class and file name of every row."""
    return [(rows.features["label"].int2str(row["label"]), row["image"]["path"].rpartition("/")[2]) for row in rows]
