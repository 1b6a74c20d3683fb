# SPDX-License-Identifier: Apache-2.0
"""A config from the sizes alone, for what no table holds; the constants were measured on an H200 (docs/kernel.md)."""

import dataclasses

from pallas_kernels import layout
from pallas_kernels.hopper_matmul import HopperConfig
from pallas_kernels.problem import MatmulProblem
from pallas_kernels.triton_matmul import TritonConfig

_SHORTEST_RUN = 512  # k that a program should have at the least when K is split


def triton_config(problem: MatmulProblem, num_sms: int) -> TritonConfig:
  """The config of the Triton kernel for `problem` on a GPU with `num_sms` multiprocessors."""
  k, n = layout.padded_shape(problem.k, problem.n)
  block_m = next(block for block in (16, 32, 64, 128) if problem.m <= block or block == 128)
  # Wide blocks read x less often, narrow ones leave registers for many rows and programs for small layers. Measured
  # at K=8192, N=28672: 64 columns are best at M=16 and 128, 128 columns at M=64.
  block_n = 128 if 32 <= block_m <= 64 and n % 128 == 0 else 64
  # A step of one group is best; a step over several needs a dot for each.
  block_k = 128 if problem.group_size % 128 == 0 or problem.group_size == problem.k else 64
  # As many programs as fit beside each other, in powers of two.
  programs = -(-problem.m // block_m) * (n // block_n)
  most = (8 if block_m == 16 else 2) * num_sms
  split_k = 1
  while 2 * split_k * programs <= most and k // (2 * split_k) >= _SHORTEST_RUN:
    split_k *= 2
  return TritonConfig(block_m=block_m, block_n=block_n, block_k=block_k, split_k=split_k, num_warps=4, num_stages=3)


def hopper_config(problem: MatmulProblem, num_sms: int) -> HopperConfig:
  """The config of the Hopper kernel for `problem` on a GPU with `num_sms` multiprocessors."""
  k, n = layout.padded_shape(problem.k, problem.n)
  several_groups_a_tile = problem.group_size < min(layout.TILE, problem.k)
  # Two partial sums a tile take more registers than a wide block leaves.
  largest = 64 if several_groups_a_tile else 128
  block_m = next(block for block in (8, 16, 32, 64, 128) if problem.m <= block or block == largest)
  block_k, num_stages = {8: (256, 4), 16: (256, 4), 32: (256, 4), 64: (128, 5), 128: (64, 5)}[block_m]
  if problem.m > 128:
    num_stages = 4  # 177.8 against 189.3 us with 5, at M=256
  block_k = min(block_k, k)
  if problem.group_size < problem.k:
    while block_k % problem.group_size and problem.group_size % block_k:
      block_k //= 2
  # Two partial sums of 64 rows spill in more than two warpgroups; 128 rows read x too often in fewer than four.
  choices = (2,) if block_m == 64 and several_groups_a_tile else (4,) if block_m == 128 else (4, 3, 2)
  warpgroups, split_k = _partition(choices, -(-problem.m // block_m), k, n, num_sms)
  config = HopperConfig(
    block_m=block_m,
    num_compute_warpgroups=warpgroups,
    block_k=block_k,
    num_stages=2,
    split_k=split_k,
    # The only way to four warpgroups with 128 rows, and the faster one by 13 %: 96.2 against 110.7 us.
    scale_weights=block_m == 128,
    decode_ahead=block_k > layout.TILE,
  )
  groups_per_stage = max(1, block_k // problem.group_size) if problem.group_size < problem.k else 1
  most = config.max_stages(groups_per_stage)
  return dataclasses.replace(config, num_stages=min(num_stages, most))


def _partition(choices: tuple[int, ...], m_blocks: int, k: int, n: int, num_sms: int) -> tuple[int, int]:
  """(computing warpgroups, split_k) of the least time.

  A program has a multiprocessor to itself, so time goes with waves of programs times what one takes: reading its
  weights, and a latency to begin and to end. A split costs a second pass. All in bytes that a multiprocessor could
  read meanwhile, 33 KB a microsecond.
  """
  latency, second_pass = 64 << 10, 40 << 10
  times = {}
  for warpgroups in choices:
    blocks = m_blocks * -(-n // (layout.TILE * warpgroups))
    for split_k in range(1, max(1, min(8, k // _SHORTEST_RUN)) + 1):
      waves = -(-blocks * split_k // num_sms)
      weights = layout.TILE * warpgroups * -(-k // split_k) // 2
      times[warpgroups, split_k] = waves * (weights + latency) + (second_pass if split_k > 1 else 0)
  return min(times, key=lambda choice: (times[choice], choice[1]))


# implementation -> (problem, multiprocessors) -> config
HEURISTICS = {"hopper": hopper_config, "triton": triton_config}
