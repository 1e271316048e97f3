"""Explorers in files of their own: opened from the disk, without a network, by mouse, keyboard and
finger; the numbers in the picture against those of the Python functions
"""
import json
import statistics
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from kdc_nb.core import check
from kdc_nb.controls import Explorer, NumberControl, dropdown, number_slider
from kdc_nb.calibration.predictions import equal_mass_bins
from kdc_nb.calibration.compare_students import compare_students
from kdc_nb.calibration.diagrams import evaluate_at_temperature
from kdc_nb.calibration.students import compare_groups
from kdc_nb.calibration.null_bands import simulate_calibrated
from kdc_nb.calibration.reliability import reliability_bins
from kdc_nb.analysis.theorems import prepare_linear_view
from kdc_nb.explorers import explore_loss_gradients, explore_reliability, explore_theory
from kdc_nb.reports import write_report

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.browser
MARKS = """() => [...document.querySelectorAll('[data-axes]')].map(piece => [piece.dataset.axes,
  [...piece.querySelectorAll('use')].map(m => [m.x.baseVal.value, m.y.baseVal.value])])"""
NOTE_WAITS = """() => { // milliseconds from a key to the frame after it
  window.waits = []
  document.addEventListener('keydown', () => {
    const pressed = performance.now()
    requestAnimationFrame(() => setTimeout(() => window.waits.push(performance.now() - pressed)))
  }, true)
}"""


@pytest.fixture(scope="module")
def outputs():
    g = torch.Generator().manual_seed(0)
    logits, labels = 3*torch.randn(500, 5, generator=g, dtype=torch.float64), torch.arange(500) % 5
    logits[torch.arange(500), labels] += 3
    return logits, labels


@pytest.fixture(scope="module")
def files(tmp_path_factory, outputs):
    "Saved explorers by name"
    folder = tmp_path_factory.mktemp("saved")
    made = {"reliability": (explore_reliability(*outputs), {"T": [.5, 1, 2, 4], "n_bins": [5, 15]}),
            "theory": (explore_theory(), {"T": [1, 2, 4], "alpha": [0, .5, 1], "angle": []}),
            "logits": (explore_loss_gradients("logits"), {"beta": [0, .1, 1], "margin": [0, 6]})}
    return {name: e.save(folder/f"{name}.html", values) for name, (e, values) in made.items()}


@pytest.fixture
def open_file(browser):
    "Opens a saved explorer; nothing is asked of a network, and nothing goes wrong"
    pages, wrong = [], []
    def open_it(file, width=1280):
        page = browser.new_page()
        pages.append(page)
        page.set_viewport_size({"width": width, "height": 800})
        page.on("console", lambda m: wrong.append(m.text))
        page.on("pageerror", lambda e: wrong.append(str(e)))
        allowed = (file.as_uri(), "data:")
        page.on("request", lambda r: r.url.startswith(allowed) or wrong.append(r.url))
        page.goto(file.as_uri())
        page.wait_for_selector(".kdc-ready")
        return page
    yield open_it
    for p in pages: p.close()
    assert not wrong


def marks(page) -> list[np.ndarray]: # (n, 2) for each moving piece, in the units of its axes
    "Read the points back from the picture"
    def read(axis, place):
        share = (place - axis["from"])/(axis["to"] - axis["from"])
        if axis["log"]: return axis["low"]*(axis["high"]/axis["low"])**share
        return axis["low"] + share*(axis["high"] - axis["low"])
    found = []
    for text, places in page.evaluate(MARKS):
        axes = json.loads(text)
        points = [(read(axes["x"], x), read(axes["y"], y)) for x, y in places]
        found.append(np.array(points).reshape(-1, 2))
    return found


def holds(page, points: np.ndarray) -> None: # (n, 2)
    "One of the moving pieces shows these points, to a millionth of an axis of length 1"
    same = [len(m) == len(points) and np.allclose(m, points, rtol=1e-6, atol=1e-6) for m in marks(page)]
    assert any(same)


def slider(page, name: str): return page.get_by_label(name)


def move(page, name: str, value: float) -> None:
    "Press arrow keys until a slider is at a value"
    texts = json.loads(slider(page, name).get_attribute("data-texts"))
    to, at = texts.index(f"{value:g}"), int(slider(page, name).input_value())
    for _ in range(abs(to - at)): slider(page, name).press("ArrowRight" if to > at else "ArrowLeft")


