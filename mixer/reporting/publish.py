r"""Publishes a notebook's tables and figures to README and report.

    publish = Publisher(results)
    publish("results", frame, formats)                       a table: returned as printed
    publish("fig1_loss", figure, alt="Falling curves.")      a figure: shown, and saved as PDF and PNG

A table becomes ``results.tex`` (booktabs) for the report, and ``results-values.tex``, where report.tex finds each cell
as ``\val{results}{row}{column}``. It also replaces the block between ``<!-- results -->`` and
``<!-- end of results -->`` in README.md and in the model card, where there is one. Records in your own folder are
published inside that folder.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd
from IPython.display import display
from matplotlib.figure import Figure

from mixer.records import RESULTS
from mixer.reporting import figures
from mixer.system.files import IN_CHECKOUT, PROJECT, write_whole

PAGES = "README.md", "mixer/weights/README.md"
Formats = Mapping[str, str | Callable[[object], str]]  # column, or level of the index -> "{:.3f}" or a function


class Publisher:
    """Writes tables and figures to the project's pages, or into the folder of other records.

    own: whether the pages are the project's. Every call raises OSError if a file cannot be written.
    """

    def __init__(self, results: Path | str = RESULTS):
        folder = Path(results)
        self.own = IN_CHECKOUT and folder.resolve() == RESULTS.resolve()
        self.figures = figures.FIGURES if self.own else folder / "figures"
        self.generated = PROJECT / "report" / "generated" if self.own else folder / "generated"

    def __call__(
        self, name: str, result: pd.DataFrame | Figure, formats: Formats | None = None, *, alt: str = ""
    ) -> pd.DataFrame | None:
        """Publish a table and return it as printed, or save a figure and show it with its alternative text."""
        if isinstance(result, Figure):
            figures.save(result, name, self.figures)
            display(result, metadata={"image/png": {"alt": alt}})
            return None
        table = printed(result, formats)
        write_whole(self.generated / f"{name}.tex", _tabular(result, table).encode())
        write_whole(self.generated / f"{name}-values.tex", _values(name, table).encode())
        if self.own:
            for page in PAGES:
                _write_block(PROJECT / page, name, table)
        return table


def printed(frame: pd.DataFrame, formats: Formats | None = None) -> pd.DataFrame:
    """Format a frame as text: two decimals by default, a true minus sign, a dash for missing values."""
    formats = formats or {}

    def word(column: object, value: object) -> str:
        if pd.isna(value):
            return "–"
        if isinstance(value, bool):
            return "yes" if value else "no"
        form = formats.get(column, "{:.2f}" if isinstance(value, float) else "{:,}" if isinstance(value, int) else "{}")
        text = form(value) if callable(form) else form.format(value)
        return text if isinstance(value, str) else text.replace("-", "−")

    columns = [" ".join(map(str, c)).strip() if isinstance(c, tuple) else str(c) for c in frame.columns]
    cells = [[word(c, v) for v in frame[c].tolist()] for c in frame.columns]
    table = pd.DataFrame(dict(zip(columns, cells, strict=True)), index=frame.index)
    levels = [[word(n, v) for v in frame.index.get_level_values(i)] for i, n in enumerate(frame.index.names)]
    names = frame.index.names
    index = pd.MultiIndex.from_arrays(levels, names=names) if len(levels) > 1 else pd.Index(levels[0], name=names[0])
    return table.set_axis(index)


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def points(difference: float) -> str:
    """Format a difference of accuracies, in percentage points."""
    return f"{difference:+.2f}"


def _tabular(frame: pd.DataFrame, table: pd.DataFrame) -> str:
    """A booktabs table with numbers right-aligned and words left-aligned."""
    kinds = [*(frame.index.get_level_values(i).dtype for i in range(frame.index.nlevels)), *frame.dtypes]
    align = "".join("r" if pd.api.types.is_numeric_dtype(kind) else "l" for kind in kinds)
    whole = _with_index(table).map(_latex).rename(columns=_latex)
    return whole.style.hide(axis="index").to_latex(hrules=True, column_format=align)


def _values(name: str, table: pd.DataFrame) -> str:
    lines = []
    for row, cells in zip(table.index, table.to_numpy(), strict=True):
        row = ", ".join(row) if isinstance(row, tuple) else row
        for column, cell in zip(table.columns, cells, strict=True):
            key = f"{name}/{as_key(row)}/{as_key(column)}"
            lines.append(f"\\expandafter\\def\\csname {key}\\endcsname{{{_latex(cell)}}}\n")
    return "".join(lines)


def as_key(text: str) -> str:
    r"""Turn the name of a row or column into a key for ``\val``: letters, digits and ``.,+-`` only."""
    return " ".join(re.sub(r"[^A-Za-z0-9.,+ -]", "", text.replace("−", "-").replace("–", "-")).split())


def _write_block(page: Path, name: str, table: pd.DataFrame) -> None:
    marks = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    before, start, rest = old.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if start and end:
        whole = _with_index(table)
        rows = [whole.columns, ["---"] * whole.shape[1], *whole.to_numpy()]
        block = "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)
        write_whole(page, f"{before}{start}{block}{end}{after}".encode())


def _with_index(table: pd.DataFrame) -> pd.DataFrame:
    """Turn the index into columns; an unnamed level gets an empty header."""
    names = [name or "" for name in table.index.names]
    return table.rename_axis(names).reset_index()


def _latex(text: str) -> str:
    """Escape LaTeX's special characters (×, → and − are declared in report.tex)."""
    escaped = re.sub(r"[%&_#$]", r"\\\g<0>", str(text))
    escaped = escaped.replace("<", r"\textless{}").replace(">", r"\textgreater{}")
    return re.sub(r"(?<=\d) ?\\%", r"\\,\\%", escaped)
