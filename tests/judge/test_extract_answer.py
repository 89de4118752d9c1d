"""What a model wrote, and whether the answer that is read in it is the right one. Few of these have a tag."""

import pytest

from rorqual.judge.extract_answer import read_answer
from rorqual.judge.judge import copies, final_answer, same_answer

RIGHT = [
    ("72", "Half of 48 is 24, so together they make 72."), ("42", "So 12 + 30 = 42."),
    ("1234", "The answer is 1,234 apples, out of 2000."), ("1/2", r"So it is \boxed{\frac{1}{2}}."),
    ("-5", "The answer is −5."), ("0.5", "The answer is .5"), ("1500", "The answer is 1.5e3."),
    ("42", "The answer is 12 + 30 = 42."), ("72", "The final answer is:\n\n72"), ("72", "**Answer:** 72"),
    ("72", "**Answer: 72**"), ("72", "Answer:\n**72**"), ("72", "#### 72"), ("72", "Half...\n#### 72"),
    ("72", "So she has **72** eggs (48 + 24)."), ("1/2", r"Thus $x = \frac{1}{2}$."),
    ("blue", "The answer is **blue**."), ("blue", "blue"), ("blue", "Blue."), ("blue", "It is blue."),
    ("Paris", "The capital of France is **Paris**."), ("B", "The answer is (B)."), ("B", "The correct answer is B."),
    ("B", "B"), ("B", "**B**"), ("B", "**B. Paris**"), ("B", "Answer: B"), ("B", r"\boxed{B}"),
    ("x+1", r"Thus \boxed{x+1}"), ("x+1", "Thus the polynomial is $x+1$."), ("x+1", "x+1"),
    ("x+1", "The answer is x + 1."), ("5", r"\boxed{3}, then \boxed{5}"),
    ("5", r"First \boxed{3}. Then we get \boxed{5}."), ("3, 5", r"\boxed{3} and \boxed{5}"),
    ("18", "She makes $18 per day."), ("18", "She makes 9 * 2 = $18 every day at the farmer's market."),
    ("18", "The answer is $18$."), ("18", r"The answer is $\$18$."), ("18.5", "It costs $18.50."),
    ("70000", "His profit is $70,000."), ("540", "He runs 3*60=540 meters a week."),
    ("540", "He runs 540 meters a week.\n\n**540**"), ("-3", "x = -3"), ("-3", "So the answer is x = -3."),
    ("7", "3 + 4 is 7"), ("1.5", "It takes 1 1/2 hours"), ("3/4", "That is 3/4 of it."),
    ("0.75", "That is 3/4 of it."), ("25", "The answer is 25%."), ("0.25", "The answer is 25%."),
    ("2", "<think>1+1</think><answer> 2 </answer>"), ("2", "<think>1+1</think> it is 2"),
    ("2", "<answer>2</answer>"), ("2", "x</think>\n\n**Answer:** \\(2\\)"),
    ("2", "<think>\nhm</think>\n\nThe answer is:\n\\[\n\\boxed{2}\n\\]"), ("2020", "In May 2020."),
    ("35", "15 and 20 together make 35"),
    ("18", "**Final Answer**\n\nThe final answer is $\\boxed{18}$. I hope it is correct."),
    ("18", "The answer is 18 dollars. She has 2 left."),
    ("18", "Answer: 18 dollars\n\nLet me know if you need 2 more!"), ("5", "答案是 5。"), ("2.5", "The answer is 2.5."),
    ("2.5", "So it is 2.5."), ("1000000", "The answer is 1 million."), ("5 cm", "The answer is 5 cm."),
    ("(3,4)", "The answer is (3, 4)."), ("(3,4)", "So the point is $(3, 4)$."), ("(3,4)", r"\boxed{(3,4)}"),
    ("2, 3", "The answer is 2 and 3."), ("10:30", "The answer is 10:30."), ("10:30 AM", "It is 10:30 AM."),
    (r"\frac{\sqrt{3}}{2}", r"The answer is $\frac{\sqrt{3}}{2}$."),
    (r"\frac{\sqrt{3}}{2}", r"So $\sin 60^\circ = \frac{\sqrt{3}}{2}$."), ("yes", "Yes."), ("yes", "Yes, it is."),
    ("no", "The answer is no."), ("seven", "7"), ("whale", "A whale."),
    ("Louis XIV", "The answer is **Louis XIV**, king of France."), ("4", "$2+2=4$"), ("3x+2", "f(x) = 3x+2"),
    ("100", "100"), ("100", "≈ 100"), ("6", "The answer is 6 (six)."), ("42", "My answer would be 42"),
    ("42", "Hence the answer: 42"), ("42", 'The answer to the question "what is 6*7" is 42.'),
    ("42", "the answer is: $$42$$"), ("9", "The answer is 9, since 3 squared is 9."),
    ("9", "The answer is 9 since 3+6=9... also 4+5=9"),
]  # fmt: skip
WRONG = [
    ("3", "It is 3 or 4."), ("4", "It is 3 or 4."), ("4", "The answer is 3 or 4."), ("3", "The answer is 3 or 4."),
    ("3", "The answer is between 3 and 4."), ("4", "The answer is between 3 and 4."), ("5", "The answer is not 5."),
    ("12", "The answer is 12 + 30 = 42."), ("24", "So she has **72** eggs (48 + 24)."),
    ("2", r"Thus $x = \frac{1}{2}$."), ("1/2", r"Thus $x = \frac{1}{2}$, which is half of 1."),
    ("blue", "I do not know"), ("42", "I do not know"), ("Paris", "The capital of France is Paris."),
    ("B", "The answer is B because A is wrong."), ("3", r"First \boxed{3}. Then we get \boxed{5}."),
    ("3", r"\boxed{3} or \boxed{5}"), ("2", "<think>1+1=2"), ("2", "<think>a</think></think><answer>2</answer>"),
    ("2", "<think>a</think><answer>1</answer><answer>2</answer>"), ("2", "<think>2</think>"),
    ("2", "<think>a</think><answer>2"), ("2", "<think>The answer is 2</think> I cannot say."),
    ("10", "There are 10 to 12 of them"), ("12", "There are 10 to 12 of them"), ("20", "The answer is 15 and 20"),
    ("5 cm", "The answer is 5 m."), ("2, 3", "The solutions are $x=2$ and $x=3$."), ("3", "I computed 1, 2, and 3"),
]  # fmt: skip


