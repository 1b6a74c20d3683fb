# SPDX-License-Identifier: Apache-2.0
"""save_model, quantize_tensors: a model, or a float checkpoint, out into a folder, quantized in one of two formats."""

import os
import shutil
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from marlin_jax.checkpoint import compressed_tensors, native
from marlin_jax.checkpoint.folder import SIDE_FILES, CheckpointError, new_folder, write_json
from marlin_jax.checkpoint.huggingface import (
  abstract_decoder,
  check_names_and_shapes,
  dense_layers,
  read_config,
  tensor_names,
)
from marlin_jax.checkpoint.layers import QuantizedLayers, read_float
from marlin_jax.checkpoint.safetensors_files import ShardWriter, open_checkpoint
from marlin_jax.checkpoint.sparse24_bitmask import decompressed
from marlin_jax.convert import Path, keep_head_and_routers
from marlin_jax.models.decoder import Decoder
from marlin_jax.models.fuse import unfuse
from marlin_jax.models.huggingface_config import config_to_hf
from marlin_jax.nnx import QuantLinear, QuantParam, quantize_and_pack
from marlin_jax.packing import unpack, unstack
from marlin_jax.quantized import Packed, QuantSpec
from marlin_jax.quantizers import Quantizer
from marlin_jax.quantizers.rtn import quantize_rtn

Format = Literal["native", "compressed-tensors"]

_ENCODERS: dict[str, Callable[[Packed], dict[str, np.ndarray]]] = {
  "native": native.encode,
  "compressed-tensors": lambda w: compressed_tensors.encode(unpack(w)),
}


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
  settings = native.settings_of(spec)
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


def _kind(w: Packed) -> tuple[QuantSpec, bool]:
  """The spec of a weight, and whether it has act-order."""
  group_size = w.group_size if w.groups > 1 else None
  spec = QuantSpec(bits=w.bits, group_size=group_size, symmetric=w.zeros is None, sparse24=w.meta is not None)
  return spec, w.permutation is not None


def _quantization_config(packed: Mapping[str, Packed], format: str, ignore: list[str]) -> dict[str, Any]:
  kinds = {name: _kind(w) for name, w in packed.items()}
  if format == "compressed-tensors":
    return compressed_tensors.quantization_config(kinds, ignore)
  return native.quantization_config(kinds, {name: w.k for name, w in packed.items()})
