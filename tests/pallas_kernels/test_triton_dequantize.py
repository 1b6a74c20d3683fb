# SPDX-License-Identifier: Apache-2.0
"""The kernel that writes the dense weight beyond the shared suite: that weight bit by bit; lowered for each card."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import MatmulProblem, heuristics, layout, layout24, matmul, reference
from pallas_kernels.triton_dequantize import DequantizeConfig, dequantize_triton, matmul_dequantize
from tests.pallas_kernels import problems

BF16, F16 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)
CONFIG = DequantizeConfig(block_n=64, block_k=128, num_warps=4)
# bits, zeros, 2:4 sparse
KINDS = [(4, False, False), (4, True, False), (8, False, False), (8, True, False), (4, False, True)]


def random_weight(rng, k, n, groups, bits, zeros, sparse24, dtype):
  """The arguments of `dequantize_triton`, and the weight by the reference in float32, as [N, K]."""
  _, codes, scales = problems.random(rng, 1, k, n, groups, dtype)
  if sparse24:
    codes = problems.prune24(codes)
    qweight, meta = layout24.pack_codes(codes)
    return (qweight, scales, None, meta), reference.dequantize(codes, scales).T
  codes, points = problems.with_zeros(rng, codes, scales, bits, dtype)
  points = points if zeros else None
  return (layout.pack_codes(codes, bits), scales, points), reference.dequantize(codes, scales, points, bits).T


SIZES = [(256, 128, 16, BF16), (512, 64, 256, F16), (96, 65, 32, F16), (77, 93, 77, BF16)]


@pytest.mark.parametrize(
  "k, n, group_size, dtype, bits, zeros, sparse24",
  [(*sizes, *kind) for sizes, kind in itertools.product(SIZES, KINDS)] + [(576, 191, 192, BF16, 4, False, False)],
)
def test_the_weight_is_the_reference_rounded_once(rng, k, n, group_size, dtype, bits, zeros, sparse24):
  operands, want = random_weight(rng, k, n, k // group_size, bits, zeros, sparse24, dtype)
  sizes = dict(m=1, n=n, k=k, group_size=group_size, dtype=dtype, bits=bits, zeros=zeros, sparse24=sparse24)
  config = heuristics.dequantize_config(MatmulProblem(**sizes), 132)
  w = dequantize_triton(*operands, k=k, dtype=dtype, config=config, interpret=True)
  assert w.shape == (n, k) and w.dtype == dtype
  np.testing.assert_array_equal(w, want.astype(dtype))


@pytest.mark.parametrize(
  "change", [dict(block_n=128), dict(block_n=256), dict(block_k=64), dict(block_n=128, block_k=64)], ids=str
)
def test_configs_agree_bit_by_bit(rng, change):
  operands, want = random_weight(rng, 640, 250, 20, 4, True, False, BF16)
  config = dataclasses.replace(CONFIG, **change)
  w = dequantize_triton(*operands, k=640, dtype=BF16, config=config, interpret=True)
  np.testing.assert_array_equal(w, want.astype(BF16))


def test_scales_in_float32_are_not_rounded_before_they_multiply():
  # 7 (1 + 2^-8) is nearest to 7 + 2^-5 in bfloat16; the scale alone would be rounded to 1.
  qweight, scales = layout.pack_codes(jnp.full((128, 64), 15, jnp.uint8)), jnp.full((1, 64), 1 + 2.0**-8, jnp.float32)
  w = dequantize_triton(qweight, scales, k=128, dtype=BF16, config=CONFIG, interpret=True)
  np.testing.assert_array_equal(w, jnp.full((64, 128), 7 + 2.0**-5, BF16))


def test_scales_in_float16_stay_in_their_range():
  # Times what codes are divided by they would be infinite: float16 ends at 65504.
  qweight, scales = layout.pack_codes(jnp.full((128, 64), 9, jnp.uint8)), jnp.full((1, 64), 60000, F16)
  w = dequantize_triton(qweight, scales, k=128, dtype=BF16, config=CONFIG, interpret=True)
  np.testing.assert_array_equal(w, jnp.full((64, 128), 60000, BF16))


def test_the_bias_and_sums_are_float32(rng):
  # Rounded to bfloat16 before the bias is added, 257 would be 256 and the result 1.
  x, qweight = jnp.ones((1, 257), BF16), layout.pack_codes(jnp.full((257, 64), 9, jnp.uint8))
  bias = jnp.full(64, -255, jnp.float32)
  y = matmul_dequantize(x, qweight, jnp.ones((1, 64), BF16), bias=bias, config=CONFIG, interpret=True)
  np.testing.assert_array_equal(y, jnp.full((1, 64), 2, BF16))


@pytest.mark.parametrize("change, message", [(dict(block_n=32), "block_n=32"), (dict(num_warps=3), "num_warps=3")])
def test_a_config_checks_itself(change, message):
  with pytest.raises(ValueError, match=f"{message} must be one of"):
    dataclasses.replace(CONFIG, **change)


@pytest.mark.parametrize(
  "change, groups, sparse24, message",
  [
    (dict(), 2, False, "block_k=128 and group_size=192: one must divide the other"),
    (dict(block_n=256), 1, False, "block_n=256 must divide the padded N=64"),
    (dict(block_k=64), 1, True, "block_k=64 must be 128, the k of a tile"),
  ],
)
def test_a_config_that_does_not_fit_the_problem_is_refused(rng, change, groups, sparse24, message):
  operands, _ = random_weight(rng, 384, 64, groups, 4, False, sparse24, BF16)
  with pytest.raises(ValueError, match=message):
    config = dataclasses.replace(CONFIG, **change)
    dequantize_triton(*operands, k=384, dtype=BF16, config=config, interpret=True)


def lower_for(kind: str, function, *args) -> str:
  """The StableHLO text of the function, lowered for a card of that name."""
  device = jax.sharding.AbstractDevice(device_kind=kind, platform="cuda", num_cores=108)
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def shapes(m, k, n, group_size, dtype, bits=4, zeros=False, sparse24=False):
  """Of x, qweight, scales, zeros and meta."""
  shape = jax.ShapeDtypeStruct
  scales = shape((k // group_size, n), dtype)
  words = layout24.qweight_shape(k, n) if sparse24 else layout.qweight_shape(k, n, bits)
  meta = shape(layout24.meta_shape(k, n), jnp.int16) if sparse24 else None
  return shape((m, k), dtype), shape(words, jnp.int16), scales, scales if zeros else None, meta


# sm_80, sm_89 and sm_90
@pytest.mark.parametrize("card", ["NVIDIA A100", "NVIDIA L4", "NVIDIA H200"])
@pytest.mark.parametrize("bits, zeros, sparse24", KINDS)
@pytest.mark.parametrize("group_size, dtype", list(itertools.product((16, 128, 1024), (BF16, F16))))
def test_every_kind_of_weight_lowers_for_every_card(card, triton_ir, group_size, dtype, bits, zeros, sparse24):
  args = shapes(512, 1024, 1088, group_size, dtype, bits, zeros, sparse24)
  text = lower_for(card, functools.partial(matmul, implementation="dequantize"), *args)
  # One kernel, which multiplies nothing but scales, and XLA's product with float32 sums.
  assert text.count("__gpu$xla.gpu.triton") == 1
  name = "bf16" if dtype == BF16 else "f16"
  assert f"(tensor<512x1024x{name}>, tensor<1088x1024x{name}>) -> tensor<512x1088x{name}>" in text
  (kernel,) = triton_ir
  problems.assert_lean(kernel, "fma.rn.bf16x2" if dtype == BF16 else "fma.rn.f16x2", bits, 0)
  assert re.findall(r"tt.store %\d+, %\d+(.)", kernel) == [" "]  # a mask would follow after a comma


@pytest.mark.parametrize("sparse24", [False, True])
def test_the_program_changes_at_the_crossover(sparse24):
  first = heuristics._DEQUANTIZE_FROM_SPARSE24 if sparse24 else heuristics._DEQUANTIZE_FROM
  fused, apart = (
    ("w4a16_sparse24_triton", "w4_sparse24_dequantize_triton") if sparse24 else ("w4a16_triton", "w4_dequantize_triton")
  )
  for m, name, other in ((first - 1, fused, apart), (first, apart, fused)):
    text = lower_for("NVIDIA L4", matmul, *shapes(m, 1024, 1088, 128, BF16, sparse24=sparse24))
    assert name in text and other not in text
