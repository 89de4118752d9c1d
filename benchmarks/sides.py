"""Sides that generate: this engine, and transformers' networks with its own cache; and a mixture to give them."""

import math
import time
from pathlib import Path
from typing import Any

import torch

from rorqual.checkpoint.huggingface import load_model
from rorqual.engine import Engine, SamplingParams
from rorqual.kernels.quantized_linear import QuantizedWeight, dequantize
from rorqual.model import ModelConfig, Transformer
from rorqual.precision.quantize import convert

GREEDY = {"temperature": 0, "ignore_eos": True}
MIXTURE = ModelConfig(
    model_type="deepseek_v3", vocab_size=16384, hidden_size=768, intermediate_size=1600, num_hidden_layers=12,
    num_attention_heads=12, kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
    n_routed_experts=32, n_shared_experts=1, num_experts_per_tok=4, moe_intermediate_size=320, first_k_dense_replace=1,
    initializer_range=0.02, max_position_embeddings=2048,
)  # fmt: skip


class Ours:
    """The engine on a model as users have it, with `options` of its own."""

    def __init__(self, model: Path, dtype: str, options: dict[str, Any]) -> None:
        self.engine = Engine(model, dtype=getattr(torch, dtype), **options)

    def prefill(self, prompt: list[int]) -> float:
        start = time.perf_counter()
        self.engine.generate([prompt], SamplingParams(max_tokens=1, **GREEDY))
        return time.perf_counter() - start

    def decode(self, prompts: list[list[int]], count: int) -> float:
        engine = self.engine
        for prompt in prompts:
            engine.submit(prompt, SamplingParams(max_tokens=count, **GREEDY), streaming=False)
        while engine.status().running < len(prompts):
            engine.step()
        before, start = engine.status().counters.generated_tokens, time.perf_counter()
        while not engine.idle:
            engine.step()
        return (engine.status().counters.generated_tokens - before) / (time.perf_counter() - start)

    def weight_bytes(self) -> int:
        """What a step of one sequence reads of packed weights."""
        model = self.engine.model
        modules = [v for m in model.modules() for v in vars(m).values() if isinstance(v, QuantizedWeight)]
        tied = model.config.tie_word_embeddings
        return sum(w.data.numel() for w in modules if tied or w is not model.model.embed_tokens.weight)

    def quality(self, windows: list[list[int]]) -> list[float]:
        """Perplexity, that of the same weights with FP32 activations, and by how many percent the logits differ."""
        model, plain = self.engine.model, exact(self.engine.model)
        packed, unpacked, difference, size = [], [], 0.0, 0.0
        for window in windows:
            packed += logprobs(model, window)
            unpacked += logprobs(plain, window)
            with torch.inference_mode():
                a, b = (m.logits(torch.tensor([window[:128]]))[0].float() for m in (model, plain))
            difference, size = difference + float((a - b).square().sum()), size + float(b.square().sum())
        return [perplexity(packed), perplexity(unpacked), 100 * math.sqrt(difference / size)]


class OursWithoutWords(Ours):
    """On a network without a tokenizer, on any device."""

    def __init__(self, model: Path, dtype: str, device: str, options: dict[str, Any]) -> None:
        self.engine = Engine(load_model(model, getattr(torch, dtype), device), **options)


class OursAtRandom(Ours):
    """On random weights of 4 bits."""

    def __init__(self, config: ModelConfig, dtype: str, options: dict[str, Any]) -> None:
        torch.manual_seed(0)
        self.engine = Engine(convert(Transformer(config).eval().to(getattr(torch, dtype)), "int4"), **options)


def exact(model: Transformer) -> Transformer:
    """A network with the same weights that multiplies them with FP32 activations."""
    plain = Transformer(model.config)
    modules, tensors = dict(model.named_modules()), dict(plain.named_parameters())
    with torch.no_grad():
        for name, parameter in tensors.items():
            owner, _, attribute = name.rpartition(".")
            value = getattr(modules[owner], attribute)
            parameter.copy_(dequantize(value) if isinstance(value, QuantizedWeight) else value)
    return plain.eval()


@torch.inference_mode()
def logprobs(model: Transformer, window: list[int]) -> list[float]:
    """Log-probability of every token given those before it, but of the first."""
    tokens = torch.tensor([window])
    found = model.logits(tokens)[0, :-1].float().log_softmax(-1)
    return found.gather(-1, tokens[0, 1:, None])[:, 0].tolist()


def perplexity(logprobs: list[float]) -> float:
    return math.exp(-sum(logprobs) / len(logprobs))


class Transformers:
    def __init__(self, directory: Path, dtype: str, device: str = "cpu") -> None:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
        self.model = model.eval().to(device)

    @torch.inference_mode()
    def prefill(self, prompt: list[int]) -> float:
        start = time.perf_counter()
        int(self.model(self._tensor([prompt]), logits_to_keep=1).logits[0, -1].argmax())
        return time.perf_counter() - start

    @torch.inference_mode()
    def decode(self, prompts: list[list[int]], count: int) -> float:
        count = min(count, 24)  # its speed does not change with the length, and it takes long
        found = self.model(self._tensor(prompts), logits_to_keep=1, use_cache=True)
        found.logits[:, -1].argmax(-1).tolist()  # a GPU has come as far as here
        start = time.perf_counter()
        for _ in range(count - 1):
            newest = found.logits[:, -1].argmax(-1, keepdim=True)
            found = self.model(newest, past_key_values=found.past_key_values, use_cache=True)
        found.logits[:, -1].argmax(-1).tolist()
        return len(prompts) * (count - 1) / (time.perf_counter() - start)

    def _tensor(self, prompts: list[list[int]]) -> torch.Tensor:
        return torch.tensor(prompts, device=self.model.device)
