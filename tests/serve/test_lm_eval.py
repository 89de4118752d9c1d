"""lm-evaluation-harness, which knows nothing of us, runs a task of its own through the API."""

import json

import pytest
import torch

from rorqual.engine.prompt_logprobs import PromptLogprobs

lm_eval = pytest.importorskip("lm_eval.evaluator")

QUESTIONS = [
    {"question": "what is 12 and 7?", "choices": ["the sum", "both"], "answer": 0},
    {"question": "what is the sum of both?", "choices": ["12", "7 or 12"], "answer": 1},
    {"question": "or the sum?", "choices": ["what", "is 7"], "answer": 0},
]
BOTH = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOOSE = (
    BOTH
    + """
task: rorqual_choose
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
)
SAY = (
    BOTH
    + """
task: rorqual_say
output_type: generate_until
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["?"], max_gen_toks: 12, temperature: 0.0}}
metric_list: [{{metric: exact_match}}]
"""
)


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    for name, text in (("choose", CHOOSE), ("say", SAY)):
        (tmp_path / f"{name}.yaml").write_text(text.format(data=data))
    return lm_eval.TaskManager(include_path=str(tmp_path), include_defaults=False)


def run(tasks, task, model, url, directory, **options):
    arguments = {"model": "tiny", "base_url": url, "num_concurrent": 4, "tokenizer": str(directory),
                 "tokenizer_backend": "huggingface"}  # fmt: skip
    found = lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=[task], task_manager=tasks, bootstrap_iters=0, **options
    )
    return found["samples"][task]


def test_choices_are_scored_as_the_engine_scores_them(server, directory, tasks):
    samples = run(tasks, "rorqual_choose", "local-completions", server.url + "/v1/completions", directory)
    assert len(samples) == len(QUESTIONS)
    engine = server.service.engine
    for sample in samples:
        question = engine.tokenizer(sample["doc"]["question"]).input_ids
        for choice, ((found, greedy),) in zip(sample["doc"]["choices"], sample["resps"], strict=True):
            whole = question + engine.tokenizer(" " + choice).input_ids
            scoring = PromptLogprobs(tuple(whole), engine.model.head_weight, 1)
            with torch.inference_mode():
                scoring.append(engine.model(torch.tensor([whole]))[0], 0)  # all at once
            logprobs, ranked = scoring.logprobs, scoring.ranked
            assert float(found) == pytest.approx(sum(logprobs[len(question) :]), abs=1e-3)
            best = [r[0][0] for r in ranked[len(question) :]] == whole[len(question) :]
            assert str(greedy) == str(best)


def test_answers_are_those_of_the_api(server, client, directory, tasks):
    samples = run(
        tasks, "rorqual_say", "local-chat-completions", server.url + "/v1/chat/completions", directory,
        apply_chat_template=True,
    )  # fmt: skip
    assert len(samples) == len(QUESTIONS)
    for sample in samples:
        asked = [{"role": "user", "content": sample["doc"]["question"]}]
        answer = client.chat.completions.create(model="tiny", messages=asked, max_tokens=12, temperature=0, stop=["?"])
        assert sample["resps"][0][0] == answer.choices[0].message.content
