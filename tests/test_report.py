"""The committed report, README and the files that notebooks published for them."""

import re
import tomllib

import nbformat
from packaging.version import Version

from mixer.reporting import figures
from mixer.system.files import PROJECT

TEX = re.sub(r"(?m)^%.*\n", "", (PROJECT / "report" / "report.tex").read_text())
README = (PROJECT / "README.md").read_text()
GENERATED = {path.stem: path.read_text() for path in (PROJECT / "report" / "generated").iterdir()}
SOURCES = {
    path.stem: [cell.source for cell in nbformat.read(path, 4).cells]
    for path in sorted((PROJECT / "notebooks").glob("*.ipynb"))
}
REPORTED = {"89.17", "89", "93.0", "80", "0.1", "95"}  # by the coursework; of plans; of intervals


def test_every_value_table_and_figure_that_the_report_quotes_is_published():
    defined = set(re.findall(r"\\csname (.*?)\\endcsname", "".join(GENERATED.values())))
    cells = re.findall(r"\\(?:val|more|less){([^}#]*)}{([^}#]*)}{([^}#]*)}", TEX)
    quoted = {"/".join(cell) for cell in cells}
    assert len(quoted) > 30 and quoted <= defined, quoted - defined
    loaded = set(re.findall(r"\\published{([\w-]+)}", TEX))
    assert {value.partition("/")[0] for value in quoted} <= loaded
    assert set(re.findall(r"\\input{generated/([\w-]+)}", TEX)) <= GENERATED.keys()
    assert set(re.findall(r"\\includegraphics\[[^]]*\]{(\w+)}", TEX)) <= {p.stem for p in figures.FIGURES.glob("*.pdf")}


def test_nothing_stale_is_among_the_published_files():
    sources = "\n".join(source for cells in SOURCES.values() for source in cells)
    published = set(re.findall(r'publish\(\s*"(\w+)"', sources))
    assert {name.removesuffix("-values") for name in GENERATED} <= published
    assert {path.stem for path in figures.FIGURES.iterdir()} <= published


def test_no_accuracy_or_difference_is_typed_into_the_report():
    typed = re.findall(r"(-?\d+(?:\.\d+)?)(?:\\pc|\\,\\%| points)", TEX.partition(r"\begin{document}")[2])
    assert set(typed) <= REPORTED


def test_published_files_are_fit_for_latex():
    for name, text in GENERATED.items():
        assert not re.search(r"(?<!\\)[%#]|nan|NaN|<NA>|(?<=[&{ ])-\d", re.sub(r"\\csname.*?\\endcsname", "", text)), (
            name
        )


def test_percent_and_thousands_have_one_style():
    for text in [README, *(source for cells in SOURCES.values() for source in cells if not source.startswith("%"))]:
        text = re.sub(r"```.*?```|`[^`]*`|\(http[^)]*\)|\"[^\"]*\"", "", text, flags=re.DOTALL)
        assert not re.search(r"\d%(?!\w)", text), re.search(r".*\d%.*", text)[0]


def test_the_map_in_the_readme_names_every_part_of_the_core():
    for path in (PROJECT / "mixer").iterdir():
        if path.name not in ("__init__.py", "__pycache__"):
            assert path.name in README, path.name


def test_exact_and_lower_bounds_name_the_same_packages():
    exact = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (PROJECT / "requirements.txt").read_text(), re.MULTILINE))
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    lower = dict(requirement.split(">=") for requirement in project["dependencies"])
    assert list(lower) == list(exact) and all(Version(lower[name]) <= Version(exact[name]) for name in exact)
    assert f"version: {project['version']}" in (PROJECT / "CITATION.cff").read_text()
    assert f"Version {project['version']}" in TEX
