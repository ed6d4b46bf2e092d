"""An image taken apart: what is said to be known of it is read, or refused by name."""

import numpy as np
import pytest

import composer_jax as cj
from composer_jax.conditions.decompose import decompose

pytestmark = pytest.mark.fast
IMAGE = np.zeros((16, 16, 3), np.uint8)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"given": {"dept": IMAGE[..., 0]}}, "given has 'dept' (did you mean 'depth'?)"),
        ({"given": {"palette": "#fff"}}, "given has 'palette', which no condition reads; it takes"),
        ({"tools": {"edge": None}}, "tools has 'edge' (did you mean 'edges'?)"),
        ({"tools": {"clpi": None}}, "it takes clip, depth, edges, segmenter"),
        ({"only": ["dept"]}, "no condition 'dept' (did you mean 'depth'?)"),
    ],
)
@pytest.mark.parametrize("function", [decompose, cj.decompose])
def test_what_no_condition_reads_is_refused(function, options, says):
    with pytest.raises(ValueError) as refused:
        function(IMAGE, **options)
    assert says in str(refused.value)


def test_what_a_source_knows_is_taken():
    batch = cj.open_source("scenes:1", size=16).batch([0])
    given = {name: value[0] for name, value in batch["given"].items()}
    only = ["depth", "instances", "palette", "mask", "intensity"]
    assert list(decompose(batch["image"][0], given=given, only=only)) == only
