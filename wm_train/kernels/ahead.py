"""Compile kernels for GPUs that are not present, and report registers, spills and shared memory.

`python -m wm_train.kernels.ahead` prints the table; it must run without TRITON_INTERPRET.
`builds.py` lists what it compiles.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from wm_train.kernels.gdn.builds import Build, scan_builds, token_builds

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes a program may have


@dataclass(frozen=True)
class Usage:
    """Store what the assembler reports.

    spills: bytes stored and loaded per thread; shared: bytes per program; tensor_cores: number of
    tensor-core instructions.
    """

    name: str
    architecture: int
    registers: int
    spills: int
    shared: int
    tensor_cores: str


def compile_for(build: Build, architecture: int) -> Usage:
    """Compile to PTX and machine code. Raises whatever Triton or ptxas raise; nothing is caught."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: build.arguments.get(name, "constexpr") for name in build.kernel.arg_names}
    constants = {
        (build.kernel.arg_names.index(name),): value for name, value in build.constants.items()
    }
    # what a launch finds out for itself: PyTorch's pointers divide by 16
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(build.kernel.arg_names)
        if signature[name].startswith("*")
    }
    source = ASTSource(fn=build.kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": build.warps, "num_stages": build.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    ptx = compiled.asm["ptx"]
    registers, spills = _assemble(ptx)
    found = [x for x in ("tcgen05.mma", "wgmma.mma_async", "mma.sync") if x in ptx]
    return Usage(
        build.name,
        architecture,
        registers,
        spills,
        compiled.metadata.shared,
        found[0] if found else "none",
    )


def _assemble(ptx: str) -> tuple[int, int]:
    """Return registers and spilled bytes per thread, from ptxas -v."""
    from triton import knobs

    target = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    assert target is not None
    newer = int(re.sub(r"\D", "", target.group(1))) >= 100
    tool = knobs.nvidia.ptxas_blackwell.path if newer else knobs.nvidia.ptxas.path
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [
            tool,
            "-v",
            f"--gpu-name={target.group(1)}",
            str(file),
            "-o",
            str(Path(folder) / "kernel.cubin"),
        ]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    used = re.search(r"Used (\d+) registers", report)
    assert used is not None, report
    return int(used.group(1)), sum(int(n) for n in re.findall(r"(\d+) bytes spill", report))


def table(usages: list[Usage]) -> str:
    """Format the results as a Markdown table."""
    rows = [
        "| kernel | sm | registers | spilled bytes | shared bytes | tensor cores |",
        "|---|---|---|---|---|---|",
    ]
    rows += [
        f"| {u.name} | {u.architecture} | {u.registers} | {u.spills} | {u.shared} |"
        f" {u.tensor_cores} |"
        for u in usages
    ]
    return "\n".join(rows)


def all_builds() -> list[Build]:
    """Return every build, recurrences first."""
    return [*scan_builds(), *token_builds()]


def compile_named(name: str, architecture: int) -> Usage:
    """Compile a build given its name, as builds cannot be sent between processes."""
    return compile_for(next(build for build in all_builds() if build.name == name), architecture)


def main(arguments: list[str]) -> int:
    """Print the table, using all CPUs: `[architecture …] [--only kernel …]`."""
    split = arguments.index("--only") if "--only" in arguments else len(arguments)
    architectures, names = (
        [int(x) for x in arguments[:split]] or list(ARCHITECTURES),
        arguments[split + 1 :],
    )
    found = [build.name for build in all_builds() if not names or build.name in names]
    unknown = set(names) - set(found)
    if unknown or set(architectures) - set(ARCHITECTURES):
        print(
            f"ahead: got kernels {sorted(unknown)} or architectures {architectures}, expected some"
            f" of {ARCHITECTURES}. Fix: no arguments"
        )
        return 2
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(compile_named, name, sm) for name in found for sm in architectures]
        print(table([job.result() for job in jobs]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
