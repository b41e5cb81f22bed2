"""Decode speed on the CPU beside transformers, same process, same GGUF file: one prompt, greedy.

    python bench/cpu_decode.py [--tokens 64] [--rounds 3] [--out FILE.json]

transformers dequantises the file to float32, its default for a GGUF. The two take turns; the figures are medians.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from octavo.engine import LLM, SamplingParams
from octavo.engine.hub import resolve

QUESTION = [{"role": "user", "content": "Tell me how a steam engine works."}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    path = resolve("smollm2")
    llm = LLM(str(path), device="cpu")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    prompt = llm.tokenizer.apply_chat_template(QUESTION)

    def octavo_decode(tokens: int) -> list[int]:
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        return llm.generate([prompt], params)[0].token_ids

    def transformers_decode(tokens: int) -> list[int]:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return out[0, ids.shape[1] :].tolist()

    sides = {"octavo": octavo_decode, "transformers": transformers_decode}
    outputs = {name: decode(args.tokens) for name, decode in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, decode in sides.items():
            # Decode alone: what 1 token takes (the prompt) is taken off what 1 + tokens take.
            start = time.perf_counter()
            decode(1)
            middle = time.perf_counter()
            decode(1 + args.tokens)
            times[name].append((time.perf_counter() - middle) - (middle - start))
    speeds = {name: args.tokens / statistics.median(t) for name, t in times.items()}
    row = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "same_tokens": outputs["octavo"] == outputs["transformers"],
        "octavo_tokens_per_s": round(speeds["octavo"], 2),
        "transformers_tokens_per_s": round(speeds["transformers"], 2),
        "ratio": round(speeds["octavo"] / speeds["transformers"], 3),
    }
    print(json.dumps(row))
    if args.out:
        args.out.write_text(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
