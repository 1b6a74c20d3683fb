# SPDX-License-Identifier: Apache-2.0
"""What the calibrated methods do with one decoder layer: in which order, on which inputs, and what is folded where.

gptq    q, k, v   ->   o   ->   gate, up   ->   down        each on the outputs of those that are quantized already
wanda   the same; 2:4 sparse only
awq     v -fold-> o, up -fold-> down, norm -fold-> q, k, v, norm -fold-> gate, up; then all at once
"""

import dataclasses
from collections.abc import Collection, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32

from marlin_jax.calibration.inputs import LayerInputs, Moments, Path, find
from marlin_jax.nnx import QuantLinear
from marlin_jax.packing import pack, pack24, split, unpack
from marlin_jax.quantized import Packed, QuantizedTensor, QuantSpec
from marlin_jax.quantizers.awq import output_error, search_awq_scales
from marlin_jax.quantizers.gptq import quantize_gptq
from marlin_jax.quantizers.rtn import quantize_rtn
from marlin_jax.quantizers.sparse24 import quantize_sparse24, wanda_mask

_Q, _K, _V, _O = (("attention", f"{name}_proj") for name in "qkvo")
_GATE, _UP, _DOWN = (("mlp", f"{name}_proj") for name in ("gate", "up", "down"))
_HEAD = ("lm_head",)


class Readers(NamedTuple):
  """Dense layers that read the same x, and the module whose outputs x is proportional to, feature by feature."""

  paths: tuple[Path, ...]
  source: Path


# In the order in which a layer computes them.
_READERS = (
  Readers((_Q, _K, _V), ("input_norm",)),
  Readers((_O,), _V),
  Readers((_GATE, _UP), ("post_attention_norm",)),
  Readers((_DOWN,), _UP),
  Readers((_HEAD,), ("input_norm",)),
)


class Quantized(NamedTuple):
  """A dense layer that was quantized.

  Attributes:
    error: |x w - x v|^2 / |x w|^2 over the calibration tokens, v being the quantized weight.
    note: what was out of the ordinary, or None.
  """

  path: Path
  error: float
  note: str | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Gptq:
  """See quantizers/gptq.py; with 2:4 sparsity it is SparseGPT.

  Attributes:
    damping: of the Hessian, in units of its mean diagonal; more if it cannot be factored, which is then said.
    act_order: groups of features with similar inputs, for a gather of x at every product.
    fit: 2:4 sparse weights by least squares before they are rounded; False is SparseGPT as published.
  """

  damping: float = 0.01
  act_order: bool = False
  fit: bool = True

  def __post_init__(self):
    if not 0 <= self.damping <= 1:
      raise ValueError(f"damping={self.damping} must be in 0 .. 1")

  def check(self, spec: QuantSpec) -> None:
    """ValueError if the method does not go with `spec`."""
    if spec.sparse24 and self.act_order:
      raise ValueError("act_order=True must be False with sparse24, which is a pattern of consecutive input features")

  def quantize(self, layer: Any, inputs: LayerInputs, chosen: Collection[Path], spec: QuantSpec) -> list[Quantized]:
    """Puts QuantLinear layers in the place of the `chosen` dense layers of `layer`."""
    done = []
    for paths, kernels, gram in kernels_and_grams(layer, inputs, chosen):
      # The columns of a weight are rounded apart from each other, so layers that read the same x are one weight.
      weight = jnp.concatenate(kernels, axis=1)
      tensor, damping = quantize_gptq(weight, gram, spec, damping=self.damping, act_order=self.act_order, fit=self.fit)
      damping = float(damping)
      if not np.isfinite(damping):
        raise ValueError(f"{paths[0][-1]}: no damping makes what it reads on the calibration text a matrix to invert")
      note = None if np.isclose(damping, self.damping) else f"damping raised from {self.damping:g} to {damping:g}"
      parts = split(_pack(tensor, spec), [kernel.shape[1] for kernel in kernels])
      for path, kernel, part in zip(paths, kernels, parts, strict=True):
        done.append(Quantized(path, _error(kernel, unpack(part), gram), note))
        _replace(layer, path, part)
    return done


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Wanda:
  """Wanda's mask (quantizers/sparse24.py), and what it keeps rounded to nearest."""

  def check(self, spec: QuantSpec) -> None:
    """ValueError if the method does not go with `spec`."""
    if not spec.sparse24:
      raise ValueError("wanda chooses what to prune: it needs sparse24=True")

  def quantize(self, layer: Any, inputs: LayerInputs, chosen: Collection[Path], spec: QuantSpec) -> list[Quantized]:
    """Puts QuantLinear layers in the place of the `chosen` dense layers of `layer`."""
    done = []
    for paths, kernels, gram in kernels_and_grams(layer, inputs, chosen):
      for path, kernel in zip(paths, kernels, strict=True):
        tensor = _quantize_wanda(kernel, jnp.diag(gram), spec)
        done.append(Quantized(path, _error(kernel, tensor, gram), None))
        _replace(layer, path, _pack(tensor, spec))
    return done


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Awq:
  """See quantizers/awq.py. Scales are searched on the float layer, whose inputs come from quantized ones."""

  def check(self, spec: QuantSpec) -> None:
    """NotImplementedError if the method does not go with `spec`."""
    if spec.sparse24:
      raise NotImplementedError("sparse24 is not implemented for awq, only for rtn, wanda and gptq")

  def quantize(self, layer: Any, inputs: LayerInputs, chosen: Collection[Path], spec: QuantSpec) -> list[Quantized]:
    """Scales the weights of `layer`, and puts QuantLinear layers in the place of the `chosen` dense ones."""
    groups = [readers for readers in _READERS if all(_has(layer, path) for path in readers.paths)]
    gathered = inputs.moments(layer, [readers.paths[0] for readers in groups])
    dtypes = {path: _widen(find(layer, path)) for readers in groups for path in readers.paths}
    grams: dict[Path, Array] = {}
    # Those that are fed by a dense layer first: their scales change the columns that are searched afterwards.
    for readers, moments in sorted(zip(groups, gathered, strict=True), key=lambda group: group[0].source not in dtypes):
      s = self._scales(layer, readers, moments, chosen, spec)
      _fold(layer, readers, s)
      grams |= dict.fromkeys(readers.paths, moments.gram / jnp.outer(s, s))
    done = []
    for path, dtype in dtypes.items():
      linear = find(layer, path)
      if path not in chosen:
        linear.kernel = nnx.Param(linear.kernel[...].astype(dtype))
        continue
      w, gram = linear.kernel[...], grams[path]
      tensor = _quantize_rtn(w, spec, scale_dtype=dtype, importance=jnp.diag(gram))
      done.append(Quantized(path, _error(w, tensor, gram), None))
      _replace(layer, path, pack(tensor))
    return done

  def _scales(self, layer, readers: Readers, moments: Moments, chosen, spec) -> Float32[Array, " K"]:
    magnitude = moments.magnitude / moments.tokens
    weights = [find(layer, path).kernel[...] for path in readers.paths if path in chosen]
    if not weights:
      return jnp.ones_like(magnitude)
    if readers.source == _V:
      # Query heads that share a value head share its factors.
      heads = magnitude.reshape(layer.attention.config.num_kv_heads, -1, layer.attention.config.head_dim)
      magnitude = jnp.broadcast_to(jnp.mean(heads, axis=1, keepdims=True), heads.shape).reshape(-1)
    return search_awq_scales(weights, moments.gram, magnitude, spec)


