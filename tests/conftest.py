# SPDX-License-Identifier: Apache-2.0
"""What all tests share: the GPU marker, and an H200 to lower for where there is none."""

import contextlib
import os

import jax
import numpy as np
import pytest

# A quarter of the suite's time went into optimizing programs that run once. What users start (commands, notebooks, a
# server) runs in processes of its own, compiled as theirs; JAX_DISABLE_MOST_OPTIMIZATIONS=0 does so for all tests.
if jax.default_backend() == "cpu" and "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
  jax.config.update("jax_disable_most_optimizations", True)


def pytest_collection_modifyitems(items):
  if jax.default_backend() == "gpu":
    return
  for item in items:
    if "gpu" in item.keywords:
      item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here"))


@pytest.fixture
def rng():
  return np.random.default_rng(20240821)


@pytest.fixture
def h200():
  """A context in which JAX lowers for an H200, whatever machine this is."""
  device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", platform="cuda", num_cores=132)
  mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.sharding.use_abstract_mesh(mesh))
    yield


@pytest.fixture
def lower_for_h200(h200):
  """(function, *shapes) -> the StableHLO text of the function, lowered for an H200."""

  def lower(function, *args) -> str:
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()

  return lower
