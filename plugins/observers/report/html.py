"""HTML by parts that escape what they are given: only ``Markup`` goes into a page as it is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""Characters that a page cannot hold."""


class Markup(str):
    """HTML that is safe to insert."""

    __slots__ = ()


def text(value: object) -> Markup:
    """The value as text, escaped; ``Markup`` as it is."""
    if isinstance(value, Markup):
        return value
    return Markup(escape(CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(value)), quote=True))


def tag(name: str, *content: object, **attributes: object) -> Markup:
    """An element. ``class_`` is its class; an attribute that is None or False is left out."""
    said = "".join(
        f' {key.rstrip("_")}="{text(value)}"'
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    return Markup(f"<{name}{said}>{join(content)}</{name}>")


def join(parts: Iterable[object], between: str = "") -> Markup:
    return Markup(between.join(map(text, parts)))


def table(
    head: Sequence[object], rows: Iterable[Sequence[object]], numbers: Iterable[int] = (), caption: str = ""
) -> Markup:
    """A table. ``numbers`` are the columns set to the right; the first cell of a row is its header."""
    right = {i: "n" for i in numbers}
    top = tag("tr", *(tag("th", one, scope="col", class_=right.get(i)) for i, one in enumerate(head)))
    body = [
        tag(
            "tr",
            *(
                tag("td" if i else "th", cell, scope=None if i else "row", class_=right.get(i))
                for i, cell in enumerate(row)
            ),
        )
        for row in rows
    ]
    made = tag(
        "table", *([tag("caption", caption)] if caption else []), tag("thead", top), tag("tbody", *body)
    )
    return tag("div", made, class_="wide")


def section(title: str, *content: object) -> Markup:
    return tag("section", tag("h2", title), *content)


def fold(title: str, *content: object) -> Markup:
    """Something to open; printed open."""
    return tag("details", tag("summary", title), *content)


CSS = Markup("""
:root{color-scheme:light dark;--ink:#1c1d20;--dim:#5d6169;--line:#d8dadf;--ground:#fff;--soft:#f5f6f8;
--link:#0b57d0;--bad:#8f1d14;--bad-ground:#fdecea}
@media(prefers-color-scheme:dark){:root{--ink:#e6e7ea;--dim:#a2a7b0;--line:#3a3d44;--ground:#16171a;
--soft:#202226;--link:#8ab4f8;--bad:#ffb4ab;--bad-ground:#3b1512}svg{filter:brightness(1.3)}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",
Roboto,"Liberation Sans",Arial,sans-serif}
main{max-width:62rem;margin:0 auto;padding:1.5rem 1.25rem 3rem}
h1{font-size:1.5rem;line-height:1.25;margin:0 0 .25rem}
h2{font-size:1.1rem;margin:2.2rem 0 .6rem;padding-bottom:.25rem;border-bottom:1px solid var(--line)}
h3{font-size:.95rem;margin:0 0 .3rem}
a{color:var(--link)}
p{margin:.4rem 0}
.dim,figcaption,caption{color:var(--dim)}
.partial{margin:0 0 1.2rem;padding:.7rem 1rem;border:2px solid var(--bad);border-radius:6px;color:var(--bad);
background:var(--bad-ground);font-weight:600}
.partial span{font-weight:400}
dl.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.6rem;margin:1rem 0 0}
dl.facts div{background:var(--soft);border-radius:6px;padding:.5rem .75rem}
dl.facts dt{color:var(--dim);font-size:.8rem}
dl.facts dd{margin:0;font-size:1.15rem;font-weight:600;font-variant-numeric:tabular-nums;
overflow-wrap:anywhere}
dl.facts small{font-weight:400;font-size:.75rem;color:var(--dim)}
.wide{overflow-x:auto;margin:0 0 1.1rem}
table{border-collapse:collapse;width:100%;font-size:.86rem;border-top:1.5px solid;border-bottom:1.5px solid}
caption{text-align:left;padding-bottom:.3rem;font-size:.86rem}
th,td{text-align:left;vertical-align:top;
padding:.28rem .9rem .28rem 0;font-weight:400;overflow-wrap:break-word}
thead th{font-weight:600;border-bottom:1px solid;white-space:nowrap}
tbody tr+tr>*{border-top:1px solid var(--line)}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td.n:last-child,th.n:last-child{padding-right:0}
code,.code td,.code tbody th{font:.8rem/1.5 ui-monospace,"Liberation Mono",Menlo,Consolas,monospace;
overflow-wrap:anywhere}
details{margin:.6rem 0}
summary{cursor:pointer;font-weight:600;font-size:.9rem;padding:.2rem 0}
figure{margin:0 0 2rem}
figcaption{font-size:.86rem;margin-top:.3rem}
figcaption b{color:var(--ink)}
svg{display:block;width:100%;height:auto}
svg *{stroke-linejoin:round;stroke-linecap:butt}
svg text{font-family:"DejaVu Sans",Verdana,"Liberation Sans",Arial,sans-serif!important}
footer{margin-top:2.5rem;padding-top:.8rem;border-top:1px solid var(--line);font-size:.86rem}
footer ul{margin:.3rem 0;padding-left:1.2rem}
@media print{:root{--ink:#000;--dim:#444;--line:#bbb;--ground:#fff;--soft:#fff;--link:#000;--bad:#8f1d14;
--bad-ground:#fff}body{font-size:10pt}main{max-width:none;padding:0}figure,tr,.partial{break-inside:avoid}
h2{break-after:avoid}.wide{overflow:visible}details::details-content{content-visibility:visible;display:block}
dl.facts div{border:1px solid var(--line)}}
""")
