"""Sides that generate: this engine, and transformers' networks with its own cache; and a mixture to give them."""

import time
from pathlib import Path

import torch

from rorqual.engine import Engine, SamplingParams
from rorqual.model import ModelConfig

GREEDY = {"temperature": 0, "ignore_eos": True}
MIXTURE = ModelConfig(
    model_type="deepseek_v3", vocab_size=16384, hidden_size=768, intermediate_size=1600, num_hidden_layers=12,
    num_attention_heads=12, kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
    n_routed_experts=32, n_shared_experts=1, num_experts_per_tok=4, moe_intermediate_size=320, first_k_dense_replace=1,
    initializer_range=0.02, max_position_embeddings=2048,
)  # fmt: skip


class Ours:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def prefill(self, prompt: list[int]) -> float:
        start = time.perf_counter()
        self.engine.generate([prompt], SamplingParams(max_tokens=1, **GREEDY))
        return time.perf_counter() - start

    def decode(self, prompts: list[list[int]], count: int) -> float:
        engine = self.engine
        for prompt in prompts:
            engine.submit(prompt, SamplingParams(max_tokens=count, **GREEDY), watched=False)
        while engine.status().running < len(prompts):
            engine.step()
        before, start = engine.status().counts.made_tokens, time.perf_counter()
        while not engine.idle:
            engine.step()
        return (engine.status().counts.made_tokens - before) / (time.perf_counter() - start)


class Transformers:
    def __init__(self, directory: Path, device: str = "cpu") -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval().to(device)

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
