"Does a student keep its teacher's calibration: the numbers, the words, the file, the command"
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdc_nb.calibration.compare_students import compare_students
from kdc_nb.calibration.comparisons import compare
from kdc_nb.calibration.differences import estimate_difference
from kdc_nb.calibration.estimates import Estimate
from kdc_nb.calibration.evaluation import evaluate
from kdc_nb.calibration.null_bands import simulate_calibrated
from kdc_nb.calibration.students import (
    compare_groups, compare_images, fraction_passed, judge_calibration_kept,
)
from kdc_nb.reports import main, write_report
from kdc_nb.student_explorer import explore_students


def drawn(n=1500, classes=6, seed=0):
    "A teacher 1.6 times too sure, a student alike, one that is calm, and labels"
    rng = np.random.default_rng(seed)
    truth = 2*rng.normal(size=(n, classes))
    labels = (truth + rng.gumbel(size=truth.shape)).argmax(1)
    seen = truth + .4*rng.normal(size=truth.shape)
    return 1.6*truth, {"KD": 1.4*seen, "calm": .8*seen}, labels


@pytest.fixture(scope="module")
def models(): return drawn()


@pytest.fixture(scope="module")
def report(models):
    teacher, students, y = models
    parts = [(teacher[k], {name: z[k] for name, z in students.items()}, y[k])
             for k in (slice(1000), slice(1000, None))]
    return compare_students(*parts[0], *parts[1], direct="calm")


# -- numbers ------------------------------------------------------------------

def test_metrics_are_those_of_evaluate_and_compare(models, report):
    teacher, students, y = models
    alone = evaluate(students["KD"][:1000], y[:1000], students["KD"][1000:], y[1000:],
                     metrics=("top1", "nll", "ece", "smece"))
    assert report.evaluations["KD"] == [alone]
    assert report.metrics["KD"] == {"raw": alone.raw, "scaled": alone.scaled}
    c = compare(students["KD"][:1000], teacher[:1000], y[:1000], students["KD"][1000:], teacher[1000:],
                y[1000:], metrics=("top1", "nll", "ece", "smece"))
    own = report.students["KD"]
    assert (own.comparison.raw, own.comparison.scaled) == (c.raw, c.scaled)
    assert own.verdicts["scaled"].difference == c.scaled["ece"].difference
    assert report.beside_direct.keys() == {"KD"} and report.beside_direct["KD"].names == ("KD", "calm")


def test_images_by_a_second_way(models, report):
    teacher, students, y = (x[:1000] if not isinstance(x, dict) else x["KD"][:1000] for x in models)
    p, q = (np.exp(z - z.max(1, keepdims=True)) for z in (teacher, students))
    p, q = p/p.sum(1, keepdims=True), q/q.sum(1, keepdims=True)
    own = report.students["KD"]
    wrong = q.argmax(1) != y
    assert own.kl.value == pytest.approx((p*np.log(p/q)).sum(1).mean())
    assert own.agreement.value == (p.argmax(1) == q.argmax(1)).mean()
    assert own.bold_errors.value == (wrong & (q.max(1) > p.max(1))).mean()
    assert own.gap.value == pytest.approx((q.max(1) - ~wrong).mean())
    assert own.share.value == pytest.approx(own.gap.value/report.teacher_gap.value)
    listed = report.bold_errors("KD")
    assert {*listed.index} == {*np.flatnonzero(wrong & (q.max(1) > p.max(1)))}
    assert listed.student_confidence.is_monotonic_decreasing


def test_groups_by_hand():
    t, s = (torch.tensor(p).double().log() for p in ([[.8, .2], [.3, .7], [.4, .6]],
                                                     [[.6, .4], [.9, .1], [.5, .5]]))
    frame = compare_groups(t, s, torch.tensor([0, 1, 1]), torch.tensor([3, 0, 3])) # none in groups 1 and 2
    assert frame.index.tolist() == [0, 3] and frame.n.tolist() == [1, 2]
    assert frame.teacher_gap.tolist() == pytest.approx([.7 - 1, (.8 + .6)/2 - 1])
    assert frame.student_gap.tolist() == pytest.approx([.9 - 0, (.6 + .5)/2 - .5]) # of a tie the first
    assert frame.agreement.tolist() == [0, .5]


