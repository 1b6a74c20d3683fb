# SPDX-License-Identifier: Apache-2.0
"""What a kernel leaves of a norm to the next one."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32

from pallas_kernels import layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeferredNorm:
  """A normed activation whose rows are still to be divided by their root mean square.

  It stands for scaled[m, k] / sqrt(sum over t of squares[t, m] / K + epsilon): arXiv 1910.07467, equation 4.

  Attributes:
    scaled: what was normed, times the scale of the norm.
    squares: sums of the squares of what was normed, of K / T columns each.
    epsilon: keeps a row of zeros finite.
  """

  scaled: Float[Array, "*batch K"]
  squares: Float32[Array, "T M"]
  epsilon: float

  @classmethod
  def of(cls, x: Float[Array, "*batch K"], scale: Float[Array, " K"], epsilon: float) -> "DeferredNorm":
    """The norm of x, as a product of the Hopper kernel leaves it: K is a multiple of 64."""
    squares = jnp.square(x.astype(jnp.float32)).reshape(-1, x.shape[-1] // layout.TILE, layout.TILE).sum(axis=2).T
    return cls(scaled=x * scale.astype(x.dtype), squares=squares, epsilon=epsilon)

  @property
  def shape(self) -> tuple[int, ...]:
    """That of what it stands for."""
    return self.scaled.shape

  @property
  def dtype(self) -> np.dtype:
    """That of what it stands for."""
    return self.scaled.dtype

  def resolve(self) -> Float[Array, "*batch K"]:
    """What it stands for, divided in float32 and rounded."""
    factor = lax.rsqrt(self.squares.sum(axis=0) / self.shape[-1] + self.epsilon)
    return (self.scaled.astype(jnp.float32) * factor.reshape(*self.shape[:-1], 1)).astype(self.dtype)


def resolved(x: Float[Array, "*batch K"] | DeferredNorm) -> Float[Array, "*batch K"]:
  """x as an array."""
  return x.resolve() if isinstance(x, DeferredNorm) else x
