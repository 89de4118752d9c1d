"""On-policy distillation: what teachers say of the tokens that the student sampled.

The student samples, and for each of its tokens learns the reverse KL to the teacher's distribution, so that it is
taught where it goes itself: GKD with student samples (Agarwal et al. 2024, 2306.13649, §3.2), with one teacher for all
environments, or one for each (as DeepSeek-V4 merges specialists). The loss is one of

    sampled   a token's advantage gains w·(log π_T(o_t) − log π_old(o_t)), an estimate of −KL(π‖π_T) (Thinking Machines
              2025, "On-Policy Distillation"; no token is blamed for later ones)
    full      w·Σ_v π(v) (log π(v) − log π_T(v)) is added to a token's loss

N tokens of a micro-batch, whose completions have the same teacher.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rorqual.checkpoint.huggingface import load_model
from rorqual.data.tokenizer import load_tokenizer
from rorqual.errors import UserError
from rorqual.kernels.reverse_kl import reverse_kl
from rorqual.model import ModelConfig, Transformer
from rorqual.model.model_directory import is_gguf, model_directory
from rorqual.precision.packed_checkpoint import is_quantized
from rorqual.recipe import GRPOSection, OPDSection
from rorqual.rl.rollout_logprobs import target_logprobs, target_states
from rorqual.rl.rollout_packing import PackedRollout
from rorqual.shapes import Float
from rorqual.tokenizer_protocol import Tokenizer


@dataclass
class Teachers:
    """Frozen models, by path."""

    section: OPDSection
    grpo: GRPOSection
    models: dict[str, Transformer]

    @classmethod
    def load(
        cls,
        section: OPDSection,
        grpo: GRPOSection,
        environments: Sequence[str],
        student: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "Teachers":
        """Those of some environments. Raises UserError for what cannot be read."""
        models: dict[str, Transformer] = {}
        for path in teacher_paths(section, environments):
            models[path] = load_model(path, dtype, device).eval().requires_grad_(False)
            _check_size(path, models[path].config, student, section)
        return cls(section, grpo, models)

    def of(self, environments: Sequence[str]) -> list[str]:
        """The path of each environment's teacher."""
        return [self.section.of(name) or "" for name in environments]

    @torch.no_grad()
    def states(self, path: str, packed: PackedRollout) -> Float[Tensor, "N E"]:
        """The teacher's hidden states at the targets."""
        return target_states(self.models[path], packed)

    @torch.no_grad()
    def logprobs(self, path: str, states: Float[Tensor, "N E"], packed: PackedRollout) -> Float[Tensor, " N"]:
        """The teacher's log-probabilities of the targets."""
        return target_logprobs(self.models[path], states, packed, self.grpo.temperature)[0]

    def divergence(
        self,
        path: str,
        states: Float[Tensor, "N E"],
        packed: PackedRollout,
        student: Transformer,
        student_states: Float[Tensor, "N D"],
    ) -> Float[Tensor, " N"]:
        """KL(π‖π_T) of each target's distribution, over the whole vocabulary; differentiable by the student's."""
        allowed = None if packed.allowed is None else packed.allowed_rows
        head = self.models[path].head_weight
        return reverse_kl(student_states, student.head_weight, states, head, self.grpo.temperature, allowed)


def teacher_paths(section: OPDSection, environments: Sequence[str]) -> list[str]:
    """Of the teachers that some environments use, each once."""
    return list(dict.fromkeys(path for name in environments if (path := section.of(name)) is not None))


def check_teachers(
    section: OPDSection, environments: Sequence[str], tokenizer: Tokenizer, student: ModelConfig
) -> None:
    """Raises UserError for a teacher that is not there, is quantised, or has other tokens than the student."""
    for path in teacher_paths(section, environments):
        if is_gguf(path) or is_quantized(model_directory(Path(path))):
            raise UserError(f"opd teacher {path}: its weights are quantised; give a model that is not")
        _check_size(path, ModelConfig.load(path), student, section)
        own, other = tokenizer.get_vocab(), load_tokenizer(path).get_vocab()
        if own != other:
            token = min(own.items() ^ other.items(), key=lambda item: item[1])[0]
            raise UserError(
                f"opd teacher {path}: its vocabulary is not the student's ({token!r} has another id, or is missing in "
                "one of them); on-policy distillation needs the same tokenizer, 'rorqual distill' does not"
            )


def _check_size(path: str, teacher: ModelConfig, student: ModelConfig, section: OPDSection) -> None:
    sizes = teacher.vocab_size, student.vocab_size
    if sizes[0] < sizes[1] or (section.loss == "full" and sizes[0] != sizes[1]):
        raise UserError(
            f"opd teacher {path}: its head has {sizes[0]} tokens and the student's {sizes[1]}; use a teacher with the "
            "same"
        )