def test_parts_add_up_to_the_whole(report):
    for frame in (report.by_confidence("KD", 7), report.by_class("KD")):
        assert frame.n.sum() == 1000
        for column, whole in (("teacher_gap", report.teacher_gap.value),
                              ("kl", report.students["KD"].kl.value),
                              ("student_accuracy", report.metrics["KD"]["raw"]["top1"].value)):
            assert (frame.n*frame[column]).sum()/1000 == pytest.approx(whole)
    assert report.by_confidence("KD").teacher_confidence.is_monotonic_increasing


# -- the share of the gap -----------------------------------------------------

@settings(max_examples=50, deadline=None)
@given(st.floats(-3, 3), st.integers(0, 2**16))
def test_a_share_does_not_depend_on_the_unit_and_turns_over(share, seed):
    rng = np.random.default_rng(seed)
    t = rng.normal(.5, 1, (1, 60))
    s = share*t + rng.normal(0, .1, t.shape)
    e, scaled = fraction_passed(t, s), fraction_passed(10*t, 10*s)
    assert scaled.value == pytest.approx(e.value)
    if e.low is None: return
    assert e.low <= e.value <= e.high and scaled.low == pytest.approx(e.low, abs=1e-9)
    for end in (e.low, e.high): # where 0 is just held
        d = estimate_difference(s - end*t)
        assert min(abs(d.low), abs(d.high)) < 1e-7*max(1, abs(d.mean))


@pytest.mark.parametrize("runs", [1, 4])
def test_shares_are_held_95_times_in_100(runs):
    def holds(seed):
        rng = np.random.default_rng(seed)
        t = .12 + rng.normal(0, .03, (runs, 1))*(runs > 1) + rng.normal(0, .4, (1, 300))
        s = .6*t + rng.normal(0, .01, (runs, 1))*(runs > 1) + rng.normal(0, .3, (runs, 300))
        e = fraction_passed(t, s)
        return e.low is None or e.low <= .6 <= e.high
    assert sum(map(holds, range(600))) >= 555 # 570 expected, less three standard deviations


def test_no_gap_no_share():
    x = np.zeros((1, 10))
    assert fraction_passed(x, x) == Estimate(None)
    noise = np.random.default_rng(0).normal(0, 1, (1, 100))
    assert fraction_passed(noise, noise + .1).low is None


# -- verdicts -----------------------------------------------------------------

def test_a_calibrated_pair_is_seldom_lost_and_a_spoilt_one_is():
    def word(k, spoil):
        z, y = simulate_calibrated(1500, 5, seed=k)
        other = z + .2*torch.randn(z.shape, generator=torch.Generator().manual_seed(k))
        return compare_students(z, spoil*other, y).students["student"].verdicts["raw"].word
    assert sum(word(k, 1.) in ("lost", "better") for k in range(20)) <= 3
    assert all(word(k, 2.5) == "lost" for k in range(5))


def test_kept_needs_the_whole_interval_below_the_margin():
    d = estimate_difference(np.resize([.001, -.001], (1, 1000)))
    assert judge_calibration_kept({"a": d})["a"].word == "kept"
    assert judge_calibration_kept({"a": d}, margin=1e-6)["a"].word == "cannot be told"
    assert judge_calibration_kept({"a": d})["a"].detectable > 0


# -- what comes in ------------------------------------------------------------

