"Pictures: what they show is what went in, whether drawn once or moved; grids are paired as they should be."
import ast
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection
from scipy.stats import ttest_1samp

import kdc_nb
from kdc_nb.calibration.diagrams import (
    BLUE, GREY, ORANGE, ReliabilityDiagram, plot_differences, plot_reliability, plot_reliability_overlay,
)
from kdc_nb.calibration.differences import estimate_difference
from kdc_nb.calibration.estimates import Estimate
from kdc_nb.calibration.metrics import ece, register_metric, unregister_metric
from kdc_nb.calibration.outputs import to_probs
from kdc_nb.calibration.reliability import prepare_diagram, reliability_bins
from kdc_nb.training.data import DataSpec, load_data
from kdc_nb.training.methods import Method
from kdc_nb.training.recipes import Recipe
from kdc_nb.experiments.panels import plot_metric, plot_panels, plot_tradeoff, prepare_histories
from kdc_nb.experiments.runs import run
from kdc_nb.experiments.specs import Distil, RunSpec
from kdc_nb.experiments.store import Store
from kdc_nb.experiments.tables import metric_records, results_frame, results_table, seed_means
from kdc_nb.experiments.teachers import TemperatureScaled
from kdc_nb.experiments.transfer import direct_and_distilled_frame, plot_metric_by_temperature
from kdc_nb.analysis.agreement import (
    _ConfidenceShift, plot_class_matrix, plot_confidence_shift, prepare_agreement,
    prepare_class_similarity, prepare_confidence_shift,
)
from kdc_nb.analysis.diffusion import class_merging_frame
from kdc_nb.analysis.drift import drift_frame, evaluate_drift
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
    first, second = (reliability_bins(s*torch.randn(400, 5, generator=g), y, n_bins=n, n_draws=50)
                     for s, n in ((3, 15), (1, 6)))
    moved, new = (ReliabilityDiagram().show(first, "one").show(second, "two"),
                  ReliabilityDiagram().show(second, "two"))
    for picture in (moved, new): picture.ax.figure.canvas.draw()
    assert np.array_equal(*(np.asarray(p.ax.figure.canvas.buffer_rgba()) for p in (moved, new)))


def test_direct_and_distilled_are_paired(results):
    frame = direct_and_distilled_frame(results)
    assert list(dict.fromkeys(frame.row)) == ["nll", "ls eps=0.05", "nll after TS"]
    eces = frame[frame.metric == "ece"].groupby(["row", "training"]).value.apply(list)
    for name, method in (("nll", Method("nll")), ("ls eps=0.05", Method("ls"))):
        assert eces[name, "direct"] == [results[net(method, s)].raw.metrics["ece"].value for s in (0, 1)]
        assert eces[name, "distilled"] == [
            results[net(Distil(net(method, s, "resnet14")), s)].raw.metrics["ece"].value for s in (0, 1)
        ]
    assert (eces["nll after TS", "direct"]
            == [results[net("nll", s)].scaled.metrics["ece"].value for s in (0, 1)])
    with pytest.raises(ValueError, match="results: got no student beside"):
        direct_and_distilled_frame(results, T=4.)
    with pytest.raises(ValueError, match="results: got resnet.* expected one student network"):
        direct_and_distilled_frame(results | {net(Distil(net("nll")), 0, "resnet14"): results[net("nll")]})
    ax = plot_metric(frame, output="as used")
    means = [x for line in ax.lines if line.get_marker() == "|" for x in line.get_xdata()]
    assert means == pytest.approx([np.mean(eces[k, how]) for how in ("direct", "distilled")
                                   for k in ("nll", "ls eps=0.05", "nll after TS")])
    heights = [y for line in ax.lines if line.get_marker() == "|" for y in line.get_ydata()]
    assert len(set(heights)) == 6 and [t.get_text() for t in ax.get_legend().texts] == ["direct", "distilled"]


