"""Tables in LaTeX: every sign is a text's own."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from layerfed.report.markup import TEX, Table, tex


@given(st.text("ab" + "".join(TEX)))
def test_latex_reads_back_what_was_written(text: str) -> None:
    signs = {shown: sign for sign, shown in TEX.items()}
    pattern = "|".join(re.escape(shown) for shown in sorted(signs, key=len, reverse=True))
    written = tex(text)
    assert re.sub(pattern, lambda found: signs[found[0]], written) == text
    assert not re.search(r"(?<!\\)[&%#_]", written)


def test_a_table_is_for_booktabs() -> None:
    table = Table(
        ["strategy", "R = 1 & more"],
        [["top_k", "**55.00 ± 7.07**"], ["100% {a}", "-0.5 to +1.5"], ["[x]", "–"]],
        "Scores_1",
    )
    assert table.latex().splitlines() == [
        r"\begin{table}",
        r"\centering",
        r"\caption{Scores\_1}",
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"strategy & R = 1 \& more \\",
        r"\midrule",
        r"top\_k & \textbf{55.00 $\pm$ 7.07} \\",
        r"100\% \{a\} & $-$0.5 to +1.5 \\",
        r"{}[x] & -- \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    assert table.markdown().splitlines()[2] == "| top_k | **55.00 ± 7.07** |"
