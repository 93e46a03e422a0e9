"""Compile the kernels for a GPU, without one, through the functions that launch them, and print what came out.

    python tests/ops/compile_kernels.py                 # for a Hopper; or ampere, blackwell (GeForce), mi300
    python tests/ops/compile_kernels.py mi300 reading   # only the kernels of read_states, or another of `WORK`

One JSON line per kernel: its name and shape, registers, bytes spilled, bytes of shared memory, and how often it loads
or stores 16 bytes, and single bytes; of a step's loads also how many are under way before anything waits for one, at a
special function or a barrier. Of an AMD GPU's only spills, in registers, and shared memory.
Not under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from ghostssm.ops import gpu
from ghostssm.ops.decode import StepWeights
from ghostssm.ops.state_format import FORMATS, StateStorage, quantise

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


TARGETS = {
    "hopper": GPUTarget("cuda", 90, 32),
    "ampere": GPUTarget("cuda", 80, 32),
    "blackwell": GPUTarget("cuda", 120, 32),
    "mi300": GPUTarget("hip", "gfx942", 64),
}


@dataclass
class Driver:
    """What triton asks of a driver before it launches anything."""

    target: GPUTarget

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


def launches(run: Callable[[], object]) -> Iterator[tuple[str, Any]]:
    """Name and compiled form of every kernel that a call would launch; none runs."""
    found, original = [], JITFunction.run

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = original(self, *args, **(kwargs | {"warmup": True}))
        found.append((self.__name__, kernel))
        return kernel

    JITFunction.run = compile_only
    try:
        run()
    finally:
        JITFunction.run = original
    yield from found


def told(tool: str, content: bytes, *options: str) -> str:
    """What one of CUDA's tools says of a file."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        done = subprocess.run([TOOLS / tool, *options, file.name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def report(shape: str, run: Callable[[], object]) -> None:
    for name, compiled in launches(run):
        found = {"kernel": name, "shape": shape, "shared": compiled.metadata.shared}
        found |= of_amd(compiled.asm["amdgcn"]) if "amdgcn" in compiled.asm else of_nvidia(name, compiled.asm)
        print(json.dumps(found), flush=True)


def of_amd(machine_code: str) -> dict[str, int]:
    return {"spilled": sum(map(int, re.findall(r"vgpr_spill_count: +(\d+)", machine_code)))}


def of_nvidia(name: str, forms: dict[str, Any]) -> dict[str, int]:
    used = told("cuobjdump", forms["cubin"], "--dump-resource-usage")
    found = {
        "registers": int(re.findall(r"REG:(\d+)", used)[-1]),
        "spilled": int(re.findall(r"STACK:(\d+)", used)[-1]),
        "wide_loads": forms["ptx"].count("ld.global.v4"),
        "wide_stores": forms["ptx"].count("st.global.v4"),
        "byte_accesses": len(re.findall(r"(?:ld|st)\.global(?:\.\w+)*\.[bus]8\b", forms["ptx"])),
    }
    if name in ("step_state", "stored_scan"):  # to disassemble takes long
        instructions = told("nvdisasm", forms["cubin"], "-c")
        before_waiting = re.split(r"\b(?:MUFU|BAR)\b", instructions)[0]
        found["early_wide_loads"] = before_waiting.count("LDG.E.128")
        found["early_loads"] = before_waiting.count("LDG")
        found |= {"fused": instructions.count("FFMA"), "instructions": instructions.count(";")}
    return found


