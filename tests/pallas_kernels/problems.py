# SPDX-License-Identifier: Apache-2.0
"""Matmul problems whose right answer is known, exactly where arithmetic allows it."""

import re

import jax.numpy as jnp
import numpy as np

from pallas_kernels import layout


def scales_of(rng, groups: int, n: int, dtype):
  """Positive and negative scales whose groups differ visibly in size (drawn in float32, then cast)."""
  magnitude = 0.02 * 4.0 ** rng.uniform(-1, 1, (groups, 1))
  return jnp.asarray(magnitude * rng.uniform(0.5, 1.5, (groups, n)) * rng.choice([-1, 1], (groups, n)), dtype)


def random(rng, m: int, k: int, n: int, groups: int, dtype):
  """x, codes, scales: every code from 0 to 15 is as likely as every other."""
  x = jnp.asarray(rng.normal(size=(m, k)), dtype)
  codes = jnp.asarray(rng.integers(0, 16, (k, n)), jnp.uint8)
  return x, codes, scales_of(rng, groups, n, dtype)


def prune24(codes):
  """The codes with the two largest |code - 8| of every four kept, of equal ones the first: 2:4 sparse, all masks."""
  k, n = codes.shape
  size = np.abs(np.pad(np.asarray(codes, int), ((0, -k % 4), (0, 0)), constant_values=8) - 8).reshape(-1, 4, n)
  rank = np.argsort(np.argsort(-size, axis=1, kind="stable"), axis=1, kind="stable")
  return jnp.where((rank < 2).reshape(-1, n)[:k], codes, jnp.uint8(layout.ZERO_CODE))


def exact_scales(rng, groups: int, n: int, dtype):
  """Powers of two: products and sums with them are exact."""
  return jnp.asarray(rng.choice([0.25, 0.5, 1.0], (groups, n)), dtype)


def cancel(rng, m: int, k: int, n: int, groups: int, dtype):
  """Partial sums grow past 1e5, then all but a small integer cancels: any order of float32 additions is exact.

  Rows k and k + K/2 of the weight are the same; x has 64 against -64 there, plus sixteen ones. Half precision anywhere
  on the way, a dropped row, a wrong scale or a wrong code changes the result.
  """
  half = rng.integers(0, 16, (k // 2, n))
  scales = np.repeat(np.asarray(exact_scales(rng, 1, n, jnp.float32)), groups, axis=0)
  x = np.concatenate([np.full((m, k // 2), 64.0), np.full((m, k // 2), -64.0)], axis=1)
  for row in range(m):
    x[row, rng.choice(np.arange(k // 2, k), 16, replace=False)] += 1
  return jnp.asarray(x, dtype), jnp.asarray(np.concatenate([half, half]), jnp.uint8), jnp.asarray(scales, dtype)


def with_zeros(rng, codes, scales, bits: int, dtype, *, fractional=False):
  """(codes, zeros) of `bits` bits in place of codes of four: zero points of every code, different in every group."""
  k, n = codes.shape
  codes = jnp.asarray(rng.integers(0, 2**bits, (k, n)), jnp.uint8)
  zeros = rng.uniform(0, 2**bits - 1, scales.shape) if fractional else rng.integers(0, 2**bits, scales.shape)
  return codes, jnp.asarray(zeros, dtype)


def expected(x, codes, scales, zeros=None, bits=4, *, weight_dtype=np.float64) -> np.ndarray:
  """The product in float64; `weight_dtype` rounds the dequantized weight, for implementations that say they do."""
  return np.asarray(x, np.float64) @ _weight(codes, scales, zeros, bits, weight_dtype)


def _weight(codes, scales, zeros, bits, dtype, step_dtype=np.float32) -> np.ndarray:
  k, n = codes.shape
  zeros = np.full(scales.shape, 2.0 ** (bits - 1)) if zeros is None else np.asarray(zeros, np.float32)
  steps = np.asarray(codes, np.float32).reshape(scales.shape[0], -1, n) - zeros[:, None]
  w = steps.astype(step_dtype).astype(np.float64) * np.asarray(scales, np.float64)[:, None]
  return w.reshape(k, n).astype(dtype).astype(np.float64)


def assert_close(y, x, codes, scales, zeros=None, bits=4, *, weight_dtype=np.float64, step_dtype=np.float32):
  """Worst row and worst column, in the 2-norm, are within what rounding y once and summing in float32 explain.

  Rounding to nearest in bfloat16 (fp16) is off by at most 2^-8 (2^-11) of a value, by about 0.4 of that in the mean
  square. Summing is off by some 2^-20 of the sum of all terms' sizes, which counts where terms cancel.

  Args:
    weight_dtype: of the weights as the implementation rounds them.
    step_dtype: of code - zero, which kernels round to x's dtype: exact unless zero points are fractions.
  """
  x, w = np.asarray(x, np.float64), _weight(codes, scales, zeros, bits, weight_dtype, step_dtype)
  want, terms = x @ w, np.abs(x) @ np.abs(w)
  error = np.asarray(y, np.float64) - want
  rounding = 2.0 ** (-8 if y.dtype == jnp.bfloat16 else -11)
  for axis in (0, 1):
    size, bound = (np.linalg.norm(a, axis=axis) for a in (error, rounding * np.abs(want) + 2.0**-20 * terms))
    worst = np.argmax(size / bound)
    assert size[worst] < bound[worst], f"error {size[worst]:.2e} along axis {axis} is not below {bound[worst]:.2e}"


def packed(codes):
  return layout.pack_codes(codes)


def sparse24_codes(rng, k: int, n: int, density: int | None = 2):
  """2:4 sparse codes: `density` of every four are not 8 (None: 0, 1 or 2, a quad by a quad), all masks alike."""
  quads = -(-k // 4)
  codes = np.asarray(rng.choice([code for code in range(16) if code != layout.ZERO_CODE], (quads, 4, n)), np.uint8)
  kept = rng.integers(0, 3, (quads, 1, n)) if density is None else density
  rank = np.argsort(np.argsort(rng.random((quads, 4, n)), axis=1), axis=1)
  codes = np.where(rank < kept, codes, layout.ZERO_CODE).astype(np.uint8)
  return jnp.asarray(codes.reshape(-1, n)[:k])


def assert_lean(text: str, fma: str, blocks: int, dots: int):
  """Of a kernel's Triton IR: what decodes (`blocks` masks and fmas: one a nibble plane, two a byte plane), the dots."""
  assert text.count("lop3.b32") == text.count(fma) == blocks
  assert set(re.findall(r"shr\.u32 \w, \$\d, (\d+);", text)) == {"0", "8"}  # one shift, which two planes share
  assert "sitofp" not in text and "uitofp" not in text  # no slow conversion anywhere
  results = re.findall(r"tt.dot .*-> (\S+)", text)
  assert len(results) == dots
  assert all(result.endswith("xf32>") for result in results)  # never an fp16 accumulator
