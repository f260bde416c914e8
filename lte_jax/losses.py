"""The losses: task, distillation, efficiency, separability.

Each is a sum over real tokens divided by a given `count`, so that microbatches and devices add up
to the mean over the whole batch. All compute in float32 and have their own named scope.

Dimension key: B batch  L length  E experts  N layers  V vocabulary
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Num


def loss_mask(
    segments_BL: Int[Array, "B L"], answers_BL: Integer[Array, "B L"] | None = None
) -> Bool[Array, "B L"]:
    """True where the next token belongs to the same text: the positions with a task loss.

    With `answers_BL`, only where the next token is marked there: prompts have no loss.
    """
    mask_BL = (segments_BL == following(segments_BL)) & (segments_BL > 0)
    return mask_BL if answers_BL is None else mask_BL & (following(answers_BL) > 0)


def following(x_BL: Integer[Array, "B L"]) -> Integer[Array, "B L"]:
    """What each token's successor has; 0 at the last one."""
    return jnp.pad(x_BL[:, 1:], ((0, 0), (0, 1)))


def count_true(mask_BL: Bool[Array, "*B"]) -> Float[Array, ""]:
    """The number of positions where the mask is True, at least 1."""
    return jnp.maximum(jnp.sum(mask_BL, dtype=jnp.float32), 1.0)


@jax.named_scope("task_loss")
def cross_entropy(
    logits_BLV: Float[Array, "B L V"],
    tokens_BL: Int[Array, "*B"],
    loss_mask_BL: Bool[Array, "*B"],
    count: Float[Array, ""],
) -> Float[Array, ""]:
    """Negative log-likelihood of the next token, nats per predicted token: L_task of Eq. 6."""
    return nll(logits_BLV, following(tokens_BL), loss_mask_BL, count)


def tokens_of_texts(
    segments_BL: Int[Array | np.ndarray, "B L"], texts: int
) -> Bool[Array | np.ndarray, "B S L"]:
    """True at the tokens of a row's texts, which are its segments 1 to `texts` (= S)."""
    return segments_BL[:, None] == np.arange(1, texts + 1, dtype=np.int32)[None, :, None]


@jax.named_scope("task_loss")
def label_loss(
    logits_BSY: Float[Array, "B S Y"],
    labels_BS: Num[Array, "B S"],
    text_mask_BS: Bool[Array, "B S"],
    count: Float[Array, ""],
) -> Float[Array, ""]:
    """Negative log-likelihood of each text's class, in nats; with one output, the squared error."""
    if logits_BSY.shape[-1] > 1:
        return nll(logits_BSY, labels_BS.astype(jnp.int32), text_mask_BS, count)
    error_BS = logits_BSY[..., 0].astype(jnp.float32) - labels_BS
    return jnp.sum(jnp.where(text_mask_BS, error_BS**2, 0.0)) / count


