"""ALM (arXiv 2503.20083): both models shall find the same pieces of text as likely.

A piece lies between two boundaries that both tokenizers have. That it comes, or anything else,
are two outcomes, with p and 1 − p. The loss is the divergence of these two between source and
target, of p^(1/τ): with τ = 1 pieces that are unlikely under both would say next to nothing.

Read for it: `tokenkit/training/losses.py` (bminixhofer/tokenkit), `compute_alm_loss`. As there: τ
= 100 (`binarization_temp`), 1e-6 taken from each logarithm, a mean over pieces (`chunk_count`).
Otherwise than there:

- There the loss is the cross-entropy of the two outcomes (`binary_ce`); here its own entropy is
  taken from it, which no gradient sees, so that it is 0 where both agree.
- It is multiplied by τ. With a large τ its gradient is else 1/τ of the ordinary loss'. There the
  two are balanced by the sizes of their gradients (GradMag); times τ it has a limit as τ grows
  (`binary_kl_temp_limit`), which is of the ordinary loss' size.
- Pieces are as short as they can be (`alm_unconstrained` with no `alm_mode`). tokenkit can join
  pieces until the source gives a space after them a probability (`merge_by_space_prob`), and can
  count that space to them (`append_space`), against the bias of token boundaries. This is left
  out.

C pieces.
"""

import torch

TEMPERATURE = 100.0
_TAKEN = 1e-6


def span_loss(
    target_log_probs: torch.Tensor,
    source_log_probs: torch.Tensor,
    temperature: float = TEMPERATURE,
) -> torch.Tensor:
    """Mean of the divergence of the two outcomes over pieces, times τ.

    Args:
        target_log_probs: [C] log-probability of each piece under the target, of all its tokens.
        source_log_probs: [C] likewise under the source, constants.
        temperature: τ.

    >>> even = torch.tensor([0.5]).log()
    >>> round(span_loss(even, torch.tensor([0.25]).log(), temperature=1.0).item(), 4)
    0.1438
    """
    source = source_log_probs.clamp(max=0) / temperature - _TAKEN
    target = target_log_probs.clamp(max=0) / temperature - _TAKEN
    came = source.exp() * (source - target)
    did_not = -torch.expm1(source) * (_log1mexp(source) - _log1mexp(target))
    return (came + did_not).mean() * temperature


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 − exp(x)) for x < 0, exact at both ends."""
    near = torch.log(-torch.expm1(x.clamp(min=-1)))
    far = torch.log1p(-torch.exp(x.clamp(max=-0.5)))
    return torch.where(x > -0.6931471805599453, near, far)
