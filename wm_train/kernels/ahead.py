"""Compile kernels for GPUs that are not here, and say what they would use: registers, spills, shared memory.

`python -m wm_train.kernels.ahead` prints the table; it must run without TRITON_INTERPRET. `hot` kernels are those of a training step at
production shapes (D = 112, bf16 tokens); a spill there is a defect.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes a program may have


@dataclass(frozen=True)
class Build:
    """One specialisation. arguments: name -> Triton type ("*fp32", "i32"); constants: name -> value, None for absent pointers."""

    name: str
    kernel: Any
    arguments: dict[str, str]
    constants: dict[str, Any]
    warps: int = 8
    stages: int = 2


@dataclass(frozen=True)
class Usage:
    """What the assembler says. spills in bytes stored and loaded per thread, shared in bytes per program, tensor_cores: instructions."""

    name: str
    architecture: int
    registers: int
    spills: int
    shared: int
    tensor_cores: str


def compile_for(build: Build, architecture: int) -> Usage:
    """Compile to PTX and machine code. Errors: whatever Triton or ptxas raise; nothing is caught."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: build.arguments.get(name, "constexpr") for name in build.kernel.arg_names}
    constants = {(build.kernel.arg_names.index(name),): value for name, value in build.constants.items()}
    # what a launch finds out for itself: PyTorch's pointers divide by 16
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(build.kernel.arg_names) if signature[name].startswith("*")}
    source = ASTSource(fn=build.kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": build.warps, "num_stages": build.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    ptx = compiled.asm["ptx"]
    registers, spills = _assemble(ptx)
    found = [x for x in ("tcgen05.mma", "wgmma.mma_async", "mma.sync") if x in ptx]
    return Usage(build.name, architecture, registers, spills, compiled.metadata.shared, found[0] if found else "none")


def _assemble(ptx: str) -> tuple[int, int]:
    """Registers and spilled bytes per thread, from ptxas -v."""
    from triton import knobs

    target = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    assert target is not None
    newer = int(re.sub(r"\D", "", target.group(1))) >= 100
    tool = knobs.nvidia.ptxas_blackwell.path if newer else knobs.nvidia.ptxas.path
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [tool, "-v", f"--gpu-name={target.group(1)}", str(file), "-o", str(Path(folder) / "kernel.cubin")]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    used = re.search(r"Used (\d+) registers", report)
    assert used is not None, report
    return int(used.group(1)), sum(int(n) for n in re.findall(r"(\d+) bytes spill", report))


def scan_builds(mode: str = "tf32", d: int = 112) -> list[Build]:
    """The recurrences at D = E = d, both directions; the normaliser's E = 1 for the kernels whose work depends on it."""
    from wm_train.kernels import scan_kernels as kernels

    f, i8 = "*fp32", "*i8"
    sizes = {"D": d, "DP": 128 if d > 64 else 64, "MODE": mode}
    common = {"decay": f, "gram": f, "frames": "i32", "heads": "i32", "segment": "i32", "open_edges": i8}
    builds = []
    for e, rows in ((d, 32), (1, 16)):
        shape = {**sizes, "E": e, "ROWS": rows, "REVERSE": "exclusive"}
        tag = f"E{e}"
        states = {**common, "update": f, "start_forward": f, "start_reverse": f, "ahead": f, "final": f}
        builds.append(Build(f"states {tag}", kernels.states_kernel, states, {**shape, "STARTS": 3, "SEEN": False, "behind": None}))
        builds.append(Build(f"seen states {tag}", kernels.states_kernel, {**states, "behind": f}, {**shape, "STARTS": 3, "SEEN": True}))
        ends = {**common, "update": f, "composite": f, "end_forward": f, "end_reverse": f, "state_tiles": "i32"}
        builds.append(Build(f"composites {tag}", kernels.composites_kernel, ends, shape))
        adjoint = {**common, "grads": f, "from_right": f, "from_left": f, "toward": f, "back": f, "to_left": f, "to_right": f}
        builds.append(Build(f"adjoint {tag}", kernels.adjoint_kernel, adjoint, {**shape, "STARTS": 3, "KEEP": True}))
        outer = dict.fromkeys(("decay", "gram", "ahead", "behind", "toward", "back", "d_decay", "d_gram", "d_update"), f)
        builds.append(Build(f"outer {tag}", kernels.outer_kernel, outer, shape))
    compose = dict.fromkeys(("composite", "end_ahead", "end_back", "start_ahead", "start_back", "first_ahead", "first_back"), f)
    compose |= {"passes": i8, "parts": "i32"}
    constants = {"E": d, "D": d, "DP": sizes["DP"], "ROWS": 32, "FIRSTS": 3, "MODE": "tf32x3"}
    builds.append(Build("compose", kernels.compose_kernel, compose, constants))
    return builds


def hot_builds() -> list[Build]:
    """Every kernel of a training step at production shapes."""
    return scan_builds()


def table(usages: list[Usage]) -> str:
    rows = ["| kernel | sm | registers | spilled bytes | shared bytes | tensor cores |", "|---|---|---|---|---|---|"]
    rows += [f"| {u.name} | {u.architecture} | {u.registers} | {u.spills} | {u.shared} | {u.tensor_cores} |" for u in usages]
    return "\n".join(rows)


def main(arguments: list[str]) -> int:
    """python -m wm_train.kernels.ahead [architecture …]"""
    architectures = [int(x) for x in arguments] or list(ARCHITECTURES)
    print(table([compile_for(build, sm) for build in hot_builds() for sm in architectures]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
