"""A training script of one's own, in the manner of TRL, on what a run has fused.

    python examples/own_trainer.py [RUN]

RUN is a folder in which `fusellm fuse` is done; without it a small one is made of the zoo.
"""

import email
import sys
import tempfile
from pathlib import Path

from transformers import TrainingArguments

import fusellm


def small_run(folder: str) -> fusellm.Run:
    """Two sources of the zoo, and 30 kB of Python's own library."""
    recipe = fusellm.Recipe.model_validate(
        {
            "name": "small",
            "target": "zoo/prose",
            "sources": ["zoo/python", "zoo/cpp"],
            "corpus": {
                "documents": [{"files": f"{Path(email.__file__).parent}/*.py", "domain": "python"}],
                "train_bytes": 30_000,
                "block_bytes": 1024,
            },
        }
    )
    return fusellm.Run(recipe, folder).corpus().externalize().fuse()


def main(run: fusellm.Run, out: str, **arguments: object) -> fusellm.FusionTrainer:
    """Train the target of a run."""
    trainer = fusellm.FusionTrainer(
        run.recipe.target.model,
        TrainingArguments(out, report_to="none", **arguments),
        fusellm.FusedDataset(run),
        lambda_=0.5,
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        run = fusellm.Run(sys.argv[1]) if len(sys.argv) > 1 else small_run(f"{folder}/run")
        trainer = main(
            run, f"{folder}/out", learning_rate=2e-3, num_train_epochs=1, logging_steps=5
        )
        texts = ["def area(width, height):\n    return width * height\n"]
        tokenizer = fusellm.Tokenizer.from_pretrained(run.recipe.target.model)
        print(fusellm.bits_per_byte(trainer.model, tokenizer, texts))
