# SPDX-License-Identifier: Apache-2.0
"""Tables of configs: strict reading, the order of the lookup, and every row that ships."""

import dataclasses
import functools
import json
import logging

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import MatmulProblem, choose_implementation, heuristics, layout, layout24, matmul, tuning
from pallas_kernels.hardware import Device
from pallas_kernels.hopper_config import HopperConfig
from pallas_kernels.triton_dequantize import DequantizeConfig
from pallas_kernels.triton_matmul import TritonConfig

BF16 = jnp.dtype(jnp.bfloat16)
H200 = Device(platform="cuda", kind="NVIDIA H200", num_sms=132)
PROBLEM = MatmulProblem(m=13, n=384, k=1024, group_size=128, dtype=BF16)
# Configs that no heuristic gives for the problem.
HOPPER = HopperConfig(block_m=32, warpgroups_n=2, block_k=128, num_stages=3, split_k=4)
TRITON = TritonConfig(block_m=64, block_n=128, block_k=64, programs=9, num_warps=8, num_stages=2)
ROW = tuning.TunedRow(
  implementation="triton",
  m=16,
  k=1024,
  n=384,
  group_size=128,
  bits=4,
  zeros=False,
  sparse24=False,
  dtype="bfloat16",
  config=TRITON,
  time_us=7.5,
)


def table_of(*rows: tuning.TunedRow, device: str = H200.kind) -> tuning.TunedTable:
  return tuning.TunedTable(device=device, jax_version="0.11.2", rows=rows)


@pytest.fixture
def write(tmp_path):
  """Rows -> the path of a table of them; a dict is a change to the first row's JSON."""

  def write_rows(*rows, device=H200.kind, name="table.json"):
    plain = [row for row in rows if not isinstance(row, dict)]
    tuning.write_table(tmp_path / name, table_of(*plain, device=device))
    for change in rows[len(plain) :]:
      data = json.loads((tmp_path / name).read_text())
      data["rows"][0] |= change
      (tmp_path / name).write_text(json.dumps(data))
    return tmp_path / name

  return write_rows


@pytest.fixture
def shipped(monkeypatch, tmp_path):
  """The folder of the tables that ship, empty."""
  monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")
  monkeypatch.delenv(tuning.ENVIRONMENT, raising=False)
  return tmp_path / "shipped"


def test_a_table_is_read_as_it_was_written(write):
  rows = (ROW, dataclasses.replace(ROW, implementation="hopper", config=HOPPER, m=1, time_us=3.0))
  assert tuning.load_table(write(*rows)) == table_of(*rows)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(colour="red"), r"row 0: there is no field 'colour'"),
    (dict(config=dataclasses.asdict(TRITON) | {"block_q": 1}), r"row 0, config: there is no field 'block_q'"),
    (dict(config={"block_m": 16}), r"row 0, config: fields are missing: block_n, .*num_stages"),
    (dict(config=dataclasses.asdict(TRITON) | {"block_n": 96}), r"row 0: block_n=96 must be one of"),
    (dict(config=dataclasses.asdict(TRITON) | {"programs": True}), r"row 0, config: programs=True must be of type int"),
    (dict(config=[]), r"row 0: config=\[\] must be of type dict"),
    (
      dict(implementation="cublas"),
      r"row 0: implementation='cublas' must be one of \('hopper', 'triton', 'triton24', 'dequantize'\)",
    ),
    (dict(implementation="hopper"), r"row 0, config: there is no field 'block_n'"),
    (dict(m="16"), r"row 0: m='16' must be of type int"),
    (dict(m=24), r"row 0: m=24 must be 1, 8 or a larger power of two"),
    (dict(m=4), r"row 0: m=4 must be 1, 8 or a larger power of two"),
    (dict(zeros=0), r"row 0: zeros=0 must be of type bool"),
    (dict(bits=3), r"row 0: bits=3 must be 4 or 8"),
    (dict(group_size=96), r"row 0: group_size=96 must divide k=1024"),
    (dict(dtype="float32"), r"row 0: dtype='float32' must be one of"),
    (dict(time_us=7), r"row 0: time_us=7 must be of type float"),
    (dict(time_us=0.0), r"row 0: time_us=0.0 must be positive"),
  ],
)
def test_a_wrong_row_says_where(write, change, message):
  with pytest.raises(ValueError, match=r"table\.json, " + message):
    tuning.load_table(write(ROW, change))


