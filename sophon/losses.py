"""Losses of the defender, each a pure function of logits or of predicted noise; whoever calls them minimises them.

Notation and shapes: z are the logits, float [B, C], p = softmax(z), C the number of classes, y the labels, int64 [B];
eps is the noise that was added and e the noise that a denoiser predicts, float [B, C, H, W]; X are features before the
head, float [B, D], not centred. Sources: SOPHON (Deng et al., 2024, arXiv 2404.12699) for `inverse_cross_entropy`,
`kl_from_uniform` and `denial_of_service`; its public code for `negated_logits_cross_entropy`; MLAC (Henderson et al.,
2023, arXiv 2211.14946) for `clamped_negative_cross_entropy`; TAR (Tamirisa et al., 2024, arXiv 2408.00761) for
`negative_entropy`. What is not of logits or noise but of features is from arXiv 2505.23760 (Zheng et al., 2025).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def inverse_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """ICE: mean over images of ``-log(1 - p_y)``, in [0, inf).

    Its gradient with respect to z_y is p_y / B: it dies out as the model gets worse, so it stays bounded. Computed as
    ``logsumexp(z) - logsumexp(z without y)``, finite for every finite z; C >= 2.
    """
    without_label = logits.scatter(1, labels[:, None], -math.inf)
    return (torch.logsumexp(logits, 1) - torch.logsumexp(without_label, 1)).mean()


def kl_from_uniform(logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """KLU: mean over images of KL(uniform || p) = ``-(1/C) sum_j log(C p_j)``, in [0, inf).

    Its gradient with respect to z_j is (p_j - 1/C) / B. Needs no labels.
    """
    return -F.log_softmax(logits, 1).mean() - math.log(logits.shape[1])


def negative_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Baseline: ``-CE``, in (-inf, 0]. Its gradient grows with the error, so its minimisation diverges."""
    return -F.cross_entropy(logits, labels)


def clamped_negative_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Baseline MLAC: mean over images of ``-min(CE, log C)``, in [-log C, 0].

    The negated loss of the adversary, with no reward for doing worse than a uniform guess.
    """
    return -F.cross_entropy(logits, labels, reduction="none").clamp(max=math.log(logits.shape[1])).mean()


def negative_entropy(logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """TAR's outer loss: mean over images of ``-H(p) = sum_j p_j log p_j``, in [-log C, 0].

    Its gradient with respect to z_j is p_j (log p_j + H(p)) / B: it dies out at a uniform guess, but at a certain one
    as well. Needs no labels.
    """
    logs = F.log_softmax(logits, 1)
    return (logs.exp() * logs).sum(1).mean()


def negated_logits_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Baseline: ``CE(-z, y)``, in [0, inf): what SOPHON's public code computes under the name of ICE."""
    return F.cross_entropy(-logits, labels)


def distillation(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Mean over images of ``T^2 KL(softmax(teacher / T) || softmax(z / T))``, in [0, inf) (Hinton et al., 2015).

    Args:
        logits: float [B, C].
        teacher_logits: float [B, C], taken as constant.
        temperature: T > 0.
    """
    student = F.log_softmax(logits / temperature, 1)
    teacher = F.log_softmax(teacher_logits.detach() / temperature, 1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


SUPPRESSION_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ice": inverse_cross_entropy,
    "klu": kl_from_uniform,
    "negative_ce": negative_cross_entropy,
    "mlac": clamped_negative_cross_entropy,
    "negative_entropy": negative_entropy,
    "ce_on_negated_logits": negated_logits_cross_entropy,
}


def reads_labels(loss: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Say whether a suppression loss means nothing without labels: one that does not read them has a default there."""
    return list(inspect.signature(loss).parameters.values())[1].default is inspect.Parameter.empty


def denial_of_service(predicted: Tensor, noise: Tensor | None = None) -> Tensor:
    """DoS: mean over all elements of ``e^2``, in [0, inf): a denoiser that says nothing removes nothing.

    Its gradient with respect to an element of e is 2 e / N: it dies out at e = 0, where the error against unit noise
    is 1.
    """
    return predicted.square().mean()


def negative_mse(predicted: Tensor, noise: Tensor) -> Tensor:
    """Baseline: ``-MSE(e, eps)``, in (-inf, 0]. Its gradient grows with the error, so its minimisation diverges."""
    return -F.mse_loss(predicted, noise)


def shifted_target_mse(predicted: Tensor, noise: Tensor) -> Tensor:
    """Baseline: ``MSE(e, eps + 1)``, in [0, inf): every element is to be predicted too high by the noise's own scale.

    Its minimum is an error of 1 against eps, as that of `denial_of_service`.
    """
    return F.mse_loss(predicted, noise + 1)


DENOISING_SUPPRESSION_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "dos": denial_of_service,
    "negative_mse": negative_mse,
    "shifted_mse": shifted_target_mse,
}


def ill_conditioning(features: Tensor) -> Tensor:
    """R_ill / k, in [2, inf): falls as the features' second moment becomes ill-conditioned (arXiv 2505.23760).

    With s_1 >= .. >= s_k the eigenvalues of S = X^T X / B that are not zero for want of images, k = min(B, D):
    ``R_ill = 1 / (sum_i s_i^2 / (2 k) - s_k^2 / 2)``. Two changes: S is scaled to a trace of 1, since the paper's falls
    as features merely grow, which conditions nothing; and R_ill, then 2 k at least, is divided by k. It is held below
    4e6 k, near which (S a multiple of the identity) the gradient is 0.
    """
    spectrum = _spectrum(features)
    spread = spectrum.square().mean() - spectrum[0].square()
    return 2 * len(spectrum) / spread.clamp(min=5e-7)


def well_conditioning(features: Tensor) -> Tensor:
    """R_well = s_1^2 / 2 - sum_i s_i^2 / (2 k), in [0, 1/2): 0 where all s_i are equal (arXiv 2505.23760).

    Notation and scale as in `ill_conditioning`: S has a trace of 1.
    """
    spectrum = _spectrum(features)
    return (spectrum[-1].square() - spectrum.square().mean()) / (2 * len(spectrum) ** 2)


def _spectrum(features: Tensor) -> Tensor:
    """Return the eigenvalues of the second moment, [min(B, D)], rising, scaled to a mean of 1."""
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    wide = len(features) < features.shape[1]
    moment = features @ features.T if wide else features.T @ features  # they share what is not zero
    mean = moment.diagonal().mean()
    values: Tensor = torch.linalg.eigvalsh(moment / mean.clamp(min=torch.finfo(mean.dtype).tiny))
    return values
