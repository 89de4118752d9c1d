"""rorqual generate, chat and serve."""

import contextlib
import time
from pathlib import Path
from typing import Annotated

import typer

from rorqual import strict_json
from rorqual.cli.options import (
    SEEDS,
    Adapter,
    AsJson,
    Device,
    Dtype,
    MaxTokens,
    ModelDir,
    Speculative,
    Temperature,
    ThinkingBudget,
    TopP,
    Weights,
    check_adapters,
    check_dtype,
    check_kv_cache_dtype,
    check_speculative,
    check_weights,
    expand_path,
    find_adapted,
    served_name,
    within,
)
from rorqual.errors import UserError


def generate(
    model: ModelDir,
    prompt: Annotated[str, typer.Argument(help="the user's message, in the chat template; -: standard input")] = "-",
    raw: Annotated[bool, typer.Option("--raw", help="complete the text as it is, without chat template")] = False,
    temperature: Temperature = None,
    top_p: TopP = None,
    max_tokens: MaxTokens = None,
    thinking_budget: ThinkingBudget = None,
    seed: Annotated[int | None, typer.Option(callback=within(*SEEDS), help="the same seed gives the same text")] = None,
    adapter: Adapter = None,
    weights: Weights = None,
    dtype: Dtype = "auto",
    speculative: Speculative = "auto",
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Complete a prompt once; --json adds tokens and timings."""
    from rorqual.cli.terminal import loading, read_prompt, templated, timed
    from rorqual.engine import Engine
    from rorqual.engine.generation_defaults import default_sampling

    bits, method, computed = check_weights(weights), check_speculative(speculative), check_dtype(dtype, device)
    directory, merged = find_adapted(model, adapter)
    params = default_sampling(
        directory, temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed,
        thinking_budget=thinking_budget,
    )  # fmt: skip
    text = read_prompt(prompt)
    started = time.monotonic()
    with loading(directory):
        engine = Engine(directory, weights=bits, dtype=computed, speculative=method, device=device, adapter=merged)
    loaded = time.monotonic()
    if raw:
        tokens = engine.encode(text)
    else:
        question = templated(engine, [{"role": "user", "content": text.rstrip("\n")}])
        tokens = engine.encode(question, begin=False)
    if as_json:
        found = timed(engine, tokens, params) | {"load_seconds": loaded - started}
        print(strict_json.dumps(found, ensure_ascii=False))
        return
    for piece in engine.stream(tokens, params):
        print(piece, end="", flush=True)
    print()


def chat(
    model: ModelDir,
    system: Annotated[str | None, typer.Option(help="the system message")] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    max_tokens: MaxTokens = None,
    thinking_budget: ThinkingBudget = None,
    adapter: Adapter = None,
    weights: Weights = None,
    dtype: Dtype = "auto",
    speculative: Speculative = "auto",
    device: Device = "cpu",
) -> None:
    """Chat with a model; Ctrl-C stops a reply, Ctrl-D exits."""
    from rorqual.cli.terminal import loading, talk
    from rorqual.engine import Engine
    from rorqual.engine.generation_defaults import default_sampling

    bits, method, computed = check_weights(weights), check_speculative(speculative), check_dtype(dtype, device)
    directory, merged = find_adapted(model, adapter)
    params = default_sampling(
        directory, temperature=temperature, top_p=top_p, max_tokens=max_tokens, thinking_budget=thinking_budget
    )
    with loading(directory):  # a turn prefills its new tokens only, and Ctrl-C waits for one chunk at most
        engine = Engine(
            directory,
            prefix_cache=True,
            max_prefill_tokens=512,
            weights=bits,
            dtype=computed,
            speculative=method,
            device=device,
            adapter=merged,
        )
    talk(engine, params, system)


def serve(
    model: ModelDir,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(callback=within(0, 65535), help="port to listen on; 0 takes a free one")] = 8000,
    name: Annotated[str | None, typer.Option(help="the model's name in the API; default: the directory's name")] = None,
    api_keys: Annotated[Path | None, typer.Option(help="a file of API keys, one a line; else RORQUAL_API_KEYS")] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(help="https://…: allow web pages of this origin, and its name as Host; repeat for more"),
    ] = None,
    anonymous: Annotated[bool, typer.Option("--anonymous", help="listen on a public address without keys")] = False,
    max_num_seqs: Annotated[int, typer.Option(callback=within(1, 10_000), help="sequences decoded at a time")] = 64,
    cache_gb: Annotated[
        float, typer.Option(callback=within(0, 10**6, above=True), help="memory of the KV cache, in GiB")
    ] = 1.0,
    max_queue: Annotated[
        int, typer.Option(callback=within(0, 10**6), help="sequences that may wait; beyond, 429")
    ] = 256,
    timeout: Annotated[
        float, typer.Option(callback=within(0, 10**6, above=True), help="time-out of a request, in seconds")
    ] = 600.0,
    adapter: Adapter = None,
    adapters: Annotated[
        str | None,
        typer.Option(
            metavar="NAME=DIR,…",
            help="LoRA adapters, unmerged; a request whose model is NAME gets that one's answer",
        ),
    ] = None,
    dtype: Dtype = "auto",
    weights: Weights = None,
    kv_cache_dtype: Annotated[
        str,
        typer.Option(
            help="fp8: about half of BF16's memory; int8: the same, for grouped-query attention; auto: the dtype that "
            "the model computes in, bfloat16 or float32"
        ),
    ] = "auto",
    speculative: Speculative = "auto",
    device: Device = "cpu",
    experts: Annotated[
        int,
        typer.Option(
            callback=within(1, 4096),
            help="processes of this machine that share the routed experts (cuda: a GPU each); --max-num-seqs and "
            "--cache-gb are of each",
        ),
    ] = 1,
    redundant_experts: Annotated[
        int,
        typer.Option(callback=within(0, 4096), help="copies of busy experts a layer, with --experts; placed by load"),
    ] = 0,
    replicas: Annotated[
        int,
        typer.Option(
            callback=within(1, 4096),
            help="engines behind this address (Ray Serve); requests go where their prefix is cached",
        ),
    ] = 1,
    page: Annotated[bool, typer.Option(help="serve a chat page at /")] = True,
) -> None:
    """OpenAI-compatible server (with DeepSeek's reasoning_content); SIGTERM finishes accepted requests, then exits."""
    from rorqual.cli.terminal import loading
    from rorqual.engine import Engine
    from rorqual.engine.generation_defaults import default_sampling
    from rorqual.serve.server import bind, check_address, check_origins, read_keys, serve_replicas
    from rorqual.serve.server import serve as run
    from rorqual.serve.service import Options

    if name is not None and not (name.strip() and name.isprintable()):
        raise UserError(f"--name {name!r}: give printable characters, or leave it out")
    cache_dtype = check_kv_cache_dtype(kv_cache_dtype)
    keys = read_keys(api_keys and expand_path(api_keys))
    check_address(host, keys, anonymous)
    origins = check_origins(allow_origin or ())
    bits, method, computed = check_weights(weights), check_speculative(speculative), check_dtype(dtype, device)
    directory, merged = find_adapted(model, adapter)
    served = check_adapters(adapters, name or served_name(Path(model)))
    for option, several in (("experts", experts), ("replicas", replicas)):
        if several > 1 and served:
            raise UserError(f"--adapters with --{option} {several}: one process alone serves adapters; leave one out")
    if experts > 1 and merged:
        raise UserError(f"--experts {experts} with --adapter: merge it first, with rorqual import; leave one out")
    if experts > 1 and replicas > 1:
        raise UserError(f"--experts {experts} with --replicas {replicas}: give one of the two")
    if experts == 1 and redundant_experts:
        raise UserError(f"--redundant-experts {redundant_experts}: is for --experts 2 or more; leave it out")
    sampling = default_sampling(directory)
    listening = bind(host, port)
    arguments = {
        "max_num_seqs": max_num_seqs, "kv_cache_bytes": int(cache_gb * 2**30), "prefix_cache": True, "dtype": computed,
        "weights": bits, "max_prefill_tokens": 512, "speculative": method, "device": device,
        "kv_cache_dtype": cache_dtype,
    }  # fmt: skip
    if merged or served:
        arguments |= {"adapter": merged, "adapters": served}
    options = Options(name or served_name(Path(model)), keys, max_queue, timeout, host=host, origins=origins)
    if replicas > 1:
        serve_replicas(directory, replicas, arguments, sampling, options, listening)
        return
    with contextlib.ExitStack() as ends:
        with loading(directory):
            if experts == 1:
                engine = Engine(directory, **arguments)
            else:
                from rorqual.engine.expert_parallel import ExpertParallelEngine

                engine = ExpertParallelEngine(directory, experts, redundant_experts, **arguments)
                ends.callback(engine.close)
        run(sampling, engine, options, listening, page)
