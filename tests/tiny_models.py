"""Models of a few thousand weights, as folders that any of the engine's tests can read."""

import copy

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

TINY = dict(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    max_position_embeddings=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.2,
    eos_token_id=None,
)


def save_tokenizer(folder, vocabulary):
    """Words w0, w1, …, whose numbers are their token ids."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def save_bpe_tokenizer(folder, size):
    """Byte-level BPE with two special tokens, whose ids it returns, and a chat template; it splits as GPT-2 does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        ["the sea the sky and then"] * 9, trainers.BpeTrainer(vocab_size=size - 2, initial_alphabet=alphabet)
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    template = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=template
    ).save_pretrained(folder)
    return tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")


def tiny_llama(**config):
    """A Llama with random weights."""
    torch.manual_seed(3)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY | config)).eval()


def from_config(config):
    """A model with random weights, computed by transformers' plainest code, which takes float64 too."""
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    return model.eval()


def part_experts(model):
    """Gives a mixture's routers decisions that rounding does not turn around.

    A token's embedding orders the experts; no layer writes over that, and each layer's router knows them in another
    order. Otherwise the model compared with could take another expert somewhere, which no tolerance allows for.
    """
    config = model.config
    experts = torch.arange(config.num_experts if config.model_type == "qwen2_moe" else config.num_local_experts)
    embedding = model.model.embed_tokens.weight.data
    for row in embedding:
        row[experts] = torch.randperm(len(experts)).float()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data[experts] = 0
        layer.mlp.experts.down_proj.data[:, experts] = 0
        if hasattr(layer.mlp, "shared_expert"):
            layer.mlp.shared_expert.down_proj.weight.data[experts] = 0
        layer.post_attention_layernorm.weight.data[experts] = 1
        router = torch.randn(len(experts), config.hidden_size) * 0.01
        router[experts, torch.randperm(len(experts))] = 3
        layer.mlp.gate.weight.data.copy_(router)
    return model


def released(model):
    """A model's weights by the names of released checkpoints; of experts, which transformers stacks, views."""
    weights = {}
    qwen = model.config.model_type in ("qwen2_moe", "qwen3_moe")
    block, gate, up, down = (
        ("mlp", "gate_proj", "up_proj", "down_proj") if qwen else ("block_sparse_moe", "w1", "w3", "w2")
    )
    for name, weight in model.state_dict().items():
        at, is_expert, which = name.partition(".mlp.experts.")
        if not is_expert:
            weights[name.replace(".mlp.gate.", f".{block}.gate.")] = weight
            continue
        for i, of in enumerate(weight):
            matrices = {down: of} if which == "down_proj" else dict(zip((gate, up), of.chunk(2), strict=True))
            weights |= {f"{at}.{block}.experts.{i}.{w}.weight": matrix for w, matrix in matrices.items()}
    return weights


def tiny_mixtral(**config):
    """A Mixtral with random weights."""
    experts = dict(num_local_experts=4, num_experts_per_tok=2)
    torch.manual_seed(3)
    return from_config(transformers.MixtralConfig(**TINY | experts | config))


def save_tiny_llama(folder, dtype=torch.float32, **config):
    """Saves one in that dtype with its tokenizer; returns it in fp32."""
    return save(tiny_llama(**config), folder, dtype)


def save_tiny_mixtral(folder, dtype=torch.float32, **config):
    """Saves one in that dtype with its tokenizer; returns it in fp32."""
    return save(tiny_mixtral(**config), folder, dtype)


def save(model, folder, dtype):
    for weight in model.parameters():
        weight.data.copy_(weight.to(dtype))
    copy.deepcopy(model).to(dtype).save_pretrained(folder)
    save_tokenizer(folder, model.config.vocab_size)
    return model
