"""How the pages look: one stylesheet, within the page, and the policy that lets a browser use nothing else."""

from __future__ import annotations

import base64
import hashlib

STYLE = """
:root { color-scheme: light dark; --back: #fbfbf9; --fore: #1d1f21; --soft: #63676c; --line: #dcdcd6; --card: #fff;
  --link: #0b57a4; --hit: #7fb3a0; --miss: #e3b7a0; --rate: #0b57a4; }
@media (prefers-color-scheme: dark) { :root { --back: #16181a; --fore: #e7e6e3; --soft: #9aa0a6; --line: #33373b;
  --card: #1e2124; --link: #86bbf2; --hit: #3d7563; --miss: #7d5039; --rate: #86bbf2; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; background: var(--back); color: var(--fore);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
header { display: flex; flex-wrap: wrap; gap: 0 1rem; align-items: baseline; border-bottom: 1px solid var(--line); }
header p { color: var(--soft); margin: 0; }
h1 { font-size: 1.4rem; margin: .3rem 0; } h1 a { color: inherit; text-decoration: none; }
h2 { font-size: 1.1rem; margin: 1.8rem 0 .5rem; }
a { color: var(--link); }
code, pre, td.code { font: .88em/1.5 ui-monospace, monospace; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .8rem; margin: 1rem 0; }
dl div { background: var(--card); border: 1px solid var(--line); border-radius: .4rem; padding: .6rem .8rem; }
dt { color: var(--soft); font-size: .85rem; } dd { margin: 0; font-size: 1.25rem; overflow-wrap: anywhere; }
dd small { display: block; color: var(--soft); font-size: .8rem; }
.wide { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: .4rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; padding: .3rem .8rem; border-bottom: 1px solid var(--line); vertical-align: top; }
tbody tr:last-child td { border-bottom: 0; } th { color: var(--soft); font-weight: 500; }
td { white-space: nowrap; } td:first-child { white-space: normal; min-width: 11rem; }
.empty, .note { color: var(--soft); }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .4rem; padding: .8rem; overflow-x: auto; }
svg { display: block; width: 100%; height: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: .4rem; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
svg .grid { stroke: var(--line); } svg .hit { fill: var(--hit); } svg .miss { fill: var(--miss); }
svg polyline.rate { fill: none; stroke: var(--rate); stroke-width: 2; } svg circle.rate { fill: var(--rate); }
@media (max-width: 36rem) { svg text { font-size: 24px; } svg text.most { display: none; } }
.key { display: flex; gap: 1.2rem; color: var(--soft); font-size: .85rem; margin: .4rem 0; }
.key span::before { content: ""; display: inline-block; width: .8em; height: .8em; margin-right: .4em; }
.key .hit::before { background: var(--hit); } .key .miss::before { background: var(--miss); }
.key .rate::before { background: var(--rate); border-radius: 50%; }
"""

POLICY = "; ".join(
    (
        "default-src 'none'",
        f"style-src 'sha256-{base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()}'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
