import pytest

from helpers.documents import make_texts, write_jsonl
from rorqual.data import datasets as opening
from rorqual.data.datasets import open_chat_data, open_pretrain_data, open_tokenizer
from rorqual.data.tokenizer import save_tokenizer
from rorqual.recipe import ChatDataSection, DataSection, TokenizerSection

TEXTS = make_texts(200)


@pytest.fixture
def section(tmp_path):
    half = len(TEXTS) // 2
    for name, part in (("a", TEXTS[:half]), ("b", TEXTS[half:])):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": text} for text in part])
    sources = [{"path": str(tmp_path / "a.jsonl"), "weight": 3}, {"path": str(tmp_path / "b.jsonl")}]
    return DataSection(sources=sources, sequence_length=64, valid_fraction=0.1, fim_rate=0.2)


def test_text_to_batches(section, tmp_path):
    tokenizer = open_tokenizer(TokenizerSection(vocab_size=400), section)
    assert "<|fim_hole|>" in tokenizer.get_vocab()
    loader, heldout = open_pretrain_data(section, tokenizer, tmp_path / "cache", seed=1)
    batch = loader.next(8)
    assert batch.inputs.shape == batch.weights.shape == (8, 64)
    assert batch.documents is None
    assert loader.drawn.tolist() == [6, 2]
    # Bytes counted from tokens are those of the held-out text, less each document's first token, never a target.
    total = sum(size for _, size in heldout.batches(4))
    texts = [t for rows in heldout.sources for t in tokenizer.batch_decode(split(rows.documents))]
    firsts = [tokenizer.encode(t)[0] for t in texts]
    expected = sum(len(t.removesuffix("<|endoftext|>").encode()) for t in texts)
    assert total == expected - sum(len(tokenizer.decode([t])) for t in firsts)
    again, _ = open_pretrain_data(section, tokenizer, tmp_path / "cache", seed=1)
    again.load_state_dict(loader.state_dict())
    assert again.next(5).inputs.equal(loader.next(5).inputs)


def test_tokenizer_learns_from_each_source_by_weight(section, monkeypatch):
    seen = []
    monkeypatch.setattr(opening, "TOKENIZER_CHARACTERS", 4000)
    monkeypatch.setattr(opening, "train_tokenizer", lambda texts, *_, **__: seen.extend(texts))
    open_tokenizer(TokenizerSection(), section)
    first, second = (sum(len(t) for t in seen if t in set(part)) for part in (TEXTS[:100], TEXTS[100:]))
    assert 3000 <= first < 3400
    assert 1000 <= second < 1400


def split(documents):
    pairs = zip(documents.offsets[:-1], documents.offsets[1:], strict=True)
    return [documents.tokens[a:b].tolist() for a, b in pairs]


def test_isolation_and_no_held_out_data(section, tokenizer, tmp_path):
    section = section.model_copy(update={"isolate_documents": True, "valid_fraction": 0.0})
    loader, heldout = open_pretrain_data(section, tokenizer, tmp_path / "cache", seed=1)
    assert heldout is None
    batch = loader.next(4)
    starts = batch.positions == 0
    assert (starts.sum(1) > 1).any()
    mask = batch.attention_mask
    assert mask.sum(-1)[:, 0].equal((batch.positions + 1).where(batch.documents >= 0, mask.sum(-1)[:, 0]))


def test_chat_batches_isolate_samples(tokenizer, tmp_path):
    records = [{"prompt": f"{i}+1=", "completion": f"{i + 1}"} for i in range(60)]
    path = write_jsonl(tmp_path / "chat.jsonl", records)
    section = ChatDataSection(path=str(path), sequence_length=32, valid_fraction=0.1)
    loader, heldout, samples = open_chat_data(section, tokenizer, seed=0)
    assert len(samples.train) + len(samples.valid) == 60
    answers = set()
    for _ in range(loader.rows):
        batch = loader.next(1)
        for document in batch.documents.unique().tolist():
            chosen = (batch.documents == document) & (batch.weights > 0)
            if document >= 0:
                answers.add(tokenizer.decode(batch.targets[chosen]))
        assert not batch.weights[batch.documents < 0].any()
    held = {tokenizer.decode(b.targets[b.weights > 0]) for b, _ in heldout.batches(1)}
    assert held
    assert len(answers) == len(samples.train)
    assert all(answer.endswith("<|endoftext|>") for answer in answers)
    assert sum(size for _, size in heldout.batches(1)) == sum(len(h.replace("<|endoftext|>", "")) for h in held)


def test_a_tokenizer_that_is_there_is_not_trained(section, tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path / "kept")
    found = open_tokenizer(TokenizerSection(path=str(tmp_path / "kept")), section)
    assert found.get_vocab() == tokenizer.get_vocab()
