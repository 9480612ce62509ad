"""The page's style sheet: system fonts, light and dark, from 390 px to a wide screen."""

from __future__ import annotations

#: Hue per role of a network; lightness comes from the theme.
CSS = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --surface: #ffffff; --sunken: #eef0f4; --line: #d9dde5; --line-strong: #b4bcc9;
  --ink: #161b26; --ink-soft: #4b5565; --ink-faint: #667085;
  --heat: 47 92 201; --heat-ink: #ffffff;
  --dense: #5b6678; --sigmab: #2f5cc9; --twin: #b45309; --other: #7c3aed;
  --shared: #6d4bc3; --branch-0: #0b7fab; --branch-1: #c2410c; --dropped: #b6bdc9;
  --leaf-s: 62%; --leaf-l: 42%; --leaf-soft-l: 93%;
  --good: #13795b; --bad: #b42318;
  --shadow: 0 1px 2px rgb(16 24 40 / .06), 0 1px 3px rgb(16 24 40 / .05);
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0e1117; --surface: #161b24; --sunken: #1e2530; --line: #2c3543; --line-strong: #475367;
    --ink: #eaeef5; --ink-soft: #b3bdcc; --ink-faint: #8f9bad;
    --heat: 122 162 255; --heat-ink: #0b1020;
    --dense: #9aa7ba; --sigmab: #82a7ff; --twin: #f0a04b; --other: #b79bff;
    --shared: #b39bff; --branch-0: #4cc0e8; --branch-1: #ff9057; --dropped: #4a5568;
    --leaf-s: 58%; --leaf-l: 66%; --leaf-soft-l: 19%;
    --good: #4fd1a1; --bad: #ff8f85;
    --shadow: none;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
}
main, .masthead-inner { max-width: 1120px; margin: 0 auto; padding: 0 24px; }
.masthead { background: var(--surface); border-bottom: 1px solid var(--line); }
.masthead-inner { padding-top: 36px; padding-bottom: 20px; }
.eyebrow {
  margin: 0 0 6px; font-size: 13px; font-weight: 600; letter-spacing: .08em; text-transform: uppercase;
  color: var(--sigmab);
}
h1 { margin: 0; font-size: clamp(26px, 4.2vw, 38px); line-height: 1.15; letter-spacing: -.02em; text-wrap: balance; }
h2 { margin: 0 0 4px; font-size: 22px; line-height: 1.25; letter-spacing: -.01em; }
h3 { margin: 0 0 2px; font-size: 15px; line-height: 1.35; font-weight: 650; }
p { margin: 0 0 12px; }
.lede { max-width: 68ch; margin: 12px 0 0; font-size: 17px; color: var(--ink-soft); }
.facts { display: flex; flex-wrap: wrap; gap: 12px 32px; margin: 22px 0 0; }
.facts dt { font-size: 12.5px; color: var(--ink-faint); }
.facts dd { margin: 0; font-size: 14.5px; font-weight: 550; overflow-wrap: anywhere; }
nav { margin-top: 22px; padding-top: 14px; border-top: 1px solid var(--line); font-size: 14.5px; }
nav ul { display: flex; flex-wrap: wrap; gap: 6px 20px; margin: 0; padding: 0; list-style: none; }
a { color: var(--sigmab); text-underline-offset: 3px; }
nav a { text-decoration: none; }
nav a:hover, nav a:focus-visible { text-decoration: underline; }
section { margin: 40px 0; scroll-margin-top: 16px; }
.about { max-width: 72ch; margin: 0 0 18px; color: var(--ink-soft); }
.card {
  background: var(--surface); border: 1px solid var(--line); border-radius: 12px; padding: 20px;
  box-shadow: var(--shadow); min-width: 0;
}
.flush { padding: 0; overflow: hidden; }
.grid { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); }
.stats { display: grid; gap: 12px; grid-template-columns: repeat(4, minmax(0, 1fr)); margin: 28px 0 0; }
.stat { padding: 16px 18px; }
.stat .label { font-size: 13.5px; color: var(--ink-soft); }
.stat .value { font-size: 30px; line-height: 1.2; font-weight: 680; letter-spacing: -.02em; font-variant-numeric: tabular-nums; }
.stat .unit { font-size: 17px; font-weight: 550; letter-spacing: 0; color: var(--ink-soft); }
.stat .more { margin-top: 4px; font-size: 13.5px; color: var(--ink-faint); }
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; }
.scroll:focus-visible { outline: 2px solid var(--sigmab); outline-offset: -2px; }
table { width: 100%; border-collapse: collapse; font-size: 14.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 10px 14px; text-align: left; white-space: nowrap; }
th.n, td.n { text-align: right; }
thead th { font-size: 12.5px; font-weight: 600; color: var(--ink-faint); background: var(--sunken); border-bottom: 1px solid var(--line); }
tbody tr + tr > * { border-top: 1px solid var(--line); }
tbody th { font-weight: 600; }
tr.sigmab > * { background: rgb(var(--heat) / .07); }
.key { display: inline-block; width: 10px; height: 10px; margin-right: 8px; border-radius: 3px; vertical-align: 0; }
.aside { margin: 12px 0 0; font-size: 14px; color: var(--ink-faint); max-width: 80ch; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 6px 0 8px; font-size: 13px; color: var(--ink-soft); }
.legend span { white-space: nowrap; }
.legend .key { margin-right: 6px; }
.legend .dash { width: 16px; height: 0; border-top: 2px dashed; border-radius: 0; vertical-align: 4px; }
svg { display: block; max-width: 100%; height: auto; }
svg text { font-family: inherit; fill: var(--ink); font-variant-numeric: tabular-nums; }
svg .soft { fill: var(--ink-soft); }
svg .faint { fill: var(--ink-faint); }
.chart { width: 100%; max-width: 460px; margin: 0 auto; }
.tree svg { margin: 0 auto; max-width: none; }
.tree .narrow { display: none; }
.bars { display: grid; gap: 12px; margin: 0; }
.bar-head { display: flex; justify-content: space-between; gap: 12px; font-size: 14px; }
.bar-head b { font-weight: 620; }
.bar-head span { color: var(--ink-soft); font-variant-numeric: tabular-nums; text-align: right; }
.track { position: relative; height: 12px; margin-top: 4px; background: var(--sunken); border-radius: 6px; overflow: hidden; }
.fill { height: 100%; border-radius: 6px; min-width: 2px; }
.even { position: absolute; top: 0; bottom: 0; width: 2px; background: var(--ink); opacity: .55; }
.meter { display: flex; align-items: baseline; gap: 10px; margin-bottom: 14px; }
.meter strong { font-size: 26px; letter-spacing: -.02em; font-variant-numeric: tabular-nums; }
.heat { table-layout: fixed; font-size: 13px; }
.heat th, .heat td { padding: 5px 6px; }
.heat td { text-align: center; border: 2px solid var(--surface); border-radius: 6px; }
.heat tbody tr + tr > * { border-top: 2px solid var(--surface); }
.heat tbody th { font-weight: 500; overflow: hidden; text-overflow: ellipsis; padding-left: 0; }
.heat thead th { background: none; border: 0; text-align: center; }
.heat thead th:first-child { text-align: left; padding-left: 0; width: 34%; }
.heat td.hot { color: var(--heat-ink); }
.heat td.nil { color: var(--ink-faint); }
.empty {
  margin: 0; padding: 22px; border: 1px dashed var(--line-strong); border-radius: 12px; color: var(--ink-soft);
  font-size: 15px;
}
.terms { display: grid; gap: 14px 32px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); margin: 0; }
.terms dt { font-weight: 620; font-size: 15px; }
.terms dd { margin: 2px 0 0; font-size: 14.5px; color: var(--ink-soft); }
ul.notes { margin: 0 0 4px; padding-left: 20px; max-width: 76ch; color: var(--ink-soft); }
ul.notes li { margin: 4px 0; }
pre {
  margin: 0 0 16px; padding: 14px 16px; overflow-x: auto; background: var(--sunken); border-radius: 10px;
  font: 13.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
.origin { font-size: 14px; }
.origin th { width: 180px; font-weight: 500; color: var(--ink-faint); }
.origin th, .origin td { padding: 7px 14px 7px 0; white-space: normal; overflow-wrap: anywhere; vertical-align: top; }
footer { max-width: 1120px; margin: 0 auto; padding: 8px 24px 40px; font-size: 13.5px; color: var(--ink-faint); }
@media (max-width: 760px) {
  .stats { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .tree .wide { display: none; }
  .tree .narrow { display: block; }
}
@media (max-width: 560px) {
  main, .masthead-inner, footer { padding-left: 16px; padding-right: 16px; }
  .masthead-inner { padding-top: 26px; }
  .card { padding: 16px; }
  .flush { padding: 0; }
  .tree.card { padding: 14px 8px; }
  .stat { padding: 12px 14px; }
  .stat .value { font-size: 24px; }
  .stat .unit { font-size: 15px; }
  .facts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 12px 16px; }
  section { margin: 32px 0; }
  .lede { font-size: 16px; }
  .origin th { width: 112px; }
  th, td { padding: 9px 12px; }
}
@media print {
  body { background: none; } .card { box-shadow: none; break-inside: avoid; } nav { display: none; }
}
"""


def leaf_color(index: int, leaves: int) -> str:
    """Colour of a leaf: cool hues under branch 0, warm ones under branch 1, so that kinship shows."""
    half = (leaves + 1) // 2
    if index < half:
        hue = 222 - 62 * index / max(half - 1, 1)
    else:
        hue = 335 + 55 * (index - half) / max(leaves - half - 1, 1)
    return f"hsl({hue % 360:.0f} var(--leaf-s) var(--leaf-l))"


def leaf_tint(index: int, leaves: int) -> str:
    """The same hue, pale: a background behind text."""
    return leaf_color(index, leaves).replace("--leaf-l", "--leaf-soft-l")
