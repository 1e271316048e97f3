"""The paper's tables: who teaches whom, what is done of them, what they claim, and the
command that trains them.
"""
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import bartlett
from hypothesis import given, settings
from hypothesis import strategies as st

from kdc_nb.calibration.contributions import debiased_contributions
from kdc_nb.calibration.differences import estimate_difference, paired_difference
from kdc_nb.calibration.metrics import ece, nll, top1
from kdc_nb.training.data import DataSpec, load_data
from kdc_nb.training.methods import Method
from kdc_nb.training.recipes import RECIPES, Recipe
from kdc_nb.experiments.agenda import write_specs
from kdc_nb.experiments.results import read_results, result_outcomes, write_results
from kdc_nb.experiments.runs import run
from kdc_nb.experiments.specs import (
    Distil, RunSpec, lineage, run_label, self_distillation_chain, trace_generation,
)
from kdc_nb.experiments.store import Store
from kdc_nb.experiments.sweeps import sweep
from kdc_nb.experiments.tables import collect_by_row, results_table
from kdc_nb.experiments.teachers import TemperatureScaled, TemperedPosterior, direct_counterpart
from kdc_nb.analysis.diffusion import metrics_by_generation, plot_generations
from kdc_nb.analysis.linear_model import fit_linear_student
from kdc_nb.analysis.theorems import calibration_gap, draw_linear_problem
from kdc_nb.analysis.views import extract_features
from kdc_nb.paper.claims import (
    _contributions_of_row, paper_progress_table, published_values, row_differences, table_claims,
)
from kdc_nb.paper.selection import (
    as_hyperparameters, candidate_specs, candidates_table, select_by_validation_nll,
)
from kdc_nb.explorers import _trace_first_teacher, explore_penultimate
from kdc_nb.paper.commands import main
from tests.conftest import patch_name
from kdc_nb.paper.settings import (
    MINIATURE_DATA, PAPER_EXPERIMENTS, PUBLISHED_HYPERPARAMETERS, SETTINGS, Setting, order_by_priority,
    paper_specs, table_specs,
)

METHODS = {"NLL": Method("nll"), "PS-KD": Method("pskd"), "focal + MDCA": Method("mdca", beta=1, gamma=1)}
TINY = DataSpec("known", n_train=100, n_valid=60, n_test=80)
NET = RunSpec(TINY, "resnet8", Method("nll"), Recipe(2, 50))


@pytest.mark.parametrize("name", SETTINGS)
def test_who_teaches_whom(name):
    setting = SETTINGS[name]
    rows = table_specs(setting, METHODS, "smoke", T=2, alpha=.5)
    assert len(set(rows.values())) == len(rows)
    for row, spec in rows.items():
        assert spec.model == (setting.teacher if row.startswith("Teacher") else setting.student), row
        if row.startswith("KD"):
            assert ({r.model for r in lineage(spec)[:-1]} == {setting.teacher}
                    and (spec.method.T, spec.method.alpha) == (2, .5))
    assert (rows["KD(UC), from NLL"].method.teacher.method == Method("nll")
            and isinstance(rows["KD(C), from NLL after TS"].method.teacher, TemperatureScaled))


def test_the_rows_train(tmp_path):
    rows = table_specs(Setting(TINY, "resnet8", "resnet8"), METHODS, recipe=Recipe(2, 50))
    assert all(r.evaluation.n == 80 for r in sweep(rows.values(), Store(tmp_path), "cpu", progress=False))


@given(st.integers(0, 8), st.integers(0, 3))
def test_each_generation_is_taught_by_the_one_before(n, seed):
    chain = self_distillation_chain(replace(NET, seed=seed), n, T=2, alpha=.5)
    assert ([trace_generation(s) for s in chain] == [(chain[0], k) for k in range(n + 1)]
            and lineage(chain[-1]) == chain)
    assert lineage(*chain[::-1]) == chain


