"The notebooks in a real JupyterLab, in a real browser"
import os
import runpy
import shutil
import socket
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.request import urlopen

import nbformat
import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.browser

ROOT = Path(__file__).parents[1]
build = runpy.run_path(str(ROOT/"nbs/_build.py"))
PAGES = [str(p.relative_to(ROOT)) for p in build["notebooks"]()]
SETTINGS = {"@jupyterlab/apputils-extension/notification": '{"fetchNews": "false"}',
            "@jupyterlab/notebook-extension/tracker": '{"windowingMode": "none"}'}
READY = """async () => {
  const w = jupyterapp.shell.currentWidget
  await w.revealed; await w.context.ready; await w.sessionContext.ready
  await w.sessionContext.session.kernel.info
}"""
RUN = "() => jupyterapp.commands.execute('notebook:run-all-cells')"
SAVE = "() => jupyterapp.shell.currentWidget.context.save()"
CHANGED = "([k, before]) => document.querySelectorAll('.kdc-picture')[k].innerHTML !== before"
SHUT = "() => jupyterapp.serviceManager.sessions.shutdownAll()"


def git(root: Path, *args: str) -> str:
    return subprocess.run(["git", "-C", root, *args], capture_output=True, text=True, check=True).stdout


def write_copy(root: Path) -> None:
    "A checkout of the pages as they are now"
    shutil.copytree(ROOT/"nbs", root/"nbs",
                    ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", ".gitignore"): shutil.copy(ROOT/name, root)
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "-q", "-m", "as it is")


def shape(path: Path) -> tuple:
    "All of a page but what its outputs say: their values may differ between versions of what draws them"
    nb = nbformat.read(path, as_version=4)
    kinds = lambda c: [(o.output_type, o.get("name"), *sorted(o.get("data", {})))
                       for o in c.get("outputs", [])]
    return nb.metadata, [(c.id, c.source, c.metadata, c.get("execution_count"), kinds(c)) for c in nb.cells]


def lab_env(folder: Path) -> dict[str, str]:
    "An environment in which JupyterLab reads and writes nothing of its user's"
    names = {f"{n}_DIR": folder/n.lower()
             for n in ("JUPYTER_CONFIG", "JUPYTER_RUNTIME", "JUPYTERLAB_SETTINGS", "JUPYTERLAB_WORKSPACES")}
    for plugin, text in SETTINGS.items():
        file = names["JUPYTERLAB_SETTINGS_DIR"]/f"{plugin}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return os.environ | {k: str(v) for k, v in names.items()}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_until_up(url: str, server: subprocess.Popen, log: Path) -> None:
    "Return once the server answers; show its log if it does not within a minute"
    for _ in range(120):
        try: return urlopen(f"{url}/api", timeout=5).close()
        except OSError: time.sleep(.5)
        if server.poll() is not None: break
    pytest.fail(f"JupyterLab did not start:\n{log.read_text()}")


@contextmanager
def serving(folder: Path, root: Path):
    "The address of a JupyterLab on `root`, stopped at the end"
    port, log = free_port(), folder/"server.log"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root",
               "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
               "--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True",
               f"--ServerApp.root_dir={root}"]
    with (log.open("w") as out,
          subprocess.Popen(command, cwd=root, env=lab_env(folder), stdout=out, stderr=out) as server):
        try:
            wait_until_up(url := f"http://127.0.0.1:{port}", server, log)
            yield url
        finally: server.terminate()


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    "The checkout that the browser works in"
    write_copy(folder := tmp_path_factory.mktemp("lab")/"root")
    return folder


@pytest.fixture(scope="session")
def lab(root):
    "Address of a JupyterLab that starts kernels, saves and opens pages as `make setup` has it"
    config = root.parent/"config"
    config.mkdir()
    (config/"jupyter_server_config.py").write_text(f"load_subconfig('_jupyter.py', path={str(root/'nbs')!r})")
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch: # for the server, not for what later tests start
            for k, v in (build["ENV"] | {"JUPYTER_CONFIG_PATH": str(config)}).items(): patch.setenv(k, v)
            url = stack.enter_context(serving(root.parent, root))
        yield url


def act(page, script: str, seconds: float = 60) -> None:
    "Run an async function in the page (an awaited evaluate would wait for ever)"
    page.evaluate(
        f"() => {{ window.done = false; void ({script})().finally(() => {{ window.done = true }}) }}"
    )
    page.wait_for_function("() => window.done", timeout=1000*seconds)


@pytest.fixture
def page(lab, browser, root, record_property):
    """A tab of its own; its kernels stop and the checkout is as before at the end.

    The report holds how long its pictures took, from control to screen
    """
    tab = browser.new_page()
    tab.lab, tab.root, tab.waits = lab, root, []
    yield tab
    if tab.waits: record_property("median_seconds_to_picture", round(statistics.median(tab.waits), 3))
    if tab.url.startswith(lab): act(tab, SHUT)
    tab.close(run_before_unload=False)
    git(root, "checkout", "-q", ".")
    git(root, "clean", "-q", "-d", "-f")


def screenshot(page, shots: Path, name: str) -> None:
    "Keep what the page looks like"
    page.screenshot(path=shots/f"{name.replace('/', '_').removesuffix('.ipynb')}.png")


def errors(page) -> list[str]:
    "Everything on the page that says something went wrong"
    kinds = ("stderr", "error")
    return page.locator(", ".join(f'.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.{k}"]'
                                  for k in kinds)).all_inner_texts()


