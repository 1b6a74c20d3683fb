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
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from marlin_jax.checkpoint import compressed_tensors, marlin24
from marlin_jax.checkpoint.awq import AwqLayers
from marlin_jax.checkpoint.compressed_tensors import CompressedTensorsLayers
from marlin_jax.checkpoint.folder import SIDE_FILES, CheckpointError, new_folder, read_json, write_json
from marlin_jax.checkpoint.gptq import GptqLayers
from marlin_jax.checkpoint.hqq import HqqLayers
from marlin_jax.checkpoint.huggingface import (
  abstract_decoder,
  check_names_and_shapes,
  dense_layers,
  read_config,
  tensor_names,
)
from marlin_jax.checkpoint.layers import (
  QuantizedLayers,
  layers_with,
  on_device,
  read_float,
  read_integers,
  read_scales,
)
from marlin_jax.checkpoint.marlin import MarlinLayers
from marlin_jax.checkpoint.safetensors_files import Checkpoint, ShardWriter, open_checkpoint
from marlin_jax.checkpoint.sparse24_bitmask import decompressed
from marlin_jax.convert import Path, keep_head_and_routers
from marlin_jax.models.decoder import Decoder
from marlin_jax.models.fuse import unfuse
from marlin_jax.models.huggingface_config import config_to_hf
from marlin_jax.nnx import QuantLinear, QuantParam, quantize_and_pack
from marlin_jax.packing import unpack, unstack
from marlin_jax.quantized import Packed, PackedTensor, QuantSpec, SparsePackedTensor, arrays_of
from marlin_jax.quantizers import Quantizer
from marlin_jax.quantizers.rtn import quantize_rtn
from pallas_kernels import layout, layout24

FORMAT_VERSION = 1

Format = Literal["native", "compressed-tensors"]


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


def quantized_layers(hf: Mapping[str, Any], checkpoint: Checkpoint) -> QuantizedLayers:
  """Hugging Face name -> QuantSpec of the layers that are quantized in a checkpoint with this config.json; often none.

  Raises:
    CheckpointError: the quantization_config holds nonsense.
    NotImplementedError: it is of another method, or asks for what is not covered.
  """
  quantization = hf.get("quantization_config")
  if quantization is None:
    for file, method in _OLD_CONFIGS.items():
      if (checkpoint.folder / file).exists():
        quantization = {"quant_method": method} | read_json(checkpoint.folder / file)
        break
  if quantization is None:
    if any(name.endswith(".W_q") for name in checkpoint):  # HQQ's own files say it nowhere else
      return HqqLayers(checkpoint)
    return QuantizedLayers(checkpoint, {})
  if not isinstance(quantization, dict):
    raise CheckpointError(f"{checkpoint.folder}: quantization_config is {quantization!r}, must be an object")
  stored_as = quantization.get("checkpoint_format") or quantization.get("format")
  match quantization.get("quant_method"):
    case "marlin_jax":
      return NativeLayers(quantization, checkpoint)
    case "gptq" if quantization.get("is_marlin_format") or stored_as == "marlin":
      return MarlinLayers(quantization, checkpoint)
    case "gptq":
      return GptqLayers(quantization, checkpoint)
    case "awq":
      return AwqLayers(quantization, checkpoint)
    case "compressed-tensors" if stored_as == marlin24.FORMAT:
      return marlin24.Marlin24Layers(quantization, checkpoint)
    case "compressed-tensors":
      return CompressedTensorsLayers(quantization, checkpoint)
    case "hqq":
      return HqqLayers(checkpoint)
    case other:
      raise NotImplementedError(
        f"{checkpoint.folder}: quant_method {other!r} is not supported, only 'marlin_jax', 'gptq', 'awq', "
        "'compressed-tensors' and 'hqq' are"
      )


# What tools wrote before, or beside, a quantization_config in config.json.
_OLD_CONFIGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


