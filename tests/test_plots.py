"Pictures: what they show is what went in, whether drawn once or moved; grids are paired as they should be."
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from kdc_nb.calibration.diagrams import (
    BLUE, GREY, ORANGE, ReliabilityDiagram, plot_differences, plot_reliability, plot_reliability_overlay,
)
from kdc_nb.calibration.differences import estimate_difference
from kdc_nb.calibration.metrics import ece
from kdc_nb.calibration.reliability import prepare_diagram, reliability_bins
from kdc_nb.training.data import DataSpec, load_data
from kdc_nb.training.methods import Method
from kdc_nb.training.recipes import Recipe
from kdc_nb.experiments.panels import plot_tradeoff, prepare_histories
from kdc_nb.experiments.runs import run
from kdc_nb.experiments.specs import Distil, RunSpec
from kdc_nb.experiments.store import Store
from kdc_nb.experiments.tables import results_table, summarise_seeds
from kdc_nb.experiments.teachers import TemperatureScaled
from kdc_nb.experiments.transfer import (
    plot_direct_and_distilled, plot_temperature_grid, prepare_direct_and_distilled,
    prepare_temperature_grid,
)
from kdc_nb.analysis.agreement import (
    _ConfidenceShift, plot_class_matrix, plot_confidence_shift, prepare_agreement,
    prepare_class_similarity, prepare_confidence_shift,
)
from kdc_nb.analysis.diffusion import plot_merging, prepare_merging
from kdc_nb.analysis.drift import evaluate_drift, plot_drift
from kdc_nb.analysis.projections import _axis_limits, _prepare_penultimate, compute_umap, plot_penultimate
from kdc_nb.analysis.views import extract_features

DATA, RECIPE = DataSpec("known", n_train=100, n_valid=60, n_test=300), Recipe(1, 32)


def net(method, seed=0, model="resnet8"): return RunSpec(DATA, model, method, RECIPE, seed)


@pytest.fixture(scope="module")
def store(tmp_path_factory): return Store(tmp_path_factory.mktemp("plots"))


@pytest.fixture(scope="module")
def results(store):
    "Two calibrators, direct and as teachers, and temperature scaling; two seeds"
    specs = []
    for seed in (0, 1):
        teachers = [net(m, seed, "resnet14") for m in (Method("nll"), Method("ls"))]
        specs += (teachers + [net(t.method, seed) for t in teachers]
                  + [net(Distil(t), seed) for t in (*teachers, TemperatureScaled(teachers[0]))])
    return {s: run(s, store, "cpu", progress=False) for s in specs}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_a_moved_diagram_shows_what_a_new_one_shows():
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 5, (400,), generator=g)
    first, second = (reliability_bins(s*torch.randn(400, 5, generator=g), y, n_bins=n, n_boot=50)
                     for s, n in ((3, 15), (1, 6)))
    moved, new = (ReliabilityDiagram().show(first, "one").show(second, "two"),
                  ReliabilityDiagram().show(second, "two"))
    for picture in (moved, new): picture.ax.figure.canvas.draw()
    assert np.array_equal(*(np.asarray(p.ax.figure.canvas.buffer_rgba()) for p in (moved, new)))


def test_direct_and_distilled_are_paired(results):
    pairs = prepare_direct_and_distilled(results)
    assert list(pairs) == ["nll", "ls eps=0.05", "nll after TS"]
    for name, method in (("nll", Method("nll")), ("ls eps=0.05", Method("ls"))):
        direct, kd = pairs[name]
        assert direct.each["ece"] == [results[net(method, s)].evaluation.raw["ece"].value for s in (0, 1)]
        assert kd.each["ece"] == [
            results[net(Distil(net(method, s, "resnet14")), s)].evaluation.raw["ece"].value for s in (0, 1)
        ]
    assert (pairs["nll after TS"][0].each["ece"]
            == [results[net("nll", s)].evaluation.scaled["ece"].value for s in (0, 1)])
    assert prepare_direct_and_distilled(results, T=4.) == {}
    with pytest.raises(ValueError, match="pairs: got none"): plot_direct_and_distilled({})
    with pytest.raises(ValueError, match="results: got resnet.* expected one student network"):
        prepare_direct_and_distilled(results | {net(Distil(net("nll")), 0, "resnet14"): results[net("nll")]})
    bars = plot_direct_and_distilled(pairs).patches
    assert ([round(b.get_height(), 9) for b in bars]
            == [round(100*r[k].mean["ece"], 9) for k in (0, 1) for r in pairs.values()])


