# SPDX-License-Identifier: Apache-2.0
"""Every numbered example runs; 04_train_demo.py has tests of its own, 07_talk_to_the_server.py those of the server."""

import re
import runpy
from pathlib import Path

import nbformat
import pytest
from flax import nnx
from nbclient import NotebookClient

from marlin_jax import QuantLinear
from pallas_kernels import current_device

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "05_from_bits_to_output.ipynb"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
  """Runs a script as `python examples/NAME ARGUMENTS` does; returns what its module then holds."""

  def run_script(name: str, *arguments: object) -> dict:
    monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")

  return run_script


def test_every_example_is_covered():
  others = (ROOT / "tests" / "examples" / "test_train_demo.py", ROOT / "tests/marlin_jax/serving/test_openai_client.py")
  tested = "".join(path.read_text() for path in (Path(__file__), *others)).split('"')
  assert {path.name for path in EXAMPLES.iterdir() if path.name[0].isdigit()} <= set(tested)


def test_one_matmul(run, capsys):
  names = run("01_one_matmul.py")
  assert names["implementation"] in capsys.readouterr().out
  assert (names["implementation"] == "reference") == (current_device().platform != "cuda")
  # Codes 4 bits, a bfloat16 scale for 128 of them; no padding at this shape.
  assert 8 * names["packed"].nbytes / names["w"].size == 4.125
  # 16 levels: 9.4 % on Gaussian weights (quantizers/rtn.py); bfloat16 rounds by at most 2^-8 of a value.
  assert 0.08 < names["from_quantization"] < 0.10
  assert 0 < names["from_arithmetic"] < 2**-8


def test_one_layer(run, capsys):
  names = run("02_one_layer.py")
  # Two layers in a row, each with the error of a 4-bit weight.
  assert 0.05 < names["linen_error"] < 0.15
  assert 0.05 < names["nnx_error"] < 0.15
  assert isinstance(names["model"].up, QuantLinear) and isinstance(names["model"].down, QuantLinear)
  printed = capsys.readouterr().out
  assert "quantized 2 layers" in printed
  assert "  params: up.bias, down.bias\n" in printed
  assert "  Param: down.bias, up.bias\n" in printed
  assert "  quant: up.qweight, up.scales, down.qweight, down.scales\n" in printed


def test_quantize_and_generate(run, capsys):
  names = run("03_quantize_and_generate.py")
  printed = capsys.readouterr().out
  assert "quantized 56 layers" in printed
  assert names["streamed"] == names["continuations"] and all(names["continuations"])
  assert "the same text as before saving: True" in printed
  assert 2 * names["size_after"] < names["size_before"]
  # Four products a layer: `generate` has made one of query, key and value, and one of gate and up.
  assert sum(isinstance(layer, QuantLinear) for _, layer in nnx.iter_modules(names["model"])) == 4 * 8


def test_quantize_and_generate_takes_a_checkpoint(run, capsys):
  names = run("03_quantize_and_generate.py", ROOT / "tests" / "data" / "llama-bf16")
  assert "quantized 14 layers" in capsys.readouterr().out
  assert names["streamed"] == names["continuations"]


def printed_text(notebook: nbformat.NotebookNode) -> dict[str, str]:
  """Cell id -> what the cell printed."""
  outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
  return {name: "".join(out.text for out in outs if out.output_type == "stream") for name, outs in outputs.items()}


def execute(path: Path, folder: Path) -> nbformat.NotebookNode:
  """The notebook, run afresh in an empty folder."""
  notebook = nbformat.read(path, as_version=4)
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("PYTHONPATH", str(ROOT))
    patch.setenv("JAX_PLATFORMS", "cpu")  # the stored outputs are a CPU's, and this process may hold the GPU's memory
    return NotebookClient(notebook, timeout=120, resources={"metadata": {"path": folder}}).execute()


def pictures(notebook: nbformat.NotebookNode) -> list[str]:
  """Ids of the cells that drew one."""
  return [
    cell.id
    for cell in notebook.cells
    for out in cell.get("outputs", [])
    if out.output_type == "display_data" and "image/png" in out.data
  ]


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> nbformat.NotebookNode:
  """The notebook "05_from_bits_to_output.ipynb", run afresh."""
  return execute(NOTEBOOK, tmp_path_factory.mktemp("notebook"))


def test_notebook_prints_what_is_stored_in_it(executed: nbformat.NotebookNode):
  stored = nbformat.read(NOTEBOOK, as_version=4)
  assert printed_text(executed) == printed_text(stored)
  assert [cell.execution_count for cell in stored.cells if cell.cell_type == "code"] == list(
    range(1, sum(cell.cell_type == "code" for cell in stored.cells) + 1)
  )


def test_notebook_claims(executed: nbformat.NotebookNode):
  text = printed_text(executed)
  assert "4096 of 4096" in text["probe"]
  assert "exact for all 16 codes: True" in text["nibble"]
  saved = re.search(r"squared error .*: (\d+)% less", text["search"])
  assert saved and 28 <= int(saved[1]) <= 36  # 32 % over many groups, by the docstring of quantizers/rtn.py


def test_notebook_pictures_are_stored(executed: nbformat.NotebookNode):
  assert pictures(nbformat.read(NOTEBOOK, as_version=4)) == pictures(executed)
  assert (ROOT / "docs" / "images" / "layout.png").read_bytes().startswith(b"\x89PNG")


def test_how_close_to_the_limit(tmp_path):
  path = EXAMPLES / "06_how_close_to_the_limit.ipynb"
  notebook, stored = execute(path, tmp_path), nbformat.read(path, as_version=4)
  assert pictures(notebook) == pictures(stored) == ["roofline", "speedup"]
  assert printed_text(notebook) == printed_text(stored), f"the table has changed: jupyter execute --inplace {path}"
  text = printed_text(notebook)
  assert "NVIDIA H200" in text["setup"]
  (alone, moved) = map(
    int, re.search(r"4-bit weights alone: M = (\d+); with x and y moved, too: M = (\d+)", text["why"]).groups()
  )
  assert 44 <= alone <= moved <= 50
  assert not list(tmp_path.iterdir())


def test_what_quantization_costs(tmp_path):
  path = EXAMPLES / "08_what_quantization_costs.ipynb"
  notebook, stored = execute(path, tmp_path), nbformat.read(path, as_version=4)
  assert pictures(notebook) == pictures(stored) == ["errors", "plot"]
  # The calibration text is this Python's own, so that the numbers differ a little from one version to the next.
  text, shown = printed_text(notebook), printed_text(stored)
  assert text["plot"] == shown["plot"], f"the table has changed: jupyter execute --inplace {path}"
  for printed in (text, shown):
    (rounded,) = re.findall(r"rounded to nearest: .* ([+-][0-9.]+) %", printed["nearest"])
    (calibrated,) = re.findall(r"GPTQ: .* ([+-][0-9.]+) %", printed["gptq"])
    assert 0.5 < float(rounded) < 2.5 and float(calibrated) < float(rounded)
    assert "quantized 56 layers, 35.7 MB -> 9.2 MB" in printed["gptq"]
    assert "less is lost than by rounding to nearest: True" in printed["gptq"]
  assert not list(tmp_path.iterdir())
