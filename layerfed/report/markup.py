"""A table that is written in Markdown and in LaTeX."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Table", "tex"]

TEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "·": r"$\cdot$",
    "×": r"$\times$",
    "–": "--",
    "…": r"\ldots{}",
    "λ": r"$\lambda$",
    "α": r"$\alpha$",
    "ε": r"$\varepsilon$",
}


def tex(text: str) -> str:
    """Return a text in which no sign has a meaning for LaTeX."""
    return "".join(TEX.get(sign, sign) for sign in text)


@dataclass(frozen=True)
class Table:
    """Texts in rows and columns; a text in `**` is bold.

    Attributes
    ----------
    header : Sequence[str]
    lines : Sequence[Sequence[str]]
    about : str
        What the table shows, in a sentence or two.
    """

    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    about: str = ""

    def __bool__(self) -> bool:
        return bool(self.lines)

    def markdown(self) -> str:
        """Return the table in Markdown, without what it shows."""

        def line(cells: Iterable[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

        return "\n".join(
            [line(self.header), "|" + "---|" * len(self.header), *map(line, self.lines)]
        )

    def latex(self) -> str:
        """Return the table as a float for the package booktabs, with what it shows as its caption."""

        def line(cells: Iterable[str]) -> str:
            return " & ".join(map(_cell, cells)) + r" \\"

        return "\n".join(
            [
                r"\begin{table}",
                r"\centering",
                *([rf"\caption{{{tex(self.about)}}}"] if self.about else []),
                rf"\begin{{tabular}}{{l{'r' * (len(self.header) - 1)}}}",
                r"\toprule",
                line(self.header),
                r"\midrule",
                *map(line, self.lines),
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
            ]
        )


def _cell(text: str) -> str:
    bold = re.fullmatch(r"\*\*(.+)\*\*", text)
    # A number's minus sign is not a hyphen.
    text = re.sub(r"(?<![\w.])-(?=\d)", "−", bold[1] if bold else text)
    shown = tex(text).replace("−", "$-$")
    # A row that begins with a bracket would be read as the option of the line break before it.
    shown = f"{{}}{shown}" if shown.startswith(("[", "*")) else shown
    return rf"\textbf{{{shown}}}" if bold else shown
