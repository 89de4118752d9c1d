import re
import subprocess
import sys
from dataclasses import replace
from html import unescape

import pytest

from rorqual.plan.chips import find_chip
from rorqual.plan.known_models import find_model
from rorqual.plan.layout import Layout, schedule_of
from rorqual.plan.serving_plan import Service, plan_serving
from rorqual.plan.simulate import Times, simulate
from rorqual.plan.stage import Estimate, Rejected, StagePlan
from rorqual.plan.training_plan import Question, plan_training
from rorqual.report.plan_page import plan_page

DAY = 86400.0
H800 = find_chip("h800")
PLAN = StagePlan(
    kind="pretrain",
    name="first",
    config=find_model("qwen2.5-1.5b"),
    chip=H800,
    chips=8,
    price=2.0,
    tokens=3e9,
    flops_per_token=1e10,
    seconds=Estimate(10 * DAY, 8 * DAY, 15 * DAY),
    parts={"products": 6 * DAY, "bubble": 3 * DAY, "tensor": 0.0, "update": DAY},
    memory={"weights": 20e9, "moments": 10e9, "ema": 0.0, "activations": 30e9},
    layout=Layout(pipeline=4, data=2, schedule="1f1b"),
    times=Times(1.0, 2.0, 1.0, 1.0),
    micro_batches=100,
    rejected=(Rejected(Layout(data=8), 4.0, "+1 s of bubble a step"),),
    assumptions=("a & b",),
    figures={"steps": 1000, "seconds_a_step": 3.0},
)


def text_of(page):
    """The page as read."""
    html = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html)).replace("\N{NO-BREAK SPACE}", " ").split())


def pictures(page, name):
    return re.findall(rf'<svg class="?[^>]*\b{name}\b.*?</svg>', page, flags=re.DOTALL)


def boxes(picture):
    """(class, x, width) of the rectangles."""
    found = re.findall(r'<rect (?:class=(\w+) )?x="([\d.]+)"[^>]*? width="([\d.]+)"', picture)
    return [(colour, float(x), float(width)) for colour, x, width in found]


def test_headline_and_table():
    text = text_of(plan_page("A plan", [PLAN]))
    assert text.startswith("A plan · Rorqual A plan")
    assert "10 days time (8 to 15)" in text
    assert "1.92 K chip hours (1.54 K to 2.88 K)" in text  # 8 chips · 240 hours
    assert "$3.84 K cost ($3.07 K to $5.76 K)" in text
    assert "first Pre-training 1.54 B 8 (NVIDIA H800 SXM) 3 B 10 days (8 to 15) 1.92 K" in text
    assert "DeepSeek-V3's assumption" in text  # where the price is from
    assert "4 s +1 s of bubble a step" in text
    assert "1,000 of 3 seconds" in text
    assert "a & b" in text


def test_ends_of_intervals_are_added():
    other = replace(PLAN, name="second", seconds=Estimate(2 * DAY, DAY, 4 * DAY), chips=16)
    text = text_of(plan_page("x", [PLAN, other]))
    assert "12 days time (9 to 19)" in text
    # 1920 + 768 hours, 1536 + 384, 2880 + 1536
    assert "in all 12 days (9 to 19) 2.69 K (1.92 K to 4.42 K) $5.38 K ($3.84 K to $8.83 K)" in text
    assert "in all 10 days" not in text_of(plan_page("x", [PLAN]))


def test_parts_and_memory_are_to_scale():
    time, memory = pictures(plan_page("x", [PLAN]), "stack")
    assert [width for _, _, width in boxes(time)] == pytest.approx([600, 300, 100])
    assert [x for _, x, _ in boxes(time)] == pytest.approx([0, 600, 900])
    assert [width for _, _, width in boxes(memory)] == pytest.approx([250, 125, 375])  # of 80 GB
    assert "limit" not in memory
    text = text_of(plan_page("x", [PLAN]))
    assert "bubble of the pipeline 30.0 % 3 days" in text
    assert "60 GB of 80 GB" in text
    assert "activations 30 GB 37.5 %" in text


def test_memory_above_the_capacity():
    page = plan_page("x", [replace(PLAN, memory={"weights": 40e9, "activations": 60e9})])
    memory = pictures(page, "stack")[1]
    assert [(colour, x, width) for colour, x, width in boxes(memory) if colour == "over"] == [("over", 800.0, 200.0)]
    assert sum(width for colour, _, width in boxes(memory) if colour != "over") == pytest.approx(1000)
    assert "100 GB of 80 GB: 20 GB more than there is" in text_of(page)


def test_costs_have_whiskers():
    other = replace(PLAN, name="second", seconds=Estimate(5 * DAY, 3 * DAY, 6 * DAY))
    first, second = pictures(plan_page("x", [PLAN, other]), "interval")
    assert [boxes(p)[0][2] for p in (first, second)] == pytest.approx([1000 * 10 / 15, 1000 * 5 / 15], abs=0.01)
    low, high = re.findall(r"M([\d.]+) 14H([\d.]+)", second)[0]
    assert (float(low), float(high)) == pytest.approx((200, 400))


