"""The report: one file, nothing from elsewhere, nothing of a name taken for markup."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from composer_jax.evaluation.report import Report

pytestmark = pytest.mark.fast


def test_a_page_is_self_contained():
    report = Report("A <title>", "and what it is")
    report.heading("Losses & more")
    picture = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    report.picture(picture, 'a "quoted" <caption>')
    report.table(["name", "value"], [["<b>", "1.0"]])
    report.code("composer train --config a && b")
    report.plot([1, 2, 3], [3.0, 2.0, 1.0], "loss", [2])
    page = report.html()
    assert not re.search(r"https?://|<script|<link", page)
    assert "<b>" not in page and "&lt;b&gt;" in page and "<caption>" not in page
    assert "a &amp;&amp; b" in page and "A &lt;title&gt;" in page
    data = re.search(r"data:image/png;base64,([^\"]+)", page).group(1)
    found = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    np.testing.assert_array_equal(found, picture)


def test_a_plot_falls_with_its_numbers_and_stays_in_its_frame():
    for y in ([3.0, 2.0, 1.0, 0.5], [1.0, 1.0], [-2.0, -3.0]):
        report = Report("plot", "")
        report.plot(range(1, len(y) + 1), y, "loss")
        points = re.search(r'points="([^"]+)"', report.html()).group(1).split()
        points = np.array([point.split(",") for point in points], float)
        assert np.all(np.isfinite(points)) and np.all(np.diff(points[:, 0]) > 0)
        assert np.all(np.diff(points[:, 1]) >= 0)
        assert points[:, 1].min() >= 0 and points[:, 1].max() <= 260
