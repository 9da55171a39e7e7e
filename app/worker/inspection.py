"""What runs in the sandbox when a data set is checked: everything that parses what somebody else has written.

    python -m app.worker.inspection unpack ARCHIVE TARGET MAX_FILES MAX_BYTES RESULT
    python -m app.worker.inspection look ROOT OPTIONS RESULT

Standard output has lines `done/all` as it goes. RESULT is a JSON file: `found`, or the reason why it was `refused`. Who
starts this believes none of it unseen: a broken decoder could have written anything.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from app.errors import DatasetRefused
from app.worker.archives import Limits, unpack
from chains.data.readers import DataSet, ReadOptions, detect, read
from chains.data.validation import Report, validate
from chains.errors import DataError

AUTO = "auto"
READ_OPTIONS = ("seed", "boxes", "has_val_in_train", "query_camera", "queries_per_identity")
MAX_TEXT = 500  # characters of a message
EVERY_FILES = 100


def main(arguments: list[str]) -> int:
    """0 when RESULT was written. Whatever else goes wrong, such as a full disk, ends in a traceback."""
    what, *given, result = arguments
    try:
        found = _unpack(*given) if what == "unpack" else look(Path(given[0]), json.loads(given[1]), _say)
        outcome: dict[str, Any] = {"found": found}
    except (DatasetRefused, DataError) as error:
        outcome = {"refused": shortened(str(error), Path(given[0]))}
    Path(result).write_text(json.dumps(outcome), encoding="utf-8")
    return 0


def look(root: Path, options: Mapping[str, Any], progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Read the data set in the folder `root`, decode every image, and say what is there. Raises `DataError`."""
    layout, place = find_layout(root, options["layout"])
    dataset = read(layout, place, ReadOptions(**{name: options[name] for name in READ_OPTIONS if name in options}))
    return _findings(dataset, validate(dataset, progress=progress), layout, root, place)


def find_layout(root: Path, wanted: str) -> tuple[str, Path]:
    """The layout, and the folder or table to read it from.

    Archives often hold the data set one folder down, and a table lies in the folder it describes: where `root` itself
    has no known layout, its only folder may have one. Raises `DataError`.
    """
    if wanted not in (AUTO, "csv"):
        return wanted, root if _has(wanted, root) else _only_folder(root) or root
    tables = sorted(path for path in root.iterdir() if path.suffix.lower() == ".csv" and not path.name.startswith("."))
    if wanted == "csv":
        if len(tables) != 1 and (below := _only_folder(root)) is not None:
            return find_layout(below, wanted)
        if len(tables) != 1:
            raise DataError(f"{root}: {len(tables)} .csv files; a data set of layout csv has one, beside its images")
        return wanted, tables[0]
    try:
        return detect(root).kind, root
    except DataError:
        if len(tables) == 1:
            return "csv", tables[0]
        below = _only_folder(root)
        if below is None:
            raise
        return find_layout(below, wanted)


def shortened(text: str, root: Path) -> str:
    """`text` without the folder that the worker keeps the files in, fit for JSON and for a page."""
    clean = text.replace(f"{root}/", "").replace(str(root), "the data set")
    return clean.encode("utf-8", "replace").decode()[:MAX_TEXT]


def _has(layout: str, root: Path) -> bool:
    try:
        return detect(root).kind == layout
    except DataError:
        return False


def _only_folder(root: Path) -> Path | None:
    """The folder below `root`, if that is all there is."""
    entries = [path for path in root.iterdir() if not path.name.startswith(".")]
    return entries[0] if len(entries) == 1 and entries[0].is_dir() else None


def _findings(dataset: DataSet, report: Report, layout: str, root: Path, place: Path) -> dict[str, Any]:
    def short(texts: tuple[str, ...]) -> list[str]:
        return [shortened(text, root) for text in texts]

    return {
        "layout": layout,
        "place": place.relative_to(root).as_posix(),
        "title": shortened(dataset.name, root),
        "splits": {split: asdict(counts) for split, counts in report.splits.items()},
        "broken": report.broken,
        "broken_files": short(report.broken_files),
        "left_out": {shortened(reason, root): count for reason, count in report.left_out.items()},
        "errors": short(report.errors),
        "warnings": short(report.warnings),
        "notes": short(report.notes),
    }


def _unpack(archive: str, target: str, max_files: str, max_bytes: str) -> dict[str, Any]:
    return asdict(unpack(Path(archive), Path(target), Limits(int(max_files), int(max_bytes))))


def _say(done: int, total: int) -> None:
    if done % EVERY_FILES == 0 or done == total:
        sys.stdout.write(f"{done}/{total}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
