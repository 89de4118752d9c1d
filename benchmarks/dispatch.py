"""Expert parallelism on two nodes of four ranks: bytes between nodes, seconds of a step, and travel that is hidden.

Tokens choose 8 of 256 experts in at most 4 of 8 groups, as in V3. Three ways to the experts (parallel/experts.py), each
with and without overlap, take turns in the same processes, on links of 1 Gb/s (nodes.py). Without overlap a
micro-batch follows the other; with it a forward pass overlaps the backward pass of the micro-batch before, and the
shared expert is computed while tokens travel. Experts are so narrow that plain's travel takes about as long as what two
cores compute; on V3's GPUs even two-hop FP8's does (§3.2.1). Bytes are counted by the ranks and must equal those that
follow from the routing; losses and gradients must be those of one process with all experts.

Hidden is the share of the travel without overlap that ranks don't wait for with it: 1 − waited with overlap / travelled
without. Four ranks that share a core already compute while another waits, so that overlap has little to hide there.
Therefore the contestants are also measured with one rank a node, which has a core of its own as a chip does.

How few bytes two-hop FP8 can need: a token of K experts goes to M nodes, so M/K of plain's rows cross. A row to the
experts has 1 byte a value and one for 128 of them instead of 2; a row back stays BF16. With as many rows each way:

    share of plain = M/K · (½·(1 + 1/128) + 1) / 2

and M = 4 of K = 8 make it 37.6 %. A share of 30 % takes M ≤ 3.2, or a combine below BF16. On two nodes M ≤ 2.
"""

import json
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from common import arguments, program, ratio_of_rounds, report
from dispatch_ranks import CONTESTANTS, KINDS, OVERLAP, Settings
from nodes import Nodes
from rorqual.model import ModelConfig
from rorqual.model.moe import Router
from rorqual.plan.expected_rows import row_bytes
from rorqual.plan.traffic import ExpertGroup, journey_rows
from rorqual.train import set_seed

NODES, PER_NODE, RATE = 2, 4, 1e9
ROUTING: dict[str, Any] = {
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "n_shared_experts": 1,
}
MODEL: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 1024, "num_hidden_layers": 2, "first_k_dense_replace": 0,
    "intermediate_size": 64, "moe_intermediate_size": 8, "num_attention_heads": 2, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "initializer_range": 0.05,
    **ROUTING,
}  # fmt: skip
QUICK = {
    "hidden_size": 128, "n_routed_experts": 32, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2,
    "initializer_range": 0.1,
}  # fmt: skip
TOLERANCE = {"plain": 0.01, "two-hop": 0.01, "two-hop FP8": 0.07}  # E4M3 rounds tokens and gradients by 0.026 each
OURS = "two-hop FP8" + OVERLAP


def measure(settings: dict[str, Any], ranks_per_node: int, limit: float) -> tuple[dict[str, Any], Nodes]:
    with tempfile.TemporaryDirectory() as folder, Nodes(NODES, RATE) as nodes:
        out = Path(folder) / "found.json"
        ranks = NODES * ranks_per_node
        of_rank = Settings(ranks=ranks, per_node=ranks_per_node, rate=RATE, real=nodes.real, out=str(out), **settings)
        command = [sys.executable, str(Path(__file__).parent / "dispatch_ranks.py"), json.dumps(asdict(of_rank))]
        env = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        nodes.start_ranks(command, ranks_per_node, env, stdout=2)  # stdout is the table's
        nodes.wait(limit)
        return json.loads(out.read_text()), nodes


