# SPDX-License-Identifier: Apache-2.0
"""How long `load_model` takes for a native 4-bit checkpoint, and how long reading its files alone does.

    python load_native.py SHAPE FOLDER      # SHAPE as of `marlin-jax bench model`; FOLDER does not exist yet, and stays

"cold" is after the operating system was asked to drop the files from its cache, and the first to load: it compiles the
few programs that loading takes. Random weights, groups of 128.
"""

import os
import sys
import time
from pathlib import Path

import jax
from flax import nnx

from marlin_jax.bench.shapes import random_model, read_shape
from marlin_jax.checkpoint import load_model, save_model
from marlin_jax.quantized import QuantSpec


def drop(folder: Path) -> None:
  for path in folder.iterdir():
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def read(folder: Path) -> None:
  buffer = bytearray(1 << 24)
  for path in sorted(folder.iterdir()):
    with path.open("rb", buffering=0) as file:
      while file.readinto(buffer):
        pass


def seconds(function, folder: Path) -> float:
  began = time.perf_counter()
  jax.block_until_ready(function(folder))
  return time.perf_counter() - began


shape, folder = sys.argv[1], Path(sys.argv[2])
save_model(random_model(read_shape(shape), QuantSpec(group_size=128)), folder)
gigabytes = sum(path.stat().st_size for path in folder.iterdir()) / 1e9
print("model,cache,gigabytes,read_s,load_s,device")
for cache in ("cold", "warm"):
  times = []
  for function in (read, lambda folder: nnx.state(load_model(folder))):
    if cache == "cold":
      drop(folder)
    times.append(seconds(function, folder))
  print(f"{shape},{cache},{gigabytes:.2f},{times[0]:.2f},{times[1]:.2f},{jax.devices()[0].device_kind}", flush=True)
