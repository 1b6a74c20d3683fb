# SPDX-License-Identifier: Apache-2.0
"""The tensors of a Hugging Face checkpoint of the Llama family as the parameters of a Decoder."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from marlin_jax.checkpoint.folder import CheckpointError, read_json
from marlin_jax.checkpoint.layers import QuantizedLayers, read_float
from marlin_jax.checkpoint.safetensors_files import Checkpoint
from marlin_jax.models.config import ModelConfig
from marlin_jax.models.decoder import Decoder
from marlin_jax.models.huggingface_config import config_from_hf, read_eos
from marlin_jax.nnx import QuantLinear, QuantParam
from marlin_jax.packing import stack

# Our path segment -> theirs; a segment that is not listed has the same name in both.
_SEGMENTS = {
  "embed": "model.embed_tokens",
  "layers": "model.layers",
  "norm": "model.norm",
  "attention": "self_attn",
  "input_norm": "input_layernorm",
  "post_attention_norm": "post_attention_layernorm",
  "router": "gate",
  "embedding": "weight",
  "kernel": "weight",
  "scale": "weight",
}
_EXPERTS = "experts"  # the modules below it are stacks


def read_config(folder: Path) -> tuple[dict[str, Any], ModelConfig]:
  """The parsed config.json of a checkpoint folder and the ModelConfig it describes.

  Raises:
    CheckpointError: config.json is missing, or holds nonsense.
    NotImplementedError: it asks for something that is not covered.
  """
  file, generation_file = folder / "config.json", folder / "generation_config.json"
  hf = read_json(file)
  # Chat models end a turn with tokens that only generation_config.json lists.
  generation = read_json(generation_file) if generation_file.exists() else {}
  try:
    config = config_from_hf(hf)
    return hf, dataclasses.replace(config, eos_token_ids=read_eos(generation) or config.eos_token_ids)
  except ValueError as error:
    raise CheckpointError(f"{file}: {error}") from None


def tensor_name(path: tuple[Any, ...]) -> str:
  """The Hugging Face name of a module or parameter: ("layers", 0, "mlp", "up_proj") is model.layers.0.mlp.up_proj."""
  return ".".join(_SEGMENTS.get(str(segment), str(segment)) for segment in path)


def tensor_names(path: tuple[Any, ...], array: Any) -> list[str]:
  """The names under which a parameter or module is stored, whose `array` is this: of experts, one for each.

  ("layers", 0, "mlp", "experts", "up_proj") are model.layers.0.mlp.experts.0.up_proj, ...experts.1.up_proj and so on.
  """
  if _EXPERTS not in path:
    return [tensor_name(path)]
  index = path.index(_EXPERTS) + 1
  return [tensor_name((*path[:index], expert, *path[index:])) for expert in range(array.shape[0])]


def abstract_decoder(config: ModelConfig, dtype: DTypeLike) -> Decoder:
  """A float Decoder of shapes without values."""
  return nnx.eval_shape(lambda: Decoder(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0)))


def dense_layers(model: Decoder) -> dict[str, tuple[tuple[Any, ...], nnx.Linear]]:
  """Hugging Face name -> (path, layer) of every `nnx.Linear` in the model; experts, each with a name, share theirs."""
  return {
    name: (path, module)
    for path, module in nnx.iter_modules(model)
    if isinstance(module, nnx.Linear)
    for name in tensor_names(path, module.kernel)
  }


def fill(model: Decoder, checkpoint: Checkpoint, quantized: QuantizedLayers, dtype: DTypeLike, device) -> Decoder:
  """The abstract `model` with every parameter read from the checkpoint, one layer at a time.

  The layers in `quantized` become QuantLinear layers; their scales keep their dtype. A dense weight is stored [out, in]
  and becomes a kernel [in, out]. Names and shapes of all tensors are checked before the first is read.

  Raises:
    CheckpointError: a tensor is missing, unexpected, of the wrong shape or dtype, or holds NaN or infinite values.
    NotImplementedError: a quantized layer is none that a QuantLinear can be.
  """
  check_names_and_shapes(model, checkpoint, quantized)
  checkpoint.read_ahead()
  for path, linear in [(path, layer) for path, layer in nnx.iter_modules(model) if isinstance(layer, nnx.Linear)]:
    names = tensor_names(path, linear.kernel)
    if names[0] not in quantized:
      continue
    parent: Any = model
    for segment in path[:-1]:
      parent = parent[segment] if isinstance(segment, int) else getattr(parent, segment)
    weights = [quantized.read(name, linear.in_features, linear.out_features, device) for name in names]
    packed = stack(weights) if _EXPERTS in path else weights[0]
    setattr(parent, path[-1], QuantLinear.from_packed(packed, linear.bias, dtype=dtype))
  graphdef, state = nnx.split(model)
  filled = []
  for path, variable in nnx.to_flat_state(state):
    if not isinstance(variable, QuantParam):
      transpose = path[-1] == "kernel"
      arrays = [
        read_float(checkpoint, name, dtype, device, transpose=transpose) for name in tensor_names(path, variable)
      ]
      variable = variable.replace(jnp.stack(arrays) if _EXPERTS in path else arrays[0])
    filled.append((path, variable))
  return nnx.merge(graphdef, nnx.from_flat_state(filled))


def check_names_and_shapes(model: Decoder, checkpoint: Checkpoint, quantized: QuantizedLayers) -> None:
  """Hold the names and shapes in the files' headers against those of the model; reads no weights.

  Raises:
    CheckpointError: a tensor is missing, unexpected or of another shape.
    NotImplementedError: experts of one layer are not quantized alike, or one tensor holds several.
  """
  for name in checkpoint:
    if name.removesuffix(".weight").endswith((".experts.gate_up_proj", ".experts.down_proj")):
      raise NotImplementedError(
        f"{checkpoint.folder}: tensor {name} holds all experts of a layer, which is not supported, only one for each is"
      )
  layers = dense_layers(model)
  expected = {}
  for path, variable in nnx.to_flat_state(nnx.state(model)):
    names = tensor_names(path, variable)
    shape = tuple(variable.shape[1:] if _EXPERTS in path else variable.shape)
    if path[-1] != "kernel":
      expected |= dict.fromkeys(names, shape)
      continue
    of_layer = [name.removesuffix(".weight") for name in names]
    for layer in of_layer:
      if quantized.get(layer) != quantized.get(of_layer[0]):
        raise NotImplementedError(
          f"{checkpoint.folder}: layers {of_layer[0]} and {layer} are not quantized alike, which is not supported for "
          "experts of one layer"
        )
      if layer in quantized:
        expected |= _quantized_shapes(layer, *shape, checkpoint, quantized)
      else:
        expected[f"{layer}.weight"] = shape[::-1]
  for name in quantized:
    if name not in layers:
      raise CheckpointError(
        f"{checkpoint.folder}: {name} is quantized, but {model.config.architecture} has no such dense layer"
      )
  for name, shape in expected.items():
    if name not in checkpoint:
      raise CheckpointError(f"{checkpoint.folder}: tensor {name} of shape {shape} is missing")
    if checkpoint.shape(name) != shape:
      raise CheckpointError(f"{checkpoint.folder}: tensor {name} has shape {checkpoint.shape(name)}, must have {shape}")
  for name in checkpoint:
    if name in expected or name.endswith(".rotary_emb.inv_freq"):  # a buffer that old Llama checkpoints carry along
      continue
    if model.config.tie_word_embeddings and name == "lm_head.weight":
      # Some files of tied models repeat the embedding under this name; another matrix there would be lost silently.
      if not np.array_equal(checkpoint[name], checkpoint["model.embed_tokens.weight"]):
        raise CheckpointError(
          f"{checkpoint.folder}: lm_head.weight differs from model.embed_tokens.weight, must equal "
          "it since the config has tie_word_embeddings"
        )
      continue
    if name.removesuffix(".bias") in quantized and not checkpoint[name].any():
      continue  # AutoGPTQ gives every layer a bias, of zeros where the model has none
    raise CheckpointError(f"{checkpoint.folder}: tensor {name} of shape {checkpoint.shape(name)} is unexpected")


def _quantized_shapes(name: str, k: int, n: int, checkpoint: Checkpoint, quantized: QuantizedLayers):
  try:
    quantized[name].groups(k)
  except ValueError as error:
    raise CheckpointError(f"{checkpoint.folder}: layer {name}: {error}") from None
  return quantized.shapes(name, k, n)
