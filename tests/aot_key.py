"""The key of a build in the ledger: it changes with whatever decides the machine code, or what a row says of it.

That is Triton's own key of compiled code, with Triton's version in place of its files, and without what changes no
instruction: on which line a function starts, its comments, its layout.
"""

import ast
import hashlib
from pathlib import Path

import triton
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.language import constexpr
from triton.runtime.jit import DependenciesFinder, JITCallable

from . import aot_read
from .aot_rows import ARCHITECTURES, Build


class _Used(DependenciesFinder):
    """What a function refers to: other compiled functions, and the values of constants."""

    def __init__(self, function: JITCallable):
        scope = function.get_capture_scope()
        super().__init__(function.__name__, scope, {}, function.src)
        self.functions: list[JITCallable] = []
        self.values: set[str] = set()

    def record_reference(self, val, var_dict=None, name=None):
        if isinstance(val, JITCallable):
            self.functions.append(val)
        elif isinstance(val, constexpr):
            self.values.add(f"{name}={val}")
        else:
            super().record_reference(val, var_dict, name)


def code(text: str) -> str:
    """Python without comments and layout."""
    return ast.unparse(ast.parse(text))


def sources(function: JITCallable) -> list[str]:
    """A function and all that it calls, with the constants that they use."""
    found, waiting = {}, [function]
    while waiting:
        function = waiting.pop()
        name = f"{function.__module__}.{function.__qualname__}"
        if name in found:
            continue
        used = _Used(function)
        used.visit(function.parse())
        # The decorator is not part of the source; noinline is all of it that changes code.
        found[name] = f"{name} {getattr(function, 'noinline', None)} {sorted(used.values)}\n{code(function.src)}"
        waiting += used.functions
    return sorted(found.values())


def settings(options: tuple) -> list[str]:
    """Of every architecture: the version of ptxas, and all options, those that were not given, too."""
    backends = [make_backend(GPUTarget("cuda", arch, 32)) for arch in ARCHITECTURES]
    return [f"{backend.hash()} {backend.parse_options(dict(options)).hash()}" for backend in backends]


def key(build: Build, function: JITCallable) -> str:
    parts = [triton.__version__, sorted(get_cache_invalidating_env_vars().items()), settings(build.options)]
    parts += [repr(build), str(build), sources(function), code(Path(aot_read.__file__).read_text())]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
