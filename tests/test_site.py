"""The web pages made from the notebooks: they hold all that is shown there, load nothing, lead
nowhere in vain, and have sliders where their explorers are
"""
import base64
import importlib
import posixpath
import re
import runpy
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup

ROOT = Path(__file__).parents[1]
build = runpy.run_path(str(ROOT/"nbs/_build.py"))
NOTEBOOKS = {p.relative_to(ROOT/"nbs").with_suffix(".html").as_posix(): nbformat.read(p, as_version=4)
             for p in build["notebooks"]()}
every_page = pytest.mark.parametrize("name", NOTEBOOKS)


def make(folder: Path, root: Path = ROOT) -> subprocess.CompletedProcess:
    "What `make site` does, into `folder`"
    return subprocess.run([sys.executable, root/"nbs/_site.py", folder], capture_output=True, text=True)


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    "A site"
    folder = tmp_path_factory.mktemp("site")/"new/site"
    done = make(folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def pages(folder):
    "Its pages, parsed, each of less than 4 MB"
    assert max(p.stat().st_size for p in folder.rglob("*.html")) < 4e6
    return {p.relative_to(folder).as_posix(): BeautifulSoup(p.read_text(), "html.parser")
            for p in folder.rglob("*.html")}


@pytest.fixture
def small(tmp_path):
    "The sources of a site of two pages"
    (tmp_path/"small/nbs").mkdir(parents=True)
    for name in ("index.ipynb", "core.ipynb", *(p.name for p in (ROOT/"nbs").glob("_*.*"))):
        shutil.copy(ROOT/"nbs"/name, tmp_path/"small/nbs")
    return tmp_path/"small"


def shown(nb) -> list:
    return [c for c in nb.cells if c.cell_type == "code" and "hide" not in build["directives"](c)]
def live(nb) -> list:
    "The cells of which explorers are made: the last of a chain of live ones, which show something"
    return [c for c in shown(nb) if "live" in build["directives"](c) and c.outputs]
def without_directives(cell) -> str: return re.sub(r"(?m)^#\|.*\n?", "", cell.source).strip()


def prose(nb) -> str:
    "The text of a notebook without code"
    return "\n\n".join(re.sub(r"(?ms)^```.*?^```|^(    .*\n?)+|`[^`\n]+`", "", c.source)
                       for c in nb.cells if c.cell_type == "markdown")


def test_every_notebook_has_a_page(pages): assert pages.keys() == {*NOTEBOOKS, "search.html"}


@pytest.fixture(scope="session")
def anchors(pages):
    "The anchors of every page"
    return {name: {t["id"] for t in page.find_all(id=True)} for name, page in pages.items()}


@pytest.fixture
def module(monkeypatch):
    "What makes the site"
    monkeypatch.syspath_prepend(str(ROOT/"nbs"))
    return importlib.import_module("_site")


@pytest.mark.parametrize("name", [*NOTEBOOKS, "search.html"])
def test_it_loads_nothing(pages, name):
    page = pages[name]
    assert not page.find_all(["iframe", "object", "embed", "base"])
    scripts = [t for t in page.find_all("script") if t.get("type") != "application/octet-stream"]
    digest = base64.b64encode(sha256(scripts[0].text.encode()).digest()).decode()
    (policy,) = [t["content"] for t in page.find_all("meta") if t.get("http-equiv")]
    assert len(scripts) == 1 and policy.startswith("default-src 'none';")
    assert policy.endswith(f"script-src 'sha256-{digest}'")
    (form,) = page.find_all("form")
    assert posixpath.normpath(posixpath.join(posixpath.dirname(name), form["action"])) == "search.html"
    assert not [t for t in page.find_all("link") if t["rel"] != ["icon"] or t["href"] != "data:,"]
    loaded = [t[a] for t in page.find_all(True)
              for a in ("src", "srcset", "poster", "data", "background") if t.has_attr(a)]
    assert not [url for url in loaded if not url.startswith("data:")]
    styles = [t.text for t in page.find_all("style")]
    assert len(styles) == 1, "tables bring styles that reach beyond them"
    assert not [s for s in styles + [t["style"] for t in page.find_all(style=True)]
                if "@import" in s or "url(" in s]
    assert not [a for t in page.find_all(True) for a in t.attrs if a.startswith("on")]


@every_page
def test_links_lead_somewhere(pages, anchors, name):
    for url in (a["href"] for a in pages[name].find_all("a")):
        if re.match("https?://", url): continue
        path, _, anchor = url.partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(name), path)) if path else name
        assert target in anchors, url
        assert not anchor or anchor in anchors[target], url


