"""Tiny models with scripted output: a table gives the next token from the last one alone. Their tokenizers, too."""

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from rorqual.checkpoint.huggingface import save_model
from rorqual.data.tokenizer import save_tokenizer
from rorqual.model import ModelConfig, Transformer

END, SAY = "<end>", "<say>"
CHAT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<say>{% endif %}{{ m['content'] }}<turn>{% endfor %}"
    "{% if add_generation_prompt %}<say>{% endif %}"
)
LETTER = bytes_to_unicode()  # how byte-level vocabularies write a byte
BYTE_LEVEL, LEGACY, METASPACE = "byte-level", "prepend", "metaspace"  # the last two: SentencePiece's


def vocabulary(kind=BYTE_LEVEL, control=(), words=(), template=CHAT, bos=None):
    """A small tokenizer of one of three kinds; `control` tokens are special, `words` are added but not special."""
    special = list(dict.fromkeys([END, SAY, "<turn>", *([bos] if bos else []), *control]))
    if kind == BYTE_LEVEL:
        inner = [LETTER[b] for b in range(256)]
        made = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*special, *inner])}, merges=[]))
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else:
        small = [chr(c) for c in range(ord("a"), ord("z") + 1)]
        inner = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *small, *("▁" + c for c in small)]
        ids = {t: i for i, t in enumerate([*special, *inner])}
        merges = [("▁", c) for c in small]
        made = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        if kind == LEGACY:
            made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    made.add_special_tokens([AddedToken(t, normalized=False) for t in special])
    made.add_tokens([AddedToken(t, normalized=False) for t in words])
    if bos:
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END, clean_up_tokenization_spaces=False)
    fast.chat_template = template
    return fast


def puppet(tokenizer, says):
    """A model of one layer. says: {token: the next token, or {token: logit}}; after any other token comes END."""
    ids = tokenizer.get_vocab()
    count = len(ids)
    wide = -(-count // 64) * 64
    config = ModelConfig(
        model_type="llama", vocab_size=count, hidden_size=wide, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=64, max_position_embeddings=512,
        tie_word_embeddings=False, rope_interleave=False, eos_token_id=ids[END],
    )  # fmt: skip
    model = Transformer(config).eval()
    head = torch.zeros(count, wide)
    head[ids[END]] = 10.0
    for token, following in says.items():
        column = ids[token]
        head[:, column] = 0.0
        for after, logit in (following if isinstance(following, dict) else {following: 30.0}).items():
            head[ids[after], column] = logit
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.zero_()
            elif name == "model.norm.weight":
                weight.fill_(wide**-0.5)
        model.model.embed_tokens.weight.copy_(torch.eye(count, wide))
        model.lm_head.weight.copy_(head)
    return model


def save_puppet(path, tokenizer, says):
    """Write such a model and its tokenizer to the directory `path`, and return it."""
    save_model(puppet(tokenizer, says), path, tokenizer)
    save_tokenizer(tokenizer, path)
    return path