def open_page(page, notebook: str) -> None:
    "Open a notebook and wait until its kernel is ready"
    page.goto(f"{page.lab}/lab/tree/{notebook}?reset")
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
    act(page, READY)


def run_all(page, notebook: str, shots: Path, minutes: float = 10) -> None:
    "Open a notebook, run all its cells, and fail with what any of them complained of"
    open_page(page, notebook)
    act(page, RUN, minutes*60)
    screenshot(page, shots, notebook)
    assert not errors(page)


@contextmanager
def another_picture(page, picture: int = 0):
    "Wait until what the block does has changed the picture of the page's nth explorer"
    image = page.locator(".kdc-picture").nth(picture)
    image.scroll_into_view_if_needed()
    before, began = image.inner_html(), time.monotonic()
    yield
    page.wait_for_function(CHANGED, arg=[picture, before], timeout=30_000)
    page.waits.append(time.monotonic() - began)
    assert not errors(page)


def move_slider(page, nth: int, value: float) -> None:
    "Type a value into the box beside a slider and wait for another picture"
    with another_picture(page):
        page.locator("input[type=number]").nth(nth).click()
        page.keyboard.press("Control+A")
        page.keyboard.type(str(value))
        page.keyboard.press("Enter")


def push_slider(page, nth: int) -> None:
    "Push a slider over stored values one step to the right and wait for another picture"
    with another_picture(page):
        page.locator(".noUi-handle").nth(nth).focus()
        page.keyboard.press("ArrowRight")


def drag_slider(page, nth: int, by: int, picture: int = 0) -> None:
    "Drag a slider `by` pixels; the picture must follow before it is let go"
    page.locator(".kdc-picture").nth(picture).scroll_into_view_if_needed()
    handle = page.locator(".noUi-handle").nth(nth).bounding_box()
    x, y = handle["x"] + handle["width"]/2, handle["y"] + handle["height"]/2
    page.mouse.move(x, y)
    page.mouse.down()
    for part in (.5, 1):
        with another_picture(page, picture): page.mouse.move(x + part*by, y)
    page.mouse.up()


def test_the_transfer_explorer_follows_the_hand(page, shots):
    run_all(page, "nbs/studies/transfer_curve.ipynb", shots)
    for nth in range(2): push_slider(page, nth)
    with another_picture(page): page.locator(".widget-dropdown select").first.select_option(index=2)
    screenshot(page, shots, "transfer_explorer")


def test_the_losses_follow_the_hand(page, shots):
    run_all(page, "nbs/studies/atlas.ipynb", shots)
    push_slider(page, 0)
    for nth, index in ((2, 4), (0, 2), (1, 1)): # loss, teacher, seed
        with another_picture(page):
            page.locator(".widget-dropdown select").nth(nth).select_option(index=index)
    screenshot(page, shots, "losses_explorer")


def test_the_theorems_follow_the_hand(page, shots):
    run_all(page, "nbs/studies/theorems.ipynb", shots)
    page.locator(".noUi-handle").first.scroll_into_view_if_needed()
    move_slider(page, 0, 1)
    for nth, by in enumerate((40, -60, -40, 30, 40, 30)): drag_slider(page, nth, by)
    screenshot(page, shots, "theory_explorer")


def test_your_own_logits_follow_the_hand(page, shots):
    run_all(page, "nbs/explorers.ipynb", shots)
    page.locator(".noUi-handle").first.scroll_into_view_if_needed()
    for nth, by in ((0, 60), (1, 40)): drag_slider(page, nth, by, picture=0)
    screenshot(page, shots, "reliability_explorer")


def test_the_methods_follow_the_hand(page, shots):
    run_all(page, "nbs/studies/calibrators.ipynb", shots)
    page.locator(".noUi-handle").first.scroll_into_view_if_needed()
    for nth, by, picture in ((0, 40, 0), (2, -40, 0), (3, 50, 1), (4, 60, 2), (6, 30, 3)):
        drag_slider(page, nth, by, picture)
    for nth in range(2):
        with another_picture(page, 2 + nth):
            page.locator(".widget-dropdown select").nth(nth).select_option(index=2)
    screenshot(page, shots, "methods_explorer")


def test_the_classes_follow_the_hand(page, shots):
    run_all(page, "nbs/studies/systematic_diffusion.ipynb", shots)
    for nth in range(2): push_slider(page, nth)
    for nth, index in ((0, 1), (1, 0), (3, 2), (4, 1)): # teacher, class a, class c, training images
        with another_picture(page):
            page.locator(".widget-dropdown select").nth(nth).select_option(index=index)
    screenshot(page, shots, "classes_explorer")


def test_the_generations_follow_the_hand(page, shots):
    run_all(page, "nbs/studies/self_distillation.ipynb", shots)
    for nth in range(1, 3): push_slider(page, nth) # alpha, generation
    with another_picture(page): page.locator(".widget-dropdown select").first.select_option(index=1)
    screenshot(page, shots, "generations_explorer")


@pytest.mark.long
@pytest.mark.parametrize("notebook", PAGES)
def test_every_page_runs_and_leaves_the_checkout_clean(page, notebook, shots):
    """Run All, every cell, and a save: no file but the page is written, and of the page
    nothing but what its outputs say
    """
    run_all(page, notebook, shots)
    act(page, SAVE)
    assert git(page.root, "status", "--porcelain").strip() in ("", f"M {notebook}")
    assert shape(page.root/notebook) == shape(ROOT/notebook)