def test_seeds_and_one_teacher_for_all(models):
    teacher, students, y = models
    several = [students["KD"], students["KD"][:, ::-1].copy()[:, ::-1] + .1, 1.1*students["KD"]]
    one = compare_students(teacher, several, y)
    all_ = compare_students([teacher]*3, several, y)
    assert one.students["student"].share == all_.students["student"].share
    assert (len(one.evaluations["teacher"]), len(all_.evaluations["teacher"])) == (1, 3)
    assert one.metrics["teacher"] == {k: getattr(one.evaluations["teacher"][0], k) for k in ("raw", "scaled")}
    for k in ("low", "high"): # three runs that are alike know no more than one
        alike, alone = (getattr(r.metrics["teacher"]["raw"]["ece"], k) for r in (all_, one))
        assert alike == pytest.approx(alone)
    nll = one.metrics["student"]["raw"]["nll"]
    assert nll.value == pytest.approx(np.mean([e.raw["nll"].value for e in one.evaluations["student"]]))
    assert nll.low < nll.value < nll.high
    assert "3 training runs of each" in repr(all_.table()) and "not of other teachers" in repr(one.table())
    assert len(one.bold_errors("student", seed=2)) > 0


def test_probabilities_are_logits(models):
    teacher, students, y = (x[:300] if not isinstance(x, dict) else x["KD"][:300] for x in models)
    p, q = (torch.tensor(z).softmax(1) for z in (teacher, students))
    a, b = compare_students(teacher, students, y), compare_students(p, q, y, from_logits=False)
    assert a.students["student"].kl.value == pytest.approx(b.students["student"].kl.value)
    assert a.students["student"].verdicts["raw"].word == b.students["student"].verdicts["raw"].word


def test_an_impossible_class_makes_nll_and_kl_infinite_and_is_told():
    p = np.array([[.7, .2, .1]]*10 + [[.1, .8, .1]]*10)
    q = np.array([[.8, .2, 0.]]*10 + [[0., .8, .2]]*10)
    y = np.array([0]*9 + [2] + [1]*10)
    report = compare_students(p, q, y, from_logits=False)
    assert report.students["student"].kl == Estimate()
    assert "infinite" in repr(report) and report._repr_html_()


def test_two_classes_as_scores():
    z, y = simulate_calibrated(400, 2)
    report = compare_students(z[:, 1] - z[:, 0], 2*(z[:, 1] - z[:, 0]), y)
    assert report.log_probs["teacher"][0].shape == (400, 2)
    explore_students(report)


@pytest.mark.parametrize("change, message", [
    (dict(students=lambda s: {"KD": s["KD"][:9]}),
     r"students\['KD'\]: got 9 images, 6 classes, expected 1500 images"),
    (dict(students=lambda s: s["KD"][:, :5]), "students: got 1500 images, 5 classes, expected 1500"),
    (dict(students=lambda s: {}), "students: got none, expected one or more"),
    (dict(students=lambda s: {"teacher": s["KD"]}), r"students: got names \['teacher'\]"),
    (dict(students=lambda s: {1: s["KD"]}), r"students: got names \[1\]"),
    (dict(students=lambda s: {"KD": [s["KD"]]*2, "calm": s["calm"]}),
     r"students\['calm'\]: got 1 seeds, expected 2"),
    (dict(teacher=lambda t: [t, t]), "students.*: got 1 seeds, expected 2"),
    (dict(teacher=lambda t: t*np.nan), "teacher: got NaN"),
    (dict(labels=lambda y: y + 1), "labels: got 1 to 6, expected 0 to 5"),
    (dict(labels=lambda y: y[:7]), "labels: got 7 of them"),
    (dict(direct=lambda d: "nobody"), "direct: got 'nobody'"),
    (dict(valid_teacher=lambda v: np.zeros((9, 6))), "valid_labels: got not all of"),
    (dict(from_logits=lambda f: False), "teacher: got "),
])
def test_what_is_wrong_is_named(models, change, message):
    call = dict(zip(("teacher", "students", "labels"), models))
    for k, f in change.items(): call[k] = f(call.get(k))
    with pytest.raises(ValueError, match=f"^{message}"): compare_students(**call)


def test_validation_must_be_of_the_same_models(models):
    teacher, students, y = models
    with pytest.raises(ValueError, match="^valid_students: got KD, expected the names of students"):
        compare_students(*models, teacher, {"KD": students["KD"]}, y)
    with pytest.raises(ValueError, match=r"^valid_students\['calm'\]: got 1500 images, 5 classes"):
        compare_students(*models, teacher, students | {"calm": students["calm"][:, :5]}, y)
    with pytest.raises(ValueError, match="^valid_labels: got 1 to 6"):
        compare_students(*models, teacher, students, y + 1)
    plain = compare_students(*models)
    with pytest.raises(ValueError, match="student: got 'none'"): plain.by_class("none")
    with pytest.raises(ValueError, match="seed: got 1, expected 0 to 0"): plain.by_class("KD", 1)


