# SPDX-License-Identifier: Apache-2.0
"""What the tests of the Triton-lowered kernels share."""

import jax._src.pallas.triton.lowering as triton_lowering  # private: the only way to see a kernel's own IR
import pytest


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
