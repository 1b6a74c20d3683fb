# SPDX-License-Identifier: Apache-2.0
"""What the device is: the numbers that configs, limits and heuristics are made of."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
  """One kind of GPU.

  Attributes:
    num_sms: streaming multiprocessors.
    shared_memory: bytes one program can have.
    l2_bytes: size of the L2 cache.
    bytes_per_second: what a large read attains.
    flops_per_second: what a large bf16 product attains on random data.
  """

  num_sms: int
  shared_memory: int
  l2_bytes: int
  bytes_per_second: float
  flops_per_second: float


# Measured on the device: a large read, and an 8192 cubed bf16 product on random data.
H200 = Hardware(
  num_sms=132, shared_memory=227 * 1024, l2_bytes=60 << 20, bytes_per_second=4.4e12, flops_per_second=782e12
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Device:
  """Where a program is going to run.

  Attributes:
    platform: "cuda", "cpu" or another backend's name.
    kind: the device's name, as JAX gives it ("NVIDIA H200").
    num_sms: streaming multiprocessors; 0 where there is no GPU.
  """

  platform: str
  kind: str
  num_sms: int


def current_device() -> Device:
  """JAX's default device, or the abstract device of the mesh in use (which lowers for a GPU that is not there).

  `with jax.default_device(jax.devices("cpu")[0])` makes it the CPU on a machine with a GPU.
  """
  abstract = jax.sharding.get_abstract_mesh().abstract_device
  if abstract is not None:
    return Device(platform=abstract.platform, kind=abstract.device_kind, num_sms=abstract.num_cores or 0)
  device = jax.config.jax_default_device or jax.local_devices()[0]
  is_cuda = device.platform == "gpu" and "rocm" not in device.client.platform_version
  return Device(
    platform="cuda" if is_cuda else device.platform,
    kind=device.device_kind,
    num_sms=getattr(device, "core_count", 0) if is_cuda else 0,
  )
