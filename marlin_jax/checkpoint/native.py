# SPDX-License-Identifier: Apache-2.0
"""Our own quantized format: a Hugging Face checkpoint whose dense weights are stored as the fields of packed tensors.

    float model                      quantized by this package
    <layer>.weight   [N, K]          <layer>.qweight      int16 [N/64, K/64, 8 bits, 32], kernel order (docs/layout.md);
                                                          2:4 sparse, the kept codes [N/64, K/128, 32, 32]
                                     <layer>.meta         int16 [N/64, K/128, 32, 16], if it is 2:4 sparse
                                     <layer>.scales       float [G, N]
                                     <layer>.zeros        float [G, N], if it is not symmetric
                                     <layer>.permutation  int32 [K], if it has act-order
    all other tensors                the same names and values
    config.json                      the same keys and "quantization_config"

The layers that have a qweight are the quantized ones; quantization_config says how: {"quant_method": "marlin_jax",
"format_version": 1, "bits": 4, "group_size": 128, "symmetric": true, "sparse24": false, "act_order": false}, and, where
single layers differ, "layers": {"<layer>": {"group_size": 64}}. A group_size of null is one scale a column. Of experts
each is a layer of its own, such as model.layers.0.mlp.experts.3.up_proj.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from marlin_jax.checkpoint.folder import CheckpointError
from marlin_jax.checkpoint.layers import (
  QuantizedLayers,
  layers_with,
  on_device,
  read_float,
  read_integers,
  read_scales,
)
from marlin_jax.checkpoint.safetensors_files import Checkpoint
from marlin_jax.quantized import Packed, PackedTensor, QuantSpec, SparsePackedTensor, arrays_of
from pallas_kernels import layout, layout24

FORMAT_VERSION = 1


class NativeLayers(QuantizedLayers):
  """The quantized layers of a checkpoint in this format.

  Raises:
    CheckpointError: the quantization_config holds nonsense.
    NotImplementedError: it is of a later version of the format.
  """

  def __init__(self, quantization: dict[str, Any], checkpoint: Checkpoint):
    if quantization.get("format_version") != FORMAT_VERSION:
      raise NotImplementedError(
        f"{checkpoint.folder}: format_version {quantization.get('format_version')!r} is not supported, "
        f"only {FORMAT_VERSION} is"
      )
    common = {key: value for key, value in quantization.items() if key not in ("quant_method", "format_version")}
    exceptions = common.pop("layers", {})
    try:
      act_order = common.pop("act_order", False)
      spec = QuantSpec(**common)
      settings = {name: dict(exceptions.get(name, {})) for name in layers_with(checkpoint, "qweight")}
      self._act_order = {name for name, setting in settings.items() if setting.pop("act_order", act_order)}
      super().__init__(checkpoint, {name: dataclasses.replace(spec, **s) for name, s in settings.items()})
    except (TypeError, ValueError, AttributeError) as error:
      raise CheckpointError(f"{checkpoint.folder}: quantization_config: {error}") from None
    for name in self._act_order:
      if self[name].sparse24:
        raise NotImplementedError(
          f"{checkpoint.folder}: layer {name} is 2:4 sparse and has act-order, which is not supported"
        )

  def shapes(self, name: str, k: int, n: int) -> dict[str, tuple[int, ...]]:
    spec = self[name]
    groups = spec.groups(k)
    if spec.sparse24:
      shapes = {"qweight": layout24.qweight_shape(k, n), "meta": layout24.meta_shape(k, n), "scales": (groups, n)}
    else:
      shapes = {"qweight": layout.qweight_shape(k, n, spec.bits), "scales": (groups, n)}
    if not spec.symmetric:
      shapes["zeros"] = (groups, n)
    if name in self._act_order:
      shapes["permutation"] = (k,)
    return {f"{name}.{leaf}": shape for leaf, shape in shapes.items()}

  def read(self, name: str, k: int, n: int, device) -> Packed:
    if self[name].sparse24:
      return self._read_sparse(name, k, device)
    permutation = None
    if name in self._act_order:
      permutation = read_integers(self.checkpoint, f"{name}.permutation", np.int32)
      if not np.array_equal(np.sort(permutation), np.arange(k)):
        raise CheckpointError(
          f"{self.checkpoint.folder}: tensor {name}.permutation must hold every number from 0 to {k - 1} once"
        )
      permutation = on_device(permutation, device)
    return PackedTensor(
      qweight=on_device(read_integers(self.checkpoint, f"{name}.qweight", np.int16), device),
      scales=read_scales(self.checkpoint, f"{name}.scales", device),
      zeros=None if self[name].symmetric else read_float(self.checkpoint, f"{name}.zeros", None, device),
      permutation=permutation,
      k=k,
    )

  def _read_sparse(self, name: str, k: int, device) -> SparsePackedTensor:
    meta = on_device(read_integers(self.checkpoint, f"{name}.meta", np.int16), device)
    if not layout24.meta_is_sound(meta):
      raise CheckpointError(
        f"{self.checkpoint.folder}: tensor {name}.meta must hold two ascending positions for every four weights"
      )
    return SparsePackedTensor(
      qweight=on_device(read_integers(self.checkpoint, f"{name}.qweight", np.int16), device),
      meta=meta,
      scales=read_scales(self.checkpoint, f"{name}.scales", device),
      k=k,
    )


def encode(w: Packed) -> dict[str, np.ndarray]:
  """The tensors of a layer, by the last part of their names."""
  return {name: np.asarray(array) for name, array in arrays_of(w).items()}


def settings_of(spec: QuantSpec) -> dict[str, Any]:
  """The quantization_config of a model whose layers all are of `spec`, without act-order."""
  return (
    {"quant_method": "marlin_jax", "format_version": FORMAT_VERSION} | dataclasses.asdict(spec) | {"act_order": False}
  )


def quantization_config(kinds: Mapping[str, tuple[QuantSpec, bool]], sizes: Mapping[str, int]) -> dict[str, Any]:
  """The settings that most layers share, and the layers that differ from them.

  Args:
    kinds: layer -> its spec, and whether it has act-order.
    sizes: layer -> its K.
  """
  settings = {name: dataclasses.asdict(spec) | {"act_order": act_order} for name, (spec, act_order) in kinds.items()}
  common = {}
  for key in ("bits", "group_size", "symmetric", "sparse24", "act_order"):
    # A layer of one group fits any group size equal to its K too, so it has no vote unless all layers are like it.
    votes = Counter(setting[key] for setting in settings.values() if setting[key] is not None)
    common[key] = max(votes, key=votes.__getitem__, default=None)
  exceptions = {}
  for name, setting in settings.items():
    if setting["group_size"] is None and common["group_size"] == sizes[name]:
      setting["group_size"] = sizes[name]
    if differing := {key: value for key, value in setting.items() if value != common[key]}:
      exceptions[name] = differing
  act_order = common.pop("act_order")
  return settings_of(QuantSpec(**common)) | {"act_order": act_order} | ({"layers": exceptions} if exceptions else {})