def test_a_chain_begins_where_a_network_was_not_taught_by_a_network():
    scaled = replace(NET, method=Distil(TemperatureScaled(NET)))
    assert trace_generation(scaled) == (scaled, 0) and _trace_first_teacher(scaled) == ("nll after TS", 1)
    assert (_trace_first_teacher(self_distillation_chain(NET, 3)[-1]) == ("nll", 3)
            and _trace_first_teacher(self_distillation_chain(scaled, 1)[-1])[1] == 1)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.floats(.2, 1), st.integers(2, 5))
def test_generations_at_alpha_are_one_at_its_power(seed, alpha, t):
    "The exact law at T = 1, for a linear student with an intercept."
    p = draw_linear_problem(N=300, d=4, scale=1., angle=40, overconfidence=2, intercept=.3, seed=seed)
    first = z = p.X.T@p.W_t
    for _ in range(t): z = p.X.T@fit_linear_student(p.X, p.y, z, 1., alpha).W
    assert z == pytest.approx(p.X.T@fit_linear_student(p.X, p.y, first, 1., alpha**t).W, abs=1e-5)
    assert (calibration_gap(p.X, z, p.y)[-1]
            == pytest.approx(alpha**t*calibration_gap(p.X, first, p.y)[-1], abs=1e-6))


@pytest.fixture(scope="module")
def looks(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("chains"))
    net = replace(NET, data=DataSpec("known", n_train=200, n_valid=60, n_test=400))
    chains = [s for m in ("nll", "focal") for s in self_distillation_chain(replace(net, method=Method(m)), 2)]
    return {s: extract_features(s, store, "cpu", per_class=3) for s in chains}, store


def test_generations_are_measured_from_what_they_say(looks):
    found, store = looks
    frame = metrics_by_generation(found)
    assert list(dict.fromkeys(zip(frame.chain, frame.generation))) == [
        (m, k) for m in ("nll", "focal gamma=3") for k in range(3)]
    chain = list(found)[:3]
    z = [run(s, store, "cpu", progress=False).logits["test"].double() for s in chain]
    last = frame.query("chain == 'nll' and generation == 2").set_index("metric")
    assert (last.value["agreement"]
            == pytest.approx(float((z[2].argmax(1) == z[0].argmax(1)).double().mean())))
    expected = z[2].softmax(1).amax(1).mean() - last.value["top1"]
    assert last.value["gap"] == pytest.approx(float(expected), abs=1e-4)
    assert last.low["gap"] < last.value["gap"] < last.high["gap"]
    assert (last.value["kl"]
            == pytest.approx(run(chain[2], store, "cpu", progress=False).raw.metrics["kl"].value, rel=1e-4))


def test_generations_are_drawn_with_what_theory_expects(looks):
    frame = metrics_by_generation(looks[0])
    axs = plot_generations(frame, 1, .9, ("ece", "gap"), label_only_gap=.1)
    first = frame.query("chain == 'nll' and generation == 0 and metric == 'gap'").value.item()
    dotted = [line for line in axs[1].lines if line.get_linestyle() == ":"]
    assert len(dotted) == 2 and not [l for l in axs[0].lines if l.get_linestyle() == ":"]
    assert dotted[0].get_ydata() == pytest.approx([.1 + (first - .1)*.9**g for g in range(3)])
    assert dotted[0].get_color() == axs[1].lines[0].get_color()
    with pytest.raises(ValueError, match="T, alpha: got 2, 0.9, expected one of 1, 0.9"):
        plot_generations(frame, 2, .9)


def test_a_chain_without_its_first_is_refused(looks):
    found = dict(list(looks[0].items())[1:3])
    with pytest.raises(ValueError, match="views: got no known resnet8 nll, seed 0, expected generation zero"):
        metrics_by_generation(found)
    with pytest.raises(ValueError, match="views: got no student"): metrics_by_generation({})