@pytest.mark.parametrize(("right", "text", "verdict"), [(*p, True) for p in RIGHT] + [(*p, False) for p in WRONG])
def test_the_answer_in_a_reply(right, text, verdict):
    answer = read_answer(text, right)
    assert (answer is not None and same_answer(right, answer)) is verdict


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>a</think><answer> 1+2 </answer>", "1+2"),
        ("<think>a<answer>9</answer></think><answer>3</answer>", "3"),
        ("<think>a<answer>3</answer>", None),
        ("<think>a</think><answer>1</answer><answer>2</answer>", None),
        ("<think>a</think><answer>1<answer>2</answer>", None),
        ("<think>a</think><answer>1", None),
        ("<think>a</think></think><answer>1</answer>", None),
        ("<think>a</think><think>b</think><answer>1</answer>", None),
        ("<think>a</think><answer></answer>", ""),
        ("<think>a</think><answer>two\nlines</answer>", "two\nlines"),
        ("<think>3</think>I do not know", None),
        ("I do not know", None),
        ("", None),
    ],
)
def test_tags_are_held_to(text, answer):
    assert read_answer(text, "3") == answer


@pytest.mark.parametrize(
    ("right", "final"),
    [("72", "72"), ("So 24.\n#### 72", "72"), ("#### 1,234\n", "1,234"), (r"is \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
     (r"\boxed{1} then \boxed{2}", "2"), (" blue ", "blue")],
)  # fmt: skip
def test_the_final_answer_of_a_worked_solution(right, final):
    assert final_answer(right) == final


@pytest.mark.parametrize(
    ("question", "right", "given", "copied"),
    [("What is 6*4?", "24", "6*4", True), ("What is $6 \\times 4$?", "24", "6×4", True),
     ("What is 6*4?", "24", "24", False),
     ("Write 2/4 in lowest terms.", "1/2", "2/4", False), ("Expand (x+1)^2.", "x^2+2x+1", "(x+1)^2", False),
     ("What is 2^10?", "1024", "2^{10}", True), ("What is 5!?", "120", "5!", True)],
)  # fmt: skip
def test_a_copy_of_the_question(question, right, given, copied):
    assert copies(question, right, given) is copied
