# SPDX-License-Identifier: Apache-2.0
import jax.numpy as jnp
import pytest

from pallas_kernels import MatmulProblem
from pallas_kernels.hardware import H200

BF16 = jnp.dtype(jnp.bfloat16)


def test_limit_of_a_small_batch_is_reading_the_weights():
  problem = MatmulProblem(m=16, n=28672, k=8192, group_size=128, dtype=BF16)
  weights = 28672 * 8192 * (4 + 16 / 128) / 8
  assert problem.bytes == weights + 2 * 16 * (28672 + 8192)
  assert problem.time_limit(H200) == pytest.approx(27.8e-6, rel=0.01)


def test_eight_bits_and_zero_points_are_read_too():
  problem = MatmulProblem(m=16, n=28672, k=8192, group_size=128, dtype=BF16, bits=8, zeros=True)
  assert problem.bytes == 28672 * 8192 * (8 + 2 * 16 / 128) / 8 + 2 * 16 * (28672 + 8192)


@pytest.mark.parametrize("m", [1, 16])
def test_limit_of_a_sparse_weight_is_reading_three_bits_a_weight(m):
  problem = MatmulProblem(m=m, n=28672, k=8192, group_size=128, dtype=BF16, sparse24=True)
  assert problem.bytes == 28672 * 8192 * (3 + 16 / 128) / 8 + 2 * m * (28672 + 8192)
  assert problem.time_limit(H200) == pytest.approx(21e-6, rel=0.01)


def test_sparse_weights_halve_the_arithmetic():
  dense, sparse = (
    MatmulProblem(m=4096, n=28672, k=8192, group_size=128, dtype=BF16, sparse24=s) for s in (False, True)
  )
  assert sparse.flops == dense.flops // 2 == 4096 * 28672 * 8192
  assert sparse.time_limit(H200) == pytest.approx(dense.time_limit(H200) / 2)


def test_limit_of_a_large_batch_is_arithmetic():
  problem = MatmulProblem(m=4096, n=28672, k=8192, group_size=128, dtype=BF16)
  assert problem.time_limit(H200) == pytest.approx(2 * 4096 * 28672 * 8192 / 782e12)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(m=-1), "m=-1.*at least 0"),
    (dict(n=0), "n=0.*at least 1"),
    (dict(group_size=48), "group_size=48 must divide k=128"),
    (dict(bits=3), "bits=3 must be 4 or 8"),
    (dict(bits=8, sparse24=True), "bits=8 and zeros=False must be 4 and False where sparse24 is True"),
    (dict(zeros=True, sparse24=True), "bits=4 and zeros=True must be 4 and False where sparse24 is True"),
    (dict(dtype=jnp.dtype(jnp.int32)), "dtype=int32 must be a floating point type"),
  ],
)
def test_nonsense_is_refused(change, message):
  with pytest.raises(ValueError, match=message):
    MatmulProblem(**(dict(m=1, n=64, k=128, group_size=128, dtype=BF16) | change))
