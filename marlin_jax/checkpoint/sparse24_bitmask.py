# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors checkpoints of format sparse-24-bitmask: 2:4 sparse floats, stored without their zeros.

    <layer>.compressed  float [N, K/2]         the kept weights of a row, in the order of k
    <layer>.bitmask     uint8 [N, ceil(K/8)]   bit k % 8 of byte k // 8 says that weight k is kept; two of every four
    <layer>.shape       int64 [2, 1]           (N, K)

Such a checkpoint is a float one. It is read as if it held <layer>.weight [N, K], zeros and all; to keep its sparsity in
4 bits, quantize it with sparse24.
"""

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from marlin_jax.checkpoint.folder import CheckpointError
from marlin_jax.checkpoint.layers import layers_with, read_integers
from marlin_jax.checkpoint.safetensors_files import Checkpoint

_FORMAT = "sparse-24-bitmask"
_LEAVES = ("compressed", "bitmask", "shape")


def decompressed(hf: dict[str, Any], checkpoint: Checkpoint) -> tuple[dict[str, Any], Checkpoint]:
  """config.json and tensors of the float checkpoint that a sparse-24-bitmask one stands for; others as they are.

  Raises:
    CheckpointError: a layer is stored twice, or not whole.
  """
  quantization = hf.get("quantization_config")
  if not isinstance(quantization, dict) or quantization.get("config_groups"):
    return hf, checkpoint
  sparsity = quantization.get("sparsity_config")
  if not isinstance(sparsity, dict) or sparsity.get("format") != _FORMAT:
    return hf, checkpoint
  return {key: value for key, value in hf.items() if key != "quantization_config"}, _Decompressed(checkpoint)


def decode(compressed: np.ndarray, bitmask: np.ndarray) -> np.ndarray:
  """[N, K] of the kept weights [N, K/2] and a mask uint8 [N, ceil(K/8)] that keeps K/2 in every row."""
  n, kept = compressed.shape
  mask = np.unpackbits(bitmask, axis=1, count=2 * kept, bitorder="little").astype(bool)
  dense = np.zeros((n, 2 * kept), compressed.dtype)
  dense[mask] = compressed.ravel()
  return dense


class _Decompressed(Checkpoint):
  """A checkpoint with <layer>.weight in place of the three tensors of each sparse layer."""

  def __init__(self, checkpoint: Checkpoint):
    self.folder, self._stored = checkpoint.folder, checkpoint
    self._layers = {f"{name}.weight": name for name in layers_with(checkpoint, *_LEAVES)}
    for weight, name in self._layers.items():
      if weight in checkpoint:
        raise CheckpointError(f"{self.folder}: tensor {weight} is stored twice, as {name}.{_LEAVES[0]} too")
      for leaf in _LEAVES:
        if f"{name}.{leaf}" not in checkpoint:
          raise CheckpointError(f"{self.folder}: tensor {name}.{leaf} is missing")

  def __getitem__(self, name: str) -> np.ndarray:
    if name not in self._layers:
      return self._stored[name]
    compressed, bitmask, shape = (f"{self._layers[name]}.{leaf}" for leaf in _LEAVES)
    n, k = self.shape(name)
    values = self._stored[compressed]
    if values.dtype not in (ml_dtypes.bfloat16, np.float16, np.float32):
      raise CheckpointError(
        f"{self.folder}: tensor {compressed} is {values.dtype}, must be bfloat16, float16 or float32"
      )
    found = read_integers(self._stored, shape, np.int64).ravel().tolist()
    if found != [n, k]:
      raise CheckpointError(f"{self.folder}: tensor {shape} holds {found}, must hold {[n, k]}")
    mask = read_integers(self._stored, bitmask, np.uint8)
    if mask.shape != (n, -(-k // 8)):
      raise CheckpointError(f"{self.folder}: tensor {bitmask} has shape {mask.shape}, must have {(n, -(-k // 8))}")
    kept = np.unpackbits(mask, axis=1, bitorder="little").reshape(n, -1, 4).sum(-1)
    wrong = kept != np.where(4 * np.arange(kept.shape[1]) < k, 2, 0)
    if wrong.any():
      row, quad = np.unravel_index(np.argmax(wrong), wrong.shape)
      raise CheckpointError(
        f"{self.folder}: tensor {bitmask} keeps {kept[row, quad]} of k={4 * quad}..{4 * quad + 3}, n={row}, "
        "must keep two of every four"
      )
    return decode(values, mask)

  def __contains__(self, name: object) -> bool:
    return name in self._layers or (name in self._stored and not self._is_part(name))

  def __iter__(self) -> Iterator[str]:
    yield from self._layers
    yield from (name for name in self._stored if not self._is_part(name))

  def __len__(self) -> int:
    return sum(1 for _ in self)

  def shape(self, name: str) -> tuple[int, ...]:
    if name not in self._layers:
      return self._stored.shape(name)
    compressed = f"{self._layers[name]}.compressed"
    shape = self._stored.shape(compressed)
    if len(shape) != 2:
      raise CheckpointError(f"{self.folder}: tensor {compressed} has shape {shape}, must have two dimensions")
    return shape[0], 2 * shape[1]

  def nbytes(self, name: str) -> int:
    """The bytes as stored."""
    if name not in self._layers:
      return self._stored.nbytes(name)
    return sum(self._stored.nbytes(f"{self._layers[name]}.{leaf}") for leaf in _LEAVES)

  def read_ahead(self) -> None:
    self._stored.read_ahead()

  def _is_part(self, name: str) -> bool:
    layer, _, leaf = name.rpartition(".")
    return leaf in _LEAVES and f"{layer}.weight" in self._layers
