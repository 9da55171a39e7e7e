"""What the commands print: reports of chains (`chains.pipeline.report_of`) as aligned columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Rows = Sequence[Sequence[str]]


def text_table(rows: Rows) -> str:
    """Rows of cells as lines with right-aligned columns; the first row is the head.

    >>> print(text_table([["width", "mAP"], ["4x2-4-8", "51.0"]]))
      width   mAP
    -------------
    4x2-4-8  51.0
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def printable(text: str) -> str:
    r"""`text` with whatever moves a terminal's cursor, changes its colours or turns the direction of writing spelt out:
    names in somebody else's file may be anything, new lines among it.

    >>> print(printable("conv\x1b[31m1 ×2"))
    conv\x1b[31m1 ×2
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def report_text(report: Mapping[str, Any]) -> str:
    """A whole report: frontier, cross-width matrix, cut-offs."""
    names = [row["width"] for row in report["widths"]]
    when = "after training of its own" if report["trained_after_expansion"] else "no training after expansion"
    images = f"{report['queries']} queries, {report['gallery']} gallery images"
    parts = [
        f"{report['chain']} on {report['dataset']}: {images}, {when}",
        text_table([_HEAD, *(frontier_row(row) for row in report["widths"])]),
    ]
    if len(names) > 1:
        cells = [[f"{value:.1f}" for value in row] for row in report["cross_map"]]
        parts += ["mAP in percent, query width in rows, gallery width in columns:", matrix(names, names, cells)]
    for rate, values in report["thresholds"].items():
        cells = [["-" if value is None else f"{value:.4f}" for value in row] for row in values]
        parts += [f"same person from this cosine up, false-accept rate {rate}:", matrix(names, names, cells)]
    return "\n\n".join(parts)


def compatibility_text(record: Mapping[str, Any]) -> str:
    """What `chains.compatible.joined_space` noted: the mAP in both galleries, and what follows for the space."""
    head = f"compatible with {record['chain']}: mAP in percent, galleries at full width"
    cells = [
        ["queries", "old gallery", "new gallery"],
        [f"old chain{_at(record.get('old_width'))}", f"{record['old_map']:.1f}", "-"],
        ["new chain", f"{record['old_gallery_new_query_map']:.1f}", f"{record['new_map']:.1f}"],
        ["new chain, narrowest", f"{record['old_gallery_narrowest_query_map']:.1f}", "-"],
    ]
    kept, own = record["embedding_space"], record["own_space"]
    outcome = (
        f"new queries find no less in the old gallery, so the chain keeps the embedding space {kept}"
        if record["is_met"]
        else f"new queries find less in the old gallery, so the chain has an embedding space of its own, {own}"
    )
    return f"{head}\n\n{text_table(cells)}\n\n{outcome}"


def _at(width: str | None) -> str:
    return "" if width is None else f", {width}"


def frontier_row(row: Mapping[str, Any]) -> list[str]:
    """One width of a report under `_HEAD`."""
    low, high = row["map_ci95"]
    ranks = (f"{row[f'rank{rank}']:.1f}" for rank in (1, 5, 10))
    minp = "-" if row["minp"] is None else f"{row['minp']:.1f}"
    costs = (f"{row['macs']:,}", f"{row['params']:,}")
    return [row["width"], *costs, f"{row['map']:.1f}", f"{low:.1f} to {high:.1f}", *ranks, minp]


def comparison(reports: Sequence[Mapping[str, Any]]) -> str:
    """The frontiers of several reports, a line per chain and width, by MACs."""
    rows = [(row["macs"], report["chain"], row) for report in reports for row in report["widths"]]
    lines = [[name, *frontier_row(row)] for _, name, row in sorted(rows, key=lambda entry: entry[:2])]
    return text_table([["chain", *_HEAD], *lines])


def matrix(rows: Sequence[str], columns: Sequence[str], cells: Rows) -> str:
    """Cells with names on both sides."""
    return text_table([["query \\ gallery", *columns], *([name, *row] for name, row in zip(rows, cells, strict=True))])


_HEAD = ["width", "MACs", "params", "mAP %", "95 % interval", "Rank-1", "Rank-5", "Rank-10", "mINP"]
