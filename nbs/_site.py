"""The notebooks, as they are, as web pages that load nothing: `python nbs/_site.py [FOLDER]`, or _site.

A page is one file: style, pictures, formulas (MathML) and explorers are in it. Its frame is _site.html,
which also forbids it every request. Cells that say `#| live` are run, so that their explorers have sliders.
One page more, search.html, holds the text of all.
"""
import ast
import os
import posixpath
import re
import sys
import tempfile
import unicodedata
from base64 import b64encode
from dataclasses import dataclass
from hashlib import sha256
from html import escape, unescape
from itertools import groupby
from pathlib import Path
from string import Template
from xml.etree import ElementTree

import nbformat
from joblib import Parallel, cpu_count, delayed
from latex2mathml.converter import convert_to_element
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name

from _build import NBS, ROOT, directives, notebooks

from kdc_nb.drawings import pack_json, read_asset

FRAME = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
# under nbs: what was found, then the modules, each on those before it
FOLDERS = ("studies", "", "calibration", "training", "experiments", "analysis", "paper")
MARKER = ".made-by-make-site" # a folder that holds this file may be replaced
PYTHON, COLOURS = get_lexer_by_name("ipython3"), HtmlFormatter(style="vs")
DARK = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
STYLE = "\n".join([COLOURS.get_style_defs(".highlight"),
                   f"@media (prefers-color-scheme: dark) {{ {DARK} }}", read_asset("explorer.css")])
LETTERS = {(alphabet, unicodedata.normalize("NFKC", c)): c
           for alphabet in ("double-struck", "script") for c in map(chr, range(0x2100, 0x1D800))
           if re.fullmatch(rf"(MATHEMATICAL )?{alphabet} (CAPITAL|SMALL|DIGIT) \w+",
                           unicodedata.name(c, ""), re.I)}


# Formulas and text

def mend(before, node, after) -> None:
    """What browsers leave to the writer of a formula: other alphabets, room around names, signs,
    bars, slashes, limits of sums
    """
    node.text = LETTERS.get((node.get("mathvariant"), node.text), node.text)
    if node.tag == "mi" and re.fullmatch("[a-z]{2,}", node.text):
        room = ["0" if n is None or n.tag == "mo" and n.text not in {*")]"} else ".17em"
                for n in (before, after)]
        node.tag, node.attrib = "mo", {"lspace": room[0], "rspace": room[1]}
    if node.text == "\N{MINUS SIGN}" and before is not None and before.text in {*"([,=≈<>≤≥∝→"}:
        node.set("form", "prefix")
    if node.text == "‖": node.attrib.setdefault("stretchy", "false")
    if node.text == "/": node.attrib = {"lspace": "0", "rspace": "0"}
    if node.tag in ("msub", "msubsup") and node[0].text == "∑":
        node.tag = node.tag.replace("sub", "under").replace("sup", "over")


def formula(tex: str, display: str) -> str:
    "LaTeX as MathML"
    math = convert_to_element(tex, display=display)
    for node in math.iter(): node.text = unescape(node.text or "")
    for row in math.iter():
        for before, node, after in zip([None, *row], row, [*row[1:], None]): mend(before, node, after)
    return ElementTree.tostring(math, encoding="unicode")


class Renderer(IPythonRenderer):
    """Markdown of the notebook `here`: formulas in MathML, headings named as JupyterLab names
    them, links to other pages
    """
    def __init__(self, here: str, names: set[str]):
        super().__init__(escape=False, embed_images=True, path=str((NBS/here).parent))
        self.folder, self.names = posixpath.dirname(here), names

    def inline_math(self, body): return formula(body, "inline")
    def block_math(self, body): return f'<span class="formula">{formula(body, "block")}</span>'
    def latex_environment(self, name, body): return self.block_math(rf"\begin{{{name}}}{body}\end{{{name}}}")
    def heading(self, text, level, **attrs):
        return f'<h{level} id="{plain(text).replace(" ", "-")}">{text}</h{level}>\n'

    def link(self, text, url, title=None):
        if re.match("[a-z]+:|#", url): return super().link(text, url, title)
        path, mark, anchor = url.partition("#")
        target = posixpath.normpath(posixpath.join(NBS.name, self.folder, path))
        if target.removeprefix(f"{NBS.name}/") in self.names:
            return super().link(text, file_name(path) + mark + anchor, title)
        return f'<span title="{target}, a file of the project">{text}</span>'


