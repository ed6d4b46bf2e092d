"""A self-contained HTML page: text, tables, plots as SVG, pictures inline."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence

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

COLOURS = ("#2a6f97", "#c1121f", "#588157", "#e09f3e", "#6a4c93", "#3d405b", "#bc6c25", "#0081a7")


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

    def heat(self, names: Sequence[str], values: Mapping[tuple[str, str], float]) -> None:
        """A square table of values about [0, 1] by (row, column), 1 green and 0 red."""

        def cell(pair: tuple[str, str]) -> str:
            value = values.get(pair, float("nan"))
            if not np.isfinite(value):
                return "<td></td>"
            hue = 120 * min(max(value, 0.0), 1.0)
            return f'<td style="background:hsl({hue:.0f} 55% 82%)">{value:.2f}</td>'

        head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
        body = "".join(
            f"<tr><td>{html.escape(i)}</td>{''.join(cell((i, j)) for j in names)}</tr>"
            for i in names
        )
        self._parts.append(f"<table><tr><th></th>{head}</tr>{body}</table>")

    def bars(
        self,
        values: Mapping[str, float],
        name: str,
        intervals: Mapping[str, tuple[float, float]] = {},
    ) -> None:
        """Horizontal bars of values about [0, 1], with an interval where one is known."""
        line, left, width = 26, 150, 560
        parts = [
            f'<line x1="{left + width}" x2="{left + width}" y1="0" y2="{line * len(values)}" '
            'stroke="#b8b2a6" stroke-dasharray="3 3"/>'
        ]
        for i, (key, value) in enumerate(values.items()):
            y, length = line * i + 5, width * min(max(value, 0.0), 1.0)
            parts.append(f'<text x="0" y="{y + 13}" font-size="14">{html.escape(key)}</text>')
            parts.append(
                f'<rect x="{left}" y="{y}" width="{length:.1f}" height="16" fill="#2a6f97"/>'
            )
            if key in intervals:
                low, high = (left + width * min(max(n, 0.0), 1.05) for n in intervals[key])
                parts.append(
                    f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y + 8}" y2="{y + 8}" '
                    'stroke="#f2a65a" stroke-width="4"/>'
                )
            parts.append(
                f'<text x="{left + width + 36}" y="{y + 13}" font-size="14">{value:.3f}</text>'
            )
        self._figure("".join(parts), left + width + 90, line * len(values), name)

    def plot(
        self,
        x: Sequence[float],
        y: Sequence[float] | Mapping[str, Sequence[float]],
        name: str,
        marks: Sequence[float] = (),
    ) -> None:
        """A line of y over x, or several by name; `marks` are vertical lines."""
        curves = y if isinstance(y, Mapping) else {"": y}
        width, height, left, low = 720, 260, 56, 30
        right = 130 if isinstance(y, Mapping) else 10
        x_array, every = (
            np.asarray(x, float),
            np.concatenate([np.ravel(c) for c in curves.values()]),
        )
        x_end, bottom = x_array.max(), float(every.min())
        top = max(float(np.percentile(every, 99)), bottom + 1e-9)  # early losses leave the plot
        parts = []
        for i, (label, curve) in enumerate(curves.items()):
            over = np.minimum(np.asarray(curve, float), top) - bottom
            px = left + x_array / x_end * (width - left - right)
            py = (height - low) - over / (top - bottom) * (height - low - 10)
            points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(px, py, strict=True))
            colour = COLOURS[i % len(COLOURS)]
            parts.append(
                f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{points}"/>'
            )
            parts.append(
                f'<text x="{width - right + 12}" y="{24 + 18 * i}" font-size="13" '
                f'fill="{colour}">{html.escape(label)}</text>'
            )
        for mark in marks:
            at = left + mark / x_end * (width - left - right)
            parts.append(
                f'<line x1="{at:.1f}" x2="{at:.1f}" y1="10" y2="{height - low}" stroke="#c1121f" '
                'stroke-dasharray="4 4"/>'
            )
        for share in (0.0, 0.5, 1.0):
            value, at = bottom + share * (top - bottom), (height - low) * (1 - share) + 10 * share
            parts.append(f'<text x="4" y="{at + 4:.0f}" font-size="12">{value:.3f}</text>')
            step = left + share * (width - left - right)
            number = f"{share * x_end:.0f}" if x_end > 2 else f"{share * x_end:g}"
            parts.append(
                f'<text x="{step - 12:.0f}" y="{height - 8}" font-size="12">{number}</text>'
            )
        self._figure("".join(parts), width, height, name)

    def _figure(self, drawing: str, width: int, height: int, name: str) -> None:
        self._parts.append(
            f'<figure><svg viewBox="0 0 {width} {height}" width="{width}">{drawing}</svg>'
            f"<figcaption>{html.escape(name)}</figcaption></figure>"
        )

    def html(self) -> str:
        """The whole page."""
        return (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>'
            f"{html.escape(self._title)}</title><style>{STYLE}</style>{''.join(self._parts)}</html>"
        )