def decode_step(
    p: int, r: int, state_dtype: torch.dtype, maps: bool = False, gate: bool = False
) -> Callable[[], object]:
    heads, n, dtype = 4, 128 if maps else r, torch.bfloat16
    inner, channels = heads * p, heads * p + 2 * n
    rows = torch.zeros(2, (inner + channels + heads + 7) // 8 * 8, dtype=dtype)
    some = torch.zeros(heads, dtype=dtype)
    weights = StepWeights(
        torch.zeros(channels, 4, dtype=dtype), torch.zeros(channels, dtype=dtype), some, some, some, 1, p,
        *(torch.zeros(1, n, r, dtype=dtype) if maps else None for _ in range(2)),
    )  # fmt: skip
    z, xBC, dt = (
        rows[:, :inner],
        rows[:, inner : inner + channels],
        rows[:, inner + channels : inner + channels + heads],
    )
    window, state = torch.zeros(2, channels, 4, dtype=dtype), torch.zeros(2, heads, p, r, dtype=state_dtype)
    return lambda: gpu.kernels("step").decode_step_(window, state, xBC, dt, z if gate else None, weights)


def stored_step(storage: StateStorage, n: int, length: int = 1) -> Callable[[], object]:
    x, dt, B = torch.zeros(2, length, 4, 64), torch.zeros(2, length, 4), torch.zeros(2, length, 1, n)
    stored = quantise(torch.zeros(2, 4, 64, n), storage)
    return lambda: gpu.kernels("stored").stored_scan_(stored, storage, x, dt, dt[0, 0], B, B, dt[0, 0])


def gradients(n: int, dtype: torch.dtype, tokens: int = 80) -> Callable[[], object]:
    heads, p = 16, 64
    x, B = torch.zeros(1, tokens, heads, p, dtype=dtype), torch.zeros(1, tokens, 1, n, dtype=dtype)
    dt, state = torch.zeros(1, tokens, heads), torch.zeros(1, heads, p, n)
    return lambda: gpu.kernels("chunks").ssd_backward(x, dt, dt[0, 0], B, B, dt[0, 0], state, x, state)


def reading(n: int) -> Callable[[], object]:
    heads, p, at = 16, 64, torch.tensor([0, 70])
    x, B, dt = torch.zeros(1, 80, heads, p), torch.zeros(1, 80, 1, n), torch.zeros(1, 80, heads)
    u = torch.zeros(1, len(at), heads, 9, p)
    return lambda: gpu.kernels("chunks").read_states(x, dt, dt[0, 0], B, u, at, None)


def steps() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for r in (128, 96, 64, 32, 16):
            report(f"p 64, N' {r}, {dtype}", decode_step(64, r, dtype))
    report("p 64, N' 96, gated", decode_step(64, 96, torch.float32, gate=True))
    report("p 80, N' 80", decode_step(80, 80, torch.float32))
    report("p 128, N' 256", decode_step(128, 256, torch.float32))
    report("projected 128 to 48", decode_step(64, 48, torch.float32, maps=True))
    y = torch.zeros(2, 5120)
    report("5120", lambda: gpu.kernels("norm").norm_step(y, y, y[0], 1e-5, 1, torch.bfloat16, gate_first=True))


def training() -> None:
    for n in (128, 64, 60, 32):
        report(f"p 64, N {n}", gradients(n, torch.float32))
    report("p 64, N 128, bfloat16", gradients(128, torch.bfloat16))
    report("p 64, N 128, one token", gradients(128, torch.float32, tokens=1))


def readings() -> None:
    for n in (128, 60):
        report(f"p 64, N {n}, 9 directions", reading(n))


def scans() -> None:
    kernels = gpu.kernels("scan")
    for n in (128, 96, 64, 16):
        x, B, dt = torch.zeros(1, 8, 2, 64), torch.zeros(1, 8, 1, n), torch.zeros(1, 8, 2)
        report(f"N {n}", lambda x=x, B=B, dt=dt: kernels.channel_energies(x, dt, dt[0, 0], B, B, None))
        report(f"N {n}", lambda x=x, B=B, dt=dt: kernels.ssd(x, dt, dt[0, 0], B, B, dt[0, 0], None))


def stored() -> None:
    for rounding in ("nearest", "stochastic"):
        for form in list(FORMATS)[1:]:
            for n in (128, 64) if rounding == "nearest" else (64, 60):
                report(f"p 64, N {n}, {form} {rounding}", stored_step(StateStorage.of(form, rounding), n))
        tiers = StateStorage.of("tiers", rounding).with_tiers(((16, 48), (8, 24), (0, 0), (30, 3)))
        report(f"p 64, N 64, tiers {rounding}", stored_step(tiers, 64))
    report("p 64, N 64, int8, several tokens", stored_step(StateStorage.of("int8"), 64, length=3))


WORK = {"step": steps, "training": training, "reading": readings, "scan": scans, "stored": stored}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", choices=TARGETS, default="hopper")
    parser.add_argument("work", nargs="*", help=f"of {', '.join(WORK)}; all of it unless given")
    args = parser.parse_args()
    target = TARGETS[args.target]
    driver.set_active(Driver(target))
    generation = target.backend, target.arch // 10 if isinstance(target.arch, int) else 9
    with mock.patch.object(gpu, "generation", return_value=generation):
        for name in args.work or WORK:
            WORK[name]()


if __name__ == "__main__":
    main()
