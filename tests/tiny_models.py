"""Models of a few thousand weights, as folders that any of the engine's tests can read."""

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers


def save_tokenizer(folder, vocabulary):
    """Words w0, w1, …, whose numbers are their token ids."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def tiny_llama(**config):
    """A Llama with random weights."""
    sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, max_position_embeddings=128)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, eos_token_id=None)
    torch.manual_seed(3)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | heads | config)).eval()


def save_tiny_llama(folder, dtype=torch.float32, **config):
    """Saves one with its tokenizer; returns it."""
    model = tiny_llama(**config).to(dtype)
    model.save_pretrained(folder)
    save_tokenizer(folder, model.config.vocab_size)
    return model
