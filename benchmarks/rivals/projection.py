"""X-Token's P-KL (arXiv 2605.21699): the target's distribution in the source's vocabulary.

W [Vt, Vs] says of each target token which source tokens it counts as: the one of the same bytes,
or the first four pieces that the source spells it with, with weights 0.9 · 0.1^i scaled to sum to
1. The loss is KL(source ‖ q W), q the target's distribution.

Read for it: `nemo_rl/algorithms/loss/loss_functions.py` (NVIDIA-NeMo/RL), `_compute_p_kl`, and
TRL's `build_projection_matrix.py`, which builds the same W. As there: temperature 1, q W is
scaled to sum to 1, and 1e-10 is added before the logarithm. Otherwise than there:

- Tokens are compared by bytes, not by how the two tokenizers write them.
- A token is spelled as it goes on after other text; there it is spelled as a text of its own.
- Bytes that are no whole characters are spelled by the longest source tokens; there, by those of
  U+FFFD.
- The token for the end of a text counts as that of the source; other special tokens as nothing.
  There, special tokens of like names share weight; so do the source's tokens as the target spells
  them (`reverse pass`), and a weight of 0.2 is set aside in each row (`scale trick`).
- All of the source's vocabulary counts; there, the 8,192 tokens that it finds likeliest in a
  batch.
- Public code takes, of a piece of text in several tokens, the mean of q W over the target's
  positions and of the source's log-probabilities over its own. `projection` here is of the first
  positions, which have read the same; with `chunk_means` the means can be given to it.

N positions, Vt and Vs tokens of the target's and the source's vocabulary.
"""

import torch

from fusellm.alignment.translation import FirstTokens, as_continuations
from fusellm.tokens.encode import Encoder
from rivals.chunks import sums

PIECES, FIRST_WEIGHT, DECAY = 4, 0.9, 0.1
_EPSILON = 1e-10


def projection_matrix(
    source: Encoder, target: Encoder, source_rows: int, target_rows: int
) -> torch.Tensor:
    """Wᵀ [Vs, Vt], sparse; a column of a target token that counts as nothing is empty.

    Args:
        source_rows, target_rows: Vs and Vt, the rows of the heads, which may be more than tokens.
    """
    known = target.vocabulary.token_bytes[:target_rows]
    firsts = FirstTokens(source)
    unmatched = {token for token in known if token and token not in firsts.by_bytes}
    spelled = as_continuations(source, unmatched)
    places: list[tuple[int, int]] = []
    weights: list[float] = []
    for id_, token in enumerate(known):
        if not token:
            continue
        if token in firsts.by_bytes:
            pieces = [firsts.by_bytes[token]]
        else:
            encoded = spelled[token]
            pieces = _longest(firsts, token) if encoded is None else encoded.ids
        pieces = [piece for piece in pieces[:PIECES] if piece < source_rows]
        own = [FIRST_WEIGHT * DECAY**n for n in range(len(pieces))]
        places += [(piece, id_) for piece in pieces]
        weights += [weight / sum(own) for weight in own]
    eos = source.vocabulary.eos_id, target.vocabulary.eos_id
    if eos[0] is not None and eos[1] is not None:
        places.append((eos[0], eos[1]))
        weights.append(1.0)
    index = torch.tensor(places, dtype=torch.int64).t()
    shape = source_rows, target_rows
    matrix = torch.sparse_coo_tensor(index, torch.tensor(weights), shape, check_invariants=True)
    return matrix.coalesce()


def _longest(firsts: FirstTokens, token: bytes) -> list[int]:
    """Ids of the longest source tokens that spell some bytes, as far as they do."""
    ids: list[int] = []
    while token and len(ids) < PIECES:
        id_ = firsts.beginning(token)
        if id_ is None:
            break
        ids.append(id_)
        token = token[len(firsts.bytes_of(id_)) :]
    return ids


def projected(target_log_probs: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """[N, Vs] probabilities of the source's tokens, from [N, Vt] of the target's; unscaled.

    Args:
        matrix: Wᵀ, as `projection_matrix` gives it.
    """
    whole: torch.Tensor = torch.sparse.mm(matrix, target_log_probs.exp().t().contiguous())
    return whole.t().contiguous()  # rows whose numbers lie apart would be read slowly


def projection_loss(carried: torch.Tensor, source_log_probs: torch.Tensor) -> torch.Tensor:
    """Mean of KL(source ‖ carried) over positions, in nats.

    Args:
        carried: [N, Vs] the target's probabilities as `projected` gives them.
        source_log_probs: [N, Vs], constants.

    >>> log_p = torch.tensor([[0.5, 0.25, 0.25]]).log()
    >>> round(projection_loss(log_p.exp(), log_p).item(), 6)
    0.0
    """
    scaled = carried / (carried.sum(-1, keepdim=True) + _EPSILON)
    log_q = torch.log(scaled + _EPSILON)
    mass = source_log_probs.exp()
    own = torch.where(mass > 0, mass * source_log_probs, 0.0).sum(-1)  # 0 · log 0 is 0 here
    return (own - (mass * log_q).sum(-1)).mean()


def chunk_means(
    carried: torch.Tensor,
    source_log_probs: torch.Tensor,
    target_spans: torch.Tensor,
    source_spans: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What public code compares: means over all positions of each piece of text.

    Args:
        carried: [P, Vs] of all positions.
        source_log_probs: [Q, Vs].
        target_spans, source_spans: [C, 2] as `Chunks` has them.

    Returns:
        ([C, Vs] mean probabilities, [C, Vs] mean log-probabilities, which do not sum to 1)
    """

    def mean(values: torch.Tensor, spans: torch.Tensor) -> torch.Tensor:
        return sums(values, spans) / (spans[:, 1] - spans[:, 0])[:, None]

    return mean(carried, target_spans), mean(source_log_probs, source_spans)
