# SPDX-License-Identifier: Apache-2.0
"""Our own quantized format: a Hugging Face checkpoint whose dense weights are stored as packed words and scales.

    float model                          quantized by this package
    <layer>.weight   [N, K]              <layer>.qweight  int16 [N/64, K/64, 32, 32], kernel order (docs/layout.md)
                                         <layer>.scales   float [G, N]
    all other tensors                    the same names and values
    config.json                          the same keys and "quantization_config"

The layers that have a qweight are the quantized ones; quantization_config says how:
{"quant_method": "marlin_jax", "format_version": 1, "bits": 4, "group_size": 128}, and, where single layers differ,
"layers": {"<layer>": {"group_size": 64}}. A group_size of null is one scale a column.
"""

import dataclasses
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from marlin_jax.checkpoint.compressed_tensors import CompressedTensorsLayers
from marlin_jax.checkpoint.folder import SIDE_FILES, CheckpointError, new_folder, write_json
from marlin_jax.checkpoint.gptq import GptqLayers
from marlin_jax.checkpoint.huggingface import (
  abstract_decoder,
  check_names_and_shapes,
  dense_layers,
  read_config,
  tensor_name,
)
from marlin_jax.checkpoint.layers import QuantizedLayers, layers_with, not_covered, read_float, read_integers
from marlin_jax.checkpoint.marlin import MarlinLayers
from marlin_jax.checkpoint.safetensors_files import Checkpoint, ShardWriter, open_checkpoint
from marlin_jax.convert import Path, keep_head
from marlin_jax.models.decoder import Decoder
from marlin_jax.nnx import QuantLinear, quantize_and_pack
from marlin_jax.quantized import PackedTensor, QuantSpec
from pallas_kernels import layout

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
    settings = {key: value for key, value in quantization.items() if key not in ("quant_method", "format_version")}
    exceptions = settings.pop("layers", {})
    try:
      common = QuantSpec(**settings)
      names = layers_with(checkpoint, "qweight")
      super().__init__(checkpoint, {name: dataclasses.replace(common, **exceptions.get(name, {})) for name in names})
    except (TypeError, ValueError, AttributeError) as error:
      raise CheckpointError(f"{checkpoint.folder}: quantization_config: {error}") from None

  def shapes(self, name: str, k: int, n: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.qweight": layout.qweight_shape(k, n), f"{name}.scales": (self[name].groups(k), n)}

  def read(self, name: str, k: int, n: int, device) -> PackedTensor:
    qweight = jax.device_put(read_integers(self.checkpoint, f"{name}.qweight", np.int16), device)
    return PackedTensor(qweight=qweight, scales=read_float(self.checkpoint, f"{name}.scales", None, device), k=k)


def quantized_layers(hf: Mapping[str, Any], checkpoint: Checkpoint) -> QuantizedLayers:
  """Hugging Face name -> QuantSpec of the layers that are quantized in a checkpoint with this config.json; often none.

  Raises:
    CheckpointError: the quantization_config holds nonsense.
    NotImplementedError: it is of another method, or asks for what is not covered.
  """
  quantization = hf.get("quantization_config")
  if quantization is None:
    if any(name.endswith(".W_q") for name in checkpoint):  # HQQ's own files say it nowhere else
      raise not_covered(checkpoint, "the tensors are in the HQQ format")
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
    case "compressed-tensors":
      return CompressedTensorsLayers(quantization, checkpoint)
    case other:
      raise NotImplementedError(
        f"{checkpoint.folder}: quant_method {other!r} is not supported, only 'marlin_jax', 'gptq' and "
        "'compressed-tensors' are"
      )


def save_model(model: Decoder, path: str | os.PathLike[str], *, max_shard_bytes: int = 2 << 30) -> None:
  """Write a model, float or with QuantLinear layers, so that `load_model` reads back the same tensors bit for bit.

  Args:
    model: what to write; its tokenizer goes with it.
    path: a folder that does not exist yet, or is empty. It appears when it is complete.
    max_shard_bytes: larger models are cut into several files with an index.

  Raises:
    CheckpointError: the folder is not empty, or cannot be written (a full disk); nothing is left behind.
    ValueError: no Hugging Face architecture expresses the model's config.
  """
  config = model.config.to_hf() | {"dtype": model.dtype.name}
  quantized = {tensor_name(p): layer for p, layer in nnx.iter_modules(model) if isinstance(layer, QuantLinear)}
  if quantized:
    config["quantization_config"] = _quantization_config(quantized)
  with new_folder(path) as folder:
    writer = ShardWriter(folder, max_shard_bytes)
    for parameter_path, variable in nnx.to_flat_state(nnx.state(model)):
      array = np.asarray(variable[...])
      writer.add(tensor_name(parameter_path), array.T if parameter_path[-1] == "kernel" else array)
    writer.close()
    write_json(folder / "config.json", config)
    if model.tokenizer is not None:
      model.tokenizer.save(folder)


def quantize_checkpoint(
  source: str | os.PathLike[str],
  destination: str | os.PathLike[str],
  spec: QuantSpec = QuantSpec(),
  *,
  predicate: Callable[[Path, nnx.Linear], bool] = keep_head,
  device=None,
  max_shard_bytes: int = 2 << 30,
  progress: bool = True,
) -> None:
  """Quantize a float checkpoint into a new folder, one weight at a time: the model may be larger than any memory.

  The result is what `load_model`, `quantize` and `save_model` would write, with the other tensors in their own dtype.

  Args:
    source: a float checkpoint folder, or a Hub model in the local cache.
    destination: a folder that does not exist yet, or is empty. It appears when it is complete.
    spec: bits and group size.
    predicate: (path, layer) -> whether to quantize a dense layer; the layers have shapes but no values.
    device: where the arithmetic is done; None is JAX's default device.
    max_shard_bytes: the size from which a new file is begun; about as much host memory is needed.
    progress: show a progress bar on stderr.

  Raises:
    CheckpointError: the source is not a whole and sound float checkpoint, or the destination cannot be written.
    NotImplementedError: the source's config asks for something that is not covered.
    ValueError: the group size does not divide the K of a layer; the message names it.
  """
  checkpoint = open_checkpoint(source)
  hf, config = read_config(checkpoint.folder)
  if hf.get("quantization_config") is not None:
    raise CheckpointError(f"{checkpoint.folder} is quantized already, must be a float checkpoint")
  # The dtype of this model is never used: it stands for names and shapes.
  quantized = QuantizedLayers(checkpoint, {})
  model = abstract_decoder(config, jnp.float32, quantized)
  check_names_and_shapes(model, checkpoint, quantized)
  chosen = {name: layer for name, (path, layer) in dense_layers(model).items() if predicate(path, layer)}
  for name, layer in chosen.items():
    try:
      spec.groups(layer.in_features)
    except ValueError as error:
      raise ValueError(f"layer {name}: {error}") from None
  names = [tensor_name(path) for path, _ in nnx.to_flat_state(nnx.state(model))]
  with new_folder(destination) as folder:
    writer = ShardWriter(folder, max_shard_bytes)
    for name in tqdm(names, desc="quantize", unit="tensor", disable=not progress):
      array = read_float(checkpoint, name, None, device)
      layer_name, _, leaf = name.rpartition(".")
      if leaf == "weight" and layer_name in chosen:
        packed = quantize_and_pack(array.T, spec)
        writer.add(f"{layer_name}.qweight", np.asarray(packed.qweight))
        writer.add(f"{layer_name}.scales", np.asarray(packed.scales))
      else:
        writer.add(name, np.asarray(array))
    writer.close()
    write_json(folder / "config.json", hf | {"quantization_config": _settings(spec)})
    for file in SIDE_FILES:
      if (checkpoint.folder / file).is_file():
        shutil.copyfile(checkpoint.folder / file, folder / file)


def _settings(spec: QuantSpec) -> dict[str, Any]:
  return {
    "quant_method": "marlin_jax",
    "format_version": FORMAT_VERSION,
    "bits": spec.bits,
    "group_size": spec.group_size,
  }


def _quantization_config(layers: Mapping[str, QuantLinear]) -> dict[str, Any]:
  """The settings that most layers share, and the layers that differ from them."""
  groups = {name: layer.scales.shape[0] for name, layer in layers.items()}
  sizes = {name: layer.in_features // groups[name] if groups[name] > 1 else None for name, layer in layers.items()}
  # A layer of one group fits any group size equal to its K too, so it has no vote unless all layers are like it.
  votes = Counter(size for size in sizes.values() if size is not None)
  spec = QuantSpec(group_size=max(votes, key=votes.__getitem__, default=None))
  exceptions = {}
  for name, layer in layers.items():
    expected = 1 if spec.group_size is None else layer.in_features / spec.group_size
    if groups[name] != expected:
      exceptions[name] = {"group_size": sizes[name]}
  return _settings(spec) | ({"layers": exceptions} if exceptions else {})