def plain(html: str) -> str: return re.sub("<[^>]+>", "", html)
def file_name(notebook: str) -> str: return notebook.removesuffix(".ipynb") + ".html"


def first(pattern: str, html: str, default: str = "") -> str:
    "What the group of a pattern finds first"
    found = re.search(pattern, html, re.S)
    return found[1] if found else default


# Cells

def output_html(output) -> str:
    "An output in its richest form; tables without the style that they bring along"
    data = output.get("data", {})
    if "text/html" in data: return re.sub("(?s)<style.*?</style>", "", data["text/html"])
    if "image/png" in data:
        return f'<img src="data:image/png;base64,{"".join(data["image/png"].split())}" alt="figure">'
    return f"<pre>{escape(output.get('text', data.get('text/plain', '')))}</pre>"


def draw_explorers(name: str) -> dict[str, str]: # by the cell's id
    "The explorers of a notebook, with sliders: the values of its live cells, which need no other cell"
    os.environ |= {"TQDM_DISABLE": "1", "MPLBACKEND": "agg"}
    from kdc_nb import all as kit
    from kdc_nb.controls import Explorer
    space, found = dict(vars(kit)), {}
    for cell in nbformat.read(NBS/name, as_version=4).cells:
        if "live" not in directives(cell): continue
        lines = ast.parse(cell.source).body
        last = lines.pop() if isinstance(lines[-1], ast.Expr) else None
        exec(compile(ast.Module(lines, []), name, "exec"), space)
        value = last and eval(compile(ast.Expression(last.value), name, "eval"), space)
        if isinstance(value, Explorer): found[cell.id] = value.html()
    return found


def cell_html(cell, markdown: MarkdownWithMath, explorers: dict[str, str]) -> str:
    "A cell as nbdev's directives want it; a formula stays on one line with the comma that follows it"
    if cell.cell_type == "markdown":
        return re.sub("(<math((?!</math>).)*</math>[,.;:?!)]+)",
                      r'<span class="whole">\1</span>', markdown.render(cell.source))
    marks = directives(cell)
    if cell.cell_type != "code" or "hide" in marks: return ""
    source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("#|"))
    code = highlight(source, PYTHON, COLOURS) if source.strip() and "echo: false" not in marks else ""
    if cell.id in explorers: return code + explorers[cell.id]
    return code + "".join(f'<div class="output">{output_html(o)}</div>\n' for o in cell.outputs)


# Pages

@dataclass
class Page:
    "A notebook in HTML"
    name: str # its path below nbs/
    body: str
    module: bool # whether a module is made from it

    @property
    def title(self) -> str: return first("<h1[^>]*>(.*?)</h1>", self.body, self.name)

    @property
    def summary(self) -> str:
        return f"<small>{first('<blockquote>.*?<p>(.*?)</p>', self.body)}</small>"*self.module

    def link(self, other: "Page") -> str:
        "A link to a page, marked where it leads to this one"
        url = posixpath.relpath(file_name(other.name), posixpath.dirname(self.name))
        return f'<a href="{url}"' + ' aria-current="page"'*(other is self) + f">{other.title}</a>"


def read_pages() -> list[Page]:
    "All notebooks in reading order: the index, the studies, the modules, floor by floor"
    paths = sorted((p.relative_to(NBS) for p in notebooks()),
                   key=lambda p: (p.stem != "index", FOLDERS.index(p.parent.name)))
    names, pages = [p.as_posix() for p in paths], []
    cells = {n: nbformat.read(NBS/n, as_version=4).cells for n in names}
    marks = {n: {d for c in cells[n] for d in directives(c)} for n in names}
    live = [n for n in names if "live" in marks[n]]
    explorers = dict(zip(live, Parallel(cpu_count())(delayed(draw_explorers)(n) for n in live)))
    for name in names:
        markdown = MarkdownWithMath(Renderer(name, set(names)))
        body = "".join(cell_html(c, markdown, explorers.get(name, {})) for c in cells[name])
        pages.append(Page(name, body, any(m.startswith("default_exp") for m in marks[name])))
    return pages


