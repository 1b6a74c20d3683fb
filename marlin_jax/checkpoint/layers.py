# SPDX-License-Identifier: Apache-2.0
"""What the quantized formats share: which layers of a checkpoint are quantized, and how their tensors are read."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from marlin_jax.checkpoint.folder import CheckpointError
from marlin_jax.checkpoint.safetensors_files import Checkpoint
from marlin_jax.quantized import SMALLEST_GROUP, Packed, QuantSpec


class QuantizedLayers(Mapping[str, QuantSpec]):
  """Hugging Face name -> QuantSpec of the layers that are quantized in a checkpoint, and how they are read.

  One subclass a format says which tensors store a layer. This base is the float checkpoint, which has no such layers.
  """

  def __init__(self, checkpoint: Checkpoint, specs: Mapping[str, QuantSpec]):
    self.checkpoint = checkpoint
    self._specs = specs

  def __getitem__(self, name: str) -> QuantSpec:
    return self._specs[name]

  def __iter__(self) -> Iterator[str]:
    return iter(self._specs)

  def __len__(self) -> int:
    return len(self._specs)

  def shapes(self, name: str, k: int, n: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that store the weight of a [k, n] layer."""
    raise NotImplementedError

  def read(self, name: str, k: int, n: int, device) -> Packed:
    """The weight of a [k, n] layer, read from tensors whose shapes were checked.

    Raises:
      CheckpointError: a tensor has a wrong dtype or values that make no sense.
      NotImplementedError: a packed weight cannot hold this weight exactly.
    """
    raise NotImplementedError


def not_covered(checkpoint: Checkpoint, found: str) -> NotImplementedError:
  """The refusal of a sound checkpoint: what was found there, and what is covered."""
  return NotImplementedError(
    f"{checkpoint.folder}: {found}; of other tools' checkpoints integer weights of 4 or 8 bits are covered, in groups "
    f"of a multiple of {SMALLEST_GROUP} or with one scale a column"
  )


def covered_spec(checkpoint: Checkpoint, name: str, bits: Any, group_size: Any, symmetric: Any) -> QuantSpec:
  """The spec of a layer of another tool's checkpoint.

  Raises:
    CheckpointError: these are no numbers.
    NotImplementedError: these are not covered.
  """
  if type(bits) is not int or not (group_size is None or type(group_size) is int) or type(symmetric) is not bool:
    raise CheckpointError(
      f"{checkpoint.folder}: quantization_config: layer {name} has {bits!r} bits, group size {group_size!r} and "
      f"symmetry {symmetric!r}, must be two integers and true or false"
    )
  if bits not in (4, 8):
    raise not_covered(checkpoint, f"layer {name} has {bits} bits")
  if group_size is not None and (group_size < SMALLEST_GROUP or group_size % SMALLEST_GROUP):
    raise not_covered(checkpoint, f"layer {name} has groups of {group_size}")
  return QuantSpec(bits=bits, group_size=group_size, symmetric=symmetric)


def act_order(checkpoint: Checkpoint, tensor: str, k: int, groups: int) -> np.ndarray | None:
  """The order of the K features in which the groups that `tensor` gives each are runs of equal length.

  None if that is the order they are in. The sort is stable: within a group features keep their order.

  Raises:
    CheckpointError: a group is out of range.
    NotImplementedError: the groups are not of equal size.
  """
  g_idx = read_integers(checkpoint, tensor, np.int32)
  if g_idx.min() < 0 or g_idx.max() >= groups:
    raise CheckpointError(
      f"{checkpoint.folder}: tensor {tensor} has values from {g_idx.min()} to {g_idx.max()}, must be groups "
      f"from 0 to {groups - 1}"
    )
  order = np.argsort(g_idx, kind="stable")
  if (g_idx[order] != np.arange(k) // (k // groups)).any():
    raise not_covered(checkpoint, f"tensor {tensor} has groups that are not all of {k // groups} features")
  return None if (order == np.arange(k)).all() else order


def layers_with(checkpoint: Checkpoint, *leaves: str) -> list[str]:
  """The layers that have a tensor by one of these last names, each once, in the order of the file."""
  parts = (name.rpartition(".") for name in checkpoint)
  return list(dict.fromkeys(layer for layer, _, leaf in parts if leaf in leaves))


def on_device(tensor: np.ndarray, device) -> jax.Array:
  """The tensor on `device`; a copy also where that is the host, for a file may change and a jax.Array may not."""
  array = jax.device_put(tensor, device)
  if all(device.platform == "cpu" for device in array.devices()):  # it may be the very memory of `tensor`
    array = jax.device_put(np.array(tensor), device)
  return array


def read_float(
  checkpoint: Checkpoint, name: str, dtype: DTypeLike | None, device, *, transpose: bool = False
) -> jax.Array:
  """One floating-point tensor on `device`, as `dtype` (None: as stored).

  Raises:
    CheckpointError: it is not bfloat16, float16 or float32, or it holds NaN or infinite values, if only after the cast.
  """
  return _read_float(checkpoint, name, dtype, device, transpose=transpose)[0]


def _read_float(checkpoint: Checkpoint, name: str, dtype: DTypeLike | None, device, *, transpose: bool):
  tensor = checkpoint[name]
  if tensor.dtype not in (jnp.bfloat16, np.float16, np.float32):
    raise CheckpointError(f"{checkpoint.folder}: tensor {name} is {tensor.dtype}, must be bfloat16, float16 or float32")
  dtype = tensor.dtype if dtype is None else np.dtype(dtype)
  array, finite, nonzero = _cast(on_device(tensor, device), dtype=dtype, transpose=transpose)
  if not finite:
    raise CheckpointError(
      f"{checkpoint.folder}: tensor {name} has NaN or infinite values as {array.dtype}, must be finite"
    )
  return array, nonzero


@partial(jax.jit, static_argnames=("dtype", "transpose"))
def _cast(tensor: jax.Array, *, dtype: np.dtype, transpose: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The tensor as it is wanted, whether all of it is finite, and whether none is zero: one program for a shape."""
  array = tensor.astype(dtype)
  return array.T if transpose else array, jnp.isfinite(array).all(), array.all()


def read_scales(checkpoint: Checkpoint, name: str, device, *, transpose: bool = False) -> jax.Array:
  """Scales of another tool's checkpoint, in the dtype they are stored in.

  Raises:
    CheckpointError: as for `read_float`, and if one is zero: its group would be lost.
  """
  scales, nonzero = _read_float(checkpoint, name, None, device, transpose=transpose)
  if not nonzero:
    raise CheckpointError(f"{checkpoint.folder}: tensor {name} has zeros, scales must not be zero")
  return scales


def read_integers(checkpoint: Checkpoint, name: str, *dtypes: DTypeLike) -> np.ndarray:
  """One tensor of integers, in host memory.

  Raises:
    CheckpointError: it is of none of the dtypes.
  """
  tensor = checkpoint[name]
  if tensor.dtype not in dtypes:
    expected = " or ".join(np.dtype(dtype).name for dtype in dtypes)
    raise CheckpointError(f"{checkpoint.folder}: tensor {name} is {tensor.dtype}, must be {expected}")
  return tensor
