"""Losses of other works that learn across tokenizers, written anew from papers and public code.

They are no distributions over the target's tokens, so that they are no strategies of fusellm:

    projection   X-Token's P-KL: the target's distribution is carried into the source's vocabulary
    hybrid       GOLD's: tokens that both have by a divergence, the others by sorted probabilities
    span         ALM's: how likely both find the pieces of text between boundaries that both have

Each is a function of log-probabilities to one scalar, a mean over its positions or pieces. `chunks`
says which positions belong together. What the papers call teacher and student is source and target.
"""
