"""A self-contained HTML page: text, tables, plots as SVG, pictures inline."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

STYLE = """
body{font:16px/1.55 system-ui,sans-serif;max-width:1080px;margin:2.5rem auto;padding:0 1.2rem;
color:#1d2733;background:#fbfaf8}h1{font-size:2rem;margin-bottom:.2rem}h2{margin-top:2.6rem;
border-top:1px solid #dcd8d0;padding-top:1.4rem}img{max-width:100%;height:auto;border-radius:6px;
image-rendering:auto}figure{margin:1.2rem 0}figcaption{color:#5b6672;font-size:.92rem}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.35rem .9rem;text-align:right;
border-bottom:1px solid #e4e0d8}td:first-child,th:first-child{text-align:left}th{font-weight:600}
code,pre{background:#efece6;border-radius:4px;padding:.1rem .35rem;font-size:.92em}
pre{padding:.8rem 1rem;overflow-x:auto}.small{color:#5b6672;font-size:.92rem}
"""


class Report:
    """Collects parts in order; `html()` is the page."""

    def __init__(self, title: str, subtitle: str):
        self._parts = [f"<h1>{html.escape(title)}</h1><p class=small>{html.escape(subtitle)}</p>"]
        self._title = title

    def heading(self, text: str) -> None:
        """A section's heading."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        """A paragraph."""
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def code(self, text: str) -> None:
        """Preformatted lines."""
        self._parts.append(f"<pre>{html.escape(text)}</pre>")

    def picture(self, image: np.ndarray, caption: str) -> None:
        """A picture uint8 [H, W, 3] with a caption."""
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG", optimize=True)
        data = base64.b64encode(file.getvalue()).decode()
        caption = html.escape(caption)
        self._parts.append(
            f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table of strings."""

        def line(cells, tag):
            return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

        body = "".join(line(row, "td") for row in rows)
        self._parts.append(f"<table>{line(head, 'th')}{body}</table>")

    def plot(self, x: Sequence[float], y: Sequence[float], name: str, marks: Sequence[float] = ()):
        """A line of y over x; `marks` are vertical lines."""
        width, height, left, low = 720, 260, 56, 30
        x_array, y_array = np.asarray(x, float), np.asarray(y, float)
        x_end, bottom = x_array.max(), float(y_array.min())
        top = max(float(np.percentile(y_array, 99)), bottom + 1e-9)  # early losses leave the plot
        px = left + x_array / x_end * (width - left - 10)
        py = (height - low) - (np.minimum(y_array, top) - bottom) / (top - bottom) * (
            height - low - 10
        )
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(px, py, strict=True))
        parts = [f'<polyline fill="none" stroke="#2a6f97" stroke-width="2" points="{points}"/>']
        for mark in marks:
            at = left + mark / x_end * (width - left - 10)
            parts.append(
                f'<line x1="{at:.1f}" x2="{at:.1f}" y1="10" y2="{height - low}" stroke="#c1121f" '
                'stroke-dasharray="4 4"/>'
            )
        for share in (0.0, 0.5, 1.0):
            value, at = bottom + share * (top - bottom), (height - low) * (1 - share) + 10 * share
            parts.append(f'<text x="4" y="{at + 4:.0f}" font-size="12">{value:.3f}</text>')
            step = left + share * (width - left - 10)
            parts.append(
                f'<text x="{step - 12:.0f}" y="{height - 8}" font-size="12">'
                f"{share * x_end:.0f}</text>"
            )
        self._parts.append(
            f'<figure><svg viewBox="0 0 {width} {height}" width="{width}">{"".join(parts)}</svg>'
            f"<figcaption>{html.escape(name)}</figcaption></figure>"
        )

    def html(self) -> str:
        """The whole page."""
        return (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>'
            f"{html.escape(self._title)}</title><style>{STYLE}</style>{''.join(self._parts)}</html>"
        )