@pytest.mark.parametrize("width", [1280, 820, 360])
def test_the_picture_has_pythons_numbers(open_file, files, outputs, width, shots):
    logits, labels = outputs
    page = open_file(files["reliability"], width)
    for T, n_bins in ((1., 15), (2., 15), (4., 15), (4., 5)):
        move(page, "temperature T", T)
        move(page, "bins", n_bins)
        bins = reliability_bins(logits/T, labels, n_bins)
        used = bins.count > 0
        holds(page, np.column_stack([bins.confidence[used], bins.accuracy[used]]))
        now = evaluate_at_temperature(logits, labels, T, n_bins)
        holds(page, np.array([[T, now.ece.value]]))
        holds(page, np.array([[T, now.nll]]))
        assert page.get_by_text(f"T = {T:g}, N = 500, NLL {now.nll:.3f}").is_visible()
    page.screenshot(path=shots/f"saved_reliability_{width}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", [1280, 390])
def test_a_report_moves_as_python_says(open_file, tmp_path, width, shots):
    logits, labels = simulate_calibrated(500, 5)
    report = compare_students(1.5*logits, {"KD": logits, "calm": .5*logits}, labels)
    page = open_file(write_report(report, tmp_path/"report.html"), width)
    page.locator(".kdc-controls select").select_option(label="calm")
    move(page, "of the student", 2.)
    tempered = (report.log_probs[k][0]/T for k, T in (("teacher", 1.), ("calm", 2.)))
    tenths = equal_mass_bins(report.log_probs["teacher"][0].exp().amax(1, keepdim=True), 10)[:, 0]
    gaps = compare_groups(*(z.log_softmax(1) for z in tempered), report.labels, tenths)
    holds(page, np.column_stack([gaps.index + 1.12, gaps.student_gap]))
    now = evaluate_at_temperature(.5*logits, labels, 2.)
    assert page.get_by_text(f"calm, T = 2, N = 500, NLL {now.nll:.3f}").is_visible()
    page.get_by_role("button", name="fitted temperatures, KD").click()
    assert page.get_by_text(f"KD, T = {report.evaluations['KD'][0].T:.4g}, N = 500").is_visible()
    page.screenshot(path=shots/f"report_{width}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_exact_student_is_pythons(open_file, files):
    page = open_file(files["theory"])
    slider(page, "weight alpha").press("End")
    view = prepare_linear_view(T=2., alpha=1., N=1000, d=10, scale=2., overconfidence=2., angle=30.,
                               features="gaussian", intercept=True)
    holds(page, np.column_stack([view.p_exact, view.p_formula])[:400])
    assert page.get_by_text("points N 1000").is_visible() # what cannot be moved is said


def test_by_mouse_and_by_finger(open_file, files):
    page = open_file(files["reliability"], 360)
    box, touch = slider(page, "temperature T").bounding_box(), page.context.new_cdp_session(page)
    y = box["y"] + box["height"]/2
    page.mouse.click(box["x"] + box["width"] - 8, y)
    assert page.get_by_text("T = 4, N = 500").is_visible()
    touch.send("Emulation.setTouchEmulationEnabled", {"enabled": True})
    for kind, x in (("touchStart", .5), ("touchMove", .2), ("touchMove", .01), ("touchEnd", None)):
        points = [] if x is None else [{"x": box["x"] + x*box["width"], "y": y}]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    page.get_by_text("T = 0.5, N = 500").wait_for()
    assert slider(page, "temperature T").get_attribute("aria-valuetext") == "0.5"


def test_buttons_menus_and_what_is_kept(open_file, files, outputs, tmp_path):
    page = open_file(files["reliability"])
    first = marks(page)
    page.get_by_role("button", name="go to the fitted T").click()
    assert not np.array_equal(marks(page)[-1], first[-1])
    page.get_by_role("button", name="reset").click()
    assert all(np.array_equal(a, b) for a, b in zip(marks(page), first, strict=True))
    for kind, begin in (("SVG", b"<svg"), ("PNG", b"\x89PNG")):
        with page.expect_download() as got: page.get_by_role("button", name=f"save as {kind}").click()
        got.value.save_as(tmp_path/f"x.{kind}")
        assert got.value.suggested_filename == f"reliability.{kind.lower()}"
        assert (tmp_path/f"x.{kind}").read_bytes().startswith(begin)
    page = open_file(files["logits"])
    before = page.locator(".kdc-panels").inner_html()
    page.get_by_label("penalty").select_option(index=1)
    assert page.locator(".kdc-panels").inner_html() != before


def test_a_point_tells_its_numbers(open_file, files, outputs):
    logits, labels = outputs
    page, bins = open_file(files["reliability"]), reliability_bins(logits, labels)
    last = np.flatnonzero(bins.count)[-1]
    dot = page.locator("[data-axes] use").locator("visible=true")
    boxes = [b for b in (d.bounding_box() for d in dot.all()) if b and b["width"] < 12]
    shown = set()
    for b in boxes:
        page.mouse.move(b["x"] + b["width"]/2, b["y"] + b["height"]/2)
        if page.locator(".kdc-note").is_visible(): shown.add(page.locator(".kdc-note").inner_text())
    x, y = 100*bins.confidence[last], 100*bins.accuracy[last]
    assert f"confidence (%) {x:.4g}\naccuracy (%) {y:.4g}" in shown


def test_a_value_without_a_picture_is_told(open_file, tmp_path):
    figure, ax = plt.subplots(figsize=(4, 2), layout="constrained")
    ax.set(xlim=(0, 1), ylim=(0, 1))
    dot = ax.plot([], [], "o", animated=True)[0]
    def show(share, kind):
        check(share <= .5, "share", f"{share:g}", "a half at most")
        dot.set_data([share], [len(kind)/10])
    controls = {"share": number_slider("share", 0, 1, .2, .2), "kind": dropdown("kind", ["a & b", "<c>"])}
    file = Explorer(figure, show, controls, "toy").save(tmp_path/"toy.html")
    page = open_file(file)
    slider(page, "share").press("End")
    assert page.locator(".kdc-refusal").inner_text().startswith("share: got 1, expected a half at most")
    assert page.locator(".kdc-panels").evaluate("e => getComputedStyle(e).opacity") == "0.3"
    slider(page, "share").press("Home")
    assert page.locator(".kdc-refusal").inner_text() == ""
    page.get_by_label("kind").select_option(label="<c>")
    holds(page, np.array([[0, .3]]))


def figure_with(*places, **kw):
    "A figure of one axes, with a moving text at each place, and a moving title over all"
    figure, ax = plt.subplots(figsize=(4, 2), layout="constrained")
    ax.set(xlabel="N\u00a0= 5", **kw)
    texts = [ax.text(x, .5, "", zorder=5 + k, animated=True) for k, x in enumerate(places)]
    return figure, ax, [figure.suptitle(" ", animated=True), *texts]


def test_what_belongs_to_no_axes_is_there_and_everything_in_its_place(open_file, tmp_path):
    figure, ax, texts = figure_with(.2, .8)
    figure.supylabel("for all")
    inset = ax.inset_axes([.4, .1, .2, .2], xlim=(0, 1), ylim=(0, 1))
    dot = inset.plot([], [], "o", animated=True)[0]
    def show(n):
        dot.set_data([.25], [n/10])
        for k, text in enumerate(texts): text.set_text(f"text {k} of {n}")
    file = Explorer(figure, show, {"n": number_slider("n", 1, 3, 1, 1)}, "toy").save(tmp_path/"toy.html")
    page = open_file(file)
    slider(page, "n").press("End")
    boxes = [page.get_by_text(f"text {k} of 3").bounding_box() for k in range(3)]
    assert boxes[0]["y"] < boxes[1]["y"] and boxes[1]["x"] < boxes[2]["x"]
    assert page.get_by_text("for all").is_visible()
    with page.expect_download() as got: page.get_by_role("button", name="save as SVG").click()
    got.value.save_as(tmp_path/"toy.svg")
    assert "text 2 of 3.0" in [t.text for t in ElementTree.parse(tmp_path/"toy.svg").iter() if t.text]


def test_what_cannot_be_drawn_is_said(tmp_path):
    figure, ax, _ = figure_with(.5)
    explorer = Explorer(figure, lambda x: ax.set_xlim(0, x), {"x": number_slider("x", 1, 3, 1, 1)}, "toy")
    explorer.move(x=2)
    assert "figure: got axes with other limits than before" in explorer.refusal.value
    with pytest.raises(ValueError, match="figure: got nothing that moves"):
        Explorer(plt.subplots()[0], lambda: None, {}, "toy")
    with pytest.raises(ValueError, match="figure: got one without axes"):
        Explorer(plt.figure(), lambda: None, {})
    with pytest.raises(ValueError, match="name: got 'a/b', expected the name of a file"):
        Explorer(figure_with(.5)[0], lambda: None, {}, "a/b")
    with pytest.raises(ValueError, match="grid or buttons: got 'y', expected one of x"):
        Explorer(figure_with(.5)[0], lambda x: None, {"x": number_slider("x", 1, 3, 1, 1)}, grid={"y": []})


def test_a_note_stays_after_the_finger(open_file, files):
    page = open_file(files["reliability"], 360)
    touch = page.context.new_cdp_session(page)
    touch.send("Emulation.setTouchEmulationEnabled", {"enabled": True})
    dot = page.locator("[data-piece='3'] use").last.bounding_box()
    at = {"x": dot["x"] + dot["width"]/2, "y": dot["y"] + dot["height"]/2}
    for kind, points in (("touchStart", [at]), ("touchEnd", [])):
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    page.wait_for_timeout(200)
    assert page.locator(".kdc-note").inner_text().startswith("confidence (%)")
    assert page.locator(".kdc-note").is_visible()


def test_it_is_there_without_scripts(browser, files):
    "The first picture, all of it, in its place from the beginning"
    page = browser.new_page()
    page.context.new_cdp_session(page).send("Emulation.setScriptExecutionDisabled", {"value": True})
    page.goto(files["theory"].as_uri())
    assert page.get_by_text("Probabilities on the training points").is_visible()
    page.close()


def test_dark_and_light(open_file, files, shots):
    page = open_file(files["theory"], 820)
    for scheme, wanted in (("dark", "invert"), ("light", "none")):
        page.emulate_media(color_scheme=scheme)
        assert wanted in page.locator(".kdc-panels").evaluate("e => getComputedStyle(e).filter")
        page.screenshot(path=shots/f"saved_theory_{scheme}.png", full_page=True)


def test_the_picture_follows_a_key(open_file, files, record_property):
    "The report holds the median of milliseconds from the key to the frame after it"
    page = open_file(files["theory"])
    page.evaluate(NOTE_WAITS)
    for k in range(20):
        slider(page, "weight alpha").press("ArrowRight" if k % 4 < 2 else "ArrowLeft")
        page.wait_for_function(f"() => window.waits.length > {k}")
    waits = page.evaluate("() => window.waits")
    record_property("milliseconds_to_picture", round(statistics.median(waits)))
    print(f"saved theory: median {statistics.median(waits):.0f} ms, largest {max(waits):.0f}")


def test_what_a_file_offers_can_be_said(tmp_path):
    explorer = explore_theory()
    explorer.move(d=12)
    text = explorer.html({"T": [1], "alpha": [0, 1], "angle": (), "d": [5]})
    assert "[&quot;5&quot;, &quot;12&quot;]" in text, "the present value is among them"
    with pytest.raises(ValueError, match="values: got 'bins', expected one of N, T, alpha"):
        explorer.save(tmp_path/"x.html", {"bins": [1]})
    many = {"T": range(1, 10), "alpha": np.linspace(0, 1, 101), "angle": range(0, 180, 30)}
    with pytest.raises(ValueError, match="values: got 9 of T x 101 of alpha x 6 of angle = 5,454 pictures"):
        explorer.save(tmp_path/"x.html", many)
    assert not list(tmp_path.iterdir()) and explorer.shown["d"] == 12


def test_an_integer_stays_one():
    seen, control, (figure, ax) = [], NumberControl("n", range(1, 4), 2, whole=True), plt.subplots()
    ax.plot([], [], animated=True)
    Explorer(figure, lambda n: seen.append(n), {"n": control}).html()
    assert set(map(type, seen)) == {int} and sorted(set(seen)) == [1, 2, 3]
