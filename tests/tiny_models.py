"""Models of a few thousand weights, as folders that any of the engine's tests can read."""

import copy

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers


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
    sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, max_position_embeddings=128)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, eos_token_id=None)
    torch.manual_seed(3)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | heads | config)).eval()


def save_tiny_llama(folder, dtype=torch.float32, **config):
    """Saves one in that dtype with its tokenizer; returns it in fp32."""
    model = tiny_llama(**config)
    for weight in model.parameters():
        weight.data.copy_(weight.to(dtype))
    copy.deepcopy(model).to(dtype).save_pretrained(folder)
    save_tokenizer(folder, model.config.vocab_size)
    return model
