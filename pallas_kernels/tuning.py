# SPDX-License-Identifier: Apache-2.0
"""From a problem to a config: a row of a table for this device where one fits, heuristics otherwise.

A table is a JSON file that `marlin-jax tune` writes: `{"device": ..., "jax_version": ..., "rows": [...]}`. A row holds
the problem (`implementation`, `m`, `k`, `n`, `group_size`, `bits`, `zeros`, `sparse24`, `dtype`), the `config` that was
fastest for it, and `time_us`, by which implementations are told apart. `m` is an upper bound: the row is for every
batch size of its bucket.
"""

import dataclasses
import functools
import json
import logging
import os
from pathlib import Path
from typing import Any

from pallas_kernels import heuristics
from pallas_kernels.hardware import Device
from pallas_kernels.heuristics import Config
from pallas_kernels.hopper_config import HopperConfig
from pallas_kernels.problem import MatmulProblem
from pallas_kernels.triton_dequantize import DequantizeConfig
from pallas_kernels.triton_matmul import TritonConfig

CONFIGS: dict[str, type[Config]] = {
  "hopper": HopperConfig,
  "triton": TritonConfig,
  "triton24": TritonConfig,
  "dequantize": DequantizeConfig,
}
ENVIRONMENT = "MARLIN_JAX_TUNED"
SHIPPED = Path(__file__).parent / "tuned"

_DTYPES = ("bfloat16", "float16")
_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TunedRow:
  """The fastest config that was measured for a problem; `m` is the largest batch size it is for (see `m_bucket`)."""

  implementation: str
  m: int
  k: int
  n: int
  group_size: int
  bits: int
  zeros: bool
  sparse24: bool
  dtype: str
  config: Config
  time_us: float

  def __post_init__(self):
    if self.m != m_bucket(self.m):
      raise ValueError(f"m={self.m} must be 1, 8 or a larger power of two")
    if self.k < 1 or self.n < 1 or self.group_size < 1 or self.k % self.group_size:
      raise ValueError(f"group_size={self.group_size} must divide k={self.k}, and n={self.n} must be at least 1")
    if self.bits not in (4, 8):
      raise ValueError(f"bits={self.bits} must be 4 or 8")
    if self.dtype not in _DTYPES:
      raise ValueError(f"dtype={self.dtype!r} must be one of {_DTYPES}")
    if not self.time_us > 0:
      raise ValueError(f"time_us={self.time_us} must be positive")

  @property
  def key(self) -> tuple:
    """What a problem must agree in, exactly, for this row to be its."""
    return tuple(getattr(self, field.name) for field in dataclasses.fields(self) if field.name in _KEY)


_KEY = ("implementation", "m", "k", "n", "group_size", "bits", "zeros", "sparse24", "dtype")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TunedTable:
  """The rows of one kind of device, in the order of the file.

  Attributes:
    device: its kind, as JAX gives it ("NVIDIA H200").
    jax_version: of the JAX that the rows were measured with.
  """

  device: str
  jax_version: str
  rows: tuple[TunedRow, ...]

  @functools.cached_property
  def by_key(self) -> dict[tuple, TunedRow]:
    """The rows by `TunedRow.key`."""
    return {row.key: row for row in self.rows}

  def find(self, implementation: str, problem: MatmulProblem) -> TunedRow | None:
    """The row of exactly this problem's sizes and of its batch size's bucket."""
    p = problem
    key = (implementation, m_bucket(p.m), p.k, p.n, p.group_size, p.bits, p.zeros, p.sparse24, p.dtype.name)
    return self.by_key.get(key)


def m_bucket(m: int) -> int:
  """The batch size that is tuned for all batch sizes like `m`: 1, 8, and the powers of two from there on."""
  return 1 if m <= 1 else max(8, 1 << (m - 1).bit_length())


def config_for(
  implementation: str, problem: MatmulProblem, device: Device, *, tuned: str | Path | None = None
) -> Config:
  """The config of `implementation` for `problem`: the user's table, then the shipped one, then heuristics.

  Args:
    implementation: a name of CONFIGS.
    tuned: a table of the user's; None takes the one that the environment variable MARLIN_JAX_TUNED names, if it does.

  Raises:
    ValueError: a table does not parse, or the user's is for another kind of device.
  """
  tables = _tables(device, tuned)
  if not tables:
    _say_untuned(device.kind)
  rows = (table.find(implementation, problem) for table in tables)
  row = next((row for row in rows if row is not None), None)
  return heuristics.HEURISTICS[implementation](problem, device.num_sms) if row is None else row.config


