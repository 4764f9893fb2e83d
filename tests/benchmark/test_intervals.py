import numpy as np
import pytest
from scipy import stats

from gift.benchmark.intervals import Column, Estimate, mean_interval, paired_interval, pareto_front, score


def test_one_task_has_the_usual_t_interval():
    values = np.array([0.91, 0.94, 0.90, 0.93, 0.95])

    found = mean_interval(values[None])

    low, high = stats.t.interval(0.95, 4, loc=values.mean(), scale=stats.sem(values))
    assert (found.mean, found.low, found.high) == pytest.approx((values.mean(), low, high), rel=1e-12)


def test_several_tasks_have_the_interval_of_welch_and_satterthwaite():
    tasks = [np.array([0.9, 0.92, 0.97]), np.array([0.5, 0.61]), np.array([0.7, 0.69, 0.75, 0.72])]

    found = mean_interval(tasks)

    parts = [task.std(ddof=1) ** 2 / (len(task) * 3**2) for task in tasks]
    freedom = sum(parts) ** 2 / sum(part**2 / (len(task) - 1) for part, task in zip(parts, tasks, strict=True))
    mean = sum(task.mean() for task in tasks) / 3
    half = stats.t.ppf(0.975, freedom) * sum(parts) ** 0.5
    assert (found.mean, found.low, found.high) == pytest.approx((mean, mean - half, mean + half), rel=1e-12)


def test_two_tasks_that_are_welchs_two_samples_have_half_his_interval():
    one, two = np.array([0.9, 0.92, 0.97]), -np.array([0.5, 0.61, 0.58, 0.52])

    found = mean_interval([one, two])

    expected = stats.ttest_ind(one, -two, equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low / 2, expected.high / 2), rel=1e-12)


@pytest.mark.parametrize("tasks", [[np.array([0.5])], [np.array([0.5, 0.6]), np.array([0.7])]])
def test_a_task_with_one_seed_leaves_no_interval(tasks):
    found = mean_interval(tasks)

    assert found.low is None
    assert found.high is None
    assert found.mean == pytest.approx(np.mean([task.mean() for task in tasks]))


def test_values_that_are_all_the_same_have_an_interval_of_width_zero():
    found = mean_interval(np.full((3, 7), 0.1))

    assert found.low == found.mean == found.high == pytest.approx(0.1)


@pytest.mark.parametrize("tasks", [[], [np.array([0.5]), np.array([])]])
def test_no_values_are_an_error_that_says_where(tasks):
    with pytest.raises(ValueError, match="leave tasks without results out"):
        mean_interval(tasks)


@pytest.mark.parametrize(("count", "seeds"), [(1, 3), (4, 2), (19, 5)])
def test_about_95_of_100_intervals_hold_the_true_mean(count, seeds):
    random = np.random.default_rng(0)
    truth, spread = random.uniform(0.5, 0.9, count), random.uniform(0.005, 0.02, count)

    draws = truth[:, None] + spread[:, None] * random.standard_normal((3000, count, seeds))
    found = [mean_interval(values) for values in draws]

    covered = np.mean([one.low <= truth.mean() <= one.high for one in found])
    assert 0.93 <= covered <= 0.99  # the formula is cautious where tasks spread alike and seeds are two


def test_a_paired_interval_is_that_of_the_differences_on_the_seeds_both_have():
    ours = [{0: 0.9, 1: 0.8, 2: 0.95}, {1: 0.7, 0: 0.72}]
    theirs = [{2: 0.91, 0: 0.85, 7: 0.1}, {0: 0.7, 1: 0.69}]

    found = paired_interval(ours, theirs)

    expected = mean_interval([np.array([0.9 - 0.85, 0.95 - 0.91]), np.array([0.72 - 0.7, 0.7 - 0.69])])
    assert found is not None
    assert (found.mean, found.low, found.high) == pytest.approx((expected.mean, expected.low, expected.high))


def test_what_two_methods_share_by_seed_drops_out_of_their_difference():
    shared = np.array([-0.2, 0.1, 0.3])
    ours = [{seed: 0.62 + value for seed, value in enumerate(shared)}]
    theirs = [{seed: 0.6 + value for seed, value in enumerate(shared)}]

    found = paired_interval(ours, theirs)

    assert found is not None
    assert (found.mean, found.low, found.high) == pytest.approx((0.02, 0.02, 0.02))


def test_methods_without_a_common_seed_on_some_task_have_no_difference():
    assert paired_interval([{0: 0.9}, {0: 0.8}], [{0: 0.9}, {1: 0.8}]) is None


def test_intervals_of_accuracies_end_at_0_and_100():
    found = score(Column("task", "digits", "digits", ("digits",), True), {"digits": {0: 99.0, 1: 95.0}}, {})

    assert found.accuracy is not None
    assert found.accuracy.high == 100
    assert found.accuracy.low == pytest.approx(97 - stats.t.ppf(0.975, 1) * 2)


def test_a_method_without_some_task_has_no_score_over_it():
    column = Column("mean", "mean", "mean", ("digits", "flowers"), False)

    one = score(column, {"digits": {0: 99.0}}, {})
    other = score(column, {"digits": {0: 99.0}, "flowers": {0: 90.0}}, {"digits": {0: 80.0}})

    assert one.accuracy is None
    assert other.accuracy == Estimate(94.5, None, None)
    assert other.difference is None


def test_the_pareto_front_holds_what_nothing_dominates_by_rising_cost():
    points = {"big": (100, 0.9), "small": (5, 0.8), "worse": (6, 0.8), "dear": (101, 0.9), "none": (0, 0.1)}

    assert pareto_front(points) == ["none", "small", "big"]


def test_equal_points_do_not_dominate_each_other():
    assert set(pareto_front({"one": (5, 0.8), "two": (5, 0.8), "three": (5, 0.7)})) == {"one", "two"}
