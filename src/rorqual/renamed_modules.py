"""Old module names, importable with a warning until release 0.3: `rorqual.reason.grpo` is `rorqual.rl.grpo`."""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODULES = {  # old → new, below `rorqual`
    "reason": "rl",
    "characters": "unicode_checks",
    "data.chat": "data.chat_dataset",
    "data.cut": "data.text_pieces",
    "data.marks": "data.special_tokens",
    "data.messages": "data.chat_messages",
    "data.open": "data.datasets",
    "data.shards": "data.token_shards",
    "data.splits": "data.heldout",
    "data.template": "data.chat_template",
    "data.tools": "data.tool_formats",
    "engine.blocks": "engine.block_manager",
    "engine.cache": "engine.paged_kv_cache",
    "engine.choose": "engine.sampling",
    "engine.direct": "engine.fused_cpu",
    "engine.forward": "engine.model_runner",
    "engine.given": "engine.argument_checks",
    "engine.graphs": "engine.cuda_graphs",
    "engine.load": "engine.load_model",
    "engine.recommended": "engine.generation_defaults",
    "engine.rows": "engine.batch",
    "engine.sampler": "engine.sampling_params",
    "engine.score": "engine.prompt_logprobs",
    "engine.speculate": "engine.speculative",
    "engine.text": "engine.detokenizer",
    "evals.guard": "sandbox.audit_hook",
    "evals.jail": "sandbox.namespaces",
    "evals.program": "evals.extract_code",
    "evals.run": "evals.evaluate",
    "evals.sandbox": "sandbox.run_program",
    "kernels.add": "kernels.accumulate",
    "kernels.attention": "kernels.dense_attention",
    "kernels.draw": "kernels.sample",
    "kernels.extend": "kernels.append_tokens",
    "kernels.lowbit": "kernels.quantized_linear",
    "kernels.machine": "kernels.dtypes",
    "kernels.pages": "kernels.huge_pages",
    "kernels.past": "kernels.paged_attention",
    "kernels.past8": "kernels.kv_int8",
    "kernels.permute": "kernels.moe_permute",
    "kernels.rotate": "kernels.rotary",
    "kernels.step": "kernels.fused_decode",
    "model.checkpoint": "checkpoint.huggingface",
    "model.files": "model.model_directory",
    "model.foreign": "model.unsupported",
    "model.fp8": "checkpoint.fp8_blocks",
    "model.gguf": "checkpoint.gguf_import",
    "model.gguf_config": "checkpoint.gguf_config",
    "model.gguf_file": "checkpoint.gguf_file",
    "model.gguf_tokenizer": "checkpoint.gguf_tokenizer",
    "model.past": "model.kv_cache",
    "model.released": "model.release_settings",
    "model.shards": "checkpoint.safetensors_io",
    "paths": "local_paths",
    "plan.machine": "plan.hardware",
    "precision.gguf": "precision.gguf_weights",
    "precision.lowbit": "precision.quantize",
    "precision.smooth": "precision.smoothquant",
    "precision.store": "precision.packed_checkpoint",
    "process": "process_tuning",
    "reason.algebra": "judge.algebra",
    "reason.answers": "judge.extract_answer",
    "reason.countdown": "rl.envs.countdown",
    "reason.describe": "rl.rollout_metrics",
    "reason.documents": "speedrun.documents",
    "reason.environment": "rl.envs.registry",
    "reason.equality": "judge.equality",
    "reason.graph": "rl.envs.graph_coloring",
    "reason.grpo": "rl.grpo",
    "reason.gym": "rl.envs.reasoning_gym",
    "reason.jsonl": "rl.envs.jsonl",
    "reason.judge": "judge.judge",
    "reason.knights": "rl.envs.knights_knaves",
    "reason.notation": "judge.notation",
    "reason.problems": "rl.envs.environment",
    "reason.prompts": "rl.prompts",
    "reason.rejection": "rl.rejection_sampling",
    "reason.rewards": "rl.rewards",
    "reason.rl": "rl.rl_run",
    "reason.rollout": "rl.rollout",
    "reason.room": "rl.context_limits",
    "reason.rows": "rl.rollout_packing",
    "reason.trainer": "rl.grpo_trainer",
    "reason.units": "judge.units",
    "reason.values": "judge.numeric",
    "reason.worker": "sandbox.checker",
    "report.draw": "report.charts",
    "report.page": "report.html",
    "report.record": "report.run_record",
    "report.words": "report.formatting",
    "serve.answers": "serve.responses",
    "serve.aside": "serve.background",
    "serve.body": "serve.request_body",
    "serve.conversation": "serve.chat_state",
    "serve.errors": "serve.api_errors",
    "serve.fields": "serve.request_fields",
    "serve.guard": "serve.middleware",
    "serve.metrics": "serve.prometheus",
    "serve.page": "serve.chat_page",
    "serve.run": "serve.server",
    "serve.shapes": "serve.schemas",
    "serve.tools": "serve.tool_calls",
    "serve.worker": "serve.engine_thread",
    "terminal": "cli.terminal",
    "train.card": "train.model_card",
    "train.compiling": "train.compile",
    "train.finish": "train.release",
    "train.inputs": "train.input_fingerprints",
    "train.loop": "train.run_loop",
    "train.numbers": "train.number_init",
    "train.prepare": "train.build_model",
    "train.export": "train.release",
    "train.pretrain": "train.training_run",
    "train.run": "train.run_folder",
    "train.sft": "train.training_run",
    "train.signals": "train.interrupts",
}


class OldNames(MetaPathFinder, Loader):
    """Consulted before all other finders: an old folder may be left in a checkout, with bytecode in it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith("rorqual.") or fullname.removeprefix("rorqual.") not in MODULES:
            return None
        return ModuleSpec(fullname, self, is_package=fullname == "rorqual.reason")

    def exec_module(self, module: ModuleType) -> None:
        """The old module looks every name up in the new one, so that both hold the same objects."""
        new = f"rorqual.{MODULES[module.__name__.removeprefix('rorqual.')]}"
        warnings.warn(f"{module.__name__} is now {new}", DeprecationWarning, stacklevel=2)
        target = importlib.import_module(new)

        def look_up(name: str) -> Any:
            return getattr(target, name)

        module.__getattr__ = look_up  # type: ignore[method-assign]


def install() -> None:
    if not any(isinstance(finder, OldNames) for finder in sys.meta_path):
        sys.meta_path.insert(0, OldNames())
