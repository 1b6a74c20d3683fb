# SPDX-License-Identifier: Apache-2.0
"""The Triton-lowered kernel of 2:4 sparse weights beyond its shared suite: every config, lowered and run."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import MatmulProblem, heuristics, layout24
from pallas_kernels.triton_matmul import TritonConfig, loops_of_columns
from pallas_kernels.triton_matmul24 import matmul_triton24
from tests.pallas_kernels import problems

BF16 = jnp.dtype(jnp.bfloat16)
CONFIG = TritonConfig(block_m=16, block_n=64, block_k=128, programs=0, num_warps=4, num_stages=3)


@pytest.mark.parametrize("dtype, fma", [(jnp.bfloat16, "fma.rn.bf16x2"), (jnp.float16, "fma.rn.f16x2")])
@pytest.mark.parametrize("m", [1, 17, 64, 257])
@pytest.mark.parametrize("group_size", [32, 64, 128, 4096])
def test_every_config_the_heuristic_gives_lowers_for_an_h200(lower_for_h200, triton_ir, group_size, m, dtype, fma):
  k, n = 4096, 28672 if m == 1 else 1088
  problem = MatmulProblem(m=m, n=n, k=k, group_size=group_size, dtype=jnp.dtype(dtype), sparse24=True)
  config = heuristics.triton24_config(problem, num_sms=132)
  shape = jax.ShapeDtypeStruct
  words = shape(layout24.qweight_shape(k, n), jnp.int16), shape(layout24.meta_shape(k, n), jnp.int16)
  args = shape((m, k), dtype), *words, shape((k // group_size, n), dtype)
  lower_for_h200(functools.partial(matmul_triton24, config=config), *args)
  (text,) = triton_ir
  loops = loops_of_columns(config, problem)
  problems.assert_lean(text, fma, 4 * loops, max(1, config.block_k // group_size) * loops)


@pytest.mark.parametrize(
  "change",
  [
    dict(),
    dict(block_m=32),
    dict(block_n=128),
    dict(block_n=256),
    dict(num_warps=8),
    *(dict(programs=programs) for programs in (3, 4, 7, 20, 32)),
    dict(block_m=64, block_n=128, programs=3),
  ],
  ids=str,
)
def test_configs_agree_bit_by_bit_where_arithmetic_is_exact(rng, change):
  # K = 640 is five tiles and padded to six; of 32 programs twelve have nothing to do.
  x, codes, scales = problems.cancel(rng, 33, 640, 256, 5, BF16)
  codes = problems.prune24(codes)
  config = dataclasses.replace(CONFIG, **change)
  y = matmul_triton24(x, *layout24.pack_codes(codes), scales, config=config, interpret=True)
  np.testing.assert_array_equal(y, jnp.asarray(problems.expected(x, codes, scales), jnp.float32).astype(BF16))


@pytest.mark.parametrize("density", [0, 1, 2])
def test_every_mask_of_every_place_is_expanded(density):
  # Each quad of the tile keeps another mask than its neighbours; the identity shows the weight, zeros too.
  codes = problems.sparse24_codes(np.random.default_rng(7), 128, 64, density)
  args = *layout24.pack_codes(codes), jnp.ones((1, 64), BF16)
  w = matmul_triton24(jnp.eye(128, dtype=BF16), *args, config=CONFIG, interpret=True)
  np.testing.assert_array_equal(w, np.asarray(codes, np.float32) - 8)


@pytest.mark.parametrize("group_size", [16, 32, 64])
def test_a_step_over_several_groups_keeps_them_apart(rng, group_size):
  x, codes, scales = problems.random(rng, 5, 384, 64, 384 // group_size, BF16)
  codes = problems.prune24(codes)
  config = dataclasses.replace(CONFIG, programs=2)
  y = matmul_triton24(x, *layout24.pack_codes(codes), scales, config=config, interpret=True)
  problems.assert_close(y, x, codes, scales)


@pytest.mark.parametrize(
  "change, groups, message",
  [
    (dict(block_k=64), 1, "block_k=64 must be 128, the k of a tile"),
    (dict(), 2, "block_k=128 and group_size=192: one must divide the other"),
    (dict(block_n=256), 1, "block_n=256 must divide the padded N=64"),
  ],
)
def test_a_config_that_does_not_fit_the_problem_is_refused(rng, change, groups, message):
  x, codes, scales = problems.random(rng, 1, 384, 64, groups, BF16)
  words = layout24.pack_codes(problems.prune24(codes))
  with pytest.raises(ValueError, match=message):
    matmul_triton24(x, *words, scales, config=dataclasses.replace(CONFIG, **change), interpret=True)
