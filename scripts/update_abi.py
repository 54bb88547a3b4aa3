#!/usr/bin/env python3
"""The numbers of the C ABI: capi/abi.txt, which the tests of all languages compare themselves with.

    scripts/update_abi.py           rewrites it from capi/express.h: do this only when the change is meant
    scripts/update_abi.py --check   fails when the two differ

Sizes and offsets of every struct, and every enumerator, are found by reading the header and computed by the C compiler (CC).
"""
import difflib
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
HEADER, GOLDEN = ROOT / "capi" / "express.h", ROOT / "capi" / "abi.txt"
CC = os.environ.get("CC", "cc")


def expressions():
    """C expressions, in the order of the header."""
    text = subprocess.run([CC, "-std=c99", "-E", "-P", HEADER], capture_output=True, text=True, check=True).stdout
    yield "EXPRESS_AUTO"
    for kind, body, name in re.findall(r"typedef\s+(struct|enum)\s+\w+\s*\{([^{}]*)\}\s*(express_\w+)\s*;", text):
        if kind == "enum":
            yield from re.findall(r"EXPRESS_\w+", body)
            continue
        yield f"sizeof({name})"
        for member in re.findall(r"(\w+)\s*[,;]", body):
            yield f"offsetof({name}, {member})"


def numbers():
    lines = "".join(f'  printf("%s = %lld\\n", "{e}", (long long)({e}));\n' for e in expressions())
    with tempfile.TemporaryDirectory() as work:
        source, program = pathlib.Path(work, "abi.c"), pathlib.Path(work, "abi")
        source.write_text(f'#include <stdio.h>\n#include "{HEADER}"\nint main(void) {{\n{lines}  return 0;\n}}\n')
        subprocess.run([CC, "-std=c99", source, "-o", program], check=True)
        return subprocess.run([program], capture_output=True, text=True, check=True).stdout


def main():
    if sys.argv[1:] not in ([], ["--check"]):
        sys.exit("usage: scripts/update_abi.py [--check]")
    new = numbers()
    if not sys.argv[1:]:
        GOLDEN.write_text(new)
    old = GOLDEN.read_text()
    sys.stderr.writelines(difflib.unified_diff(old.splitlines(True), new.splitlines(True), "capi/abi.txt", "capi/express.h"))
    if old != new:
        sys.exit("The numbers of the ABI changed. If that is meant, run scripts/update_abi.py")
    print(f"{len(new.splitlines())} numbers of the ABI")


if __name__ == "__main__":
    main()
