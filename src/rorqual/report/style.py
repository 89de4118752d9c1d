"""The page's style sheet: one column on a phone; light or dark as the system setting."""

STYLE = """
:root {
  --page: #f4f6f8; --card: #fff; --text: #1d2733; --soft: #5c6875; --line: #dfe4ea; --accent: #2767c9;
  --right: #14866a; --wrong: #c43d2b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f141a; --card: #171d25; --text: #dde4ec; --soft: #94a1af; --line: #2b3440; --accent: #6ea8ff;
    --right: #4fd0a5; --wrong: #ff8a78;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
main { max-width: 1040px; margin: 0 auto; padding: 24px 16px 64px; }
header, section {
  background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 24px;
  margin-bottom: 20px;
}
h1 { margin: 0 0 8px; font-size: 28px; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 0 0 16px; font-size: 21px; }
h3 { margin: 20px 0 8px; font-size: 16px; }
h4 { margin: 0 0 4px; font-size: 13px; color: var(--soft); font-weight: 600; }
.lead { font-size: 18px; margin: 0 0 16px; max-width: 75ch; }
.note { color: var(--soft); font-size: 14px; max-width: 85ch; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 0 0 16px; }
.tiles div { border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; }
.tiles b { display: block; font-size: 22px; line-height: 1.25; }
.tiles span { color: var(--soft); font-size: 13px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 12px 7px 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { color: var(--soft); font-weight: 600; }
tbody tr:last-child td { border-bottom: 0; }
small { color: var(--soft); font-size: 13px; }
.figures {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); gap: 24px;
  margin-top: 16px;
}
figure { margin: 0; }
img { width: 100%; height: auto; display: block; }
figcaption { font-size: 14px; color: var(--soft); margin-top: 6px; }
figcaption b { color: var(--text); }
article + article { border-top: 1px solid var(--line); margin-top: 16px; padding-top: 16px; }
.question { margin: 0 0 10px; overflow-wrap: anywhere; white-space: pre-wrap; }
.question span { color: var(--accent); font-weight: 600; margin-right: 6px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 14px; }
.pair > div { min-width: 0; }
pre {
  margin: 0; padding: 12px; background: var(--page); border-radius: 8px;
  font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  max-height: 420px; overflow-y: auto;
}
pre i { font-style: normal; }
.right { color: var(--right); font-weight: 700; }
.wrong { color: var(--wrong); font-weight: 700; }
.tag { color: var(--soft); }
.command {
  display: inline-block; background: var(--page); border-radius: 6px; padding: 3px 8px; overflow-wrap: anywhere;
}
code { font: 14px ui-monospace, Menlo, Consolas, monospace; }
details { margin-top: 8px; }
summary { cursor: pointer; color: var(--accent); margin-bottom: 8px; }
@media (max-width: 600px) {
  main { padding: 10px 8px 40px; }
  header, section { padding: 16px 14px; }
  .lead { font-size: 16.5px; }
}
"""
