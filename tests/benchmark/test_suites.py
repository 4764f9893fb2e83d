from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from gift.benchmark.methods import read_methods
from gift.benchmark.options import BenchmarkOptions
from gift.benchmark.runs import SEARCH_SEED
from gift.benchmark.suites import DECAYS, SUITES, tries

ROOT = Path(__file__).parents[2]
RATES = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
RECIPES = sorted(ROOT.glob("recipes/*/*.yaml"))


def test_suites_have_the_tasks_of_the_paper():
    assert [len(SUITES[name].tasks) for name in ("fgvc", "vtab1k", "offline")] == [5, 19, 4]


def test_every_method_of_every_suite_has_six_ascending_rates():
    for suite in SUITES.values():
        for rates in suite.protocol.rates.values():
            assert len(rates) == 6
            assert sorted(set(rates)) == list(rates)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_a_benchmark_trains_as_the_recipe_of_its_suite_does(recipe):
    suite = {"vtab": "vtab1k", "fgvc": "fgvc"}[recipe.parent.name]
    name = {"gift": "gift-linear", "gift-paca": "gift-paca"}.get(recipe.stem, recipe.stem)
    method = read_methods([name], SUITES[suite].protocol)[0]
    told = yaml.safe_load(recipe.read_text())
    rate = told.pop("learning_rate", None)
    defaults = {"method": "gift", "drop_path": 0, "method_options": {}, "epochs": 100, "batch_size": 64}
    defaults |= {"resize": "crop", "augment": "crop-flip", "optimizer": "adamw"}
    own = {"method_options": {"generator": "paca"}} if recipe.stem == "gift-paca" else {}
    assert defaults | told | own == defaults | method.options
    assert rate is None or method.rates[0] <= rate <= method.rates[-1]


def test_all_pairs_are_tried_once_if_there_is_no_budget():
    pairs = tries(RATES, None)
    assert sorted(pairs) == sorted((rate, decay) for rate in RATES for decay in DECAYS)


@pytest.mark.parametrize("budget", [1, 2, 4, 5, 6, 7, 12, 24])
def test_a_budget_spreads_rates_evenly_and_changes_decays(budget):
    pairs = tries(RATES, budget)
    assert len(set(pairs)) == len(pairs) == budget
    counts = [sum(rate == tried for tried, _ in pairs) for rate in RATES]
    assert max(counts) - min(counts) <= 1
    if budget > 1:
        assert {pairs[0][0], max(rate for rate, _ in pairs)} == {1.0, 6.0}
        assert len({decay for _, decay in pairs}) == min(budget, len(DECAYS))


@pytest.mark.parametrize("budget", [0, 25])
def test_a_budget_beyond_the_pairs_is_refused(budget):
    with pytest.raises(ValueError, match=f"budget must be from 1 to 24.*got {budget}"):
        tries(RATES, budget)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"suite": "vtab"}, "suite.*vtab1k"),
        ({"seeds": ()}, "seeds must be different"),
        ({"seeds": (1, 1)}, "seeds must be different"),
        ({"seeds": (SEARCH_SEED,)}, "the search"),
        ({"budget": 0}, "budget"),
        ({"epochs": -1}, "epochs"),
        ({"scheduler": "hyperband"}, "scheduler"),
        ({"scheduler": "asha", "ray": "none"}, "needs --ray"),
        ({"retries": -1}, "retries"),
        ({"gpus_per_run": -1}, "gpus_per_run"),
        ({"methods": ("lora",), "reference": "lorra"}, "reference must be one of the methods lora"),
        ({"cpus_per_run": 0}, "cpus_per_run"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        BenchmarkOptions(**{"suite": "offline", "out": Path("out")} | changes)


def test_a_first_look_is_shorter_unless_it_is_said_how_long():
    options = {"suite": "vtab1k", "out": Path("out"), "reduced": True}
    assert (BenchmarkOptions(**options).changes, BenchmarkOptions(**options).tries) == ({"epochs": 4}, 4)
    told = BenchmarkOptions(**options, epochs=9, budget=7)
    assert (told.changes, told.tries) == ({"epochs": 9}, 7)
    assert BenchmarkOptions(suite="vtab1k", out=Path("out")).tries is None
    assert asdict(told)["out"] == Path("out")
