"""Which layers of a language model matter, which can be pruned, and which hallucinate.

The names below are loaded when they are first used, so that `import avss_nb` takes no time; the modules hold the
rest."""

__version__ = "0.1.0"

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
