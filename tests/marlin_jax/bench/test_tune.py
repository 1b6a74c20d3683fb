# SPDX-License-Identifier: Apache-2.0
"""The loop of `marlin-jax tune`, on a CPU with a timer that follows a script."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from marlin_jax.bench import operands, tune
from pallas_kernels import Device, MatmulProblem, heuristics, tuning
from pallas_kernels.reference import matmul_reference

H200 = Device(platform="cuda", kind="NVIDIA H200", num_sms=132)
PROBLEM = MatmulProblem(m=16, n=128, k=256, group_size=128, dtype=jnp.dtype(jnp.bfloat16))
CONFIGS = heuristics.candidates("triton", PROBLEM, 132)[:5]


class Script:
  """A timer that gives the next time of a list, and remembers what it was asked."""

  def __init__(self, *times: float):
    self.times, self.rounds = list(times), []

  def __call__(self, kernel, argument_sets, rounds=5) -> float:
    assert len(argument_sets) == 2
    self.rounds.append(rounds)
    return self.times.pop(0)


@pytest.fixture
def kernels(monkeypatch):
  """Stand-ins on the CPU: config -> what the kernel does to the right result, which is nothing unless a test says."""
  changes = {}

  def kernel(x, *weight, config):
    return changes.get(config, lambda y: y)(matmul_reference(x, *weight))

  monkeypatch.setattr(tune, "_KERNELS", {"triton": kernel, "hopper": kernel, "triton24": kernel})
  monkeypatch.setattr(tune, "current_device", lambda: H200)
  monkeypatch.setattr(tune, "candidates", lambda name, problem, num_sms: CONFIGS)
  monkeypatch.setattr(operands, "copies_for_cold_l2", lambda nbytes: 2)
  return changes


def run(tmp_path, timer, problems=(PROBLEM,), implementations=("triton",), **how):
  return tune.tune(problems, tmp_path / "table.json", implementations=implementations, timer=timer, **how)


def test_the_fastest_is_kept_and_one_far_behind_is_dropped_early(kernels, tmp_path, capsys):
  timer = Script(10e-6, 10e-6, 7e-6, 8e-6, 20e-6, 9.5e-6, 9.7e-6, 5e-6, 6.126e-6)
  table = run(tmp_path, timer)
  assert timer.rounds == [1, 5, 1, 5, 1, 1, 5, 1, 5]  # the third candidate is 2.5 times the best: no second look
  (row,) = table.rows
  assert row.config == CONFIGS[4] and row.time_us == 6.13
  assert (row.implementation, row.m, row.k, row.n, row.dtype) == ("triton", 16, 256, 128, "bfloat16")
  assert tuning.load_table(tmp_path / "table.json") == table
  err = capsys.readouterr().err
  assert "5 candidates for 1 problems" in err and "6.13 us (heuristic 10.00)" in err


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda y: y * 1.0625, "relative error 6.2e-02 must be below 3.9e-03"),
    (lambda y: y.at[3, 5].add(0.1 * jnp.sqrt(jnp.mean(y * y))), "an element is off by"),
    (lambda y: y.at[0, 0].set(jnp.nan), "relative error nan"),
  ],
)
def test_a_wrong_candidate_is_refused_before_it_is_timed(kernels, tmp_path, capsys, change, message):
  kernels[CONFIGS[1]] = change
  timer = Script(*[9e-6] * 8)
  assert run(tmp_path, timer).rows[0].config == CONFIGS[0]
  assert not timer.times
  err = capsys.readouterr().err
  assert "refused: triton, K=256 N=128 M=16" in err and message in err and str(CONFIGS[1]) in err


def test_a_result_that_changes_is_refused():
  results = iter([1.0, 1.0 + 2**-7])
  want = np.ones((1, 4), np.float32)
  with pytest.raises(ArithmeticError, match="not the same at every call"):
    tune.measure(lambda: jnp.full((1, 4), next(results), jnp.bfloat16), [(), ()], want, None, Script(1e-6, 1e-6))


def test_a_candidate_that_does_not_compile_is_skipped(kernels, tmp_path, capsys):
  def too_large(y):
    raise ValueError("needs 300 KB of shared memory\nand more lines")

  def broken(y):
    raise AssertionError

  kernels |= {CONFIGS[0]: too_large, CONFIGS[3]: broken}
  assert run(tmp_path, Script(*[9e-6] * 2, *[8e-6] * 4)).rows[0].config == CONFIGS[2]
  err = capsys.readouterr().err
  assert "skipped: triton, K=256 N=128 M=16" in err and "needs 300 KB of shared memory\n" in err
  assert f"{CONFIGS[3]}: AssertionError()\n" in err


def test_without_a_right_candidate_there_is_no_row(kernels, tmp_path, capsys):
  kernels.update({config: lambda y: -y for config in CONFIGS})
  assert run(tmp_path, Script()).rows == ()
  assert "no candidate works: triton, K=256 N=128 M=16" in capsys.readouterr().err


def test_rows_for_other_problems_stay_and_the_same_are_replaced(kernels, tmp_path):
  other = dataclasses.replace(PROBLEM, m=1)
  first = run(tmp_path, Script(*[9e-6] * 20), [PROBLEM, other])
  assert [row.m for row in first.rows] == [16, 1]
  tuning.load_table.cache_clear()
  second = run(tmp_path, Script(*[3e-6] * 10), [other])
  assert [(row.m, row.time_us) for row in second.rows] == [(16, 9.0), (1, 3.0)]


def test_sparse_weights_are_tuned_for_the_kernels_that_take_them(kernels, tmp_path, capsys):
  sparse = dataclasses.replace(PROBLEM, sparse24=True)
  table = run(tmp_path, Script(*[9e-6] * 20), [PROBLEM, sparse], ["triton", "triton24"])
  assert [(row.implementation, row.sparse24) for row in table.rows] == [("triton", False), ("triton24", True)]
  assert "triton24, 2:4, K=256 N=128 M=16: 9.00 us" in capsys.readouterr().err
  assert tuning.load_table(tmp_path / "table.json") == table


def test_the_kernel_of_sparse_weights_takes_what_is_tuned_on(lower_for_h200, monkeypatch):
  monkeypatch.setattr(operands, "copies_for_cold_l2", lambda nbytes: 1)
  problem = dataclasses.replace(PROBLEM, sparse24=True)
  (config, *_) = heuristics.candidates("triton24", problem, 132)
  kernel = functools.partial(tune._KERNELS["triton24"], config=config)
  text = lower_for_h200(kernel, operands.random_x(problem), *operands.random_weights(problem)[0])
  assert "w4a16_sparse24_triton" in text


def test_a_table_of_another_device_is_not_added_to(kernels, tmp_path):
  tuning.write_table(tmp_path / "table.json", tuning.TunedTable(device="NVIDIA L4", jax_version="0", rows=()))
  with pytest.raises(ValueError, match="is a table for 'NVIDIA L4', and this is 'NVIDIA H200'"):
    run(tmp_path, Script())


def test_batch_sizes_of_one_bucket_are_one_problem():
  problems = [dataclasses.replace(PROBLEM, m=m) for m in (9, 16, 2, 8, 17)]
  problems.append(dataclasses.replace(PROBLEM, n=192))
  first, second = tune.tasks_by_shape(problems, H200, ["triton"], 3)
  assert [task.problem.m for task in first] == [16, 8, 32] and [task.problem.n for task in second] == [192]
  assert all(len(task.configs) == 3 for task in first)


def test_with_no_time_left_only_the_heuristic_is_measured(kernels, tmp_path, capsys):
  timer = Script(9e-6, 9e-6)
  assert run(tmp_path, timer, seconds=0.0).rows[0].config == CONFIGS[0]
  assert not timer.times and "left out 4 candidates for lack of time" in capsys.readouterr().err


def test_a_kernel_that_never_ends_ends_the_process_and_is_named(monkeypatch, capsys):
  ended = []
  monkeypatch.setattr(tune, "_PATIENCE", 0.01)
  monkeypatch.setattr(tune.os, "_exit", ended.append)
  with tune._time_limit("triton, K=1"):
    while not ended:
      pass
  assert ended == [1] and "triton, K=1: still running after 0 s" in capsys.readouterr().err


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU here")
def test_without_a_gpu_nothing_is_tuned(tmp_path):
  with pytest.raises(NotImplementedError, match="nothing tuned"):
    tune.tune([PROBLEM], tmp_path / "table.json")
  assert not list(tmp_path.iterdir())


def test_a_problem_that_no_kernel_takes_is_named():
  problem = dataclasses.replace(PROBLEM, dtype=jnp.dtype(jnp.float32))
  with pytest.raises(NotImplementedError, match=r"nothing to tune for .*triton: x must be bfloat16"):
    tune.tasks_by_shape([problem], H200, ["triton"], None)


@pytest.mark.gpu
def test_a_small_layer_is_tuned(tmp_path):
  table = tune.tune([dataclasses.replace(PROBLEM, k=4096, n=4096)], tmp_path / "table.json", most=2)
  assert {row.implementation for row in table.rows} >= {"triton"} and all(row.time_us > 0 for row in table.rows)
