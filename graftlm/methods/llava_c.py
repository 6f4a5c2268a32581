"""LLaVA-c: regularise on questions without labels, then consolidate the update by its spectrum.

    learn        L + ‖h[f_θt(x)] - h[f_θ(t-1)(x)]‖₂       x are inquiries: text without pictures and without answers
    consolidate  θ_t ← θ_{t-1} + SAC(θ_t - θ_{t-1})        after every stage, the first one too

Paper:   Liu et al., LLaVA-c, arXiv:2506.08666, §3.2-3.3, Algorithm 1.
Differs: see `methods.uir` and `merging.spectral`. The connector's update is consolidated with the LLM's (the paper does not
    say); ``connectors: false`` leaves it as trained.
"""

from graftlm.learning.method import Method
from graftlm.methods.mera import Merge
from graftlm.methods.uir import UIR

__all__ = ["llava_c"]


def llava_c(strength: float = 1.0, alpha: float = 0.2, connectors: bool = True) -> list[Method]:
    """UIR at ``strength``, then SAC at ``alpha``."""
    return [UIR(strength=strength), Merge("sac", alpha=alpha, connectors=connectors)]