@every_page
def test_links_to_files_name_files(name):
    "What is no page has no link, so a wrong name would not be seen there"
    urls = re.findall(r"\]\(([^)#\s]+)", prose(NOTEBOOKS[name]))
    assert not [u for u in urls
                if not re.match("[a-z]+:", u) and not (ROOT/"nbs"/name).parent.joinpath(u).exists()]


@every_page
def test_pages_know_each_other(pages, name):
    def leads_to(a) -> str: return posixpath.normpath(posixpath.join(posixpath.dirname(name), a["href"]))
    here, order = pages[name].nav, [a["href"] for a in pages["index.html"].nav.select("a:not([href^='#'])")]
    links = here.select("a:not([href^='#'])")
    targets = [leads_to(a) for a in links]
    assert targets == order and order[0] == "index.html" and sorted(order) == sorted(NOTEBOOKS)
    i = order.index(name)
    assert ([leads_to(a) for a in pages[name].footer.find_all("a")]
            == order[max(0, i - 1):i] + order[i + 1:i + 2])
    assert [t for t, a in zip(targets, links) if a.get("aria-current")] == [name]
    assert [a.text for a in links] == [pages[t].h1.text for t in targets]
    modules = [n for n, nb in NOTEBOOKS.items() if "default_exp" in nb.cells[0].source]
    assert sorted(t for t, a in zip(targets, links) if a.parent.find("small")) == sorted(modules)
    assert ([a["href"][1:] for a in here.select("a[href^='#']")]
            == [h["id"] for h in pages[name].main.find_all("h2")])


@every_page
def test_formulas(pages, name):
    main = BeautifulSoup(str(pages[name].main), "html.parser")
    assert (len(main.find_all("math"))
            == len(re.findall(r"(?s)\$\$.+?\$\$|\$[^$]+\$|\\begin\{", prose(NOTEBOOKS[name]))))
    assert not [m for m in main.find_all("math") if "\\" in m.text or not m.text.strip()]
    for tag in main.find_all(["pre", "code"]): tag.decompose()
    assert not re.findall(r"\$|\\begin|\\[()\[\]]", main.text)


@every_page
def test_code(pages, name):
    blocks, nb = [p.text.strip() for p in pages[name].main.select(".highlight")], NOTEBOOKS[name]
    hidden = [c for c in nb.cells if build["directives"](c) & {"hide", "echo: false"}]
    assert not [b for b in blocks if not b or b.startswith("#|")]
    assert not {without_directives(c) for c in hidden} & set(blocks)
    assert ({without_directives(c) for c in nb.cells if c.cell_type == "code" and c not in hidden} - {""}
            <= set(blocks))


@every_page
def test_outputs(pages, name):
    main, explorers = pages[name].main, live(NOTEBOOKS[name])
    assert len(main.select(".kdc-page")) == len(explorers)
    for explorer in main.select(".kdc-page"): explorer.decompose()
    outputs = [o for c in shown(NOTEBOOKS[name]) if c not in explorers for o in c.outputs]
    assert len(main.select(".output")) == len(outputs)
    pictures = [base64.b64decode(o.data["image/png"]) for o in outputs if "image/png" in o.get("data", {})]
    assert [base64.b64decode(i["src"].partition(",")[2]) for i in main.select(".output img")] == pictures
    tables = [o for o in outputs if "<table" in o.get("data", {}).get("text/html", "")]
    assert len(main.select(".output table")) == len(tables)
    plain = [o.get("text") or o.data["text/plain"]
             for o in outputs if o.get("data", {}).keys() <= {"text/plain"}]
    assert [p.text for p in main.select(".output > pre")] == plain


