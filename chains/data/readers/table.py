"""Your own images, listed in a CSV file with a header line:

    path,pid,camid,split
    0001/a.jpg,anna,lobby,train

path is relative to the folder of the CSV file. pid is any text. camid (optional column) is any text; empty: not known.
split (optional column) is train, query or gallery, for every line or for none: then see `labelled`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from chains.data.files import SUFFIXES
from chains.data.readers.dataset import SPLITS, DataSet, ReadOptions, Split
from chains.data.readers.labelled import Row, data_set
from chains.data.readers.listing import Listing
from chains.errors import DataError

NEEDED, OPTIONAL = ("path", "pid"), ("camid", "split")


def why_not_table(path: Path) -> str | None:
    return None if path.is_file() and path.suffix.lower() == ".csv" else "not a .csv file"


def read_table(path: Path, options: ReadOptions) -> DataSet:
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; a table is given by its own path")
    listing = Listing(path.parent)
    rows = list(_rows(listing, path.name))
    unsplit = sum(row.split is None for row in rows)
    if 0 < unsplit < len(rows):
        raise DataError(f"{path}: {unsplit} of {len(rows)} lines have no split; state it for all or for none")
    return data_set(path.stem, path, listing, rows, options)


def _rows(listing: Listing, name: str) -> Iterator[Row]:
    file = listing.root / name
    reader = csv.DictReader(io.StringIO(listing.text(name)), strict=True)
    try:
        columns = [column.strip().lower() for column in reader.fieldnames or ()]
        _check_columns(file, columns)
        reader.fieldnames = columns
        lines_of: dict[Path, int] = {}
        for fields in reader:
            row = _row(listing, f"{file}, line {reader.line_num}", fields)
            first = lines_of.setdefault(row.path, reader.line_num)
            if first != reader.line_num:
                raise DataError(f"{file}, line {reader.line_num}: {fields['path']} stands in line {first} already")
            yield row
    except csv.Error as error:
        raise DataError(f"{file}, line {reader.line_num}: not readable as CSV: {error}") from error


def _check_columns(file: Path, columns: list[str]) -> None:
    if missing := [column for column in NEEDED if column not in columns]:
        raise DataError(
            f"{file}: no column {' and no column '.join(missing)}; the first line names the columns: "
            f"{', '.join(NEEDED)}, and if you like {', '.join(OPTIONAL)}"
        )
    if len(set(columns)) < len(columns):
        raise DataError(f"{file}: a column is there twice: {', '.join(columns)}")


def _row(listing: Listing, where: str, fields: dict[str, str | None]) -> Row:
    if None in fields or None in fields.values():  # DictReader's marks for too many fields and too few
        raise DataError(f"{where}: not as many fields as the first line names")
    values = {column: (value or "").strip() for column, value in fields.items()}
    for column in NEEDED:
        if not values[column]:
            raise DataError(f"{where}: {column} is empty")
    path = listing.file(values["path"], where)
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{where}: {values['path']} is none of {', '.join(sorted(SUFFIXES))}")
    return Row(path, values["pid"], values.get("camid") or None, _split(values.get("split", ""), where))


def _split(text: str, where: str) -> Split | None:
    if not text:
        return None
    for split in SPLITS:
        if text.lower() == split:
            return split
    raise DataError(f"{where}: split is {text!r}; it must be one of {', '.join(SPLITS)}")
