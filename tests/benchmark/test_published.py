import pytest

from gift.benchmark.published import is_published_model, published_notes, published_rows
from gift.benchmark.summary import summarise
from gift.benchmark.tables import markdown
from gift.data.catalog import TASKS
from tests.benchmark import results

MODEL = "vit_base_patch16_224.augreg_in21k"
METHODS = ("VPT", "BitFit", "LoRA", "GIFT")


def row(suite, method):
    return next(one for one in published_rows(suite) if one.method == method)


def replayed(suite, accuracies):
    """Our table of one run with these accuracies, as cells of its main table's first line by column."""
    lines = results("ours", {task: [value / 100] for task, value in accuracies.items()}, suite=suite, model=MODEL)
    header, _, first = markdown(summarise(lines)).splitlines()[4:7]
    return dict(zip(*([cell.strip() for cell in line.split("|")[1:-1]] for line in (header, first)), strict=True))


def by_task(published):
    """Accuracies by task of VTAB-1k that differ within each group and have the published means of groups."""
    groups = {group: [t for t in TASKS.values() if t.group == group] for group in published.accuracies}
    return {
        task.name: published.accuracies[group] + (index - (len(tasks) - 1) / 2)
        for group, tasks in groups.items()
        for index, task in enumerate(tasks)
    }


@pytest.mark.parametrize("method", METHODS)
def test_our_table_gives_the_published_mean_of_fgvc_from_its_tasks(method):
    published = row("fgvc", method)

    cells = replayed("fgvc", published.accuracies)

    assert float(cells["mean of all 5 tasks"]) == pytest.approx(published.mean, abs=0.005 + 1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_our_table_gives_the_published_mean_of_vtab_from_its_groups(method):
    published = row("vtab1k", method)

    cells = replayed("vtab1k", by_task(published))

    assert {group: float(cells[group]) for group in published.accuracies} == pytest.approx(published.accuracies)
    # Half a unit of the groups' last digit, and of both means'.
    assert float(cells["mean of all 19 tasks"]) == pytest.approx(published.mean, abs=0.01 + 1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_the_published_mean_of_vtab_is_not_that_of_the_three_groups(method):
    published = row("vtab1k", method)

    of_groups = sum(published.accuracies.values()) / 3

    assert of_groups - published.mean > 2


def test_figures_are_of_known_tasks_and_groups():
    fgvc, vtab = row("fgvc", "GIFT"), row("vtab1k", "GIFT")

    assert set(fgvc.accuracies) == {task.name for task in TASKS.values() if task.suite == "fgvc"}
    assert set(vtab.accuracies) == {task.group for task in TASKS.values() if task.suite == "vtab1k"}
    assert published_rows("offline") == ()


def test_gift_is_marked_as_published_and_as_the_linear_generator():
    assert row("fgvc", "GIFT").title == "GIFT linear r=16 (published)"
    assert row("vtab1k", "LoRA").title == "LoRA (published)"
    assert "not PaCa" in published_notes("fgvc", MODEL)[0]


def test_shares_become_numbers_near_those_of_the_backbone():
    assert row("fgvc", "LoRA").parameters == pytest.approx(12 * 2 * 2 * 8 * 768 * 0.5, rel=0.01)
    assert row("fgvc", "GIFT").parameters == pytest.approx(2 * 16 * 768, rel=0.02)


def test_a_figure_of_a_whole_suite_is_not_given_for_a_part_of_it():
    assert row("vtab1k", "GIFT").accuracy("Natural", is_whole=True) == 81.95
    assert row("vtab1k", "GIFT").accuracy("Natural", is_whole=False) is None
    assert row("vtab1k", "GIFT").accuracy("mean", is_whole=True) == 74.09
    assert row("vtab1k", "GIFT").accuracy("cifar", is_whole=True) is None


def test_another_backbone_is_said_to_be_no_comparison():
    assert is_published_model(f"timm/{MODEL}")
    assert len(published_notes("vtab1k", MODEL)) == 1
    assert "small, so published rows are no comparison" in published_notes("vtab1k", "small")[1]
    assert published_notes("offline", "small") == []
