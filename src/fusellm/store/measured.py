"""Bits per byte on disk: what each held-out block's bytes cost a model."""

import numpy as np
import pyarrow as pa

from fusellm.store.layout import Batch, Layout, Wrong, wrong_at

LEAST_NATS = -1e-3  # of a byte: a log-softmax may come out a little above 0
NATS_SCHEMA = pa.schema([("block", pa.int64()), ("nats", pa.list_(pa.float32()))])


def _costs(batch: Batch) -> Wrong | None:
    """Nats of a byte are not negative; NaN stands for a byte that no prediction covers."""
    values = batch["nats"].values
    low = values < LEAST_NATS
    if not low.any():
        return None
    at = int(np.argmax(low))
    return wrong_at(batch, "nats", at, f"{values[at]} nats are fewer than none")


NATS = Layout((NATS_SCHEMA,), (_costs,))
