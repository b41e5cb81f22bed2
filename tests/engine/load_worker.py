"""Loads a model in a process of its own and prints, as JSON, how far its memory rose above what it began with."""

import json
import sys
from pathlib import Path

import torch

import octavo.engine.llm  # noqa: F401  (all that a load imports)
from octavo.engine.checkpoint import open_checkpoint
from octavo.engine.loader import load_model


def status(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def main(path, where):
    device = torch.device(where)
    load_model(open_checkpoint(sys.argv[3]), device, torch.bfloat16, 64)  # a small one: what a first load allocates
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, loaded, model = status("VmRSS"), 0, None
    checkpoint = open_checkpoint(path)
    if where == "meta":  # stands for a device with memory of its own
        loaded = sum(weight.numel() * weight.element_size() for _, weight in checkpoint.tensors(device))
    else:
        model = load_model(checkpoint, device, torch.bfloat16, 64)
    result = dict(host=status("VmHWM") - before, num_bytes=checkpoint.num_bytes, loaded=loaded)
    if device.type == "cuda":
        result["device"] = torch.cuda.max_memory_allocated()
    print(json.dumps(result))
    del model


if __name__ == "__main__":
    main(*sys.argv[1:3])
