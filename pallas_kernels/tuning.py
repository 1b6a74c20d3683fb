# SPDX-License-Identifier: Apache-2.0
"""From a problem to a config: heuristics from the sizes alone."""

from pallas_kernels import layout
from pallas_kernels.problem import MatmulProblem
from pallas_kernels.triton_matmul import TritonConfig


def triton_config(problem: MatmulProblem, num_sms: int) -> TritonConfig:
  """The config of the Triton kernel for `problem` on a GPU with `num_sms` multiprocessors."""
  k, n = layout.padded_shape(problem.k, problem.n)
  block_m = next(block for block in (16, 32, 64, 128) if problem.m <= block or block == 128)
  # Wide blocks read x less often, narrow ones leave registers for many rows and programs for small layers. Measured
  # on an H200 at K=8192, N=28672: 64 columns at M=16 and 128, 128 columns at M=64.
  block_n = 128 if 32 <= block_m <= 64 and n % 128 == 0 else 64
  # A step of one group is best; a step over several needs a dot for each.
  block_k = 128 if problem.group_size % 128 == 0 or problem.group_size == problem.k else 64
  # As many programs as fit beside each other, in powers of two, with at least 512 k for each.
  programs = -(-problem.m // block_m) * (n // block_n)
  most = (8 if block_m == 16 else 2) * num_sms
  split_k = 1
  while 2 * split_k * programs <= most and k // (2 * split_k) >= 512:
    split_k *= 2
  return TritonConfig(block_m=block_m, block_n=block_n, block_k=block_k, split_k=split_k, num_warps=4, num_stages=3)
