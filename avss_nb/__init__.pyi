from .ablations import run_variants as run_variants
from .certainty import score_certainty as score_certainty
from .compensation import compensate as compensate
from .contrastive import contrastive_tune as contrastive_tune
from .data import (
    batches as batches,
    load_questions as load_questions,
    load_sentences as load_sentences,
    load_text as load_text,
)
from .decoding import dola as dola
from .detection import detector_scores as detector_scores, evaluate_detectors as evaluate_detectors
from .eavss import answer_stats as answer_stats, hallucination_profile as hallucination_profile
from .evaluation import perplexity as perplexity
from .healing import heal as heal
from .hooks import read_activations as read_activations
from .importance import block_influence as block_influence, layer_scores as layer_scores, leave_one_out as leave_one_out
from .importance import rank_agreement as rank_agreement
from .labeling import generate_answers as generate_answers, label_answers as label_answers
from .metrics import LayerStats as LayerStats, avss as avss, collect_stats as collect_stats, variance as variance
from .models import load_model as load_model
from .pruning import measure_removal as measure_removal, select_layers as select_layers
from .report import run_study as run_study
from .sparsity import sparsify as sparsify
from .surgery import prune_layers as prune_layers, skip_layers as skip_layers
from .tasks import evaluate_tasks as evaluate_tasks

__version__: str
