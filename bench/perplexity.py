"""Perplexity of a fixed public-domain text, the end-to-end check that a backend computes the same model.

python bench/perplexity.py [--model smollm2] [--device cuda] [--dtype bfloat16] [--out FILE.json]
"""

import argparse
import json
import math
from pathlib import Path

import torch

from octavo.engine import LLM

TEXT = Path(__file__).parent / "text/founding.txt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    llm = LLM(
        args.model, device=args.device, dtype=args.dtype and getattr(torch, args.dtype), max_num_batched_tokens=512
    )
    token_ids = llm.tokenizer.encode(TEXT.read_text())
    logprobs = llm.prompt_logprobs(token_ids)
    device = torch.cuda.get_device_name(llm.device) if llm.device.type == "cuda" else "cpu"
    row = {
        "model": args.model,
        "device": device,
        "dtype": str(llm.model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "tokens": len(token_ids),
        "perplexity": math.exp(-sum(logprobs) / len(logprobs)),
    }
    print(json.dumps(row))
    if args.out:
        args.out.write_text(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
