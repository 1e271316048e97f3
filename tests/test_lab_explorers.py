"""Explorers in a real JupyterLab: sharp, legible, on dark themes; typed values; what is
saved, and what closing asks
"""
import statistics
import subprocess
import sys
import time

import nbformat
import pytest

from tests.test_lab import ( # noqa: F401, three of them fixtures
    RUN, SAVE, act, another_picture, errors, lab, open_page, page, root
)

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.browser
PAGE = "nbs/scratch.ipynb"
CELLS = ["""import torch
from kdc_nb.files import results_file
from kdc_nb.analysis.views import read_features
from kdc_nb.explorers import explore_loss_gradients, explore_penultimate, explore_reliability, explore_theory
logits, labels = 3*torch.randn(2000, 10, generator=torch.Generator().manual_seed(0)), torch.arange(2000) % 10
logits[torch.arange(2000), labels] += 4""",
         "explore_reliability(logits, labels)",
         "explore_penultimate(read_features(results_file('self_distillation_0.npz')))",
         "explore_theory()", "explore_loss_gradients('batches')"]
RELIABILITY, CLASSES, THEORY, METHOD = range(4) # explorers of the page
DIRTY = "() => jupyterapp.shell.currentWidget.context.model.dirty"
SIZES = """k => {
  const image = document.querySelectorAll('.kdc-picture')[k], box = image.getBoundingClientRect()
  const panels = [...image.querySelectorAll('svg')].map(p => p.getBoundingClientRect())
  return [box.width, image.closest('.jp-OutputArea').getBoundingClientRect().width,
          panels.map(p => p.height), panels.map(p => p.width).reduce((a, b) => a + b)]
}"""
EYE = """k => { // milliseconds from a key to the frame after the picture has changed
  let pressed = 0
  window.waits = []
  document.addEventListener('keydown', () => { pressed = performance.now() }, true)
  new MutationObserver(() => requestAnimationFrame(() => setTimeout(() => {
    if (pressed) window.waits.push(performance.now() - pressed)
    pressed = 0
  }))).observe(document.querySelectorAll('.kdc-picture')[k], { childList: true, subtree: true })
}"""


@pytest.fixture(autouse=True)
def small_screen(page, root):
    "That of a small laptop, and a page with nothing but explorers"
    page.set_viewport_size({"width": 1280, "height": 800})
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c, id=f"cell{k}")
                                                   for k, c in enumerate(CELLS)]), root/PAGE)


def open_and_run(page, name: str = PAGE) -> None:
    open_page(page, name)
    act(page, RUN, 600)
    assert not errors(page)


def explorer(page, nth: int):
    "The nth explorer, scrolled to"
    found = page.locator(".kdc-explorer").nth(nth)
    found.evaluate("e => e.scrollIntoView({block: 'start'})")
    return found


def type_value(found, nth: int, value: str) -> None:
    box = found.locator("input[type=number]").nth(nth)
    box.fill(value)
    box.press("Enter")


def test_a_page_run_and_saved_twice_is_the_same(page, root):
    """Live widgets and their random ids among its outputs; tests/test_lab.py holds saved pages
    against the committed ones
    """
    saved = []
    for _ in range(2):
        open_and_run(page)
        assert page.locator(".kdc-explorer").count() == 4
        act(page, SAVE)
        saved.append((root/PAGE).read_bytes())
    assert saved[0] == saved[1] and b"model_id" not in saved[0]


@pytest.mark.parametrize("name", ["nbs/explorers.ipynb", "nbs/index.ipynb", "nbs/studies/theorems.ipynb"])
def test_closing_an_untouched_page_asks_nothing(page, root, name):
    before = (root/name).read_bytes()
    open_page(page, name)
    time.sleep(2) # for what the kernel has to say of itself
    assert not page.evaluate(DIRTY)
    page.keyboard.press("Escape")
    act(page, "() => jupyterapp.commands.execute('application:close')")
    playwright.expect(page.locator(".jp-NotebookPanel")).to_have_count(0)
    assert page.locator(".jp-Dialog").count() == 0 and (root/name).read_bytes() == before


