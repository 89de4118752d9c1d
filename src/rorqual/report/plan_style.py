"""Style of the plan page, beside the common one.

The colours are near Paul Tol's bright scheme, so that colour-blind eyes tell any two of them apart: as seen with
protanopia, deuteranopia and tritanopia (matrices of Machado et al., 2009) they are at least 12 apart in CIELAB.
"""

PART_COLOURS = {  # by part of StagePlan.parts; a part has the same colour in every stage
    "products": "c0", "attention": "c1", "memory": "c2", "tensor": "c6", "travel": "c4", "bubble": "c7", "sums": "c3",
    "update": "c5",
    "rollout": "c1", "tail": "c0", "rewards": "c3", "log_probabilities": "c2", "training": "c4", "weights": "c5",
    "idle": "c7",
    "decode": "c0", "prefill": "c3",
    "sampling": "c6",
    "kept": "c2", "logits": "c3", "parameters": "c5", "layers": "c4", "experts": "c6",
}  # fmt: skip
MEMORY_COLOURS = {
    "weights": "c0", "masters": "c1", "gradients": "c2", "moments": "c3", "ema": "c6", "activations": "c5",
    "loss": "c7", "KV cache": "c3",
}  # fmt: skip

PLAN_STYLE = """
:root { --track: #e9edf1; --over: #c3181b; }
@media (prefers-color-scheme: dark) { :root { --track: #29323d; --over: #ff6b6b; } }
.c0 { --c: #4477aa; } .c1 { --c: #45b0dc; } .c2 { --c: #228833; } .c3 { --c: #b3a125; } .c4 { --c: #dd5566; }
.c5 { --c: #aa3377; } .c6 { --c: #e58a55; } .c7 { --c: #8a94a0; }
@media screen and (prefers-color-scheme: dark) {
  .c0 { --c: #5b8fc9; } .c1 { --c: #70d4f4; } .c2 { --c: #35984a; } .c3 { --c: #ccbb44; } .c4 { --c: #f58290; }
  .c5 { --c: #c9589b; } .c6 { --c: #f2a67e; } .c7 { --c: #b4bcc6; }
}
.aF { --c: #a6d8f5; } .aF2 { --c: #5ba6dc; } .aB { --c: #efa064; } .aB2 { --c: #d67a30; }
.aI { --c: #f6eda2; } .aI2 { --c: #dfd05a; } .aW { --c: #d8aacb; } .aW2 { --c: #b27aa3; }
h3 { margin-top: 28px; }
svg { display: block; }
svg rect { fill: var(--c); }
.bar { width: 100%; height: 28px; border-radius: 5px; background: var(--track); }
.bar rect, .bar path { vector-effect: non-scaling-stroke; }
.stack rect { stroke: var(--card); stroke-width: 1.5; }
.stack .over { fill: none; stroke: var(--over); stroke-width: 6; }
.stack .limit { stroke: var(--over); stroke-width: 3; }
.interval { background: none; border-radius: 0; border-left: 1px solid var(--soft); }
.interval .value { fill: var(--accent); opacity: .55; }
.whisker { stroke: var(--text); stroke-width: 1.6; fill: none; }
.legend {
  list-style: none; padding: 0; margin: 12px 0 0; display: grid; gap: 4px 28px; font-size: 14.5px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr));
}
.legend li { display: grid; grid-template-columns: 14px 1fr auto 88px; gap: 9px; align-items: baseline; }
.legend i { width: 14px; height: 14px; border-radius: 3px; background: var(--c); align-self: start; margin-top: 4px; }
.legend b, .legend small { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.legend.inline { display: flex; flex-wrap: wrap; gap: 4px 20px; }
.legend.inline li { display: flex; color: var(--soft); }
.rows { display: grid; gap: 10px; }
.row { display: grid; grid-template-columns: minmax(90px, 170px) 1fr 250px; gap: 14px; align-items: center; }
.row span { overflow-wrap: anywhere; line-height: 1.3; }
.rows + .note { margin-top: 16px; }
.note { margin: 8px 0; }
.facts {
  margin: 0; display: grid; gap: 10px 28px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 270px), 1fr));
}
dt { color: var(--soft); font-size: 13px; white-space: nowrap; }
dd { margin: 0; overflow-wrap: anywhere; }
.overview td, .overview th { white-space: normal; vertical-align: top; padding-right: 14px; }
.overview td:nth-child(2), .overview th:nth-child(2) { text-align: left; }
.overview td:first-child { min-width: 110px; overflow-wrap: anywhere; }
.overview small { display: block; white-space: nowrap; }
.wrapped td { white-space: normal; vertical-align: top; text-align: left; }
.wrapped th, .wrapped td:nth-child(2) { text-align: left; white-space: nowrap; }
ul { padding-left: 20px; margin: 8px 0 0; }
li { overflow-wrap: anywhere; }
.schedule { width: 100%; min-width: 860px; font-size: 11px; margin-top: 12px; }
.schedule text { fill: var(--text); font-variant-numeric: tabular-nums; }
.schedule g rect { stroke: var(--card); stroke-width: .6; }
.schedule .idle { fill: var(--track); }
.schedule .numbers text { fill: #17202a; font-size: 8.5px; text-anchor: middle; }
.schedule text.tick { text-anchor: middle; fill: var(--soft); }
.schedule path.tick { stroke: var(--soft); }
@media (max-width: 600px) {
  .row { grid-template-columns: 1fr; gap: 2px; }
  .row svg { order: 1; }
  .facts { gap: 4px; }
  .facts div { display: flex; justify-content: space-between; gap: 16px; }
  .facts dd { text-align: right; }
  .overview thead { display: none; }
  .overview tr { display: block; border-bottom: 1px solid var(--line); padding: 8px 0; }
  .overview tbody tr:last-child { border-bottom: 0; }
  .overview td, .overview td:nth-child(2) {
    display: flex; align-items: baseline; gap: 8px; border: 0; padding: 1px 0; text-align: right;
  }
  .overview td:nth-child(n):empty { display: none; }
  .overview td::before { content: attr(data-label); color: var(--soft); margin-right: auto; }
  .overview td:first-child { font-weight: 600; }
  .overview td:first-child::before { content: none; }
  .overview small { display: inline; }
}
@page { margin: 14mm; }
@media print {
  :root {
    --page: #fff; --card: #fff; --text: #1d2733; --soft: #4a5663; --line: #ccd3da; --accent: #2767c9;
    --wrong: #c43d2b; --track: #e9edf1; --over: #c3181b;
  }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main { padding: 0; max-width: none; }
  header, section { border: 0; border-radius: 0; padding: 0 0 12px; }
  .scroll { overflow: visible; }
  .schedule { min-width: 0; }
  th, td { white-space: normal; }
  h2, h3 { break-after: avoid; }
  tr, li, .row, .bar, .schedule, .facts div, .tiles div, .note { break-inside: avoid; }
}
"""