def test_a_metric_is_drawn_with_all_that_belongs_to_it(results):
    "Mean, seeds, interval and null band, in the unit of the metric"
    own = [results[net("nll", s)] for s in (0, 1)]
    ax, found = (plot_metric(results_frame({"a": own, "b": [results[net("ls")]]})),
                 [r.raw.metrics["ece"] for r in own])
    mean, seeds = ax.lines[0], ax.lines[1]
    assert mean.get_xdata()[0] == pytest.approx(np.mean([e.value for e in found]))
    assert list(seeds.get_xdata())[:2] == [e.value for e in found]
    band, interval = ax.patches[0], ax.collections[0].get_segments()[0]
    assert (band.get_x(), band.get_width() + band.get_x()) == pytest.approx(
        [np.mean([getattr(e, k) for e in found]) for k in ("null_low", "null_high")])
    over_seeds = ttest_1samp([e.debiased for e in found], 0).confidence_interval()
    assert interval[:, 0] == pytest.approx([max(0, over_seeds.low), min(1, over_seeds.high)])
    alone = results[net("ls")].raw.metrics["ece"]
    assert ax.collections[0].get_segments()[1][:, 0] == pytest.approx([alone.low, alone.high]), "of its run"
    assert ax.get_xlabel() == "ECE in % (N = 300, 1 to 2 seeds)" and ax.get_xlim()[0] == 0
    assert plot_metric(results_frame(own), "nll").get_xlabel() == "NLL in nats (N = 300, 2 seeds)"
    frame = results_frame({"a": own})
    again = plot_metric(frame.astype({"row": "category"})).lines[0]
    assert list(again.get_xdata()) == list(mean.get_xdata())[:1]


def test_the_trade_off_is_that_of_the_rows(results):
    frame = results_frame({"a": [results[net("nll", s)] for s in (0, 1)], "b": [results[net("ls")]]})
    ax = plot_tradeoff(frame, "sce")
    means = seed_means(frame[frame.output == "raw"]).set_index(["row", "metric"])
    sce, top1 = ([means.loc[k, m] for k in "ab"] for m in ("sce", "top1"))
    assert [p.get_width() for p in ax.patches] == pytest.approx([2*m["std"] for m in sce])
    assert [p.get_center() for p in ax.patches] == [pytest.approx((a["value"], b["value"]))
                                                    for a, b in zip(sce, top1)]


def test_a_table_has_the_columns_that_its_rows_speak_of(results):
    direct, student = ([results[s] for s in own] for own in ([net("nll", 0), net("nll", 1)],
                                                             [net(Distil(net("nll", model="resnet14")))]))
    head, (a, b) = results_table({"direct": direct, "KD": student})
    row = dict(zip(head, a))
    mean = np.mean([r.scaled.metrics["kl"].value for r in direct])
    scaled = seed_means(results_frame({"a": direct})).set_index(["output", "metric"]).loc["scaled", "kl"]
    assert (scaled["value"] == pytest.approx(mean)
            and (row["T"], dict(zip(head, b))["T"]) == ("", "1"))
    seen = np.array([r.evaluation.raw["ece"].value for r in direct])
    ends = ttest_1samp([r.evaluation.raw["ece"].debiased for r in direct], 0).confidence_interval()
    low, high = max(0, ends.low), min(1, ends.high)
    assert (row["ECE, %"] == f"{100*seen.mean():.2f} ±{100*seen.std(ddof=1):.2f}"
            + "†"*(not low <= seen.mean() <= high))
    assert row["95% interval"] == f"{100*low:.2f} to {100*high:.2f}"
    own = student[0].evaluation.raw["ece"]
    assert dict(zip(head, b))["95% interval"] == f"{100*own.low:.2f} to {100*own.high:.2f}"
    def forget(output): # the truth
        return output._replace(metrics={k: e for k, e in output.metrics.items() if k not in ("error", "kl")})
    unknown = [replace(r, raw=forget(r.raw), scaled=forget(r.scaled)) for r in direct]
    assert (set(head) - set(results_table({"direct": unknown}).head)
            == {"T", "alpha", "true error, %", "KL to truth, nats"})


