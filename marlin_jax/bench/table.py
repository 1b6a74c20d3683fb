# SPDX-License-Identifier: Apache-2.0
"""The tables of the benchmarks: a CSV with a row for every measurement."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_rows(
  table: Path, rows: Sequence[dict[str, Any]], *, key: Sequence[str] = (), digits: int | None = None
) -> None:
  """Writes rows; a column that a row lacks is empty there.

  Args:
    key: the columns that say what was measured. Rows that the table has already stay where they are, unless one of the
      same key takes their place; with no key, all go.
    digits: how many of a float are kept; None leaves them alone.
  """
  table.parent.mkdir(parents=True, exist_ok=True)
  if digits is not None:
    rows = [{k: f"{v:.{digits}g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]

  def name(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple("" if row.get(column) is None else str(row[column]) for column in key)

  old = read_rows(table) if key and table.exists() else []
  found = {name(row): row for row in rows} if key else dict(enumerate(rows))
  merged = [found.pop(name(row), row) for row in old] + list(found.values())
  with table.open("w", newline="") as file:
    writer = csv.DictWriter(file, list(dict.fromkeys(column for row in merged for column in row)))
    writer.writeheader()
    writer.writerows(merged)


def read_rows(table: Path) -> list[dict[str, str]]:
  """The rows of the CSV of a benchmark."""
  with table.open(newline="") as file:
    return list(csv.DictReader(file))
