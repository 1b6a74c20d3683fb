# SPDX-License-Identifier: Apache-2.0
"""The one entrance: picks the implementation of a problem, or says why none fits."""

from pathlib import Path

import jax.numpy as jnp
from jaxtyping import Array, Float, Int16

from pallas_kernels import (
  heuristics,
  hopper_matmul,
  layout,
  layout24,
  reference,
  triton_dequantize,
  triton_matmul,
  triton_matmul24,
  tuning,
)
from pallas_kernels.add_norm import rms_norm
from pallas_kernels.deferred_norm import DeferredNorm, resolved
from pallas_kernels.hardware import Device, current_device
from pallas_kernels.problem import MatmulProblem

# name -> why it cannot take a problem on a device (None: it can); of few rows, fastest first. The reference can take
# everything.
IMPLEMENTATIONS = {
  "hopper": hopper_matmul.unsupported_reason,
  "triton": triton_matmul.unsupported_reason,
  "triton24": triton_matmul24.unsupported_reason,
  "dequantize": triton_dequantize.unsupported_reason,
  "reference": reference.unsupported_reason,
}

# Interpret mode stands in for a GPU: few multiprocessors, so that small tests split K as large problems do.
INTERPRETED = Device(platform="cuda", kind="interpreter", num_sms=4)


def choose_implementation(
  problem: MatmulProblem, device: Device | None = None, *, tuned: str | Path | None = None
) -> str:
  """Name of the implementation that `matmul` takes for `problem` on `device` (default: the current one).

  Without a GPU that is the reference. On one it is a kernel; the reference, slower than a bfloat16 product, must be
  asked for by name there. Of several it is the one that a tuned table found fastest, or else the one that
  `heuristics.ranked` puts first.

  Raises:
    NotImplementedError: no kernel covers the problem on this GPU; every kernel's reason is listed.
    ValueError: a tuned table is not what it must be.
  """
  device = device or current_device()
  if device.platform != "cuda":
    return "reference"
  reasons = {name: reason(problem, device) for name, reason in IMPLEMENTATIONS.items() if name != "reference"}
  able = [name for name, reason in reasons.items() if reason is None]
  if able:
    ranked = heuristics.ranked(problem, able)
    return tuning.fastest(problem, device, ranked, tuned=tuned) or ranked[0]
  refusals = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
  raise NotImplementedError(f"no kernel covers {problem} ({refusals}); implementation='reference' covers everything")


