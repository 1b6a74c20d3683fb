# SPDX-License-Identifier: Apache-2.0
"""The Mosaic GPU kernel: its configs, and its lowering for an H200. What it computes is seen on a GPU only."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import MatmulProblem, hardware, hopper_program, layout, layout24
from pallas_kernels.heuristics import hopper_config
from pallas_kernels.hopper_config import HopperConfig
from pallas_kernels.hopper_matmul import matmul_hopper, unsupported_reason
from tests.pallas_kernels import problems

BF16, F16 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)
H200 = hardware.Device(platform="cuda", kind="NVIDIA H200", num_sms=132)
CONFIG = HopperConfig(block_m=16, warpgroups_n=4, block_k=128, num_stages=4)
VARIANTS = [
  dict(),
  dict(warpgroups_n=2),
  dict(warpgroups_n=3, num_stages=2),
  dict(block_k=64, decode_ahead=False),
  dict(block_k=256),
  dict(decode_ahead=False),
  dict(split_k=2),
  dict(split_k=4, warpgroups_n=2, block_m=8),
  dict(warpgroups_n=2, warpgroups_k=2, block_k=256),
  dict(warpgroups_n=1, warpgroups_k=4, split_k=2, decode_ahead=False, block_k=256),
  dict(scale_weights=True),
  dict(unroll=True, num_stages=3),
  dict(unroll=True, split_k=2),
  dict(block_m=128, scale_weights=True, block_k=64, decode_ahead=False, unroll=True),
  dict(block_m=128, scale_weights=True, block_k=256, decode_ahead=False, warpgroups_n=1, warpgroups_k=4, num_stages=3),
  dict(block_m=128, scale_weights=True, warpgroups_n=1, warpgroups_k=2, split_k=2, decode_ahead=False, unroll=True),
  dict(warpgroups_n=1, num_stages=3, programs=2),
  dict(warpgroups_n=1, block_m=8, block_k=64, decode_ahead=False, num_stages=3, unroll=True, programs=4),
]

needs_jax_0_11 = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernel needs JAX 0.11")


def shapes(m, k, n, group_size, dtype, bits=4, zeros=False):
  shape = jax.ShapeDtypeStruct
  groups = [shape((k // group_size, n), dtype)] * (1 + zeros)
  return shape((m, k), dtype), shape(layout.qweight_shape(k, n, bits), jnp.int16), *groups


def assert_fast_path(text, dtype, block_m):
  assert "mosaic_gpu_v2" in text
  assert "lop3.b32" in text and f"wgmma.mma_async.sync.aligned.m64n{block_m}k16.f32.{dtype}" in text
  assert "sitofp" not in text and "uitofp" not in text  # no slow conversion
  assert "shfl.sync.bfly" not in text and "prmt" not in text  # no exchange between threads


@needs_jax_0_11
@pytest.mark.parametrize("dtype, ptx", [(BF16, "bf16"), (F16, "f16")], ids=str)
@pytest.mark.parametrize("group_size", [32, 64, 128, 1024])
@pytest.mark.parametrize("m", [1, 8, 16, 17, 64, 128, 257])
def test_every_config_the_heuristic_gives_lowers_for_an_h200(lower_for_h200, m, group_size, dtype, ptx):
  k, n = 1024, 1088
  config = hopper_config(MatmulProblem(m=m, n=n, k=k, group_size=group_size, dtype=dtype), num_sms=132)
  text = lower_for_h200(functools.partial(matmul_hopper, config=config), *shapes(m, k, n, group_size, dtype))
  assert_fast_path(text, ptx, config.block_m)


@needs_jax_0_11
@pytest.mark.parametrize("bits, zeros", [(4, True), (8, False), (8, True)])
@pytest.mark.parametrize("m, n", [(16, 1088), (64, 16384), (128, 16384)])
def test_zero_points_and_8_bits_lower_for_an_h200(lower_for_h200, m, n, bits, zeros):
  problem = MatmulProblem(m=m, n=n, k=1024, group_size=128, dtype=BF16, bits=bits, zeros=zeros)
  config = hopper_config(problem, num_sms=132)
  text = lower_for_h200(
    functools.partial(matmul_hopper, config=config), *shapes(m, 1024, n, 128, BF16, bits=bits, zeros=zeros)
  )
  assert_fast_path(text, "bf16", config.block_m)


@needs_jax_0_11
@pytest.mark.parametrize("change", VARIANTS, ids=str)
def test_every_kind_of_config_lowers_for_an_h200(lower_for_h200, change):
  config = dataclasses.replace(CONFIG, **change)
  text = lower_for_h200(functools.partial(matmul_hopper, config=config), *shapes(16, 1024, 1088, 128, BF16))
  assert_fast_path(text, "bf16", config.block_m)


@needs_jax_0_11
@pytest.mark.parametrize("m, zeros, dtype, ptx", [
  (16, False, BF16, "bf16"), (16, True, BF16, "bf16"), (128, False, BF16, "bf16"), (16, False, F16, "f16"),
])  # fmt: skip
def test_a_mask_and_a_multiply_add_decode_a_pair_of_codes(lower_for_h200, m, zeros, dtype, ptx):
  """Zero points cost nothing more, and in bfloat16 neither do scales."""
  problem = MatmulProblem(m=m, n=28672, k=1024, group_size=128, dtype=dtype, zeros=zeros)
  config = hopper_config(problem, num_sms=132)
  args = shapes(m, 1024, 28672, 128, dtype, zeros=zeros)
  text = lower_for_h200(functools.partial(matmul_hopper, config=config), *args)
  masks, fmas = text.count("lop3.b32"), text.count(f"fma.rn.{ptx}x2")
  assert masks and masks == fmas and f"sub.{ptx}x2" not in text
  assert config.scale_weights == (m == 128)


@needs_jax_0_11
@pytest.mark.parametrize("m, k, n, group_size", [(1, 1, 1, 1), (5, 77, 93, 77), (9, 96, 65, 32), (3, 384, 63, 192)])
def test_odd_sizes_lower_for_an_h200(lower_for_h200, m, k, n, group_size):
  config = hopper_config(MatmulProblem(m=m, n=n, k=k, group_size=group_size, dtype=BF16), num_sms=132)
  lower_for_h200(functools.partial(matmul_hopper, config=config), *shapes(m, k, n, group_size, BF16))


@needs_jax_0_11
@pytest.mark.parametrize("m", [1, 16, 64, 128, 300])
@pytest.mark.parametrize("sparse24", [False, True])
def test_residual_and_norms_lower_for_an_h200(lower_for_h200, m, sparse24):
  k, n = 4096, 6144
  problem = MatmulProblem(m=m, n=n, k=k, group_size=128, dtype=BF16, sparse24=sparse24)
  shape = jax.ShapeDtypeStruct
  x, qweight, scales = shapes(m, k, n, 128, BF16)
  meta = None
  if sparse24:
    qweight, meta = (shape(s(k, n), jnp.int16) for s in (layout24.qweight_shape, layout24.meta_shape))
  run = functools.partial(matmul_hopper, epsilon=1e-5, config=hopper_config(problem, num_sms=132))
  residual, squares, norm = shape((m, n), BF16), shape((k // 64, m), jnp.float32), shape((n,), BF16)
  text = lower_for_h200(run, x, qweight, scales, None, meta, None, residual, squares, norm)
  assert text.count("mosaic_gpu_v2") == 1 and "gpu.triton" not in text  # all of it in one kernel
  assert "rsqrt.approx" in text and "ld.global.v4.b32" in text and "shfl.sync.bfly.b32 $0, $1, 4, 31" in text


@pytest.mark.gpu
@needs_jax_0_11
@pytest.mark.parametrize("change", VARIANTS, ids=str)
def test_configs_agree_bit_by_bit_where_arithmetic_is_exact(rng, change):
  x, codes, scales = problems.cancel(rng, 13, 640, 192, 5, BF16)
  config = dataclasses.replace(CONFIG, **change)
  y = jax.jit(functools.partial(matmul_hopper, config=config))(x, problems.packed(codes), scales)
  np.testing.assert_array_equal(y, jnp.asarray(problems.expected(x, codes, scales), jnp.float32).astype(BF16))


def in_turns(m, n, **kind):
  """The config of a product of K = 2048 and one row of blocks, or several, on a card of four multiprocessors."""
  return hopper_config(MatmulProblem(m=m, n=n, k=2048, group_size=128, dtype=BF16, **kind), num_sms=4)


@pytest.mark.parametrize("kind", [dict(), dict(zeros=True), dict(sparse24=True), dict(bits=8)], ids=str)
def test_blocks_take_turns_where_there_are_more_than_multiprocessors(kind):
  few, many = in_turns(16, 1024, **kind), in_turns(300, 1088, **kind)
  assert few.blocks(MatmulProblem(m=16, n=1024, k=2048, group_size=128, dtype=BF16)) == 4 and few.programs == 0
  # Beside y there is no room for as many stages of 2:4 sparse weights.
  assert many.programs == (0 if "sparse24" in kind else 4) and many.y_in_ring == ("sparse24" in kind)
  assert in_turns(16, 1088, **kind).programs == (0 if "bits" in kind else 4)  # K is split instead
  assert in_turns(50, 1088, **kind).programs == 0  # 64 rows of sums spill in it


@needs_jax_0_11
@pytest.mark.parametrize("m, kind", [
  (1, dict()), (16, dict(zeros=True)), (30, dict(sparse24=True)), (300, dict(zeros=True)), (1300, dict()),
])  # fmt: skip
def test_turns_lower_for_an_h200(lower_for_h200, m, kind):
  config, shape = in_turns(m, 1088, **kind), jax.ShapeDtypeStruct
  x, qweight, scales, *zeros = shapes(m, 2048, 1088, 128, BF16, zeros="zeros" in kind)
  meta = None
  if "sparse24" in kind:
    qweight, meta = (shape(s(2048, 1088), jnp.int16) for s in (layout24.qweight_shape, layout24.meta_shape))
  run = functools.partial(matmul_hopper, config=config)
  text = lower_for_h200(run, x, qweight, scales, zeros[0] if zeros else None, meta)
  assert config.programs == 4 and text.count("mosaic_gpu_v2") == 1


@pytest.mark.gpu
@needs_jax_0_11
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("m", [1, 13, 30, 300, 1300])
@pytest.mark.parametrize("kind", [dict(), dict(zeros=True), dict(sparse24=True), dict(bits=8)], ids=str)
def test_blocks_that_take_turns_have_the_bits_of_those_that_do_not(rng, m, kind, gated):
  n = 1088
  config = in_turns(m, n, **kind)
  if not config.programs:
    pytest.skip("K is split instead, or stages are too few")
  x, codes, scales = problems.random(rng, m, 2048, n, 16, BF16)
  zeros = meta = None
  if "sparse24" in kind:
    qweight, meta = layout24.pack_codes(problems.sparse24_codes(rng, 2048, n))
  else:
    bits = kind.get("bits", 4)
    codes, points = problems.with_zeros(rng, codes, scales, bits, BF16)
    qweight, zeros = layout.pack_codes(codes, bits), points if "zeros" in kind else None
  bias = jnp.asarray(rng.normal(size=n), BF16)
  residual = jnp.asarray(rng.normal(size=(m, n // (1 + gated))), BF16)

  def product(config):
    run = functools.partial(matmul_hopper, gated=gated, config=config)
    return jax.jit(run)(x, qweight, scales, zeros, meta, bias, residual)

  expected = product(dataclasses.replace(config, programs=0))
  for _ in range(20):
    np.testing.assert_array_equal(product(config), expected)


@pytest.mark.gpu
@needs_jax_0_11
@pytest.mark.parametrize("dtype, fractional", [(BF16, False), (BF16, True), (F16, True)], ids=str)
@pytest.mark.parametrize("group_size", [64, 128, 512, 1024])
@pytest.mark.parametrize("m, change", [
  (1, dict(block_m=8)),
  (7, dict(block_m=8, warpgroups_n=2, warpgroups_k=2)),
  (13, dict()),
  (16, dict(split_k=2)),
  (29, dict(block_m=32, num_stages=3)),
  (120, dict(block_m=128, block_k=64, decode_ahead=False, scale_weights=True)),
])  # fmt: skip
def test_zero_points_are_subtracted(rng, m, change, group_size, dtype, fractional):
  config = dataclasses.replace(CONFIG, **dict(block_k=256) | change)
  x, codes, scales = problems.random(rng, m, 1024, 320, 1024 // group_size, dtype)
  codes, zeros = problems.with_zeros(rng, codes, scales, 4, dtype, fractional=fractional)
  y = jax.jit(functools.partial(matmul_hopper, config=config))(x, problems.packed(codes), scales, zeros)
  rounding = dict(step_dtype=dtype if fractional else np.float32)
  if config.scale_weights:
    rounding["weight_dtype"] = dtype
  problems.assert_close(y, x, codes, scales, zeros, **rounding)


@needs_jax_0_11
@pytest.mark.parametrize("dtype, ptx", [(BF16, "bf16"), (F16, "f16")], ids=str)
@pytest.mark.parametrize("m, group_size", [(1, 64), (16, 128), (64, 128), (128, 1024), (257, 64)])
def test_2_4_sparse_weights_go_to_sparse_tensor_cores(lower_for_h200, m, group_size, dtype, ptx):
  problem = MatmulProblem(m=m, n=1088, k=1024, group_size=group_size, dtype=dtype, sparse24=True)
  config = hopper_config(problem, num_sms=132)
  x, _, scales = shapes(m, 1024, 1088, group_size, dtype)
  words = [jax.ShapeDtypeStruct(s(1024, 1088), jnp.int16) for s in (layout24.qweight_shape, layout24.meta_shape)]

  def run(x, qweight, meta, scales):
    return matmul_hopper(x, qweight, scales, None, meta, config=config)

  text = lower_for_h200(run, x, *words, scales)
  assert f"wgmma.mma_async.sp.sync.aligned.m64n{config.block_m}k32.f32.{ptx}" in text and "lop3.b32" in text
  assert "wgmma.mma_async.sync" not in text and "w4a16_sparse24_hopper" in text
  assert "shfl.sync.bfly" not in text and "prmt" not in text  # no exchange between threads


def run_sparse(x, codes, scales):
  (m, k), (groups, n) = x.shape, scales.shape
  problem = MatmulProblem(m=m, n=n, k=k, group_size=k // groups, dtype=x.dtype, sparse24=True)
  qweight, meta = layout24.pack_codes(codes)
  run = jax.jit(functools.partial(matmul_hopper, config=hopper_config(problem, num_sms=132)))
  return run(x, qweight, scales, None, meta)


@pytest.mark.gpu
@needs_jax_0_11
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("density", [0, 1, 2, None])
def test_identity_gives_the_2_4_sparse_weight_bit_by_bit(rng, density, dtype):
  codes = problems.sparse24_codes(rng, 512, 192, density)
  scales = problems.exact_scales(rng, 4, 192, dtype)
  y = run_sparse(jnp.eye(512, dtype=dtype), codes, scales)
  np.testing.assert_array_equal(np.asarray(y, np.float64), problems.expected(np.eye(512), codes, scales))


@pytest.mark.gpu
@needs_jax_0_11
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("m", [1, 8, 13, 16, 32, 40, 64, 100, 128, 300])
@pytest.mark.parametrize("k, n, groups", [(1024, 320, 16), (640, 192, 5), (1024, 1088, 1), (2304, 64, 18)])
def test_random_2_4_sparse_products_are_right(rng, m, k, n, groups, dtype):
  x, codes, scales = problems.random(rng, m, k, n, groups, dtype)
  codes = problems.prune24(codes)
  rounds = m > 64 and k // groups > 64  # the weight, to x's dtype
  y = run_sparse(x, codes, scales)
  problems.assert_close(y, x, codes, scales, weight_dtype=dtype if rounds else np.float64)


@pytest.mark.gpu
@needs_jax_0_11
@pytest.mark.parametrize("k, group_size", [(128, 128), (256, 32), (1024, 1024)])
def test_a_single_tile_of_columns_is_not_overwritten_by_its_neighbour(rng, k, group_size):
  # A second warpgroup has no columns here; its rows, copied beside the tile, would be the tile's next rows.
  x, codes, scales = problems.random(rng, 16, k, 64, k // group_size, BF16)
  config = dataclasses.replace(
    CONFIG, warpgroups_n=2, block_k=128 if group_size > 32 else 64, decode_ahead=group_size > 32
  )
  run = jax.jit(functools.partial(matmul_hopper, config=config))
  for _ in range(50):
    problems.assert_close(run(x, problems.packed(codes), scales), x, codes, scales)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(block_m=24), "block_m=24 must be one of"),
    (dict(warpgroups_n=5), "warpgroups_n=5 must be one of"),
    (dict(warpgroups_k=2), "warpgroups_n=4 times warpgroups_k=2 must be at most 4"),
    (dict(warpgroups_n=1, warpgroups_k=4, block_k=256), "block_k=256 must be at least 512"),
    (dict(block_k=192), "block_k=192 must be one of"),
    (dict(split_k=5), "split_k=5 must be one of"),
    (dict(num_stages=1), "num_stages=1 must be at least 2"),
    (dict(block_k=64), "block_k=64 must be at least 128"),
    (dict(num_stages=40), "num_stages=40 of .* must be at most 12 to fit shared memory"),
    (dict(block_m=128, num_stages=2), "needs some 176 registers a thread; 112 can be had"),
    (dict(programs=-1), "programs=-1 must be 0 where parts of K are added up, and never negative"),
    (dict(programs=132, split_k=2), "programs=132 must be 0 where parts of K are added up"),
  ],
)
def test_a_config_checks_itself(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CONFIG, **change)


@pytest.mark.parametrize("warpgroups, registers", [(1, 240), (2, 232), (3, 160), (4, 112)])
def test_registers_never_exceed_what_the_launch_gave(warpgroups, registers):
  # Asked for more, the GPU waits for ever: four warpgroups at 112 and one at 40 hang, 104 and 40 do not.
  config = dataclasses.replace(CONFIG, warpgroups_n=warpgroups)
  assert config.compute_registers == registers
  launched = min(256, 65536 // (128 * (warpgroups + 1)) // 8 * 8)
  assert warpgroups * registers + 32 <= (warpgroups + 1) * launched


@pytest.mark.parametrize(
  "group_size, change, message",
  [
    (96, dict(), "block_k=128 and group_size=96: one must divide the other"),
    (32, dict(scale_weights=True), "scale_weights needs groups of at least 64, not group_size=32"),
    (64, dict(programs=132, num_stages=2), "programs=132 need more than 2 steps of block_k=128 in K=192"),
  ],
)
def test_config_and_groups_must_fit(group_size, change, message):
  config = dataclasses.replace(CONFIG, **change)
  arrays = [jnp.zeros(s.shape, s.dtype) for s in shapes(16, 192, 64, group_size, BF16)]
  with pytest.raises(ValueError, match=message):
    matmul_hopper(*arrays, config=config)


def test_unsupported_reason_names_the_obstacle(monkeypatch):
  problem = MatmulProblem(m=1, n=128, k=192, group_size=64, dtype=BF16)
  monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
  assert "needs JAX 0.11" in unsupported_reason(problem, H200)
  monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
  assert unsupported_reason(problem, H200) is None
  for change, device, message in (
    (dict(), hardware.Device(platform="cpu", kind="cpu", num_sms=0), "NVIDIA GPUs, not on cpu"),
    (dict(), dataclasses.replace(H200, kind="NVIDIA A100-SXM4-80GB"), "'NVIDIA A100-SXM4-80GB' is none"),
    (dict(dtype=jnp.dtype(jnp.float32)), H200, "not float32"),
    (dict(group_size=96), H200, "group_size=96 must be 32, a multiple of 64"),
    (dict(group_size=32, zeros=True), H200, "zero points need groups of at least 64, not group_size=32"),
  ):
    assert message in unsupported_reason(dataclasses.replace(problem, **change), device)


@pytest.mark.parametrize("programs", [1, 2, 4])
def test_every_program_has_steps_and_every_step_a_program(programs):
  for total in range(programs, 70):
    runs = [hopper_program.run_of_steps(program, total, programs) for program in range(programs)]
    assert min(count for _, count in runs) >= 1
    assert [int(first) + i for first, count in runs for i in range(count)] == list(range(total))


def test_three_runs_of_k_need_a_launch_that_waits():
  arrays = [jnp.zeros(s.shape, s.dtype) for s in shapes(16, 512, 64, 128, BF16)]
  with pytest.raises(ValueError, match="split_k=3 must be 1, 2 or 4"):
    matmul_hopper(*arrays, config=dataclasses.replace(CONFIG, split_k=3))


def test_a_split_needs_as_many_steps():
  arrays = [jnp.zeros(s.shape, s.dtype) for s in shapes(16, 128, 64, 128, BF16)]
  with pytest.raises(ValueError, match="split_k=2 must be at most the steps of block_k=128 in K=128"):
    matmul_hopper(*arrays, config=dataclasses.replace(CONFIG, split_k=2))


def test_heuristics_give_a_legal_config_for_every_problem():
  sizes = ((1, 1), (128, 64), (8192, 28672), (14336, 4096), (4096, 1088), (4096, 12288))
  kinds = [dict(bits=bits, zeros=zeros) for bits in (4, 8) for zeros in (False, True)] + [dict(sparse24=True)]
  for m, (k, n), group_size, num_sms, kind in itertools.product(
    (1, 9, 17, 33, 65, 257, 4096), sizes, (32, 64, 128, None), (78, 132), kinds
  ):
    group_size = k if group_size is None or k % group_size else group_size
    problem = MatmulProblem(m=m, n=n, k=k, group_size=group_size, dtype=BF16, **kind)
    config = hopper_config(problem, num_sms)
    assert 2 <= config.num_stages <= config.max_stages(problem)
    assert config.block_k >= problem.tile_k * config.warpgroups_k * (1 + config.decode_ahead)
    assert group_size == k or group_size % config.block_k == 0 or config.block_k % group_size == 0
    assert config.split_k == 1 or k // config.split_k >= 512
