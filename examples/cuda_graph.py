"""Decode with a CUDA graph, and change what the rows of the batch use between replays.

Needs a GPU; no test or CI job of this project runs it. The addresses that the captured kernels read are those of the
arena, the tables and the plan buffer, none of which ever moves: loading, deleting and routing adapters changes their
contents, by copies on the current stream, and the next replay sees them. A replay runs kernels and nothing else: what
compiled code refuses when it is called (another number of rows, heads of another size, target_parameters, aLoRA) must
not be routed around one.

    python examples/cuda_graph.py [MODEL ADAPTER_FOLDER...]

By default the demo's model and the adapters beside this file.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import mlora
from mlora.cli.demo_model import resolve_model
from mlora.layers.warmup import warmup

ADAPTERS = sorted(str(config.parent) for config in (Path(__file__).parent / "adapters").glob("*/adapter_config.json"))


def main(name: str, folders: list[str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).cuda().eval()
    runtime = mlora.patch(model)
    names = [runtime.load_adapter(folder).name for folder in folders]
    warmup(model)  # nothing may be compiled while a graph is captured

    rows = 8
    tokens = torch.ones(rows, 1, dtype=torch.long, device="cuda")
    # Capture needs kernels that read the shared plan buffer, as compiled code does; eager layers read a plan of the
    # call's own.
    step = torch.compile(model, fullgraph=True, backend="aot_eager")

    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            step(input_ids=tokens, use_cache=False)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            logits = step(input_ids=tokens, use_cache=False).logits

    for entries in ([names[0]] * rows, [None] * rows, [dict.fromkeys(names, 1.0 / len(names))] * rows):
        with runtime.use_adapters(entries):  # writes the plan buffer
            graph.replay()
            torch.cuda.synchronize()
            with torch.no_grad():
                eager = model(input_ids=tokens, use_cache=False).logits
        print(entries[0], "largest difference to eager:", (logits - eager).abs().max().item())


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else str(resolve_model(None)), sys.argv[2:] or ADAPTERS)
