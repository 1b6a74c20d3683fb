# SPDX-License-Identifier: Apache-2.0
import threading

import pytest

from marlin_jax.generation.compilation import compile_in_threads


class Program:
  """Compiles until it is told to end."""

  def __init__(self):
    self.begun, self.end = threading.Event(), threading.Event()

  def compile(self):
    self.begun.set()
    assert self.end.wait(60)
    return threading.current_thread()


def test_programs_compile_at_the_same_time_while_the_next_is_lowered_here():
  first, second = Program(), Program()
  lowered_by = []

  def programs():
    for program in (first, second):
      lowered_by.append(threading.current_thread())
      yield program
      assert program.begun.wait(60)

  futures = compile_in_threads(programs())
  assert lowered_by == [threading.current_thread()] * 2
  assert not any(future.done() for future in futures)
  second.end.set()
  assert futures[1].result(60) is not threading.current_thread()
  assert not futures[0].done()
  first.end.set()
  futures[0].result(60)


def test_what_lowering_raises_is_raised_and_what_compiling_raises_waits_in_the_future():
  class Broken:
    def compile(self):
      raise RuntimeError("out of registers")

  def programs():
    yield Broken()
    raise TypeError("no such shape")

  with pytest.raises(TypeError, match="no such shape"):
    compile_in_threads(programs())
  (future,) = compile_in_threads(iter([Broken()]))
  with pytest.raises(RuntimeError, match="out of registers"):
    future.result(60)
