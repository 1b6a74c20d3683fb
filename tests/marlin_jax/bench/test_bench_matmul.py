# SPDX-License-Identifier: Apache-2.0
import csv

import jax
import pytest

from marlin_jax.bench.matmul import bench_matmul
from marlin_jax.bench.timing import copies_for_cold_l2


def test_enough_copies_to_be_cold():
  assert copies_for_cold_l2(4096 * 4096 // 2) * 4096 * 4096 // 2 >= 180 << 20
  assert copies_for_cold_l2(1 << 30) == 2


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU here")
def test_without_a_gpu_nothing_is_measured(tmp_path):
  with pytest.raises(NotImplementedError, match="nothing measured"):
    bench_matmul([(256, 128)], [1], tmp_path / "table.csv")
  assert not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_a_row_is_measured_and_written(tmp_path):
  bench_matmul([(4096, 4096)], [1, 16], tmp_path / "results" / "table.csv")
  rows = list(csv.DictReader((tmp_path / "results" / "table.csv").open()))
  assert [row["m"] for row in rows] == ["1", "16"]
  for row in rows:
    assert row["implementation"] == "triton" and 0 < float(row["fraction_of_limit"]) < 1.05
