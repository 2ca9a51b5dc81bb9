"""One HTML page of everything found in a folder: a line for each claim, then each experiment with its pictures.

The page needs nothing from elsewhere (no script, no font); pictures are the SVG files beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from emoe.bench.reproduce.experiment import NAMES, Experiment, experiment
from emoe.bench.reproduce.findings import MEANINGS, VERDICTS, Kept, Table, Verdict, read_finding
from emoe.checkpoint.whole import write_whole

PAGE = "index.html"
_MARKS: dict[Verdict, str] = {
    "holds": "&#10003;",
    "partly": "&#8776;",
    "does not hold": "&#10007;",
    "undecided": "?",
    "not measured": "&ndash;",
}
_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #ffffff; --soft: #666; --line: #d5d5d5; --link: #0057a3; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #161616; --soft: #a5a5a5; --line: #3c3c3c; --link: #7cb8f5; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 70rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem;
  margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
a { color: var(--link); } .soft, figcaption { color: var(--soft); font-size: .9em; }
table { border-collapse: collapse; margin: .8rem 0; font-size: .9em; } .wide { overflow-x: auto; }
th, td { text-align: left; vertical-align: top; padding: .25rem .6rem; border-bottom: 1px solid var(--line); }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
td.verdict { white-space: nowrap; font-weight: 600; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
dt { font-weight: 600; } dd { margin: 0 0 .4rem 0; }
dl.legend { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .8rem; font-size: .9em; }
dl.legend dd { margin: 0; }
@media print { body { max-width: none; } h2 { break-before: page; } }
"""


def findings_in(out: Path) -> list[tuple[Experiment, Kept]]:
    """What has been found in the folder, in the paper's order.

    Raises:
        UsageError: a finding is damaged.
    """
    found = ((experiment(name), read_finding(out / name)) for name in NAMES)
    return [(what, kept) for what, kept in found if kept is not None]


def write_page(out: Path) -> Path:
    """Write OUT/index.html of the findings in OUT, and return its path."""
    path = out / PAGE
    write_whole(path, page(findings_in(out)).encode())
    return path


def page(found: Sequence[tuple[Experiment, Kept]]) -> str:
    """The page's text."""
    models = sorted({str(kept.about.get("model", "?")) for _, kept in found})
    parts = [
        f"<h1>eMoE, reproduced on {escape(', '.join(models) or 'nothing yet')}</h1>",
        '<p class="soft">Every measurement of the paper (arXiv 2503.06823), done again by <code>emoe reproduce</code>. '
        "A verdict says whether the paper's claim holds here, on this model and machine; where it does not, why.</p>",
        _legend(),
        _overview(found),
        *(_section(what, kept) for what, kept in found),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>emoe reproduce</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _legend() -> str:
    """What each verdict means, with how the page marks it."""
    rows = "".join(f"<dt>{_MARKS[each]} {each}</dt><dd>{escape(MEANINGS[each])}</dd>" for each in VERDICTS)
    return f'<dl class="legend">{rows}</dl>'


def _overview(found: Sequence[tuple[Experiment, Kept]]) -> str:
    rows = []
    for what, kept in found:
        for number, claim in enumerate(kept.claims):
            link = f'<a href="#{what.name}">{escape(what.title)}</a>' if number == 0 else ""
            why = f'<br><span class="soft">{escape(claim.why)}</span>' if claim.why else ""
            rows.append(
                f"<tr><td>{link}</td><td>{escape(claim.text)}{why}</td><td>{escape(claim.paper)}</td>"
                f'<td>{escape(claim.here)}</td><td class="verdict">{_MARKS[claim.verdict]} {claim.verdict}</td></tr>'
            )
    head = "<tr><th></th><th>claim</th><th>paper</th><th>here</th><th>verdict</th></tr>"
    return f'<div class="wide"><table>{head}\n' + "\n".join(rows) + "\n</table></div>"


def _section(what: Experiment, kept: Kept) -> str:
    said = (("Question", what.question), ("Method", what.method), ("The paper", what.expected))
    parts = [
        f'<h2 id="{what.name}">{escape(what.title)}</h2>',
        "<dl>" + "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in said) + "</dl>",
    ]
    for claim in kept.claims:
        why = f" {escape(claim.why)}" if claim.why else ""
        parts.append(
            f"<p><strong>{_MARKS[claim.verdict]} {claim.verdict}:</strong> {escape(claim.text)}. "
            f"Paper: {escape(claim.paper)}. Here: {escape(claim.here)}.{why}</p>"
        )
    for name, caption in kept.pictures:
        link = f'<a href="{what.name}/{name}.png">PNG</a>'
        parts.append(
            f'<figure><img src="{what.name}/{name}.svg" alt="{escape(caption, quote=True)}">'
            f"<figcaption>{escape(caption)} ({link})</figcaption></figure>"
        )
    parts += [_table(what.name, table) for table in kept.tables]
    parts += [f"<p>{escape(note)}</p>" for note in kept.notes]
    parts.append(f'<p class="soft">{_about(kept.about)}</p>')
    return "\n".join(parts)


def _table(folder: str, table: Table) -> str:
    link = f'<a href="{folder}/{table.name}.csv">{escape(table.title)} (CSV)</a>'
    if not table.shown:
        return f"<p>{link}</p>"
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = "\n".join("<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in table.rows)
    return f'<p>{link}</p><div class="wide"><table><tr>{head}</tr>\n{rows}\n</table></div>'


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"<td>{escape('' if value is None else str(value))}</td>"
    return f'<td class="number">{value:,.4g}</td>' if isinstance(value, float) else f'<td class="number">{value:,}</td>'


def _about(about: Mapping[str, Any]) -> str:
    return "; ".join(f"{escape(name)}: {escape(str(value))}" for name, value in about.items())
