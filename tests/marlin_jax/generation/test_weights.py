# SPDX-License-Identifier: Apache-2.0
import dataclasses
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from marlin_jax.generation.weights import Structure, split
from marlin_jax.models.decoder import Decoder
from marlin_jax.models.fuse import fuse


def another(config, seed=6):
  return Decoder(config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(seed))


def test_merge_is_the_model(model):
  structure, weights = split(model)
  tokens = jnp.arange(8)[None]
  np.testing.assert_array_equal(structure.merge(weights)(tokens), model(tokens))
  held = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(nnx.state(model))}
  assert {leaf.unsafe_buffer_pointer() for leaf in weights} == held  # no copies


@pytest.mark.parametrize("prepare", [lambda model: model, fuse], ids=["apart", "fused"])
def test_equal_models_share_a_structure_and_with_it_a_program(model, prepare):
  structure, weights = split(prepare(another(model.config)))
  other_structure, other_weights = split(prepare(another(model.config, seed=2)))
  assert other_structure is structure
  assert not np.array_equal(weights[0], other_weights[0])


def test_threads_that_split_at_once_share_a_structure(model, monkeypatch):
  new = another(dataclasses.replace(model.config, rope_theta=6e5))
  create, together = Structure.__init__, threading.Barrier(2)

  def slow(structure, tree):
    time.sleep(0.1)
    create(structure, tree)

  def structure_of(_):
    together.wait(60)
    return split(new)[0]

  monkeypatch.setattr(Structure, "__init__", slow)
  with ThreadPoolExecutor(2) as pool:
    one, other = pool.map(structure_of, range(2))
  assert one is other


def test_models_that_differ_share_nothing(model):
  structure, _ = split(model)
  assert split(another(dataclasses.replace(model.config, rope_theta=5e5)))[0] is not structure
