"""Lets SGLang import on a machine without CUDA: see ../README.md.

Imported by a ``.pth`` file of SGLang's own environment. It only appends a finder to ``sys.meta_path``, so an installed
package of the same name is found first and nothing of this is used.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

TESTED_VERSIONS = ("0.5.17", "0.5.20", "0.5.23")
# Their checksums of weights wait for CUDA first, also where the weights are on a CPU.
WAITING_VERSIONS = ("0.5.17", "0.5.20")
PACKAGES = ("sgl_kernel", "torchvision", "triton")


class _Class(type):
    """A class to inherit from, to test instances for, or to take members from; making an instance has no effect."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return name

    def __call__(cls, *args: Any, **options: Any) -> Any:
        return type.__call__(cls)


class _Stub(ModuleType):
    """A module, or anything that SGLang takes from one while it is being imported."""

    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        stub = _Class(name, (), {}) if name[0].isupper() else _Stub(f"{self.__name__}.{name}")
        setattr(self, name, stub)
        return stub

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Decorate nothing, construct nothing: a kernel stays a plain function, which no grid can be given to."""
        if self.__name__.startswith(("sgl_kernel.", "triton.runtime.driver.")):
            raise NotImplementedError(f"{self.__name__} is not there without CUDA")
        return args[0] if len(args) == 1 and not options and callable(args[0]) else self


class _Finder(MetaPathFinder, Loader):
    """Finds the stubs, after everything that is installed."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] not in PACKAGES:
            return None
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        try:
            installed = version("sglang")
        except PackageNotFoundError:
            installed = "absent"
        if installed not in TESTED_VERSIONS:
            raise ImportError(
                f"the stub of {spec.name} in patches/sglang_cpu is tested with sglang {', '.join(TESTED_VERSIONS)}, "
                f"and sglang is {installed} here; install a tested version with 'make sglang', or try this one and "
                "add it to TESTED_VERSIONS"
            )
        cuda = getattr(sys.modules.get("torch"), "cuda", None)
        if installed in WAITING_VERSIONS and cuda is not None and not cuda.is_available():
            cuda.synchronize = lambda device=None: None
        return _Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


sys.meta_path.append(_Finder())