# -- words and pictures -------------------------------------------------------

def test_every_number_in_the_words_is_in_the_report(report):
    said = report.paragraphs()
    assert [*said] == ["teacher", "KD", "calm"]
    assert said["teacher"][0].startswith("The teacher is overconfident: its ECE is ")
    share, gap = report.students["KD"].share, f"{100*report.students['KD'].share.value:.0f}%"
    ends = f"[{100*share.low:.0f} to {100*share.high:.0f}]"
    assert f"KD has {gap} {ends} of the teacher's overconfidence." in said["KD"]
    assert any("which had no teacher" in s for s in said["calm"])
    assert any("KD less calm" in s for s in said["KD"])
    mean = report.students["KD"].comparison.raw["nll"].difference.mean
    assert any(f"NLL {mean:+.3f} nats" in s for s in said["KD"])


def test_sliders_follow(report):
    e = explore_students(report)
    gap = {}
    for T in (1., 4.):
        e.move(own_T=T, student="calm")
        figure = e.drawing.figure
        gap[T] = figure.axes[2].lines[2].get_ydata()
        assert f"calm, T = {T:g}" in figure.axes[1].get_title()
    tenths = report.by_confidence("calm")
    assert gap[1.] == pytest.approx(tenths.student_gap.to_numpy()) and (gap[4.] < gap[1.]).all()
    assert {*e.buttons} == {"fitted temperatures, KD", "fitted temperatures, calm"}


def test_a_file_is_whole_or_not_there(report, tmp_path, monkeypatch):
    path = write_report(report, tmp_path/"a.html")
    assert "kdc-pictures" in path.read_text()
    for wrong in (path, tmp_path/"a.txt", tmp_path/"none"/"a.html"):
        with pytest.raises(ValueError, match="^path: got"): write_report(report, wrong)
    monkeypatch.setattr("kdc_nb.reports.report_html", lambda report: 1/0)
    with pytest.raises(ZeroDivisionError): write_report(report, tmp_path/"b.html")
    assert [p.name for p in tmp_path.iterdir()] == ["a.html"]


def test_names_are_text_and_nothing_else(models):
    teacher, students, y = models
    html = compare_students(teacher, {"<script>alert(1)</script>": students["KD"]}, y)._repr_html_()
    assert "<script>" not in html and "&lt;script&gt;" in html


# -- the command --------------------------------------------------------------

@pytest.fixture
def folder(tmp_path, monkeypatch, models):
    teacher, students, y = models
    monkeypatch.chdir(tmp_path)
    np.savez("teacher.npz", logits=teacher[:1000], valid_logits=teacher[1000:])
    np.savez("kd.npz", logits=students["KD"][:1000], valid_logits=students["KD"][1000:])
    np.save("y.npy", y[:1000])
    np.save("v.npy", y[1000:])
    return tmp_path


def test_the_command_says_what_the_function_says(folder, models, report, capsys):
    assert main("teacher.npz KD=kd.npz --labels y.npy --valid-labels v.npy --out r.html".split()) == 0
    said = capsys.readouterr().out
    teacher, students, y = models
    alone = compare_students(teacher[:1000], {"KD": students["KD"][:1000]}, y[:1000],
                             teacher[1000:], {"KD": students["KD"][1000:]}, y[1000:])
    assert said == f"{alone}\n\nwritten: r.html\n"