def test_without_a_price():
    page = plan_page("x", [replace(PLAN, price=None)])
    assert "$" not in text_of(page)
    assert "Chip hours of stages without a price first 1.92 K (1.54 K to 2.88 K)" in text_of(page)
    assert "with --price" in text_of(page)
    both = text_of(plan_page("x", [PLAN, replace(PLAN, name="second", price=None)]))
    assert "$3.84 K cost of 1 of 2 stages" in both
    assert "leaves out stages without a price" in both


def test_the_schedule_is_the_simulated_one():
    """1F1B of m micro-batches on P ranks takes (m + P − 1)(F + B), and each rank waits (P − 1)(F + B) of it."""
    page = plan_page("x", [PLAN])
    (picture,) = pictures(page, "schedule")
    idle = [box for box in boxes(picture) if box[0] == "idle"]
    steps = [box for box in boxes(picture) if box[0] != "idle"]
    assert len(idle) == 4
    assert len(steps) == 4 * 10 * 2  # ranks, micro-batches drawn of the 100, F and B
    second = idle[0][2] / (13 * 3)
    forwards, backwards = (re.findall(rf"<g class={colour}>(.*?)</g>", picture) for colour in ("aF", "aB"))
    for rank in range(4):
        start, end = boxes(forwards[rank])[0][1], sum(boxes(backwards[rank])[-1][1:])
        assert (start - idle[0][1]) / second == pytest.approx(rank, abs=0.01)
        assert (end - idle[0][1]) / second == pytest.approx(39 - 2 * rank, abs=0.01)
        assert [width / second for _, _, width in boxes(backwards[rank])] == pytest.approx([2] * 10, abs=0.01)
    said = f"{3 / 13:.1%} of the time drawn and for {3 / 103:.1%} of a whole step's".replace("%", " %")
    assert "Drawn are 10 of a step's 100 micro-batches" in text_of(page)
    assert said in text_of(page)


def test_a_schedule_with_overlapped_pairs_and_few_micro_batches():
    layout = Layout(pipeline=4, data=2, schedule="dualpipev")
    page = plan_page("x", [replace(PLAN, layout=layout, micro_batches=8, times=Times(1.0, 2.0, 1.0, 1.0, 2.5))])
    (picture,) = pictures(page, "schedule")
    steps = schedule_of("dualpipev", 4, 8).steps
    drawn = [box for box in boxes(picture) if box[0] != "idle"]
    assert len(drawn) == sum(len(step) for rank in steps for step in rank)
    assert "All 8 micro-batches of a step" in text_of(page)
    assert "two half boxes" in text_of(page)
    assert not pictures(plan_page("x", [replace(PLAN, layout=Layout(data=8), times=None)]), "schedule")


def test_a_plan_keeps_the_times_it_is_made_of():
    plan = plan_training(Question(find_model("r1-distill-qwen-7b"), find_chip("h100"), 2e9, 16))
    assert plan.layout is not None
    assert plan.layout.pipeline > 1
    assert plan.times is not None
    schedule = schedule_of(plan.layout.schedule, plan.layout.pipeline, plan.micro_batches)
    seconds = simulate(schedule, plan.times).length * plan.figures["steps"]
    assert seconds == pytest.approx(sum(plan.parts.values()) - plan.parts["sums"] - plan.parts["update"])
    assert plan_training(Question(find_model("smollm2-135m"), find_chip("h100"), 1e9, 1)).times is None


def test_a_service_is_apart():
    day = plan_serving(Service(find_model("qwen2.5-1.5b"), find_chip("h200"), 100, name="answers"))
    text = text_of(plan_page("x", [PLAN, day]))
    assert "10 days time (8 to 15)" in text
    assert day.cost is not None
    assert f"${day.cost.value:.3g} cost of a day of answers" in text
    assert "A day of service answers" in text
    assert "A service is shown for a day, and is in no sum" in text
    assert f"users at a time 100, {day.figures['tokens_per_second_user']:.3g} tokens/s each" in text
    out, into = (day.figures[f"usd_per_million_{which}_tokens"] for which in ("output", "input"))
    assert f"$ a million tokens {into:.3g} {out:.3g}" in text
    assert "cost of a day ($" in text_of(plan_page("x", [day]))


def test_names_are_escaped_and_nothing_is_fetched():
    bad = "<script>alert('1')</script>\" & co"
    plan = replace(
        PLAN,
        name=bad,
        kind=bad,
        assumptions=(bad,),
        parts={bad: 1.0},
        memory={bad: 1.0},
        rejected=(Rejected(Layout(data=8, schedule=bad), 4.0, bad),),
    )
    page = plan_page(bad, [plan])
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "<title>&lt;script&gt;alert(&#x27;1&#x27;)&lt;/script&gt;&quot; &amp; co · Rorqual</title>" in page
    assert not re.search(r"https?:|url\(|\bsrc=|\bhref=|@import", page)
    assert "prefers-color-scheme: dark" in page


@pytest.mark.slow
def test_the_page_needs_no_matplotlib():
    code = "import sys, rorqual.report.plan_page; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
