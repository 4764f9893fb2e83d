"""What `gift train` is told: one description for the command line, for recipes in YAML and for Python."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from gift.data.feeding import FeedingOptions
from gift.data.geometry import AUGMENTATIONS, RESIZES
from gift.data.splits import SplitOptions
from gift.pretrained import SMALL
from gift.training.arguments import FinetuneOptions
from gift.tuner.options import check_choice, check_number


# It extends what a run is told, so that every option is described once and stands on one level in a recipe.
@dataclass(frozen=True, kw_only=True)
class TrainOptions(FinetuneOptions):
    """How to fine-tune on one's own images.

    Args:
        output_dir: Folder of this run and of nothing else.
        data: Labelled images: a folder of class folders (or of train, val and test folders with class folders), a zip
            of one, parquet files, `torchvision:NAME`, a hub id, or a folder in FGVC's or VTAB-1k's form.
        validation: Other data, in any of these forms, to validate on.
        test: Other data, in any of these forms, to test on.
        root: Folder where torchvision's sets are, or are downloaded to.
        validation_share: Share of every class of the training images that is kept for validation if the data have no
            validation images; 0 keeps none.
        train_on_validation: Whether to train on the validation images too; nothing is then left to choose by.
        evaluate_test: Whether to measure on the test images at the end; a search of options should not look at them.
        skip_damaged: Whether to leave out images that cannot be read, and say which, instead of stopping.
        model: Backbone: `small` (comes with the package), a hub id, a name of timm, or a local folder.
        drop_path: Rate of stochastic depth in the last block, rising linearly from the first.
        method: How to fine-tune: `gift`, `lora`, `linear-probe`, ...; `gift methods` lists all.
        method_options: What the method's configuration is given, e.g. `r: 32`; `--method_options.r 32`.
        image_size_px: Side of the images; by default what the backbone says.
        resize: `crop` (shorter side to 8/7 of the size, the middle cut out) or `squash` (straight to a square).
        augment: Of training images: `none`, `flip`, `crop-flip` (a random crop instead of the middle) or
            `resized-crop-flip` (8 to 100 % of the image).
    """

    data: str
    validation: str | None = None
    test: str | None = None
    root: Path | str = "data"
    validation_share: float | int = 0.1
    train_on_validation: bool = False
    evaluate_test: bool = True
    skip_damaged: bool = False
    model: str = SMALL
    drop_path: float | int = 0
    method: str = "gift"
    method_options: dict[str, Any] = field(default_factory=dict)
    image_size_px: int | None = None
    resize: str = "crop"
    augment: str = "crop-flip"

    def __post_init__(self) -> None:
        """Check every option."""
        super().__post_init__()
        check_choice("resize", self.resize, RESIZES)
        check_choice("augment", self.augment, AUGMENTATIONS)
        for name in ("validation_share", "drop_path"):
            check_number(name, getattr(self, name), smallest=0)
            if getattr(self, name) >= 1:
                raise ValueError(f"{name} must be less than 1, got {getattr(self, name)}.")

    @property
    def splits(self) -> SplitOptions:
        """How the data are split."""
        return SplitOptions(
            self.validation, self.test, self.root, self.validation_share, self.train_on_validation, self.seed
        )

    @property
    def feeding(self) -> FeedingOptions:
        """How images are fed."""
        return FeedingOptions(skip_damaged=self.skip_damaged)


def add_train_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add the options of `gift train` to a parser, and `--config` for a recipe of them in YAML."""
    parser.add_argument("--config", action="config", help="Recipe: options in YAML; what stands after it wins.")
    parser.add_class_arguments(TrainOptions, as_group=False)
    return parser
