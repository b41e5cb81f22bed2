"""A model of random weights in Mixtral-8x7B's shape: the time and memory to load it, and a token of one request.

    python bench/mixtral_model.py FOLDER [--scheme int4] [--layers 32] [--tokens 128] [--out FILE.json]

FOLDER takes the model as compressed-tensors writes it: 24 GB in int4 (groups of 128), 47 GB in int8 or fp8 (a scale an
output, inputs by token). In bf16 it has 93 GB: `--layers 16` fits 80 GB of memory. Peak memory is PyTorch's.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from octavo.bench.quantized_model import milliseconds
from octavo.bench.shapes import MIXTRAL_8X7B, linears
from octavo.engine import LLM
from octavo.engine.experts import MixtureOfExperts

GROUP = 128
SCHEMES = ("bf16", "int4", "int8", "fp8")


def parts(scheme: str, n: int, k: int, generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a layer of random weights, by suffix, whose outputs are about as large as its inputs."""
    device, size = generator.device, k**-0.5
    if scheme == "bf16":
        yield "weight", (torch.randn(n, k, generator=generator, device=device) * size).bfloat16()
    elif scheme == "int4":
        words = torch.randint(-(2**31), 2**31, (n, k // 8), generator=generator, device=device, dtype=torch.int64)
        yield "weight_packed", words.int()
        yield "weight_scale", torch.full((n, k // GROUP), size / 4.6, device=device, dtype=torch.bfloat16)
        yield "weight_shape", torch.tensor([n, k])
    elif scheme == "int8":
        q = torch.randint(-127, 128, (n, k), generator=generator, device=device, dtype=torch.int8)
        yield "weight", q
        yield "weight_scale", torch.full((n, 1), size / 73, device=device, dtype=torch.bfloat16)
    else:
        yield "weight", torch.randn(n, k, generator=generator, device=device).to(torch.float8_e4m3fn)
        yield "weight_scale", torch.full((n, 1), size, device=device, dtype=torch.bfloat16)


def quantization_config(scheme: str) -> dict[str, Any]:
    kind = "float" if scheme == "fp8" else "int"
    weights: dict[str, Any] = dict(num_bits=4 if scheme == "int4" else 8, type=kind, symmetric=True, dynamic=False)
    weights |= dict(strategy="group", group_size=GROUP) if scheme == "int4" else dict(strategy="channel")
    inputs = dict(num_bits=8, type=kind, symmetric=True, dynamic=True, strategy="token")
    form = {"int4": "pack-quantized", "int8": "int-quantized", "fp8": "float-quantized"}[scheme]
    group = dict(targets=["Linear"], weights=weights, input_activations=None if scheme == "int4" else inputs)
    return dict(
        quant_method="compressed-tensors",
        format=form,
        config_groups={"group_0": group},
        ignore=["lm_head", "re:.*block_sparse_moe.gate"],
    )


def write_model(folder: Path, scheme: str, layers: int, device: str) -> None:
    """A checkpoint of random weights, a file a layer, with a tokenizer that has a word for each id."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    model, generator = MIXTRAL_8X7B, torch.Generator(device).manual_seed(0)
    hidden, attention, kv = model.hidden, model.heads * model.head_dim, model.kv_heads * model.head_dim
    modules = {f"self_attn.{p}_proj": (n, hidden) for p, n in (("q", attention), ("k", kv), ("v", kv))}
    modules |= {"self_attn.o_proj": linears(model)["o"]}
    for e in range(model.experts):
        at = f"block_sparse_moe.experts.{e}"
        modules |= {f"{at}.{w}": (model.intermediate, hidden) for w in ("w1", "w3")}
        modules[f"{at}.w2"] = linears(model)["down"]
    folder.mkdir(parents=True)
    index: dict[str, str] = {}

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file({key: tensor.cpu() for key, tensor in tensors.items()}, folder / name)
        index.update(dict.fromkeys(tensors, name))

    def dense(n: int, k: int) -> torch.Tensor:
        return next(parts("bf16", n, k, generator))[1]

    outer = {f"{name}.weight": dense(model.vocab, hidden) for name in ("model.embed_tokens", "lm_head")}
    save("model-outer.safetensors", outer | {"model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)})
    for layer in range(layers):
        tensors = {
            f"{module}.{suffix}": part
            for module, (n, k) in modules.items()
            for suffix, part in parts(scheme, n, k, generator)
        }
        tensors["block_sparse_moe.gate.weight"] = dense(model.experts, hidden)
        for norm in ("input", "post_attention"):
            tensors[f"{norm}_layernorm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        save(f"model-{layer}.safetensors", {f"model.layers.{layer}.{name}": t for name, t in tensors.items()})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config: dict[str, Any] = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": hidden,
        "intermediate_size": model.intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "num_local_experts": model.experts,
        "num_experts_per_tok": model.experts_per_token,
        "vocab_size": model.vocab,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "eos_token_id": model.vocab - 1,
        "bos_token_id": model.vocab - 2,
    }
    if scheme != "bf16":
        config["quantization_config"] = quantization_config(scheme)
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(model.vocab)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scheme", default="int4", choices=SCHEMES)
    parser.add_argument("--layers", type=int, default=MIXTRAL_8X7B.layers)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = {"model": MIXTRAL_8X7B.name, "weights": "random"} | {
        name: getattr(args, name) for name in ("scheme", "layers", "tokens")
    }

    def note(**facts: Any) -> None:
        """Keeps facts where a cut run leaves them too."""
        result.update(facts)
        print(facts, flush=True)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")

    folder = args.folder / f"{args.scheme}-{args.layers}"
    start = time.perf_counter()
    if not (folder / "tokenizer.json").exists():  # what is written last
        shutil.rmtree(folder, ignore_errors=True)
        write_model(folder, args.scheme, args.layers, args.device)
    note(write_s=round(time.perf_counter() - start, 1))
    start = time.perf_counter()
    llm = LLM(str(folder), device=args.device, cache_tokens=4096, max_num_seqs=1, max_num_batched_tokens=256)
    mixture = llm.model.layers[0].mlp
    assert isinstance(mixture, MixtureOfExperts)
    experts = type(mixture.experts).__name__  # computed by one call, or one by one
    note(load_and_warm_up_s=round(time.perf_counter() - start, 1), load=str(llm.load_report), experts=experts)
    first, token = milliseconds(llm, args.tokens)
    note(ms_per_token=round(token, 3), first_token_ms=round(first, 2))
    if args.device.startswith("cuda"):
        peak = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        note(gpu=torch.cuda.get_device_name(), peak_gb=peak)


if __name__ == "__main__":
    main()