def test_the_trade_off_is_that_of_the_rows(results):
    rows = summarise_seeds({"a": [results[net("nll", s)] for s in (0, 1)], "b": [results[net("ls")]]})
    ax = plot_tradeoff(rows, "sce")
    assert [p.get_width() for p in ax.patches] == pytest.approx([200*r.spread["sce"] for r in rows])
    assert ([p.get_center() for p in ax.patches]
            == [pytest.approx((100*r.mean["sce"], 100*r.mean["top1"])) for r in rows])


def test_a_table_has_the_columns_that_its_rows_speak_of(results):
    direct, student = ([results[s] for s in own] for own in ([net("nll", 0), net("nll", 1)],
                                                             [net(Distil(net("nll", model="resnet14")))]))
    head, (a, b) = results_table({"direct": direct, "KD": student})
    row = dict(zip(head, a))
    mean = np.mean([r.scaled.metrics["kl"].value for r in direct])
    assert (summarise_seeds({"a": direct}, "scaled")[0].mean["kl"] == pytest.approx(mean)
            and (row["T"], dict(zip(head, b))["T"]) == ("", "1"))
    seen = np.array([r.evaluation.raw["ece"].value for r in direct])
    ends = [np.mean([getattr(r.evaluation.raw["ece"], k) for r in direct]) for k in ("low", "high")]
    assert (row["ECE, %"] == f"{100*seen.mean():.2f} ±{100*seen.std(ddof=1):.2f}"
            + "†"*(not ends[0] <= seen.mean() <= ends[1]))
    def without_truth(s):
        return s._replace(metrics={k: e for k, e in s.metrics.items() if k not in ("error", "kl")})
    unknown = [replace(r, raw=without_truth(r.raw), scaled=without_truth(r.scaled)) for r in direct]
    assert (set(head) - set(results_table({"direct": unknown}).head)
            == {"T", "alpha", "true error, %", "KL to truth, nats"})


def test_rows_refuse_what_is_not_there(results):
    rows = summarise_seeds({"a": [results[net("nll")]]})
    for call, message in ((lambda: summarise_seeds({"a": []}), "named: got no results"),
                          (lambda: summarise_seeds({"a": [results[net("nll")]]}, "Raw"), "which: got 'Raw'"),
                          (lambda: plot_tradeoff([]), "rows: got none"),
                          (lambda: plot_tradeoff(rows, "foo"), "metric: got 'foo'")):
        with pytest.raises(ValueError, match=message): call()


def test_overlays_are_few(results):
    b = reliability_bins(results[net("nll")].logits["test"], torch.arange(300) % 20)
    assert len(plot_reliability_overlay({"one": b, "two": b}).get_legend().get_texts()) == 2
    with pytest.raises(ValueError, match="outputs_by_name: got 0 models"): plot_reliability_overlay({})
    with pytest.raises(ValueError, match="labels: got none, expected one for each row"):
        plot_reliability_overlay({"one": torch.zeros(3, 2)})
    with pytest.raises(ValueError, match="outputs_by_name: got 8 models, expected 1 to 7"):
        plot_reliability_overlay({str(k): b for k in range(8)})


def test_outputs_of_any_kind_become_one_diagram(results):
    "Logits, probabilities, lists and a stored result agree; N, ECE, interval and null band are in the title"
    z, y = results[net("nll")].logits["test"], load_data(DATA).test.labels
    e = results[net("nll")].evaluation.raw["ece"]
    titles = {plot_reliability(*a).get_title()
              for a in ((z, y), (z.numpy(), y.tolist()), (z.tolist(), y),
                        (z.double().softmax(1), y, False), (results[net("nll")],))}
    assert titles == {f"Reliability (N = 300)\nECE {100*e.value:.1f}% [{100*e.low:.1f}, {100*e.high:.1f}], "
                      f"null {100*e.null_low:.1f} to {100*e.null_high:.1f}"}
    bins = prepare_diagram(z, y).bins
    assert plot_reliability(bins, title="a").get_title() == f"a (N = 300)\nECE {100*e.value:.1f}%"
    assert plot_reliability(results[net("nll")]).texts[0].get_text() == f"{100*bins.count.max()/300:.0f}"


