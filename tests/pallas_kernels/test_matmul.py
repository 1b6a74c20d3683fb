# SPDX-License-Identifier: Apache-2.0
"""One suite for every implementation: in interpret mode on any machine, compiled where there is a GPU."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
  IMPLEMENTATIONS,
  DeferredNorm,
  MatmulProblem,
  choose_implementation,
  hardware,
  heuristics,
  layout,
  layout24,
  matmul,
  reference,
  resolved,
)
from tests.pallas_kernels import problems

BF16, F16, F32 = (jnp.dtype(dtype) for dtype in (jnp.bfloat16, jnp.float16, jnp.float32))
DTYPES = (BF16, F16)
GROUP_SIZES = (32, 64, 128, None)
M_SWEEP = (0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 127, 129, 257)
CUDA = hardware.Device(platform="cuda", kind="NVIDIA H200", num_sms=132)


gpu = functools.partial(pytest.param, marks=pytest.mark.gpu)
DENSE = ["reference", "interpreted", "dequantize interpreted", gpu("triton"), gpu("dequantize"), gpu("hopper")]
SPARSE = [
  *("reference of 2:4", "interpreted of 2:4", "dequantize interpreted of 2:4"),
  *(gpu("triton24"), gpu("dequantize of 2:4"), gpu("hopper of 2:4")),
]


def runner(name: str):
  """(x, codes, scales, zeros, bits, bias, residual, norm, gated) -> y by one implementation.

  `run.name` is its name, `run.prune` makes codes of such as it takes: of half of them zeros for what takes 2:4 sparse
  weights, of all codes themselves for the others.
  """
  sparse = name.endswith("24") or name.endswith("2:4")
  kernel = "triton24" if sparse else "triton"
  how = {
    "reference": dict(implementation="reference"),
    "interpreted": dict(implementation=kernel, interpret=True),
    "dequantize interpreted": dict(implementation="dequantize", interpret=True),
  }.get(name.removesuffix(" of 2:4"), dict(implementation=name.removesuffix(" of 2:4")))

  def run(x, codes, scales, zeros=None, bits=4, bias=None, residual=None, norm=None, gated=False):
    epsilons = [None if norm is None else norm[1], x.epsilon if isinstance(x, DeferredNorm) else None]
    arrays = dict(bias=bias, residual=residual, norm=None if norm is None else norm[0])
    if name.startswith("hopper"):
      (m, k), (groups, n) = x.shape, scales.shape
      sizes = dict(m=m, n=n, k=k, group_size=k // groups, dtype=x.dtype)
      problem = MatmulProblem(**sizes, bits=bits, zeros=zeros is not None, sparse24=sparse)
      if reason := IMPLEMENTATIONS["hopper"](problem, hardware.current_device()):
        pytest.skip(reason)
    if sparse:
      assert not layout24.surplus(codes).any()
      weight = dict(zip(("qweight", "meta"), layout24.pack_codes(codes), strict=True))
    else:
      weight = dict(qweight=layout.pack_codes(codes, bits))
    parts = (x.scaled, x.squares) if isinstance(x, DeferredNorm) else (x, None)
    y = jitted(*parts, weight | dict(scales=scales, zeros=zeros), arrays, epsilons=tuple(epsilons), gated=gated)
    if norm is None:
      return y
    y, normed, squares = y
    return y, normed if squares is None else DeferredNorm(scaled=normed, squares=squares, epsilon=norm[1])

  @functools.partial(jax.jit, static_argnames=("epsilons", "gated"))
  def jitted(x, squares, weight, arrays, *, epsilons, gated):
    after, before = epsilons
    x = x if before is None else DeferredNorm(scaled=x, squares=squares, epsilon=before)
    norm = None if after is None else (arrays.pop("norm"), after)
    arrays.pop("norm", None)
    y = matmul(x, **weight, **arrays, norm=norm, gated=gated, **how)
    if norm is None:
      return y
    y, normed = y
    return (y, normed.scaled, normed.squares) if isinstance(normed, DeferredNorm) else (y, normed, None)

  run.name = name
  run.prune = problems.prune24 if sparse else lambda codes: codes
  return run


@pytest.fixture(params=DENSE + SPARSE)
def run(request):
  return runner(request.param)


@pytest.fixture(params=DENSE)
def run_dense(request):
  return runner(request.param)


def weight_dtype(name: str, m: int, group_size: int, dtype) -> np.dtype:
  """What an implementation says it rounds the dequantized weight to, if at all."""
  in_hopper = name.startswith("hopper") and m > 64 and group_size > (64 if name.endswith("2:4") else 32)
  return dtype if in_hopper or name.startswith("dequantize") else np.dtype(np.float64)


def cases(fixture: str, names: str, on_a_gpu: list, on_a_cpu: list):
  """Parametrizes a test that takes `fixture` by implementation and case.

  A GPU has all cases. On a CPU a case is a program of its own, which takes a second to compile: it has those in which
  every value meets every value of the other arguments that it could fail with.
  """
  implementations = dict(run=DENSE + SPARSE, run_dense=DENSE)[fixture]
  params = [(name, *case) for name in implementations if isinstance(name, str) for case in on_a_cpu]
  for on_gpu in implementations:
    if not isinstance(on_gpu, str):
      params += [pytest.param(*on_gpu.values, *case, marks=on_gpu.marks) for case in on_a_gpu]
  return pytest.mark.parametrize(f"{fixture}, {names}", params, indirect=[fixture], ids=str)


SWEEP = list(itertools.product(M_SWEEP, GROUP_SIZES, DTYPES))
# Every m with two group sizes, one in either dtype; every block_m of the heuristic (16, 32, 64, 128), and either dtype,
# with all four.
SHORT_SWEEP = [
  (m, GROUP_SIZES[j], DTYPES[(i // 2 + j) % 2]) for i, m in enumerate(M_SWEEP) for j in (2 * (i % 2), 2 * (i % 2) + 1)
]


@cases("run", "m, group_size, dtype", SWEEP, SHORT_SWEEP)
def test_random_problem_is_right(run, rng, m, group_size, dtype):
  k, n = 256, 128
  x, codes, scales = problems.random(rng, m, k, n, 1 if group_size is None else k // group_size, dtype)
  codes = run.prune(codes)
  y = run(x, codes, scales)
  assert y.shape == (m, n) and y.dtype == dtype
  if m:
    rounding = weight_dtype(run.name, m, group_size or k, dtype)
    problems.assert_close(y, x, codes, scales, weight_dtype=rounding)


# Every kind of weight but the plain one: bits, and zero points that are whole, or not.
KINDS = [(4, "whole"), (4, "fractional"), (8, None), (8, "whole")]
EXACT_KINDS = [(bits, zeros) for bits, zeros in KINDS if zeros != "fractional"]


def of_every_kind(sizes: list, kinds: list):
  """Cases of `cases`: sizes, dtype and kind; all of them, and half, in which every two of the three meet."""
  combinations = itertools.product(enumerate(sizes), enumerate(DTYPES), enumerate(kinds))
  every = [(i + j + l, (*size, dtype, *kind)) for (i, size), (j, dtype), (l, kind) in combinations]
  return [case for _, case in every], [case for index, case in every if index % 2 == 0]


def random_of_kind(rng, m, k, n, groups, bits, zeros, dtype):
  x, codes, scales = problems.random(rng, m, k, n, groups, dtype)
  codes, points = problems.with_zeros(rng, codes, scales, bits, dtype, fractional=zeros == "fractional")
  return x, codes, scales, points if zeros else None


SIZES_OF_KINDS = [(1, 128), (3, None), (17, 16), (33, 64), (64, 32), (129, 128)]


@cases("run_dense", "m, group_size, dtype, bits, zeros", *of_every_kind(SIZES_OF_KINDS, KINDS))
def test_every_kind_of_weight_is_right(run_dense, rng, m, group_size, dtype, bits, zeros):
  k, n = 256, 128
  x, codes, scales, points = random_of_kind(rng, m, k, n, k // (group_size or k), bits, zeros, dtype)
  y = run_dense(x, codes, scales, points, bits)
  rounding = weight_dtype(run_dense.name, m, group_size or k, dtype)
  # The reference rounds nothing. XLA on a CPU has no bfloat16: float32, rounded where the next operation is not in it.
  never_rounded = run_dense.name == "reference" or (run_dense.name == "dequantize interpreted" and dtype == BF16)
  steps = dtype if zeros == "fractional" and not never_rounded else np.float32
  problems.assert_close(y, x, codes, scales, points, bits, weight_dtype=rounding, step_dtype=steps)


@pytest.mark.parametrize("bits, zeros", EXACT_KINDS)
@pytest.mark.parametrize("k, n, group_size", [(77, 93, None), (96, 65, 32), (192, 191, 64)])
def test_odd_sizes_of_every_kind_are_right(run_dense, rng, k, n, group_size, bits, zeros):
  x, codes, scales, points = random_of_kind(rng, 5, k, n, k // (group_size or k), bits, zeros, BF16)
  rounding = weight_dtype(run_dense.name, 5, group_size or k, BF16)
  problems.assert_close(
    run_dense(x, codes, scales, points, bits), x, codes, scales, points, bits, weight_dtype=rounding
  )


@cases(
  "run_dense", "group_size, dtype, bits, zeros", *of_every_kind([(size,) for size in (16, 128, None)], EXACT_KINDS)
)
def test_identity_gives_the_weight_of_every_kind_bit_by_bit(run_dense, rng, group_size, dtype, bits, zeros):
  k, n = 256, 128
  _, codes, scales, points = random_of_kind(rng, 1, k, n, k // (group_size or k), bits, zeros, dtype)
  y = run_dense(jnp.eye(k, dtype=dtype), codes, scales, points, bits)
  w = problems.expected(np.eye(k), codes, scales, points, bits)
  np.testing.assert_array_equal(y, jnp.asarray(w, jnp.float32).astype(dtype))


@pytest.mark.parametrize("bits, zeros", EXACT_KINDS)
@pytest.mark.parametrize("m", [1, 33])
def test_cancelling_sums_of_every_kind_are_exact(run_dense, rng, m, bits, zeros):
  k, n, groups = 2048, 128, 16
  x, _, scales = problems.cancel(rng, m, k, n, groups, BF16)
  half = rng.integers(0, 2**bits, (k // 2, n))
  codes = jnp.asarray(np.concatenate([half, half]), jnp.uint8)
  # The second half's groups have the zero points of the first, or nothing would cancel.
  points = jnp.asarray(np.tile(rng.integers(0, 2**bits, (groups // 2, n)), (2, 1)), BF16) if zeros else None
  want = problems.expected(x, codes, scales, points, bits)
  np.testing.assert_array_equal(run_dense(x, codes, scales, points, bits), jnp.asarray(want, jnp.float32).astype(BF16))


@pytest.mark.parametrize(
  "k, n, group_size", [(1, 1, None), (77, 93, None), (96, 65, 32), (192, 191, 64), (384, 63, 128)]
)
def test_odd_sizes_are_right(run, rng, k, n, group_size):
  x, codes, scales = problems.random(rng, 5, k, n, 1 if group_size is None else k // group_size, BF16)
  codes = run.prune(codes)
  rounding = weight_dtype(run.name, 5, group_size or k, BF16)
  problems.assert_close(run(x, codes, scales), x, codes, scales, weight_dtype=rounding)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("group_size", [32, 64, 128, None])
def test_identity_gives_the_weight_bit_by_bit(run, rng, group_size, dtype):
  k, n = 256, 192
  _, codes, scales = problems.random(rng, 1, k, n, 1 if group_size is None else k // group_size, dtype)
  codes = run.prune(codes)
  y = run(jnp.eye(k, dtype=dtype), codes, scales)
  want = (np.asarray(codes, np.float32) - 8).reshape(scales.shape[0], -1, n) * np.asarray(scales, np.float32)[:, None]
  np.testing.assert_array_equal(y, jnp.asarray(want.reshape(k, n)).astype(dtype))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("m", [1, 16, 33])
def test_cancelling_sums_are_exact(run, rng, m, dtype):
  x, codes, scales = problems.cancel(rng, m, 2048, 256, 16, dtype)
  codes = run.prune(codes)
  y = run(x, codes, scales)
  np.testing.assert_array_equal(y, jnp.asarray(problems.expected(x, codes, scales), jnp.float32).astype(dtype))


@pytest.mark.parametrize("m, n, groups", [(1, 256, 16), (16, 200, 16), (33, 256, 1)])
def test_bias_is_added_to_the_sums_before_they_are_rounded(run, rng, m, n, groups):
  x, codes, scales = problems.cancel(rng, m, 2048, n, groups, BF16)
  codes = run.prune(codes)
  bias = jnp.asarray(rng.integers(-2048, 2048, n) / 16, jnp.float32)  # 12 bits: every sum in float32 is exact
  sums = problems.expected(x, codes, scales)
  once = jnp.asarray(sums + np.asarray(bias, np.float64), jnp.float32).astype(BF16)
  twice = jnp.asarray(sums, jnp.float32).astype(BF16) + bias.astype(BF16)
  assert (once != twice).any()
  np.testing.assert_array_equal(run(x, codes, scales, bias=bias), once)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("m, n, groups", [(1, 256, 16), (16, 208, 16), (33, 256, 1), (100, 256, 16)])
def test_a_residual_is_added_last(run, rng, m, n, groups, gated):
  x, codes, scales = problems.cancel(rng, m, 2048, n, groups, BF16)
  codes = run.prune(codes)
  bias = jnp.asarray(rng.integers(-2048, 2048, n) / 16, jnp.float32)
  y = run(x, codes, scales, bias=bias, gated=gated)
  residual = jnp.asarray(rng.integers(-64, 64, y.shape), BF16)
  y_after = run(x, codes, scales, bias=bias, residual=residual, gated=gated)
  twice = y + residual
  if gated:  # in float32 the sum is that of the rounded gate, but for that rounding
    error = np.abs(np.asarray(y_after, np.float64) - np.asarray(twice, np.float64))
    assert (error <= 2.0**-7 * (np.abs(np.asarray(y, np.float64)) + np.abs(np.asarray(twice, np.float64)))).all()
    return
  sums = problems.expected(x, codes, scales) + np.asarray(bias, np.float64) + np.asarray(residual, np.float64)
  once = jnp.asarray(sums, jnp.float32).astype(BF16)
  assert (once != twice).any()
  # A kernel rounds its sums before where they are whole, and XLA may leave that rounding out.
  allowed = [once] if "reference" in run.name else [once, twice]
  assert any((y_after == want).all() for want in allowed)


@cases(
  "run",
  "m, k, n, groups, dtype",
  [(m, *kn, dtype) for m in (0, 1, 13, 16, 64, 128, 300) for dtype in DTYPES
   for kn in ((1152, 64, 9), (4096, 4096, 32), (512, 120, 1))],
  [(0, 512, 64, 4, BF16), (1, 1152, 64, 9, F16), (17, 512, 192, 1, BF16)],
)  # fmt: skip
def test_a_norm_of_the_result_comes_beside_it(run, rng, m, k, n, groups, dtype):
  x, codes, scales = problems.random(rng, m, k, n, groups, dtype)
  codes = run.prune(codes)
  x *= jnp.asarray(10.0 ** rng.uniform(-1, 1, (m, 1)), dtype)  # every row with a root mean square of its own
  bias, residual = jnp.asarray(rng.normal(size=n), dtype), jnp.asarray(rng.normal(size=(m, n)), dtype)
  norm = jnp.asarray(rng.uniform(0.25, 4, n), dtype), 0.25
  alone = run(x, codes, scales, bias=bias, residual=residual)
  y, normed = run(x, codes, scales, bias=bias, residual=residual, norm=norm)
  np.testing.assert_array_equal(y, alone)
  if run.name.startswith("hopper") and dtype == BF16 and n % 64 == 0 and m:
    assert isinstance(normed, DeferredNorm)
  normed = resolved(normed)
  assert normed.shape == (m, n) and normed.dtype == dtype
  wide = np.asarray(y, np.float64)
  want = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 0.25) * np.asarray(norm[0], np.float64)
  # Of y before it is rounded or after it, times the scale and rounded, and divided and rounded.
  unit, least = (2.0**-8, 2.0**-133) if dtype == BF16 else (2.0**-11, 2.0**-24)
  assert (np.abs(np.asarray(normed, np.float64) - want) <= 3 * unit * np.abs(want) + least).all()


@cases(
  "run",
  "m, k, n, groups, dtype, gated",
  [(m, *kn, dtype, gated) for m in (1, 13, 16, 64, 128, 300) for dtype in DTYPES for gated in (False, True)
   for kn in ((1152, 64, 9), (4096, 4096, 32), (640, 1088, 1))],
  [(1, 1152, 64, 9, F16, False), (17, 512, 192, 1, BF16, False), (3, 512, 192, 1, BF16, True)],
)  # fmt: skip
def test_x_may_come_with_its_norm_still_to_be_divided_by(run, rng, m, k, n, groups, dtype, gated):
  x, codes, scales = problems.random(rng, m, k, n, groups, dtype)
  codes = run.prune(codes)
  scales = scales / 4 if gated else scales
  bias = jnp.asarray(rng.normal(size=n), dtype)
  squares = jnp.asarray(10.0 ** rng.uniform(0, 2, (5, m)), jnp.float32)
  x = DeferredNorm(scaled=x, squares=squares, epsilon=0.5)
  factor = 1 / np.sqrt(np.asarray(squares, np.float64).sum(axis=0) / k + 0.5)[:, None]
  y = run(x, codes, scales, bias=bias, gated=gated)
  if run.name.startswith("hopper"):
    sums = np.asarray(run(x.scaled, codes, scales), np.float64) * factor + np.asarray(bias, np.float64)
  else:
    sums = np.asarray(
      run(jnp.asarray(np.asarray(x.scaled, np.float64) * factor, dtype), codes, scales, bias=bias), np.float64
    )
  want = np.asarray(reference.gate(jnp.asarray(sums, jnp.float32)) if gated else sums, np.float64)
  # The rounding of `sums` to dtype, of y, and where it is gated of what the gate makes of them.
  unit = 2.0 ** (-8 if dtype == BF16 else -11)
  error = np.linalg.norm(np.asarray(y, np.float64) - want)
  assert error <= (3 if gated else 2) * unit * np.linalg.norm(want)


@cases(
  "run",
  "m, k, n, dtype",
  [(m, *kn, dtype) for m in (0, 1, 17, 64, 129) for kn in ((256, 128), (1024, 48), (2048, 1024)) for dtype in DTYPES],
  [(0, 256, 128, BF16), (1, 1024, 48, F16), (17, 256, 128, BF16), (129, 256, 16, F16)],
)
def test_gated_columns_are_silu_of_the_gate_times_up(run, rng, m, k, n, dtype):
  x, codes, scales = problems.random(rng, m, k, n, k // 128, dtype)
  codes = run.prune(codes)
  scales = scales / 4  # so that the gate is neither open nor shut everywhere
  bias = jnp.asarray(rng.normal(size=n), dtype)
  rounded = weight_dtype(run.name, m, 128, dtype)
  sums = problems.expected(x, codes, scales, weight_dtype=rounded) + np.asarray(bias, np.float64)
  gates, ups = np.moveaxis(sums.reshape(m, n // 16, 2, 8), 2, 0).reshape(2, m, n // 2)
  open_by = 1 / (1 + np.exp(-gates))
  want = gates * open_by * ups
  y = run(x, codes, scales, bias=bias, gated=True)
  assert y.shape == (m, n // 2) and y.dtype == dtype
  # Three roundings at the most, of gate, up and y; a gate's counts for as much as silu changes with it.
  changes = np.abs(gates * open_by * (1 + gates * (1 - open_by)) * ups) + 2 * np.abs(want)
  rounding = 2.0 ** (-8 if dtype == BF16 else -11)
  error, bound = (np.linalg.norm(a, axis=0) for a in (np.asarray(y, np.float64) - want, rounding * changes))
  assert (error <= bound + 1e-6).all()  # of order 1, a float32 sum of K terms is off by some sqrt(K) 2^-24


@pytest.mark.parametrize("m", [8, 40])
def test_rows_do_not_see_each_other_not_even_nan_and_inf(run, rng, m):
  x, codes, scales = problems.random(rng, m, 256, 128, 2, BF16)
  codes = run.prune(codes)
  clean = run(x, codes, scales)
  dirty = run(x.at[3, 7].set(jnp.nan).at[5, 200].set(jnp.inf), codes, scales)
  others = np.setdiff1d(np.arange(m), [3, 5])
  np.testing.assert_array_equal(dirty[others], clean[others])

  def reached(k):
    """Columns in which x at k is multiplied: sparse tensor cores leave out what is pruned, all others nothing."""
    return np.asarray(codes[k] != layout.ZERO_CODE) if run.name == "hopper of 2:4" else np.ones(128, bool)

  assert jnp.isnan(dirty[3, reached(7)]).all()
  assert not jnp.isfinite(dirty[5, reached(200)]).any()  # Inf times the weight zero is NaN, as IEEE 754 has it


def test_a_nan_scale_stays_in_its_column(run, rng):
  x, codes, scales = problems.random(rng, 4, 256, 128, 2, BF16)
  codes = run.prune(codes)
  y = run(x, codes, scales.at[1, 70].set(jnp.nan))
  np.testing.assert_array_equal(jnp.isnan(y).any(0), np.arange(128) == 70)


def test_a_row_is_the_same_alone_and_in_a_batch_of_the_same_config(run, rng):
  x, codes, scales = problems.random(rng, 16, 512, 128, 4, BF16)
  codes = run.prune(codes)
  whole = run(x, codes, scales)
  for row in (0, 9, 15):
    np.testing.assert_array_equal(run(x.at[:row].set(0).at[row + 1 :].set(0), codes, scales)[row], whole[row])


def test_two_calls_give_the_same_bits(run, rng):
  x, codes, scales = problems.random(rng, 17, 1024, 128, 8, BF16)
  codes = run.prune(codes)
  first = run(x, codes, scales)
  for _ in range(3):
    np.testing.assert_array_equal(run(x, codes, scales), first)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16, 64, 129])
def test_two_hundred_calls_on_the_gpu_give_the_same_bits(rng, m):
  x, codes, scales = problems.random(rng, m, 2048, 1024, 16, BF16)
  qweight = layout.pack_codes(codes)
  run = jax.jit(matmul)
  first = np.asarray(run(x, qweight, scales))
  for _ in range(200):
    np.testing.assert_array_equal(run(x, qweight, scales), first)


@pytest.mark.gpu
@pytest.mark.parametrize("m, implementation", [*((m, None) for m in (1, 16, 17, 64, 256)), (512, "dequantize")])
@pytest.mark.parametrize("k, n", [(4096, 4096), (8192, 28672)])
def test_real_layers_are_exact_on_the_gpu(rng, m, implementation, k, n):
  x, codes, scales = problems.cancel(rng, m, k, n, k // 128, BF16)
  y = jax.jit(functools.partial(matmul, implementation=implementation))(x, layout.pack_codes(codes), scales)
  want = jnp.dot(
    x.astype(jnp.float32),
    (codes.astype(jnp.float32) - 8) * scales.astype(jnp.float32)[:1],
    precision=jax.lax.Precision.HIGHEST,
  )
  np.testing.assert_array_equal(y, want.astype(BF16))


def test_the_kernel_is_in_the_program_and_the_reference_is_not(lower_for_h200):
  shape = jax.ShapeDtypeStruct
  args = shape((16, 256), BF16), shape(layout.qweight_shape(256, 128), jnp.int16), shape((2, 128), BF16)
  assert "__gpu$xla.gpu.triton" in lower_for_h200(functools.partial(matmul, implementation="triton"), *args)
  kernel = "mosaic_gpu_v2" if jax.__version_info__ >= (0, 11) else "__gpu$xla.gpu.triton"
  assert kernel in lower_for_h200(matmul, *args)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(qweight=jnp.zeros((1, 2, 32, 32), jnp.int16)), r"qweight.shape=\(1, 2, 32, 32\) must be \(2, 4, 32, 32\)"),
    (dict(scales=jnp.ones((3, 128), BF16)), "3 groups, which must divide k=256"),
    (dict(qweight=jnp.zeros((2, 2, 64, 32), jnp.int16)), r"\(2, 2, 64, 32\) must be \(2, 4, 64, 32\)"),
    (
      dict(qweight=jnp.zeros((1, 4, 32, 32), jnp.int16), scales=jnp.ones((2, 24), BF16), gated=True),
      "n=24 must be a multiple of 16 for gated columns",
    ),
    (dict(implementation="cutlass"), "implementation='cutlass' must be one of"),
    (dict(residual=jnp.ones((1, 64), BF16)), r"residual is bfloat16 \(1, 64\), must be bfloat16 \(1, 128\)"),
    (dict(residual=jnp.ones((1, 128), F32)), r"residual is float32 \(1, 128\), must be bfloat16 \(1, 128\)"),
    (dict(norm=(jnp.ones(256, BF16), 1e-5)), r"the norm's scale has shape \(256,\), must have \(128,\)"),
  ],
)
def test_nonsense_is_a_value_error(change, message):
  good = dict(x=jnp.ones((1, 256), BF16), qweight=jnp.zeros((2, 4, 32, 32), jnp.int16), scales=jnp.ones((2, 128), BF16))
  args = good | change
  with pytest.raises(ValueError, match=message):
    matmul(args.pop("x"), args.pop("qweight"), args.pop("scales"), **args)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(qweight=jnp.zeros((2, 4, 32, 32), jnp.int16)), r"qweight.shape=\(2, 4, 32, 32\) must be \(2, 2, 32, 32\)"),
    (dict(meta=jnp.zeros((2, 4, 32, 16), jnp.int16)), r"meta.shape=\(2, 4, 32, 16\) must be \(2, 2, 32, 16\)"),
    (dict(zeros=jnp.ones((2, 128), BF16)), "bits=4 and zeros=True must be 4 and False where sparse24 is True"),
  ],
)
def test_sparse_nonsense_is_a_value_error(change, message):
  qweight, meta = layout24.pack_codes(jnp.full((256, 128), 8, jnp.uint8))
  args = dict(x=jnp.ones((1, 256), BF16), qweight=qweight, meta=meta, scales=jnp.ones((2, 128), BF16)) | change
  with pytest.raises(ValueError, match=message):
    matmul(args.pop("x"), args.pop("qweight"), args.pop("scales"), **args)


def test_a_named_implementation_is_never_replaced(h200):
  # 96 is a group size that neither divides the kernel's steps nor is a multiple of them.
  args = jnp.ones((1, 192), BF16), jnp.zeros(layout.qweight_shape(192, 64), jnp.int16), jnp.ones((2, 64), BF16)
  with pytest.raises(NotImplementedError, match=r"'triton' does not cover.*group_size=96"):
    matmul(*args, implementation="triton")


def test_dispatch_is_a_table_of_devices():
  problem = functools.partial(MatmulProblem, m=1, n=128, k=256, group_size=128)
  cpu = hardware.Device(platform="cpu", kind="cpu", num_sms=0)
  assert choose_implementation(problem(dtype=BF16), cpu) == "reference"
  assert choose_implementation(problem(dtype=F32), cpu) == "reference"
  on_hopper = "hopper" if jax.__version_info__ >= (0, 11) else "triton"
  ampere = dataclasses.replace(CUDA, kind="NVIDIA A100-SXM4-80GB")
  for dtype in (BF16, F16):
    assert choose_implementation(problem(dtype=dtype), CUDA) == on_hopper
    assert choose_implementation(problem(dtype=dtype), ampere) == "triton"
  with pytest.raises(NotImplementedError, match="triton: x must be bfloat16 or float16, not float32"):
    choose_implementation(problem(dtype=F32), CUDA)
  with pytest.raises(NotImplementedError, match=r"more than 2\^31 elements"):
    choose_implementation(MatmulProblem(m=1, n=2**17, k=2**17, group_size=128, dtype=BF16), CUDA)


def test_of_many_rows_the_weight_is_dequantized_first_where_there_is_no_hopper_kernel():
  ampere = dataclasses.replace(CUDA, kind="NVIDIA A100-SXM4-80GB", num_sms=108)
  dense, sparse = heuristics._DEQUANTIZE_FROM, heuristics._DEQUANTIZE_FROM_SPARSE24
  for sparse24, first, fused in ((False, dense, "triton"), (True, sparse, "triton24")):
    problem = functools.partial(MatmulProblem, n=128, k=512, group_size=128, sparse24=sparse24)
    for dtype in DTYPES:
      assert choose_implementation(problem(m=first - 1, dtype=dtype), ampere) == fused
      assert choose_implementation(problem(m=first, dtype=dtype), ampere) == "dequantize"
      assert choose_implementation(problem(m=8 * first, dtype=dtype), ampere) == "dequantize"
    on_hopper = "hopper" if jax.__version_info__ >= (0, 11) else "dequantize"
    assert choose_implementation(problem(m=first, dtype=BF16), CUDA) == on_hopper
  # Codes of 4 bits are a quarter of the bytes: they can be multiplied where their dequantized weight is too large.
  large = MatmulProblem(m=dense, n=2**15, k=2**16, group_size=128, dtype=BF16)
  assert choose_implementation(large, ampere) == "triton"
  assert "dequantized weight of 65536 x 32768 has more than 2^31" in IMPLEMENTATIONS["dequantize"](large, ampere)


def test_sparse_and_dense_weights_never_meet_the_kernel_of_the_other(h200):
  scales, x = jnp.ones((2, 64), BF16), jnp.ones((1, 256), BF16)
  qweight, meta = layout24.pack_codes(jnp.full((256, 64), 8, jnp.uint8))
  with pytest.raises(NotImplementedError, match=r"'triton' does not cover.*it takes dense weights, not 2:4 sparse"):
    matmul(x, qweight, scales, meta=meta, implementation="triton")
  with pytest.raises(NotImplementedError, match=r"'triton24' does not cover.*it takes 2:4 sparse weights, not dense"):
    matmul(x, jnp.zeros((1, 4, 32, 32), jnp.int16), scales, implementation="triton24")


def test_dispatch_of_sparse_weights_is_a_table_of_devices():
  problem = functools.partial(MatmulProblem, m=1, n=128, k=512, sparse24=True)
  assert (
    choose_implementation(problem(group_size=128, dtype=BF16), dataclasses.replace(CUDA, platform="cpu")) == "reference"
  )
  on_hopper = "hopper" if jax.__version_info__ >= (0, 11) else "triton24"
  ampere = dataclasses.replace(CUDA, kind="NVIDIA A100-SXM4-80GB")
  for group_size in (16, 32, 64, 128, 256, 512):
    of_any_card = problem(group_size=group_size, dtype=F16)
    assert choose_implementation(of_any_card, CUDA) == ("triton24" if group_size < 64 else on_hopper)
    assert choose_implementation(of_any_card, ampere) == "triton24"
  with pytest.raises(NotImplementedError, match="triton24: x must be bfloat16 or float16, not float32"):
    choose_implementation(problem(group_size=128, dtype=F32), CUDA)
  with pytest.raises(NotImplementedError, match="triton24: group_size=192 must divide 128, be a multiple of it, or"):
    choose_implementation(dataclasses.replace(problem(group_size=128, dtype=BF16), k=384, group_size=192), CUDA)
  with pytest.raises(NotImplementedError, match=r"triton24: .*more than 2\^31 elements"):
    choose_implementation(problem(k=2**18, n=2**18, group_size=128, dtype=BF16), CUDA)


def test_the_sparse_kernel_is_in_the_program(lower_for_h200):
  shape = jax.ShapeDtypeStruct
  words = shape(layout24.qweight_shape(256, 128), jnp.int16), shape(layout24.meta_shape(256, 128), jnp.int16)

  def sparse(x, qweight, meta, scales):
    return matmul(x, qweight, scales, meta=meta)

  text = lower_for_h200(sparse, shape((16, 256), BF16), *words, shape((2, 128), BF16))
  if jax.__version_info__ >= (0, 11):
    assert "mosaic_gpu_v2" in text and "wgmma.mma_async.sp" in text
  else:
    assert "__gpu$xla.gpu.triton" in text and "w4a16_sparse24_triton" in text
