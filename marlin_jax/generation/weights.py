# SPDX-License-Identifier: Apache-2.0
"""A model as two arguments of a jitted function: its structure, which is static, and its weights, which are not.

This is `nnx.split` and `nnx.merge` at the price of a program that is called for every few tokens. jit hashes its static
arguments at each call, and hashing the graph definition of a 32-layer decoder takes 6 ms on a CPU, comparing it with an
equal one 2 ms more, flattening the state 0.6 ms: as long as a decode step. So equal structures are made one object
here, once a `split`, and jit tells them apart by identity; weights travel as a flat list.
"""

import functools
import threading
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array


class Structure:
  """All of a model but its weights; hashed by identity, because `split` gives equal models the same object.

  Attributes:
    compiled: of which shapes generation has compiled its programs ahead of their first call (`programs.compile_ahead`).
  """

  def __init__(self, tree: Any):
    self._tree = tree
    self.compiled: set[tuple] = set()

  def merge(self, weights: list[Array]) -> Any:
    """The model with these weights, which may be tracers."""
    return nnx.merge(*jax.tree.unflatten(self._tree, weights))


def split(model: nnx.Module) -> tuple[Structure, list[Array]]:
  """(structure, weights) such that structure.merge(weights) is the model; the weights are not copied."""
  weights, tree = jax.tree.flatten(nnx.split(model))
  with _LOCK:
    return _structure(tree), weights


_structure = functools.cache(Structure)
# `cache` may call twice for two threads, and two structures of one model are two sets of programs.
_LOCK = threading.Lock()
