import torch

from rorqual.data.tokenizer import train_tokenizer
from rorqual.model import ModelConfig, Transformer
from rorqual.recipe import TokenizerSection
from rorqual.train.number_init import SCALE, start_numbers


def test_numbers_start_near_their_neighbours_and_nothing_else_moves():
    tokenizer = train_tokenizer(["a 007 b", "12"] * 3, TokenizerSection(vocab_size=400, whole_numbers=120))
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(
            model_type="llama", vocab_size=len(tokenizer), hidden_size=64, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=2,
        )
    )  # fmt: skip
    before = model.model.embed_tokens.weight.clone()
    assert start_numbers(model, tokenizer) == 120
    after = model.model.embed_tokens.weight
    number = {n: tokenizer.convert_tokens_to_ids(str(n)) for n in range(120)}
    others = [i for i in range(len(tokenizer)) if i not in number.values()]
    assert torch.equal(after[others], before[others])

    def likeness(a, b):
        return float(torch.cosine_similarity(after[number[a]], after[number[b]], dim=0))

    assert likeness(37, 38) > likeness(37, 43)
    assert likeness(37, 57) > likeness(37, 52), "the same last digit counts"
    assert torch.allclose(model.head_weight[number[50]].norm(), torch.tensor(SCALE), atol=0.2)
