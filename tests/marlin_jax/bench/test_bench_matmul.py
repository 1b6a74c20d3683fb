# SPDX-License-Identifier: Apache-2.0
import csv
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marlin_jax.bench import matmul as bench
from marlin_jax.bench import operands
from marlin_jax.bench.matmul import bench_matmul
from marlin_jax.bench.plot import plot_matmul
from marlin_jax.bench.timing import copies_for_cold_l2
from pallas_kernels import Device, MatmulProblem
from pallas_kernels.reference import matmul_reference


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

  def matmul(x, qweight, scales, *, implementation, tuned):
    return matmul_reference(x, qweight, scales)

  monkeypatch.setattr(bench, "_compile", named)
  monkeypatch.setattr(bench, "matmul", matmul)
  monkeypatch.setattr(bench, "current_device", lambda: device)
  monkeypatch.setattr(bench, "measure_ceilings", lambda: (4.4e12, 782e12))
  monkeypatch.setattr(bench, "kernel_time", lambda program, argument_sets: times[program.args[0]])
  monkeypatch.setattr(operands, "copies_for_cold_l2", lambda nbytes: 1)
  monkeypatch.setattr(bench, "copies_for_cold_l2", lambda nbytes: 1)
  return times


def test_a_table_of_all_there_is(on_an_h200, tmp_path, capsys):
  bench_matmul([(256, 192)], [1, 16], tmp_path / "results" / "table.csv")
  rows = list(csv.DictReader((tmp_path / "results" / "table.csv").read_text().splitlines()))
  kernels = ["hopper", "triton"] if jax.__version_info__ >= (0, 11) else ["triton"]
  assert [(row["m"], row["implementation"]) for row in rows] == [
    (m, name) for m in ("1", "16") for name in (*kernels, "xla_int4")
  ]
  assert {row["speedup"] for row in rows} == {"3.00", "0.40"}
  assert rows[0]["config"].startswith("block_m=") and rows[-1]["config"] == ""
  assert "xla_int4" in capsys.readouterr().out
  plot_matmul(tmp_path / "results" / "table.csv", tmp_path / "speedup.png")


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
