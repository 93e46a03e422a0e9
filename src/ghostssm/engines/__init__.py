"""What each inference engine accepts, and what it does not heed: rules with their sources, and advice from them."""

from ghostssm.engines.advice import advise, good_state_sizes, nearest_state_size
from ghostssm.engines.rules import ENGINES, Advice, config_keys, engine_names, engines_named

__all__ = [
    "ENGINES",
    "Advice",
    "advise",
    "config_keys",
    "engine_names",
    "engines_named",
    "good_state_sizes",
    "nearest_state_size",
]
