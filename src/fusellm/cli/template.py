"""`fusellm init`, and the recipe that it writes."""

from pathlib import Path
from typing import Annotated

import typer

from fusellm.cli.console import STDERR
from fusellm.errors import RecipeError

RECIPE_TEMPLATE = """\
# A run of fusellm. Check it with `fusellm check`, run it with `fusellm run`.
# All keys: `fusellm schema`. Any of them on the command line: --set objective.lambda=0.7
name: my-run
seed: 0

# The model that is trained: a folder, a GGUF file, a hub name, or zoo/prose, zoo/python, zoo/cpp.
target:
  model: zoo/prose
  # revision: main            # hub only
  # dtype: bfloat16           # float32, bfloat16 or float16
  # tokenizer: owner/name     # a folder or a hub name, in place of the model's own

# The models whose distributions are read, any number of them. Naming the target too is the
# paper's setting: where it wins, its own beginning holds the training back.
sources:
  - name: prose
    model: zoo/prose
  - name: python
    model: zoo/python

# The text that all of them read. An entry is one of builtin, hub, files.
corpus:
  documents:
    - builtin: prose
    - builtin: python
    # - hub: JeanKaddour/minipile
    #   split: train
    #   validation_split: validation
    #   held_out_split: test
    #   domain: minipile
    # - files: data/**/*.jsonl     # or json, csv, parquet, arrow, text; plain, gz, bz2, zst or xz
    #   text_field: text           # or several: [prompt, answer]
    #   # context_fields: [prompt]   # those that are read and not predicted
    #   domain: mine
  block_bytes: 1024           # longest piece; it must fit every model's context
  train_bytes: 600_000        # budget over all entries; or train_tokens; null for everything

# What is kept of each distribution.
externalize:
  scheme: sampled             # or top, with k and mass
  draws: 32

# How aligned distributions become one.
fusion:
  strategy: partition         # or bytes; or mined, em: the paper's
  # token_healing: false      # take sources as they cut the text (docs/method.md)
  function: mince             # or avgce with beta, avgce_paper, uniform
  granularity: window         # or block, as in the paper

objective:
  lambda: 0.5                 # weight of the plain language-model loss
  # lambda_schedule: linear   # or cosine, to lambda_end; or authors, to 1

# Any name of transformers' TrainingArguments may stand here.
training:
  learning_rate: 1.0e-3
  per_device_train_batch_size: 16   # rows; rows: packed puts several blocks in one
  clm_baseline: true          # train with lambda 1 too, for comparison
  # keep: best                # by validation bits per byte; the last if not given
  # early_stop_validations: 4 # stop after so many without a better one
  # lora: {r: 16, alpha: 32}  # train adapters in place of all weights; needs fusellm[lora]

evaluation:
  resamplings: 10000
  # suites: [smoke]           # see `fusellm evaluate --list`; needs fusellm[eval]
  # data_dir: data            # where their data is
  # limit: 100                # only the first documents of each task
"""


def init(
    path: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("my-run.yaml"),
) -> None:
    """Write a commented recipe to start from."""
    if path.is_dir():
        raise RecipeError(f"{path} is a folder; name a file in it, such as {path / 'my-run.yaml'}")
    if path.exists():
        raise RecipeError(f"{path} exists already; name another file or move it away")
    if not path.absolute().parent.is_dir():
        raise RecipeError(f"there is no folder {path.parent} for {path.name}; make it first")
    path.write_text(RECIPE_TEMPLATE, encoding="utf-8")
    STDERR.say(f"wrote {path}; edit it, then: fusellm check {path}")
