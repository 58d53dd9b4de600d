"""How two tokenizers cut the same text, and what a source's token becomes in the target's.

Any two will do: folders, hub names, GGUF files; here two of the small ones that come along.
"""

import fusellm

source = fusellm.Tokenizer.from_pretrained("zoo/python")
target = fusellm.Tokenizer.from_pretrained("zoo/prose")

# At each position of the target: has the source read exactly the same bytes, and what comes next?
print(fusellm.align(source, target, "import numpy as np  # the usual abbreviation"), "\n")

# How much of a text could be learnt from the source at all, before any model is loaded.
comparison = fusellm.compare_tokenizers(source, target, ["def add(a, b):\n    return a + b\n"] * 6)
domain = comparison.domains[0]
print(f"aligned: {domain.aligned} of {domain.positions} positions")

# Two vocabularies share no ids. What both can tell apart are classes of tokens.
classes = fusellm.vocabulary_map(source, target)
token = int(source.encode([" import"])[0].ids[0])
print(f"{source.spelled(token)!r} becomes", [target.spelled(i) for i in classes.target_ids(token)])