def fastest(
  problem: MatmulProblem, device: Device, implementations: list[str], *, tuned: str | Path | None = None
) -> str | None:
  """The implementation that took the least time for `problem`, in the first table that has a row of the first of them.

  None if there is no such table: what others took says nothing about that one. Errors are those of `config_for`.
  """
  for table in _tables(device, tuned):
    rows = [table.find(name, problem) for name in implementations]
    if rows[0] is not None:
      return min((row for row in rows if row is not None), key=lambda row: row.time_us).implementation
  return None


def _tables(device: Device, tuned: str | Path | None) -> list[TunedTable]:
  """The user's table and the shipped one, those that there are."""
  user = tuned or os.environ.get(ENVIRONMENT)
  tables = []
  if user:
    tables.append(load_table(Path(user)))
    if tables[0].device != device.kind:
      raise ValueError(f"{user} is a table for {tables[0].device!r}, and this is {device.kind!r}")
  shipped = SHIPPED / f"{device.kind.lower().replace(' ', '_')}.json"
  if shipped.exists():
    tables.append(load_table(shipped))
  return tables


@functools.cache
def _say_untuned(kind: str) -> None:
  _logger.warning("no table of tuned kernels for %s: configs come from heuristics; `marlin-jax tune` makes one", kind)


@functools.cache
def load_table(path: Path) -> TunedTable:
  """Reads a table, strictly, once a process.

  Raises:
    ValueError: it is no such table; says the file, the row (from 0) and the field.
    FileNotFoundError: there is no such file.
  """
  try:
    data = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f"{path} is no JSON: {error}") from None
  _check_fields(f"{path}", data, {"device": str, "jax_version": str, "rows": list})
  rows: dict[tuple, int] = {}
  parsed = []
  for i, fields in enumerate(data["rows"]):
    where = f"{path}, row {i}"
    row = _row(where, fields)
    if row.key in rows:
      raise ValueError(f"{where}: row {rows[row.key]} is for the same problem")
    rows[row.key] = i
    parsed.append(row)
  return TunedTable(device=data["device"], jax_version=data["jax_version"], rows=tuple(parsed))


def write_table(path: Path, table: TunedTable) -> None:
  """Writes `table` so that `load_table` reads it back, a row a line."""
  rows = ",\n".join("    " + json.dumps(dataclasses.asdict(row)) for row in table.rows)
  head = "".join(f"  {json.dumps(name)}: {json.dumps(getattr(table, name))},\n" for name in ("device", "jax_version"))
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f'{{\n{head}  "rows": [\n{rows}\n  ]\n}}\n')


def _row(where: str, fields: Any) -> TunedRow:
  _check_fields(where, fields, {field.name: field.type for field in dataclasses.fields(TunedRow)} | {"config": dict})
  if fields["implementation"] not in CONFIGS:
    raise ValueError(f"{where}: implementation={fields['implementation']!r} must be one of {tuple(CONFIGS)}")
  config_type = CONFIGS[fields["implementation"]]
  config_fields = dataclasses.fields(config_type)
  optional = {field.name for field in config_fields if field.default is not dataclasses.MISSING}
  types = {field.name: field.type for field in config_fields}
  _check_fields(f"{where}, config", fields["config"], types, optional)
  try:
    return TunedRow(**fields | {"config": config_type(**fields["config"])})
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from None


def _check_fields(where: str, fields: Any, types: dict[str, type], optional: set[str] = frozenset()) -> None:
  if not isinstance(fields, dict):
    raise ValueError(f"{where}: {fields!r} must be an object")
  for name, value in fields.items():
    if name not in types:
      raise ValueError(f"{where}: there is no field {name!r}, only {', '.join(types)}")
    if type(value) is not types[name]:  # not isinstance: to Python true is an int
      raise ValueError(f"{where}: {name}={value!r} must be of type {types[name].__name__}")
  missing = [name for name in types if name not in fields and name not in optional]
  if missing:
    raise ValueError(f"{where}: fields are missing: {', '.join(missing)}")
