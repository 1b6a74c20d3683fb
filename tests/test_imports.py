# SPDX-License-Identifier: Apache-2.0
"""Imports point down the list of modules and never up."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# Lowest first; a module may import those of its own line and of the lines above it.
LAYERS = (
  "pallas_kernels",
  "marlin_jax.quantized",
  "marlin_jax.packing",
  "marlin_jax.quantizers",
  "marlin_jax.ops",
  "marlin_jax.linen marlin_jax.nnx",
  "marlin_jax.convert",
  "marlin_jax.tokenizer",
  "marlin_jax.models",
  "marlin_jax.checkpoint",
  "marlin_jax.generation",
  "marlin_jax.text",
  "marlin_jax.calibration",
  "marlin_jax.quantization",
  "marlin_jax.serving",
  "marlin_jax.serving.programs",
  "marlin_jax.serving.engine marlin_jax.serving.request",
  "marlin_jax.serving.slots",
  "marlin_jax.serving.scheduler marlin_jax.serving.continuation marlin_jax.serving.chat marlin_jax.serving.protocol",
  "marlin_jax.serving.metrics marlin_jax.serving.responses",
  "marlin_jax.serving.completion",
  "marlin_jax.serving.http",
  "marlin_jax.serving.server",
  "marlin_jax.bench",
  "marlin_jax.console",
  "marlin_jax.demo",
  "marlin_jax",
  "marlin_jax.arguments",
  "marlin_jax.bench.cli",
  "marlin_jax.cli marlin_jax.__main__",
)
KERNEL_IMPORTS = {"jax", "jaxlib", "jaxtyping", "numpy", "pallas_kernels"}
STANDARD = {"collections", "dataclasses", "functools", "json", "logging", "math", "os", "pathlib", "typing", "warnings"}


def layer_of(module: str) -> int:
  names = [(name, index) for index, line in enumerate(LAYERS) for name in line.split()]
  matches = [(len(name), index) for name, index in names if module == name or module.startswith(name + ".")]
  return max(matches)[1]


def files():
  for package in ("pallas_kernels", "marlin_jax"):
    yield from sorted((ROOT / package).rglob("*.py"))


def imports_of(path: pathlib.Path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: relative import in line {node.lineno}"
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", list(files()), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
  module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
  for imported in imports_of(path):
    top = imported.split(".")[0]
    if module.startswith("pallas_kernels"):
      assert top in KERNEL_IMPORTS | STANDARD
    if top in ("pallas_kernels", "marlin_jax"):
      assert layer_of(imported) <= layer_of(module), f"{module} imports {imported}, which lies above it"
