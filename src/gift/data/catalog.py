"""The benchmark tasks, one row each: FGVC (5), VTAB-1k (19), ImageNet-1k, and two that need no download.

Where the facts were read (public repositories):

* VTAB's splits, derived labels and TFDS versions: google-research/task_adaptation, `task_adaptation/data/*.py`
  (commit ed9b417), and KMnP/vpt, `VTAB_SETUP.md`, for the versions that ran (kitti 3.2.0, dmlab 2.0.1).
* Numbers of images and classes, names of features: tensorflow/datasets, `docs/catalog/*.md`. VTAB cuts some test parts
  itself: smallnorb takes the second half of 24300, eurosat and resisc45 the last fifth, dsprites the last tenth.
* FGVC: KMnP/vpt, `README.md` and `src/data/datasets/json_dataset.py`. Its lists were not at hand, but for the training
  list of the flowers: for the other four tasks train + validation is the official training part, and validation a tenth
  of it, rounded up.
* Digits: the description that scikit-learn 1.9 gives of them (`load_digits().DESCR`).
* Hashes: tensorflow/datasets, `tensorflow_datasets/url_checksums/*.txt`.

A licence is what the source says. "not verified" means that its page was not read for this file: read it before use.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

UNVERIFIED = "not verified"


@dataclass(frozen=True)
class Task:
    """One benchmark task.

    Attributes:
        name: As folders of the task are called.
        title: For tables.
        suite: `fgvc`, `vtab1k`, `imagenet` or `offline`, whose tasks are made without a source.
        group: `Natural`, `Specialized` or `Structured` in VTAB-1k, else empty.
        classes: Number of classes.
        train: Number of images for training while learning rates are searched; `validation` ones come on top.
        validation: Number of images that choices are made on; 0 where none are defined.
        test: Number of images that are reported.
        source: Archives, the name and version of a TFDS export, or what makes the images.
        home: Page of the data set.
        licence: As the source states it, or that it was not verified.
        preprocessing: What published numbers use, or that there are none.
        labels: How the label of an image is made.
        tfds: `name/version` or `name/config/version`, where only the first number of the version has to be matched.
        hashes: SHA-256 of published archives, by file name.
    """

    name: str
    title: str
    suite: str
    group: str
    classes: int
    train: int
    validation: int
    test: int
    source: str
    home: str
    licence: str
    preprocessing: str
    labels: str
    tfds: str = ""
    hashes: Mapping[str, str] = field(default_factory=dict)


_CROP = "resize to 256; random crop of 224 and flip to train, centre crop to test"
_SQUASH = "resize to 224 x 224 whatever the shape; no augmentation"
_NAMED = "class of the image, as the source has it"


def _fgvc(title: str, sizes: tuple[int, int, int, int], source: str, home: str, hashes: dict[str, str]) -> dict:
    classes, train, validation, test = sizes
    counts = {"classes": classes, "train": train, "validation": validation, "test": test}
    text = {"title": title, "source": source, "home": home, "licence": UNVERIFIED, "labels": _NAMED}
    return {"suite": "fgvc", "group": "", "preprocessing": _CROP, "hashes": MappingProxyType(hashes), **counts, **text}


def _vtab(group: str, title: str, sizes: tuple[int, int], tfds: str, home: str, labels: str = _NAMED) -> dict:
    counts = {"classes": sizes[0], "train": 800, "validation": 200, "test": sizes[1]}
    text = {"title": title, "source": f"TFDS {tfds}", "home": home, "labels": labels, "tfds": tfds}
    return {"suite": "vtab1k", "group": group, "preprocessing": _SQUASH, "licence": UNVERIFIED, **counts, **text}


def _offline(title: str, sizes: tuple[int, int], source: str, home: str, licence: str, labels: str) -> dict:
    counts = {"classes": sizes[0], "train": 800, "validation": 200, "test": sizes[1]}
    text = {"title": title, "source": source, "home": home, "licence": licence, "labels": labels}
    return {"suite": "offline", "group": "", "preprocessing": "there are none for these parts", **counts, **text}


_CLEVR = ("clevr/3.1.0", "https://cs.stanford.edu/people/jcjohns/clevr/")
_DSPRITES = ("dsprites/2.0.0", "https://github.com/deepmind/dsprites-dataset")
_SMALLNORB = ("smallnorb/2.0.0", "https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/")

_ROWS: dict[str, dict] = {
    "cub": _fgvc(
        "CUB-200-2011",
        (200, 5394, 600, 5794),
        "CUB_200_2011.tgz",
        "https://www.vision.caltech.edu/datasets/cub_200_2011/",
        {"CUB_200_2011.tgz": "0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081"},
    ),
    "nabirds": _fgvc(
        "NABirds", (555, 21536, 2393, 24633), "nabirds.tar.gz", "https://dl.allaboutbirds.org/nabirds", {}
    ),
    "oxford_flowers": _fgvc(
        "Oxford Flowers-102",
        (102, 1020, 1020, 6149),
        "102flowers.tgz, imagelabels.mat, setid.mat",
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        {
            "102flowers.tgz": "2d01ecc807db462958cfe3d92f57a8c252b4abd240eb955770201e45f783b246",
            "imagelabels.mat": "4903e94206bac23bf772aadf06451916df56b58fc483a62db32a97b82656651d",
            "setid.mat": "46b8678f91fd95d3c8f4feab80d271a6c834a1dd896fe29fd3e6ad9ce5c8dccd",
        },
    ),
    "stanford_dogs": _fgvc(
        "Stanford Dogs",
        (120, 10800, 1200, 8580),
        "images.tar, lists.tar",
        "http://vision.stanford.edu/aditya86/ImageNetDogs/main.html",
        {
            "images.tar": "a443fc2f9a851aa1a7b8e4fa4af94b8459fce2c9f5a2f4dd4669cf9673a4ec58",
            "lists.tar": "34b47cacd9a98b5d150e084f24d29391c084c55272295ec65c85651bc35f4d6c",
        },
    ),
    "stanford_cars": _fgvc(
        "Stanford Cars",
        (196, 7329, 815, 8041),
        "cars_train.tgz, cars_test.tgz, car_devkit.tgz, cars_test_annos_withlabels.mat",
        "https://ai.stanford.edu/~jkrause/cars/car_dataset.html",
        {
            "cars_train.tgz": "512b227b30e2f0a8aab9e09485786ab4479582073a144998da74d64b801fd288",
            "cars_test.tgz": "bffea656d6f425cba3c91c6d83336e4c5f86c6cffd8975b0f375d3a10da8e243",
            "car_devkit.tgz": "b97deb463af7d58b6bfaa18b2a4de9829f0f79e8ce663dfa9261bf7810e9accd",
            "cars_test_annos_withlabels.mat": "790f75be8ea34eeded134cc559332baf23e30e91367e9ddca97d26ed9b895f05",
        },
    ),
    "caltech101": _vtab(
        "Natural",
        "Caltech101",
        (102, 6084),
        "caltech101/3.0.1",
        "http://www.vision.caltech.edu/Image_Datasets/Caltech101/",
        "101 objects and the class background",
    ),
    "cifar": _vtab(
        "Natural", "CIFAR-100", (100, 10000), "cifar100/3.0.2", "https://www.cs.toronto.edu/~kriz/cifar.html"
    ),
    "dtd": _vtab(
        "Natural",
        "DTD",
        (47, 1880),
        "dtd/3.0.1",
        "https://www.robots.ox.ac.uk/~vgg/data/dtd/index.html",
        "key attribute of the texture; first of the ten official folds",
    ),
    "oxford_flowers102": _vtab(
        "Natural",
        "Flowers102",
        (102, 6149),
        "oxford_flowers102/2.1.1",
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
    ),
    "oxford_iiit_pet": _vtab(
        "Natural", "Pets", (37, 3669), "oxford_iiit_pet/3.2.0", "http://www.robots.ox.ac.uk/~vgg/data/pets/"
    ),
    "svhn": _vtab("Natural", "SVHN", (10, 26032), "svhn_cropped/3.0.0", "http://ufldl.stanford.edu/housenumbers/"),
    "sun397": _vtab(
        "Natural", "Sun397", (397, 21750), "sun397/tfds/4.0.0", "https://vision.princeton.edu/projects/2010/SUN/"
    ),
    "patch_camelyon": _vtab(
        "Specialized",
        "Camelyon",
        (2, 32768),
        "patch_camelyon/2.0.0",
        "https://patchcamelyon.grand-challenge.org/",
        "whether the central 32 x 32 pixels hold tumour tissue",
    )
    | {"licence": "CC0 (README of basveeling/pcam)"},
    "eurosat": _vtab("Specialized", "EuroSAT", (10, 5400), "eurosat/rgb/2.0.0", "https://github.com/phelber/eurosat"),
    "resisc45": _vtab(
        "Specialized",
        "Resisc45",
        (45, 6300),
        "resisc45/3.0.0",
        "http://www.escience.cn/people/JunweiHan/NWPU-RESISC45.html",
    ),
    "diabetic_retinopathy": _vtab(
        "Specialized",
        "Retinopathy",
        (5, 42670),
        "diabetic_retinopathy_detection/btgraham-300/3.0.0",
        "https://www.kaggle.com/c/diabetic-retinopathy-detection/data",
        "grade of the disease, 0 to 4",
    ),
    "clevr_count": _vtab("Structured", "Clevr-Count", (8, 15000), *_CLEVR, "number of objects less 3"),
    "clevr_dist": _vtab(
        "Structured",
        "Clevr-Dist",
        (6, 15000),
        *_CLEVR,
        "distance of the closest object: up to 8, 8.5, 9, 9.5, 10, and beyond",
    ),
    "dmlab": _vtab(
        "Structured",
        "DMLab",
        (6, 22735),
        "dmlab/2.0.1",
        "https://github.com/google-research/task_adaptation",
        "close, far or very far, with positive or negative reward",
    ),
    "kitti": _vtab(
        "Structured",
        "KITTI-Dist",
        (4, 711),
        "kitti/3.2.0",
        "http://www.cvlibs.net/datasets/kitti/",
        "distance of the closest car, van or truck: up to 8 m, 20 m, beyond, and none there",
    ),
    "dsprites_loc": _vtab("Structured", "dSpr-Loc", (16, 73728), *_DSPRITES, "x position, 32 of them in 16 bins of 2"),
    "dsprites_ori": _vtab(
        "Structured", "dSpr-Ori", (16, 73728), *_DSPRITES, "orientation, 40 of them in 16 bins of 2.5"
    ),
    "smallnorb_azi": _vtab("Structured", "sNORB-Azim", (18, 12150), *_SMALLNORB, "azimuth, 18 of 20 degrees each"),
    "smallnorb_ele": _vtab("Structured", "sNORB-Elev", (9, 12150), *_SMALLNORB, "elevation, 9 of 5 degrees each"),
    "imagenet": {
        "title": "ImageNet-1k",
        "suite": "imagenet",
        "group": "",
        "classes": 1000,
        "train": 1281167,
        "validation": 0,
        "test": 50000,
        "source": "ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar",
        "home": "http://www.image-net.org/",
        "licence": UNVERIFIED,
        "preprocessing": _CROP,
        "labels": "class of the image; the official validation part is what is reported",
    },
    "digits": _offline(
        "Digits",
        (10, 797),
        "scikit-learn, load_digits",
        "https://archive.ics.uci.edu/ml/datasets/Optical+Recognition+of+Handwritten+Digits",
        f"{UNVERIFIED} (the description that comes with scikit-learn names none)",
        "the digit; 8 x 8 pixels enlarged to 64 x 64",
    ),
    "rendered_flowers": _offline(
        "Drawn flowers",
        (8, 800),
        "drawn by gift.data.rendered",
        "the package gift-peft",
        "Apache-2.0, as the package",
        "species: all combinations of two kinds each of petals, centre and leaves",
    ),
}

TASKS: dict[str, Task] = {name: Task(name=name, **row) for name, row in _ROWS.items()}


def find_task(name: str) -> Task:
    """Return the task of that name.

    Raises:
        ValueError: If there is none.
    """
    if name not in TASKS:
        raise ValueError(f"There is no task {name!r}: choose one of {', '.join(TASKS)}.")
    return TASKS[name]


def task_table() -> str:
    """Return all tasks as a table in Markdown, in the order of the suites."""
    lines = [
        "| task | title | suite | classes | train + val | test | source | label |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task in TASKS.values():
        suite = f"{task.suite} {task.group}".strip()
        cells = (f"`{task.name}`", task.title, suite, task.classes, f"{task.train} + {task.validation}", task.test)
        lines.append("| " + " | ".join(map(str, (*cells, task.source, task.labels))) + " |")
    return "\n".join(lines) + "\n"