def test_files_of_other_kinds_say_the_same(folder, models, capsys):
    teacher, students, y = models
    np.save("t.npy", teacher[:1000])
    pd.DataFrame(students["KD"][:1000]).add_prefix("z").assign(label=y[:1000]).to_csv("s.csv", index=False)
    pd.DataFrame(students["KD"][:1000]).add_prefix("z").to_parquet("s.parquet")
    pd.DataFrame({"label": y[:1000]}).to_csv("y.csv", index=False)
    said = []
    for words in ("t.npy KD=s.csv", "t.npy KD=s.parquet --labels y.csv", "t.npy KD=s.csv --labels y.npy"):
        assert main(words.split()) == 0
        said.append(re.sub(r"-?\d+\.?\d*", lambda m: f"{float(m[0]):.2f}", capsys.readouterr().out))
    assert said[0] == said[1] == said[2]


def test_several_runs_and_validation_files(folder, models, capsys):
    teacher, students, y = models
    for name, z in (("t", teacher), ("a", students["KD"]), ("b", students["calm"])):
        np.savez(f"{name}.npz", logits=z[:1000], labels=y[:1000])
        np.savez(f"{name}_v.npz", logits=z[1000:], labels=y[1000:])
    assert main("t.npz KD=a.npz,b.npz --valid t_v.npz a_v.npz,b_v.npz".split()) == 0
    said = capsys.readouterr().out
    assert "2 of each student" in said and "With a temperature for each, KD" in said


def test_validation_files_go_by_their_names(folder, models, capsys):
    teacher, students, y = models
    for name, z in (("t", teacher), ("a", students["KD"]), ("b", students["calm"])):
        np.savez(f"{name}.npz", logits=z[:1000], labels=y[:1000])
        np.savez(f"{name}_v.npz", logits=z[1000:], labels=y[1000:])
    assert main("t.npz a.npz b.npz --valid t_v.npz a=a_v.npz b=b_v.npz".split()) == 2 # t_v is none of them
    assert "valid: got t_v, a, b, expected t, a, b, in this order" in capsys.readouterr().err
    assert main("t.npz a.npz b.npz --valid t=t_v.npz b=b_v.npz a=a_v.npz".split()) == 2
    assert "in this order" in capsys.readouterr().err
    assert main("t.npz a.npz b.npz --valid t=t_v.npz a=a_v.npz b=b_v.npz".split()) == 0


def test_columns_go_by_their_names(folder, models, capsys):
    teacher, students, y = models
    names = list("abcdef")
    t, s = (pd.DataFrame(z[:1000], columns=names) for z in (teacher, students["KD"]))
    t.assign(label=[names[k] for k in y[:1000]]).to_csv("t.csv", index=False)
    said = []
    for order in (names, names[::-1]):
        s[order].assign(label=[names[k] for k in y[:1000]]).to_csv("s.csv", index=False)
        assert main("t.csv s.csv".split()) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    np.save("v1.npy", y[1000:])
    for z, name in ((teacher, "t_v"), (students["KD"], "s_v")): # in an order of their own
        pd.DataFrame(z[1000:], columns=names)[names[::-1]].to_csv(f"{name}.csv", index=False)
    assert main("t.csv s.csv --valid t_v.csv s_v.csv --valid-labels v1.npy".split()) == 0
    reversed_ = capsys.readouterr().out
    for z, name in ((teacher, "t_v"), (students["KD"], "s_v")):
        pd.DataFrame(z[1000:], columns=names).to_csv(f"{name}.csv", index=False)
    assert main("t.csv s.csv --valid t_v.csv s_v.csv --valid-labels v1.npy".split()) == 0
    assert reversed_ == capsys.readouterr().out
    with pytest.raises(ValueError, match=r"^students: got columns \['f', 'e'"):
        compare_students(t, s[names[::-1]], y[:1000])
    with pytest.raises(ValueError, match="^students: got index"):
        compare_students(t, s.sample(frac=1, random_state=0), y[:1000])
    s.assign(id=1).to_csv("more.csv", index=False)
    assert main("t.csv more.csv --classes a,b,c,d,e,f".split()) == 0


