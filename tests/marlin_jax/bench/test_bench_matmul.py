# SPDX-License-Identifier: Apache-2.0
import csv
import functools
import pathlib

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest

from marlin_jax.bench import matmul as bench
from marlin_jax.bench import operands
from marlin_jax.bench.matmul import bench_matmul
from marlin_jax.bench.plot import plot, read_rows, roofline_figure, speedup_figure
from marlin_jax.bench.timing import copies_for_cold_l2
from pallas_kernels import Device, MatmulProblem, layout, layout24
from pallas_kernels.reference import matmul_reference


def test_enough_copies_to_be_cold():
  assert copies_for_cold_l2(4096 * 4096 // 2) * 4096 * 4096 // 2 >= 180 << 20
  assert copies_for_cold_l2(1 << 30) == 2


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU here")
def test_without_a_gpu_nothing_is_measured(tmp_path):
  with pytest.raises(NotImplementedError, match="nothing measured"):
    bench_matmul([(256, 128)], [1], tmp_path / "table.csv")
  assert not list(tmp_path.iterdir())


@pytest.fixture
def h200_rows():
  return read_rows(pathlib.Path(__file__).parents[3] / "docs" / "results" / "nvidia_h200" / "matmul.csv")


@pytest.mark.parametrize("kind", ["speedup", "roofline"])
def test_the_table_becomes_a_picture(kind, h200_rows, tmp_path):
  table = tmp_path / "table.csv"
  with table.open("w", newline="") as file:
    writer = csv.DictWriter(file, fieldnames=list(h200_rows[0]))
    writer.writeheader()
    writer.writerows(h200_rows)
  plot(table, tmp_path / "plots" / "picture.png", kind)
  assert (tmp_path / "plots" / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_the_roof_is_that_of_the_run(h200_rows):
  figure = roofline_figure(h200_rows)
  panel = figure.axes[0]
  lines = {line.get_label(): line.get_xydata() for line in panel.get_lines()}
  (_, slope), (ridge, peak), (_, flat) = lines.pop("roof")
  assert 4.0 < slope < 4.8 and 700 < peak < 850 and flat == peak and ridge == pytest.approx(peak / slope)
  # At the same batch size 4 bits do nearly four times the arithmetic a byte, and nothing is above the roof.
  hopper, bf16 = lines["4 bits, hopper"], lines["bfloat16 (XLA)"]
  assert hopper[0, 0] / bf16[0, 0] == pytest.approx(3.87, abs=0.05)
  for points in lines.values():
    assert (points[:, 1] < 1.05 * np.minimum(peak, slope * points[:, 0])).all()
  plt.close(figure)


def test_a_line_goes_from_batch_to_batch_whatever_the_order_of_rows(h200_rows):
  figure = speedup_figure(h200_rows[::-1])
  lines = [line.get_xdata() for panel in figure.axes for line in panel.get_lines() if len(line.get_xdata()) > 2]
  assert len(lines) >= 4 * 7 and all((np.diff(batches) > 0).all() for batches in lines)
  plt.close(figure)


@pytest.mark.gpu
def test_a_row_is_measured_and_written(tmp_path):
  bench_matmul([(4096, 4096)], [1, 16], tmp_path / "results" / "table.csv")
  rows = list(csv.DictReader((tmp_path / "results" / "table.csv").read_text().splitlines()))
  assert {(row["m"], row["implementation"]) for row in rows} >= {("1", "triton"), ("16", "triton")}
  assert all(0 < float(row["fraction_of_limit"]) < 1.05 for row in rows)


def test_random_weights_are_what_the_problem_asks_for(monkeypatch):
  monkeypatch.setattr(operands, "copies_for_cold_l2", lambda nbytes: 2)
  problem = MatmulProblem(m=1, n=192, k=256, group_size=64, dtype=jnp.dtype(jnp.float16), bits=8, zeros=True)
  (qweight, scales, zeros), other = operands.random_weights(problem)
  codes = np.asarray(layout.unpack_codes(qweight, 256, 192))
  assert set(np.unique(codes)) == set(range(256)) and not (qweight == other[0]).all()
  assert scales.dtype == jnp.float16 and float(scales.min()) > 0
  assert zeros.shape == scales.shape and 128 < float(zeros.max()) < 256


def test_random_2_4_sparse_weights_are_sound(monkeypatch):
  monkeypatch.setattr(operands, "copies_for_cold_l2", lambda nbytes: 2)
  problem = MatmulProblem(m=1, n=192, k=256, group_size=64, dtype=jnp.dtype(jnp.float16), sparse24=True)
  (qweight, _, zeros, meta), other = operands.random_weights(problem)
  assert zeros is None and layout24.meta_is_sound(meta) and not (meta == other[3]).all()
  assert set(np.unique(layout24._nibbles_of(meta))) == set(layout24.POSITIONS)
  codes = layout24.unpack_codes(qweight, meta, 256, 192)
  assert not layout24.surplus(codes).any() and set(np.unique(codes)) == set(range(16))


def test_xla_int4_computes_the_same_product(monkeypatch):
  monkeypatch.setattr(operands, "copies_for_cold_l2", lambda nbytes: 1)
  problem = MatmulProblem(m=5, n=192, k=256, group_size=128, dtype=jnp.dtype(jnp.bfloat16))
  ((qweight, scales),), x = operands.random_weights(problem), operands.random_x(problem)
  codes = bench._int4(qweight, problem.k, problem.n)
  assert codes.dtype == jnp.int4
  y, want = bench._xla_int4(x, codes, scales), operands.expected(x, qweight, scales)
  assert operands.check(np.asarray(y), np.asarray(want)) > 0


@pytest.fixture
def on_an_h200(monkeypatch):
  """The benchmark as it runs on a GPU, with the reference for a kernel; returns the time in seconds of each program."""
  times = {"matmul": 4e-6, "_xla_int4": 3e-5, "dot": 1.2e-5}
  device = Device(platform="cuda", kind="NVIDIA H200", num_sms=132)
  compile_all = bench._compile

  def named(function, *arguments):
    name = getattr(function, "func", function).__name__
    return [functools.partial(timed, name, compiled) for compiled in compile_all(function, *arguments)]

  def timed(name, compiled, *arguments):
    return compiled(*arguments)

  def matmul(x, qweight, scales, zeros=None, meta=None, *, implementation, tuned):
    return matmul_reference(x, qweight, scales, zeros, meta)

  monkeypatch.setattr(bench, "_compile", named)
  monkeypatch.setattr(bench, "matmul", matmul)
  monkeypatch.setattr(bench, "current_device", lambda: device)
  monkeypatch.setattr(bench, "measure_ceilings", lambda: (4.4e12, 782e12))
  monkeypatch.setattr(bench, "kernel_time", lambda program, argument_sets: times[program.args[0]])
  monkeypatch.setattr(operands, "copies_for_cold_l2", lambda nbytes: 1)
  monkeypatch.setattr(bench, "copies_for_cold_l2", lambda nbytes: 1)
  return times


def test_a_table_of_all_there_is(on_an_h200, tmp_path, capsys):
  bench_matmul([(256, 192), (128, 64)], [16], tmp_path / "results" / "table.csv")
  rows = list(csv.DictReader((tmp_path / "results" / "table.csv").read_text().splitlines()))
  kernels = ["hopper", "triton", "dequantize"][jax.__version_info__ < (0, 11) :]
  assert [(row["m"], row["implementation"]) for row in rows] == [
    ("16", name) for _ in range(2) for name in (*kernels, "xla_int4")
  ]
  assert {row["speedup"] for row in rows} == {"3.00", "0.40"}
  assert rows[0]["config"].startswith("block_m=") and rows[-1]["config"] == ""
  assert "all shapes, M=16: triton 8.0 us, bfloat16 24.0 us, speed-up 3.00" in capsys.readouterr().out


def test_2_4_sparse_kernels_stand_beside_the_dense_ones(on_an_h200, tmp_path):
  table = tmp_path / "table.csv"
  bench_matmul([(8192, 384)], [1, 16], table, sparse24=True)
  rows = {(row["m"], row["implementation"]): row for row in read_rows(table)}
  dense, sparse = rows["1", "triton"], rows["1", "triton, 2:4"]
  assert float(sparse["limit_us"]) < 0.85 * float(dense["limit_us"])
  for kind in ("speedup", "roofline"):
    plot(table, tmp_path / f"{kind}.png", kind)


def test_one_kernel_by_its_name(on_an_h200, tmp_path):
  table = tmp_path / "table.csv"
  bench_matmul([(8192, 384)], [1], table, sparse24=True, implementations=["triton, 2:4"])
  assert [row["implementation"] for row in read_rows(table)] == ["triton, 2:4"]
  with pytest.raises(ValueError, match=r"implementations=\['cutlass'\]: 'cutlass' must be one of .*'xla_int4'"):
    bench_matmul([(8192, 384)], [1], None, implementations=["cutlass"])


def test_a_time_beyond_the_ceilings_fails_the_run(on_an_h200, tmp_path):
  # 256 x 192 in 4 bits, scales and x: 6.0 ns at 4.4 TB/s.
  on_an_h200["_xla_int4"] = 5.8e-9
  bench_matmul([(256, 192)], [1], None)
  on_an_h200["_xla_int4"] = 5.5e-9
  with pytest.raises(RuntimeError, match=r"xla_int4, K=256 N=192 M=1: 0\.0 us is below the limit"):
    bench_matmul([(256, 192)], [1], tmp_path / "table.csv")
  assert not list(tmp_path.iterdir())


def test_a_wrong_kernel_fails_the_run(on_an_h200, monkeypatch):
  def matmul(x, qweight, scales, **how):
    return -matmul_reference(x, qweight, scales)

  monkeypatch.setattr(bench, "matmul", matmul)
  with pytest.raises(RuntimeError, match="M=1: relative error"):
    bench_matmul([(256, 192)], [1], None)