def test_only_chains_of_one_kind_are_measured(looks):
    "Another temperature half-way, or another network, would be counted where it does not belong."
    first, second, _ = list(looks[0])[:3]
    l = looks[0][second]
    hot = replace(second, method=Distil(second, 4., .9))
    with pytest.raises(ValueError, match="views: got .*expected chains as"):
        metrics_by_generation({first: l, second: l, hot: l})
    larger = replace(second, model="resnet14")
    with pytest.raises(ValueError, match="expected chains as"): metrics_by_generation({first: l, larger: l})
    other = self_distillation_chain(replace(first, model="resnet14"), 1)
    with pytest.raises(ValueError, match="expected chains of one network"):
        metrics_by_generation(dict.fromkeys([first, second, *other], l))


def test_the_explorer_goes_through_the_generations(looks):
    explorer = explore_penultimate(looks[0])
    pictures = [explorer.picture.value]
    assert [v for _, v in explorer.controls["generation"].options] == [1, 2]
    for name, v in (("generation", 2), ("teacher", "focal gamma=3"), ("generation", 1)):
        explorer.controls[name].value = v
        assert not explorer.refusal.value and explorer.picture.value not in pictures
        pictures.append(explorer.picture.value)


@pytest.mark.parametrize("name", PAPER_EXPERIMENTS)
@pytest.mark.parametrize("small", [None, *MINIATURE_DATA])
def test_every_piece_of_the_paper_is_a_table_of_runs(name, small):
    texts = name == "table3"
    if small and texts != (small == "topics"):
        with pytest.raises(ValueError, match=f"^small: got '{small}', expected"):
            paper_specs(name, small=small)
        return
    rows = [paper_specs(name, seed=s, small=small) for s in (0, 1)]
    assert list(rows[0]) == list(rows[1]) and len(set(rows[0].values())) == len(rows[0])
    for spec in rows[1].values():
        assert ({r.seed for r in lineage(spec)} == {1} and spec.data
                == (MINIATURE_DATA[small] if small else SETTINGS[PAPER_EXPERIMENTS[name].setting].data))
        assert ({r.model for r in lineage(spec)}
                <= ({"resnet8", "resnet14", "bert_2_64", "distilbert_1_64"} if small
                    else set(SETTINGS[PAPER_EXPERIMENTS[name].setting][1:])))
        assert (spec.recipe
                == RECIPES[("text_small" if small else "text") if texts else ("cpu" if small else "paper")])


def test_the_most_telling_rows_come_first():
    "Worked out by hand"
    def first(name, n):
        rows = paper_specs(name)
        return [next(k for k, v in rows.items() if v == s) for s in order_by_priority(rows)[:n]]
    assert first("table1", 7) == ["KD(UC), from NLL", "Teacher, NLL",
                                  "Direct, NLL", "KD(C), from NLL after TS",
                                  "KD(C), from MDCA", "Teacher, MDCA", "Direct, MDCA"]
    assert first("table2b", 4) == ["KD(UC), from NLL", "Direct, NLL", "KD(C), from NLL after TS",
                                   "KD(C), from MDCA"], "a student of itself"
    assert first("fig4", 6) == ["UC, generation 1", "UC, generation 0", "C, generation 1",
                                "C, generation 0", "UC, generation 2", "C, generation 2"]
    assert (first("ablation", 7) == [f"KD(UC), from NLL, T={T}, alpha=0.9" for T in (1, 2, 4, 8, 20)]
            + ["Teacher, NLL", "KD(C), from MDCA, T=1, alpha=0.9"])


@pytest.mark.parametrize("name", PAPER_EXPERIMENTS)
def test_worth_is_an_order_of_all_rows(name):
    rows = paper_specs(name)
    assert sorted(map(run_label, order_by_priority(rows))) == sorted(map(run_label, rows.values()))


