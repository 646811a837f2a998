"""Trainers of transformers and TRL as they are, accelerate and two processes, on a PeftModel that mlora computes. The
oracle is the same without mlora."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_model import save
from chat_model import tokenizer as numbers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import mlora

trl = pytest.importorskip("trl", reason="TRL's trainers need TRL")
from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments  # noqa: E402

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
TEXTS = [{"prompt": f"{n} {n + 1}", "completion": f" {n + 2} {n + 3}"} for n in range(3, 15)]
PAIRS = [{"prompt": f"{n} {n}", "chosen": f" {n + 1}", "rejected": f" {n + 2} 4"} for n in range(3, 11)]
ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1, "report_to": [],
    "save_strategy": "no", "use_cpu": True, "seed": 0, "disable_tqdm": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(llama, tmp_path_factory.mktemp("base"))


def tokenizer() -> Any:
    made = numbers()
    made.eos_token = "1"
    return made


def model_of(base: Path, attach: bool, **options: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), LoraConfig(**LORA, **options))
    if attach:
        assert mlora.attach(model) == 14
    return model


def with_transformers(model: Any, folder: Path) -> Any:
    ids = [numbers()(row["prompt"] + row["completion"])["input_ids"] for row in TEXTS]
    rows = [{"input_ids": one, "labels": one, "attention_mask": [1] * len(one)} for one in ids]
    padded = DataCollatorForSeq2Seq(numbers())
    return Trainer(model, TrainingArguments(str(folder), **ARGUMENTS), padded, train_dataset=rows)


def with_sft(model: Any, folder: Path) -> Any:
    options = trl.SFTConfig(str(folder), **ARGUMENTS)
    return trl.SFTTrainer(model, options, train_dataset=Dataset.from_list(TEXTS), processing_class=tokenizer())


def with_dpo(model: Any, folder: Path) -> Any:
    options = trl.DPOConfig(str(folder), **ARGUMENTS)
    return trl.DPOTrainer(model, None, options, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer())


@pytest.mark.parametrize("make", [with_transformers, with_sft, with_dpo])
def test_trainers_run_as_they_are(base: Path, tmp_path: Path, make: Callable[[Any, Path], Any]) -> None:
    losses, files = {}, {}
    for attach in (False, True):
        folder = tmp_path / str(attach)
        trainer = make(model_of(base, attach), folder)
        trainer.train()
        losses[attach] = [record["loss"] for record in trainer.state.log_history if "loss" in record]
        trainer.save_model(str(folder))
        files[attach] = load_file(folder / "adapter_model.safetensors")
    assert len(losses[True]) == 4
    torch.testing.assert_close(torch.tensor(losses[True]), torch.tensor(losses[False]), rtol=1e-4, atol=1e-4)
    assert files[True].keys() == files[False].keys()
    for key, tensor in files[False].items():
        torch.testing.assert_close(files[True][key], tensor, rtol=0, atol=2e-3)  # a few steps of 1e-2, by Adam
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "True")
    assert plain(input_ids=torch.tensor([[3, 4]])).logits.isfinite().all()


def test_trainers_go_on_from_their_checkpoints(base: Path, tmp_path: Path) -> None:
    model = model_of(base, True)
    options = trl.SFTConfig(str(tmp_path), **{**ARGUMENTS, "save_strategy": "steps", "save_steps": 2})
    data = Dataset.from_list(TEXTS)
    whole = trl.SFTTrainer(model, options, train_dataset=data, processing_class=tokenizer())
    whole.train()
    again = trl.SFTTrainer(model_of(base, True), options, train_dataset=data, processing_class=tokenizer())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, one), (_, other) in zip(model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_accelerate_in_bf16(base: Path) -> None:
    """Which wraps the model's forward in autocast: of a bf16 base mlora computes, of an fp32 one PEFT."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    ids = torch.arange(3, 15).view(2, 6)
    for dtype in ("bfloat16", "float32"):
        losses = []
        for attach in (False, True):
            AcceleratorState._reset_state(reset_partial_state=True)
            accelerator = Accelerator(mixed_precision="bf16", cpu=True)
            torch.manual_seed(0)
            own = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
            model = get_peft_model(own, LoraConfig(**LORA, init_lora_weights=False))
            if attach:
                mlora.attach(model)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
            model, optimizer = accelerator.prepare(model, optimizer)
            for _ in range(3):
                loss = model(input_ids=ids, labels=ids).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(float(loss))
        AcceleratorState._reset_state(reset_partial_state=True)
        assert losses[1] == pytest.approx(losses[0], rel=3e-2), dtype


def test_quantized_bases(base: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="nf4 needs bitsandbytes")
    results = []
    ids = torch.arange(3, 15).view(2, 6)
    for attach in (False, True):
        torch.manual_seed(0)
        own = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
        for name, module in list(own.named_modules()):
            if type(module) is torch.nn.Linear and name != "lm_head":
                made = bitsandbytes.nn.Linear4bit(
                    module.in_features, module.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
                )
                made.weight = bitsandbytes.nn.Params4bit(module.weight.detach().clone(), False, quant_type="nf4")
                parent, _, child = name.rpartition(".")
                setattr(own.get_submodule(parent), child, made.to("cpu"))
        torch.manual_seed(0)
        model = get_peft_model(own, LoraConfig(**LORA, init_lora_weights=False))
        if attach:
            assert mlora.attach(model) == 14
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append((loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(results[1][1], results[0][1], strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-4


DDP = """
import os, sys
sys.path[:0] = sys.argv[2:]
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from test_other_loops import gradients_of, model_of
from pathlib import Path
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
model = DistributedDataParallel(model_of(Path(sys.argv[1]), True, init_lora_weights=False))
found = gradients_of(model, rank, rank + 1)
if rank == 0:
    torch.save(found, Path(sys.argv[1]) / "gradients.pt")
dist.destroy_process_group()
"""


def gradients_of(model: Any, first: int, last: int) -> list[torch.Tensor]:
    """Of the mean over rows `first` to `last`; DDP takes the mean over processes."""
    ids = torch.arange(3, 15).view(2, 6)[first:last]
    model(input_ids=ids, labels=ids).loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_two_processes_give_the_gradients_of_one(base: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(__file__).resolve()
    paths = [str(here.parent), str(here.parents[1]), str(here.parents[1] / "cli"), str(here.parents[2])]
    processes = []
    for rank in range(2):
        environment = {
            **os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        command = [sys.executable, "-c", DDP, str(base), *paths]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, told = process.communicate(timeout=300)
        assert process.returncode == 0, told[-2000:]
    two = torch.load(base / "gradients.pt", weights_only=True)
    one = gradients_of(model_of(base, True, init_lora_weights=False), 0, 2)
    for mine, theirs in zip(two, one, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
