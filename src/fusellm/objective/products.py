"""Matrix products of bfloat16 factors with results in float32, on a CPU.

The product of two bfloat16 numbers is exact in float32, and a matrix product adds such products up
in float32. Torch rounds the sum to bfloat16 all the same: of a logit of 20 that leaves steps of
1/8. On CUDA `torch.mm(..., out_dtype=torch.float32)` does not round; on a CPU there is no such
argument. But oneDNN can be told to multiply float32 matrices as if they were bfloat16. Factors that
are bfloat16 by value lose nothing by that, and processors with instructions for it (AVX512-BF16,
AMX) are several times as fast as in float32. Others do not round the factors: bfloat16 ones give
the same result there, float32 ones under autocast a more exact one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def factors_as_bfloat16(wanted: bool = True) -> Iterator[None]:
    """Within the block, float32 products on a CPU round their factors to bfloat16, and no more.

    The setting is the process': other threads must not multiply matrices meanwhile.

    Args:
        wanted: False changes nothing.

    >>> a = torch.full((64, 64), 1 + 2**-7)  # which bfloat16 has
    >>> with factors_as_bfloat16():
    ...     product = a @ a
    >>> bool((product == 64 * (1 + 2**-7) ** 2).all())  # which bfloat16 has not
    True
    """
    backend: Any = torch.backends.mkldnn
    matmul = backend.matmul
    before = matmul.fp32_precision
    if wanted:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
