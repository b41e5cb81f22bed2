"""Perplexity of a model as it is shipped and as `octavo quantize` re-quantises it: int8, fp8, int4 rounded and by GPTQ.

python bench/quantized_perplexity.py [--model smollm2] [--device cuda] [--engine] [--out FILE.json]

Calibrated on octavo's own text, measured on bench/text/founding.txt, layer by layer; with --engine by `LLM` beside it.
"""

import argparse
import json
import math
import tempfile
import time
from pathlib import Path

import torch

from octavo.engine import LLM
from octavo.engine.checkpoint import open_checkpoint
from octavo.engine.hub import resolve
from octavo.engine.llm import choose_device
from octavo.engine.quantize import Settings, quantize
from octavo.engine.quantize.evaluate import layerwise_perplexity, sequences_of

TEXT = (Path(__file__).parent / "text/founding.txt").read_text(encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device")
    parser.add_argument("--group-size", type=int, default=64, help="of int4; SmolLM2's 576 inputs allow 32 and 64")
    parser.add_argument("--calibration-tokens", type=int, default=128 * 2048)
    parser.add_argument("--damp", type=float, default=0.1, help="of int4 by GPTQ")
    parser.add_argument("--keep", nargs="*", default=[], help="layers left dense, as octavo quantize --keep names them")
    parser.add_argument("--weights-only", nargs="*", default=[], help="of int8: layers whose inputs are not quantised")
    parser.add_argument("--only", nargs="*", help="schemes, as the table names them")
    parser.add_argument("--engine", action="store_true", help="measure with LLM too")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    group = dict(group_size=args.group_size)
    tokens = dict(calibration_tokens=args.calibration_tokens, keep=tuple(args.keep))
    schemes: dict[str, Settings | None] = {
        "as shipped": None,
        "int8": Settings("int8", method="gptq", weights_only=tuple(args.weights_only), **tokens),
        "fp8": Settings("fp8", method="gptq", **tokens),
        "int4 rtn": Settings("int4", method="rtn", keep=tuple(args.keep), **group),
        "int4 gptq": Settings("int4", method="gptq", damp=args.damp, **group, **tokens),
    }
    device = choose_device(args.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    rows, shipped = [], math.nan
    print(f"{args.model} on {where}, torch {torch.__version__}")
    for name, settings in schemes.items():
        if args.only is not None and name not in args.only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            path, start, calibrated = resolve(args.model), time.perf_counter(), 0
            if settings is not None:
                path = Path(folder) / "model"
                calibrated = quantize(args.model, path, settings, device=device).calibration_tokens
            seconds = time.perf_counter() - start
            checkpoint = open_checkpoint(path)
            sequences = sequences_of(checkpoint, TEXT)
            perplexity = layerwise_perplexity(checkpoint, sequences, device)
            shipped = perplexity if settings is None else shipped
            row = dict(model=args.model, scheme=name, device=where, torch=torch.__version__, perplexity=perplexity)
            row |= dict(change=perplexity / shipped - 1, tokens=sum(map(len, sequences)), calibration_tokens=calibrated)
            row |= dict(keep=[] if settings is None else args.keep)
            if settings is not None and settings.weights_only:
                row |= dict(weights_only=args.weights_only)
            row |= dict(megabytes=checkpoint.num_bytes / 1e6, seconds=seconds)
            if args.engine:
                llm = LLM(str(path), device=device, max_num_batched_tokens=512, warmup=False)
                logprobs = [p for ids in sequences for p in llm.prompt_logprobs(ids)]
                row["engine"] = math.exp(-sum(logprobs) / len(logprobs))
        engine = f", {row['engine']:.4f} by the engine" if args.engine else ""
        print(
            f"{name:12} {perplexity:9.4f} ({row['change']:+.2%}){engine}, {row['megabytes']:.1f} MB, {seconds:.1f} s, "
            f"{calibrated} tokens of calibration",
            flush=True,
        )
        rows.append(row)
    if args.out:
        args.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