def test_a_miniature_keeps_who_is_larger():
    for name, teacher, student in (("table1", "resnet14", "resnet8"), ("table2a", "resnet8", "resnet14"),
                                   ("table2b", "resnet8", "resnet8"), ("ablation", "resnet14", "resnet8")):
        rows = paper_specs(name, small="known")
        assert ({r.model for k, s in rows.items() if k.startswith("KD") for r in lineage(s)}
                == {teacher, student})
        assert {s.model for k, s in rows.items() if k.startswith("KD")} == {student}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    "Three seeds of a small table; the last seed has no student of the teacher after TS"
    store, setting = (Store(tmp_path_factory.mktemp("table")),
                      Setting(replace_size(TINY), "resnet8", "resnet8"))
    seeds = [table_specs(setting, METHODS, Recipe(2, 50), s) for s in range(3)]
    results = {s: run(s, store, "cpu", progress=False) for rows in seeds
               for k, s in rows.items() if rows is not seeds[2] or k != "KD(C), from NLL after TS"}
    return seeds, results


def replace_size(data): return DataSpec(data.name, **data.params | {"n_test": 300})


def test_an_unfinished_table_says_what_is_missing(table):
    seeds, results = table
    head, cells = paper_progress_table(seeds, results, published_values("self"))
    by = {r[0]: dict(zip(head, r)) for r in cells}
    assert by["KD(C), from NLL after TS"]["seeds"] == "2 of 3" and by["Direct, NLL"]["seeds"] == "3 of 3"
    assert ((by["Direct, NLL"]["paper: ECE, %"], by["Direct, focal + MDCA"]["paper: ECE, %"])
            == ("3.30", "not in our source"))
    assert (by["Direct, NLL after TS"]["NLL, nats"]
            == by["Direct, NLL"]["after TS: NLL, nats"] != by["Direct, NLL"]["NLL, nats"])
    head, cells = paper_progress_table(seeds, {})
    assert ("true error, %" not in head and {r[1] for r in cells} == {"to do"}
            and not any(any(r[2:]) for r in cells) and not any(h.startswith("paper") for h in head))


def test_an_ece_outside_its_interval_is_marked_and_said_below(table):
    "The debiased values, over whose seeds the interval is, are moved below the ECE"
    seeds, results = table
    def with_ece(debiased):
        def spoiled(r, d):
            return replace(r, raw=r.raw._replace(metrics=r.raw.metrics | {
                "ece": replace(r.raw.metrics["ece"], value=.5, debiased=d)}))
        return [spoiled(results[rows["Direct, NLL"]], d) for rows, d in zip(seeds, debiased)]
    low, inside = with_ece((.39, .4, .41)), with_ece((.48, .49, .5))
    shown = results_table({"a": low, "b": inside}, "two rows")
    assert ([r[shown.head.index("ECE, %")] for r in shown.rows] == ["50.00 ±0.00†", "50.00 ±0.00"]
            and [r[shown.head.index("95% interval")] for r in shown.rows]
            == ["37.52 to 42.48", "46.52 to 51.48"]
            and len(shown.notes) == 2), "t(2) is 4.303, times .01/sqrt(3)"
    text = repr(shown).splitlines()
    assert (text[0] == "two rows" and text[-2:] == shown.notes and "Student's t" in text[-2]
            and text[-1].startswith("†") and shown.notes[1] in shown._repr_html_())
    rows = [{"a": r.spec} for r in low]
    def progress(own): return paper_progress_table(rows, {r.spec: r for r in own})
    assert results_table({"b": inside}).notes == progress(inside).notes == shown.notes[:1]
    assert progress(low).notes == shown.notes and results_table({"b": inside[:1]}).notes == shown.notes[1:]


def test_tables_go_to_pandas(table, tmp_path):
    seeds, results = table
    shown = paper_progress_table(seeds, results, published_values("self"))
    head, rows = shown
    frame = shown.to_frame()
    assert list(frame) == head and frame.values.tolist() == rows
    frame.to_csv(tmp_path/"t.csv", index=False)
    assert (tmp_path/"t.csv").read_text().splitlines()[0].startswith(
        ',seeds,"Top-1, %","ECE, %",95% interval'
    )
    assert r"ECE, \%" in frame.to_latex(index=False, escape=True)


