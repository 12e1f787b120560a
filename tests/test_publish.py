import pandas as pd
import pytest

from mixer.records import RESULTS
from mixer.reporting import figures, publish
from mixer.reporting.publish import Publisher, as_key, p_value, points, printed

FRAME = pd.DataFrame(
    {"gain": [0.5, -0.026], "p": [0.04, 1e-9], "epoch": [40, None], "runs": [1440, 3], "set": ["a_b", "50 %"]},
    index=pd.MultiIndex.from_tuples([(0.001, 256), (0.01, 512)], names=["learning rate", "batch"]),
)
FORMATS = {"gain": points, "p": p_value, "epoch": "{:.0f}", "learning rate": "{:g}"}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project's pages in a separate folder, with a README."""
    for name in ("results", "report", "figures"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(publish, "PROJECT", tmp_path)
    monkeypatch.setattr(publish, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(figures, "FIGURES", tmp_path / "figures")
    return tmp_path


def test_shows_a_table_as_printed():
    table = printed(FRAME, FORMATS)
    assert table.loc["0.001", "256"].tolist() == ["+0.50", "0.040", "40", "1,440", "a_b"]
    assert table.loc["0.01", "512"].tolist() == ["−0.03", "< 0.001", "–", "3", "50 %"]


def test_writes_a_booktabs_table_and_every_cell_as_a_value(project):
    Publisher(project / "results")("gains", FRAME, FORMATS)
    generated = project / "report" / "generated"
    assert (generated / "gains.tex").read_text().splitlines()[2:6] == [
        r"learning rate & batch & gain & p & epoch & runs & set \\",
        r"\midrule",
        r"0.001 & 256 & +0.50 & 0.040 & 40 & 1,440 & a\_b \\",
        r"0.01 & 512 & −0.03 & \textless{} 0.001 & – & 3 & 50\,\% \\",
    ]
    assert (generated / "gains.tex").read_text().startswith(r"\begin{tabular}{rrrrrrl}")
    values = (generated / "gains-values.tex").read_text()
    assert r"\expandafter\def\csname gains/0.01, 512/gain\endcsname{−0.03}" in values
    assert values.count(r"\csname") == FRAME.size


def test_names_cells_without_what_latex_would_misread():
    assert as_key("test loss, last / lowest (%)") == "test loss, last lowest"
    assert as_key("0.01 − 0.001 × 2_3") == "0.01 - 0.001 23"


@pytest.mark.parametrize("page", publish.PAGES)
def test_writes_the_block_of_a_page_and_leaves_the_rest(project, page):
    page = project / page
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("Before 5%.\n<!-- gains -->\nold\n<!-- end of gains -->\nAfter.")
    Publisher(project / "results")("gains", FRAME[["gain"]], FORMATS)
    table = "| learning rate | batch | gain |\n| --- | --- | --- |\n| 0.001 | 256 | +0.50 |\n| 0.01 | 512 | −0.03 |\n"
    assert page.read_text() == f"Before 5%.\n<!-- gains -->\n{table}<!-- end of gains -->\nAfter."


def test_records_of_another_folder_are_published_inside_it(project, tmp_path):
    other = tmp_path / "my-results"
    publisher = Publisher(other)
    publisher("gains", FRAME, FORMATS)
    with figures.drawing(1) as figure:
        publisher("empty", figure, alt="Nothing.")
    made = sorted(path.relative_to(other).as_posix() for path in other.rglob("*.*"))
    assert made == ["figures/empty.pdf", "figures/empty.png", "generated/gains-values.tex", "generated/gains.tex"]
    assert not publisher.own and not (project / "report" / "generated").exists()
    assert Publisher(RESULTS / ".." / "results").own is False and Publisher(project / "results").own


def test_shows_a_figure_with_its_alternative_text(project, monkeypatch):
    shown = []
    monkeypatch.setattr(publish, "display", lambda figure, metadata: shown.append(metadata))
    with figures.drawing(1) as figure:
        Publisher(project / "results")("empty", figure, alt="Nothing.")
    assert shown == [{"image/png": {"alt": "Nothing."}}]
