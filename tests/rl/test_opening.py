"""Who opens the thinking, the prompt or the model: rewards and training samples have the same answer."""

import pytest
from tokenizers.processors import TemplateProcessing

from helpers.scripted_models import BYTE_LEVEL, END, LEGACY, LETTER, SAY, puppet, vocabulary
from rorqual.data.chat_dataset import encode_sample
from rorqual.engine import Engine, SamplingParams
from rorqual.errors import UserError
from rorqual.judge.extract_answer import read_answer
from rorqual.recipe import RewardSection
from rorqual.rl.envs.environment import Environment, Problem
from rorqual.rl.prompts import render
from rorqual.rl.rejection_sampling import rejection_sample
from rorqual.rl.rewards import format_reward
from rorqual.rl.rollout import sample_groups

ANSWER = "<answer>24</answer>"
WORDS = ("<think>", "</think>", "6*4", ANSWER)
SAYS = {SAY: "<think>", "<think>": "6*4", LETTER[10]: "6*4", "6*4": "</think>", "</think>": ANSWER, ANSWER: END}
GREEDY = SamplingParams(temperature=0, max_tokens=8)
ASKED = "what is <think> or </think> in 6 times 4, <say>?<think>"


def template(opened):
    return "{{ messages[0]['content'] }}<turn>{% if add_generation_prompt %}<say>" + opened + "{% endif %}"


def engine(opened="", kind=BYTE_LEVEL):
    tokenizer = vocabulary(kind, words=WORDS, template=template(opened))
    says = SAYS if kind == BYTE_LEVEL else {k: v for k, v in SAYS.items() if k != LETTER[10]}
    return Engine(puppet(tokenizer, says), tokenizer, max_num_seqs=4)


def asked(question):
    return Problem(question, "24", "4 6", "", "sums")


@pytest.mark.parametrize("question", ["6 times 4", ASKED])
@pytest.mark.parametrize(
    ("opened", "way", "text", "reward"),
    [
        ("<think>", "chat", f"<think>6*4</think>{ANSWER}", 1),
        ("<think>\n", "chat", f"<think>\n6*4</think>{ANSWER}", 1),
        ("", "chat", f"<think>6*4</think>{ANSWER}", 1),
        ("<think>\n\n</think>", "chat", f"<think>\n\n</think>{ANSWER}", 0),
        ("</think>", "chat", f"</think>{ANSWER}", 0),
        ("", "plain", f"<think>6*4</think>{ANSWER}", 1),
    ],
)
def test_a_sample_has_what_its_prompt_has_written_of_it(question, opened, way, text, reward):
    (sample,) = sample_groups(engine(opened), [asked(question)], way, GREEDY).samples
    assert (sample.text, format_reward(sample.text), read_answer(sample.text, "24")) == (text, reward, "24")


def test_where_the_marks_are_no_tokens_the_prompt_s_end_tells():
    tokenizer = vocabulary(BYTE_LEVEL, words=("6*4", f"</think>{ANSWER}"))
    says = {">": "6*4", "6*4": f"</think>{ANSWER}", f"</think>{ANSWER}": END}
    found = sample_groups(Engine(puppet(tokenizer, says), tokenizer), [asked("6 times 4")], "plain", GREEDY)
    assert found.samples[0].text == f"<think>6*4</think>{ANSWER}"


@pytest.mark.parametrize("way", ["r1-zero", "plain"])
def test_a_prompt_has_what_stands_before_every_text_and_not_what_stands_behind(way):
    tokenizer = vocabulary(BYTE_LEVEL, words=WORDS, bos="<begin>")
    special = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<begin>", END)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"<begin> $A {END}", special_tokens=special)
    names = tokenizer.convert_ids_to_tokens(render(f"a {END}?", way, tokenizer))
    assert (names[0], names.count("<begin>"), names.count(END)) == ("<begin>", 1, 0)


class Sums(Environment):
    def candidate(self, seed, index):
        return Problem(f"{ASKED} ({index})", "24", str(index), "", self.family)

    def check(self, problem, answer):
        return float(answer == problem.answer)


@pytest.mark.parametrize("kind", [BYTE_LEVEL, LEGACY])
@pytest.mark.parametrize("opened", ["<think>", ""])
def test_a_distilled_sample_trains_on_the_tokens_that_were_sampled(opened, kind):
    teacher = engine(opened, kind)
    (batch,) = rejection_sample(teacher, [Sums("sums", 1.0)], 3, "chat", RewardSection(), GREEDY)
    tokenizer = teacher.tokenizer
    assert len(batch.rows) == 3
    for row in batch.rows:
        tokens, marks = encode_sample(row, tokenizer)
        names = tokenizer.convert_ids_to_tokens(tokens)
        assert (names.count("<think>"), names.count("</think>"), names.count("<say>")) == (1, 1, 1)
        made = teacher.generate([tokens[: marks.index(1)]], GREEDY)[0].tokens
        assert tokens[marks.index(1) :] == made
    question = next(iter(Sums("sums", 1.0).problems("train", 1, 0))).question
    assert ASKED in tokenizer.decode(render(question, "chat", tokenizer)).replace("  ", " ")


def test_a_template_that_refuses_a_question_is_one_sentence():
    tokenizer = vocabulary(BYTE_LEVEL, words=WORDS, template="{{ raise_exception('no system message') }}")
    with pytest.raises(UserError, match=r"does not accept these messages .*no system message"):
        render("6 times 4", "chat", tokenizer)