def test_rows_are_compared_seed_by_seed_over_the_seeds_that_both_have(table, tmp_path):
    seeds, results = table
    named = collect_by_row(seeds, results)
    a, b = ("KD(C), from NLL after TS", "raw"), ("Direct, NLL", "scaled")
    for metric in ("nll", "ece"):
        one, other = (debiased_contributions(
            [result_outcomes(results[rows[name]])[which] for rows in seeds[:2]],
            metric
        ) for name, which in (a, b))
        theirs = estimate_difference(one - other)
        ours = row_differences(named, [(a, b)], metric)
        (own,) = ours.each.values()
        assert ours.mean == own and list(ours.each) == ["KD(C), from NLL after TS less Direct, NLL + TS"]
        assert (own.mean, own.each, own.n) == (theirs.mean, theirs.each, theirs.n) and len(theirs.each) == 2
        assert own.parts[1] == theirs.parts[1] and own.parts[0] != theirs.parts[0], "pooled over other rows"
    (truth,) = row_differences(named, [(a, b)], "kl").each.values()
    assert truth.each == pytest.approx(
        [results[r[a[0]]].raw.metrics["kl"].value - results[r[b[0]]].scaled.metrics["kl"].value
         for r in seeds[:2]]
    ) and truth.n == 1
    write_results(results.values(), tmp_path/"x.npz")
    kept = row_differences(collect_by_row(seeds, read_results(tmp_path/"x.npz")), [(a, b)], "ece").mean
    assert kept.mean == pytest.approx(row_differences(named, [(a, b)], "ece").mean.mean,
                                      abs=2e-3), "from a light file"


def test_two_rows_alone_are_the_paired_test(table):
    seeds, results = table
    one, other = ("KD(UC), from NLL", "raw"), ("Direct, NLL", "raw")
    named = {k: own for k, own in collect_by_row(seeds, results).items() if k in (one[0], other[0])}
    theirs = paired_difference(*([result_outcomes(r)["raw"] for r in named[k]] for k, _ in (one, other)),
                               "nll")
    ours = row_differences(named, [(one, other)], "nll").mean
    assert (ours.mean, ours.low, ours.p) == pytest.approx((theirs.mean, theirs.low, theirs.p))


def test_seeds_are_pooled_over_rows_of_the_same_network(table):
    seeds, results = table
    named = collect_by_row(seeds, results)
    pair = ("KD(UC), from NLL", "raw"), ("Direct, NLL", "raw")
    pooled = row_differences(named, [pair], "kl")
    full = [k for k, own in named.items() if all(own)] # one lacks its last seed
    y = np.array([[r.raw.metrics["kl"].value for r in named[k]] for k in full])
    rest = y - y.mean(1, keepdims=True) - y.mean(0) + y.mean()
    assert (pooled.homogeneity["raw"] == pytest.approx(bartlett(*(y - y.mean(0))).pvalue)
            and len(full) == len(named) - 1)
    assert pooled.homogeneity["raw"] > .05
    variance, df = pooled.mean.parts[0]
    assert variance == pytest.approx(2*(rest**2).sum()/df/3) and df == 2*(len(full) - 1)
    fewer = {k: [r and replace(r, spec=replace(r.spec, model="resnet14")) if k == "Direct, PS-KD" else r
                 for r in own]
             for k, own in named.items()}
    assert row_differences(fewer, [pair], "kl").mean.parts[0][1] == df - 2, "other networks are no part of it"


def test_the_mean_of_a_claim_is_that_of_its_pairs_over_shared_seeds(table):
    seeds, results = table
    named = collect_by_row(seeds, results)
    pairs = table_claims(seeds[0])["KD(C) beats direct calibration"]
    found = row_differences(named, pairs, "nll")
    assert (found.mean.each == pytest.approx(np.mean([d.each[:2] for d in found.each.values()], 0))
            and [len(d.each) for d in found.each.values()] == [3, 2])
    assert (row_differences({k: own[:1] for k, own in named.items()}, pairs, "nll").mean.n
            == 300), "one seed: over images"


