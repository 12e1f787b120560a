"""From a notebook to the pages that quote it: figures, LaTeX and README.md.

    pages = pages_of(results)
    pages.figure("fig1_loss", figures.loss(histories), alt="Falling curves.")     figures/fig1_loss.pdf and .png
    pages.numbers("numbers", {"bestAccuracy": f"{best:.2%}"})                     \\bestAccuracy in numbers.tex
    pages.table("results", frame, formats)                                        results.tex, a booktabs tabular
    pages.block("results", frame, formats)                                        between two marks of README.md

Only the project's own records get onto the project's pages; those of another folder have pages beside them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from IPython.display import display
from matplotlib.figure import Figure

from mixer.records import RESULTS
from mixer.reporting import figures
from mixer.system.files import IN_CHECKOUT, PROJECT, write_whole

Formats = Mapping[str, str]  # column -> how its values are written, like "{:.2f}"


@dataclass(frozen=True)
class Pages:
    """Where a notebook's results go; ``own`` says whether they are the project's. Every method raises OSError."""

    own: bool
    figures: Path
    generated: Path  # of LaTeX
    readme: Path

    def figure(self, name: str, figure: Figure, alt: str) -> None:
        """Show a figure with its text alternative and save it as PDF and PNG."""
        figures.save(figure, name, self.figures)
        display(figure, metadata={"image/png": {"alt": alt}})

    def numbers(self, name: str, numbers: Mapping[str, str]) -> None:
        """Write ``name.tex`` with a macro for each number. Raises ValueError where TeX does not allow its name."""
        for macro in numbers:
            if not re.fullmatch("[A-Za-z]+", macro):
                raise ValueError(f"{macro!r} cannot be the name of a macro: use letters only")
        lines = [f"\\newcommand{{\\{macro}}}{{{_latex(value)}}}\n" for macro, value in numbers.items()]
        write_whole(self.generated / f"{name}.tex", "".join(lines).encode())

    def table(self, name: str, frame: pd.DataFrame, formats: Formats | None = None) -> None:
        """Write ``name.tex``, a booktabs tabular: numbers to the right, words to the left."""
        align = "".join("r" if pd.api.types.is_numeric_dtype(dtype) else "l" for dtype in frame.dtypes)
        text = _as_written(frame, formats).map(_latex).rename(columns=_latex)
        tabular = text.style.hide(axis="index").to_latex(hrules=True, column_format=align)
        write_whole(self.generated / f"{name}.tex", tabular.encode())

    def block(self, name: str, frame: pd.DataFrame, formats: Formats | None = None) -> None:
        """Write a table into the README, between ``<!-- name -->`` and ``<!-- end of name -->``.

        Raises ValueError where the README lacks these marks; where there is no README, one is begun.
        """
        text = _as_written(frame, formats)
        rows = [text.columns, ["---"] * text.shape[1], *text.to_numpy()]
        table = re.sub(r"(?<=\d)%", " %", "".join(f"| {' | '.join(row)} |\n" for row in rows))
        marks = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
        old = self.readme.read_text(encoding="utf-8") if self.readme.exists() else "".join(marks)
        before, start, rest = old.partition(marks[0])
        _, end, after = rest.partition(marks[1])
        if not end:
            raise ValueError(f"{self.readme} has no line {marks[0].strip()} with {marks[1].strip()} after it")
        write_whole(self.readme, f"{before}{start}{table}{end}{after}".encode())


def pages_of(results: Path | str) -> Pages:
    """The project's pages for its own records; for those of another folder, pages inside that folder."""
    results = Path(results)
    if IN_CHECKOUT and results.resolve() == RESULTS.resolve():
        return Pages(True, figures.FIGURES, PROJECT / "report" / "generated", PROJECT / "README.md")
    return Pages(False, results / "figures", results / "generated", results / "tables.md")


def _as_written(frame: pd.DataFrame, formats: Formats | None) -> pd.DataFrame:
    """The frame as it is printed: numbers with a true minus, and a dash for what is missing."""
    formats = formats or {}

    def written(name: str, value: object) -> str:
        if pd.isna(value):
            return "–"
        text = formats.get(name, "{}").format(value)
        return text if isinstance(value, str) else text.replace("-", "−")

    return pd.DataFrame({name: [written(name, value) for value in frame[name]] for name in frame.columns})


def _latex(text: str) -> str:
    """Escape what LaTeX would read as its own (×, → and − are declared in report.tex)."""
    escaped = re.sub(r"[%&_#$]", r"\\\g<0>", text)
    return re.sub(r"(?<=\d)\\%", r"\\,\\%", escaped)
