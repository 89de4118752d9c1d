import pytest
import torch

from helpers.small_configs import GROUPED, LATENT
from rorqual.engine import Engine, SamplingParams
from rorqual.errors import UserError
from rorqual.model import Transformer
from rorqual.model.router_hooks import choices_of

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], list(range(1, 20)), [3]]


@pytest.mark.parametrize(
    "engine",
    [
        {},
        {"max_prefill_tokens": 4},  # prompts in chunks
        {"max_num_seqs": 2},  # sequences wait
        {"kv_cache_bytes": 5 * 2 * 16 * (16 + 4) * 4 * 3},  # blocks are few: sequences are preempted
    ],
)
def test_recorded_experts_are_those_of_one_pass(engine):
    torch.manual_seed(0)
    model = Transformer(LATENT).eval()
    made = Engine(model, record_routing=True, **engine)
    found = made.generate(PROMPTS, SamplingParams(max_tokens=20, n=3, seed=1, ignore_eos=True))
    assert {len(c.tokens) for c in found} == {20}
    assert bool(made.status().counters.preemptions) == ("kv_cache_bytes" in engine)
    for i, completion in enumerate(found):
        tokens = PROMPTS[i // 3] + completion.tokens[:-1]
        with torch.no_grad(), choices_of(model) as chosen:
            model(torch.tensor([tokens]))
        expected = torch.stack(chosen, 1)
        assert completion.routing.shape == expected.shape == (len(tokens), 2, 2)
        assert torch.equal(completion.routing.long().sort(-1).values, expected.sort(-1).values)


def test_where_there_is_nothing_to_record():
    assert Engine(Transformer(LATENT)).generate([[1]], SamplingParams(max_tokens=2))[0].routing is None
    with pytest.raises(UserError, match="record_routing = True: this model has no experts"):
        Engine(Transformer(GROUPED), record_routing=True)