def test_claims_pair_each_student_with_its_own_calibrator(table):
    seeds, results = table
    claims, named = table_claims(seeds[0]), collect_by_row(seeds, results)
    assert dict(claims["KD(C) beats direct calibration"]) == {("KD(C), from focal + MDCA", "raw"): (
        "Direct, focal + MDCA", "raw"
    ), ("KD(C), from NLL after TS", "raw"): ("Direct, NLL", "scaled")}
    assert ([a[0] for a, _ in claims["calibrating while training beats a temperature afterwards"]]
            == ["Direct, PS-KD", "Direct, focal + MDCA"])
    for claim, pairs in claims.items():
        assert len(row_differences(named, pairs, "ece").each) == len(pairs) > 0, claim
        assert (row_differences({}, pairs, "ece")
                == row_differences(named, pairs, "ece", min_seeds=4) == ({}, None, {}))
    rows = seeds[0]
    assert (direct_counterpart(rows["KD(C), from NLL after TS"]) == (rows["Direct, NLL"], "scaled")
            and direct_counterpart(rows["KD(UC), from NLL"]) == (rows["Direct, NLL"], "raw"))


def test_claims_are_read_from_descriptions_whatever_rows_are_called(table):
    rows, names = table[0][0], iter("abcdefghij")
    called = {name: next(names) for name in rows}
    def renamed(pairs): return [tuple((called[k], which) for k, which in pair) for pair in pairs]
    assert ({claim: renamed(pairs) for claim, pairs in table_claims(rows).items()}
            == table_claims({called[name]: s for name, s in rows.items()}))
    assert all(pairs == [] for pairs in table_claims({"a": rows["Direct, NLL"]}).values())


def test_a_comparison_refuses_in_a_sentence(table):
    seeds, results = table
    named = collect_by_row(seeds, results)
    a, b = ("Direct, NLL", "raw"), ("KD(UC), from NLL", "raw")
    other = {k: [replace(r, spec=replace(r.spec, data=TINY)) if k == "Direct, NLL" else r for r in own]
             for k, own in named.items()}
    plain = results[seeds[0]["Direct, NLL"]]
    unknown = replace(plain, raw=plain.raw._replace(metrics=plain.evaluation.raw))
    for call, message in (
        (lambda: _contributions_of_row(named, ("Direct, LS", "raw"), "nll"), "row: got .*Direct, LS"),
        (lambda: _contributions_of_row(named, ("Direct, NLL", "row"), "nll"), "row: got .*row"),
        (lambda: _contributions_of_row({"a": [unknown]}, ("a", "raw"), "kl"), "metric: got 'kl' of a"),
        (lambda: row_differences({k: own[:1] for k, own in named.items()}, [(a, b)], "kl"),
         "differences: got shape"),
        (lambda: row_differences(other, [(a, b)], "nll"), "results_by_name: got rows on 2 data sets"),
        (lambda: collect_by_row([], {}), "specs_by_seed: got none"),
        (lambda: paper_progress_table([], {}), "specs_by_seed: got none")
    ):
        with pytest.raises(ValueError, match=message): call()


@pytest.mark.parametrize("name", PAPER_EXPERIMENTS)
def test_candidates_are_students_of_one_seed_with_the_published_among_them(name):
    offered, setting = candidate_specs(name), SETTINGS[PAPER_EXPERIMENTS[name].setting]
    specs = [s for several in offered.values() for s in several]
    assert (len(set(specs)) == len(specs)
            and {(s.data, s.model, s.seed) for s in specs} == {(setting.data, setting.student, 0)})
    for method in set(offered) - {"KD"}:
        assert PUBLISHED_HYPERPARAMETERS.methods[method] in {s.method for s in offered[method]}, method
    plain = replace(specs[0], model=setting.teacher, method=Method("nll"))
    assert (Distil(TemperatureScaled(plain), PUBLISHED_HYPERPARAMETERS.T, PUBLISHED_HYPERPARAMETERS.alpha)
            in {s.method for s in offered["KD"]})
    assert ("MMCE" in offered) == (name in ("table1", "table1_mobilenet", "table2a", "table2b",
                                            "fig2", "fig3")), "only methods that the piece uses"