@pytest.mark.parametrize("write", [
    lambda y: np.save("l.npy", y.astype(float)), lambda y: np.savetxt("l.csv", y),
    lambda y: Path("l.csv").write_text("y\n" + "\n".join(map(str, y))),
    lambda y: pd.Series(y, name="label").to_csv("l.csv"),
])
def test_labels_as_people_write_them(folder, models, write, capsys):
    write(models[2][:1000])
    name = next(p.name for p in folder.glob("l.*"))
    assert main(f"teacher.npz kd.npz --labels {name} --valid-labels v.npy".split()) == 0
    said = capsys.readouterr().out
    assert main("teacher.npz kd.npz --labels y.npy --valid-labels v.npy".split()) == 0
    assert said == capsys.readouterr().out


def test_tables_without_a_header_and_with_shuffled_rows(folder, models, capsys):
    teacher, students, y = models
    np.savetxt("t.csv", teacher[:1000], delimiter=",")
    table = pd.DataFrame(students["KD"][:1000]).rename(columns=str)
    table.sample(frac=1, random_state=0).to_parquet("s.parquet")
    with pytest.warns(UserWarning, match="put into the order of their numbers"):
        assert main("t.csv s.parquet --labels y.npy".split()) == 0
    shuffled = capsys.readouterr().out
    np.save("s.npy", students["KD"][:1000])
    assert main("t.csv s.npy --labels y.npy".split()) == 0
    assert shuffled == capsys.readouterr().out


def test_infinite_is_told_of_the_right_one():
    p = np.array([[.7, .2, .1]]*10 + [[.1, .8, .1]]*10)
    q = np.array([[.8, .2, 0.]]*10 + [[0., .8, .2]]*10)
    said = compare_students(q, p, np.array([0]*9 + [2] + [1]*10), from_logits=False).paragraphs()["student"]
    assert any(re.search(r"NLL 0\.\d+ against inf", s) for s in said)


def test_a_gap_in_the_other_direction_is_called_so(models):
    teacher, students, y = models
    said = compare_students(teacher, .3*students["KD"], y).paragraphs()["student"]
    assert any("it errs in the other direction" in s for s in said)


@pytest.mark.parametrize("words, message", [
    ("teacher.npz kd.npz", "labels: got none, expected --labels FILE"),
    ("none.npz kd.npz --labels y.npy", "none.npz"),
    ("teacher.npz kd.npz --labels v.npy", "labels: got 500 of them"),
    ("teacher.npz kd.npz --labels y.npy", "valid_labels: got not all of"),
    ("teacher.npz kd.npz --labels kd.npz", "labels: got kd.npz with logits"),
    ("teacher.npz kd.npz kd.npz --labels y.npy", "students: got two models called kd, expected names"),
    ("teacher.npz kd.npz --labels y.npy --valid teacher.npz", "valid: got 1 models, expected 2"),
    ("teacher.npz kd.npz --labels y.npy --valid-labels v.npy --out r.txt", "out: got r.txt"),
    ("teacher.npz kd.npz --labels y.npy --out no/r.html", "out: got no/r.html, expected a file in"),
    ("teacher.npz teacher=kd.npz --labels y.npy", "students: got two models called teacher"),
    ("teacher.npz kd.npz --labels y.npy --valid-labels v.npy --direct x", "direct: got 'x'"),
    ("teacher.npz y.npy --labels y.npy", "y.npy: got only labels, expected logits"),
])
def test_bad_words_end_in_2_and_write_nothing(folder, words, message, capsys):
    before = sorted(p.name for p in folder.iterdir())
    assert main(words.split()) == 2
    assert message in capsys.readouterr().err
    assert sorted(p.name for p in folder.iterdir()) == before


def test_a_pickle_is_not_loaded(folder, capsys):
    np.save("p.npy", np.array([{"a": 1}], object), allow_pickle=True)
    assert main("p.npy kd.npz --labels y.npy".split()) == 2
    assert "p.npy" in capsys.readouterr().err


def test_frames_are_plain(report):
    frame = report.to_frame()
    assert {*frame.model} == {"teacher", "KD", "calm"} and frame.value.notna().all()
    json.loads(frame.to_json())
    rows = compare_images(*(report.log_probs[k] for k in ("teacher", "KD")), report.labels)
    assert all(x.shape == (1, 1000) for x in rows)
