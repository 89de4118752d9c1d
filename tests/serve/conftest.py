"""A tiny reasoning model of random weights, served on a port of this machine."""

import asyncio
import threading
import time

import openai
import pytest
import torch
import uvicorn

from rorqual.data.tokenizer import save_tokenizer, train_tokenizer
from rorqual.engine import Engine, SamplingParams
from rorqual.model import ModelConfig, Transformer
from rorqual.model.checkpoint import save_model
from rorqual.recipe import TokenizerSection
from rorqual.serve.app import build_app
from rorqual.serve.run import bind
from rorqual.serve.service import Options, Service

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if think is not defined or think %}<think>{% endif %}{% endif %}"
)


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    section = TokenizerSection(
        vocab_size=300, special_tokens=["<|user|>", "<|assistant|>", "<|system|>", "<think>", "</think>"]
    )
    tokenizer = train_tokenizer(["what is 12 and 7, or the sum of both? é 🐋"] * 3, section)
    tokenizer.chat_template = TEMPLATE
    config = ModelConfig(
        model_type="deepseek_v3", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
        n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=16,
        first_k_dense_replace=1, initializer_range=0.2, max_position_embeddings=2048, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("served") / "tiny"
    save_model(Transformer(config), path, tokenizer)
    save_tokenizer(tokenizer, path)
    return path


class Server:
    """A running service: `url`, `service`, and `stop`, which ends it as SIGTERM does."""

    def __init__(self, directory, slots=8, cache_bytes=1 << 20, page=None, **options):
        engine = Engine(directory, slots=slots, cache_bytes=cache_bytes, prefix_cache=True)
        self.service = Service(engine, SamplingParams(), Options("tiny", **options))
        app = build_app(self.service)
        if page is not None:
            page(app, self.service)
        listening = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(app, log_config=None))
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve(sockets=[listening])), daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def client(self, key="none", **options):
        return openai.OpenAI(base_url=self.url + "/v1", api_key=key, max_retries=0, **options)

    def settled(self, seconds=20.0):
        """Wait until nothing runs; gives the blocks still held."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            now = self.service.engine.status()
            if self.service.worker.count == now.running == now.waiting == now.blocks_held == 0:
                break
            time.sleep(0.01)
        return self.service.engine.status().blocks_held

    def stop(self):
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


@pytest.fixture(scope="session")
def server(directory):
    running = Server(directory)
    yield running
    running.stop()


@pytest.fixture
def client(server):
    return server.client()


@pytest.fixture
def start(directory):
    """Servers with settings of their own."""
    running = []

    def begin(**options):
        running.append(Server(directory, **options))
        return running[-1]

    yield begin
    for one in running:
        if one.thread.is_alive():
            one.stop()
