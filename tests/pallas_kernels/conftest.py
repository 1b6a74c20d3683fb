# SPDX-License-Identifier: Apache-2.0
"""What the tests of kernels share."""

import gc
import pathlib

import jax
import jax._src.pallas.triton.lowering as triton_lowering  # private: the only way to see a kernel's own IR
import pytest


@pytest.fixture(autouse=True, scope="module")
def room_for_programs():
  """Programs are forgotten before there are too many: each compiled for a CPU takes several mappings of memory, Linux
  gives a process 65530, and the program for which none is left ends the process with a segmentation fault.

  Only here, where most other tests are done: a server that is tested counts what it compiles.
  """
  mappings = pathlib.Path("/proc/self/maps")
  if mappings.exists() and mappings.read_bytes().count(b"\n") > 45_000:
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def triton_ir(monkeypatch):
  """The Triton IR of every kernel lowered in the test, passed through MLIR's verifier."""
  texts = []
  lower = triton_lowering.lower_jaxpr_to_triton_module

  def verified(*args, **kwargs):
    result = lower(*args, **kwargs)
    assert result.module.operation.verify()
    texts.append(str(result.module))
    return result

  monkeypatch.setattr(triton_lowering, "lower_jaxpr_to_triton_module", verified)
  return texts
