# SPDX-License-Identifier: Apache-2.0
"""What the attention kernels share: what they can do, the rotation of a pair, a softmax of keys that come in blocks.

FlashAttention, algorithm 1 (arXiv 2205.14135): of the keys so far are known the maximum of the scores, the sum of
exp(score - maximum), and that of exp(score - maximum) times the values. The factor of the scores holds log2(e), too,
because the hardware's exponential is that of base 2.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt

from pallas_kernels.hardware import Device

BLOCK = 64  # keys that are taken at a time
NOTHING = -1e30  # the maximum over no scores: finite, so that no difference of two of them is NaN


def unsupported_reason(dtype, head_dim: int, device: Device) -> str | None:
  """Why the kernels cannot attend over a cache of `dtype` on `device`; None if they can."""
  if device.platform != "cuda":
    return f"it runs on NVIDIA GPUs, not on {device.platform}"
  if dtype not in (jnp.bfloat16, jnp.float16):
    return f"the cache must be bfloat16 or float16, not {dtype}"
  if head_dim not in (32, 64, 128, 256):
    return f"head_dim={head_dim} must be 32, 64, 128 or 256"
  return None


def score_factor(head_dim: int) -> float:
  """What makes a score of q k^T: log2(e) / sqrt(D)."""
  return math.log2(math.e) / math.sqrt(head_dim)


def rotated(first, second, cos, sin, dtype):
  """The pairs (first[i], second[i]) turned by their angles."""
  first, second = first.astype(jnp.float32), second.astype(jnp.float32)
  return (first * cos - second * sin).astype(dtype), (second * cos + first * sin).astype(dtype)


class Softmax(NamedTuple):
  """The maximum [rows], the sum [rows] and the numerator [rows, D], in float32."""

  top: jax.Array
  total: jax.Array
  acc: jax.Array

  @classmethod
  def empty(cls, rows: int, head_dim: int) -> "Softmax":
    """Over no keys; merged with another it is the other, bit for bit."""
    return cls(
      jnp.full(rows, NOTHING, jnp.float32), jnp.zeros(rows, jnp.float32), jnp.zeros((rows, head_dim), jnp.float32)
    )

  def add(self, scores: jax.Array, visible: jax.Array, values: jax.Array) -> "Softmax":
    """With the keys of a block: their scores and which of them a row sees, [rows, keys], and values, [keys, D].

    Of a row that has seen nothing yet, all weights are 1; they are forgotten with the first key that it sees. To make
    zeros of them took a third of a block's time.
    """
    scores = jnp.where(visible, scores, NOTHING)
    higher = jnp.maximum(self.top, jnp.max(scores, axis=1))
    weights = jnp.exp2(scores - higher[:, None])
    shrink = jnp.exp2(self.top - higher)
    acc = self.acc * shrink[:, None] + plt.dot(weights.astype(values.dtype), values)
    return Softmax(higher, self.total * shrink + jnp.sum(weights, axis=1), acc)

  def merge(self, other: "Softmax") -> "Softmax":
    """Over the keys of both."""
    higher = jnp.maximum(self.top, other.top)
    shrink, weight = jnp.exp2(self.top - higher), jnp.exp2(other.top - higher)
    return Softmax(
      higher,
      self.total * shrink + other.total * weight,
      self.acc * shrink[:, None] + other.acc * weight[:, None],
    )
