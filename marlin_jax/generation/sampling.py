# SPDX-License-Identifier: Apache-2.0
"""From logits to the next token of every row: one pure function, one compiled program for all settings.

`Sampling` is what a caller writes down, checked once on the host. `Sampling.arrays()` turns it into scalar arrays that
a jitted program takes as arguments, so that another temperature or another top_k never compiles anything.
"""

import dataclasses
import math
from numbers import Integral, Real

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

_NO_TOP_K = np.iinfo(np.int32).max
# An array, or what JAX has in its place where a program is lowered.
_Setting = Array | np.ndarray | jax.stages.ArgInfo


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SamplingArrays:
  """A `Sampling` as scalar arrays, or one a row as arrays [B]; `top_k` is the largest int32 where nothing is cut.

  `cuts` says whether any row has a top_k or top_p. It is static: a program that cuts sorts the vocabulary, and one that
  decided on the device would send the answer to the host first.
  """

  temperature: Float[_Setting, "*B"]
  top_k: Int[_Setting, "*B"]
  top_p: Float[_Setting, "*B"]
  repetition_penalty: Float[_Setting, "*B"]
  cuts: bool = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
  """How the next token is chosen; the default is greedy.

  The settings act in this order: repetition penalty, temperature, top-k, top-p.

  Attributes:
    temperature: logits are divided by it; 0 takes the most likely token.
    top_k: only the `top_k` most likely tokens may be drawn; None cuts nothing.
    top_p: only the smallest set of most likely tokens whose probabilities sum to at least `top_p` may be drawn, counted
      after temperature and top-k (Holtzman et al., The Curious Case of Neural Text Degeneration, section 3.1).
    repetition_penalty: theta of CTRL (Keskar et al., arXiv 1909.05858, section 4.1); 1 changes nothing, more than 1
      makes tokens of the prompt and of the continuation less likely to come again.
    seed: same seed, same prompts in the same rows: same tokens.

  Raises:
    ValueError: naming the first setting that is out of range or no number.
  """

  temperature: float | int = 0.0
  top_k: int | None = None
  top_p: float | int = 1.0
  repetition_penalty: float | int = 1.0
  seed: int = 0

  def __post_init__(self):
    for name in ("temperature", "top_p", "repetition_penalty"):
      value = getattr(self, name)
      if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r} must be a finite number")
    for name in ("top_k", "seed"):
      value = getattr(self, name)
      if not (name == "top_k" and value is None) and (not isinstance(value, Integral) or isinstance(value, bool)):
        raise ValueError(f"{name}={value!r} must be an integer")
    if self.temperature < 0:
      raise ValueError(f"temperature={self.temperature!r} must be at least 0 (0 is greedy)")
    if self.top_k is not None and self.top_k < 1:
      raise ValueError(f"top_k={self.top_k!r} must be at least 1, or None for no limit")
    if not 0 < self.top_p <= 1:
      raise ValueError(f"top_p={self.top_p!r} must be in (0, 1]")
    if self.repetition_penalty <= 0:
      raise ValueError(f"repetition_penalty={self.repetition_penalty!r} must be more than 0 (1 is no penalty)")
    if not 0 <= self.seed < 2**32:
      raise ValueError(f"seed={self.seed!r} must be in 0 .. 2**32 - 1")

  @property
  def greedy(self) -> bool:
    """Whether the most likely token is taken, whatever came before."""
    return self.temperature == 0 and self.repetition_penalty == 1

  @property
  def cuts(self) -> bool:
    """Whether less than the whole vocabulary may be drawn from."""
    return self.temperature > 0 and (self.top_k is not None or self.top_p < 1)

  def arrays(self) -> SamplingArrays:
    """The settings as numpy scalars: ready to be arguments of a jitted function, and nothing to compile."""
    return SamplingArrays(
      temperature=np.asarray(self.temperature, np.float32),
      top_k=np.asarray(_NO_TOP_K if self.top_k is None else min(self.top_k, _NO_TOP_K), np.int32),
      top_p=np.asarray(self.top_p, np.float32),
      repetition_penalty=np.asarray(self.repetition_penalty, np.float32),
      cuts=self.cuts,
    )


GREEDY = Sampling()


def penalize_repetition(
  logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array | np.ndarray, "..."]
) -> Float[Array, "B V"]:
  """logits / penalty where a seen token's logit is positive, logits * penalty where it is negative.

  CTRL (arXiv 1909.05858, section 4.1) divides every seen token's logit; dividing a negative one would make the token
  more likely, so those are multiplied, as is the custom since. `penalty` is a scalar or [B, 1].
  """
  return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample(
  logits: Float[Array, "B V"], seen: Bool[Array, "B V"], keys: Key[Array, " B"], settings: SamplingArrays
) -> Int[Array, " B"]:
  """token[b] ~ softmax(penalized logits[b] / temperature), cut to top_k and top_p; argmax at temperature 0.

  Ties go to the lower token id, in the argmax as in the order that top_k and top_p cut. What a row draws depends on its
  logits, key and settings alone: not on the other rows, nor on whether one of them is cut.

  Args:
    logits: float32.
    seen: the tokens that the repetition penalty applies to.
    keys: one random key a row.
    settings: scalars, or one a row.
  """

  def column(setting: Array | np.ndarray) -> Array:
    return jnp.broadcast_to(setting, logits.shape[:1])[:, None]

  temperature = column(settings.temperature)
  logits = penalize_repetition(logits, seen, column(settings.repetition_penalty))
  best = jnp.argmax(logits, axis=-1)
  # The largest logit becomes 0 first: a tiny temperature then sends the others to -inf and overflows nothing.
  scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / jnp.where(temperature == 0, 1, temperature)
  if settings.cuts:
    order = jnp.argsort(scaled, axis=-1, stable=True, descending=True)
    ranked = jnp.take_along_axis(scaled, order, axis=-1)
    rank = jnp.arange(ranked.shape[-1])
    ranked = jnp.where(rank < column(settings.top_k), ranked, -jnp.inf)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    # A token stays while the mass before it has not reached top_p. The first one always does, however small top_p is;
    # 1 cuts nothing, however the mass was rounded.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    top_p = column(settings.top_p)
    ranked = jnp.where((before < top_p) | (rank == 0) | (top_p == 1), ranked, -jnp.inf)
    # Back in the order of the vocabulary, so that a row that is not cut draws what it would draw without the others.
    scaled = jnp.put_along_axis(jnp.zeros_like(scaled), order, ranked, axis=-1, inplace=False)
  drawn = jax.vmap(jax.random.categorical)(keys, scaled)
  return jnp.where(temperature[:, 0] == 0, best, drawn).astype(jnp.int32)