def test_an_overlay_names_each_ece_and_shares_one_axis():
    "Two models of four samples: the one has all in one bin, the other half of them"
    z = torch.tensor([[2., 0], [2, 0], [2, 0], [2, 0]])
    models = {"teacher": z, "student": z*torch.tensor([[1.], [1], [.1], [.1]])}
    ax = plot_reliability_overlay(models, [0, 0, 1, 0])
    assert ax.get_title() == "Reliability (N = 4)"
    for text, name in zip(ax.get_legend().get_texts(), models):
        assert text.get_text().startswith(f"{name}: ECE {100*ece(models[name], [0, 0, 1, 0]):.1f}% [")
    heights = [p.get_data().values.max() for p in ax.patches]
    assert heights == [.25, .125] and ax.texts[0].get_text() == "100"


def test_histories_are_a_table(results):
    table = prepare_histories({"nll": [results[net("nll", s)] for s in (0, 1)]})
    assert (table.seed.tolist() == [0, 1]
            and table.loss.tolist() == [results[net("nll", s)].history[0]["loss"] for s in (0, 1)])


def test_matrices_by_hand():
    z = torch.tensor([[.8, .2], [.6, .4], [.1, .9]]).log()
    np.testing.assert_allclose(prepare_class_similarity(z, [0, 0, 1]), [[.7, .3], [.1, .9]], atol=1e-7)
    np.testing.assert_allclose(prepare_agreement(torch.tensor([0, 0, 0, 2]), torch.tensor([0, 1, 1, 2]), 3),
                               [[1/3, 2/3, 0], [0, 0, 0], [0, 0, 1]])
    shown = plot_class_matrix(np.array([[.7, .3], [.1, .9]]), "ab").collections[0].get_array()
    assert shown.mask.tolist() == [[True, False], [False, True]] and shown[0, 1] == pytest.approx(30)


def test_the_shift_is_paired():
    s = _ConfidenceShift(np.array([.5, .6, .9, .4]), np.array([.6, .8, .9, .1]),
                         np.array([True, True, True, False]))
    mean, half = s.mean(True)
    assert mean == pytest.approx(.1) and half == pytest.approx(1.96*.1/3**.5)
    titles = [ax.get_title() for ax in plot_confidence_shift(_ConfidenceShift(*(np.tile(v, 2) for v in s)))]
    assert "change +10.0" in titles[0] and "(N = 6)" in titles[0] and "change -30.0" in titles[1]
    with pytest.raises(ValueError, match="shift: got 1 images on one side"): plot_confidence_shift(s)


@pytest.fixture(scope="module")
def looks(store, results):
    teacher = net("nll", 0, "resnet14")
    return {s: extract_features(s, store, "cpu", per_class=4) for s in (teacher, net(Distil(teacher)))}


def test_clusters_share_the_axes_of_the_first(looks):
    teacher, student = looks.values()
    both, alone = (_prepare_penultimate([teacher, student], (0, 4, 1)),
                   _prepare_penultimate([student], (0, 4, 1)))
    assert ([len(xy) for own in both for xy in own]
            == [len(student.feature_labels["test"][student.feature_labels["test"] == c])
                for _ in range(2) for c in (0, 4, 1)])
    np.testing.assert_allclose(_prepare_penultimate([teacher], (0, 4, 1))[0][0], both[0][0])
    assert not np.allclose(alone[0][0], both[1][0])
    fig = plot_penultimate(dict(zip("ab", looks.values())), (0, 4, 1), columns=2)
    assert (fig.axes[0].get_xlim() == fig.axes[1].get_xlim()
            and [ax.get_title() for ax in fig.axes] == ["a", "b"])
    stars = np.concatenate([line.get_xydata() for line in fig.axes[0].lines if line.get_marker() == "*"])
    np.testing.assert_allclose(stars, [xy.mean(0) for xy in both[0]], rtol=1e-6)
    with pytest.raises(ValueError, match="views: got none"): plot_penultimate({}, (0, 4, 1))


def test_limits_hold_everything():
    low, high, bottom, top = _axis_limits([np.array([[0., 5], [1, 7]]), np.array([[3., 6]])])
    assert low < 0 and high > 3 and bottom < 5 and top > 7


def test_merging_is_drawn_as_measured(looks, results):
    "A line for each teacher and seed, through what was measured, and its intervals"
    (teacher, t), (student, l) = looks.items()
    scaled = replace(student, method=Distil(TemperatureScaled(teacher)))
    rows = prepare_merging({teacher: t, student: l, scaled: l})
    assert [(r.teacher, r.method.T, r.seed) for r in rows] == [("nll", 1., 0), ("nll after TS", 1., 0)]
    fig = plot_merging([*rows, rows[0]._replace(seed=1)], .9, ("ratio", "ece"))
    for ax, key in zip(fig.axes, ("ratio", "ece")):
        assert [line.get_ydata().tolist() for line in ax.lines] == [[rows[0].values[key].value]]*3
        assert (ax.collections[0].get_segments()[0][:, 1].tolist()
                == [rows[0].values[key].low, rows[0].values[key].high])
    with pytest.raises(ValueError, match="alpha: got 0.5, expected one of 0.9"): plot_merging(rows, .5)
    with pytest.raises(ValueError, match="measures: got 'mean'"): plot_merging(rows, .9, ("ratio", "mean"))