def test_an_older_site_is_replaced_by_the_same_bytes(small, tmp_path):
    folder = tmp_path/"new/site"
    assert make(folder, small).returncode == 0
    before = files(folder)
    assert "index.html" in before
    (folder/"old.html").write_text("a page that is no more")
    assert make(folder, small).returncode == 0
    assert files(folder) == before
    assert list(folder.parent.iterdir()) == [folder]


def test_a_live_cell_needs_no_other_cell(small, tmp_path):
    nb = nbformat.read(small/"nbs/index.ipynb", as_version=4)
    nb.cells.insert(0, nbformat.v4.new_code_cell("#| live\nexplore_reliability(not_there, [1])"))
    nbformat.write(nb, small/"nbs/index.ipynb")
    done = make(tmp_path/"site", small)
    assert done.returncode and "name 'not_there' is not defined" in done.stderr
    assert not (tmp_path/"site").exists()


@pytest.mark.parametrize("name", ["notes.txt", "index.html", "deep/er/file"])
def test_a_foreign_folder_is_left_alone(module, tmp_path, name):
    file = tmp_path/"mine"/name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    for folder in (tmp_path/"mine", file):
        with pytest.raises(SystemExit, match=f"^{folder} is no site .*$"): module.build(folder)
    assert files(tmp_path) == {f"mine/{name}": b"mine"}


def test_a_build_that_fails_leaves_the_older_site(folder, tmp_path):
    shutil.copytree(ROOT/"nbs", tmp_path/"nbs",
                    ignore=shutil.ignore_patterns("results", "images", "__pycache__", ".*"))
    shutil.copytree(folder, tmp_path/"site")
    (tmp_path/"nbs/index.ipynb").write_text("{")
    assert make(tmp_path/"site", tmp_path).returncode
    assert files(tmp_path/"site") == files(folder)
    assert {p.name for p in tmp_path.iterdir()} == {"nbs", "site"}


@pytest.fixture
def text(module):
    "Markdown of a page in a folder, as the site has it"
    markdown = module.MarkdownWithMath(module.Renderer("folder/here.ipynb",
                                                       {"index.ipynb", "folder/there.ipynb"}))
    return lambda source: BeautifulSoup(module.cell_html(nbformat.v4.new_markdown_cell(source), markdown, {}),
                                        "html.parser")


@pytest.mark.parametrize("source, html", [
    ("[a](there.ipynb#b)", '<p><a href="there.html#b">a</a></p>'),
    ("[a](../index.ipynb)", '<p><a href="../index.html">a</a></p>'),
    ("[a](#b)", '<p><a href="#b">a</a></p>'),
    ("[a](https://example.org/b.ipynb)", '<p><a href="https://example.org/b.ipynb">a</a></p>'),
    ("[a](../../LICENSE)", '<p><span title="LICENSE, a file of the project">a</span></p>'),
    ("`$a$ and $b$`", "<p><code>$a$ and $b$</code></p>"),
    ("```\n$a_1$ and $$b$$\n```", "<pre><code>$a_1$ and $$b$$\n</code></pre>"),
    ("## One `word` more", '<h2 id="One-word-more">One <code>word</code> more</h2>'),
])
def test_text(text, source, html): assert str(text(source)).strip() == html


@pytest.mark.parametrize("source, letters", [
    ("$a_1 * b_1 * c_1$", "a1*b1*c1"),
    (r"$a < b$ and $\mathbb R \ne \mathbb 1 \ne \mathcal L$", "a<b and ℝ≠𝟙≠ℒ"),
    ("$$\\sum_{i=1}^n\n\nx_i$$", "∑i=1nxi"),
])
def test_formulas_of_every_kind(text, source, letters):
    page = text(source)
    assert page.find("math") and not page.find("em")
    assert page.text.strip() == letters


