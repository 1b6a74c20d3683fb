# SPDX-License-Identifier: Apache-2.0
"""What README shows runs as it stands there."""

import pathlib
import re
import shlex
import subprocess

import pytest

from marlin_jax.cli import _parser, main

ROOT = pathlib.Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
  return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def in_a_copy(tmp_path, monkeypatch):
  """A folder where the demo model lies at the path README names, so that nothing is written into the checkout."""
  (tmp_path / "marlin_jax").mkdir()
  (tmp_path / "marlin_jax" / "demo").symlink_to(ROOT / "marlin_jax" / "demo")
  monkeypatch.chdir(tmp_path)
  return tmp_path


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code, in_a_copy, capsys):
  exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
  assert "quantized" in "".join(capsys.readouterr())


def test_commands_run(in_a_copy, capsys):
  (block,) = blocks("sh")
  commands = [shlex.split(line) for line in block.splitlines()]
  assert [command[:2] for command in commands] == [["marlin-jax", name] for name in ("quantize", "inspect", "generate")]
  for command in commands:
    assert main(command[1:]) == 0
  assert "56 quantized layers" in capsys.readouterr().out


def test_the_command_of_the_server_is_understood(monkeypatch):
  """It would not end; tests/marlin_jax/serving runs it."""
  (line,) = re.findall("    (marlin-jax serve .*)", (ROOT / "docs" / "serving.md").read_text())
  asked = []
  monkeypatch.setattr("marlin_jax.serving.server.serve", lambda folder, **options: asked.append((folder, options)))
  assert line.startswith("marlin-jax serve FOLDER") and "`marlin-jax serve FOLDER`" in TEXT
  assert main(shlex.split(line)[1:]) == 0
  ((folder, options),) = asked
  assert (folder, options["host"], options["config"].slots) == ("FOLDER", "127.0.0.1", 16)


def test_one_command_makes_all_tables(tmp_path):
  """Each of its commands is understood, and each table and picture of an H200 is of one."""
  said = subprocess.run(
    ["make", "--dry-run", "gpu-tables", f"VENV={tmp_path}", "TABLES=T"], cwd=ROOT, capture_output=True, text=True
  )
  commands = [
    shlex.split(line)[1:] for line in said.stdout.splitlines() if line.startswith(f"{tmp_path}/bin/marlin-jax")
  ]
  assert {command[0] for command in commands} == {"bench"}, said
  for command in commands:
    _parser().parse_args(command)
  written = {pathlib.Path(argument).name for command in commands for argument in command if argument.startswith("T/")}
  tables = {path.name for path in (ROOT / "docs" / "results" / "nvidia_h200").glob("*.csv")}
  assert written == tables | {path.name for path in (ROOT / "docs" / "images").glob("*.png")} - {"layout.png"}


def test_length_and_links():
  assert TEXT.count("\n") <= 150
  for target in re.findall(r"\]\(((?!http)[^)#]+)\)", TEXT):
    assert (ROOT / target).exists(), f"README links to {target}, which does not exist"