def check_product(m: int, k: int, dtype, weight, *, bias=None, residual=None, norm=None, gated: bool = False) -> None:
  """ValueError unless (qweight, scales, zeros, meta) and the rest belong to a product of x [m, k]; see `matmul`."""
  qweight, scales, zeros, meta = weight
  groups, n = scales.shape
  if groups < 1 or k % groups:
    raise ValueError(f"scales have {groups} groups, which must divide k={k}")
  bits = 8 if qweight.shape[2] == 64 else 4
  shape = layout.qweight_shape(k, n, bits) if meta is None else layout24.qweight_shape(k, n)
  if qweight.shape != shape:
    raise ValueError(f"{qweight.shape=} must be {shape} for {k=} and scales {scales.shape}")
  if zeros is not None and zeros.shape != scales.shape:
    raise ValueError(f"{zeros.shape=} must be that of scales, {scales.shape}")
  if meta is not None and meta.shape != (shape := layout24.meta_shape(k, n)):
    raise ValueError(f"{meta.shape=} must be {shape} for {k=} and scales {scales.shape}")
  if bias is not None and bias.shape != (n,):
    raise ValueError(f"{bias.shape=} must be {(n,)} for scales {scales.shape}")
  if gated and n % 16:
    raise ValueError(f"n={n} must be a multiple of 16 for gated columns")
  if residual is not None and (residual.shape, residual.dtype) != (shape := (m, n // (1 + gated)), dtype):
    raise ValueError(f"residual is {residual.dtype} {residual.shape}, must be {dtype} {shape}")
  if norm is not None and norm[0].shape != (n // (1 + gated),):
    raise ValueError(f"the norm's scale has shape {norm[0].shape}, must have {(n // (1 + gated),)}")


def matmul(
  x: Float[Array, "M K"] | DeferredNorm,
  qweight: Int16[Array, "N_tiles K_tiles rows 32"],
  scales: Float[Array, "G N"],
  zeros: Float[Array, "G N"] | None = None,
  meta: Int16[Array, "_ _ 32 16"] | None = None,
  bias: Float[Array, " N"] | None = None,
  residual: Float[Array, "M N_out"] | None = None,
  *,
  norm: tuple[Float[Array, " N_out"], float] | None = None,
  gated: bool = False,
  implementation: str | None = None,
  interpret: bool = False,
  tuned: str | Path | None = None,
) -> Float[Array, "M N_out"] | tuple[Float[Array, "M N_out"], Float[Array, "M N_out"] | DeferredNorm]:
  """y[m, n] = sum_k x[m, k] * scales[k // (K / G), n] * (codes[k, n] - zeros[k // (K / G), n]) + bias[n].

  A residual may be added to it. All is summed in float32 and rounded once; the Triton kernels round once more before
  they add the residual. `dequantize` rounds the weight to x's dtype before, and so does `hopper` of more than 64 rows,
  unless groups are small.

  Args:
    x: bfloat16, float16 or (reference only) float32; M may be 0. Or what a product with a norm returned: the Hopper
      kernel divides its sums instead of x.
    qweight: codes of 4 or 8 bits in kernel order, from `layout.pack_codes`; its shape says which. With meta, the kept
      codes of a 2:4 sparse weight of 4 bits, from `layout24.pack_codes`.
    scales: one row per group of K / G consecutive k; G = 1 is one group per column. Any float dtype.
    zeros: zero points, like scales; None is the middle code, 8 or 128. A kernel rounds codes - zeros to x's dtype,
      which is exact for integers, and rounds zeros that are not to it before.
    meta: the positions of the kept codes, from `layout24.pack_codes`; such a weight has no zeros. Where a weight is
      pruned, a NaN or Inf of x may pass: sparse tensor cores do not multiply there, the others multiply with zero.
    bias: added to the sums; any float dtype.
    residual: added last, to what is gated if that is asked for; in x's dtype.
    norm: (scale, epsilon) of a root-mean-square norm of y, y / sqrt(mean(y^2) + epsilon) * scale, to be returned too.
    gated: columns are gates and ups in turns (`layout.gated_order`), and y is silu(gate) * up, N / 2 columns. All
      kernels but `hopper` round gate and up to x's dtype before.
    implementation: a name of IMPLEMENTATIONS, used or refused, never replaced. None takes `choose_implementation`'s.
    interpret: run a Triton kernel's body on the CPU instead of lowering it; for tests.
    tuned: a table by `marlin-jax tune`, looked up before the shipped one; None takes the one that the
      environment variable MARLIN_JAX_TUNED names, if it does. Read when a program is traced.

  Returns:
    y in x's dtype, or (y, y normed). The Hopper kernel leaves a DeferredNorm in bfloat16, where N is a multiple of 64;
    else it takes one more kernel. The same inputs give the same bits at every call.

  Raises:
    ValueError: shapes do not belong together, the name is unknown, or a table is not what it must be.
    NotImplementedError: the named implementation, or on a GPU no kernel, covers this problem, and why.
  """
  (m, k), (groups, n) = x.shape, scales.shape
  weight = qweight, scales, zeros, meta
  check_product(m, k, x.dtype, weight, bias=bias, residual=residual, norm=norm, gated=gated)
  kind = dict(bits=qweight.shape[2] // 8, zeros=zeros is not None, sparse24=meta is not None)
  problem = MatmulProblem(m=m, n=n, k=k, group_size=k // groups, dtype=x.dtype, **kind)
  device = INTERPRETED if interpret else current_device()
  if implementation is None:
    implementation = choose_implementation(problem, device, tuned=tuned)
  elif implementation not in IMPLEMENTATIONS:
    raise ValueError(f"{implementation=} must be one of {tuple(IMPLEMENTATIONS)} or None")
  elif reason := IMPLEMENTATIONS[implementation](problem, device):
    raise NotImplementedError(f"implementation {implementation!r} does not cover {problem}: {reason}")
  if m == 0:
    y = jnp.zeros((0, n // (1 + gated)), x.dtype)
    return y if norm is None else (y, y)
  if implementation == "reference":
    y = reference.matmul_reference(resolved(x), qweight, scales, zeros, meta, bias, residual, gated=gated)
    return y if norm is None else (y, reference.rms_norm(y, *norm))
  # Interpret mode computes what any config computes: no table is for it.
  config = (
    heuristics.HEURISTICS[implementation](problem, device.num_sms)
    if interpret
    else tuning.config_for(implementation, problem, device, tuned=tuned)
  )
  if implementation == "hopper":
    # float16 could overflow: what is left to the next product is not yet divided.
    defers = norm is not None and norm[0].dtype == x.dtype == jnp.bfloat16 and n % layout.TILE == 0 and not gated
    rows, squares, before = (x.scaled, x.squares, x.epsilon) if isinstance(x, DeferredNorm) else (x, None, 0.0)
    scale = norm[0] if defers else None
    operands = rows, qweight, scales, zeros, meta, bias, residual, squares, scale
    y = hopper_matmul.matmul_hopper(*operands, epsilon=before, gated=gated, config=config)
    if defers:
      y, scaled, squares = y
      return y, DeferredNorm(scaled=scaled, squares=squares, epsilon=norm[1])
  else:
    options = dict(config=config, interpret=interpret)
    x = resolved(x)
    if implementation == "triton24":
      y = triton_matmul24.matmul_triton24(x, qweight, meta, scales, bias, **options)
    elif implementation == "dequantize":
      y = triton_dequantize.matmul_dequantize(x, qweight, scales, zeros, meta, bias, **options)
    else:
      y = triton_matmul.matmul_triton(x, qweight, scales, zeros, bias, **options)
    y = reference.gate(y) if gated else y
    y = y if residual is None else y + residual
  return y if norm is None else (y, rms_norm(y, norm[0], epsilon=norm[1], interpret=interpret))
