"""The style sheet of the HTML report. Colours are variables, so dark is one block; lines differ by dash too."""

STYLE = """
:root{--paper:#fcfcfa;--ink:#1d2125;--soft:#5b646e;--line:#dfe2e5;--card:#fff;--alarm:#a5330a;
--s0:#2563c9;--s1:#c2570c;--s2:#1e7f4f;--s3:#7e3fb3;--s4:#b02a5b;--s5:#5f6b76}
@media (prefers-color-scheme:dark){:root{--paper:#15181b;--ink:#e6e8ea;--soft:#9aa4ae;--line:#30363c;--card:#1c2024;
--alarm:#ff9d6b;--s0:#79a9ff;--s1:#f3a15f;--s2:#66c795;--s3:#c39bf0;--s4:#f08aae;--s5:#a3aeb8}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1120px;margin:0 auto;padding:32px 24px 64px}
h1{font-size:26px;margin:0;letter-spacing:-.01em}
header p,caption,figcaption,dt{color:var(--soft)}
header p{margin:4px 0 0}
h2{font-size:19px;margin:40px 0 12px;padding-top:20px;border-top:1px solid var(--line)}
h3{font-size:14px;margin:18px 0 4px}
.notes{margin-top:20px;padding:10px 16px;border-left:3px solid var(--s1);background:var(--card)}
.notes ul{margin:0;padding-left:18px}
.alarm{color:var(--alarm);border:2px solid var(--alarm);border-radius:6px;padding:12px 16px}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(132px,1fr));gap:12px;margin:0 0 20px}
.tiles div{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 14px}
.tiles dt{font-size:13px;line-height:1.3;min-height:2.6em}
.tiles dd{margin:4px 0 0;font-size:22px;font-variant-numeric:tabular-nums}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums;margin-bottom:20px}
caption{text-align:left;padding-bottom:6px;font-size:14px}
th,td{padding:6px 0 6px 16px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
tbody th,thead th:first-child{text-align:left;padding-left:0;font-weight:400}
thead th{font-weight:600;white-space:normal;vertical-align:bottom}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr));gap:20px;align-items:start;margin-top:24px}
figure{margin:0;padding:16px;background:var(--card);border:1px solid var(--line);border-radius:8px;min-width:0}
figcaption{font-size:14px;margin-top:8px}
svg{display:block;width:100%;height:auto;font:13px system-ui,sans-serif}
svg text{fill:var(--soft)}
svg .paper{fill:var(--paper)}
svg .label,svg .value{fill:var(--ink)}
svg .grid{stroke:var(--line);fill:none}
svg .axis{stroke:var(--soft);fill:none}
svg .line{stroke:currentColor;stroke-width:2;fill:none;stroke-linejoin:round}
svg .dot{fill:currentColor;fill-opacity:.6}
svg .knot{fill:currentColor}
svg .bar{fill:currentColor}
.s0{color:var(--s0)}.s1{color:var(--s1)}.s2{color:var(--s2)}.s3{color:var(--s3)}.s4{color:var(--s4)}.s5{color:var(--s5)}
.s1 .line{stroke-dasharray:7 3}.s2 .line{stroke-dasharray:2 3}.s3 .line{stroke-dasharray:9 3 2 3}
.s4 .line{stroke-dasharray:12 4}.s5 .line{stroke-dasharray:4 4}
details{margin:4px 0}
summary{cursor:pointer;padding:3px 0}
.origin dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 16px;margin:0;font-size:13px}
.origin dd{margin:0;overflow-wrap:anywhere;font-family:ui-monospace,monospace}
@media (max-width:600px){.origin dl{grid-template-columns:1fr}.origin dd{margin-bottom:6px}
main{padding:20px 14px 48px}}
"""
