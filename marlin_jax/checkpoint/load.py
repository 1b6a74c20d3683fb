# SPDX-License-Identifier: Apache-2.0
"""load_model: a checkpoint folder in, a Decoder with its tokenizer out."""

import os

import jax.numpy as jnp
from jax.typing import DTypeLike

from marlin_jax.checkpoint.folder import find_folder
from marlin_jax.checkpoint.huggingface import abstract_decoder, fill, read_config
from marlin_jax.checkpoint.quantized_layers import quantized_layers
from marlin_jax.checkpoint.safetensors_files import Checkpoint
from marlin_jax.checkpoint.sparse24_bitmask import decompressed
from marlin_jax.models.decoder import Decoder
from marlin_jax.tokenizer import Tokenizer


def load_model(path: str | os.PathLike[str], *, dtype: DTypeLike = jnp.bfloat16, device=None) -> Decoder:
  """The model in a checkpoint folder, or of a Hub model in the local cache, float or quantized.

  Quantized by this package or, in 4 or 8 bits, by another tool: GPTQ, AWQ, compressed-tensors, HQQ and original MARLIN
  checkpoints, all exactly; 2:4 sparse ones of compressed-tensors too, float and quantized (docs/quantization.md).
  Scales keep the dtype they are stored in.

  Args:
    path: a folder with config.json and safetensors, or a name such as "org/model" that was downloaded before.
    dtype: of the float weights and of the computation, whatever the file holds.
    device: where the weights go; None is JAX's default device.

  Returns:
    A Decoder; its `tokenizer` is that of the folder, or None if there is no tokenizer.json.

  Raises:
    CheckpointError: the folder does not hold a whole and sound checkpoint; the message names the file or the tensor.
    NotImplementedError: config or tensors ask for something that is not covered; the message names it.
  """
  folder = find_folder(path)
  hf, config = read_config(folder)
  hf, checkpoint = decompressed(hf, Checkpoint(folder))
  quantized = quantized_layers(hf, checkpoint)
  model = fill(abstract_decoder(config, dtype), checkpoint, quantized, dtype, device)
  if (folder / "tokenizer.json").exists():
    model.tokenizer = Tokenizer.from_folder(folder)
  return model