@given(st.data())
@settings(max_examples=20, deadline=None)
def test_the_lowest_validation_nll_chooses_whatever_the_test_images_say(table, data):
    any_result, offered = next(iter(table[1].values())), candidate_specs("table1", small="known")
    specs = [s for several in offered.values() for s in several]
    nlls = data.draw(st.lists(st.integers(1, 10**6), min_size=len(specs), max_size=len(specs), unique=True))
    by = dict(zip(specs, nlls))
    results = {s: replace(any_result, spec=s, valid={"nll": v, "top1": .5, "ece": .1}) for s, v in by.items()}
    best = select_by_validation_nll(offered, results)
    assert best == {m: min(several, key=by.get) for m, several in offered.items()}
    assert ([f"{by[s]:.3f}" for s in best.values()]
            == [nll.removesuffix(" *")
                for *_, nll, _, _ in candidates_table(offered, results).rows if nll.endswith("*")])
    choice = as_hyperparameters(best)
    assert ((choice.T, choice.alpha) == (best["KD"].method.T, best["KD"].method.alpha)
            and choice.methods["CRL"] == best["CRL"].method)
    assert ({m: choice.methods[m] for m in ("NLL", "AdaFocal", "PS-KD")}
            == {m: PUBLISHED_HYPERPARAMETERS.methods[m] for m in ("NLL", "AdaFocal", "PS-KD")})
    for name in ("table1", "fig4", "drift"):
        for s in paper_specs(name, small="known", choice=choice).values():
            if isinstance(s.method, Distil): assert (s.method.T, s.method.alpha) == (choice.T, choice.alpha)


def test_an_unfinished_or_older_choice_is_none(table):
    any_result, offered = next(iter(table[1].values())), candidate_specs("fig4", small="known")
    results = {s: replace(any_result, spec=s) for several in offered.values() for s in several}
    first = offered["MDCA"][0]
    short = {s: r for s, r in results.items() if s != first}
    for got in ({}, short, short | {first: replace(results[first], valid={})}):
        with pytest.raises(ValueError,
                           match="results: got none with a validation NLL of .*mdca beta=1 gamma=0"):
            select_by_validation_nll(offered, got)
    body = candidates_table(offered, short).rows
    assert body[0][2] == "to do" and {row[0] for row in body if row[2].endswith("*")} == {"KD"}


def test_validation_stands_in_the_light_part(table, tmp_path):
    result = next(iter(table[1].values()))
    z, labels = result.logits["valid"], load_data(result.spec.data).valid.labels
    assert result.valid == {"nll": nll(z, labels), "top1": top1(z, labels), "ece": ece(z, labels)}
    write_results([result], tmp_path/"x.npz", keep_outcomes=False)
    assert read_results(tmp_path/"x.npz")[result.spec].valid == pytest.approx(result.valid, rel=1e-5)


def test_the_command_tries_and_then_takes_what_was_chosen(tmp_path, capsys, monkeypatch):
    patch_name(monkeypatch, "METHOD_GRID", {"LS": [Method("ls", eps=.05), Method("ls", eps=.5)]})
    patch_name(monkeypatch, "_KD_GRID", [(1, .9), (2, .9)])
    args = ("table1", "--small", "digits", "--recipe", "smoke")
    assert (kdc_sweep(*args, "--chosen", tmp_path/"c.npz", store=tmp_path/"s") == 2
            and "chosen: got" in capsys.readouterr().err)
    assert kdc_sweep(*args, "--candidates", "--budget", "0s", "--results", tmp_path/"c.npz",
                     store=tmp_path/"s") == 75 and capsys.readouterr().out.count("to do") == 4
    assert kdc_sweep(*args, "--candidates", "--results", tmp_path/"c.npz", store=tmp_path/"s") == 0
    out, tried = capsys.readouterr().out, read_results(tmp_path/"c.npz")
    assert "4 of 4 runs done" in out and out.count("*") == 2 and len(tried) == 4
    kd, best = (min((r for r in tried.values() if isinstance(r.spec.method, kind)),
                    key=lambda r: r.valid["nll"]) for kind in (Distil, Method))
    assert kdc_sweep(*args, "--chosen", tmp_path/"c.npz", "--seeds", 1, "--plan", store=tmp_path/"s") == 0
    plan = capsys.readouterr().out
    assert (f"eps={best.spec.method.params['eps']:g}" in plan
            and f"T={kd.spec.method.T:g}" in plan and f"T={3 - kd.spec.method.T:g}" not in plan)
    assert (kdc_sweep(*args, "--candidates", "--seeds", 2, store=tmp_path/"s") == 2
            and "seeds: got 2, expected none with --candidates" in capsys.readouterr().err)
    assert (kdc_sweep(*args, "--candidates", "--chosen", tmp_path/"c.npz", store=tmp_path/"s") == 2
            and "chosen: got" in capsys.readouterr().err)


