# SPDX-License-Identifier: Apache-2.0
"""What the dense layers of a decoder read on calibration text: moments of their inputs, one decoder layer at a time.

    hidden states before layer i (host) --batch by batch--> layer i (device) --> moments of what its dense layers read
                                        --once it is quantized-----------------> hidden states before layer i + 1

Only one layer's weights, one batch of hidden states and the moments are on the device.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32

from marlin_jax.generation.weights import Structure, split
from marlin_jax.models.config import ModelConfig
from marlin_jax.models.decoder import Decoder
from marlin_jax.models.layers import rope_table

# A module below a decoder layer: ("attention", "q_proj").
Path = tuple[str, ...]

# Tokens of a batch: enough rows to keep a device busy, few enough for the attention scores to fit.
_TOKENS_PER_BATCH = 4096
_SHORTEST = 16


class Moments(NamedTuple):
  """Sums over tokens of what a layer reads, float32.

  Attributes:
    gram: of x x^T.
    magnitude: of |x|.
    tokens: how many there were.
  """

  gram: Float32[Array, "K K"]
  magnitude: Float32[Array, " K"]
  tokens: Float32[Array, ""]


class _Batch(NamedTuple):
  hidden: Float[np.ndarray, "B T E"]
  mask: Float[np.ndarray, "B T"]  # 1 for a token, 0 for padding


class LayerInputs:
  """The hidden states of all calibration sequences in front of one layer, and what can be asked of them.

  The layers that are handed over lie on the device.
  """

  def __init__(self, model: Decoder, sequences: Sequence[Sequence[int]], device):
    """The hidden states in front of the first layer: the embeddings of the sequences, which may differ in length."""
    self._config, self._device = model.config, device
    embedding = np.asarray(model.embed.embedding[...].astype(model.dtype))
    self._batches = [_Batch(embedding[tokens], mask.astype(embedding.dtype)) for tokens, mask in _padded(sequences)]

  def moments(self, layer: nnx.Module, readers: Sequence[Path]) -> list[Moments]:
    """The moments of the input of every dense layer in `readers`, over all sequences.

    Raises:
      ValueError: they are not finite.
    """
    structure, weights = split(layer)
    total = None
    for batch in self._batches:
      sums = _moments(structure, weights, *jax.device_put(batch, self._device), self._config, tuple(readers))
      total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    for path, moments in zip(readers, total, strict=True):
      if not jnp.isfinite(moments.gram).all():
        raise ValueError(f"what {'.'.join(path)} reads on the calibration text is not finite")
    return total

  def advance(self, layer: nnx.Module) -> None:
    """Takes the outputs of `layer` for the inputs of the next one."""
    structure, weights = split(layer)
    for i, batch in enumerate(self._batches):
      hidden = _output(structure, weights, jax.device_put(batch.hidden, self._device), self._config)
      self._batches[i] = batch._replace(hidden=np.asarray(hidden))


def _padded(sequences: Sequence[Sequence[int]]):
  """Batches of (tokens, mask), padded to powers of two on the right: no token attends to what comes after it."""
  by_width: dict[int, list[Sequence[int]]] = {}
  for sequence in sequences:
    by_width.setdefault(max(_SHORTEST, 1 << (len(sequence) - 1).bit_length()), []).append(sequence)
  for width, of_width in by_width.items():
    rows = min(len(of_width), max(1, _TOKENS_PER_BATCH // width))
    for first in range(0, len(of_width), rows):
      tokens, mask = np.zeros((rows, width), np.int32), np.zeros((rows, width), bool)
      for row, sequence in enumerate(of_width[first : first + rows]):
        tokens[row, : len(sequence)], mask[row, : len(sequence)] = sequence, True
      yield tokens, mask


class _Tap:
  """In the place of a dense layer while a pass is traced: calls it, and remembers what it was called with."""

  def __init__(self, layer: Any, seen: dict[Path, Array], path: Path):
    self._layer, self._seen, self._path = layer, seen, path

  def __call__(self, x: Array) -> Array:
    self._seen[self._path] = x
    return self._layer(x)


def _call(layer: Any, hidden: Array, config: ModelConfig) -> Array:
  positions = jnp.broadcast_to(jnp.arange(hidden.shape[1]), hidden.shape[:2])
  x, *_ = layer(hidden, layer.project(hidden), positions, rope_table(config, positions), None)
  return x


@partial(jax.jit, static_argnames=("structure", "config"))
def _output(structure: Structure, weights: list[Array], hidden: Array, config: ModelConfig) -> Array:
  return _call(structure.merge(weights), hidden, config)


@partial(jax.jit, static_argnames=("structure", "config", "readers"))
def _moments(
  structure: Structure,
  weights: list[Array],
  hidden: Float[Array, "B T E"],
  mask: Float[Array, "B T"],
  config: ModelConfig,
  readers: tuple[Path, ...],
) -> list[Moments]:
  layer = structure.merge(weights)
  seen: dict[Path, Array] = {}
  for path in readers:
    parent = find(layer, path[:-1])
    setattr(parent, path[-1], _Tap(getattr(parent, path[-1]), seen, path))
  _call(layer, hidden, config)  # what no moment needs of it, XLA leaves out

  def moments_of(x: Array) -> Moments:
    x = (x * mask[..., None]).reshape(-1, x.shape[-1])
    # Products of two bfloat16 numbers are exact in float32, so the only rounding is that of the sum.
    gram = jnp.einsum("tk,tl->kl", x, x, preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST)
    return Moments(gram, jnp.sum(jnp.abs(x), axis=0, dtype=jnp.float32), jnp.sum(mask, dtype=jnp.float32))

  return [moments_of(seen[path]) for path in readers]


def find(module: Any, path: Path) -> Any:
  """The module at `path` below `module`."""
  for segment in path:
    module = getattr(module, segment)
  return module
