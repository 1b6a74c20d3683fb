# SPDX-License-Identifier: Apache-2.0
"""A decoder layer after its attention: three products with residuals and norms, in one launch where a kernel can."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import heuristics, hopper_matmul, layout
from pallas_kernels.deferred_norm import DeferredNorm
from pallas_kernels.hardware import Device, current_device
from pallas_kernels.hopper_chain import Weight, after_attention_hopper, problems_of
from pallas_kernels.matmul import matmul

Weights = tuple[Weight, Weight, Weight]
Norms = tuple[tuple[Float[Array, " E"], float], tuple[Float[Array, " E"], float]]


def separate_reason(x: Float[Array, "M K"], weights: Weights, norms: Norms, device: Device) -> str | None:
  """Why `after_attention` takes a launch for each product on `device`; None if it takes one for all."""
  problems = problems_of(x.shape[0], weights, x.dtype)
  for problem in problems:
    if reason := hopper_matmul.unsupported_reason(problem, device):
      return reason
  if any(array.dtype != jnp.bfloat16 for array in (x, norms[0][0], norms[1][0])):
    return f"x and norms must be bfloat16, not {x.dtype}, {norms[0][0].dtype}, {norms[1][0].dtype}"
  sizes = [x.shape[1], *(problem.n for problem in problems)]
  if any(size % layout.TILE for size in sizes) or problems[0].k != x.shape[1]:
    return f"sizes {sizes} must be multiples of {layout.TILE}, and of {2 * layout.TILE} where weights are 2:4 sparse"
  if heuristics.chain_config(problems, device.num_sms) is None:
    return f"{problems[0].m} rows are too many, or the layer has too many columns, for programs that all run at once"
  return None


def after_attention(
  x: Float[Array, "M K"], residual: Float[Array, "M E"], weights: Weights, norms: Norms
) -> tuple[Float[Array, "M E"], Float[Array, "M E"] | DeferredNorm]:
  """(s, norm(s)) with s = t + SwiGLU(norm(t) @ gate_up) @ down and t = residual + x @ output.

  On a Hopper GPU one kernel does it for up to 16 rows (`separate_reason` says when not), with the products of
  `matmul`; else there are three.

  Args:
    x: what attention made.
    weights: of the output projection; of gates and ups, columns in turns (`layout.gated_order`); of down. Each is
      (qweight, scales, zeros, meta) as `matmul` takes them, zeros and meta None where there are none.
    norms: (scale, epsilon) of the norm of t and of that of s.

  Raises: as `matmul`.
  """
  device = current_device()
  if len(x) and device.platform == "cuda" and separate_reason(x, weights, norms, device) is None:
    config = heuristics.chain_config(problems_of(x.shape[0], weights, x.dtype), device.num_sms)
    (before, epsilon_before), (after, epsilon) = norms
    scales = before, after
    s, scaled, squares = after_attention_hopper(x, residual, weights, scales, epsilon=epsilon_before, config=config)
    return s, DeferredNorm(scaled=scaled, squares=squares, epsilon=epsilon)
  output, gate_up, down = weights
  t, normed = matmul(x, *output, residual=residual, norm=norms[0])
  return matmul(matmul(normed, *gate_up, gated=True), *down, residual=t, norm=norms[1])