def navigation(here: Page, pages: list[Page]) -> str:
    "A field to search, links to all pages by folder and, below the one that is shown, to its sections"
    sections = re.findall('<h2 id="(.*?)">(.*?)</h2>', here.body)
    inside = "<ul>" + "".join(f'<li><a href="#{anchor}">{plain(title)}</a></li>'
                              for anchor, title in sections) + "</ul>"
    lines = [f'<form action="{posixpath.relpath("search.html", posixpath.dirname(here.name))}" role="search">'
             '<input type="search" name="q" placeholder="Search" aria-label="Search"></form>']
    for folder, group in groupby(pages, key=lambda p: posixpath.dirname(p.name)):
        lines += [f"<b>{folder or 'modules'}</b>"*(len(lines) > 1), "<ul>",
                  *(f"<li>{here.link(p)}{p.summary}{inside*(p is here)}</li>" for p in group), "</ul>"]
    return "\n".join(lines)


def page_html(here: Page, before: Page | None, after: Page | None, pages: list[Page]) -> str:
    "The whole file of a page between two others"
    left, right = f"← {here.link(before)}" if before else "", f"{here.link(after)} →" if after else ""
    title = " · ".join(dict.fromkeys(plain(p.title) for p in (here, pages[0])))
    return frame(title, here.body, read_asset("explorer.js"), navigation(here, pages), left, right)


def frame(title: str, body: str, script: str, nav: str, left: str = "", right: str = "") -> str:
    "The whole file of what is shown; of scripts, the one that is named may run"
    digest = b64encode(sha256(script.encode()).digest()).decode()
    return FRAME.substitute(title=title, style=STYLE, body=body, script=script, digest=digest,
                            left=left, right=right, nav=nav)


def search_html(pages: list[Page]) -> str:
    "A page that finds sections of all pages by their words"
    sections = []
    for p in pages:
        parts = re.split('<h2 id="(.*?)">(.*?)</h2>', re.sub("(?s)<(script|svg).*?</\\1>", "", p.body))
        for anchor, title, html in zip(["", *parts[1::3]], [p.title, *parts[2::3]], parts[::3]):
            text = " ".join(unescape(plain(html)).split())
            sections.append([file_name(p.name) + f"#{anchor}"*bool(anchor), unescape(plain(p.title)),
                             unescape(plain(title)), text])
    body = (f'<h1>Search</h1>\n<div id="found" role="status"></div>\n'
            f'<script type="application/octet-stream" id="sections">{pack_json(sections)}</script>')
    here = Page("search.html", "", module=False)
    script = read_asset("explorer.js") + (NBS/"_search.js").read_text(encoding="utf-8")
    return frame("Search", body, script, navigation(here, pages))


def build(folder: Path) -> None:
    "The site in `folder`, whole or not at all; nothing but an older site is replaced"
    if folder.exists() and not (folder/MARKER).exists() and (folder.is_file() or any(folder.iterdir())):
        sys.exit(
            f"{folder} is no site made by this command and was left as it was: name an empty or a new folder"
        )
    pages = read_pages()
    trios = zip(pages, [None, *pages], [*pages[1:], None])
    files = ({file_name(p.name): page_html(p, before, after, pages) for p, before, after in trios}
             | {"search.html": search_html(pages), MARKER: ""})
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as beside:
        new = Path(beside)/"new"
        for name, text in files.items():
            (new/name).parent.mkdir(parents=True, exist_ok=True)
            (new/name).write_text(text, encoding="utf-8")
        if folder.exists(): folder.rename(Path(beside)/"old")
        new.rename(folder)
    print(f"{len(pages)} pages: open {folder/'index.html'}")


if __name__ == "__main__": build(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT/"_site").resolve())
