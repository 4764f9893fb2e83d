"""The comparison: what is run, how the primary question is answered, and what documents show of it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy.special import stdtrit

from benchmarks import ablation_tables, comparison
from benchmarks import comparison_documents as documents
from benchmarks import comparison_tables as tables
from benchmarks.documents import between
from gift.baselines.methods import method_config
from gift.benchmark.intervals import Estimate, mean_interval
from gift.benchmark.methods import read_methods, resolve_methods
from gift.benchmark.runs import SEARCH, folder_of
from gift.benchmark.suites import SUITES, tries
from gift.pretrained import SMALL, load_backbone
from gift.training.finetune import make_model, with_head
from gift.training.options import TrainOptions
from gift.training.train import finetune_options
from tests.comparison import CHOSEN, LORA, SIZES, finals, primary, searched

ROOT = Path(__file__).parents[1]
PLAN = " ".join((ROOT / "docs" / "plan-of-comparison.md").read_text().split())


def test_the_size_is_chosen_on_validation_images_among_those_with_a_third_of_the_parameters():
    lines = primary()

    def instead(method, accuracies, parameters=None):
        return [line for line in lines if line["method"] != method] + searched(
            method, accuracies, parameters=parameters
        )

    assert tables.choose(lines) == CHOSEN  # though another does better on test images
    assert tables.choose(instead("gift-paca", [0.9] * 6)) == CHOSEN  # since that is too large
    assert tables.choose(instead("gift-paca", [0.9] * 6, 5_462)) == CHOSEN
    assert tables.choose(instead("gift-paca", [0.9] * 6, 5_461)) == "gift-paca"
    assert tables.choose(instead("gift-paca:r=4", [0.8] + [0.5] * 5)) == "gift-paca:r=4"  # of equals the smaller
    assert tables.choose(instead(CHOSEN, [None] * 6)) == "gift-paca:r=4"


def test_nothing_is_chosen_or_answered_before_all_is_there():
    lines = primary()
    with pytest.raises(ValueError, match=r"search is not finished, of gift-paca:r=4"):
        tables.choose([line for line in lines if line["method"] != "gift-paca:r=4"])
    a_try = next(line for line in lines if line["method"] == LORA and line["task"] == "flowers17")
    with pytest.raises(ValueError, match="search is not finished, of lora"):
        tables.choose([line for line in lines if line is not a_try])
    assert tables.answer(lines) is not None
    for name in (LORA, CHOSEN):
        last = next(line for line in reversed(lines) if line["method"] == name)
        rest = [line for line in lines if line is not last]
        assert tables.answer(rest) is None
        assert tables.answer_text(rest).startswith("Not finished")


def test_the_difference_is_that_of_welch_and_satterthwaite_over_tasks_and_seeds():
    lines = primary((91, 50, 50, 80, 80, 40))
    found = tables.answer(lines)
    assert found is not None
    by_run = {(line["method"], line["task"], line["seed"]): line["accuracy"] for line in lines if line["seed"] != 100}
    expected = mean_interval(
        [
            np.array([100 * (by_run[CHOSEN, task, seed] - by_run[LORA, task, seed]) for seed in range(10)])
            for task in tables.TASKS
        ]
    )
    assert found.difference.mean == pytest.approx(1 / 6)
    seeds = [
        np.mean([100 * (by_run[CHOSEN, task, seed] - by_run[LORA, task, seed]) for task in tables.TASKS])
        for seed in range(10)
    ]
    by_seed, error = tables.difference_by_seed(lines, CHOSEN, LORA, tables.TASKS), np.std(seeds, ddof=1) / 10**0.5
    assert by_seed is not None
    assert (by_seed.mean, by_seed.low) == pytest.approx((1 / 6, 1 / 6 - stdtrit(9, 0.975) * error))
    assert (found.difference.low, found.difference.high) == pytest.approx((expected.low, expected.high))
    assert found.difference.low is not None
    assert -0.5 < found.difference.low < 1 / 6 - 0.1


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(-0.49, 3.0, "yes"), (0.1, 0.2, "yes"), (-0.51, 3.0, "open"), (-3.0, -0.49, "open"), (-3.0, -0.51, "no")],
)
def test_the_verdict_is_that_of_the_interval_and_the_margin(low, high, expected):
    assert tables.verdict(Estimate((low + high) / 2, low, high)) == expected
    assert tables.verdict(Estimate(0.0, None, None)) == "open"


@pytest.mark.parametrize(
    ("gift", "lora", "verdict", "has_two"),
    [
        ((90, 50, 50, 80, 80, 40), (90, 50, 50, 80, 80, 40), "yes", False),
        ((80, 50, 50, 80, 80, 40), (90, 50, 50, 80, 80, 40), "no", False),
        ((87, 50, 50, 80, 80, 40), (90, 50, 50, 80, 80, 40), "open", False),
        ((90, 13, 12, 80, 80, 40), (90, 13, 12, 80, 80, 40), "yes", True),
        ((87.6, 13, 12, 80, 80, 40), (90, 13, 12, 80, 80, 40), "open", True),  # diluted: yes and open
        ((86, 25, 12, 80, 80, 40), (90, 13, 12, 80, 80, 40), "no", True),  # yes and no
    ],
)
def test_tasks_that_nobody_learns_do_not_make_a_yes(gift, lora, verdict, has_two):
    found = tables.answer(primary(gift, lora))
    assert found is not None
    assert (found.verdict, found.without_sprites is not None) == (verdict, has_two)
    text = tables.answer_text(primary(gift, lora))
    assert text.startswith({"yes": "**Yes.**", "no": "**No.**", "open": "**Open: 10 seeds"}[verdict])
    assert "3,481 parameters against 16,384" in text
    assert ("without dSprites" in text) == has_two


def test_a_run_that_diverged_leaves_the_question_open():
    lines = primary()
    lines[-1 - 60]["accuracy"] = None
    assert lines[-1 - 60]["method"] == CHOSEN
    found = tables.answer(lines)
    assert found is not None
    assert found.verdict == "open"
    assert "**Open" in tables.answer_text(lines)
    assert "independent" not in tables.answer_text(lines)


def test_the_table_of_tasks_says_where_either_loses_and_how_well_they_fit():
    lines = primary((91, 50, 50, 80, 80, 40))
    lines = [line | {"loss": 0.5, "train_loss": 0.25 if line["method"] == LORA else 0.75} for line in lines]
    rows = tables.table_of_tasks(lines).splitlines()
    assert rows[0].startswith("| task | lora | gift-paca:r=8 | difference [95 %] |")
    assert rows[2].startswith("| digits | 90.0 | 91.0 | +1.00 [+")
    assert rows[3].startswith("| dsprites_loc | 50.0 | 50.0 | ")
    assert all(row.endswith("| 0.250 / 0.750 | 0.500 / 0.500 |") for row in rows[2:])
    lines[-1 - 60] |= {"accuracy": None, "train_loss": None}
    assert "| caltech97 | 40.0 | – | – | 0.250 / – | 0.500 / 0.500 |" in tables.table_of_tasks(lines).splitlines()
    del lines[-1 - 60]
    assert "Not finished" in tables.table_of_tasks(lines)


def test_ranks_are_compared_over_a_factor_of_four_and_the_seeds_that_all_have():
    assert all(max(sizes) == 4 * min(sizes) for sizes in (tables.FAMILIES | tables.SMALLER_LORA).values())
    lines = finals(LORA, (70,) * 6) + finals("lora:r=4,lora_alpha=4", (71,) * 6, tables.SEEDS)
    lines += finals("lora:r=2,lora_alpha=2", (68,) * 6, tables.SEEDS)
    lora, paca, _, smaller = tables.table_of_ranks(lines).splitlines()[2:]
    assert lora.startswith("| LoRA | 2: 68.0, 4: 71.0, 8: ")
    assert "| +2.0 [" in lora or "| +1.9 [" in lora
    assert paca == "| GIFT paca | 4: –, 8: –, 16: – | – | – |"
    assert smaller == "| LoRA, smaller | 1: –, 2: 68.0, 4: 71.0 | – | – |"


def test_every_size_of_gift_stands_beside_the_smallest_lora_that_trains_as_many_numbers_or_more(monkeypatch):
    smallest, second = tables.SMALLEST_LORA, "lora:r=2,lora_alpha=2"
    monkeypatch.setattr("tests.comparison.SIZES", SIZES | {smallest: 2048, second: 4096, "gift-linear": 4096})
    named = {LORA: 80, smallest: 60, second: 70, CHOSEN: 73, "gift-paca:r=4": 59, "gift-linear": 70}
    lines = [line for name, at in named.items() for line in finals(name, (at,) * 6, tables.SEEDS)]
    four, eight, linear = tables.table_of_equal_sizes(lines).splitlines()[2:]  # r = 16 has no test
    assert four.startswith(f"| gift-paca:r=4: 1,661 | {smallest}: 2,048 | -1.")
    assert eight.startswith(f"| {CHOSEN}: 3,481 | {second}: 4,096 | +3.0 [+2.")
    assert linear.startswith(f"| gift-linear: 4,096 | {second}: 4,096 | ")
    on_photos = tables.points(tables.difference(lines, CHOSEN, second, tables.PHOTOS), 1)
    drawn = tables.points(tables.difference(lines, CHOSEN, second, ("digits", "rendered_flowers")), 1)
    assert eight.endswith(f"| {drawn} | {on_photos} |")
    beside_lora = {row.split(" | ")[0]: row for row in tables.table_of_parts(lines).splitlines()[2:]}
    assert list(beside_lora) == [f"| {name}: {tables._sizes(lines)[name]:,}" for name in named if name != LORA]
    assert beside_lora["| gift-paca:r=4: 1,661"].startswith("| gift-paca:r=4: 1,661 | -21.")
    (row,) = tables.table_of_generators(lines).splitlines()[2:]
    assert row.startswith(f"| gift-linear: 4,096 | {CHOSEN}: 3,481 | -3.0 [-3.")
    assert tables.table_of_generators(finals("gift-linear", (70,) * 6)).count("\n") == 1
    assert tables.table_of_equal_sizes([]).count("\n") == 1
    diverged = [dict(line, accuracy=None, trained_parameters_without_head=None) for line in finals(LORA, (80,) * 6)]
    assert tables.table_of_equal_sizes(diverged).count("\n") == 1
    without = [line for line in lines if line["method"] in (CHOSEN, smallest)]  # which is smaller than it
    assert tables.table_of_equal_sizes(without).count("\n") == 1


def test_learning_rates_are_compared_where_the_search_is_finished():
    lines = searched(LORA, (0.9, 0.5, 0.5, 0.8, 0.8, 0.4)) + searched(CHOSEN, [0.5] * 6)
    lines[-1]["accuracy"] = None
    lora, chosen = tables.table_of_rates(lines + searched("gift-paca", [0.5] * 6)[:-1]).splitlines()[2:]
    assert lora == "| lora | 0.001: 64.0, 0.002: 65.0, 0.003: 64.0, 0.004: 64.0 |"
    assert chosen.endswith("| 0.001: 49.0, 0.002: 50.0, 0.003: 49.0, 0.004: – |")


def test_searches_of_two_machines_are_compared_by_learning_rate():
    first, second = (searched(LORA, [accuracy] * 6) for accuracy in (0.5, 0.5))
    second[0] |= {"accuracy": 0.59, "loss": first[0]["loss"] + 0.25}
    lines = [*first, *(line | {"device": "another"} for line in second), *searched(CHOSEN, [0.5] * 6)]
    one, two, *_ = tables.table_of_machines(lines).splitlines()[2:]
    assert one == "| 0.001 | 6 | 5 | 10.0 | 0.2 |"
    assert two == "| 0.002 | 6 | 6 | 0.0 | 0 |"
    second[0] |= {"accuracy": None, "loss": None}
    assert "| 0.001 | 5 | 5 | 0.0 | 0 |" in tables.table_of_machines(
        [*first, *(line | {"device": "another"} for line in second)]
    )
    assert tables.table_of_machines(first).count("\n") == 1


def ablated(**accuracies):
    given = dict.fromkeys((tables.DEFAULT, *comparison.ABLATIONS), (0.9, 0.5, 0.8)) | accuracies
    return [line for name, own in given.items() for line in searched(name, own, ablation_tables.ABLATED_ON)]


def test_ablations_that_change_much_are_tested_the_largest_first_and_places_always():
    better, worse = "gift-linear", "gift-paca:norm=none"
    lines = ablated(**{worse: (0.9, 0.5, 0.7), better: (0.9, 0.5, 0.86), "gift-paca:num_heads=4": (0.9, 0.5, 0.84)})
    assert ablation_tables.that_matter(lines, comparison.ABLATIONS, comparison.ALWAYS) == [
        worse,
        better,
        *comparison.ALWAYS,
    ]
    many = ablated(**dict.fromkeys(comparison.ABLATIONS, (0.5, 0.5, 0.5)))
    assert len(ablation_tables.that_matter(many, comparison.ABLATIONS, comparison.ALWAYS)) == 8 + len(comparison.ALWAYS)
    lines.remove(next(line for line in lines if line["method"] == comparison.ABLATIONS[3]))
    with pytest.raises(ValueError, match=f"not finished, of {comparison.ABLATIONS[3]}"):
        ablation_tables.that_matter(lines, comparison.ABLATIONS, comparison.ALWAYS)


def test_the_table_of_ablations_has_both_differences_and_stars_what_holds_for_all_together():
    lines = ablated(**{"gift-linear": (0.99, 0.5, 0.8), "gift-paca:norm=none": (0.9, 0.5, 0.7)})
    for name, means in {"gift-paca": 70, "gift-linear": 72, "gift-paca:norm=none": 70}.items():
        lines += finals(name, (means,) * 3, tables.SEEDS, ablation_tables.ABLATED_ON)
    rows = ablation_tables.table_of_ablations(lines).splitlines()[2:]
    assert rows[0].startswith("| generator=linear | 5,000 | 76.3 | +3.0 | +2.00 [+")
    assert rows[0].endswith("] * |")
    assert "| nothing changed | 7,889 | 73.3 |  |  |" in rows
    assert re.match(r"\| norm=none \| 5,000 \| 70.0 \| -3.3 \| [+-]0.00 \[-", rows[-1])
    assert "*" not in rows[-1]
    one, other = ablation_tables.table_of_tested(lines).splitlines()[2:]
    assert one.startswith("| generator=linear | +2.0 [+")
    assert re.match(r"\| norm=none( \| [+-]0\.0 \[[^|]*){3} \|$", other)


def place():
    return comparison.Place(Path("data"), Path("photos"), Path("runs"))


def planned(monkeypatch, step):
    monkeypatch.setattr(comparison, "_lines", lambda place, folder: primary() if folder == "comparison" else ablated())
    return comparison.benchmarks_of(step, place())


@pytest.mark.parametrize("step", comparison.STEPS)
def test_every_step_is_of_the_protocol_that_the_plan_names(monkeypatch, step):
    options = planned(monkeypatch, step)
    assert {one.epochs for one in options} == {5}
    assert {one.tries for one in options} == {4}
    assert "**5 epochs**" in PLAN
    assert "batches of 16" in PLAN
    assert SUITES["offline"].protocol.options["batch_size"] == 16
    assert "(0.001, 0.005, 0.01, 0.05 for adapters;" in PLAN
    assert [rate for rate, _ in tries(SUITES["offline"].protocol.rates[""], 4)] == [0.001, 0.005, 0.01, 0.05]
    assert {one.search_only for one in options} == {step in ("search", "screening")}
    folders = {"flowers17", "caltech97"} if step in comparison.FOLDERS["comparison"] else {"flowers17"}
    assert {folder.name for one in options for folder in one.folders} == folders


def test_the_primary_question_has_ten_seeds_and_all_else_five(monkeypatch):
    five, ten = planned(monkeypatch, "primary")
    assert (five.final_seeds, ten.final_seeds) == (tuple(range(5)), tuple(range(10)))
    assert ten.methods == (LORA, CHOSEN)
    assert all(one.final_seeds == tuple(range(5)) for one in planned(monkeypatch, "others"))
    assert planned(monkeypatch, "ablations")[0].final_seeds == tuple(range(5))


def test_every_method_that_is_planned_can_be_trained():
    names = [*comparison.PRIMARY, *comparison.OTHERS[:-1], *(set(comparison.ABLATIONS) - set(comparison.OTHERS))]
    methods = resolve_methods(read_methods(names, SUITES["offline"].protocol), SMALL)
    for method in methods:
        backbone = load_backbone(SMALL, ("a", "b"))
        config = method_config(method.options["method"], backbone, method.options["method_options"])
        options = finetune_options(TrainOptions(**method.options, data="", output_dir="x"))
        model = make_model(backbone, with_head(backbone, config), options)
        trained = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "head" not in name)
        assert trained == SIZES.get(method.name, trained)
        assert (trained > 0) == (method.name != "linear-probe")
        assert method.name not in SIZES or f"{trained:,}" in PLAN


def test_a_benchmark_that_fails_keeps_no_other_from_being_run(monkeypatch):
    seen = []

    def fail_first(options, report):
        seen.append(options.methods)
        if len(seen) == 1:
            raise ValueError("no such folder")

    monkeypatch.setattr(comparison, "run_benchmark", fail_first)
    with pytest.raises(SystemExit, match="linear-probe: no such folder"):
        comparison.run("others", Path("data"), Path("photos"))
    assert len(seen) == len(comparison.OTHERS)
    with pytest.raises(ValueError, match="no step 'main': choose search, primary"):
        comparison.run("main", Path("data"), Path("photos"))


def test_lines_are_taken_over_and_none_is_ever_lost(tmp_path):
    runs, results, lines = tmp_path / "runs", tmp_path / "results", primary()
    (runs / "comparison").mkdir(parents=True)
    results.mkdir()
    text = "".join(f"{json.dumps(line | {'id': str(number)})}\n" for number, line in enumerate(lines))
    (runs / "comparison" / "runs.jsonl").write_text(text)
    log = folder_of(lines[0] | {"id": "0"}, runs / "comparison") / "log.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text('{"loss": 2.5}\n{"loss": 0.25}\n{"eval_loss": 1.0}\n')
    document = tmp_path / "document.md"
    start, end = documents.marks("answer")
    document.write_text(f"before\n{start}\nold\n{end}\nafter\n")
    comparison.write(document, None, results, runs, take_over=True)
    taken = documents.read_results(results)["comparison"]
    assert [line.pop("train_loss") for line in taken] == [0.25] + [None] * (len(lines) - 1)
    assert taken == [json.loads(one) for one in text.splitlines()]
    assert between(document, start, end) == tables.answer_text(lines)
    assert not list(tmp_path.glob("*.png"))
    readme = tmp_path / "README.md"
    readme.write_text("{}\n{}\n{}\n{}\n".format(*documents.marks("table"), *documents.marks("means")))
    comparison.write(readme=readme, results=results)
    assert "| gift-paca:r=8 | 3,481 | 65.0 [" in between(readme, *documents.marks("means"))
    assert f"![Accuracy against trained parameters]({documents.PICTURE})" in between(readme, *documents.marks("table"))
    assert (tmp_path / documents.PICTURE).stat().st_size > 5000
    (runs / "comparison" / "runs.jsonl").write_text(text.partition("\n")[2])
    with pytest.raises(ValueError, match=r"lacks 1 runs of .*comparison.jsonl, such as 0, which would be lost: `bring"):
        comparison.write(document, None, results, runs, take_over=True)
    comparison.bring_back(results, runs)
    comparison.write(document, None, results, runs, take_over=True)
    taken = documents.read_results(results)["comparison"]
    assert [(line["id"], loss) for line in taken if (loss := line.pop("train_loss")) is not None] == [("0", 0.25)]
    assert sorted(taken, key=lambda line: int(line["id"])) == [json.loads(one) for one in text.splitlines()]
    document.write_text("nothing")
    with pytest.raises(ValueError, match="has no place for a table"):
        comparison.write(document, None, results)


def test_every_method_had_as_many_tries_and_the_best_was_taken():
    for name, lines in documents.read_results(ROOT / "results").items():
        if name == "remedies":  # which have the rates of the comparison
            continue
        for task, method in {(line["task"], line["method"]) for line in lines}:
            own = [line for line in lines if (line["task"], line["method"]) == (task, method)]
            search, final = ([line for line in own if (line["phase"] == SEARCH) == is_search] for is_search in (1, 0))
            assert len(search) == comparison.TRIES or not final, (name, task, method)
            for line in final:
                tried = [one for one in search if one["accuracy"] is not None]
                best = min(tried, key=lambda one: (-one["accuracy"], one["loss"], one["learning_rate"]))
                assert all(line[rate] == best[rate] for rate in ("learning_rate", "weight_decay")), (name, task, method)


def test_results_are_of_one_backbone_and_name_no_place_of_a_machine():
    for name, lines in documents.read_results(ROOT / "results").items():
        assert len({line["backbone_digest"] for line in lines}) == 1
        assert not any(line["commit"].endswith("+") for line in lines)
        assert '"/' not in (ROOT / "results" / f"{name}.jsonl").read_text()


def test_documents_show_what_was_measured():
    lines = documents.read_results(ROOT / "results")
    files = [ROOT / "docs" / "benchmarks.md", ROOT / "README.md"]
    for name, text in documents.texts(lines).items():
        shown = [
            between(document, *documents.marks(name))
            for document in files
            if documents.marks(name)[0] in document.read_text()
        ]
        assert shown == [text.strip()], name


def test_readme_says_in_words_how_the_primary_question_was_answered():
    found = tables.answer(documents.read_results(ROOT / "results")["comparison"])
    assert found is not None
    readme = " ".join((ROOT / "README.md").read_text().split())
    learned, whole = (
        f"by {-one.mean:.1f} [{-one.high:.1f}, {-one.low:.1f}]" for one in (found.without_sprites, found.difference)
    )
    assert f"**{found.verdict.capitalize()}**: on the four tasks that LoRA learns it is worse {learned};" in readme
    assert f"on all six, {whole}, it would be {tables.verdict(found.difference)}." in readme
