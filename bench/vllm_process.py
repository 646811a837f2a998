"""vLLM in an environment of its own, driven over pipes. bench/vllm_peer.py starts it and says what the lines are.

Standard output is the driver's; what vLLM prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

# The scripts beside this one are none of the packages that vLLM looks for.
sys.path[:] = [path for path in sys.path if Path(path) != Path(__file__).parent]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM's processes print to it
    given = json.loads(sys.stdin.readline())
    import vllm
    from vllm.lora.request import LoRARequest

    adapters: list[str] = given["adapters"]
    lora = {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": given["rank"]} if adapters else {}
    engine = vllm.LLM(
        given["model"], dtype="bfloat16", skip_tokenizer_init=True, max_num_seqs=given["running"],
        max_model_len=given["length"], **lora,
    )  # fmt: skip
    known = {path: LoRARequest(path, number, path) for number, path in enumerate(adapters, start=1)}
    say(answers, version=vllm.__version__)
    for line in sys.stdin:
        asked = json.loads(line)
        sampling = vllm.SamplingParams(temperature=0, max_tokens=asked["new"], ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": prompt} for prompt in asked["prompts"]]
        own = [known[path] for path in asked["adapters"]] if adapters else None
        got = engine.generate(prompts, sampling, lora_request=own, use_tqdm=False)
        say(answers, tokens=[list(one.outputs[0].token_ids) for one in got])


def say(answers: Any, **values: Any) -> None:
    answers.write(json.dumps(values) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