def test_text_is_no_markup(module):
    assert (module.output_html(nbformat.v4.new_output("stream", text="<b> & c"))
            == "<pre>&lt;b&gt; &amp; c</pre>")


@pytest.fixture
def open_site(folder, browser):
    "Opens a page of the site; nothing is asked of a network, nothing complains"
    page, wrong = browser.new_page(), []
    page.on("request", lambda r: r.url.startswith(("file:", "data:")) or wrong.append(r.url))
    page.on("console", lambda m: wrong.append(m.text))
    page.on("pageerror", lambda e: wrong.append(str(e)))
    def open_it(name, width):
        page.set_viewport_size({"width": width, "height": 1200})
        page.goto((folder/name).as_uri())
        return page
    yield open_it
    page.close()
    assert not wrong


@pytest.mark.browser
def test_in_a_browser(folder, open_site, shots):
    most = sorted(NOTEBOOKS, key=lambda n: prose(NOTEBOOKS[n]).count("$"))[-1]
    for width in (1280, 420):
        page = open_site("index.html", width)
        page.screenshot(path=shots/f"site_index_{width}.png")
        page.locator(f"nav a[href='{most}']").click()
        page.wait_for_url((folder/most).as_uri())
        boxes = page.locator("math").evaluate_all(
            "all => all.map(m => m.getBoundingClientRect()).map(b => Math.min(b.width, b.height))"
        )
        assert boxes and min(boxes) > 4
        assert page.locator("img").evaluate_all(
            "all => all.every(i => i.naturalWidth && i.width <= i.parentElement.clientWidth)"
        )
        assert page.evaluate("document.documentElement.scrollWidth") == width
        page.screenshot(path=shots/f"site_formulas_{width}.png")


@pytest.mark.browser
@pytest.mark.parametrize("name", [n for n in NOTEBOOKS if live(NOTEBOOKS[n])])
def test_explorers_move(open_site, name, shots):
    "Every control of every explorer, on a phone; nothing below it jumps when its script starts"
    page = open_site(name, 360)
    page.wait_for_function("document.querySelectorAll('.kdc-ready').length "
                           "=== document.querySelectorAll('.kdc-page').length")
    assert page.locator(".kdc-page").count() == len(live(NOTEBOOKS[name]))
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    for explorer in page.locator(".kdc-page").all():
        heights = {explorer.bounding_box()["height"]}
        for control in explorer.locator("[data-texts]").all():
            before = explorer.locator(".kdc-panels").inner_html()
            if control.evaluate("e => e.tagName") == "SELECT": control.select_option(index=1)
            else: control.press("End" if control.input_value() == "0" else "Home")
            told = explorer.locator(".kdc-refusal").inner_text()
            assert explorer.locator(".kdc-panels").inner_html() != before or told
            if not told: heights.add(explorer.bounding_box()["height"])
            explorer.get_by_role("button", name="reset").click()
        assert len(heights) == 1
    page.screenshot(path=shots/f"site_{Path(name).stem}_360.png", full_page=True)


@pytest.mark.browser
def test_words_are_found(folder, open_site):
    page = open_site("calibration/02_metrics.html", 1280)
    field = page.get_by_role("searchbox")
    field.fill("Theorem 1 cosine")
    field.press("Enter")
    page.locator("#found a", has_text="What does a linear student inherit?").first.click()
    page.wait_for_url("**/studies/theorems.html*")
    page.goto((folder/"search.html").as_uri() + "?q=xyzzy<b>")
    assert page.locator("#found").inner_text() == "0 sections with xyzzy<b>"
    page.goto((folder/"search.html").as_uri())
    assert page.locator("#found").inner_text() == "Nothing was asked for"
