#!/usr/bin/env python3
"""What a call costs in each language:  bench/bindings_overhead/run.py [--build build/release] [--rounds 15] [--calls 100000]

Builds the same small program in C, C++, Rust, Go and Python against one installed library, BUILD/stage, as scripts/test.sh leaves it
(Python: in BUILD/bindings/python/venv). Each round runs all of them, one after the other; medians and ranges over the rounds go to
stdout as Markdown, and all numbers to --json FILE. Exit code 77 if a language is not on this machine; with CI set, that is a failure.
"""
import argparse
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def missing(python):
    """What is not on this machine."""
    yield from (tool for tool in ("cc", "c++", "pkg-config", "cargo", "go") if shutil.which(tool) is None)
    if not python.exists() or subprocess.run([python, "-c", "import express_kv"], capture_output=True, check=False).returncode != 0:
        yield f"{python} with express_kv"


def build(stage, work):
    """Commands that run the programs, by language."""
    pc = next(stage.rglob("express.pc")).parent
    os.environ.update(PKG_CONFIG_PATH=str(pc), LD_LIBRARY_PATH=str(pc.parent), CARGO_TARGET_DIR=str(work / "rust"),
                      GOCACHE=str(work / "go-cache"), GOFLAGS="-mod=mod", GOPROXY="off")
    flags = subprocess.run(["pkg-config", "--cflags", "--libs", "express"], check=True, capture_output=True, text=True).stdout.split()
    work.mkdir(parents=True, exist_ok=True)
    for command, where in [
        (["cc", "-std=c99", "-O2", "overhead.c", *flags, "-o", work / "c"], HERE),
        (["c++", "-std=c++20", "-O2", "overhead.cc", *flags, "-o", work / "c++"], HERE),
        (["cargo", "build", "--release", "--quiet", "--offline"], HERE / "rust"),
        (["go", "build", "-o", work / "go", "."], HERE / "go"),
    ]:
        subprocess.run(command, cwd=where, check=True)
    return {"C": [work / "c"], "C++": [work / "c++"], "Rust": [work / "rust" / "release" / "overhead"], "Go": [work / "go"]}


def measure(commands, rounds, calls):
    """Nanoseconds of a step and of a look, by language, for every round. All languages must have computed the same."""
    runs, results = {name: [] for name in commands}, set()
    for _ in range(rounds):
        for name, command in commands.items():
            words = subprocess.run([*command[:2], str(calls), *command[2:]], check=True, capture_output=True, text=True).stdout.split()
            runs[name].append((float(words[0]), float(words[1])))
            results.add((words[2], words[3]))
    if len(results) != 1:
        sys.exit(f"the languages do not do the same: {results}")
    return runs


def table(runs):
    def cell(times):
        return f"{statistics.median(times) / 1e3:.3f} ({min(times) / 1e3:.3f} .. {max(times) / 1e3:.3f})"

    base = [statistics.median(x[i] for x in runs["C"]) for i in range(2)]
    yield "| | append + attend, µs | more than C, µs | express_bytes, µs | more than C, µs |"
    yield "|---|---|---:|---|---:|"
    for name, times in runs.items():
        steps, looks = [x[0] for x in times], [x[1] for x in times]
        more = [(statistics.median(x) - b) / 1e3 for x, b in zip((steps, looks), base)]
        yield f"| {name} | {cell(steps)} | {more[0]:.3f} | {cell(looks)} | {more[1]:.3f} |"


def processor():
    for line in open("/proc/cpuinfo", encoding="utf-8"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build" / "release")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=100000)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    at = args.build.resolve()
    python = at / "bindings" / "python" / "venv" / "bin" / "python"
    if lacking := list(missing(python)):
        print(f"NOT ON THIS MACHINE: {', '.join(lacking)}; NOTHING WAS MEASURED", file=sys.stderr)
        sys.exit(1 if os.environ.get("CI") else 77)
    commands = build(at / "stage", at / "bindings_overhead")
    commands["Python, NumPy"] = [python, HERE / "overhead.py"]
    if subprocess.run([python, "-c", "import torch"], capture_output=True, check=False).returncode == 0:
        commands["Python, PyTorch"] = [python, HERE / "overhead.py", "torch"]
    runs = measure(commands, args.rounds, args.calls)
    print(f"{processor()}, {os.cpu_count()} processors, {time.strftime('%Y-%m-%d')}; medians (and ranges) of {args.rounds} "
          f"interleaved runs of {args.calls} calls\n")
    print("\n".join(table(runs)))
    if args.json:
        about = {"processor": processor(), "date": time.strftime("%Y-%m-%d"), "calls": args.calls, "unit": "ns: step, look"}
        args.json.write_text(json.dumps({**about, "runs": runs}) + "\n")


if __name__ == "__main__":
    main()
