"""Tiny archives in the forms that the five FGVC data sets are published in."""

import io
import tarfile
import zipfile

import numpy as np
from scipy.io import savemat

from tests.data.tfds_exports import encoded


def mat(**variables):
    file = io.BytesIO()
    savemat(file, variables)
    return file.getvalue()


def cells(values):
    """A cell array of strings, one below the other."""
    array = np.empty((len(values), 1), object)
    array[:, 0] = values
    return array


def tar(path, files):
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def zipped(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def jpeg(value):
    return encoded(value, form="JPEG", mode="RGB")


def lines(rows):
    return "".join(f"{' '.join(map(str, row))}\n" for row in rows).encode()


def birds(folder, classes, ids):
    """Files of CUB-200-2011 and NABirds: 4 images of each of 2 classes, the last of each for testing."""
    names = [f"{number:03}.Bird/{number}_{index}.jpg" for number in classes for index in range(4)]
    rows = list(zip(ids, names, [number for number in classes for _ in range(4)], strict=True))
    return {f"{folder}/images/{name}": jpeg(20 * index) for index, (_, name, _) in enumerate(rows)} | {
        f"{folder}/images.txt": lines((key, name) for key, name, _ in rows),
        f"{folder}/image_class_labels.txt": lines((key, number) for key, _, number in rows),
        f"{folder}/train_test_split.txt": lines((key, int(index % 4 < 3)) for index, (key, _, _) in enumerate(rows)),
        f"{folder}/README": b"as published",
    }


def write_cub(path):
    tar(path / "CUB_200_2011.tgz", birds("CUB_200_2011", (1, 2), range(1, 9)))


def write_nabirds(path):
    """Classes are numbered with gaps, and images by words."""
    keys = [f"0000139e-21dc-4d0c-bfe1-{index:012}" for index in range(8)]
    tar(path / "nabirds.tar.gz", birds("nabirds", (295, 1010), keys))


def write_flowers(path):
    """Images 1 to 8; train 1 5, val 2 6, test the others; classes 1 and 2."""
    tar(path / "102flowers.tgz", {f"jpg/image_{number:05}.jpg": jpeg(number) for number in range(1, 9)})
    path.joinpath("imagelabels.mat").write_bytes(mat(labels=np.array([[1, 1, 1, 1, 2, 2, 2, 2]], np.uint8)))
    parts = {"trnid": [[1, 5]], "valid": [[2, 6]], "tstid": [[3, 4, 7, 8]]}
    path.joinpath("setid.mat").write_bytes(mat(**{name: np.array(ids, np.uint16) for name, ids in parts.items()}))


def write_dogs(path):
    breeds = {1: "n02085620-Chihuahua", 2: "n02116738-African_hunting_dog"}
    names = {number: [f"{breed}/{breed[:9]}_{index}.jpg" for index in range(4)] for number, breed in breeds.items()}
    tar(path / "images.tar", {f"Images/{name}": jpeg(9) for listed in names.values() for name in listed})
    parts = {"train": slice(0, 3), "test": slice(3, 4)}
    lists = {}
    for part, chosen in parts.items():
        files = [name for number in names for name in names[number][chosen]]
        labels = np.array([[number] for number in names for _ in names[number][chosen]], np.uint8)
        lists[f"{part}_list.mat"] = mat(file_list=cells(files), annotation_list=cells(files), labels=labels)
    tar(path / "lists.tar", lists)


def annotations(rows, with_class=True):
    kinds = [("bbox_x1", "O"), *([("class", "O")] if with_class else []), ("fname", "O")]
    array = np.empty((1, len(rows)), kinds)
    for index, (number, name) in enumerate(rows):
        array[0, index] = (1, number, name) if with_class else (1, name)
    return mat(annotations=array)


def write_cars(path):
    for part, count in (("train", 6), ("test", 2)):
        images = {f"cars_{part}/{index:05}.jpg": jpeg(index) for index in range(1, count + 1)}
        tar(path / f"cars_{part}.tgz", images)
    train = [(1 + index % 2, f"{index:05}.jpg") for index in range(1, 7)]
    test = [(number, f"{number:05}.jpg") for number in (1, 2)]
    lists = {"cars_train_annos": annotations(train), "cars_test_annos": annotations(test, with_class=False)}
    tar(path / "car_devkit.tgz", {f"devkit/{name}.mat": content for name, content in lists.items()})
    path.joinpath("cars_test_annos_withlabels.mat").write_bytes(annotations(test))


WRITERS = {
    "cub": write_cub,
    "nabirds": write_nabirds,
    "oxford_flowers": write_flowers,
    "stanford_dogs": write_dogs,
    "stanford_cars": write_cars,
}
