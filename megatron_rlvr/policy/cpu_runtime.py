"""Runs unmodified Megatron-Core without CUDA, over gloo.

Megatron-Core asks for "the current CUDA device" in a few dozen places. Where CUDA does not work, `install` gives the
*modules of Megatron-Core* a stand-in for the name ``torch`` in which that device is the CPU; ``torch`` itself and all
other libraries stay as they are. What the stand-in does not know falls through to the real torch and fails loudly.
Where CUDA works, `install` does nothing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_rlvr.core import RLVRError

TESTED_VERSIONS = ("0.16.1", "0.19.2")

# Everything on the path of a dense GPT model's training and checkpointing; their own imports come along.
_ENTRY_MODULES = (
    "megatron.core.parallel_state",
    "megatron.core.distributed",
    "megatron.core.dist_checkpointing",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.transformer.dot_product_attention",
)
_FACTORIES = (
    *("tensor", "as_tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "randint"),
    *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"),
)
_CPU = torch.device("cpu")


def install() -> None:
    """Prepare Megatron-Core for a machine without CUDA; inert where CUDA works, harmless when repeated.

    Raises:
        RLVRError: If Megatron-Core is missing or, without CUDA, is a version that was not tested on CPU.
    """
    try:
        version = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        raise RLVRError("Megatron-Core is not installed; run: pip install megatron-core") from None
    if torch.cuda.is_available() or _installed():
        return
    if version not in TESTED_VERSIONS:
        raise RLVRError(
            f"megatron-core {version} was not tested without CUDA; install one of {', '.join(TESTED_VERSIONS)} "
            "(pip install megatron-core==VERSION) or run on a machine with CUDA"
        )
    with _importable_triton():
        for name in _ENTRY_MODULES:
            importlib.import_module(name)
        _install_checkpoint_modules()
    stand_in = _torch_stand_in()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = stand_in  # type: ignore[attr-defined]
    _patch_rng()
    _patch_tensor_types()
    _patch_distributed_adam()


def _installed() -> bool:
    parallel_state = sys.modules.get("megatron.core.parallel_state")
    return parallel_state is not None and isinstance(parallel_state.torch, _FallThrough)


@contextlib.contextmanager
def _importable_triton() -> Iterator[None]:
    """While Megatron-Core is imported, an empty Triton where none is installed.

    From 0.19 on some of its modules define Triton kernels when imported; on a CPU none is ever launched. The stand-in
    goes away again, because torch looks for Triton too and must not find this one.
    """
    if importlib.util.find_spec("triton") is not None:
        yield
        return
    torch.compile(_nothing)  # makes torch look for Triton now, before the empty one is there to be found
    names = ("triton", "triton.language")
    sys.modules.update({name: _EmptyTriton(name) for name in names})
    sys.modules["triton"].__version__ = "0"  # type: ignore[attr-defined]
    sys.modules["triton"].language = sys.modules["triton.language"]  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


class _EmptyTriton(types.ModuleType):
    """Every name is there; decorators return the function they decorate."""

    __path__: list[str] = []  # noqa: RUF012 - the type of ModuleType

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _identity_decorator


def _identity_decorator(*args: Any, **_: Any) -> Any:
    return args[0] if len(args) == 1 and callable(args[0]) else _identity_decorator


def _install_checkpoint_modules() -> None:
    """Import every checkpoint strategy now: they are loaded lazily, which would miss the stand-in."""
    package = importlib.import_module("megatron.core.dist_checkpointing.strategies")
    for info in pkgutil.iter_modules(package.__path__):
        # Optional back ends (zarr, TensorStore, MSC, NVRx) may lack their packages here; those are not used.
        with contextlib.suppress(ImportError):
            importlib.import_module(f"{package.__name__}.{info.name}")


class _CpuEvent:
    """A CUDA event where all work is synchronous."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        """Nothing to record: the work is already done."""

    def wait(self, *_: Any) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Whether the work is done: always."""
        return True


class _CpuStream(_CpuEvent):
    """A CUDA stream where all work is synchronous."""

    def wait_stream(self, *_: Any) -> None:
        """Nothing to wait for."""

    def wait_event(self, *_: Any) -> None:
        """Nothing to wait for."""

    def record_event(self, *_: Any) -> _CpuEvent:
        """An event that is already done."""
        return _CpuEvent()


