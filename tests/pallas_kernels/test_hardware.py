# SPDX-License-Identifier: Apache-2.0
import jax

from pallas_kernels import current_device
from pallas_kernels.hardware import Device


def test_the_abstract_device_of_a_mesh_counts(h200):
  assert current_device() == Device(platform="cuda", kind="NVIDIA H200", num_sms=132)


def test_the_default_device_can_be_chosen():
  with jax.default_device(jax.devices("cpu")[0]):
    assert current_device().platform == "cpu" and current_device().num_sms == 0