def test_pictures_are_as_wide_as_they_should_be(page, shots):
    open_and_run(page)
    for width, height in ((1280, 800), (1920, 1080)):
        page.set_viewport_size({"width": width, "height": height})
        for nth in (RELIABILITY, CLASSES, THEORY, METHOD):
            explorer(page, nth)
            shown, room, heights, widths = page.evaluate(SIZES, nth)
            assert shown == pytest.approx(840, abs=40) and shown <= room, (width, nth)
            assert heights == pytest.approx([heights[0]]*len(heights), abs=2)
            assert widths == pytest.approx(shown, abs=2)
            page.screenshot(path=shots/f"explorer_{nth}_{width}.png")


def test_dark_pictures_are_dark(page, shots):
    open_and_run(page)
    found = explorer(page, RELIABILITY)
    act(page, "() => jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
    page.wait_for_selector("body[data-jp-theme-light=false]", state="attached")
    assert "invert" in found.locator(".kdc-panels").evaluate("e => getComputedStyle(e).filter")
    page.screenshot(path=shots/"explorer_dark.png")
    classes = explorer(page, CLASSES)
    with another_picture(page, CLASSES): classes.locator("input[type=checkbox]").check()
    assert classes.locator(".kdc-panels").evaluate("e => getComputedStyle(e).filter") == "none"
    page.screenshot(path=shots/"explorer_dark_photographs.png")
    act(page, "() => jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Light'})")


def test_what_is_typed_is_taken_or_refused(page, shots, root):
    open_and_run(page)
    found = explorer(page, RELIABILITY)
    with another_picture(page, RELIABILITY): type_value(found, 0, "1.03")
    assert found.locator("input[type=number]").first.input_value() == "1.03"
    type_value(found, 0, "20")
    refusal, picture = (found.get_by_text("T: got 20, expected a number from 0.125 to 8"),
                        found.locator(".kdc-picture"))
    playwright.expect(refusal).to_be_visible()
    playwright.expect(picture).to_have_css("opacity", "0.3")
    assert refusal.bounding_box()["y"] < picture.bounding_box()["y"]
    page.screenshot(path=shots/"explorer_refusal.png")
    with another_picture(page, RELIABILITY): found.get_by_role("button", name="go to the fitted T").click()
    playwright.expect(picture).to_have_css("opacity", "1")
    with another_picture(page, RELIABILITY): found.get_by_role("button", name="reset").click()
    assert found.locator("input[type=number]").first.input_value() == "1"
    found.get_by_role("button", name="save as SVG").click()
    playwright.expect(found.get_by_text("saved as reliability.svg")).to_be_visible()
    assert "<svg" in (root/"nbs/reliability.svg").read_text()
    found.get_by_role("button", name="save as HTML").click()
    playwright.expect(found.get_by_text("saved as reliability.html")).to_be_visible(timeout=120_000)
    assert "kdc-pictures" in (root/"nbs/reliability.html").read_text()
    playwright.expect(found.locator(".jp-OutputArea-child")).to_have_count(0)


def test_a_picture_follows_a_key_beside_a_busy_core(page, record_property):
    "Each of 20 steps; the report holds the median of milliseconds from the key to the eye"
    open_and_run(page)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            for nth in (RELIABILITY, THEORY):
                handle = explorer(page, nth).locator(".noUi-handle").first
                page.evaluate(EYE, nth)
                for k in range(20):
                    handle.press("ArrowRight" if k < 10 else "ArrowLeft")
                    page.wait_for_function(f"() => window.waits.length > {k}", timeout=30_000)
                waits = page.evaluate("() => window.waits")
                record_property(f"milliseconds_to_picture_{nth}", round(statistics.median(waits)))
                print(f"explorer {nth}: {statistics.median(waits):.0f} ms, largest {max(waits):.0f}")
        finally: busy.kill()
