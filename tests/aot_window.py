"""Compiles the window attention kernels ahead of time, for GPUs that need not be there, and reads what came out.

A program of its own (interpreter and compiler do not share a process). Prints JSON: for each argument a list of
reports, one per kernel, each with the faults found in it:
- spills: registers that went to local memory, or any stack. A promise for half precision up to head dimension 32 where
  the table does not learn; elsewhere reported, not a fault;
- tensor cores: half precision without their instructions (HGMMA on sm_90 for tiles of 64 rows, else HMMA);
- narrow accesses: q, k, v or what is written for them in pieces of less than 16 bytes;
- waiting: half precision without asynchronous copies.
Arguments: ``product``, ``planted`` (kernels with a fault) or both; ``--all`` for every kernel there is instead of those
that the shipped and the usual Swin networks run; ``--tools DIR`` to look for the disassembler there.
"""

import argparse
import itertools
import json
import re
from pathlib import Path

import torch
from aot_checker import TOOLS, cubin, disassemble

from fastadv.kernels import window, window_attention, window_attention_backward

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FORWARD = window_attention.window_attention_kernel
BACKWARD = window_attention_backward.window_attention_backward_kernel


def product():
    """Windows of 4 with head dimension 16 are the shipped network's, of 7 with 32 those of timm's Swin."""
    for sm, (size, head_dim) in itertools.product((80, 90), ((4, 16), (7, 32))):
        for learns in (None, False):
            yield sm, "bf16", size, head_dim, learns, {}
    yield 90, "bf16", 7, 32, True, {}


def everything():
    for sm, dtype, size, head_dim in itertools.product((80, 90), DTYPES, (4, 7, 8), window.HEAD_DIMS):
        for learns in (None, False, True):
            yield sm, dtype, size, head_dim, learns, {}


def planted():
    """Faults: too few registers; products of float32, as a cast in the wrong place makes them."""
    for sm in (80, 90):
        yield sm, "bf16", 4, 16, False, dict(maxnreg=32)
        yield sm, "bf16", 4, 16, None, dict(computes="fp32")


def report(sm, dtype, size, head_dim, learns, options, tools):
    kernel = FORWARD if learns is None else BACKWARD
    rows, computes = window.rows_of_tile(size), options.get("computes", dtype)
    if learns is None:
        tiles = window_attention.tiles_for(DTYPES[computes])
    else:
        tiles = window_attention_backward.tiles_for(DTYPES[computes], learns)
    told = window.compile_options(tiles[rows, head_dim], DTYPES[computes], divmod(sm, 10))
    told |= {name: value for name, value in options.items() if name != "computes"}
    constants = dict(WINDOW=size, HEAD_DIM=head_dim, ROWS=rows) | ({} if learns is None else {"LEARNS": learns})
    types = dict.fromkeys(kernel.arg_names, f"*{computes}")
    types |= dict.fromkeys(window.SIZES, "i32") | {"table_ptr": "*fp32", "sums_ptr": "*fp32", "scale": "fp32"}
    used, code = disassemble(cubin(kernel, sm, types, constants, told), tools)
    stores, copies = re.findall(r"\bSTG\b([.\w]*)", code), re.findall(r"\bLDGSTS\b([.\w]*)", code)
    found = dict(
        HGMMA=len(re.findall(r"\bHGMMA\b", code)),
        HMMA=len(re.findall(r"\bHMMA\b", code)),
        local=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        copies=len(copies),
        narrow_copies=sum(".128" not in access for access in copies),
        narrow_stores=sum(".128" not in access for access in stores),
        **used,
    )
    name = f"{kernel.__name__} sm_{sm} {dtype} {constants} {options}"
    return dict(name=name, **found, faults=faults(sm, dtype, size, head_dim, learns, found))


def faults(sm, dtype, size, head_dim, learns, found):
    """What is wrong with a kernel, in words; empty where nothing is."""
    wrong = []
    half = dtype != "fp32"
    if half and head_dim <= 32 and not learns and (found["local"] or found["STACK"] or found["LOCAL"]):
        wrong.append(f"spills: {found['local']} local accesses, stack {found['STACK']}, local {found['LOCAL']}")
    cores = "HGMMA" if sm == 90 and size > 4 else "HMMA"
    # Two products forward, three more backward.
    if half and found[cores] < (2 if learns is None else 5):
        wrong.append(f"tensor cores: {found[cores]} {cores}")
    # A window's bias gradient is 49 x 49 floats, whose rows begin anywhere.
    if found["narrow_copies"] or (found["narrow_stores"] and not learns):
        wrong.append(f"narrow accesses: {found['narrow_copies']} loads, {found['narrow_stores']} stores")
    if half and not found["copies"]:
        wrong.append("waiting: no image is loaded while another is computed")
    return wrong


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("kernels", nargs="+", choices=["product", "planted"])
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--tools", type=Path, default=TOOLS)
    chosen = parser.parse_args()
    sources = {"product": everything if chosen.all else product, "planted": planted}
    reports = {name: [report(*kernel, chosen.tools) for kernel in sources[name]()] for name in chosen.kernels}
    print(json.dumps(reports, indent=1))


if __name__ == "__main__":
    main()
