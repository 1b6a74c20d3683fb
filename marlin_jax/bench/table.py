# SPDX-License-Identifier: Apache-2.0
"""The tables of the benchmarks: a CSV with a row for every measurement."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_rows(table: Path, rows: Sequence[dict[str, Any]], *, digits: int | None = None) -> None:
  """Writes rows; a column that a row lacks is empty there. `digits` is how many floats keep, None leaves them alone."""
  table.parent.mkdir(parents=True, exist_ok=True)
  if digits is not None:
    rows = [{k: f"{v:.{digits}g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]
  with table.open("w", newline="") as file:
    writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)


def read_rows(table: Path) -> list[dict[str, str]]:
  """The rows of the CSV of a benchmark."""
  with table.open(newline="") as file:
    return list(csv.DictReader(file))