@jax.named_scope("task_loss")
def nll(
    logits_BLV: Float[Array, "*B V"],
    targets_BL: Int[Array, "*B"],
    mask_BL: Bool[Array, "*B"],
    count: Float[Array, ""],
) -> Float[Array, ""]:
    """Negative log-likelihood of the targets, in nats."""
    logp_BLV = jax.nn.log_softmax(logits_BLV.astype(jnp.float32))
    logp_BL = jnp.take_along_axis(logp_BLV, targets_BL[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(mask_BL, logp_BL, 0.0)) / count


@jax.named_scope("distillation")
def distillation(
    logits_BLV: Float[Array, "*B V"],
    teacher_BLV: Float[Array, "*B V"],
    token_mask_BL: Bool[Array, "*B"],
    count: Float[Array, ""],
) -> Float[Array, ""]:
    """KL(teacher || model), nats per real token or text (Hinton et al. 2015, temperature 1).

    Includes the last token of a text, which has no target but does have a teacher prediction. With
    one output, the squared difference.
    """
    if logits_BLV.shape[-1] == 1:
        gap_BL = (logits_BLV - teacher_BLV)[..., 0].astype(jnp.float32)
        return jnp.sum(jnp.where(token_mask_BL, gap_BL**2, 0.0)) / count
    logp_BLV = jax.nn.log_softmax(logits_BLV.astype(jnp.float32))
    teacher_logp_BLV = jax.nn.log_softmax(teacher_BLV.astype(jnp.float32))
    kl_BL = jnp.sum(jnp.exp(teacher_logp_BLV) * (teacher_logp_BLV - logp_BLV), axis=-1)
    return jnp.sum(jnp.where(token_mask_BL, kl_BL, 0.0)) / count


@jax.named_scope("hidden_distillation")
def hidden_distillation(
    x_NBLD: Float[Array, "N B L D"],
    teacher_NBLD: Float[Array, "N B L D"],
    token_mask_BL: Bool[Array, "B L"],
    count: Float[Array, ""],
) -> Float[Array, ""]:
    """Squared distance of each layer's FFN input to the teacher's, over the latter's square.

    The mean over layers and real tokens. It tells every layer what to keep, where the KL of the
    outputs tells only the sum of all.
    """
    x_NBLD, teacher_NBLD = x_NBLD.astype(jnp.float32), teacher_NBLD.astype(jnp.float32)
    square_NBL = jnp.sum(teacher_NBLD**2, axis=-1)
    share_NBL = jnp.sum((x_NBLD - teacher_NBLD) ** 2, axis=-1) / jnp.maximum(square_NBL, 1e-6)
    return jnp.sum(jnp.where(token_mask_BL[None], share_NBL, 0.0)) / (len(share_NBL) * count)


@jax.named_scope("efficiency")
def efficiency(
    scores_NBLE: Float[Array, "N B L E"],
    token_mask_BL: Bool[Array, "B L"],
    count: Float[Array, ""],
    power: int = 2,
    weight_N: Float[Array, " N"] | float = 1.0,
) -> Float[Array, ""]:
    """Mean score to the `power` over layers, real tokens and experts (Eq. 4 prints the square).

    With `weight`, each layer's counts so much.
    """
    scores_NBLE = scores_NBLE.astype(jnp.float32)
    return jnp.mean(weight_N * layer_means(scores_NBLE**power, token_mask_BL, count))


@jax.named_scope("separability")
def separability(
    scores_NBLE: Float[Array, "N B L E"],
    token_mask_BL: Bool[Array, "B L"],
    count: Float[Array, ""],
    threshold: Float[Array, "*N"] | float,
    eps: float,
) -> Float[Array, ""]:
    """Mean of 1 / ((G - tau)^2 + eps): pushes scores away from the threshold.

    Eq. 5 with a guard: as printed (eps = 0), a score at the threshold divides by zero, and the
    expectation is infinite for any continuous density of scores that is positive there.
    """
    distance_NBLE = scores_NBLE.astype(jnp.float32) - jnp.reshape(threshold, (-1, 1, 1, 1))
    return jnp.mean(layer_means(1.0 / (distance_NBLE**2 + eps), token_mask_BL, count))


def layer_means(
    values_NBLE: Float[Array, "N B L E"] | Bool[Array, "N B L E"],
    token_mask_BL: Bool[Array, "B L"],
    count: Float[Array, ""] | None = None,
) -> Float[Array, " N"]:
    """Mean over real tokens and experts, per layer; of active experts, the active fraction.

    Args:
      values_NBLE: scores, or which experts are active.
      token_mask_BL: True at real tokens.
      count: of real tokens in the whole batch, if this is a microbatch; None: count these.
    """
    count = count_true(token_mask_BL) if count is None else count
    per_token_NBL = jnp.mean(values_NBLE.astype(jnp.float32), axis=3)
    return jnp.sum(jnp.where(token_mask_BL[None], per_token_NBL, 0.0), axis=(1, 2)) / count
