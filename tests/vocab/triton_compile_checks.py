"""Every launch of the Triton row kernels compiles for sm_90: no spills, room for two programs per SM, wide accesses.

Needs no GPU: ptxas and cuobjdump are part of Triton's wheel. Not collected by its name: `test_vocab_triton.py` runs it
in a process that has Triton.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_rlvr.vocab import triton_kernels, triton_rows

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64"}
REGISTERS_PER_SM = 65536
# What Triton learns of the integers at a launch: whether they are 1 and whether 16 divides them.
INTEGERS = {
    "aligned": {"width": 16, "spans": 2, "row_stride": 16, "out_stride": 16, "logits_stride": 16},
    "ragged-width": {"width": 5, "spans": 2, "row_stride": 16, "out_stride": 16, "logits_stride": 16},
    "ragged-rows": {"width": 5, "spans": 2, "row_stride": 5, "out_stride": 5, "logits_stride": 5},
    "narrow": {"width": 16, "spans": 1, "row_stride": 16, "out_stride": 16, "logits_stride": 16},
    "one-column": {"width": 1, "spans": 1, "row_stride": 1, "out_stride": 1, "logits_stride": 1},
}
HARDER = [kind for kind in INTEGERS if kind != "aligned"]
WIDE = {"aligned", "ragged-width", "narrow"}


class Compiled(NamedTuple):
    registers: int
    stack: int
    ptx: str


def compiled(kernel: object, dtypes: dict[str, torch.dtype], constants: dict[str, object], kind: str, warps: int):
    """Compile as a launch would: pointers are 16-byte aligned, integers are specialised according to ``kind``."""
    signature, known, attributes = {}, dict(constants), {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in INTEGERS[kind]:
            value = INTEGERS[kind][name]
            signature[name] = "constexpr" if value == 1 else "i32"
            if value == 1:
                known[name] = 1
            elif value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = POINTERS[dtypes.get(name, torch.float32)]
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=known, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})


def inspect(binary, folder: Path) -> Compiled:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    text = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return Compiled(usage["REG"], usage["STACK"] + usage["LOCAL"], binary.asm["ptx"])


def check(result: Compiled, launch: triton_rows.Launch, kind: str, record: object) -> None:
    record("registers", result.registers)
    print(f"registers {result.registers}")
    assert result.stack == 0
    assert result.registers * launch.warps * 32 * 2 <= REGISTERS_PER_SM
    pipelined = "cp.async.cg.shared.global" in result.ptx
    assert pipelined == (kind in WIDE), "cp.async of 16 bytes is how the loop loads ahead"


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(dtype, "aligned") for dtype in triton_rows.LOGIT_DTYPES] + [(torch.bfloat16, kind) for kind in HARDER],
    ids=str,
)
@pytest.mark.parametrize(
    ("extras", "launch"),
    [(extras, launch) for extras, launches in triton_rows.STATE_LAUNCHES.items() for launch in launches],
)
def test_state_kernel(
    extras: bool, launch: triton_rows.Launch, dtype: torch.dtype, kind: str, tmp_path: Path, record_property: object
) -> None:
    dtypes = {"logits": dtype, "columns": torch.int64}
    constants = {"EXTRAS": extras, "BLOCK": launch.block}
    binary = compiled(triton_kernels.state_kernel, dtypes, constants, kind, launch.warps)
    check(inspect(binary, tmp_path), launch, kind, record_property)


@pytest.mark.parametrize(
    ("dtype", "out_dtype", "kind"),
    [
        (torch.float16, torch.float16, "aligned"),
        (torch.float32, torch.float32, "aligned"),
        (torch.float32, torch.bfloat16, "aligned"),
        (torch.float32, torch.float16, "aligned"),
        *[(torch.bfloat16, torch.bfloat16, kind) for kind in INTEGERS],
    ],
    ids=str,
)
@pytest.mark.parametrize("launch", triton_rows.GRADIENT_LAUNCHES)
def test_gradient_kernel(
    launch: triton_rows.Launch,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    kind: str,
    tmp_path: Path,
    record_property: object,
) -> None:
    dtypes = {"logits": dtype, "out": out_dtype, "columns": torch.int64}
    constants = {"SPAN": triton_rows.SPAN * launch.block, "BLOCK": launch.block}
    binary = compiled(triton_kernels.gradient_kernel, dtypes, constants, kind, launch.warps)
    result = inspect(binary, tmp_path)
    check(result, launch, kind, record_property)
    assert ("st.global.v4.b32" in result.ptx) == (kind in WIDE)