def wrong(found: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Contestants that compute something else than one process does, each with a sentence."""
    return {
        name: f"gradients differ by {values['gradient_error']:.3f} from those of one process, losses by "
        f"{values['loss_error']:.3f}"
        for name, values in found.items()
        if max(values["gradient_error"], values["loss_error"]) > TOLERANCE[name.removesuffix(OVERLAP)]
    }


def in_v3(tokens: int) -> dict[str, Any]:
    """Bytes between nodes per token and layer on 8 nodes of 8 GPUs; `tokens`: of each GPU, with random scores."""
    set_seed(0)
    group, hidden, nodes = ExpertGroup(256, 64, 8), 7168, 8
    # The choice depends on scores alone, so the router may be narrow.
    router = Router(ModelConfig(model_type="deepseek_v3", **MODEL).replace(hidden_size=64))
    torch.nn.init.normal_(router.weight)
    with torch.no_grad():
        chosen = [router(torch.randn(tokens, 64) / 8)[1] for _ in range(group.ranks)]
    visited = torch.zeros(group.ranks * tokens, nodes).scatter_(1, group.rank(torch.cat(chosen)) // group.per_node, 1)
    found: dict[str, Any] = {"nodes_visited": visited.sum(1).mean().item()}
    for name, kind in KINDS.items():
        rows = journey_rows(chosen, group, kind)
        ways = [size for backward in (False, True) for size in row_bytes(kind, hidden, 8, 2, backward)]
        per_token = {link: number / group.ranks / tokens for link, number in rows.items()}
        dispatch, combine, dispatch_backward, combine_backward = (per_token["between nodes"] * w for w in ways)
        found[name] = {
            "rows": per_token["between nodes"],
            "dispatch": dispatch,
            "combine": combine,
            "dispatch_backward": dispatch_backward,
            "combine_backward": combine_backward,
            "between_nodes": dispatch + combine + dispatch_backward + combine_backward,
            "within_a_node": per_token["within a node"] * sum(ways),
        }
    for name in KINDS:
        for share, what in (("share_of_dispatch", "dispatch"), ("share", "between_nodes")):
            found[name][share] = found[name][what] / found["plain"][what]
    found["bound_at_4_nodes"], found["bound"] = (m / 8 * (1.5 + 1 / 256) / 2 for m in (4, found["nodes_visited"]))
    return found


def compare(contestants: dict[str, Any]) -> None:
    """Adds each contestant's speed, bytes and hidden travel, as ratios to plain or to itself without overlap."""
    plain = contestants["plain"]
    for name, values in contestants.items():
        values["speed"] = ratio_of_rounds(plain["seconds"], values["seconds"])
        values["share_between_nodes"] = values["between_nodes"] / plain["between_nodes"]
        wire = values["on_the_wire"]
        values["headers"] = wire / values["between_nodes"] - 1 if wire else None
        if name.endswith(OVERLAP):
            without = contestants[name.removesuffix(OVERLAP)]
            values["gain"] = ratio_of_rounds(without["seconds"], values["seconds"])
            values["hidden"] = 1 - values["waited_seconds"] / without["travel_seconds"]


def said(ratio: dict[str, float] | None) -> str:
    return f"{ratio['median']:.2f} ({ratio['least']:.2f}–{ratio['most']:.2f})" if ratio else "–"


def rows_of(contestants: dict[str, Any]) -> list[list[Any]]:
    return [
        [
            name, statistics.median(x["seconds"]), said(x["speed"]), said(x.get("gain")), x["core_seconds"],
            x["travel_seconds"], f"{x['hidden']:.0%}" if "hidden" in x else "–", x["between_nodes"] / 1e6,
            f"{x['share_between_nodes']:.1%}", "–" if x["headers"] is None else f"{x['headers']:+.1%}",
            x["within_a_node"] / 1e6, f"{x['gradient_error']:.4f}",
        ]
        for name, x in contestants.items()
    ]  # fmt: skip


def main() -> None:
    args = arguments(__doc__)
    sizes: dict[str, Any] = {"micro_batches": 4, "sequences": 2, "length": 128, "rounds": 5, "model": MODEL}
    per_node, tokens = PER_NODE, 512
    if args.quick:
        sizes |= {"micro_batches": 2, "length": 16, "rounds": 1, "model": MODEL | QUICK}
        per_node, tokens = 2, 16
    v3 = in_v3(tokens)
    found, nodes = measure(sizes, per_node, args.limit)
    alone, _ = measure(sizes, 1, args.limit)
    contestants, of_one = found["contestants"], alone["contestants"]
    compare(contestants)
    compare(of_one)
    plain = contestants["plain"]
    how = "network namespaces and tc" if nodes.real else f"no namespaces, {nodes.why}: ranks wait before they send"
    figures = {"links": {"real": nodes.real, "how": how, "rate": RATE, "measured": found["link_rate"]}, **sizes}
    figures |= {"ranks": NODES * per_node, "contestants": contestants, "one_rank_a_node": of_one, "v3": v3}
    ratios = {
        "bytes-two-hop-fp8/plain": plain["between_nodes"] / contestants[OURS]["between_nodes"],
        "bytes-two-hop-fp8-8-nodes/plain": 1 / v3["two-hop FP8"]["share"],
        "step-shaped-links/plain": contestants[OURS]["speed"]["median"],
        "step-shaped-links-two-hop/plain": contestants["two-hop" + OVERLAP]["speed"]["median"],
        "overlap": of_one[OURS]["gain"]["median"],
    }
    title = (
        f"{NODES} nodes × {per_node} ranks, {RATE / 1e9:g} Gb/s between them ({how}; {found['link_rate'] / 1e9:.2f} "
        "measured), rows in BF16 or FP8. Bytes are a step's, of all ranks, as counted; headers: what tc counts on top"
    )
    title_alone = f"{NODES} nodes × 1 rank, the same link and micro-batches"
    columns = ["dispatch", "step s", "speed", "by overlap", "core s", "travel s", "hidden", "between MB", "of plain",
               "headers", "within MB", "gradients off"]  # fmt: skip
    columns_v3 = ["dispatch", "rows", "dispatch", "combine", "and back", "and back", "kB", "of plain's dispatch",
                  "of plain", "within kB"]  # fmt: skip
    rows_v3 = [
        [name, f"{v['rows']:.2f}", *(f"{v[key] / 1e3:.1f}" for key in
         ("dispatch", "combine", "dispatch_backward", "combine_backward", "between_nodes")),
         f"{v['share_of_dispatch']:.1%}", f"{v['share']:.1%}", f"{v['within_a_node'] / 1e3:.1f}"]
        for name, v in ((name, v3[name]) for name in KINDS)
    ]  # fmt: skip
    title_v3 = (
        f"V3 on 8 nodes × 8 GPUs: kB between nodes per token and layer, computed; a token goes to "
        f"{v3['nodes_visited']:.2f} nodes. No fewer than {v3['bound']:.1%} of plain with a combine in BF16 "
        f"({v3['bound_at_4_nodes']:.1%} at 4 nodes)"
    )
    tables = [
        (title, columns, rows_of(contestants)),
        (title_alone, columns, rows_of(of_one)),
        (title_v3, columns_v3, rows_v3),
    ]
    bad = wrong(contestants) | wrong(of_one)
    report("dispatch", args, ratios, figures, tables, ["torch"], bad, set(CONTESTANTS))


if __name__ == "__main__":
    program(main)
