# SPDX-License-Identifier: Apache-2.0
import csv

import jax
import pytest

from marlin_jax.bench.matmul import bench_matmul
from marlin_jax.bench.plot import plot_matmul
from marlin_jax.bench.timing import copies_for_cold_l2


def test_enough_copies_to_be_cold():
  assert copies_for_cold_l2(4096 * 4096 // 2) * 4096 * 4096 // 2 >= 180 << 20
  assert copies_for_cold_l2(1 << 30) == 2


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU here")
def test_without_a_gpu_nothing_is_measured(tmp_path):
  with pytest.raises(NotImplementedError, match="nothing measured"):
    bench_matmul([(256, 128)], [1], tmp_path / "table.csv")
  assert not list(tmp_path.iterdir())


def test_the_table_becomes_a_picture(tmp_path):
  rows = [
    dict(
      k=k,
      n=4096,
      m=m,
      implementation=name,
      time_us=time,
      limit_us=2,
      bf16_us=12,
      speedup=12 / time,
      device="GPU",
      jax_version="0.11",
      date="2026-11-22",
    )
    for k in (4096, 8192)
    for m in (1, 16)
    for name, time in (("hopper", 4), ("triton", 6))
  ]
  with (tmp_path / "table.csv").open("w", newline="") as file:
    writer = csv.DictWriter(file, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
  plot_matmul(tmp_path / "table.csv", tmp_path / "plots" / "speedup.png")
  assert (tmp_path / "plots" / "speedup.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.gpu
def test_a_row_is_measured_and_written(tmp_path):
  bench_matmul([(4096, 4096)], [1, 16], tmp_path / "results" / "table.csv")
  rows = list(csv.DictReader((tmp_path / "results" / "table.csv").read_text().splitlines()))
  assert {(row["m"], row["implementation"]) for row in rows} >= {("1", "triton"), ("16", "triton")}
  assert all(0 < float(row["fraction_of_limit"]) < 1.05 for row in rows)
