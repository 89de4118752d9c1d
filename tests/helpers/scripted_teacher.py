"""A teacher that answers sums by scripts."""

from types import SimpleNamespace

from rorqual.engine import Completion
from rorqual.recipe import EnvironmentSection

SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
SECTION = EnvironmentSection(name="chain_sum", config=SUMS, prompt="{expression}")


class Teacher:
    """Answers every sum by the scripts in turn; a script may use the right answer."""

    prefix_cache = False

    def __init__(self, tokenizer, scripts):
        self.tokenizer, self.scripts, self.asked = tokenizer, scripts, []
        self.model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=512))

    def require_tokenizer(self):
        return self.tokenizer

    def opening(self, prompt):
        return "<think>"

    def generate(self, prompts, params):
        found = []
        for prompt in prompts:
            text = self.tokenizer.decode(prompt)
            self.asked.append(text)
            right = eval(text.partition("\n")[0])
            for i in range(params.n):
                answer = self.scripts[i % len(self.scripts)].replace("RIGHT", str(right))
                tokens = self.tokenizer(answer).input_ids
                cut = len(tokens) > params.max_tokens
                found.append(Completion(answer, tokens, [0.0] * len(tokens), "length" if cut else "stop"))
        return found


GOOD = "so</think><answer>RIGHT</answer>"
LONG = "well, let me see</think><answer>RIGHT</answer>"
BARE = "so</think>it is <answer>RIGHT</answer>"
WRONG = "so</think><answer>no</answer>"
