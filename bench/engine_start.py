"""How long the engine takes to start with a model of random weights in files: the first time, and again.

    python -m bench.engine_start FOLDER [--model Llama-3-8B] [--layers 32] [--starts 2] [--out FOLDER]

FOLDER takes the model in bf16 (Llama-3-8B: 16 GB), unless it is there from before; so its files are in the page cache
where memory has room for them. Each start is a process of its own, from its beginning until it is warm and has answered
one request. Triton's cache is a new folder, so that the first start compiles everything, as on a new machine; the
others find it there. --triton-cache CACHE takes another one, which may be full.

Rows "first start", "second start" and so on go to <gpu>/engine.json of --out, bench/results by default, with the
seconds of each phase: importing, opening (config, tokenizer, cache), reading weights, making kernels ready, capturing
graphs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PHASES = {
    "import_s": "importing",
    "open_s": "opening",
    "load_s": "reading",
    "kernels_s": "kernels",
    "graphs_s": "graphs",
    "first_token_s": "first request",
}


def start(folder: str, began: float, device: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """One start, in this process, which came into being at `began`."""
    from octavo.engine import LLM, SamplingParams

    times = [time.time()]
    llm = LLM(folder, device=device, warmup=False, **options)
    times.append(time.time())
    found: dict[str, Any] = {"import_s": times[0] - began, "load_s": llm.load_report.seconds}
    found |= {"open_s": times[1] - times[0] - llm.load_report.seconds, "kernels_s": 0.0, "graphs_s": 0.0}
    found |= {"load": str(llm.load_report), "kernels": "none are compiled on a CPU", "graphs": 0}
    if llm.device.type == "cuda":
        report = llm.warmup()
        times.append(time.time())
        found |= {"kernels_s": report.seconds, "graphs_s": times[-1] - times[-2] - report.seconds}
        found |= {"kernels": str(report).splitlines()[0], "graphs": llm.runner.num_graphs}
    found["value"] = times[-1] - began
    llm.generate([list(range(5, 21))], SamplingParams(max_tokens=1, temperature=0), progress=False)
    return found | {"first_token_s": time.time() - times[-1], "layers": llm.config.num_hidden_layers}


def start_elsewhere(args: argparse.Namespace, triton_cache: str) -> dict[str, Any]:
    """One start, in a process of its own.

    Raises:
        RuntimeError: it failed; its output is above.
    """
    command = [sys.executable, "-m", "octavo.bench.engine_start", str(args.folder), "--began", repr(time.time())]
    command += ["--options", json.dumps(args.options), *(["--device", args.device] if args.device else [])]
    environment = os.environ | {"TRITON_CACHE_DIR": triton_cache}
    child = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=False)
    if child.returncode:
        raise RuntimeError(f"a start failed with status {child.returncode}")
    return json.loads(child.stdout.splitlines()[-1])


def line(of: dict[str, Any]) -> str:
    """A start for the eye."""
    phases = ", ".join(f"{name} {of[key]:.1f}" for key, name in PHASES.items())
    details = f"{of['load']}\n  {of['kernels']}, {of['graphs']} graphs"
    return f"{of['cell']}: ready after {of['value']:.1f} s; {phases}\n  {details}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="Llama-3-8B", help="the shape, of those with one MLP a layer")
    parser.add_argument("--layers", type=int, help="so many of them instead of all")
    parser.add_argument("--starts", type=int, default=2)
    parser.add_argument("--device")
    parser.add_argument("--options", type=json.loads, default={}, help='the engine\'s, as JSON: {"max_num_seqs": 64}')
    parser.add_argument("--triton-cache", type=Path, help="instead of a new folder")
    parser.add_argument("--out", type=Path, help="where <gpu>/engine.json goes")
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.began is not None:
        print(json.dumps(start(str(args.folder), args.began, args.device, args.options)))
        return 0
    # Not above, since the starts, which import this module too, are to do without it.
    import torch

    from octavo.bench.engine_bench import describe_machine
    from octavo.bench.engine_table import merge
    from octavo.bench.quantized_model import write_model
    from octavo.bench.random_model import find
    from octavo.bench.store import default_folder, folder_name
    from octavo.engine.devices import choose_device

    model, device = find(args.model).model, choose_device(args.device)
    if not (args.folder / "config.json").exists():
        began = time.perf_counter()
        write_model(args.folder, args.layers or model.layers, str(device), model)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"written in {time.perf_counter() - began:.1f} s", flush=True)
    with tempfile.TemporaryDirectory() as fresh:
        for number in range(args.starts):
            found = start_elsewhere(args, str(args.triton_cache or fresh))
            ordinal = ("first", "second", "third")[number] if number < 3 else f"{number + 1}th"
            row = {"cell": f"{ordinal} start", "model": model.name, "scheme": "bf16", "weights": "random", "unit": "s"}
            row |= describe_machine(device) | {"options": args.options} | found
            merge((args.out or default_folder()) / folder_name(row["gpu"]) / "engine.json", [row])
            print(line(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
