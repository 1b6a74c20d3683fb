# SPDX-License-Identifier: Apache-2.0
"""From a float model to a quantized one: replaces the dense layers of a Flax model and says what it did."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from tqdm import tqdm

from marlin_jax.nnx import QuantLinear, quantize_and_pack
from marlin_jax.quantized import QuantSpec, arrays_of
from marlin_jax.quantizers import Quantizer
from marlin_jax.quantizers.rtn import quantize_rtn

Path = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LayerReport:
  """What became of one layer.

  Attributes:
    path: from the root of the model.
    skipped: why the layer was left as it was; None if it was quantized.
    bytes_before, bytes_after: of the weight, without bias.
    output_error: |x w - x v|^2 / |x w|^2 over the calibration tokens, v being the quantized weight; None without them.
    note: what was out of the ordinary, or None.
  """

  path: Path
  skipped: str | None
  bytes_before: int
  bytes_after: int
  output_error: float | None = None
  note: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
  """What `convert` did, a row a dense layer, in the order of the model."""

  layers: tuple[LayerReport, ...]

  @property
  def quantized(self) -> tuple[LayerReport, ...]:
    return tuple(layer for layer in self.layers if layer.skipped is None)

  @property
  def skipped(self) -> tuple[LayerReport, ...]:
    return tuple(layer for layer in self.layers if layer.skipped is not None)

  def __str__(self) -> str:
    before, after = (sum(getattr(layer, name) for layer in self.quantized) for name in ("bytes_before", "bytes_after"))
    lines = [f"quantized {len(self.quantized)} layers, {before / 1e6:.1f} MB -> {after / 1e6:.1f} MB"]
    lines += [f"skipped {'.'.join(map(str, layer.path))}: {layer.skipped}" for layer in self.skipped]
    lines += [f"{'.'.join(map(str, layer.path))}: {layer.note}" for layer in self.layers if layer.note]
    return "\n".join(lines)


def keep_head_and_routers(path: Path, layer: Any) -> bool:
  """The default predicate: every dense layer but the output head, whose error goes straight into the logits, and the
  routers of experts, which are small and whose error sends a token to another expert."""
  del layer
  return path[-1] not in ("lm_head", "router")


def keep_routers(path: Path, layer: Any) -> bool:
  """The predicate that quantizes the output head, too: it is the largest matrix, and read at every step."""
  del layer
  return path[-1] != "router"


def convert(
  model: nnx.Module,
  spec: QuantSpec = QuantSpec(),
  *,
  quantizer: Quantizer = quantize_rtn,
  predicate: Callable[[Path, nnx.Linear], bool] = keep_head_and_routers,
  device=None,
  progress: bool = False,
) -> Report:
  """Replaces the `nnx.Linear` layers of `model`, in place, by `QuantLinear` layers with the same output up to rounding.

  One layer at a time: a kernel is moved to `device`, quantized, packed, and its float form let go. A model loaded into
  host memory may so be larger than the accelerator's. A layer that is shared stays shared, and a stack of layers, which
  `nnx.vmap` makes and a mixture of experts has, stays a stack.

  Args:
    model: any tree of NNX modules, lists and dicts among them.
    spec: bits, group size, symmetry and sparsity.
    quantizer: round to nearest with searched scales, or another that takes (w, spec).
    predicate: (path, layer) -> whether to quantize it.
    device: where the packed weights go; None leaves them where the kernels lie.
    progress: show a progress bar on stderr.

  Raises:
    ValueError: names the layer whose K the group size does not divide, or whose kernel holds NaN or Inf. Layers before
      it are already replaced.
  """
  holders = [
    (path, parent, name, child)
    for path, parent in nnx.iter_modules(model)
    for name, child in nnx.iter_children(parent)
    if isinstance(child, nnx.Linear)
  ]
  holders.sort(key=lambda holder: [(isinstance(part, str), part) for part in holder[0]])
  layers, replaced = [], {}
  for path, parent, name, linear in tqdm(holders, desc="quantize", unit="layer", disable=not progress):
    path = (*path, name)
    nbytes = linear.kernel[...].nbytes
    if reason := reason_to_skip(path, linear, predicate):
      layers.append(LayerReport(path=path, skipped=reason, bytes_before=nbytes, bytes_after=nbytes))
      continue
    if id(linear) not in replaced:
      try:
        replaced[id(linear)] = QuantLinear.from_linear(linear, spec, quantizer=quantizer, device=device)
      except ValueError as error:
        raise ValueError(f"layer {'.'.join(map(str, path))}: {error}") from error
      nbytes_after = replaced[id(linear)].packed.nbytes
      layers.append(LayerReport(path=path, skipped=None, bytes_before=nbytes, bytes_after=nbytes_after))
    if isinstance(name, int):
      parent[name] = replaced[id(linear)]
    else:
      setattr(parent, name, replaced[id(linear)])
  return Report(tuple(layers))


def reason_to_skip(path: Path, linear: nnx.Linear, predicate: Callable[[Path, nnx.Linear], bool]) -> str | None:
  """Why `convert` leaves a dense layer as it is; None if it does not."""
  if type(linear) is not nnx.Linear:
    return f"{type(linear).__name__} is not nnx.Linear itself and may compute something else"
  if linear.dot_general is not jax.lax.dot_general:
    return "it has a dot_general of its own"
  if not predicate(path, linear):
    return "the predicate says so"
  return None


def quantize_variables(
  variables: Mapping[str, Any],
  spec: QuantSpec = QuantSpec(),
  *,
  predicate: Callable[[Path, jax.Array], bool] = keep_head_and_routers,
) -> tuple[dict[str, Any], Report]:
  """Linen: the variables of a model whose `nn.Dense` layers have become `QuantDense` layers of the same names.

  Every two-dimensional `kernel` in "params" moves, quantized, to the collection "quant"; all else stays.

  Args:
    variables: what `model.init` or training gave, with a collection "params".
    spec: bits, group size, symmetry and sparsity; the same as in the QuantDense layers.
    predicate: (path, kernel) -> whether to quantize it.

  Raises:
    ValueError: names the layer whose K the group size does not divide, or whose kernel holds NaN or Inf.
  """
  params = traverse_util.flatten_dict(variables["params"])
  quant, layers = {}, []
  for path in [path for path in params if path[-1] == "kernel"]:
    kernel, layer = params[path], path[:-1]
    if kernel.ndim != 2:
      reason = f"its kernel has {kernel.ndim} axes"
    else:
      reason = None if predicate(layer, kernel) else "the predicate says so"
    if reason:
      layers.append(LayerReport(path=layer, skipped=reason, bytes_before=kernel.nbytes, bytes_after=kernel.nbytes))
      continue
    try:
      if not jnp.isfinite(kernel).all():
        raise ValueError("the kernel holds NaN or Inf, which no codes can represent")
      packed = quantize_and_pack(kernel, spec)
    except ValueError as error:
      raise ValueError(f"layer {'.'.join(layer)}: {error}") from error
    del params[path]
    quant |= {(*layer, name): array for name, array in arrays_of(packed).items()}
    layers.append(LayerReport(path=layer, skipped=None, bytes_before=kernel.nbytes, bytes_after=packed.nbytes))
  converted = dict(variables, params=traverse_util.unflatten_dict(params), quant=traverse_util.unflatten_dict(quant))
  return converted, Report(tuple(layers))
