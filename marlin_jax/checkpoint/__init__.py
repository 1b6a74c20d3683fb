# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in and out: Hugging Face float folders, and the same quantized by this package."""

from marlin_jax.checkpoint.folder import CheckpointError
from marlin_jax.checkpoint.load import load_model
from marlin_jax.checkpoint.safetensors_files import open_checkpoint
from marlin_jax.checkpoint.save import quantize_tensors, save_model

__all__ = ["CheckpointError", "load_model", "open_checkpoint", "quantize_tensors", "save_model"]