def save_model(
  model: Decoder, path: str | os.PathLike[str], *, format: Format = "native", max_shard_bytes: int = 2 << 30
) -> None:
  """Write a model, float or with QuantLinear layers, so that `load_model` reads back the same tensors bit for bit.

  Args:
    model: what to write; its tokenizer goes with it.
    path: a folder that does not exist yet, or is empty. It appears when it is complete.
    format: of the quantized layers: "native", or "compressed-tensors", which other tools read.
    max_shard_bytes: larger models are cut into several files with an index.

  Raises:
    CheckpointError: the folder is not empty, or cannot be written (a full disk); nothing is left behind.
    ValueError: no Hugging Face architecture expresses the model's config, or the format does not hold the layers
      (compressed-tensors has whole zero points only).
  """
  if format not in _ENCODERS:
    raise ValueError(f"{format=} must be one of {', '.join(_ENCODERS)}")
  model = unfuse(nnx.merge(*nnx.split(model)))  # of a copy: the caller's stays fused
  config = config_to_hf(model.config) | {"dtype": model.dtype.name}
  packed = [(p, layer.packed) for p, layer in nnx.iter_modules(model) if isinstance(layer, QuantLinear)]
  quantized = {name: w for path, w in packed for name in tensor_names(path, w.scales)}
  if quantized:
    config["quantization_config"] = _quantization_config(quantized, format, ignore=list(dense_layers(model)))
  with new_folder(path) as folder:
    writer = ShardWriter(folder, max_shard_bytes)
    for layer_path, stack in packed:
      for name, w in zip(tensor_names(layer_path, stack.scales), unstack(stack), strict=True):
        for leaf, array in _ENCODERS[format](w).items():
          writer.add(f"{name}.{leaf}", array)
    for parameter_path, variable in nnx.to_flat_state(nnx.state(model)):
      if not isinstance(variable, QuantParam):
        array, names = np.asarray(variable[...]), tensor_names(parameter_path, variable)
        for name, one in zip(names, array if len(names) > 1 else [array], strict=True):
          writer.add(name, one.T if parameter_path[-1] == "kernel" else one)
    writer.close()
    write_json(folder / "config.json", config)
    if model.tokenizer is not None:
      model.tokenizer.save(folder)


def quantize_tensors(
  source: str | os.PathLike[str],
  destination: str | os.PathLike[str],
  spec: QuantSpec = QuantSpec(),
  *,
  quantizer: Quantizer = quantize_rtn,
  predicate: Callable[[Path, nnx.Linear], bool] = keep_head_and_routers,
  format: Format = "native",
  device=None,
  max_shard_bytes: int = 2 << 30,
  progress: bool = True,
) -> None:
  """Quantize a float checkpoint into a new folder, one weight at a time: the model may be larger than any memory.

  In our native format the result is what `load_model`, `quantize` and `save_model` would write, with the other tensors
  in their own dtype. In that of compressed-tensors, which other tools read, it holds the same weights.

  Args:
    source: a float checkpoint folder, or a Hub model in the local cache.
    destination: a folder that does not exist yet, or is empty. It appears when it is complete.
    spec: bits, group size, symmetry and sparsity.
    quantizer: round to nearest with searched scales, or another that takes (w, spec).
    predicate: (path, layer) -> whether to quantize a dense layer; the layers have shapes but no values.
    format: of the result.
    device: where the arithmetic is done; None is JAX's default device.
    max_shard_bytes: the size from which a new file is begun; about as much host memory is needed.
    progress: show a progress bar on stderr.

  Raises:
    CheckpointError: the source is not a whole and sound float checkpoint, or the destination cannot be written.
    NotImplementedError: the source's config asks for something that is not covered.
    ValueError: the group size does not divide the K of a layer, which the message names, or the format is none.
  """
  checkpoint = open_checkpoint(source)
  hf, config = read_config(checkpoint.folder)
  hf, checkpoint = decompressed(hf, checkpoint)
  if hf.get("quantization_config") is not None:
    raise CheckpointError(f"{checkpoint.folder} is quantized already, must be a float checkpoint")
  # The dtype of this model is never used: it stands for names and shapes.
  quantized = QuantizedLayers(checkpoint, {})
  model = abstract_decoder(config, jnp.float32)
  check_names_and_shapes(model, checkpoint, quantized)
  chosen = {name: layer for name, (path, layer) in dense_layers(model).items() if predicate(path, layer)}
  for name, layer in chosen.items():
    try:
      spec.groups(layer.in_features)
    except ValueError as error:
      raise ValueError(f"layer {name}: {error}") from None
  if format not in _ENCODERS:
    raise ValueError(f"{format=} must be one of {', '.join(_ENCODERS)}")
  settings = _settings(spec)
  if format == "compressed-tensors":
    ignore = [name for name in dense_layers(model) if name not in chosen]
    settings = compressed_tensors.quantization_config(dict.fromkeys(chosen, (spec, False)), ignore)
  names = [name for path, variable in nnx.to_flat_state(nnx.state(model)) for name in tensor_names(path, variable)]
  with new_folder(destination) as folder:
    writer = ShardWriter(folder, max_shard_bytes)
    for name in tqdm(names, desc="quantize", unit="tensor", disable=not progress):
      array = read_float(checkpoint, name, None, device)
      layer_name, _, leaf = name.rpartition(".")
      if leaf == "weight" and layer_name in chosen:
        for part, value in _ENCODERS[format](quantize_and_pack(array.T, spec, quantizer)).items():
          writer.add(f"{layer_name}.{part}", value)
      else:
        writer.add(name, np.asarray(array))
    writer.close()
    write_json(folder / "config.json", hf | {"quantization_config": settings})
    for file in SIDE_FILES:
      if (checkpoint.folder / file).is_file():
        shutil.copyfile(checkpoint.folder / file, folder / file)


