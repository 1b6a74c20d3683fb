# SPDX-License-Identifier: Apache-2.0
"""A config from the sizes alone, for what no table holds; the constants were measured on an H200 (docs/kernel.md)."""

import dataclasses
from typing import Any

from pallas_kernels import layout, layout24, triton_matmul
from pallas_kernels.hopper_config import ChainConfig, HopperConfig
from pallas_kernels.problem import MatmulProblem
from pallas_kernels.triton_dequantize import DequantizeConfig
from pallas_kernels.triton_matmul import TritonConfig

Config = HopperConfig | TritonConfig | DequantizeConfig

_NEAR = 1.25  # what is to be measured: as far from the best as the estimate of its time may err
_SHORTEST_RUN = 512  # k that a program should have at the least when K is split
# Rows of x from which `dequantize` goes before the Triton kernel of dense and of 2:4 sparse weights. Of 8192 x 28672 an
# H200 writes the dense weight in 144 us (2:4: 202). With the bfloat16 product that is 324, 476 and 759 us at M = 256,
# 512 and 1024 (374, 525, 805); the Triton kernels take 251, 444 and 926 (567, 1071, 2096).
_DEQUANTIZE_FROM = 512
_DEQUANTIZE_FROM_SPARSE24 = 256
_MOST_CHAINED_ROWS = 16


def ranked(problem: MatmulProblem, able: list[str]) -> list[str]:
  """`able`, the implementations that can take `problem` in the order of IMPLEMENTATIONS, with the one that should be
  fastest put first: `hopper`, or of many rows `dequantize`.
  """
  many = problem.m >= (_DEQUANTIZE_FROM_SPARSE24 if problem.sparse24 else _DEQUANTIZE_FROM)
  return sorted(able, key=lambda name: many and "hopper" not in able and name != "dequantize")


def triton_config(problem: MatmulProblem, num_sms: int) -> TritonConfig:
  """The config of the Triton kernel for `problem` on a GPU with `num_sms` multiprocessors."""
  _, n = layout.padded_shape(problem.k, problem.n)
  block_m = next(block for block in (16, 32, 64, 128) if problem.m <= block or block == 128)
  # Wide blocks read x less often, narrow ones leave registers for many rows. Of 14336 x 4096 at M=16 128 columns take
  # 14.3 us and 64 16.3, of 4096 x 12288 12.5 and 13.2; at M=128 of 8192 x 28672 64 are best.
  block_n = 128 if block_m <= 64 and n % 128 == 0 else 64
  # A step of one group is best; a step over several needs a dot for each.
  block_k = 128 if problem.group_size % 128 == 0 or problem.group_size == problem.k else 64
  programs = _triton_programs(problem, block_m, block_n, block_k, num_sms)
  # 76.9 against 81.6 us at M=64 of 8192 x 28672; where K is split, 4 warps are best.
  num_warps = 8 if block_m == 64 and not programs else 4
  return TritonConfig(
    block_m=block_m, block_n=block_n, block_k=block_k, programs=programs, num_warps=num_warps, num_stages=3
  )


