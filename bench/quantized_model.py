"""A model of random weights in Llama-3-8B's shape: the time to quantise it, to load it, and a token of one request.

    python bench/quantized_model.py FOLDER [--scheme int4] [--method rtn] [--layers 32] [--tokens 128] [--out FILE.json]

FOLDER takes the model in bf16 (16 GB) and what becomes of it. Peak memory is PyTorch's, on the device.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from octavo.bench.shapes import LLAMA_3_8B, Model
from octavo.engine import LLM, SamplingParams
from octavo.engine.quantize import Settings, quantize


def write_model(folder: Path, layers: int, device: str, model: Model = LLAMA_3_8B) -> None:
    """A checkpoint of random weights, a file a layer, with a tokenizer that has a word for each id."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    generator, vocabulary = torch.Generator(device).manual_seed(0), model.vocab
    hidden, kv = model.hidden, model.kv_heads * model.head_dim
    folder.mkdir(parents=True, exist_ok=True)

    def weight(n: int, k: int) -> torch.Tensor:
        return (torch.randn(n, k, generator=generator, device=device) * k**-0.5).bfloat16().cpu()

    index: dict[str, str] = {}

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name)
        index.update(dict.fromkeys(tensors, name))

    ones = torch.ones(hidden, dtype=torch.bfloat16)
    outer = {"model.embed_tokens.weight": weight(vocabulary, hidden), "lm_head.weight": weight(vocabulary, hidden)}
    save("model-outer.safetensors", outer | {"model.norm.weight": ones})
    for layer in range(layers):
        sizes = {"q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, hidden)}
        tensors = {f"self_attn.{name}.weight": weight(*size) for name, size in sizes.items()}
        tensors |= {f"mlp.{name}_proj.weight": weight(model.intermediate, hidden) for name in ("gate", "up")}
        tensors["mlp.down_proj.weight"] = weight(hidden, model.intermediate)
        tensors |= {f"{norm}_layernorm.weight": ones.clone() for norm in ("input", "post_attention")}
        save(f"model-{layer}.safetensors", {f"model.layers.{layer}.{name}": t for name, t in tensors.items()})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": model.intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "eos_token_id": vocabulary - 1,
        "bos_token_id": vocabulary - 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocabulary)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


def milliseconds(llm: LLM, tokens: int) -> tuple[float, float]:
    """One request of 128 tokens: until its first token, and for each of so many more; medians of five."""
    prompt = [list(range(100, 228))]

    def seconds(count: int) -> float:
        start = time.perf_counter()
        llm.generate(prompt, SamplingParams(max_tokens=count, temperature=0, ignore_eos=True))
        return time.perf_counter() - start

    seconds(8)
    first, whole = (sorted(seconds(count) for _ in range(5))[2] for count in (1, 1 + tokens))
    return first * 1e3, (whole - first) / tokens * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scheme", default="int4")
    parser.add_argument("--method", default="rtn")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = {"model": LLAMA_3_8B.name, "weights": "random"} | {
        name: getattr(args, name) for name in ("scheme", "method", "layers", "tokens")
    }
    on_gpu = args.device.startswith("cuda")

    def note(**facts: Any) -> None:
        """Keeps facts, with the most memory taken since the last ones, where a cut run leaves them too."""
        if on_gpu and torch.cuda.is_initialized():
            facts |= {f"{next(iter(facts))}_peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)}
            torch.cuda.reset_peak_memory_stats()
        result.update(facts)
        print(facts, flush=True)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")

    source, target = args.folder / "bf16", args.folder / args.scheme
    start = time.perf_counter()
    if not source.exists():
        write_model(source, args.layers, args.device)
    note(write_s=round(time.perf_counter() - start, 1))
    report = quantize(str(source), target, Settings(args.scheme, args.method), device=args.device)
    note(quantize_s=report.seconds, bytes_before=report.bytes_before, bytes_after=report.bytes_after)

    start = time.perf_counter()
    llm = LLM(str(target), device=args.device, cache_tokens=4096, max_num_seqs=1, max_num_batched_tokens=256)
    note(load_and_warm_up_s=round(time.perf_counter() - start, 1), load=str(llm.load_report))
    first, token = milliseconds(llm, args.tokens)
    note(ms_per_token=round(token, 3), first_token_ms=round(first, 2))
    if on_gpu:
        note(gpu=torch.cuda.get_device_name())


if __name__ == "__main__":
    main()