Method = Gptq | Awq | Wanda

_quantize_rtn = jax.jit(quantize_rtn, static_argnames=("spec", "scale_dtype", "search"))


@partial(jax.jit, static_argnames="spec")
def _quantize_wanda(w: Array, energy: Float32[Array, " K"], spec: QuantSpec) -> QuantizedTensor:
  return quantize_sparse24(w, spec, wanda_mask(w, jnp.sqrt(energy)), importance=energy)


@jax.jit
def _relative_error(w: Array, tensor: QuantizedTensor, gram: Array) -> Array:
  total = output_error(w, jnp.zeros_like(w), gram)
  return jnp.where(total > 0, output_error(w, tensor.dequantize(), gram) / total, 0)  # a layer of zeros is exact


def _error(w: Array, tensor: QuantizedTensor, gram: Array) -> float:
  return float(_relative_error(w, tensor, gram))


def _has(layer: Any, path: Path) -> bool:
  return all(hasattr(find(layer, path[:i]), path[i]) for i in range(len(path)))


def kernels_and_grams(
  layer: Any, inputs: LayerInputs, chosen: Collection[Path]
) -> Iterator[tuple[list[Path], list[Array], Array]]:
  """Paths, kernels and gram of the `chosen` dense layers that read the same x, in the order in which `layer` does.

  A gram is of what the kernels read when they come up: replace those that came before, and it is of their outputs.
  """
  for readers in _READERS:
    paths = [path for path in readers.paths if path in chosen]
    if paths:
      (moments,) = inputs.moments(layer, paths[:1])
      yield paths, [find(layer, path).kernel[...] for path in paths], moments.gram


def _pack(tensor: QuantizedTensor, spec: QuantSpec) -> Packed:
  return pack24(tensor) if spec.sparse24 else pack(tensor)


def _replace(layer: Any, path: Path, packed: Packed) -> None:
  linear = find(layer, path)
  setattr(find(layer, path[:-1]), path[-1], QuantLinear.from_packed(packed, linear.bias, dtype=linear.dtype))


def _widen(linear: nnx.Linear) -> Any:
  """Makes the kernel float32, so that folding rounds nothing that is quantized later; returns the dtype it had."""
  dtype = linear.kernel[...].dtype
  linear.kernel = nnx.Param(linear.kernel[...].astype(jnp.float32))
  return dtype


def _fold(layer: Any, readers: Readers, s: Float32[Array, " K"]) -> None:
  """x / s from the source, s w in the readers: the same function."""
  for path in readers.paths:
    linear = find(layer, path)
    linear.kernel[...] = s[:, None] * linear.kernel[...]
  source = find(layer, readers.source)
  if readers.source == _V:
    heads = layer.attention.config.num_kv_heads, -1, layer.attention.config.head_dim
    s = s.reshape(heads)[:, 0].reshape(-1)
  if isinstance(source, nnx.RMSNorm):
    source.scale[...] = (source.scale[...] / s).astype(source.scale[...].dtype)
    return
  source.kernel[...] = source.kernel[...] / s
  if source.bias is not None:
    source.bias[...] = (source.bias[...] / s).astype(source.bias[...].dtype)