@pytest.mark.parametrize(
  "text, message",
  [
    ("{", "is no JSON"),
    ("[]", r"\[\] must be an object"),
    ('{"device": "x", "jax_version": "y"}', "fields are missing: rows"),
    ('{"device": "x", "jax_version": "y", "rows": {}}', "rows={} must be of type list"),
    ('{"device": "x", "jax_version": "y", "rows": [1]}', "row 0: 1 must be an object"),
    ('{"device": "x", "jax_version": "y", "rows": [{"m": 1}]}', "row 0: fields are missing: implementation, k"),
    ('{"device": "x", "jax_version": "y", "rows": [], "date": "z"}', "there is no field 'date'"),
  ],
)
def test_a_file_that_is_no_table_says_why(tmp_path, text, message):
  path = tmp_path / "broken.json"
  path.write_text(text)
  with pytest.raises(ValueError, match=r"broken\.json.* " + message):
    tuning.load_table(path)


def test_two_rows_for_one_problem_are_refused(write):
  other = dataclasses.replace(ROW, m=8)
  with pytest.raises(ValueError, match=r"row 2: row 0 is for the same problem"):
    tuning.load_table(write(ROW, other, dataclasses.replace(ROW, time_us=8.0)))


@pytest.mark.parametrize(
  "m, bucket", [(1, 1), (2, 8), (8, 8), (9, 16), (16, 16), (17, 32), (64, 64), (65, 128), (300, 512)]
)
def test_batch_sizes_share_a_bucket(m, bucket):
  assert tuning.m_bucket(m) == bucket


@pytest.mark.parametrize(
  "change",
  [
    dict(m=8),
    dict(m=17),
    dict(n=320),
    dict(k=2048),
    dict(group_size=64),
    dict(dtype=jnp.dtype(jnp.float16)),
    dict(bits=8),
    dict(zeros=True),
    dict(sparse24=True),
  ],
)
def test_a_row_is_for_exactly_its_problem(shipped, write, change):
  problem = dataclasses.replace(PROBLEM, **change)
  path = write(ROW)
  assert tuning.config_for("triton", PROBLEM, H200, tuned=path) == TRITON
  assert tuning.config_for("triton", problem, H200, tuned=path) == heuristics.triton_config(problem, 132)
  assert tuning.config_for("hopper", PROBLEM, H200, tuned=path) == heuristics.hopper_config(PROBLEM, 132)


def test_the_users_table_goes_before_the_shipped_one(shipped, write, monkeypatch):
  config = functools.partial(tuning.config_for, "triton", PROBLEM, H200)
  in_order = [dataclasses.replace(TRITON, num_stages=stages) for stages in (5, 6, 7)]
  rows = [dataclasses.replace(ROW, config=c) for c in in_order]
  tuning.write_table(shipped / "nvidia_h200.json", table_of(rows[2]))
  assert config() == in_order[2]
  monkeypatch.setenv(tuning.ENVIRONMENT, str(write(rows[1], name="environment.json")))
  assert config() == in_order[1]
  assert config(tuned=write(rows[0], name="argument.json")) == in_order[0]
  # What the user's table does not hold, the shipped one does.
  assert config(tuned=write(dataclasses.replace(ROW, m=1), name="other.json")) == in_order[2]


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="there is one kernel")
def test_of_two_kernels_the_table_says_which_is_faster(shipped, write):
  fast, slow = (dataclasses.replace(ROW, implementation="hopper", config=HOPPER, time_us=time) for time in (7.0, 8.0))
  choose = functools.partial(choose_implementation, PROBLEM, H200)
  assert choose() == choose(tuned=write(ROW)) == "hopper"  # one row alone says nothing
  assert choose(tuned=write(ROW, fast, name="fast.json")) == "hopper"
  assert choose(tuned=write(ROW, slow, name="slow.json")) == "triton"
  other = dataclasses.replace(PROBLEM, m=17)
  assert choose_implementation(other, H200, tuned=write(ROW, slow, name="slow.json")) == "hopper"
  with pytest.raises(ValueError, match="is a table for 'NVIDIA L4'"):
    choose(tuned=write(ROW, device="NVIDIA L4", name="other.json"))


def test_a_table_moves_the_rows_from_which_the_weight_is_dequantized(shipped, write):
  card = Device(platform="cuda", kind="NVIDIA L4", num_sms=58)
  config = DequantizeConfig(block_n=128, block_k=64, num_warps=8)
  of_16 = dataclasses.replace(ROW, implementation="dequantize", config=config, time_us=7.4)
  fused, dequantized = (dataclasses.replace(row, m=4096) for row in (ROW, of_16))
  slow = dataclasses.replace(dequantized, time_us=7.6)
  many = dataclasses.replace(PROBLEM, m=4000)
  for name, rows, few_take, many_take in (
    ("both", (ROW, of_16, fused, slow), "dequantize", "triton"),
    ("fused", (ROW, fused), "triton", "dequantize"),
    ("dequantized", (of_16, dequantized), "triton", "dequantize"),
  ):
    path = write(*rows, device=card.kind, name=f"{name}.json")
    assert choose_implementation(PROBLEM, card, tuned=path) == few_take
    assert choose_implementation(many, card, tuned=path) == many_take
  assert tuning.config_for("dequantize", many, card, tuned=path) == config