def test_rows_refuse_what_is_not_there(results):
    frame = results_frame({"a": [results[net("nll")]]})
    one, other = results[net("nll")], results[net("ls")]
    for call, message in (
        (lambda: results_frame({"a": []}), "results: got none"),
        (lambda: results_frame({"a": [None]}), "results: got none"),
        (lambda: results_frame(one), "results: got a single one, expected a list"),
                          (lambda: results_frame({"a": one}), "results: got a single one, expected a list"),
        (lambda: results_frame({"a": [one, other]}), "results: got runs in row 'a' that differ"),
        (lambda: results_frame({"a": [one, one]}), r"results: got seeds \[0, 0\] in row 'a'"),
        (lambda: results_frame([one], ["own"]), "metrics: got 'own'"),
        (lambda: results_frame([replace(one, logits={})], ["spherical"]), "without its logits"),
        (lambda: seed_means(frame, ("row", "metric")), "by: got .* expected output among them"),
        (lambda: results_frame([]), "results: got none"),
        (lambda: plot_metric(frame, output="Raw"), "output: got 'Raw'"),
        (lambda: plot_metric(frame, "foo"), "metric: got 'foo'"),
        (lambda: plot_metric(frame[:0]), "frame: got no lines"),
        (lambda: plot_metric(frame, hue="foo"), "hue: got 'foo'"),
        (lambda: plot_metric(frame, x="T"), "frame: got no raw ece with T and training"),
        (lambda: plot_panels(frame, (), "row", "training"), "metrics: got none"),
        (lambda: plot_tradeoff(frame[:0]), "frame: got no lines"),
        (lambda: plot_tradeoff(frame, "foo"), "metric: got 'foo'")
    ):
        with pytest.raises(ValueError, match=message): call()


def test_seeds_are_averaged_and_an_infinite_nll_stays_one(results):
    own = [results[net("nll", s)] for s in (0, 1)]
    means = seed_means(results_frame(own)).set_index(["output", "metric"])
    for output, metric in (("raw", "ece"), ("scaled", "nll")):
        values = [getattr(r, output).metrics[metric].value for r in own]
        assert means.loc[output, metric]["value"] == pytest.approx(np.mean(values))
        assert means.loc[output, metric]["std"] == pytest.approx(np.std(values, ddof=1))
        if metric != "ece": assert (means.loc[output, metric][["low", "high"]].tolist()
                                    == pytest.approx(ttest_1samp(values, 0).confidence_interval()))
    assert set(means.seeds) == {2} and set(seed_means(results_frame(own[:1]))["std"]) == {0}
    lines = metric_records({}, {"nll": Estimate(null_low=1., null_high=2.), "top1": Estimate()}, 9)
    assert [line["value"] for line in lines] == [np.inf, -np.inf] and np.isnan(lines[0]["low"])


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
    axs = plot_penultimate(dict(zip("ab", looks.values())), (0, 4, 1), columns=2)
    assert (axs[0].get_xlim() == axs[1].get_xlim()
            and [ax.get_title() for ax in axs] == ["a", "b"])
    stars = np.concatenate([line.get_xydata() for line in axs[0].lines if line.get_marker() == "*"])
    np.testing.assert_allclose(stars, [xy.mean(0) for xy in both[0]], rtol=1e-6)
    with pytest.raises(ValueError, match="views: got none"): plot_penultimate({}, (0, 4, 1))


def test_limits_hold_everything():
    low, high, bottom, top = _axis_limits([np.array([[0., 5], [1, 7]]), np.array([[3., 6]])])
    assert low < 0 and high > 3 and bottom < 5 and top > 7


def test_merging_is_drawn_as_measured(looks, results):
    "A line for each teacher, through the mean over seeds of what was measured, and its intervals"
    (teacher, t), (student, l) = looks.items()
    scaled = replace(student, method=Distil(TemperatureScaled(teacher)))
    frame = class_merging_frame({teacher: t, student: l, scaled: l})
    assert (list(dict.fromkeys(zip(frame.teacher, frame["T"], frame.seed)))
            == [("nll", 1., 0), ("nll after TS", 1., 0)])
    axs = plot_panels(frame, ("ratio", "ece"), "T", "teacher")
    for ax, e in zip(axs, (l.merging["ratio"], l.result.raw.metrics["ece"])):
        lines = [line for line in ax.lines if line.get_marker() == "o"]
        assert [line.get_ydata().tolist() for line in lines] == [[e.value]]*2
        bars = [c for c in ax.collections if isinstance(c, LineCollection)]
        assert [c.get_segments()[0][:, 1].tolist() for c in bars] == [[e.low, e.high]]*2
    assert [text.get_text() for text in axs[0].figure.legends[0].texts] == ["nll", "nll after TS"]
    with pytest.raises(ValueError, match="metric: got 'mean'"): plot_panels(frame, ("mean",), "T", "teacher")


