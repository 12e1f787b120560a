"""The pages that quote a notebook: how they are written, and report.tex, README.md and the notebooks as committed."""

import json
import re
import tomllib
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from packaging.version import Version

from mixer.records import RESULTS
from mixer.reporting import figures
from mixer.reporting import pages as report
from mixer.reporting.pages import Pages, pages_of
from mixer.system.files import PROJECT

TEX = (PROJECT / "report" / "report.tex").read_text()
NOTEBOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))


@pytest.fixture
def pages(tmp_path) -> Pages:
    return pages_of(tmp_path)


def test_only_the_projects_own_records_get_onto_its_pages(tmp_path, monkeypatch):
    monkeypatch.chdir(PROJECT / "notebooks")
    assert pages_of("../results") == pages_of(RESULTS)
    assert pages_of(RESULTS).own and pages_of(RESULTS).figures == figures.FIGURES
    others = pages_of(tmp_path)
    assert not others.own
    assert all(tmp_path in place.parents for place in (others.figures, others.generated, others.readme))


def test_writes_numbers_as_macros(pages):
    pages.numbers("numbers", {"best": "89.89%", "name": "cpu_1 & 2"})
    macros = (pages.generated / "numbers.tex").read_text().splitlines()
    assert macros == [r"\newcommand{\best}{89.89\,\%}", r"\newcommand{\name}{cpu\_1 \& 2}"]
    with pytest.raises(ValueError, match="'top_1' cannot be the name of a macro"):
        pages.numbers("numbers", {"top_1": "1"})


FRAME = pd.DataFrame({"run": ["a_b", "c-d"], "gain": [0.0123, -0.02], "epoch": [40, None]})
FORMATS = {"gain": "{:+.1%}", "epoch": "{:.0f}"}


def test_writes_a_frame_as_a_booktabs_table(pages):
    pages.table("gains", FRAME, FORMATS)
    assert (pages.generated / "gains.tex").read_text().splitlines() == [
        r"\begin{tabular}{lrr}",
        r"\toprule",
        r"run & gain & epoch \\",
        r"\midrule",
        r"a\_b & +1.2\,\% & 40 \\",
        r"c-d & −2.0\,\% & – \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_writes_a_frame_into_the_readme_and_leaves_the_rest(pages):
    table = "| run | gain | epoch |\n| --- | --- | --- |\n| a_b | +1.2 % | 40 |\n| c-d | −2.0 % | – |\n"
    pages.block("gains", FRAME, FORMATS)
    assert pages.readme.read_text() == f"<!-- gains -->\n{table}<!-- end of gains -->\n"
    pages.readme.write_text("Before 5%.\n<!-- gains -->\nold\n<!-- end of gains -->\n<!-- x -->\nAfter.")
    pages.block("gains", FRAME, FORMATS)
    assert pages.readme.read_text() == f"Before 5%.\n<!-- gains -->\n{table}<!-- end of gains -->\n<!-- x -->\nAfter."


@pytest.mark.parametrize("text", ["", "<!-- gains -->\n", "<!-- end of gains -->\n<!-- gains -->\n"])
def test_rejects_a_readme_without_marks(pages, text):
    pages.readme.write_text(text)
    with pytest.raises(ValueError, match="has no line <!-- gains --> with <!-- end of gains --> after it"):
        pages.block("gains", FRAME)
    assert pages.readme.read_text() == text


def test_saves_a_figure_and_shows_it_with_its_text_alternative(pages, monkeypatch):
    shown = []
    monkeypatch.setattr(report, "display", lambda figure, metadata: shown.append(metadata))
    with figures.drawing(1) as figure:
        pages.figure("empty", figure, "Nothing.")
    assert shown == [{"image/png": {"alt": "Nothing."}}]
    assert sorted(path.name for path in pages.figures.iterdir()) == ["empty.pdf", "empty.png"]


# What is committed

# Settings of the coursework and of the plan. (That those called the best are the best is for the notebooks to assert.)
VALUE = r"(0\.0?01|0\.1|0|256|512|2|4|7|14)\b"
SETTING = rf"(rate|dropout|batch|batches|patch|patches|those)( of| size| &| with probability)* {VALUE}"
SETTING += rf"((,| and| or) {VALUE})*"
GIVEN = r"""60,000 training and 10,000 test images
$28 \times 28$ grey pixels
eight parameter sets for 60 epochs
two learning rates (0.01 and 0.001)
0.01 or 0.001, constant
0 or 0.1, after GELU
& 256 or 512 \\
epochs & 60 &
0.001 is its usual learning rate
the range from 0 to 1
variance $1/\text
all but 5,000 of the training images
5,000 images do not rank
60 epochs are enough
within 0.1
1, 2, 4, 8 and 16 blocks
divided by 255
asked for 93.0\,\%"""


def prose() -> str:
    """The text of report.tex on one line, without comments, preamble and what is set from files."""
    text = re.sub(r"(?m)^%.*\n", "", TEX).partition(r"\begin{document}")[2]
    commands = r"label|\w*ref|cite\w|input|includegraphics|bibliography\w*|begin|end|setlength|vspace"
    return " ".join(re.sub(rf"\\({commands})(\[[^]]*\])?{{[^}}]*}}({{[^}}]*}})?", "", text).split())


def test_no_result_is_typed_into_the_report_by_hand():
    before, _, text = prose().partition(r"\section{Architecture}")
    text = before + text.partition(r"\section{Experiments}")[2]
    for given in GIVEN.splitlines():
        assert given in text, given
        text = text.replace(given, "")
    text = re.sub(SETTING, "", text, flags=re.IGNORECASE)
    text = re.sub(r"95\\,\\%|(Fig\.~|\bC)\d|b?float\d+|\d+(\.\d+)?(pt|em|mm)|width=\S+", "", text)
    assert [typed[0] for typed in re.finditer(r".{0,40}\d.{0,40}", text)] == []


def test_the_report_uses_every_macro_and_finds_every_file():
    generated = {path.stem: path.read_text() for path in (PROJECT / "report" / "generated").iterdir()}
    assert set(generated) == set(re.findall(r"\\input{generated/(\w+)}", TEX))
    defined = re.findall(r"\\newcommand{\\(\w+)}", "".join(generated.values()))
    assert len(defined) > 30
    assert [name for name in defined if not re.search(rf"\\{name}(?![A-Za-z])", TEX)] == []
    assert set(re.findall(r"\\includegraphics\[[^]]*\]{(\w+)}", TEX)) <= {p.stem for p in figures.FIGURES.glob("*.pdf")}


def test_generated_files_are_fit_for_latex():
    for path in (PROJECT / "report" / "generated").iterdir():
        assert not re.search(r"(?<!\\)[%#]|nan|NaN|<NA>|(?<=[&{ ])-\d", path.read_text()), path.name


def test_percent_and_thousands_have_one_style():
    cells = [cell for path in NOTEBOOKS for cell in notebook(path).cells if cell.cell_type == "markdown"]
    for text in [(PROJECT / "README.md").read_text(), *(cell.source for cell in cells)]:
        text = re.sub(r"```.*?```|`[^`]*`|\$[^$]+\$|\(http[^)]*\)", "", text, flags=re.DOTALL)
        assert not re.search(r"\d%|\d{2}\d{3}(?!\d)", text), re.search(r".*(\d%|\d{2}\d{3}(?!\d)).*", text)[0]


def test_exact_and_lower_bounds_name_the_same_packages():
    exact = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (PROJECT / "requirements.txt").read_text(), re.MULTILINE))
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    lower = dict(requirement.split(">=") for requirement in project["dependencies"])
    assert list(lower) == list(exact) and all(Version(lower[name]) <= Version(exact[name]) for name in exact)


