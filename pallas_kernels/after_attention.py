# SPDX-License-Identifier: Apache-2.0
"""Between the attentions of two decoder layers: four products with residuals and norms, in one launch if possible."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import heuristics, hopper_matmul, layout
from pallas_kernels.deferred_norm import DeferredNorm
from pallas_kernels.hardware import Device, current_device
from pallas_kernels.hopper_chain import Weights, after_attention_hopper, problems_of
from pallas_kernels.hopper_config import ChainConfig
from pallas_kernels.matmul import check_product, matmul

Norms = tuple[tuple[Float[Array, " E"], float], tuple[Float[Array, " E"], float]]


def _one_launch(x: Float[Array, "M K"], weights: Weights, norms: Norms, device: Device) -> ChainConfig | str:
  """The config of the one launch, or why there is none."""
  problems = problems_of(x, weights)
  for problem in problems:
    if reason := hopper_matmul.unsupported_reason(problem, device):
      return reason
  if any(array.dtype != jnp.bfloat16 for array in (x, norms[0][0], norms[1][0])):
    return f"x and norms must be bfloat16, not {x.dtype}, {norms[0][0].dtype}, {norms[1][0].dtype}"
  if any(scales.dtype.itemsize != 2 for _, scales, *_ in weights):
    return f"scales must be of 16 bits, not {', '.join(str(scales.dtype) for _, scales, *_ in weights)}"
  sizes = [size for problem in problems for size in (problem.k, problem.n)]
  if any(size % layout.TILE for size in sizes):
    return f"sizes {sizes} must be multiples of {layout.TILE}"
  return heuristics.chain_config(problems, device.num_sms)


def separate_reason(x: Float[Array, "M K"], weights: Weights, norms: Norms, device: Device) -> str | None:
  """Why `after_attention` takes a launch for each product on `device`; None if it takes one for all."""
  found = _one_launch(x, weights, norms, device)
  return found if isinstance(found, str) else None


def after_attention(
  x: Float[Array, "M K"],
  residual: Float[Array, "M E"],
  weights: Weights,
  norms: Norms,
  bias: Float[Array, " N"] | None = None,
  *,
  implementation: str | None = None,
) -> tuple[Float[Array, "M E"], Float[Array, "M E"] | DeferredNorm, Float[Array, "M N"]]:
  """(s, norm(s), y): all that is between the attention of a decoder layer and that of the next.

      t = residual + x @ output;  s = t + SwiGLU(norm(t) @ gate_up) @ down;  y = norm(s) @ reader + bias

  On a Hopper GPU one kernel does it for up to 16 rows; `separate_reason` says when not. Else there are four products
  of `matmul`. That kernel has the card to itself (hopper_grid.py): of two calls in a program one must read what the
  other wrote.

  Args:
    x: what attention made.
    weights: output; gate_up, columns of gates and ups in turns (`layout.gated_order`); down; reader, which is the next
      layer's. Each is (qweight, scales, zeros, meta) as `matmul` takes them, zeros and meta None where there are none.
    norms: (scale, epsilon) of the norm of t and of that of s.
    bias: of the reader.
    implementation: four products by what `matmul` knows under this name.

  Raises: as `matmul`.
  """
  output, gate_up, down, reader = weights
  features = residual.shape[1]
  for name, (_, scales, *_) in dict(output=output, down=down).items():
    if scales.shape[1] != features:
      raise ValueError(f"{name} has scales {scales.shape}, must have the residual's {features} columns")
  m, k = x.shape
  check_product(m, k, x.dtype, output, residual=residual, norm=norms[0])
  check_product(m, features, x.dtype, gate_up, gated=True)
  check_product(m, gate_up[1].shape[1] // 2, x.dtype, down, residual=residual, norm=norms[1])
  check_product(m, features, x.dtype, reader, bias=bias)
  config = _one_launch(x, weights, norms, current_device()) if implementation is None and m else None
  if isinstance(config, ChainConfig):
    (before, epsilon_before), (after, epsilon) = norms
    options = dict(epsilons=(epsilon_before, epsilon), config=config)
    s, scaled, squares, y = after_attention_hopper(x, residual, weights, (before, after), bias, **options)
    return s, DeferredNorm(scaled=scaled, squares=squares, epsilon=epsilon), y
  t, normed = matmul(x, *output, residual=residual, norm=norms[0], implementation=implementation)
  h = matmul(normed, *gate_up, gated=True, implementation=implementation)
  s, normed = matmul(h, *down, residual=t, norm=norms[1], implementation=implementation)
  return s, normed, matmul(normed, *reader, bias, implementation=implementation)