def test_merging_needs_groups_and_one_kind_of_student(looks):
    teacher, student = looks
    with pytest.raises(ValueError, match="views: got no students"):
        class_merging_frame({teacher: looks[teacher]})
    with pytest.raises(ValueError, match="views: got a data set without super-classes"):
        class_merging_frame({student: replace(looks[student], merging=None)})


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
    frame = results_frame(runs.values())
    for metric in ("ece", "nll"):
        (ax,) = plot_metric_by_temperature(frame, metric)
        lines = {line.get_label(): line for line in ax.lines if line.get_marker() == "o"}
        assert list(lines) == ["alpha = 0.5", "alpha = 1"] and ax.get_xscale() == "log"
        for a, line in zip((.5, 1.), lines.values()):
            assert list(line.get_xdata()) == pytest.approx([1, 4], rel=.03)
            assert line.get_ydata() == pytest.approx(
                [np.mean([runs[net(Distil(t, T, a), t.seed)].raw.metrics[metric].value for t in teachers])
                 for T in (1, 4)])


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
    frame = drift_frame({"direct": own})
    ax = plot_metric(frame, "nll", "severity", "row", "scaled")
    by_hand = [np.mean([np.mean([d.rows[f"{k}/{s}"]["scaled"]["nll"] for k in ("contrast", "fog")])
                        for d in own]) for s in range(1, 6)]
    assert ax.lines[0].get_ydata()[1:] == pytest.approx(by_hand) and ax.lines[0].get_label() == "direct"
    assert list(ax.lines[0].get_xdata()) == [0, 1, 2, 3, 4, 5]
    clean = frame.query("severity == 0 and metric == 'ece' and output == 'raw'")
    assert clean.null_high.tolist() == [d.rows["clean"]["raw"]["null_high"] for d in own]
    with pytest.raises(ValueError, match="drifts: got none"): drift_frame({})
    with pytest.raises(ValueError, match="metric: got 'sce'"): plot_metric(frame, "sce", "severity", "row")


def test_a_metric_of_ones_own_is_in_frames_tables_and_figures(results):
    register_metric("squared_top1", label="own", unit="%", higher_is_better=True, limits=(0, 1),
                    per_sample=lambda x, y, from_logits:
                                   to_probs(x, from_logits).gather(1, y[:, None])[:, 0]**2)
    try:
        own = [results[net("nll", s)] for s in (0, 1)]
        frame = results_frame({"a": own}, ["squared_top1"])
        labels = load_data(DATA).test.labels
        def by_hand(r, T):
            return float((r.logits["test"].double()/T).softmax(1)[range(300), labels].square().mean())
        seen = frame[frame.metric == "squared_top1"].set_index(["seed", "output"]).value
        for seed, r in enumerate(own):
            assert seen[seed, "raw"] == pytest.approx(by_hand(r, 1.))
            assert seen[seed, "scaled"] == pytest.approx(by_hand(r, r.evaluation.T))
        assert plot_metric(frame, "squared_top1").get_xlabel() == "own in % (N = 300, 2 seeds)"
        head, ((*_, last),) = results_table({"a": own}, metrics=["squared_top1"])
        values = [by_hand(r, 1.) for r in own]
        assert head[-1] == "own, %" and last == f"{100*np.mean(values):.2f} ±{100*np.std(values, ddof=1):.2f}"
        with pytest.raises(ValueError, match="metrics: got 'squared_top1', which was not evaluated"):
            own[0].evaluation.table(["squared_top1"])
    finally: unregister_metric("squared_top1")


def test_every_plot_returns_axes_and_no_figure():
    "A figure that is returned is shown twice by a notebook: once as the cell's, once as its value"
    functions = [node for path in Path(kdc_nb.__file__).parent.rglob("*.py")
                 for node in ast.parse(path.read_text()).body
                 if isinstance(node, ast.FunctionDef) and node.name.startswith("plot_")]
    assert len(functions) >= 15
    assert {ast.unparse(node.returns) for node in functions} <= {"Axes", "np.ndarray", "Sequence[Axes]"}
