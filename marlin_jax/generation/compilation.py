# SPDX-License-Identifier: Apache-2.0
"""Programs that are compiled while others are lowered.

Lowering is Python, of which one thread runs at a time; compiling is C++ and leaves Python to others:

    lower a | lower b | lower c |
            | compile a ----|
                      | compile b ----|
                                | compile c ----|

`jit` and `lower` share their caches: a later call of the jitted function itself, with arguments like those it was
lowered for, finds what was compiled here and compiles nothing. A test holds JAX to that.
"""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from jax.stages import Compiled, Lowered


def compile_in_threads(programs: Iterable[Lowered]) -> list[Future[Compiled]]:
  """Begins to compile each program as soon as it is there, and returns when all have begun.

  What `programs` does to lower them is done in this thread, so that JAX's settings of this thread hold; what it raises
  is raised. What the compiler raises, `result` of the future raises.
  """
  pool = ThreadPoolExecutor()
  futures = [pool.submit(program.compile) for program in programs]
  pool.shutdown(wait=False)
  return futures
