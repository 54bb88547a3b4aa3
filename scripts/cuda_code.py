#!/usr/bin/env python3
"""What CUDA code a library holds:  scripts/cuda_code.py LIBRARY [WANTED...] [only:sm_NN...]

Fails unless every CUDA source in it was compiled for every WANTED: sm_NN (machine code) or compute_NN (PTX); except one source
for each only:sm_NN, with that architecture's own instructions and code for no other. Reads the section itself: cuobjdump is not
part of every CUDA installation.
"""
import pathlib
import struct
import subprocess
import sys
import tempfile

MAGIC = 0xBA55ED50
KINDS = {1: "compute_", 2: "sm_"}


def containers(section):
    """The code of each source: a header (magic, version, its size, size of what follows), and entries that begin with
    kind, version, their header's size, their size, and at byte 28 the architecture."""
    at = 0
    while at < len(section):
        magic, _, header, size = struct.unpack_from("<IHHQ", section, at)
        if magic == 0:  # padding
            at += 8
            continue
        if magic != MAGIC:
            sys.exit(f"cuda_code: no fat binary at byte {at} of .nv_fatbin")
        entry, end = at + header, at + header + size
        found = []
        while entry < end:
            kind, _, entry_header, entry_size = struct.unpack_from("<HHIQ", section, entry)
            (architecture,) = struct.unpack_from("<I", section, entry + 28)
            found.append(f"{KINDS.get(kind, f'kind_{kind}_')}{architecture}")
            entry += entry_header + entry_size
        yield sorted(found)
        at = end


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    library = sys.argv[1]
    wanted = {arch for arch in sys.argv[2:] if not arch.startswith("only:")}
    own = [[arch.removeprefix("only:")] for arch in sys.argv[2:] if arch.startswith("only:")]
    with tempfile.TemporaryDirectory() as directory:
        section = pathlib.Path(directory) / "fatbin"
        copy = pathlib.Path(directory) / "copy"
        subprocess.run(["objcopy", "--dump-section", f".nv_fatbin={section}", library, copy], check=False)
        if not section.exists():
            sys.exit(f"cuda_code: {library} holds no CUDA code")
        found = list(containers(section.read_bytes()))
    for code in found:
        print(*code)
    for code in own:
        if code not in found:
            sys.exit(f"cuda_code: no source for {code[0]} alone")
        found.remove(code)
    missing = [sorted(wanted - set(code)) for code in found if not wanted <= set(code)]
    if missing or not found:
        sys.exit(f"cuda_code: missing: {missing or 'everything'}")


if __name__ == "__main__":
    main()