def kdc_sweep(*args, store): return main([*map(str, args), "--store", str(store), "--device", "cpu"])


def test_the_command_takes_a_tables_name(tmp_path, capsys):
    args = ("fig4", "--small", "digits", "--recipe", "smoke", "--seeds", 1)
    assert kdc_sweep(*args, "--plan", store=tmp_path/"s") == 0
    assert "14 runs to do" in capsys.readouterr().out and not (tmp_path/"s").exists()
    assert (kdc_sweep(*args, "--budget", "0s", store=tmp_path/"s") == 75
            and capsys.readouterr().out.count("to do") == 14)
    assert kdc_sweep(*args, "--results", tmp_path/"x.npz", store=tmp_path/"s") == 0
    out = capsys.readouterr().out
    assert "in miniature on digits" in out and out.count("1 of 1") == 14 and "14 of 14 runs done" in out
    assert set(read_results(tmp_path/"x.npz")) == set(paper_specs("fig4", "smoke", 0, "digits").values())


@pytest.mark.parametrize("args, message", [
    (["table7"], "what: got table7, expected a file that is there, or one of table1"),
    (["table1", "--seeds", "0"], "seeds: got 0, expected one or more"),
    (["table1", "--small", "mnist"], "small: got 'mnist', expected one of cifar10, digits, known"),
    (["table1", "--recipe", "slow"], "recipe: got 'slow'"),
    (["table1", "--budget", "soon"], "budget: got 'soon'")])
def test_the_command_refuses_in_a_sentence(tmp_path, capsys, args, message):
    assert kdc_sweep(*args, store=tmp_path/"s") == 2
    assert message in capsys.readouterr().err and not (tmp_path/"s").exists()


def test_a_file_says_its_own_recipe(tmp_path, capsys):
    write_specs([NET], tmp_path/"runs.json")
    assert kdc_sweep(tmp_path/"runs.json", "--recipe", "fast", store=tmp_path/"s") == 2
    assert "recipe: got fast, expected none with a file" in capsys.readouterr().err


def test_results_are_added_to_a_file_and_a_damaged_one_is_left(tmp_path, capsys):
    path = tmp_path/"x.npz"
    for spec, name in ((NET, "a"), (replace(NET, seed=1), "b")):
        write_specs([spec], tmp_path/f"{name}.json")
        assert kdc_sweep(tmp_path/f"{name}.json", "--results", path, store=tmp_path/name) == 0
    assert set(read_results(path)) == {NET, replace(NET, seed=1)}
    path.write_bytes(path.read_bytes()[:-200])
    before = path.read_bytes()
    assert kdc_sweep(tmp_path/"a.json", "--results", path, store=tmp_path/"a") == 2
    assert "x.npz: damaged" in capsys.readouterr().err and path.read_bytes() == before


def test_a_student_of_the_truth_has_a_place_in_the_order():
    "Nobody was trained before it"
    spec = RunSpec("known", "resnet8", Distil(TemperedPosterior()))
    assert order_by_priority({"truth": spec, "plain": replace(spec, method=Method("nll"))})[-1] == spec