def _encode(w: Packed) -> dict[str, np.ndarray]:
  return {name: np.asarray(array) for name, array in arrays_of(w).items()}


_ENCODERS: dict[str, Callable[[Packed], dict[str, np.ndarray]]] = {
  "native": _encode,
  "compressed-tensors": lambda w: compressed_tensors.encode(unpack(w)),
}


def _kind(w: Packed) -> tuple[QuantSpec, bool]:
  """The spec of a weight, and whether it has act-order."""
  group_size = w.group_size if w.groups > 1 else None
  spec = QuantSpec(bits=w.bits, group_size=group_size, symmetric=w.zeros is None, sparse24=w.meta is not None)
  return spec, w.permutation is not None


def _settings(spec: QuantSpec) -> dict[str, Any]:
  return (
    {"quant_method": "marlin_jax", "format_version": FORMAT_VERSION} | dataclasses.asdict(spec) | {"act_order": False}
  )


def _quantization_config(packed: Mapping[str, Packed], format: str, ignore: list[str]) -> dict[str, Any]:
  """In our format the settings that most layers share, and the layers that differ from them."""
  if format == "compressed-tensors":
    return compressed_tensors.quantization_config({name: _kind(w) for name, w in packed.items()}, ignore)
  settings = {
    name: dataclasses.asdict(spec) | {"act_order": act_order}
    for name, (spec, act_order) in ((name, _kind(w)) for name, w in packed.items())
  }
  common = {}
  for key in ("bits", "group_size", "symmetric", "sparse24", "act_order"):
    # A layer of one group fits any group size equal to its K too, so it has no vote unless all layers are like it.
    votes = Counter(setting[key] for setting in settings.values() if setting[key] is not None)
    common[key] = max(votes, key=votes.__getitem__, default=None)
  exceptions = {}
  for name, setting in settings.items():
    if setting["group_size"] is None and common["group_size"] == packed[name].k:
      setting["group_size"] = packed[name].k
    if differing := {key: value for key, value in setting.items() if value != common[key]}:
      exceptions[name] = differing
  act_order = common.pop("act_order")
  return _settings(QuantSpec(**common)) | {"act_order": act_order} | ({"layers": exceptions} if exceptions else {})
