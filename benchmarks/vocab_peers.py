r"""Log-probability and entropy as other projects compute them, loaded from their own wheels where those are installed.

    pip install --target DIR --no-deps verl==0.9.1 liger-kernel==0.8.5 areal==1.0.4 skyrl==0.3.0 trl==1.16.0 \
        cut-cross-entropy==25.1.1

Nothing of them is copied here. Their packages need ray, CUDA, pandas and so on to be imported as a whole, so the one
file that matters is imported below an empty package of the same name; what its head imports and the calculation does
not use is replaced by a stub. Every method runs on the CPU with its project's own defaults.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional
from vocab_methods import Method, Outputs, Tensors, megatron, ours, torch_alone

INSTALL = (
    "pip install --target DIR --no-deps verl==0.9.1 liger-kernel==0.8.5 areal==1.0.4 skyrl==0.3.0 trl==1.16.0 "
    "cut-cross-entropy==25.1.1"
)
NOT_RUN = {
    "slime, miles, prime-rl, ROLL": "no wheel of them on PyPI (`slime` and `roll` there are other projects)",
    "NeMo-RL": "`nemo-rl` 0.0.0 on PyPI is an empty placeholder; SkyRL's log-prob functions are a port of its own",
    "Triton heads of verl and SkyRL, Liger's CuTe kernels, quack, fla, CCE's kernel, TransformerEngine": "need CUDA",
}


def verl(directory: Path) -> list[Method]:
    """The Megatron path of verl (entropy, and cross entropy of a copy, as its engine does) and its FSDP head."""
    sharded = import_module_file(directory, "verl.utils.megatron.tensor_parallel")
    head = import_module_file(directory, "verl.utils.experimental.torch_functional")

    def both(inputs: Tensors, targets: torch.Tensor, _: Any) -> Outputs:
        copy = inputs[0].clone()
        entropy = sharded.vocab_parallel_entropy(inputs[0])
        return sharded.vocab_parallel_log_probs_from_logits(copy, targets), entropy

    def fused(inputs: Tensors, targets: torch.Tensor, _: Any) -> Outputs:
        logprob, entropy = head.FusedLinearForPPOFunction.apply(*inputs, targets)
        return logprob, entropy

    return [
        Method("verl, Megatron path", False, True, both, compiled=True, widened=True),
        Method("verl FusedLinearForPPO", True, False, fused),
    ]


def areal(directory: Path) -> list[Method]:
    """AReaL's chunked log-probs and entropy."""
    stub_module("areal.infra.platforms", is_npu_available=False)
    module = import_module_file(directory, "areal.utils.functional.vocab_parallel")

    def both(inputs: Tensors, targets: torch.Tensor, group: Any) -> Outputs:
        logprob, entropy = module.gather_logprobs_entropy(inputs[0], targets, tp_group=group)
        return logprob, entropy

    return [Method("AReaL", False, True, both, compiled=True)]


def skyrl(directory: Path) -> list[Method]:
    """SkyRL: NeMo-RL's log-probs and verl's entropy from logits, and log-probs alone from hidden states."""
    module = import_module_file(directory, "skyrl.backends.skyrl_train.distributed.megatron.model_utils")
    chunk = 1024  # its `logprobs_chunk_size`

    def bounds(width: int, group: Any) -> tuple[int, int]:
        return dist.get_rank(group) * width, (dist.get_rank(group) + 1) * width

    def both(inputs: Tensors, targets: torch.Tensor, group: Any) -> Outputs:
        logits, places = inputs[0][None], bounds(inputs[0].shape[1], group)
        entropy = module.vocab_parallel_entropy(logits)[0]
        if len(targets) > chunk:
            logprob = module.ChunkedDistributedLogprob.apply(logits, targets[None], *places, chunk, group)
        else:
            logprob = module.DistributedLogprob.apply(logits, targets[None], *places, group)
        return logprob[0], entropy

    def fused(inputs: Tensors, targets: torch.Tensor, group: Any) -> Outputs:
        function, places = module.FusedLinearChunkedDistributedLogprob, bounds(len(inputs[1]), group)
        return function.apply(inputs[0][None], inputs[1], targets[None], *places, chunk, group)[0], None

    return [
        Method("SkyRL", False, True, both, compiled=True, widened=True),
        Method("SkyRL fused head", True, True, fused),
    ]


