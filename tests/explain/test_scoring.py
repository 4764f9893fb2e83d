import json
import re
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from peft import get_peft_model

from gift import GiftConfig
from gift.data.parts import draw_parts
from gift.explain.rows import Row, ScoreOptions, StoredTokens
from gift.explain.scoring import Scorer
from gift.explain.tables import score_table, verdicts
from tests.models import make_adapted_vit, make_vit, perturb

COUNT, GRID = 24, (4, 4)


@pytest.fixture(scope="module")
def truth():
    return draw_parts(COUNT, 0, 32)


def normalise(pixels):
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 128 - 1


def make_scorer(truth, **options):
    torch.manual_seed(0)
    model = perturb(get_peft_model(make_vit(num_classes=8), GiftConfig(r=4, num_clusters=6))).eval()
    return Scorer(model, truth, normalise, ScoreOptions(**({"random_draws": 2, "images_removed": 6} | options)))


@pytest.fixture(scope="module")
def rows(truth):
    return make_scorer(truth).score()


def score_fake(scorer, *layers):
    """Return the score of a row of given maps."""
    coverage = scorer.coverage(GRID)
    row = Row("fake", "plain", [lambda maps=maps: maps for maps in layers])
    logits = np.random.default_rng(0).normal(size=(COUNT, 8))
    return scorer._score(row, logits, coverage, {"plain": [0.5] * 4})


def test_the_best_map_is_chosen_on_one_half_and_scored_on_the_other(truth):
    scorer = make_scorer(truth)
    coverage, rng = scorer.coverage(GRID), np.random.default_rng(1)
    good, bad = coverage[:, 0] + 0.01 * rng.normal(size=(COUNT, 4, 4)), rng.normal(size=(COUNT, 4, 4))
    good[1::2] = bad[1::2]  # good only on the half that maps are chosen on
    found = score_fake(scorer, np.stack([bad, bad + 1], axis=1), np.stack([bad, good], axis=1))
    chosen, scored = coverage[::2, 0], coverage[1::2, 0]
    candidates = []
    for threshold in good[::2].ravel():
        region = good[::2] >= threshold
        candidates.append(((region * chosen).sum() / (region + chosen - region * chosen).sum(), threshold))
    region = good[1::2] >= max(candidates)[1]
    expected = (region * scored).sum() / (region + scored - region * scored).sum()
    assert found.parts[0].map == "L1/C1"
    assert found.parts[0].iou == pytest.approx(expected)
    assert found.parts[0].low <= expected <= found.parts[0].high
    assert max(candidates)[0] > 1.5 * expected
    assert found.candidates == 4


