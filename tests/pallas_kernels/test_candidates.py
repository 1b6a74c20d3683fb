# SPDX-License-Identifier: Apache-2.0
"""What the tuner measures: configs that the kernels take, the heuristic's own first."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import MatmulProblem, layout
from pallas_kernels.heuristics import HEURISTICS, candidates
from pallas_kernels.triton_matmul import matmul_triton

BF16 = jnp.dtype(jnp.bfloat16)


@pytest.mark.parametrize(
  "implementation, sparse24",
  [*((name, name == "triton24") for name in HEURISTICS), ("hopper", True), ("dequantize", True)],
)
@pytest.mark.parametrize("m", [1, 16, 64, 128, 256])
def test_candidates_are_different_and_the_heuristic_is_first(implementation, sparse24, m):
  for (k, n), group_size in itertools.product(((8192, 28672), (4096, 4096), (14336, 4096), (576, 192)), (32, 64, None)):
    if group_size == 32 and implementation == "hopper" and sparse24:
      continue  # it does not take them
    problem = MatmulProblem(m=m, n=n, k=k, group_size=group_size or k, dtype=BF16, sparse24=sparse24)
    configs = candidates(implementation, problem, 132)
    assert configs[0] == HEURISTICS[implementation](problem, 132)
    assert 1 < len(configs) == len(set(configs)) <= 100
    for config in configs:
      assert group_size is None or config.block_k % group_size == 0 or group_size % config.block_k == 0
      if implementation == "hopper":
        assert config.num_stages <= config.max_stages(problem)
        assert group_size != 32 or not config.scale_weights
        assert config.block_k >= problem.tile_k * config.warpgroups_k * (1 + config.decode_ahead)
      else:
        assert layout.padded_shape(k, n)[1] % config.block_n == 0
        assert not sparse24 or config.block_k == 128


def test_what_differs_in_one_respect_comes_before_what_differs_in_two():
  problem = MatmulProblem(m=16, n=12288, k=4096, group_size=128, dtype=BF16)
  first, *others = candidates("triton", problem, 132)
  fields = type(first).__slots__
  respects = [sum(getattr(first, name) != getattr(other, name) for name in fields) for other in others]
  assert respects == sorted(respects) and set(respects) == {1, 2}


def test_every_triton_candidate_is_taken_by_the_kernel():
  problem = MatmulProblem(m=16, n=192, k=1024, group_size=64, dtype=BF16)
  shape = jax.ShapeDtypeStruct
  args = shape((16, 1024), BF16), shape(layout.qweight_shape(1024, 192), jnp.int16), shape((16, 192), BF16)
  for config in candidates("triton", problem, 132)[::5]:
    y = jax.eval_shape(functools.partial(matmul_triton, config=config, interpret=True), *args)
    assert y.shape == (16, 192)
