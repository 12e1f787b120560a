"""The notebooks as committed, and run again with a grid of one's own."""

import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from mixer.reporting import figures
from mixer.reporting.publish import PAGES
from mixer.system.files import PROJECT

NOTEBOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))


def notebook(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, 4)


def texts(cell: nbformat.NotebookNode) -> str:
    """What a cell's outputs show as text."""
    shown = []
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        shown += [output.get("text", ""), data.get("text/markdown", ""), data.get("text/plain", "")]
        shown.append(re.sub(r"<[^>]+>", " ", data.get("text/html", "")))
    return " ".join(shown)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_are_executed_without_errors_and_describe_their_figures(path):
    book = notebook(path)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    assert path.stat().st_size < 1_000_000
    for output in (output for cell in code for output in cell.outputs):
        assert output.output_type != "error" and output.get("name") != "stderr"
        data = output.get("data", {})
        assert not any("widget" in kind for kind in data)
        assert "image/png" not in data or len(output.metadata["image/png"]["alt"]) > 20


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_are_short_enough_to_read(path):
    lines = [len(cell.source.splitlines()) for cell in notebook(path).cells if cell.cell_type == "code"]
    assert sum(lines) <= 350 and sorted(lines)[-2] <= 25
    assert max(lines) <= (25 if path.stem != "exercise" else 45)  # the exercise has the whole model in one cell


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_verdict_quotes_only_numbers_that_stand_above_it(path):
    above = ""
    for cell in notebook(path).cells:
        if "verdict" in cell.metadata.get("tags", []):
            assert_numbers_stand(cell.source, above)
        above += " " + texts(cell)


def assert_numbers_stand(verdict: str, shown: str) -> None:
    known = [float(number.replace(",", "")) for number in NUMBER.findall(shown.replace("−", "").replace("-", " "))]
    text = re.sub(r"\[[^]]*\]\([^)]*\)|`[^`]*`|\b[A-Z]+\d+\b", " ", verdict.replace("−", "").replace("-", " "))
    for number in NUMBER.findall(text):
        decimals = len(number.partition(".")[2])
        value = float(number.replace(",", ""))
        assert any(round(x, decimals) == value for x in known), f"{number} stands in no output above: {verdict}"


NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?<!,)")


def test_finds_a_number_in_a_verdict_that_no_output_shows():
    assert_numbers_stand("By 1.32 points, from 88.8 to 90 % (C2).", "effect 1.324, 88.75 90.05")
    with pytest.raises(AssertionError, match=r"1\.33 stands in no output above"):
        assert_numbers_stand("By 1.33 points.", "1.324")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_link_to_files_that_exist(path):
    sources = " ".join(cell.source for cell in notebook(path).cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", sources):
        assert (path.parent / target).exists(), target


def run(parameters: str, start: Path = PROJECT, last: str | None = None) -> None:
    """Run experiments.ipynb without its live training, with parameters in a cell of their own, as papermill does."""
    book = notebook(PROJECT / "notebooks" / "experiments.ipynb")
    (place,) = [i for i, cell in enumerate(book.cells) if "parameters" in cell.metadata.get("tags", [])]
    book.cells.insert(place + 1, nbformat.v4.new_code_cell(parameters))
    end = next((i for i, cell in enumerate(book.cells, start=1) if cell.id == last), None)
    book.cells = [cell for cell in book.cells[:end] if cell.id != "live"]
    NotebookClient(book, timeout=300, resources={"metadata": {"path": str(start)}}).execute()


def test_trains_and_draws_another_grid_in_another_folder(tmp_path):
    theirs = [*figures.FIGURES.iterdir(), *(PROJECT / "report" / "generated").iterdir()]
    theirs += [PROJECT / page for page in PAGES]
    before = {path: path.stat().st_mtime_ns for path in theirs}
    parameters = f"results, train_missing, lrs, dropouts = {str(tmp_path / 'own')!r}, True, [0.003, 0.01], [0.2]"
    run(parameters + "\nbatch_sizes, seeds, num_epochs, limit = [128], [0, 1], 1, 256")
    made = {str(path.relative_to(tmp_path / "own")) for path in (tmp_path / "own").rglob("*.*")}
    assert {"figures/fig2_test_accuracy.pdf", "generated/results.tex"} <= made
    records = [json.loads(path.read_text()) for path in (tmp_path / "own").glob("lr*.json")]
    assert [record["config"]["limit"] for record in records] == 4 * [256]
    assert {path: path.stat().st_mtime_ns for path in theirs} == before


def test_rejects_a_folder_without_the_runs_in_one_sentence(tmp_path):
    with pytest.raises(CellExecutionError) as stop:
        run(f"results = {str(tmp_path)!r}", PROJECT / "notebooks", last="grid")
    (sentence,) = [line for line in stop.value.evalue.splitlines() if line]
    assert sentence.startswith(f"24 of the 24 runs are missing in {tmp_path}, lr0.001_dropout0_batch256_seed0 first: ")
