# SPDX-License-Identifier: Apache-2.0
"""A config from the sizes alone, for what no table holds; the constants were measured on an H200 (docs/kernel.md)."""

import dataclasses
from typing import Any

from pallas_kernels import layout
from pallas_kernels.hopper_matmul import HopperConfig
from pallas_kernels.problem import MatmulProblem
from pallas_kernels.triton_matmul import TritonConfig

_NEAR = 1.25  # what is to be measured: as far from the best as the estimate of its time may err
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
  """(computing warpgroups, split_k) of the least time."""
  times = _partition_times(choices, m_blocks, k, n, num_sms)
  return min(times, key=lambda choice: (times[choice], choice[1]))


def _partition_times(
  choices: tuple[int, ...], m_blocks: int, k: int, n: int, num_sms: int
) -> dict[tuple[int, int], int]:
  """(computing warpgroups, split_k) -> the time that it should take.

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
  return times


# implementation -> (problem, multiprocessors) -> config
HEURISTICS = {"hopper": hopper_config, "triton": triton_config}


def candidates(implementation: str, problem: MatmulProblem, num_sms: int) -> list[HopperConfig | TritonConfig]:
  """The configs worth measuring for `problem`, most promising first: the heuristic's, then what differs from it in one
  respect, then in two. A config that its class refuses, for shared memory or registers, is not among them.
  """
  first = HEURISTICS[implementation](problem, num_sms)
  respects = _hopper_changes(first, problem, num_sms) if implementation == "hopper" else _triton_changes(first)
  changes = [respect[i] for i in range(max(map(len, respects))) for respect in respects if i < len(respect)]
  for i, one in enumerate(respects):
    changes += [a | b for other in respects[i + 1 :] for a in one for b in other]
  configs = [first]
  for change in changes:
    try:
      config = dataclasses.replace(first, **change)
      if implementation == "hopper" and "block_k" in change:
        runs = 1 if problem.group_size == problem.k else max(1, config.block_k // problem.group_size)
        config = dataclasses.replace(config, num_stages=min(8, config.max_stages(runs)))
    except ValueError:
      continue
    if config not in configs and _fits(config, problem):
      configs.append(config)
  return configs


def _hopper_changes(first: HopperConfig, problem: MatmulProblem, num_sms: int) -> list[list[dict[str, Any]]]:
  k, n = layout.padded_shape(problem.k, problem.n)
  times = _partition_times((2, 3, 4), -(-problem.m // first.block_m), k, n, num_sms)
  near = [choice for choice in sorted(times, key=times.get) if times[choice] < _NEAR * min(times.values())]
  partitions = [dict(num_compute_warpgroups=warpgroups, split_k=split_k) for warpgroups, split_k in near]
  # `candidates` makes it as many stages as shared memory holds.
  steps = [dict(block_k=b, num_stages=2, decode_ahead=b > layout.TILE) for b in (128, 256, 64, 512)]
  where = [dict(scale_weights=not first.scale_weights)] if first.block_m >= 64 else []
  return [steps, partitions, where]


def _triton_changes(first: TritonConfig) -> list[list[dict[str, Any]]]:
  return [
    [dict(split_k=s) for s in (2 * first.split_k, first.split_k // 2, 4 * first.split_k) if 1 <= s <= 16],
    [dict(num_stages=s) for s in (4, 2, 5)],
    [dict(block_n=b) for b in (128, 64, 256)],
    [dict(num_warps=w) for w in (8, 2)],
    [dict(block_k=64)],
    [dict(block_m=b) for b in (first.block_m * 2, first.block_m // 2)],
  ]


def _fits(config: HopperConfig | TritonConfig, problem: MatmulProblem) -> bool:
  """Whether the kernel takes `config` for `problem`."""
  group_size, block_k = problem.group_size, config.block_k
  _, n = layout.padded_shape(problem.k, problem.n)
  if isinstance(config, TritonConfig) and n % config.block_n:
    return False
  if group_size == problem.k:
    return True
  if isinstance(config, HopperConfig):
    runs = max(1, block_k // group_size)
    if config.num_stages > config.max_stages(runs) or (config.scale_weights and group_size < layout.TILE):
      return False
  return block_k % group_size == 0 or group_size % block_k == 0
