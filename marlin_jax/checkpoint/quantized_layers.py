# SPDX-License-Identifier: Apache-2.0
"""Which layers of a checkpoint are quantized, and by which of the formats: the one entrance to all of them."""

from collections.abc import Mapping
from typing import Any

from marlin_jax.checkpoint import marlin24
from marlin_jax.checkpoint.awq import AwqLayers
from marlin_jax.checkpoint.compressed_tensors import CompressedTensorsLayers
from marlin_jax.checkpoint.folder import CheckpointError, read_json
from marlin_jax.checkpoint.gptq import GptqLayers
from marlin_jax.checkpoint.hqq import HqqLayers
from marlin_jax.checkpoint.layers import QuantizedLayers
from marlin_jax.checkpoint.marlin import MarlinLayers
from marlin_jax.checkpoint.native import NativeLayers
from marlin_jax.checkpoint.safetensors_files import Checkpoint

# What tools wrote before, or beside, a quantization_config in config.json.
_OLD_CONFIGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


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
