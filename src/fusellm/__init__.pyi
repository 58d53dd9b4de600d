# What type checkers and editors see of `fusellm`, whose names are imported when first asked for.
from fusellm.alignment.strategies import vocabulary_map as vocabulary_map
from fusellm.alignment.text_alignment import Alignment as Alignment
from fusellm.alignment.text_alignment import align as align
from fusellm.alignment.translation import VocabularyMap as VocabularyMap
from fusellm.arrays.read_block import Distribution as Distribution
from fusellm.arrays.read_block import StoredBlock as StoredBlock
from fusellm.arrays.source_distributions import SourceDistributions as SourceDistributions
from fusellm.config import Recipe as Recipe
from fusellm.errors import FusellmError as FusellmError
from fusellm.evaluation.models import evaluate as evaluate
from fusellm.evaluation.text.bits_per_byte import bits_per_byte as bits_per_byte
from fusellm.evaluation.text.ensemble import Ensemble as Ensemble
from fusellm.explain.tokenizers import compare_tokenizers as compare_tokenizers
from fusellm.fusion.texts import FusedDistributions as FusedDistributions
from fusellm.fusion.texts import fuse as fuse
from fusellm.models.pretrained import load_pretrained as load_pretrained
from fusellm.models.tokenizer import Tokenizer as Tokenizer
from fusellm.objective.divergence import Divergence as Divergence
from fusellm.objective.schedule import LambdaSchedule as LambdaSchedule
from fusellm.reading.texts import read_distributions as read_distributions
from fusellm.recipe_file import load_recipe as load_recipe
from fusellm.run import Run as Run
from fusellm.store.facts import StoreFacts as StoreFacts
from fusellm.store.opened import DistributionStore as DistributionStore
from fusellm.store.opened import open_store as open_store
from fusellm.tokens.conversation import Conversation as Conversation
from fusellm.training.dataset import FusedDataset as FusedDataset
from fusellm.training.dataset import FusionCollator as FusionCollator
from fusellm.training.loss import fusion_loss as fusion_loss
from fusellm.training.loss import last_hidden as last_hidden
from fusellm.training.trainer import FusionTrainer as FusionTrainer

__version__: str