def test_a_map_that_is_the_part_points_at_it_and_has_its_energy_inside(truth):
    scorer = make_scorer(truth)
    coverage = scorer.coverage(GRID)
    found = score_fake(scorer, coverage[:, [3, 2, 1, 0]])
    assert [part.map for part in found.parts] == ["L0/C3", "L0/C2", "L0/C1", "L0/C0"]
    peaks = coverage[1::2, 0].reshape(COUNT // 2, -1).max(axis=1)
    assert found.parts[0].pointing == pytest.approx(peaks.mean())
    strength = np.maximum(coverage[1::2, 0] - np.median(coverage[::2, 0]), 0)
    assert found.parts[0].energy == pytest.approx((strength * coverage[1::2, 0]).sum() / strength.sum())


def test_every_row_is_there_with_as_many_candidates(rows):
    clusters = {(row.maps, row.reading): row.candidates for row in rows[:16]}
    names = ("learned", "before adaptation", "untrained", "random")
    assert clusters == {(name, kind): 12 for name in names for kind in ("plain", "centred", "own", "whitened")}
    others = {row.maps: row.candidates for row in rows[16:]}
    assert others == {"k-means": 12, "PCA": 12, "attention rollout": 2, "Grad-CAM": 2, "no map": 0}
    for row in rows:
        assert [part.part for part in row.parts] == ["petals", "centre", "leaves", "background"]
        assert all(0 <= part.iou <= 1 and 0 <= part.pointing <= 1 and 0 <= part.energy <= 1 for part in row.parts)
        assert 0 <= row.deletion <= 1
        assert 0 <= row.insertion <= 1
        assert len(row.effective_numbers) == (2 if row.candidates else 0)
    assert all(-1 <= row.importance <= 1 for row in rows[:-1])


def test_no_map_at_all_scores_the_share_of_a_part(rows, truth):
    share = truth.masks[1::2, 0].mean()
    assert rows[-1].parts[0].iou == pytest.approx(share, abs=1e-6)
    assert rows[-1].parts[0].energy == pytest.approx(share, abs=1e-6)


def test_chance_is_what_sets_of_random_maps_reach(truth, tmp_path):
    scorer = make_scorer(truth, readings=("own",), random_draws=3, whole=False)
    found = [row for row in scorer.score() if row.maps == "learned"]
    tokens = StoredTokens(scorer.model, scorer.images, True, tmp_path, ("own",))
    limits = scorer._chance(tokens, scorer.coverage(GRID))["own"]
    assert [part.chance for part in found[0].parts] == limits
    assert all(0 < limit < 1 for limit in limits)
    assert make_scorer(truth, readings=("own",), random_draws=0, whole=False).score()[0].parts[0].chance is None


def test_scoring_twice_gives_the_same_and_leaves_the_model(truth, rows):
    scorer = make_scorer(truth)
    before = {name: tensor.clone() for name, tensor in scorer.model.state_dict().items()}
    assert scorer.score() == rows
    assert all(torch.equal(before[name], tensor) for name, tensor in scorer.model.state_dict().items())


def test_true_importance_is_how_far_the_logit_falls_when_a_part_is_not_drawn(truth):
    scorer = make_scorer(truth)
    found = scorer._true_importance["petals"]
    with torch.no_grad():
        whole = scorer.model(normalise(truth.images.pixels[1:12:2]))
        left_out = scorer.model(normalise(truth.without["petals"][1:12:2]))
    predicted = whole.argmax(dim=1)
    expected = [float(whole[image, label] - left_out[image, label]) for image, label in enumerate(predicted)]
    assert found == pytest.approx(expected, abs=1e-5)


def test_too_few_images_are_refused(truth):
    with pytest.raises(ValueError, match="at least 8 images, half to choose maps on, got 6"):
        make_scorer(truth[:6]).score()


def test_the_table_marks_what_is_no_better_than_chance(rows):
    table = score_table(rows).splitlines()
    learned = next(row for row in rows if (row.maps, row.reading) == ("learned", "own"))
    line = next(line for line in table if line.startswith("| learned | own |"))
    cells = [cell.strip() for cell in line.split("|")[5:9]]
    for cell, part in zip(cells, learned.parts, strict=True):
        assert cell.startswith(f"{part.iou:.2f} [{part.low:.2f}")
        assert cell.endswith("*") == (part.iou <= part.chance)
    words = verdicts(rows)[2]
    better = re.search(r"better than random clusters for (.*?);", words)[1]
    assert all((part.part in better) == (part.iou > part.chance) for part in learned.parts)
    assert len({line.count("|") for line in table}) == 1


def test_scores_can_be_written_as_json(rows):
    assert json.loads(json.dumps([asdict(row) for row in rows]))[0]["maps"] == "learned"


def test_a_model_without_clusters_is_refused(truth):
    model = make_adapted_vit(generator="mlp")
    with pytest.raises(ValueError, match="no block -1 with clusters"):
        Scorer(model, truth, normalise, ScoreOptions()).score()


def test_a_part_that_half_of_the_images_never_show_gives_numbers_all_the_same(truth):
    truth = replace(truth, masks=truth.masks.copy())
    truth.masks[1:, 1] = 0  # only the first image shows a centre, and maps are chosen on it
    rows = make_scorer(truth, readings=("own",), random_draws=1).score()
    numbers = [
        number for row in rows for part in row.parts for number in (part.iou, part.low, part.high, part.pointing)
    ]
    assert all(np.isfinite(number) for number in numbers)
