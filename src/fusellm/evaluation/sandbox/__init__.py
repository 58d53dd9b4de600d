"""Running programs that a model wrote."""

from fusellm.evaluation.sandbox.bubblewrap import FOLDER, Sandbox, find_sandbox, pack
from fusellm.evaluation.sandbox.limits import MIB, Limits, Outcome

__all__ = ["FOLDER", "MIB", "Limits", "Outcome", "Sandbox", "find_sandbox", "pack"]