# The notebooks


def notebook(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, 4)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebooks_show_no_errors_and_describe_their_figures(path):
    outputs = [output for cell in notebook(path).cells for output in cell.get("outputs", [])]
    assert outputs and path.stat().st_size < 1_000_000
    for output in outputs:
        assert output.output_type != "error" and output.get("name") != "stderr"
        data = output.get("data", {})
        assert not any("widget" in kind for kind in data)
        assert "image/png" not in data or len(output.metadata["image/png"]["alt"]) > 20


def run(parameters: str, start: Path = PROJECT, name: str = "experiments", last: str | None = None) -> None:
    """Run a notebook, without its live training, as papermill does: with a cell of parameters after that tagged so."""
    book = notebook(PROJECT / "notebooks" / f"{name}.ipynb")
    (place,) = [i for i, cell in enumerate(book.cells) if "parameters" in cell.metadata.get("tags", [])]
    book.cells.insert(place + 1, nbformat.v4.new_code_cell(parameters))
    end = next((i for i, cell in enumerate(book.cells, start=1) if cell.id == last), None)
    book.cells = [cell for cell in book.cells[:end] if cell.id not in ("live", "live-facts")]
    NotebookClient(book, timeout=300, resources={"metadata": {"path": str(start)}}).execute()


@pytest.fixture
def pages_untouched():
    """Fails a test that writes to the project's pages."""
    theirs = [*figures.FIGURES.iterdir(), *(PROJECT / "report" / "generated").iterdir(), PROJECT / "README.md"]
    before = {path: path.stat().st_mtime_ns for path in theirs}
    yield
    assert {path: path.stat().st_mtime_ns for path in theirs} == before


def test_trains_and_draws_another_grid_in_another_folder(tmp_path, pages_untouched):
    parameters = f"results, train_missing, lrs, dropouts = {str(tmp_path / 'own')!r}, True, [0.003, 0.01], [0.2]"
    parameters += "\nbatch_sizes, seeds, num_epochs, limit = [128], [0, 1], 1, 256"
    run(parameters)
    made = {str(path.relative_to(tmp_path / "own")) for path in (tmp_path / "own").rglob("*.*")}
    assert {"figures/fig2_test_accuracy.pdf", "figures/confusion.png", "generated/results.tex", "tables.md"} <= made
    assert len(list((tmp_path / "own").glob("lr*.json"))) == 4
    assert json.loads(next((tmp_path / "own").glob("lr*.json")).read_text())["config"]["limit"] == 256


def test_keeps_a_part_of_the_projects_records_off_its_pages(pages_untouched):
    run("dropouts, seeds = [0.1], [0]")
    run("seeds = [1]", name="questions")
    run("seeds, fewer_seeds = [1], [1]", name="recipe")


def test_rejects_a_folder_without_the_runs_in_one_sentence(tmp_path):
    with pytest.raises(CellExecutionError) as stop:
        run(f"results = {str(tmp_path)!r}", PROJECT / "notebooks", last="setup")
    (sentence,) = [line for line in stop.value.evalue.splitlines() if line]
    assert sentence.startswith(f"The folder {tmp_path} lacks 24 of the 24 runs, lr0.01_dropout0_batch256_seed0 first: ")
