"""All that needs a GPU, in one run of at most eight minutes, without a network: the tests, decoding in a CUDA graph, a
decoder layer beside PEFT, the kernels beside other systems' and alone. Each is checked before it is timed.

    make gpu            in .venv, which is made first
    make gpu-offline    in the interpreter that PYTHON names and with its torch, against which mlora is built in place

Steps run one after another, each in a process of its own with a limit. One that fails or runs out of time does not stop
the next, and leaves what it had found. bench/results/gpu/ has the output of each; gpu.jsonl there has a line a step,
written as it ends, and the other JSON lines are the figures, written as they come. The last lines printed are the
ratios that docs/gpu.md and README.md wait for.

`--smoke` takes all steps on the CPU, with tiny shapes. Nothing is timed on a GPU then.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("torch", "triton", "transformers", "peft", "numpy", "safetensors", "rich", "typer", "pytest", "hypothesis")
SEEN = (*NEEDED, "vllm", "sglang")
LEAST = 5  # seconds with which a step is still begun
PATIENCE = 10  # times the limits, for --smoke: the CPUs may be few and busy
TAIL = 12  # lines of a step's output that its record has
NOT_COLLECTED = 5  # what pytest exits with where a whole folder was skipped


@dataclass(frozen=True)
class Step:
    """A command of this interpreter, in the checkout, and the seconds it may take."""

    name: str
    limit: float
    arguments: tuple[str, ...]


def steps(args: argparse.Namespace, temp: Path) -> list[Step]:
    """What one step leaves of its time is the next ones'; their limits together are more than there is."""
    smoke, device = (["--smoke"], ["--only", "gpu"]) if args.smoke else ([], ["--device", "cuda"])
    planned = [
        Step("build", 150, ("setup.py", "build_ext", "--inplace")),
        Step("tests", 110, ("-m", "pytest", "-v", "-rfEs", "--tb=short", "-p", "no:cacheprovider", "tests/gpu")),
        Step("graph", 40, ("examples/cuda_graph.py", str(temp / "model"), str(temp / "a0"), str(temp / "a1"))),
        Step("layer", 150, ("bench/gpu_layer.py", "--out", str(args.out / "gpu_layer.jsonl"), *smoke)),
        Step("peers", 45, ("bench/gpu_peers.py", "--out", str(args.out / "gpu_peers.jsonl"), *smoke)),
        Step("operators", 100, ("bench/operators.py", "--out", str(args.out / "gpu_operators.jsonl"), *device, *smoke)),
    ]
    return [step for step in planned if args.build or step.name != "build"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", action="store_true", help="first build mlora in place, against this torch")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU: does everything run?")
    parser.add_argument("--minutes", type=float, default=8, help="for all steps together")
    parser.add_argument("--out", type=Path, help="a folder; default bench/results/gpu, build/gpu for --smoke")
    args = parser.parse_args()
    patience = PATIENCE if args.smoke else 1
    end = time.monotonic() + 60 * args.minutes * patience
    args.out = (args.out or ROOT / ("build/gpu" if args.smoke else "bench/results/gpu")).resolve()
    here = machine()
    print(" ".join(f"{name} {value}" for name, value in here.items()), flush=True)
    if missing := [name for name in NEEDED if name not in here]:
        parser.error(f"{sys.executable} lacks {', '.join(missing)}")
    if "gpu" not in here and not args.smoke:
        parser.error("torch sees no GPU here; --smoke tries everything on the CPU")
    args.out.mkdir(parents=True, exist_ok=True)
    for old in args.out.glob("*.jsonl"):  # of an earlier run, whose figures would be taken for this one's
        old.unlink()
    failed = []
    with (args.out / "gpu.jsonl").open("w") as lines, tempfile.TemporaryDirectory() as temp:
        for step in steps(args, Path(temp)):
            if step.name == "graph":
                make_model(Path(temp))
            record = run(
                step, min(step.limit * patience, end - time.monotonic()), args.out / f"{step.name}.log", args.smoke
            )
            lines.write(json.dumps({"bench": "gpu", "smoke": args.smoke, **here, **record}) + "\n")
            lines.flush()
            print(f"== {step.name}: {record['result']}, {record['seconds']:.0f} s", flush=True)
            if record["result"] not in ("passed", "skipped"):
                failed.append(step.name)
                print("\n".join(record["tail"]), flush=True)
    tables(args.out)
    if args.smoke:
        print("On the CPU with tiny shapes: nothing was timed on a GPU, and no ratio above means anything.")
    if failed:
        print(f"Failed or cut off: {', '.join(failed)}; their output is in {args.out}")
    return int(bool(failed))


def machine() -> dict[str, str]:
    """What this runs on, by name; packages that are not there are left out."""
    found = {"python": platform.python_version()}
    for name in SEEN:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    ask = "import torch; print(torch.version.cuda, torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    asked = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True).stdout.strip()
    cuda, _, gpu = asked.partition(" ")
    found |= {"cuda": cuda, "nvcc": shutil.which("nvcc") or "none"}
    if gpu:
        found["gpu"] = gpu
    if (ROOT / ".git").exists() and shutil.which("git"):
        said = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
        found["commit"] = said.stdout.strip()
    return found


def make_model(folder: Path) -> None:
    """A small random Llama and two adapters, for the example: the demo's model may not be here. In a process of its
    own, as it imports mlora, which a step has just built."""
    code = (
        "import sys; from pathlib import Path; sys.path.append('bench')\n"
        "import torch; from generate import made, make_adapter\n"
        "to = Path(sys.argv[1]); model = made(512, torch.bfloat16); model.save_pretrained(to / 'model')\n"
        "for i in range(2): make_adapter(model, to / f'a{i}', 16, seed=i)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, env=environment(), capture_output=True)


def environment() -> dict[str, str]:
    """For a step: this checkout's mlora, whether it is installed or not, no hub, and nvcc on several cores."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    quick = {"NVCC_APPEND_FLAGS": "--threads 4"}
    return {**os.environ, **quick, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def run(step: Step, limit: float, log: Path, smoke: bool) -> dict[str, Any]:
    """Run a step for at most `limit` seconds; its record."""
    start = time.monotonic()
    record: dict[str, Any] = {"step": step.name, "limit": round(max(limit, 0)), "seconds": 0.0, "tail": []}
    if limit < LEAST:
        return {**record, "result": "no time left"}
    if smoke and step.name == "graph":
        return {**record, "result": "skipped", "tail": ["a CUDA graph needs a GPU"]}
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, *step.arguments], cwd=ROOT, env=environment(), stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with what it started, compilers for one
                process.wait()
    text = log.read_text(errors="replace").splitlines()
    record |= {"seconds": time.monotonic() - start, "code": code, "tail": text[-TAIL:]}
    if step.name == "tests":
        record |= {word.lower(): sum(f" {word} " in line for line in text) for word in ("PASSED", "FAILED", "ERROR")}
        if code == NOT_COLLECTED and smoke:
            return {**record, "result": "skipped"}
    return {**record, "result": "cut off" if code is None else "passed" if code == 0 else f"failed ({code})"}


def tables(out: Path) -> None:
    """The ratios, in Markdown, of what was measured, if anything was."""
    for name in ("gpu_layer", "gpu_peers"):
        file = out / f"{name}.jsonl"
        if file.exists() and file.stat().st_size:
            command = [sys.executable, f"bench/{name}.py", "--table", str(file)]
            done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
            print(f"\n{done.stdout or done.stderr}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
