# SPDX-License-Identifier: Apache-2.0
"""From a problem to a config: heuristics from the sizes alone."""

from pallas_kernels import layout
from pallas_kernels.problem import MatmulProblem
from pallas_kernels.triton_matmul import TritonConfig


def triton_config(problem: MatmulProblem, num_sms: int) -> TritonConfig:
  """The config of the Triton kernel for `problem` on a GPU with `num_sms` multiprocessors."""
  k, n = layout.padded_shape(problem.k, problem.n)
  block_m = next(block for block in (16, 32, 64, 128) if problem.m <= block or block == 128)
  block_n = 128 if n % 128 == 0 else 64
  block_k = min(128, problem.group_size) if problem.group_size < problem.k else 128
  blocks = -(-problem.m // block_m) * (n // block_n)
  # Enough programs for two on every multiprocessor, but at least 512 k for each.
  split_k = max(1, min(2 * num_sms // blocks, k // 512))
  return TritonConfig(
    block_m=block_m,
    block_n=block_n,
    block_k=block_k,
    split_k=split_k,
    num_warps=8 if block_m >= 64 else 4,
    num_stages=3,
  )
