"""What is imported when: counted in modules, which a busy machine does not change."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

HEAVY = ("torch", "transformers", "numpy", "triton", "safetensors", "huggingface_hub", "fsspec", "peft", "pandas")


def run(code: str, *arguments: str) -> Any:
    """The value of the last line that `code` prints, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return eval(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("arguments", "code", "wanted"),
    [
        (["--help"], 0, "Merge adapters into a new one"),
        (["--version"], 0, "0."),
        (["generate", "--help"], 0, "--max-new-tokens"),
        (["merge", "--help"], 0, "--density"),
        (["genrate"], 2, "No such command"),
        (["generate", "--imput", "x"], 2, "No such option"),
        (["generate"], 2, "Missing option"),
        (["bench", "nothing"], 2, "wanted operators"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_command_line_imports_what_it_runs(arguments: list[str], code: int, wanted: str) -> None:
    script = f"""
import contextlib, io, sys
from mlora.cli import app
out = io.StringIO()
with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
    try:
        app(sys.argv[1:])
    except SystemExit as exit:
        code = exit.code
print((code, out.getvalue(), [name for name in {HEAVY} if name in sys.modules], len(sys.modules)))
"""
    got, output, heavy, modules = run(script, *arguments)
    assert got == code and wanted in " ".join(output.split()), output
    assert not heavy and modules < 600, (heavy, modules)


def test_importing_mlora_imports_little() -> None:
    assert run("import sys; before = len(sys.modules); import mlora; print(len(sys.modules) - before)") < 40


def test_using_mlora_imports_no_compiler_and_no_downloads() -> None:
    """torch.compile, Triton and the hub are imported by what needs them."""
    script = """
import sys, torch, transformers
before = set(sys.modules)
import mlora
by_import = set(sys.modules) - before
[getattr(mlora, name) for name in mlora.__all__]
model = torch.nn.Sequential(torch.nn.Linear(4, 4))
runtime = mlora.patch(model)
tensors = {"0.lora_A.weight": torch.ones(1, 4), "0.lora_B.weight": torch.ones(4, 1)}
runtime.add_adapter("a", mlora.Adapter({"peft_type": "LORA", "r": 1, "lora_alpha": 1}, tensors))
with torch.no_grad():
    model(torch.ones(2, 4), adapter_names=["a", None])
print((len(by_import), sorted({name for name in set(sys.modules) - before if not name.startswith("mlora")})))
"""
    by_import, new = run(script)
    heavy = ("torch._dynamo", "torch._inductor", "triton", "fsspec", "peft", "rich", "typer", "sympy")
    assert by_import < 20 and len(new) < 60 and not [name for name in new if name.startswith(heavy)], new


def test_every_public_name_is_there_and_no_module_hides_it() -> None:
    script = """
import importlib, pkgutil, mlora
assert set(mlora.__all__) <= set(dir(mlora))
for module in pkgutil.iter_modules(mlora.__path__):  # which each put themselves into the package
    if not module.name.startswith(("_", "cli")):
        importlib.import_module(f"mlora.{module.name}")
print({name: type(getattr(mlora, name)).__name__ for name in mlora.__all__})
"""
    kinds = run(script)
    assert kinds["patch"] == kinds["unpatch"] == kinds["from_config"] == "function"
    assert kinds["Adapter"] == kinds["Merge"] == kinds["Runtime"] == "type" and kinds["errors"] == "module"
    assert "no attribute 'ptach'" in run(
        "import mlora\ntry:\n    mlora.ptach\nexcept AttributeError as e:\n    print(repr(str(e)))"
    )


@pytest.mark.parametrize(
    "imports",
    [
        "import torch, mlora",
        "import mlora, importlib.util; importlib.util.find_spec('torch')",  # looks for it, as transformers does
    ],
)
def test_the_import_alone_registers_the_operators(imports: str) -> None:
    script = f"""
import sys
{imports}
import torch
print((torch.ops.mlora.linear._qualified_op_name, [f for f in sys.meta_path if type(f).__module__.startswith("mlora")]))
"""
    assert run(script) == ("mlora::linear", [])
