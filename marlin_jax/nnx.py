# SPDX-License-Identifier: Apache-2.0
"""QuantLinear: the Flax NNX layer, a drop-in for `nnx.Linear` in inference."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from marlin_jax.ops import quant_matmul
from marlin_jax.packing import pack, pack24
from marlin_jax.quantized import PACKED_FIELDS, Packed, QuantSpec, packed_of
from marlin_jax.quantizers import Quantizer
from marlin_jax.quantizers.rtn import quantize_rtn
from marlin_jax.quantizers.sparse24 import quantize_sparse24
from pallas_kernels import DeferredNorm, resolved


class QuantParam(nnx.Variable):
  """A part of a quantized weight. Not an `nnx.Param`: an optimizer that takes parameters leaves it alone."""


@partial(jax.jit, static_argnames=("spec", "quantizer"))
def quantize_and_pack(w: Float[Array, "*stack K N"], spec: QuantSpec, quantizer: Quantizer = quantize_rtn) -> Packed:
  """The packed weight nearest to `w`, with scales of w's dtype: one compiled program a shape.

  2:4 sparse if the spec says so: the two largest of every four are kept, and rounded to nearest. A `w` with leading
  axes is a stack of weights, which are quantized one after the other.

  Raises:
    NotImplementedError: 2:4 sparsity with another quantizer.
  """
  if w.ndim > 2:
    return jax.lax.map(lambda one: quantize_and_pack(one, spec, quantizer), w)
  if spec.sparse24:
    if quantizer is not quantize_rtn:
      raise NotImplementedError(f"sparse24 is not implemented for {quantizer.__name__}, only for quantize_rtn")
    return pack24(quantize_sparse24(w, spec))
  return pack(quantizer(w, spec))


class QuantLinear(nnx.Module):
  """y[..., n] = sum_k x[..., k] * w[k, n] + bias[n] with w in 4 or 8 bits.

  Constructor words, argument order and initialisation are those of `nnx.Linear`; a fresh layer holds a quantized
  random kernel. Usually it is made from a trained one, by `from_linear` or `marlin_jax.quantize`. Made from a stack of
  layers, as `nnx.vmap` makes one, it is such a stack too: `nnx.scan` and `nnx.vmap` call it, a layer at a time.

  Attributes:
    qweight, meta, scales, zeros, permutation: QuantParam; the fields of a PackedTensor or, with meta, of a
      SparsePackedTensor. Those that it does not have are None.
    bias: nnx.Param of shape (out_features,), or None.
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    use_bias: bool = True,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
    spec: QuantSpec = QuantSpec(),
    kernel_init=nnx.initializers.lecun_normal(),
    bias_init=nnx.initializers.zeros_init(),
    rngs: nnx.Rngs,
  ):
    """
    Args:
      in_features, out_features: K and N.
      use_bias: whether there is a bias.
      dtype: x and bias are cast to it and the result has it; None keeps x's own dtype.
      param_dtype: of scales and bias.
      spec: bits, group size, symmetry and sparsity.
      kernel_init, bias_init: initialisers, as for nnx.Linear; a packed weight from kernel_init is held as it is.
      rngs: with a "params" stream.

    Raises:
      ValueError: the group size does not divide in_features.
    """
    self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
    w = kernel_init(rngs.params(), (in_features, out_features), param_dtype)
    packed = w if isinstance(w, Packed) else quantize_and_pack(w, spec)
    for name in PACKED_FIELDS:
      array = getattr(packed, name)
      setattr(self, name, nnx.data(None if array is None else QuantParam(array)))
    self.bias = nnx.data(nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype)) if use_bias else None)

  @classmethod
  def from_packed(cls, w: Packed, bias: nnx.Param | None = None, *, dtype: DTypeLike | None = None) -> "QuantLinear":
    """A layer around an existing packed weight; nothing is computed."""
    k, n = w.shape
    self = cls(k, n, use_bias=False, dtype=dtype, kernel_init=lambda *_: w, rngs=nnx.Rngs(0))
    self.bias = nnx.data(bias)
    return self

  @classmethod
  def from_linear(
    cls, linear: nnx.Linear, spec: QuantSpec = QuantSpec(), *, quantizer: Quantizer = quantize_rtn, device=None
  ) -> "QuantLinear":
    """Quantizes a float layer; bias and dtype are taken over.

    Args:
      linear: the trained layer; it is not changed.
      spec: bits, group size and symmetry.
      quantizer: round to nearest with searched scales, or another that takes (w, spec).
      device: where to quantize and leave the packed weight; None is where the kernel lies.

    Raises:
      ValueError: the group size does not divide K, or the kernel holds NaN or Inf.
    """
    w = linear.kernel[...]
    w = w if device is None else jax.device_put(w, device)
    if not jnp.isfinite(w).all():
      raise ValueError("the kernel holds NaN or Inf, which no codes can represent")
    return cls.from_packed(quantize_and_pack(w, spec, quantizer), linear.bias, dtype=linear.dtype)

  @property
  def packed(self) -> Packed:
    """The weight, as the kernel takes it."""
    fields = {name: getattr(self, name) for name in PACKED_FIELDS}
    arrays = {name: variable[...] for name, variable in fields.items() if variable is not None}
    return packed_of(self.in_features, arrays)

  def __call__(
    self,
    x: Float[Array, "*batch K"] | DeferredNorm,
    *,
    residual: Float[Array, "*batch N"] | None = None,
    norm: nnx.RMSNorm | None = None,
  ) -> Float[Array, "*batch N"] | tuple[Float[Array, "*batch N"], Float[Array, "*batch N"] | DeferredNorm]:
    """y = x @ w + bias + residual, or (y, norm(y)); see `marlin_jax.quant_matmul` for the errors."""
    return self._multiply(x, residual, norm)

  def _multiply(
    self, x: Array | DeferredNorm, residual: Array | None, norm: nnx.RMSNorm | None, *, gated: bool = False
  ) -> Array | tuple[Array, Array | DeferredNorm]:
    if self.dtype is not None and x.dtype != self.dtype:
      x = resolved(x).astype(self.dtype)
    bias = None if self.bias is None else self.bias[...]
    after = None if norm is None else (norm.scale[...], norm.epsilon)
    return quant_matmul(x, self.packed, bias, residual, norm=after, gated=gated)