def test_a_table_for_another_device_is_refused(shipped, write):
  with pytest.raises(ValueError, match=r"is a table for 'NVIDIA L4', and this is 'NVIDIA H200'"):
    tuning.config_for("triton", PROBLEM, H200, tuned=write(ROW, device="NVIDIA L4"))


def test_a_device_without_a_table_is_named_once(shipped, caplog):
  tuning._say_untuned.cache_clear()
  device = dataclasses.replace(H200, kind="NVIDIA L4", num_sms=58)
  with caplog.at_level(logging.WARNING):
    for _ in range(2):
      assert tuning.config_for("triton", PROBLEM, device) == heuristics.triton_config(PROBLEM, 58)
  (record,) = caplog.records
  assert "NVIDIA L4" in record.getMessage() and "marlin-jax tune" in record.getMessage()


def shapes_of(row: tuning.TunedRow) -> list[jax.ShapeDtypeStruct | None]:
  """Of x, qweight, scales, zeros and meta."""
  shape = jax.ShapeDtypeStruct
  x, scales = shape((row.m, row.k), row.dtype), shape((row.k // row.group_size, row.n), row.dtype)
  if row.sparse24:
    words = [shape(of(row.k, row.n), jnp.int16) for of in (layout24.qweight_shape, layout24.meta_shape)]
    return [x, words[0], scales, None, words[1]]
  return [
    x,
    shape(layout.qweight_shape(row.k, row.n, row.bits), jnp.int16),
    scales,
    scales if row.zeros else None,
    None,
  ]


def test_sparse_weights_have_rows_of_their_own(shipped, write):
  config = dataclasses.replace(HOPPER, block_k=256)
  sparse = dataclasses.replace(ROW, implementation="hopper", sparse24=True, config=config)
  path = write(ROW, dataclasses.replace(ROW, implementation="hopper", config=HOPPER), sparse)
  assert tuning.config_for("hopper", PROBLEM, H200, tuned=path) == HOPPER
  problem = dataclasses.replace(PROBLEM, sparse24=True)
  assert tuning.config_for("hopper", problem, H200, tuned=path) == config
  assert tuning.config_for("triton24", problem, H200, tuned=path) == heuristics.triton24_config(problem, 132)


def test_matmul_takes_the_config_of_the_table(shipped, write, lower_for_h200):
  text = lower_for_h200(functools.partial(matmul, implementation="triton", tuned=write(ROW)), *shapes_of(ROW))
  assert "num_stages = 2 : i32, num_warps = 8 : i32" in text and "tensor<4x16x384xf32>" in text


def test_every_shipped_table_parses_and_its_rows_are_found():
  paths = sorted(tuning.SHIPPED.glob("*.json"))
  assert paths
  for path in paths:
    table = tuning.load_table(path)
    device = Device(platform="cuda", kind=table.device, num_sms=132)
    for row in table.rows:
      sizes = {name: getattr(row, name) for name in ("m", "n", "k", "group_size", "bits", "zeros", "sparse24")}
      problem = MatmulProblem(**sizes, dtype=jnp.dtype(row.dtype))
      assert tuning.config_for(row.implementation, problem, device) == row.config


def kernels_of(path) -> list[tuning.TunedRow]:
  """A row of each kernel in a table: sizes are in the launch, and for one config and kind of group the body is one."""
  rows = tuning.load_table(path).rows

  def kernel(row: tuning.TunedRow) -> tuple:
    return row.config, row.group_size, row.group_size == row.k, row.dtype, row.bits, row.zeros, row.sparse24

  return list({kernel(row): row for row in rows}.values())


@pytest.mark.parametrize(
  "row",
  [row for path in sorted(tuning.SHIPPED.glob("*h200.json")) for row in kernels_of(path)],
  ids=lambda row: f"{row.implementation}-{row.k}x{row.n}-{row.m}{'-sparse24' * row.sparse24}",
)
def test_every_shipped_kernel_lowers_for_an_h200(lower_for_h200, row):
  if row.implementation == "hopper" and jax.__version_info__ < (0, 11):
    pytest.skip("the kernel needs JAX 0.11")
  text = lower_for_h200(functools.partial(matmul, implementation=row.implementation), *shapes_of(row))
  mma = "wgmma.mma_async.sp" if row.sparse24 else "wgmma.mma_async.sync"
  assert {"hopper": mma, "triton": "w4a16_triton"}[row.implementation] in text