def _triton_programs(problem: MatmulProblem, block_m: int, block_n: int, block_k: int, num_sms: int) -> int:
  """As many as fit beside each other: parts of K in a power of two, or, where multiprocessors would get one more or
  one less of those, equal runs of steps. Of 8192 x 28672 448 take 41.2 us at M=16, 512 39.4; at M=32 224 take 53.7 and
  388 48.0. With 64 rows it does not pay: 224 take 73.9, 264 82.3.
  """
  k, n = layout.padded_shape(problem.k, problem.n)
  rows, columns, steps = -(-problem.m // block_m), n // block_n, -(-problem.k // block_k)
  most = {16: 512 // block_n, 32: 3}.get(block_m, 2) * num_sms
  parts = 1
  while 2 * parts * rows * columns <= most and k // (2 * parts) >= _SHORTEST_RUN:
    parts *= 2
  programs = rows * columns * parts
  uneven = programs < 0.9 * num_sms * -(-programs // num_sms)
  run = -(-columns * steps // most)
  if block_m <= 32 and uneven and columns <= most and run * block_k >= _SHORTEST_RUN:
    return most
  return columns * parts if parts > 1 else 0


def triton24_config(problem: MatmulProblem, num_sms: int) -> TritonConfig:
  """The config of the Triton kernel of 2:4 sparse weights: the dense kernel's with the block_k of a tile, and as narrow
  and with as few warps as it was measured.
  """
  config = dataclasses.replace(triton_config(problem, num_sms), block_k=layout24.K_TILE, num_warps=4)
  if config.block_m == 16:
    programs = _triton_programs(problem, 16, 64, config.block_k, num_sms)
    config = dataclasses.replace(config, block_n=64, programs=programs)
  if problem.group_size < layout.TILE and config.block_m == 128:
    # A dot for each of a step's four groups: at 128 rows an H200 refuses the kernel, 398 KiB of shared memory.
    config = dataclasses.replace(config, block_m=64)
  return config


def dequantize_config(problem: MatmulProblem, num_sms: int) -> DequantizeConfig:
  """The config of the kernel that writes the dense weight, 16 KiB of it a program: wider ones are no faster."""
  del num_sms
  group_size = problem.group_size
  block_k = 128 if group_size % 128 == 0 or 128 % group_size == 0 or group_size == problem.k else 64
  return DequantizeConfig(block_n=64, block_k=block_k, num_warps=4)


def hopper_config(problem: MatmulProblem, num_sms: int) -> HopperConfig:
  """The config of the Hopper kernel for `problem` on a GPU with `num_sms` multiprocessors."""
  return _in_turns(_hopper_config(problem, *_hopper_partitions(problem, num_sms)[0]), problem, num_sms)


def _in_turns(config: HopperConfig, problem: MatmulProblem, num_sms: int) -> HopperConfig:
  """With as many programs as multiprocessors where there are more blocks, and where they can take turns."""
  if config.blocks(problem) <= num_sms or config.reduces or config.block_m == 64:  # whose sums would spill
    return config
  # 2:4 sparse weights of many rows have too few stages left beside y: at M=4096 of 8192 x 28672 1552 us with three and
  # in turns, 1506 with four.
  in_turns = dataclasses.replace(config, programs=num_sms, num_stages=2)
  if in_turns.max_stages(problem) < config.num_stages:
    return config
  in_turns = dataclasses.replace(in_turns, num_stages=config.num_stages)
  return config if in_turns.unfit_reason(problem) else in_turns


def _hopper_config(problem: MatmulProblem, warpgroups_n: int, warpgroups_k: int, split_k: int) -> HopperConfig:
  """The config with this partition: as long a step, and as many stages, as were best or as fit."""
  k, _ = layout.padded_shape(problem.k, problem.n)
  block_m = _hopper_block_m(problem)
  block_k, num_stages = {8: (256, 4), 16: (256, 4), 32: (256, 4), 64: (128, 5), 128: (64, 5)}[block_m]
  if problem.sparse24:
    block_k, num_stages = (128, 6) if block_m >= 64 else (256, 6)
  if split_k > 1 or problem.m > 128:
    # 23.5 against 25.5 us with 5, at M=128 of 4096 x 12288. At M=256 of 8192 x 28672 177.8 against 189.3 before the
    # ring was unrolled; since then more are no faster (171.2, and 170.9 with 6).
    num_stages = 4
  block_k = min(block_k * warpgroups_k, 512, k)
  if problem.bits == 8 and block_k > 128 * warpgroups_k:
    block_k //= 2  # the words of a step take as much as with 4 bits
  if problem.group_size < problem.k:
    while block_k % problem.group_size and problem.group_size % block_k:
      block_k //= 2
  config = HopperConfig(
    block_m=block_m,
    warpgroups_n=warpgroups_n,
    warpgroups_k=warpgroups_k,
    block_k=block_k,
    num_stages=2,
    split_k=split_k,
    # Of 128 rows, four warpgroups have no registers for a group's sums; two are faster with scaled weights as well,
    # 29.2 against 32.5 us at M=128 of 14336 x 4096.
    scale_weights=block_m == 128,
    # Two planes of nibbles or positions, 64 rows' sums and the next tile: more than four warpgroups have registers for.
    decode_ahead=block_k > problem.tile_k * warpgroups_k
    and not (block_m >= 64 and (problem.bits == 8 or problem.sparse24)),
    # 31.7 against 34.3 us at M=1 of 8192 x 28672, 35.4 against 37.6 at 16. Three warpgroups with sums of 32 or 64 rows
    # spill, 14.0 against 12.7 us at M=32 of 4096 x 12288. Sparse weights gain nothing with few rows, and compiling
    # takes twice as long.
    unroll=not (warpgroups_n == 3 and block_m in (32, 64)) and not (problem.sparse24 and block_m < 64),
  )
  return dataclasses.replace(config, num_stages=min(num_stages, config.max_stages(problem)))


def _hopper_block_m(problem: MatmulProblem) -> int:
  # Groups of less than a tile take two partial sums, for which 128 rows leave no registers.
  largest = 64 if problem.group_size < min(problem.tile_k, problem.k) else 128
  return next(block for block in (8, 16, 32, 64, 128) if problem.m <= block or block == largest)


def _hopper_partitions(problem: MatmulProblem, num_sms: int) -> list[tuple[int, int, int]]:
  """(warpgroups_n, warpgroups_k, split_k), the one of the least estimated time first.

  A program has a multiprocessor to itself, so time goes with waves of programs times what one takes: reading its
  weights, and a latency to begin and to end. What is split over K must be summed. All in bytes that a multiprocessor
  could read meanwhile, 33 KB a microsecond.
  """
  latency, k_part, cluster = 64 << 10, 4 << 10, 16 << 10
  k, n = layout.padded_shape(problem.k, problem.n)
  block_m = _hopper_block_m(problem)
  choices = [(4, 1), (3, 1), (2, 1), (2, 2), (1, 2), (1, 4)]
  if block_m == 32:
    choices.remove((1, 4))  # leaves too few stages
  if block_m == 64:
    # Two partial sums of 64 rows spill in more than two warpgroups.
    two_sums = problem.group_size < min(problem.tile_k, problem.k)
    choices = [(2, 1), (1, 2)] if two_sums else [(4, 1), (3, 1), (2, 1), (1, 2)]
  if block_m == 128:
    # Over 128 rows, four parts of K beside each other instead of two: 44.2 against 61.4 us at M=256 of 14336 x 4096.
    choices = [(4, 1), (3, 1), *([(1, 2)] if problem.m <= block_m else [(2, 2), (1, 4)])]
    if problem.sparse24 and problem.m > block_m:
      # Four parts of K are 512 k of x and leave no room for a second stage. Two tiles of columns need half the x of two
      # parts of K: 31.7 against 36.0 us at M=256 of 14336 x 4096.
      choices = [(4, 1), (3, 1), (2, 1)]
  times = {}
  for warpgroups_n, warpgroups_k in choices:
    blocks = -(-problem.m // block_m) * -(-n // (layout.TILE * warpgroups_n))
    for split_k in (1, 2, 4):
      if k // (split_k * warpgroups_k) < _SHORTEST_RUN and split_k * warpgroups_k > 1:
        continue
      # Clusters of four do not fill the chip, nor do clusters of three: 32 and 40 of them take two turns on an H200.
      waves = -(-blocks * split_k // (num_sms if split_k < 4 else num_sms * 2 // 3))
      bits = 3 if problem.sparse24 else problem.bits
      weights = layout.TILE * warpgroups_n * -(-k // split_k) * bits // 8
      busy = 1.08 if warpgroups_n * warpgroups_k == 2 else 1.0  # two warpgroups do not quite keep up with memory
      reducing = k_part * (warpgroups_k - 1) + cluster * (split_k > 1)
      times[warpgroups_n, warpgroups_k, split_k] = waves * (weights * busy + latency + reducing)
  best = min(times.values())
  return [choice for choice in sorted(times, key=times.get) if times[choice] <= _NEAR * best]


def chain_config(problems: tuple[MatmulProblem, ...], num_sms: int) -> ChainConfig | str:
  """How `problems` are computed in one launch on a GPU with `num_sms` multiprocessors, or why they are not.

  Every product takes the partition in which a warpgroup has the fewest tiles of codes, where adding up parts of K
  counts as 1.4 tiles, a cluster as 4, and three programs that meet in device memory, of down alone, as 12, or with more
  than 8 rows 26: a tile takes 0.22 us. Where few programs leave memory idle, each 64 k of x that they read counts as
  0.03. That is fitted, not explained (docs/kernel.md).
  """
  clusters, products, programs = num_sms // 2, [], 0
  of_split = {1: 0, 2: 4, 3: 12 if problems[0].m <= 8 else 26}
  if problems[0].m > _MOST_CHAINED_ROWS:
    return f"{problems[0].m} rows are too many, one launch takes {_MOST_CHAINED_ROWS}"
  for i, problem in enumerate(problems):
    k, n = layout.padded_shape(problem.k, problem.n)
    tiles, turns = {}, {}
    for warpgroups_n, warpgroups_k in ((4, 1), (2, 2), (1, 4)):
      for split_k in (1, 2, 3) if i == 2 else (1, 2):
        partition = warpgroups_n, warpgroups_k, split_k
        shared = split_k * warpgroups_k > 1
        short = k // (split_k * warpgroups_k) < _SHORTEST_RUN and shared
        blocks = -(-n // (layout.TILE * warpgroups_n))
        turns[partition] = -(-blocks // (clusters * 2 // split_k))
        if not short and (turns[partition] == 1 or (i == 1 and not shared)):  # ChainConfig.takes_turns
          each = turns[partition] * -(-k // (problem.tile_k * warpgroups_k * split_k))
          if blocks * split_k < 0.75 * num_sms:
            each += 0.03 * k / (layout.TILE * split_k)
          tiles[partition] = each + 1.4 * (warpgroups_k > 1) + of_split[split_k]
    if not tiles:
      return f"n={problem.n} are too many columns for programs that are all on {num_sms} multiprocessors at once"
    best = min(tiles, key=tiles.get)
    config = _hopper_config(problem, *best)
    products.append(config)
    # No more programs than have work: fewer to wait for.
    programs = max(programs, -(-problem.n // config.block_n // turns[best]) * config.split_k)
  reason = ""
  for stages in range(min(c.num_stages for c in products), 1, -1):  # each product takes over those of the one before
    like = tuple(dataclasses.replace(c, num_stages=stages) for c in products)
    config = ChainConfig(products=like, clusters=-(-programs // 2))
    if not (reason := config.unfit_reason(problems)):
      return config
  return reason


# implementation -> (problem, multiprocessors) -> config
HEURISTICS = {
  "hopper": hopper_config,
  "triton": triton_config,
  "triton24": triton24_config,
  "dequantize": dequantize_config,
}


def candidates(implementation: str, problem: MatmulProblem, num_sms: int) -> list[Config]:
  """The configs worth measuring for `problem`, most promising first: the heuristic's, then what differs from it in one
  respect, then in two. A config that its class refuses, for shared memory or registers, is not among them.
  """
  first = HEURISTICS[implementation](problem, num_sms)
  if implementation == "hopper":
    respects = _hopper_changes(first, problem, num_sms)
  elif implementation == "dequantize":
    respects = [[dict(num_warps=8)], [dict(block_n=128)]]
  else:
    respects = _triton_changes(first, problem, num_sms)
  changes = [respect[i] for i in range(max(map(len, respects))) for respect in respects if i < len(respect)]
  for i, one in enumerate(respects):
    changes += [a | b for other in respects[i + 1 :] for a in one for b in other]
  configs = [first]
  for change in changes:
    try:
      config = dataclasses.replace(first, **change)
      if implementation == "hopper" and "block_k" in change:
        config = dataclasses.replace(config, num_stages=min(8, config.max_stages(problem)))
    except ValueError:
      continue
    if config not in configs and _unfit_reason(config, problem) is None:
      configs.append(config)
  return configs


def _hopper_changes(first: HopperConfig, problem: MatmulProblem, num_sms: int) -> list[list[dict[str, Any]]]:
  partitions = [
    dataclasses.asdict(_hopper_config(problem, *partition)) for partition in _hopper_partitions(problem, num_sms)
  ]
  # `candidates` makes it as many stages as shared memory holds.
  steps = [
    dict(block_k=b, num_stages=2, decode_ahead=b > problem.tile_k * first.warpgroups_k) for b in (128, 256, 64, 512)
  ]
  where = [dict(scale_weights=not first.scale_weights)] if first.block_m >= 64 else []
  return [steps, partitions, where, [dict(unroll=not first.unroll)], [dict(programs=0)] if first.programs else []]


def _triton_changes(first: TritonConfig, problem: MatmulProblem, num_sms: int) -> list[list[dict[str, Any]]]:
  columns = layout.padded_shape(problem.k, problem.n)[1] // first.block_n
  now = first.programs or columns
  counts = {now * 2, now // 2, 2 * num_sms, 3 * num_sms, 4 * num_sms, columns}
  nearest = sorted(
    (count for count in counts if columns // 2 <= count <= 4 * now), key=lambda count: abs(count / now - 1)
  )
  return [
    [dict(programs=count if count != columns else 0) for count in nearest[:4]],
    [dict(num_stages=s) for s in (4, 2, 5)],
    [dict(block_n=b) for b in (128, 64, 256)],
    [dict(num_warps=w) for w in (8, 2)],
    [dict(block_k=64)],
    [dict(block_m=b) for b in (first.block_m * 2, first.block_m // 2)],
  ]


def _unfit_reason(config: Config, problem: MatmulProblem) -> str | None:
  """Why the kernel cannot compute `problem` with `config`; None if it can."""
  if isinstance(config, HopperConfig):
    return config.unfit_reason(problem)
  return triton_matmul.unfit_reason(config, problem)
