# SPDX-License-Identifier: Apache-2.0
"""The Triton-lowered kernel beyond its shared suite: every config, lowered for an H200 and run in interpret mode."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import MatmulProblem, heuristics, layout, matmul
from pallas_kernels.triton_matmul import TritonConfig, loops_of_columns, matmul_triton, run_of_steps
from tests.pallas_kernels import problems

BF16 = jnp.dtype(jnp.bfloat16)
CONFIG = TritonConfig(block_m=16, block_n=64, block_k=128, programs=0, num_warps=4, num_stages=3)


@pytest.mark.parametrize("dtype, fma", [(jnp.bfloat16, "fma.rn.bf16x2"), (jnp.float16, "fma.rn.f16x2")])
@pytest.mark.parametrize("m", [1, 17, 64, 257])
@pytest.mark.parametrize("group_size", [32, 64, 128, 4096])
def test_every_config_the_heuristic_gives_lowers_for_an_h200(lower_for_h200, triton_ir, group_size, m, dtype, fma):
  k, n = 4096, 28672 if m == 1 else 1088
  problem = MatmulProblem(m=m, n=n, k=k, group_size=group_size, dtype=jnp.dtype(dtype))
  config = heuristics.triton_config(problem, num_sms=132)
  shape = jax.ShapeDtypeStruct
  args = shape((m, k), dtype), shape(layout.qweight_shape(k, n), jnp.int16), shape((k // group_size, n), dtype)
  lower_for_h200(functools.partial(matmul_triton, config=config), *args)
  (text,) = triton_ir
  loops = loops_of_columns(config, problem)
  problems.assert_lean(text, fma, 4 * loops, max(1, config.block_k // group_size) * loops)


# sm_80 and sm_89, on which nobody has timed it (docs/tuning.md): the program that `matmul` takes there.
@pytest.mark.parametrize("card, num_sms", [("NVIDIA A100", 108), ("NVIDIA L4", 58)])
@pytest.mark.parametrize("m", [1, 17, 64, 257])
@pytest.mark.parametrize("group_size", [32, 128])
def test_what_older_cards_take_lowers_for_them(triton_ir, card, num_sms, m, group_size):
  k, n = 5120, 7168
  problem = MatmulProblem(m=m, n=n, k=k, group_size=group_size, dtype=BF16)
  config = heuristics.triton_config(problem, num_sms)
  shape = jax.ShapeDtypeStruct
  args = shape((m, k), BF16), shape(layout.qweight_shape(k, n), jnp.int16), shape((k // group_size, n), BF16)
  device = jax.sharding.AbstractDevice(device_kind=card, platform="cuda", num_cores=num_sms)
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
    text = jax.jit(matmul).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("__gpu$xla.gpu.triton") == 1
  (kernel,) = triton_ir
  loops = loops_of_columns(config, problem)
  problems.assert_lean(kernel, "fma.rn.bf16x2", 4 * loops, max(1, config.block_k // group_size) * loops)


@pytest.mark.parametrize("dtype, fma", [(jnp.bfloat16, "fma.rn.bf16x2"), (jnp.float16, "fma.rn.f16x2")])
@pytest.mark.parametrize("m", [1, 64])
@pytest.mark.parametrize("bits, zeros", [(4, True), (8, False), (8, True)])
@pytest.mark.parametrize("group_size", [16, 128, 1024])
def test_every_kind_of_weight_lowers_for_an_h200(lower_for_h200, triton_ir, group_size, bits, zeros, m, dtype, fma):
  k, n = 1024, 1088
  sizes = dict(m=m, n=n, k=k, group_size=group_size, dtype=jnp.dtype(dtype))
  config = heuristics.triton_config(MatmulProblem(**sizes, bits=bits, zeros=zeros), num_sms=132)
  shape = jax.ShapeDtypeStruct
  groups = shape((k // group_size, n), dtype)
  args = shape((m, k), dtype), shape(layout.qweight_shape(k, n, bits), jnp.int16), groups, groups if zeros else None
  lower_for_h200(functools.partial(matmul_triton, config=config), *args)
  (text,) = triton_ir
  dots = max(1, config.block_k // group_size)
  problems.assert_lean(text, fma, bits, dots)
  # Where zero points are not subtracted in the decoder's fma, each dot has a subtraction of its own.
  apart = zeros and (bits == 8 or dtype == jnp.float16 or dots > 1)
  assert text.count("arith.subf") == dots * apart


@pytest.mark.parametrize(
  "change",
  [
    dict(),
    dict(block_m=32),
    dict(block_n=128),
    dict(block_n=256),
    dict(block_k=64),
    dict(num_warps=8),
    *(dict(programs=programs) for programs in (1, 3, 4, 7, 8, 13, 20, 32)),
    dict(block_m=64, block_n=128, block_k=64, programs=6),
    dict(block_n=128, programs=3),
  ],
  ids=str,
)
def test_configs_agree_bit_by_bit_where_arithmetic_is_exact(rng, change):
  # K = 640 is five steps of 128, and four blocks of columns have 20: 7 for each of three programs, 3 for each of seven,
  # 5, whole blocks, for each of four, or one for each of twenty; of 32 twelve have nothing to do.
  x, codes, scales = problems.cancel(rng, 33, 640, 256, 5, BF16)
  config = dataclasses.replace(CONFIG, **change)
  y = matmul_triton(x, problems.packed(codes), scales, config=config, interpret=True)
  np.testing.assert_array_equal(y, jnp.asarray(problems.expected(x, codes, scales), jnp.float32).astype(BF16))


def test_partial_sums_are_float32(rng):
  # Unscaled partial sums of 512 products 15 * 8000 are past the range of fp16; the result is not.
  x = jnp.concatenate([jnp.full((1, 512), 8000), jnp.full((1, 512), -8000)], 1).astype(jnp.float16)
  codes, scales = jnp.full((1024, 64), 15, jnp.uint8), jnp.ones((8, 64), jnp.float16)
  for change in (dict(), dict(programs=2), dict(programs=3)):
    config = dataclasses.replace(CONFIG, **change)
    y = matmul_triton(x.at[0, 0].add(8), problems.packed(codes), scales, config=config, interpret=True)
    np.testing.assert_array_equal(y, jnp.full((1, 64), 56, jnp.float16))


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(block_m=24), "block_m=24 must be one of"),
    (dict(block_n=32), "block_n=32 must be one of"),
    (dict(block_k=256), "block_k=256 must be one of"),
    (dict(num_warps=3), "num_warps=3 must be one of"),
    (dict(programs=-1), "programs=-1 must not be negative, and num_stages=3 at least 1"),
    (dict(num_stages=0), "programs=0 must not be negative, and num_stages=0 at least 1"),
  ],
)
def test_a_config_checks_itself(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CONFIG, **change)


@pytest.mark.parametrize("group_size", [16, 32, 64])
@pytest.mark.parametrize("block_k", [64, 128])
def test_a_step_over_several_groups_keeps_them_apart(rng, group_size, block_k):
  x, codes, scales = problems.random(rng, 5, 384, 64, 384 // group_size, BF16)
  config = dataclasses.replace(CONFIG, block_k=block_k, programs=2)
  problems.assert_close(
    matmul_triton(x, problems.packed(codes), scales, config=config, interpret=True), x, codes, scales
  )


@pytest.mark.parametrize(
  "change, groups, message",
  [
    (dict(), 2, "block_k=128 and group_size=192: one must divide the other"),
    (dict(block_n=256), 1, "block_n=256 must divide the padded N=64"),
  ],
)
def test_a_config_that_does_not_fit_the_problem_is_refused(rng, change, groups, message):
  x, codes, scales = problems.random(rng, 1, 384, 64, groups, BF16)
  with pytest.raises(ValueError, match=message):
    matmul_triton(x, problems.packed(codes), scales, config=dataclasses.replace(CONFIG, **change), interpret=True)


def test_heuristics_give_a_legal_config_for_every_problem():
  for m, (k, n), group_size, num_sms in itertools.product(
    (1, 16, 17, 65, 4096),
    ((1, 1), (128, 64), (8192, 28672), (14336, 4096), (4096, 1088)),
    (32, 128, None),
    (4, 108, 132),
  ):
    group_size = k if group_size is None or k % group_size else group_size
    problem = MatmulProblem(m=m, n=n, k=k, group_size=group_size, dtype=BF16)
    config = heuristics.triton_config(problem, num_sms)
    assert layout.padded_shape(k, n)[1] % config.block_n == 0
    assert group_size == k or group_size % config.block_k == 0 or config.block_k % group_size == 0
    _, columns, run = run_of_steps(config, problem)
    assert run * config.block_k >= min(512, k) and (not config.programs or config.programs >= columns)
