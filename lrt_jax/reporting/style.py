"""How the page looks: on phones, on desktops by day and by night, and on A4."""

from lrt_jax.reporting.charts import AXES
from lrt_jax.reporting.drawing import GRID, INK, MUTED, PALETTE

# PALETTE on dark pages.
DARK = ("#5cb0ee", "#ff8f4d", "#35c99a", "#e28bd0", "#e8b33a", "#a3a0ff", "#7fd0f5", "#c99a8d")


def _variables(palette: tuple[str, ...]) -> str:
    return "".join(f"--s{number}:{color};" for number, color in enumerate(palette))


LIGHT_COLORS = f"--ink:{INK};--muted:{MUTED};--grid:{GRID};--page:#fff;--card:#f7f7f9;{_variables(PALETTE)}"
DARK_COLORS = f"--ink:#ececf1;--muted:#a2a4b0;--grid:#33353d;--page:#15161a;--card:#1e1f25;{_variables(DARK)}"
SELECTED = ",".join(f"#x-{axis}:checked~.{axis}" for axis in AXES)

CSS = (
    f":root{{color-scheme:light;{LIGHT_COLORS}}}\n"
    f"@media screen and (prefers-color-scheme:dark){{:root{{color-scheme:dark;{DARK_COLORS}}}}}\n"
    """*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0 auto;padding:2.5rem 1rem 3rem;max-width:76rem;background:var(--page);color:var(--ink);
 font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.75rem;line-height:1.2;letter-spacing:-.02em;margin:0 0 .25rem}
h2{font-size:1.2rem;letter-spacing:-.01em;margin:3rem 0 .25rem;padding-top:1rem;border-top:1px solid var(--grid)}
h3{font-size:1rem;margin:1.5rem 0 .5rem}
p,ul.notes{margin:.25rem 0 1rem;max-width:46rem}
.notes{margin:1.25rem 0;padding-left:1.2rem;font-size:.9rem}
.muted,figcaption,dd,footer,th small{color:var(--muted)}
a{color:inherit}
nav{margin:.75rem 0 0;display:flex;flex-wrap:wrap;gap:.25rem 1.1rem;font-size:.9rem}
nav a{text-decoration-color:var(--grid);text-underline-offset:.25em}
.runs,.legend{list-style:none;margin:1rem 0;padding:0;display:flex;flex-wrap:wrap;gap:.35rem 1.25rem;font-size:.9rem}
.runs{flex-direction:column;gap:.5rem;font-size:1rem}
.runs span{color:var(--muted)}
.key{display:inline-block;width:1.6rem;margin-right:.5rem;vertical-align:.25em;border-top:3px solid var(--c)}
.dashed{border-top-style:dashed}.dotted{border-top-style:dotted}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(20rem,100%),1fr));gap:1.75rem 2rem;margin-top:1rem}
.large{grid-template-columns:repeat(auto-fill,minmax(min(27rem,100%),30rem))}
figure{margin:0;min-width:0;break-inside:avoid}
figure svg{display:block;width:100%;height:auto;margin:.25rem 0}
figure b{font-weight:600;font-size:.95rem}
figcaption{font-size:.85rem;line-height:1.4}
.scroll{overflow-x:auto;margin:.75rem 0;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .9rem .35rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--grid)}
th{font-weight:600;overflow-wrap:normal}
thead th{vertical-align:bottom}
tbody th{font-weight:500;white-space:nowrap}
th small{display:block;white-space:normal;max-width:24rem;font-size:.85rem;font-weight:400;line-height:1.35}
td{white-space:nowrap;overflow-wrap:normal}
.wide,tbody th.wide{white-space:pre-wrap;overflow-wrap:anywhere;min-width:8.5rem;max-width:24rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1.25rem;font-size:.9rem;max-width:52rem}
dt{font-weight:500}dd{margin:0}
pre{margin:.25rem 0 0;padding:.75rem .9rem;background:var(--card);border-radius:.5rem;white-space:pre-wrap;
 font:.8rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(22rem,100%),1fr));gap:.75rem 1.5rem;
 margin:.75rem 0 1.25rem}
.pair>div{min-width:0}
.prompt{color:var(--muted)}
summary{cursor:pointer;font-weight:500;margin:.5rem 0}
.tabs>input{position:absolute;opacity:0;pointer-events:none}
.tabs>label{display:inline-block;padding:.3rem .8rem;margin:.5rem .35rem .75rem 0;border:1px solid var(--grid);
 border-radius:1rem;font-size:.9rem;cursor:pointer;color:var(--muted)}
.tabs>input:checked+label{background:var(--ink);border-color:var(--ink);color:var(--page)}
.tabs>input:focus-visible+label{outline:2px solid var(--s0);outline-offset:2px}
.tabs>.panel{display:none}
"""
    f"{SELECTED}{{display:grid!important}}\n"
    """footer{margin-top:3rem;font-size:.85rem}
@media (max-width:30rem){th small{max-width:11rem}dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:.6rem}
 body{padding-top:1.5rem}}
@page{size:A4;margin:14mm}
@media print{body{padding:0;max-width:none;font-size:10pt}nav,.tabs>label{display:none}
 h2{margin-top:1.5rem;break-after:avoid}h3,.legend{break-after:avoid}
 .grid,.large{grid-template-columns:1fr 1fr;gap:1rem 1.5rem}
 .scroll{overflow:visible}table{font-size:8pt}.wide,tbody th.wide{min-width:0}thead th{overflow-wrap:anywhere}
 th,td{padding-right:.5rem}tr,.pair,dt,dd{break-inside:avoid}pre{border:1px solid var(--grid);font-size:7.5pt}
 figcaption,.notes{font-size:8pt}th small{font-size:7pt}}
"""
)