def trl(directory: Path) -> list[Method]:
    """TRL's functions of logits, taken out of a module that imports half of Hugging Face, and its chunked head."""
    names = ("selective_log_softmax", "entropy_from_logits")
    functions = _functions(directory / "trl" / "trainer" / "utils.py", names, is_triton_available=lambda: False)
    stub_module("trl.trainer.utils", maybe_gather_lm_head_ctx=lambda *_: contextlib.nullcontext())
    module = import_module_file(directory, "trl.kernels.chunked_logprob")

    def both(inputs: Tensors, targets: torch.Tensor, _: Any) -> Outputs:
        return functions["selective_log_softmax"](inputs[0], targets), functions["entropy_from_logits"](inputs[0])

    def fused(inputs: Tensors, targets: torch.Tensor, _: Any) -> Outputs:
        outputs = ("entropy",)
        logprob, entropy, *_rest = module.ChunkedLogProbFunction.apply(
            *inputs, None, targets, 1.0, 8192, None, 1.0, outputs
        )
        return logprob, entropy

    return [Method("TRL", False, False, both), Method("TRL chunked head", True, False, fused)]


def liger(directory: Path) -> list[Method]:
    """Liger's torch fallbacks, which run wherever its Hopper kernels do not."""
    module = import_module_file(directory, "liger_kernel.ops.fused_linear_scaled_cross_entropy")

    def whole(inputs: Tensors, targets: torch.Tensor, _: Any) -> Outputs:
        nll, entropy = module.LigerFusedLinearScaledCrossEntropyFunction.apply(*inputs, targets, return_entropy=True)
        return -nll, entropy

    def sharded(inputs: Tensors, targets: torch.Tensor, group: Any) -> Outputs:
        # Its public function refuses CPU tensors; this is what it falls back to.
        nll, entropy = module._apply_tp_fallback(*inputs, targets, 1.0, -100, True, group)
        return -nll, entropy

    return [Method("Liger fallback", True, False, whole), Method("Liger TP fallback", True, True, sharded)]


def cce(directory: Path) -> list[Method]:
    """Apple's cut cross-entropy in its torch.compile form, the only one without CUDA."""
    module = import_module_file(directory, "cut_cross_entropy.torch_compile")

    def whole(inputs: Tensors, targets: torch.Tensor, _: Any) -> Outputs:
        return -module.torch_compile_linear_cross_entropy(*inputs, targets, reduction="none"), None

    return [Method("CCE, torch_compile", True, False, whole, compiled=True)]


def load(directory: Path | None) -> tuple[list[Method], dict[str, str]]:
    """All methods that can run here, and why the others cannot."""
    methods, missing = ours() + torch_alone() + megatron(), dict(NOT_RUN)
    loaders = {
        "verl": verl,
        "areal": areal,
        "skyrl": skyrl,
        "trl": trl,
        "liger_kernel": liger,
        "cut_cross_entropy": cce,
    }
    for package, loader in loaders.items():
        if directory is None or not (directory / package).is_dir():
            missing[package] = f"not in --peers; get it with `{INSTALL}`"
        else:
            methods += loader(directory)
    return methods, missing


def import_module_file(directory: Path, name: str) -> Any:
    """Import one module of a package without running the package's own ``__init__`` files."""
    parents = name.split(".")[:-1]
    for depth in range(1, len(parents) + 1):
        package = stub_module(".".join(parents[:depth]))
        package.__path__ = [str(directory.joinpath(*parents[:depth]))]
    return importlib.import_module(name)


def stub_module(name: str, **attributes: Any) -> types.ModuleType:
    """A module of that name without content but ``attributes``, so that imports of it succeed."""
    module = sys.modules.setdefault(name, types.ModuleType(name))
    vars(module).update(attributes)
    return module


def _functions(path: Path, names: Sequence[str], **needs: Any) -> dict[str, Any]:
    """Run only the named functions of a file, given what their module would have imported."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    namespace: dict[str, Any] = {"torch": torch, "F": functional, **needs}
    exec(compile(tree, str(path), "exec"), namespace)
    return namespace
