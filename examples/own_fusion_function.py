"""A fusion function of one's own: it needs no recipe and no change of the package.

It is given what the sources can be compared by, and gives each source's weight at each position.
"""

import inspect
import json.decoder

import numpy as np

import fusellm
from fusellm.fusion.functions import Compared


def softmax_of_both(compared: Compared) -> np.ndarray:
    """A softmax of what a source costs around the position and over the whole text.

    `compared.aligned` [sources, positions] says where a source has a distribution; there, and only
    there, it may have a weight, and a position's weights sum to 1.
    """
    cost = compared.cross_entropy + compared.nats_per_token
    weights = np.where(compared.aligned, np.exp(-2.0 * cost), 0.0)
    return weights / np.maximum(weights.sum(axis=0), 1e-30)


texts = [inspect.getsource(json.decoder)[:2000]]
read = {
    name: fusellm.read_distributions(
        *fusellm.load_pretrained(f"zoo/{name}", device="cpu"), texts, draws=64
    )
    for name in ("python", "cpp")
}
target = fusellm.Tokenizer.from_pretrained("zoo/prose")
for function in ("mince", "avgce", softmax_of_both):
    fused = fusellm.fuse(texts, target, read, function)
    name = function if isinstance(function, str) else function.__name__
    print(f"{name}: ", {source: f"{share:.0%}" for source, share in fused.won.items()})