class _FallThrough(types.ModuleType):
    """A module of overrides in front of a real one."""

    def __init__(self, real: types.ModuleType, overrides: dict[str, Any]) -> None:
        super().__init__(real.__name__)
        self.__dict__.update(overrides)
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _zero(*_: Any, **__: Any) -> int:
    return 0


@contextlib.contextmanager
def _null_context(*_: Any, **__: Any) -> Iterator[None]:
    yield


def _torch_stand_in() -> types.ModuleType:
    cuda = _FallThrough(
        torch.cuda,
        {
            "is_available": lambda: False,
            "current_device": lambda: _CPU,
            "device_count": _zero,
            "set_device": _nothing,
            "synchronize": _nothing,
            "empty_cache": _nothing,
            "manual_seed": torch.manual_seed,
            "get_rng_state": lambda *_: torch.get_rng_state(),
            "set_rng_state": lambda state, *_: torch.set_rng_state(state),
            "memory_allocated": _zero,
            "memory_reserved": _zero,
            "max_memory_allocated": _zero,
            "max_memory_reserved": _zero,
            "stream": _null_context,
            "Stream": _CpuStream,
            "Event": _CpuEvent,
            "current_stream": _CpuStream,
            "default_stream": _CpuStream,
            "nvtx": types.SimpleNamespace(range_push=_nothing, range_pop=_nothing, range=_null_context),
        },
    )
    factories = {name: _on_cpu(getattr(torch, name)) for name in _FACTORIES}
    return _FallThrough(torch, {"cuda": cuda, **factories})


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if isinstance(device, int) or str(device).startswith("cuda"):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


def _patch_rng() -> None:
    """The tensor-parallel RNG tracker keeps CUDA generator states; without CUDA it keeps the CPU generator's."""
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()  # type: ignore[attr-defined]
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)  # type: ignore[attr-defined]


def _patch_tensor_types() -> None:
    """``Tensor.cuda`` becomes the identity; three functions that compare ``Tensor.type()`` see CUDA's type names."""
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign, assignment]
    optimizer = importlib.import_module("megatron.core.optimizer.optimizer")
    clip_grads = importlib.import_module("megatron.core.optimizer.clip_grads")
    distrib = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    clip = _with_cuda_type_names(clip_grads.clip_grad_by_total_norm_fp32)
    for module in (clip_grads, optimizer):
        module.clip_grad_by_total_norm_fp32 = clip  # type: ignore[attr-defined]
    for cls in (optimizer.Float16OptimizerWithFloat16Params, distrib.DistributedOptimizer):
        cls.__init__ = _with_cuda_type_names(cls.__init__)


def _with_cuda_type_names(function: Callable[..., Any]) -> Callable[..., Any]:
    real_type = torch.Tensor.type

    def type_as_on_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = real_type(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        torch.Tensor.type = type_as_on_cuda  # type: ignore[method-assign, assignment]
        try:
            return function(*args, **kwargs)
        finally:
            torch.Tensor.type = real_type  # type: ignore[method-assign]

    return call


def _patch_distributed_adam() -> None:
    """Let the distributed optimizer load a checkpoint into torch's Adam, which takes TransformerEngine's place here.

    Torch counts steps for each parameter, in a tensor that its first step allocates. Megatron-Core asks for it before
    it loads anything, then puts one tensor in the place of all of them, each of which Adam would count up, and at last
    looks for it among what was saved, where it is not.
    """
    cls = importlib.import_module("megatron.core.optimizer.distrib_optimizer").DistributedOptimizer
    state_dict, set_states = cls.state_dict, cls._set_main_param_and_optimizer_states

    def allocated_state_dict(self: Any) -> Any:
        for parameter in (parameter for group in self.optimizer.param_groups for parameter in group["params"]):
            if not self.optimizer.state[parameter]:
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
        return state_dict(self)

    def set_states_and_step(self: Any, model_parameter: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        group, place = self.model_param_group_index_map[model_parameter]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][place]]
        state["step"] = state["step"].clone()
        set_states(self, model_parameter, {**tensors, "step": state["step"]})

    cls.state_dict, cls._set_main_param_and_optimizer_states = allocated_state_dict, set_states_and_step
