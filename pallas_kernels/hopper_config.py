# SPDX-License-Identifier: Apache-2.0
"""What one program of the Hopper kernel computes and how; a config that a GPU would refuse or hang on is none."""

import dataclasses

from pallas_kernels import layout
from pallas_kernels.hardware import H200
from pallas_kernels.hopper_reduce import PITCH
from pallas_kernels.problem import MatmulProblem

FEW_REGISTERS = 32  # of a thread that does not compute
_LAUNCH_REGISTERS = {2: 256, 3: 168, 4: 128, 5: 96}  # per thread, by warpgroups of a program
_MANY_ROWS = 128
_BARRIER_BYTES = 2048
_ALIGNMENT = 1024  # bytes that the smallest array in shared memory takes


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HopperConfig:
  """What one program computes, and how.

  Attributes:
    block_m: rows of x, the N of the matrix instruction.
    warpgroups_n: columns of a program, in tiles of 64.
    warpgroups_k: warpgroups that share the K of a tile of columns. Their product computes, one more warpgroup copies.
    block_k: k per pipeline stage; a tile of 2:4 sparse weights has 128, of dense ones 64.
    num_stages: stages in shared memory.
    split_k: programs that share one output block; each sums a run of K. 2 or 4 are a cluster. 3 meet in device memory,
      for which all must be on the card at once (ChainConfig): of clusters of 3 an H200 holds no more than of 4.
    scale_weights: multiply the weights, rounding them to x's dtype, and not each group's float32 sum. Costs
      64 / block_m of the other way for groups of 128 and saves a second accumulator.
    decode_ahead: dequantize the next tile while the tensor cores work on this one. Needs two tiles a stage and
      warpgroup: with one, both fragments would be the same loop-carried registers, and ptxas serialises the kernel
      (its note C7513).
    unroll: go once round the ring of stages in a turn of the loop, so that addresses are constants.
    programs: so many programs compute all blocks, each several in turn, and copy the first stages of the next one while
      they write one. 0: each block has a program of its own.
  """

  block_m: int
  warpgroups_n: int
  warpgroups_k: int = 1
  block_k: int
  num_stages: int
  split_k: int = 1
  scale_weights: bool = False
  decode_ahead: bool = True
  unroll: bool = False
  programs: int = 0

  def __post_init__(self):
    for name, allowed in dict(
      block_m=(8, 16, 32, 64, _MANY_ROWS),
      warpgroups_n=(1, 2, 3, 4),
      warpgroups_k=(1, 2, 4),
      block_k=(64, 128, 256, 512),
      split_k=(1, 2, 3, 4),
    ).items():
      if getattr(self, name) not in allowed:
        raise ValueError(f"{name}={getattr(self, name)} must be one of {allowed}")
    if self.compute_warpgroups > 4:
      raise ValueError(f"warpgroups_n={self.warpgroups_n} times warpgroups_k={self.warpgroups_k} must be at most 4")
    if self.num_stages < 2:
      raise ValueError(f"num_stages={self.num_stages} must be at least 2")
    if self.programs < 0 or (self.programs and self.reduces):
      raise ValueError(f"programs={self.programs} must be 0 where parts of K are added up, and never negative")
    least = layout.TILE * self.warpgroups_k * (1 + self.decode_ahead)
    if self.block_k < least:
      raise ValueError(f"block_k={self.block_k} must be at least {least} for {self}")
    if self.num_stages > self.max_stages():
      raise ValueError(
        f"num_stages={self.num_stages} of {self} must be at most {self.max_stages()} to fit shared memory"
      )
    # Accumulators, two fragments, and what addresses and the loop take.
    needed = self.block_m // 2 * (1 if self.scale_weights else 2) + 16 * (1 + self.decode_ahead) + 16
    if needed > self.compute_registers:
      raise ValueError(f"{self} needs some {needed} registers a thread; {self.compute_registers} can be had")

  @property
  def compute_warpgroups(self) -> int:
    """Warpgroups that compute."""
    return self.warpgroups_n * self.warpgroups_k

  @property
  def block_n(self) -> int:
    """Columns of one program."""
    return layout.TILE * self.warpgroups_n

  @property
  def warpgroups(self) -> int:
    """Warpgroups that compute, and the one that copies."""
    return self.compute_warpgroups + 1

  @property
  def meets_in_memory(self) -> bool:
    """Whether programs that share a block are no cluster."""
    return self.split_k == 3

  @property
  def cluster(self) -> int:
    """Programs of a cluster."""
    return 1 if self.meets_in_memory else self.split_k

  @property
  def reduces(self) -> bool:
    """Whether a block is a sum over warpgroups or programs."""
    return self.warpgroups_k * self.split_k > 1

  @property
  def y_in_ring(self) -> bool:
    """Whether what a program writes takes as much shared memory as what it reads: both then use the same.

    With less rows that would cost 0.2 us, for the barrier between reading and writing; in turns there is no time at
    which nothing is read.
    """
    return self.block_m == _MANY_ROWS and not self.programs

  @property
  def compute_registers(self) -> int:
    """Registers of a computing thread.

    A warpgroup that asks for more waits until another one has given enough away: for ever, if the sum over all
    warpgroups exceeds what the program was launched with, which is the register file divided by its threads and
    rounded down to a multiple of 8.
    """
    others = self.warpgroups - self.compute_warpgroups
    pool = self.warpgroups * _LAUNCH_REGISTERS[self.warpgroups]
    return min(240, (pool - others * FEW_REGISTERS) // self.compute_warpgroups // 8 * 8)

  def blocks(self, problem: MatmulProblem) -> int:
    """Of block_n columns and block_m rows."""
    return -(-problem.n // self.block_n) * -(-problem.m // self.block_m)

  def groups_per_stage(self, problem: MatmulProblem) -> int:
    """Rows of scales that a stage has."""
    return 1 if problem.group_size == problem.k else max(1, self.block_k // problem.group_size)

  def group_size(self, problem: MatmulProblem) -> int:
    """k that share a scale; a whole column has the same one in every step, however long the column is."""
    return problem.group_size if problem.group_size < problem.k else self.block_k

  def unfit_reason(self, problem: MatmulProblem) -> str | None:
    """Why the kernel cannot compute `problem` with this config; None if it can."""
    group_size, tile_k, k = problem.group_size, problem.tile_k, problem.k
    most = self.max_stages(problem)
    if group_size < k and self.block_k % group_size and group_size % self.block_k:
      return f"block_k={self.block_k} and group_size={group_size}: one must divide the other"
    if self.scale_weights and group_size < min(tile_k, k):
      return f"scale_weights needs groups of at least {tile_k}, not group_size={group_size}"
    if self.block_k < tile_k * self.warpgroups_k * (1 + self.decode_ahead):
      return f"{self} has too short a block_k for tiles of {tile_k} k"
    if self.num_stages > most:
      return f"{self} has shared memory for {most} stages of {problem}"
    if -(-k // self.block_k) < self.split_k:
      return f"split_k={self.split_k} must be at most the steps of block_k={self.block_k} in K={k}"
    # What a warpgroup writes of one block must be out of shared memory before it is done with the next, and a warp may
    # be as many steps ahead of another as there are stages.
    if self.programs and -(-k // self.block_k) <= self.num_stages:
      return f"programs={self.programs} need more than {self.num_stages} steps of block_k={self.block_k} in K={k}"
    return None

  def max_stages(self, problem: MatmulProblem | None = None) -> int:
    """Stages that fit into shared memory beside the barriers and, of few rows, the output, with float32 scales.

    None is the problem that takes the least: 2:4 sparse, with a group a stage.
    """
    y = 0 if self.y_in_ring else self.y_bytes
    return (H200.shared_memory - y - _BARRIER_BYTES) // self.stage_bytes(problem)

  @property
  def y_bytes(self) -> int:
    """Shared memory of the warpgroups' sums."""
    size = 4 if self.reduces else 2
    return self.compute_warpgroups * self.block_m * PITCH[size] * size

  def stage_bytes(self, problem: MatmulProblem | None = None) -> int:
    """Shared memory of a stage at the most, with float32 scales; None: see `max_stages`."""
    return sum(self.stage_parts(problem).values())

  def stage_parts(self, problem: MatmulProblem | None = None) -> dict[str, int]:
    """`stage_bytes` by what takes them."""
    bits, groups, group_bytes = 3, 1, 4
    if problem is not None:
      bits, groups = 3 if problem.sparse24 else problem.bits, self.groups_per_stage(problem)
      group_bytes = 6 if problem.zeros else 4
    return dict(
      words=self.block_n * self.block_k * bits // 8,
      x=self.block_m * self.block_k * 2,
      groups=groups * self.block_n * group_bytes,
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ChainConfig:
  """Products in one launch, each of which reads what the one before wrote (hopper_chain.py).

  Attributes:
    products: a config each, of as many warpgroups, in clusters of two programs or without.
    clusters: of two programs; all of them must be on the card at once.
  """

  products: tuple[HopperConfig, ...]
  clusters: int

  def __post_init__(self):
    first = self.products[0]
    for c in self.products:
      if any(getattr(c, name) != getattr(first, name) for name in ("compute_warpgroups", "block_m", "num_stages")):
        raise ValueError(f"products={self.products} must be of one block_m and of as many warpgroups and stages")
      if c.split_k > 3 or c.y_in_ring:
        raise ValueError(f"{c} must not split K by more than 3, and have less than {_MANY_ROWS} rows")
    if self.clusters < 1:
      raise ValueError(f"clusters={self.clusters} must be at least 1")

  def blocks(self, i: int, problem: MatmulProblem) -> int:
    """Of columns that product i has; a program, or as many as share K, has one of them or none, or several in turn if
    it does not share what it sums.
    """
    return self.products[i].blocks(problem)

  def takes_turns(self, i: int, problem: MatmulProblem) -> bool:
    """Whether a program may have several blocks of product i: what one leaves in shared memory, the sums of a warpgroup
    and factors of rows, must have been read when the next one is as far.
    """
    c, steps = self.products[i], -(-problem.k // self.products[i].block_k)
    return 0 < i < len(self.products) - 1 and not c.reduces and steps > c.num_stages

  def unfit_reason(self, problems: tuple[MatmulProblem, ...]) -> str | None:
    """Why the kernel cannot compute `problems` with this config; None if it can."""
    if len({(problem.bits, problem.zeros, problem.sparse24) for problem in problems}) > 1:
      return "weights must be of one kind"
    parts = []
    for i, (c, problem) in enumerate(zip(self.products, problems, strict=True)):
      if problem.m > c.block_m:
        return f"{problem} has more than block_m={c.block_m} rows"
      if c.meets_in_memory and i == 1:
        return f"{c} must not split the K of gated columns by {c.split_k}"
      if self.blocks(i, problem) > (most := self.clusters * 2 // c.split_k) and not self.takes_turns(i, problem):
        return f"{problem} has more than {most} blocks of columns"
      if reason := c.unfit_reason(problem):
        return reason
      groups = c.groups_per_stage(problem) * c.block_n * 2 * (1 + problem.zeros)  # of 16 bits
      parts.append(c.stage_parts(problem) | dict(groups=groups))
    largest = {name: max(part[name] for part in parts) for name in parts[0]}
    size = self.products[0].num_stages * sum(largest.values()) + max(c.y_bytes for c in self.products)
    size += _BARRIER_BYTES + 4 * _ALIGNMENT  # two products have factors of rows, in two arrays each
    if size > H200.shared_memory:
      return f"{self} takes {size} bytes of shared memory, of {H200.shared_memory}"
    return None