def test_merging_needs_groups_and_one_kind_of_student(looks):
    teacher, student = looks
    with pytest.raises(ValueError, match="views: got no students"): prepare_merging({teacher: looks[teacher]})
    with pytest.raises(ValueError, match="views: got a data set without super-classes"):
        prepare_merging({student: replace(looks[student], merging=None)})


def test_confidence_shift_of_looks(looks):
    teacher, student = looks.values()
    s = prepare_confidence_shift(teacher, student)
    assert (len(s.right) == 300
            and s.right.mean() == pytest.approx(student.result.evaluation.raw["top1"].value))


def test_umap_keeps_two_heaps_apart():
    heaps = (torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
             + 20*(torch.arange(40) % 2)[:, None])
    xy = compute_umap(heaps)
    middle = [xy[k::2].mean(0) for k in (0, 1)]
    nearer = [np.linalg.norm(xy - m, axis=1) for m in middle]
    assert ((nearer[1] < nearer[0]) == (np.arange(40) % 2 == 1)).all()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        compute_umap(heaps)
        assert torch.get_num_threads() == 3, (
            "numba sets torch's threads too, and with them the last digits and the speed of all that follows"
        )
    finally: torch.set_num_threads(threads)
    with pytest.raises(ValueError, match="features: got 10 points, expected more than the 15 neighbours"):
        compute_umap(torch.randn(10, 4))


def test_a_grid_has_a_line_for_each_weight_in_the_order_of_t(store):
    teachers = [net(Method("nll"), s, "resnet14") for s in (0, 1)]
    specs = [net(Distil(t, T, a), t.seed) for t in teachers for T in (4, 1) for a in (1., .5)]
    runs = {s: run(s, store, "cpu", progress=False) for s in [*teachers, *specs]}
    grid = prepare_temperature_grid(runs)
    assert {k: {a: [r.spec.method.T for r in line] for a, line in lines.items()}
            for k, lines in grid.items()} == {"nll": {.5: [1, 4], 1.: [1, 4]}}
    assert (grid["nll"][.5][1].each["ece"]
            == [runs[net(Distil(t, 4, .5), t.seed)].evaluation.raw["ece"].value for t in teachers])
    for metric, scale in (("ece", 100), ("nll", 1)):
        (ax,) = plot_temperature_grid(grid, metric)
        assert ax.lines[0].get_ydata() == pytest.approx([scale*r.mean[metric] for r in grid["nll"][.5]])


def test_differences_are_drawn_with_their_intervals_and_coloured_by_holm():
    one = estimate_difference(np.array([[-.02], [-.03], [-.025]]))
    shown = {"better": one._replace(p=.001), "worse": one._replace(mean=.02, p=.001),
             "not after Holm": one._replace(p=.04), "none": one._replace(p=.9)}
    lines = plot_differences(shown, "x").lines
    assert [l.get_color() for l in lines[:-1:3]] == [BLUE, ORANGE, GREY, GREY]
    assert (lines[0].get_xdata() == pytest.approx([100*one.low, 100*one.high])
            and lines[1].get_xdata() == pytest.approx([-2, -3, -2.5]))
    with pytest.raises(ValueError, match="differences: got none"): plot_differences({}, "x")


def test_drift_is_drawn_as_means_over_corruptions_and_seeds(results, store):
    own = [evaluate_drift(net("nll", s), store, ("contrast", "fog"), device="cpu") for s in (0, 1)]
    ax = plot_drift({"direct": own}, "nll", "scaled")
    by_hand = [np.mean([np.mean([d.rows[f"{k}/{s}"]["scaled"]["nll"] for k in ("contrast", "fog")])
                        for d in own]) for s in range(1, 6)]
    assert ax.lines[0].get_ydata()[1:] == pytest.approx(by_hand) and ax.lines[0].get_label() == "direct"
    for call, message in ((lambda: plot_drift({}), "drifts: got none"),
                          (lambda: plot_drift({"a": own}, "sce"), "metric: got 'sce'"),
                          (lambda: plot_drift({"a": own}, "ece", "x"), "output: got 'x'")):
        with pytest.raises(ValueError, match=message): call()
