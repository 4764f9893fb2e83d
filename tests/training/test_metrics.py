"""Accuracy, intervals, classes, confusions and calibration against their formulas."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gift.training.loop import TrainingDivergedError
from gift.training.metrics import calibration_error, evaluate_model, predict_logits, score_logits

LOGITS = torch.tensor([[3.0, 1, 0], [0, 2, 1], [2, 1, 0], [0, 0, 5], [1, 0, 2], [0, 3, 1]], dtype=torch.float64)
LABELS = torch.tensor([0, 1, 1, 2, 0, 1])
NAMES = ("cat", "dog", "owl")


def test_accuracy_and_confusions_count_images():
    score = score_logits(LOGITS, LABELS, NAMES, 1.0)
    assert score.accuracy == pytest.approx(4 / 6)
    assert score.confusion == [[1, 0, 1], [1, 2, 0], [0, 0, 1]]
    assert [of.accuracy for of in score.per_class] == pytest.approx([1 / 2, 2 / 3, 1])
    assert [of.images for of in score.per_class] == [2, 3, 1]
    assert score.mean_class_accuracy == pytest.approx((1 / 2 + 2 / 3 + 1) / 3)
    assert score.top5 is None
    assert score.loss == pytest.approx(-LOGITS.log_softmax(1)[range(6), LABELS].mean().item())


def test_the_interval_is_wilsons():
    low, high = score_logits(LOGITS, LABELS, NAMES, 1.0).interval
    share, z, n = 4 / 6, 1.959963985, 6
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    assert (low, high) == pytest.approx((middle - half, middle + half), abs=1e-6)


def test_a_class_without_images_has_no_accuracy_and_does_not_count():
    score = score_logits(LOGITS, torch.tensor([0, 1, 1, 0, 0, 1]), NAMES, 1.0)
    assert score.per_class[2].accuracy is None
    assert score.mean_class_accuracy == pytest.approx((1 / 3 + 2 / 3) / 2)


def test_top_five_counts_images_whose_class_is_among_the_five_likeliest():
    logits = torch.arange(7, dtype=torch.float64).repeat(4, 1)
    score = score_logits(logits, torch.tensor([6, 2, 1, 0]), tuple("abcdefg"), 1.0)
    assert (score.accuracy, score.top5) == (0.25, 0.5)


def test_calibration_error_is_the_gap_of_confidence_and_accuracy_over_bins():
    probabilities = np.array([[0.95, 0.05], [0.94, 0.06], [0.60, 0.40], [0.35, 0.65]])
    labels = np.array([0, 1, 0, 1])
    # Bins of a fifteenth: 0.95 and 0.94 share the last but one to last; 0.60 and 0.65 share the tenth.
    expected = (2 * abs(0.5 - 0.945) + 2 * abs(1 - 0.625)) / 4
    assert calibration_error(probabilities, labels) == pytest.approx(expected)
    assert calibration_error(np.array([[1.0, 0.0]]), np.array([0])) == 0


def test_a_model_is_evaluated_on_all_images_in_order_and_the_figures_can_be_written(tmp_path):
    class Fixed(torch.nn.Linear):
        def forward(self, pixel_values):
            return type("Output", (), {"logits": pixel_values[:, 0, 0]})

    items = [
        {"pixel_values": logits.expand(3, 1, 3), "labels": int(label)}
        for logits, label in zip(LOGITS, LABELS, strict=True)
    ]
    score = evaluate_model(Fixed(1, 1), items, NAMES, batch_size=4)
    assert score.confusion == score_logits(LOGITS, LABELS, NAMES, 1.0).confusion
    assert score.milliseconds_per_image > 0
    score.write(tmp_path / "deep" / "score.json")
    assert json.loads((tmp_path / "deep" / "score.json").read_text())["images"] == 6


def test_images_are_read_by_as_many_processes_as_are_asked_for():
    class OfWorkers(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            worker = torch.utils.data.get_worker_info()
            return {"pixel_values": torch.full((3,), float(index)), "labels": -1 if worker is None else worker.id}

    class Same(torch.nn.Linear):
        def forward(self, pixel_values):
            return SimpleNamespace(logits=pixel_values)

    alone, two = (predict_logits(Same(1, 1), OfWorkers(), 2, workers) for workers in (0, 2))
    assert torch.equal(alone[0], two[0])
    assert (alone[1].tolist(), two[1].tolist()) == ([-1] * 4, [0, 0, 1, 1])


def test_logits_that_are_not_finite_are_said_to_be_so():
    class Overflowing(torch.nn.Linear):
        def forward(self, pixel_values):
            logits = super().forward(pixel_values.flatten(1))
            return SimpleNamespace(
                logits=torch.where(pixel_values.flatten(1).sum(1, keepdim=True) > 0, torch.inf, logits)
            )

    items = [{"pixel_values": torch.full((1, 2, 2), value), "labels": 0} for value in (-1.0, 1.0, 1.0)]
    with pytest.raises(TrainingDivergedError, match="logits of 2 of 3 images are not finite"):
        evaluate_model(Overflowing(4, 3), items, NAMES)
