"""Compiles the Triton kernels ahead of time, for GPUs that need not be there, and reads what the compiler made of them.

A program of its own (interpreter and compiler do not share a process). Prints one JSON list of reports, one per kernel,
each with the faults found in it:
- spills: registers that went to local memory, or any stack;
- narrow accesses: global loads or stores of less than 16 bytes beyond the few scalars of a program.
Arguments: ``product`` or ``planted`` (kernels with a fault), then ``--tools DIR`` to look for the disassembler there.
"""

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastadv.kernels import l2_step, linf_step
from fastadv.kernels.ball import BLOCK, NUM_WARPS

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    **dict.fromkeys(["adv_ptr", "x_ptr", "step_ptr", "eps_ptr"], "*fp32"),
    **dict.fromkeys(["squares_ptr", "sums_ptr"], "*fp64"),
    **dict.fromkeys(["num_groups", "step_stride", "eps_stride"], "i32"),
    **dict.fromkeys(["lo", "hi"], "fp32"),
    "mask_ptr": "*u8",
    "nonfinite_ptr": "*i32",
}
# Per kernel: tensors of pixels it reads and writes (besides gradient and mask), scalars it reads and writes.
ACCESSES = {
    "linf_step_kernel": dict(reads=["adv", "grad", "x"], writes=1, scalar_reads=2, scalar_writes=1),
    "grad_squares_kernel": dict(reads=["grad"], writes=0, scalar_reads=0, scalar_writes=2),
    "move_kernel": dict(reads=["adv", "grad", "x"], writes=1, scalar_reads=2, scalar_writes=1),
    "project_kernel": dict(reads=["adv", "x"], writes=1, scalar_reads=2, scalar_writes=0),
}


def product():
    """Every kernel as it is launched for images whose number of pixels is a multiple of 16, and of 4 in fp32."""
    for sm in (80, 90):
        for dtype in ("fp32", "bf16", "fp16"):
            for masked in (False, True):
                yield linf_step.linf_step_kernel, sm, dtype, dict(ALIGN=16, MASKED=masked, FLAGGED=True), {}
        yield linf_step.linf_step_kernel, sm, "fp32", dict(ALIGN=4, MASKED=False, FLAGGED=True), {}
        for dtype in ("fp32", "bf16"):
            yield l2_step.grad_squares_kernel, sm, dtype, dict(ALIGN=16, MASKED=False, FLAGGED=True), {}
            yield l2_step.move_kernel, sm, dtype, dict(ALIGN=16, MASKED=True), {}
        yield l2_step.project_kernel, sm, "fp32", dict(ALIGN=16, MASKED=True), {}


def planted():
    """Faults: images that start anywhere, so that every access is scalar; half of the registers that are needed."""
    aligned = dict(ALIGN=16, MASKED=False, FLAGGED=True)
    for sm in (80, 90):
        yield linf_step.linf_step_kernel, sm, "fp32", aligned | dict(ALIGN=1), {}
        yield linf_step.linf_step_kernel, sm, "fp32", aligned, dict(maxnreg=24)


def cubin(kernel, sm, types, constants, options):
    """The machine code of a kernel: types by the names of its arguments, constants by those in capitals."""
    names = kernel.arg_names
    # Pointers are 16-byte aligned, as those of allocated tensors are.
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.endswith("_ptr")}
    source = ASTSource(
        kernel,
        signature={name: "constexpr" if name.isupper() else types[name] for name in names},
        constexprs=constants,
        attrs=attributes,
    )
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options).asm["cubin"]


def disassemble(binary, tools):
    """What the cubin uses (REG, STACK and LOCAL), and its machine code as text."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        commands = [[tools / "cuobjdump", "--dump-resource-usage", file.name], [tools / "nvdisasm", "-c", file.name]]
        usage, code = (subprocess.run(c, check=True, capture_output=True, text=True).stdout for c in commands)
    used = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    assert used.keys() == {"REG", "STACK", "LOCAL"}, f"cuobjdump printed no resource usage: {usage!r}"
    return used, code


def report(kernel, sm, dtype, constants, options, tools):
    types = TYPES | {"grad_ptr": f"*{dtype}"}
    told = {"num_warps": NUM_WARPS, "enable_fp_fusion": False, **options}
    used, code = disassemble(cubin(kernel, sm, types, {"BLOCK": BLOCK, **constants}, told), tools)
    loads, stores = (re.findall(rf"\b{word}\b([.\w]*)", code) for word in ("LDG", "STG"))
    narrow = [sum(".128" not in access for access in accesses) for accesses in (loads, stores)]
    found = dict(
        wide_loads=len(loads) - narrow[0],
        wide_stores=len(stores) - narrow[1],
        narrow_loads=narrow[0],
        narrow_stores=narrow[1],
        local=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        **used,
    )
    name = f"{kernel.__name__} sm_{sm} {dtype} {constants} {options}"
    return dict(name=name, **found, faults=faults(kernel.__name__, dtype, constants, found))


def faults(kernel, dtype, constants, found):
    """What is wrong with a kernel, in words; empty where nothing is."""
    wrong = []
    if found["local"] or found["STACK"] or found["LOCAL"]:
        wrong.append(f"spills: {found['local']} local accesses, stack {found['STACK']}, local {found['LOCAL']}")
    expected = ACCESSES[kernel]
    bytes_per_thread = BLOCK * 4 // (NUM_WARPS * 32)
    wide = {"adv": bytes_per_thread // 16, "x": bytes_per_thread // 16}
    wide["grad"] = wide["adv"] if dtype == "fp32" else wide["adv"] // 2
    # A mask of one byte per pixel is read 8 bytes at a time: a thread has no more of it.
    narrow_loads = expected["scalar_reads"] + constants["MASKED"]
    if found["narrow_loads"] > narrow_loads or found["wide_loads"] < sum(wide[t] for t in expected["reads"]):
        wrong.append(f"narrow loads: {found['narrow_loads']} (scalars and mask: {narrow_loads})")
    narrow_stores = expected["scalar_writes"]
    if found["narrow_stores"] > narrow_stores or found["wide_stores"] < wide["adv"] * expected["writes"]:
        wrong.append(f"narrow stores: {found['narrow_stores']} (scalars: {narrow_stores})")
    return wrong


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("kernels", choices=["product", "planted"])
    parser.add_argument("--tools", type=Path, default=TOOLS)
    chosen = parser.parse_args()
    kernels = product() if chosen.kernels == "product" else planted()
    print(json.dumps([report(*kernel, chosen.tools) for kernel in kernels], indent=1))


if __name__ == "__main__":
    main()
